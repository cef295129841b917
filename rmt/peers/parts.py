"""Parts of the image tower, trained in place: its biases (BitFit), or the gains and biases of its norms."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Size, Tensor, nn

from ..config import UserError
from .footing import Footing
from .masks import RAMT
from .method import Fit, Method, State, cosine_logits
from .train import cosine_rates, count, train

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class TowerPart(Method):
    """AdamW with a cosine to 0 on some parameters of the image tower. What is stored: those, by state-dict name.

    The class vectors stay as they are, and so does `logit_scale`. The model is in eval mode while it trains: no
    BatchNorm statistic moves. As many steps as masks take on the same sample (`mask_steps`): where no authors give a
    length for few shots, the same images in the same number for both is what leaves least to chance.
    """

    kind = "image"
    lr: ClassVar[float] = 1e-3
    decay: ClassVar[float] = 0.0
    # Largest global norm of a step's gradients.
    clip: ClassVar[float | None] = None

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is trained, by state-dict name."""
        raise NotImplementedError

    def fit(self, footing: Footing, state: State) -> Fit:
        """Raises UserError for a tower without such parameters."""
        model = footing.copy(state)
        mine = self.parameters(model)
        if not mine:
            raise UserError(f"{self.name} found nothing to train in {type(model.visual).__name__}: leave it out")
        steps, published = mask_steps(footing)
        lr = footing.rate(self.name, self.lr)
        values = [p.requires_grad_(True) for p in mine.values()]
        optimizer = torch.optim.AdamW(values, lr=lr, weight_decay=self.decay)
        if self.clip is not None:

            def clip(*_: object) -> None:
                nn.utils.clip_grad_norm_(values, self.clip)

            optimizer.register_step_pre_hook(clip)
        train(footing, model, optimizer, cosine_rates(lr, steps), lambda: state.text, self.title)
        chosen = {"lr": lr, "weight_decay": self.decay, "clip": self.clip}
        return Fit({key: p.detach() for key, p in mine.items()}, count(values), chosen, steps, published)

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """A copy of the model with the stored parameters in place of its own."""
        model = footing.copy(state)
        mine = self.parameters(model)
        need_for_model(self.name, stored, {key: p.shape for key, p in mine.items()})
        with torch.no_grad():
            for key, p in mine.items():
                p.copy_(stored[key])
        return State(model, (*state.stack, self.name), state.text, cosine_logits(model, state.text))


class BitFit(TowerPart):
    """All biases of the image tower, those of the norms too, as BitFit has it for BERT."""

    name, title = "bitfit", "BitFit"
    source = (
        "Ben Zaken et al., ACL 2022, for BERT; on CLIP as FarinaMatteo/rethinking_fewshot_vlms ships it (--peft bitfit)"
        "; image tower alone, AdamW 1e-3 without decay, as many steps as masks: ours"
    )

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """`bias`, `in_proj_bias` of packed attention, and the like of other trunks."""
        named = model.visual.named_parameters(prefix="visual")
        return {key: p for key, p in named if key.endswith("bias")}


class LayerNormTuning(TowerPart):
    """Gains and biases of the image tower's norms: LayerNorm of a ViT, the affine part of a ResNet's BatchNorm."""

    name, title = "ln", "LayerNorm tuning"
    source = (
        "on CLIP as FarinaMatteo/rethinking_fewshot_vlms ships it (--peft ln); image tower alone, AdamW 1e-3 without "
        "decay, as many steps as masks: ours"
    )

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """`weight` and `bias` of every norm."""
        norms = (item for item in model.visual.named_modules(prefix="visual") if isinstance(item[1], _NORMS))
        return {f"{name}.{key}": p for name, norm in norms for key, p in norm.named_parameters(recurse=False)}


def mask_steps(footing: Footing) -> tuple[int, int]:
    """(steps that R-AMT takes on this footing, steps of its recipe on the sample).

    The recipe: 30 epochs (ImageNet 10), more where few masks could flip.
    """
    recipe = RAMT()
    _, made, published = recipe.schedule(footing, recipe.config(footing))
    return len(made.rates), published


def need_for_model(method: str, stored: Mapping[str, Tensor], shapes: Mapping[str, Size]) -> None:
    """Raises UserError where what a method stored was fitted on another model."""
    for key in sorted({*stored, *shapes}):
        want, got = shapes.get(key), stored[key].shape if key in stored else None
        if want != got:
            want, got = ("nothing" if shape is None else tuple(shape) for shape in (want, got))
            raise UserError(f"what {method} stored is of another model: {key} must be {want}, got {got}; fit it again")
