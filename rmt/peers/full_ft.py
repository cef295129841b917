"""The whole image tower, fine-tuned; and WiSE-FT, halfway from it to the zero-shot weights."""

from torch import Tensor, nn

from ..config import UserError
from .footing import Footing
from .method import Fit, State
from .parts import TowerPart, mask_steps, need_for_model
from .train import count

# Share of the fine-tuned weights: the middle, which mlfoundations/wise-ft has as its default; nothing is chosen.
ALPHA = 0.5


class FullFineTuning(TowerPart):
    """Every parameter of the image tower, by AdamW with weight decay 0.1 on all of them, gradients clipped to norm 1.

    From mlfoundations/wise-ft: AdamW, the clipping, the cosine, no parameter left out of the decay. There a run is ten
    epochs of ImageNet in batches of 512 at 3e-5, after a warm-up; ours takes 1e-5 in batches of 32, about what
    sqrt(32 / 512) makes of it, over as many steps as masks take, and no warm-up, which would be most of a short run.

    The class vectors stay zero-shot's, where wise-ft trains a linear head that begins with them: they are then those
    that all image methods here share, so that the difference is the tower's, and class vectors of length 1 are what
    text methods and heads are put on top of. `logit_scale` is frozen, as in all methods.
    """

    name, title = "full_ft", "full fine-tuning"
    source = (
        "mlfoundations/wise-ft (src/models/finetune.py): AdamW, norm clipped to 1, cosine; decay 0.1, lr 1e-5, as many "
        "steps as masks, no warm-up, class vectors fixed: ours"
    )
    lr, decay, clip = 1e-5, 0.1, 1.0

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """All of `visual`."""
        return dict(model.visual.named_parameters(prefix="visual"))


class WiseFT(FullFineTuning):
    """theta = (1 - alpha) * zero-shot + alpha * fine-tuned, for every weight of the image tower; alpha is 0.5."""

    name, title = "wise_ft", "WiSE-FT"
    source = "Wortsman et al., CVPR 2022, mlfoundations/wise-ft (src/wise_ft.py), alpha 0.5; fine-tuned as full_ft"

    def fit(self, footing: Footing, state: State) -> Fit:
        """From what full_ft stored on the sample: no step of its own. Raises UserError where there is none to ask."""
        if footing.fitted is None:
            raise UserError("wise_ft starts from the weights of full_ft, and this footing fits none: use rmt compare")
        tuned: dict[str, Tensor] = footing.fitted("full_ft")
        start = {key: p.detach() for key, p in self.parameters(state.model).items()}
        need_for_model("full_ft", tuned, {key: p.shape for key, p in start.items()})
        stored = {key: (1 - ALPHA) * p + ALPHA * tuned[key].to(p) for key, p in start.items()}
        steps, published = mask_steps(footing)
        notes = ("the steps are those of full_ft",)
        return Fit(stored, count(stored.values()), {"alpha": ALPHA}, steps, published, notes=notes)
