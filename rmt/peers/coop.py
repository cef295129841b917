"""CoOp: context vectors in place of a template's words, trained through the frozen text tower.

Zhou et al., IJCV 2022 (arXiv 2109.01134). Recipe: KaiyangZhou/CoOp, trainers/coop.py, configs/trainers/CoOp and COOP.md
(epochs by shots); momentum, weight decay and the schedule around warm-up: KaiyangZhou/Dassl.pytorch.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import RunConfig
from .context import Context
from .footing import Footing
from .heads import WARMUP_LR, augmented, dassl_rates, shuffled, train_head
from .method import Fit, Method, State, cosine_logits
from .train import count

LR, MOMENTUM, WEIGHT_DECAY = 2e-3, 0.9, 5e-4
PHOTO = "a photo of a"


class CoOp(Method):
    """Unified context of 16 random vectors, the class name last; the last step's vectors are kept."""

    name, title, kind = "coop", "CoOp", "text"
    source = "Zhou et al., IJCV 2022; KaiyangZhou/CoOp, trainers/coop.py and configs/trainers/CoOp/vit_b16*.yaml"
    n_ctx: ClassVar[int] = 16
    init: ClassVar[str | None] = None
    class_specific: ClassVar[bool] = False

    def context(self, footing: Footing, model: nn.Module) -> Context:
        """The untrained vectors in front of the sample's class names."""
        return Context(
            model, footing.loaded.tokenizer, footing.split.classnames, n_ctx=self.n_ctx, init=self.init,
            class_specific=self.class_specific, seed=footing.config.seed,
        )  # fmt: skip

    def fit(self, footing: Footing, state: State) -> Fit:
        """Trains on the state's augmented features: its image tower is frozen."""
        context, rates = self.context(footing, state.model), coop_rates(footing, self.name)

        def logits(features: Tensor) -> Tensor:
            with torch.autocast(footing.device.type, torch.bfloat16, enabled=low(footing)):
                text = context.text()
            return cosine_logits(state.model, text)(features)

        batch = coop_batch(footing)
        tune(footing, state, self.title, [context.vectors], rates, batch, logits)
        chosen = coop_chosen(footing, self) | {"batch": batch}
        published = coop_epochs(footing.config) * batches_per_epoch(footing, batch)
        trained = count(context.parameters())
        return Fit(context.stored(), trained, chosen, len(rates), published, notes=notes(footing))

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """The class vectors of the stored context."""
        context = self.context(footing, state.model)
        context.load(stored)
        with torch.no_grad():
            text = context.text()
        return State(state.model, state.stack, text, cosine_logits(state.model, text))


class CoOpPhoto(CoOp):
    """Four vectors that start as "a photo of a"."""

    name, title = "coop_photo", "CoOp (a photo of a)"
    source = "Zhou et al., IJCV 2022; KaiyangZhou/CoOp, configs/trainers/CoOp/vit_b16_ctxv1.yaml"
    n_ctx, init = 4, PHOTO


class CoOpClassSpecific(CoOp):
    """Sixteen random vectors for each class."""

    name, title = "coop_csc", "CoOp (class-specific)"
    source = "Zhou et al., IJCV 2022; KaiyangZhou/CoOp, TRAINER.COOP.CSC True"
    class_specific = True


def coop_epochs(config: RunConfig) -> int:
    """COOP.md: 200 at 16 and 8 shots, 100 at 4 and 2, 50 at 1 and on ImageNet. Shots in between as the next above."""
    if config.dataset == "imagenet" or config.shots == 1:
        return 50
    return 200 if config.shots == "all" or config.shots > 4 else 100


def coop_batch(footing: Footing) -> int:
    """Images a step: the footing's, 32 as the authors' unless it is set, of at most all."""
    return min(footing.config.train.batch, len(footing.split.train))


def coop_rates(footing: Footing, name: str) -> list[float]:
    """The rate of every step that the method `name` takes, in batches of `coop_batch`."""
    epochs, steps = coop_epochs(footing.config), batches_per_epoch(footing, coop_batch(footing))
    return dassl_rates(footing.rate(name, LR), footing.feature_steps(epochs * steps), epochs)


def coop_optimizer(parameters: Sequence[Tensor]) -> torch.optim.SGD:
    """Dassl's SGD; its rate is to be set before every step."""
    return torch.optim.SGD(parameters, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)


def coop_chosen(footing: Footing, method: CoOp) -> dict:
    """The hyperparameters, for `Fit.chosen`."""
    return {
        "lr": footing.rate(method.name, LR), "epochs": coop_epochs(footing.config), "momentum": MOMENTUM,
        "weight_decay": WEIGHT_DECAY, "warmup_lr": WARMUP_LR, "n_ctx": method.n_ctx, "init": method.init,
        "class_specific": method.class_specific,
    }  # fmt: skip


def batches_per_epoch(footing: Footing, batch: int) -> int:
    """An epoch's incomplete last batch is dropped, unless it is the only one."""
    return max(1, len(footing.split.train) // batch)


def tune(
    footing: Footing, state: State, label: str, parameters: Sequence[Tensor], rates: Sequence[float], batch: int,
    logits: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """One SGD step for each rate, on the cross-entropy of `logits`, over the state's augmented features.

    Every epoch is a permutation drawn from the seed, cut into batches. logits: (B, D) features, not normalised ->
    (B, C), with a graph to `parameters`.

    Raises: UserError for a loss that is not finite.
    """
    each, labels = batches_per_epoch(footing, batch), footing.labels("train")
    images = augmented(footing, state, -(-len(rates) // each))
    rng = torch.Generator().manual_seed(footing.config.seed)
    train_head(
        footing, coop_optimizer(parameters), rates, lambda epoch: shuffled(images(epoch), labels, batch, rng, each),
        logits, label,
    )  # fmt: skip


def low(footing: Footing) -> bool:
    """Whether towers train under autocast to bf16; the cosines and the loss stay fp32."""
    return footing.config.train.precision == "bf16"


def notes(footing: Footing) -> tuple[str, ...]:
    """What differs from the authors' training, whatever the sample."""
    return (
        f"augmented passes repeat every {footing.views} epochs",
        "crops of 0.5 to 1 of the image, as for all methods; the authors' are of 0.08 to 1 (Dassl's RRCROP_SCALE)",
    )
