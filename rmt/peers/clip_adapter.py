"""CLIP-Adapter: a bottleneck on the image features, mixed with them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError
from .coop import coop_epochs, notes
from .footing import Footing
from .heads import augmented, dassl_rates, shuffled, train_head
from .method import Fit, Method, State

REDUCTION, RATIO = 4, 0.2
LR, MOMENTUM, DECAY = 2e-3, 0.9, 5e-4


class ClipAdapter(Method):
    """logits of `0.2 relu(up relu(down f)) + 0.8 f`: f (B, D) not normalised, down (D / 4, D), up (D, D / 4), no bias.

    The layers and the ratio are those of the authors' code, which holds no configuration: their README sends one to
    CoOp's command, whose SGD, rate, schedule, warm-up and epochs are taken here; momentum and decay are Dassl's.
    Ours: epochs by shots on data other than ImageNet, as CoOp's; augmented passes that repeat, of all methods' crops
    (`notes` of coop.py); the ratio is not searched for on each data set, as the paper does. The last step counts.
    """

    name, title, kind = "clip_adapter", "CLIP-Adapter", "head"
    source = (
        "Gao et al., IJCV 2024: gaopengcuhk/CLIP-Adapter, clip_adapter.py; optimisation of KaiyangZhou/CoOp, "
        "configs/trainers/CoOp/rn50*.yaml, which its README refers to"
    )

    def fit(self, footing: Footing, state: State) -> Fit:
        """stored: down (D / 4, D), up (D, D / 4). Raises UserError for a loss that is not finite, or on top of logits
        that give their features no gradient."""
        labels, size = footing.labels("train"), footing.config.train.batch
        random = torch.Generator().manual_seed(footing.config.seed)
        width = state.text.shape[1]
        down, up = (
            _linear(*shape, random).to(footing.device).requires_grad_()
            for shape in ((width // REDUCTION, width), (width, width // REDUCTION))
        )
        if not state.logits(torch.ones(1, width, device=footing.device, requires_grad=True)).requires_grad:
            raise UserError(
                "clip_adapter trains what stands before the class vectors, and those of the method below it depend on "
                "the image, without a gradient (cocoop's do): leave one of the two out"
            )
        epochs, each = coop_epochs(footing.config), max(1, len(labels) // size)
        steps, lr = footing.feature_steps(epochs * each), footing.rate(self.name, LR)
        images = augmented(footing, state, -(-steps // each))
        train_head(
            footing, torch.optim.SGD([down, up], lr, MOMENTUM, weight_decay=DECAY), dassl_rates(lr, steps, epochs),
            lambda epoch: shuffled(images(epoch), labels, size, random, each),
            lambda f: state.logits(adapted(f, down, up)), self.name,
        )  # fmt: skip
        chosen = {
            "ratio": RATIO, "reduction": REDUCTION, "lr": lr, "batch": size, "epochs": epochs, "momentum": MOMENTUM,
            "weight_decay": DECAY,
        }  # fmt: skip
        stored = {"down": down.detach().cpu(), "up": up.detach().cpu()}
        return Fit(stored, down.numel() + up.numel(), chosen, steps, epochs * each, notes=notes(footing))

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """The formula of the class, into the logits of `state`."""
        down, up = (stored[key].to(footing.device) for key in ("down", "up"))
        return State(state.model, state.stack, state.text, lambda f: state.logits(adapted(f.float(), down, up)))


def adapted(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """(B, D) -> (B, D), neither of length 1."""
    return RATIO * F.relu(F.linear(F.relu(F.linear(features, down)), up)) + (1 - RATIO) * features


def _linear(out: int, inputs: int, random: torch.Generator) -> Tensor:
    """(out, inputs), drawn as nn.Linear's weight."""
    bound = 1 / math.sqrt(inputs)
    return torch.empty(out, inputs).uniform_(-bound, bound, generator=random)
