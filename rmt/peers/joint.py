"""CoOp + R-AMT: context vectors and masks trained together, on one task loss.

The paper's synergy table has it (72.01 to 73.35 on ImageNet, 79.90 to 83.16 on average at 16 shots, ViT-B/16); its code
has not been published. Ours: the masks' batches, steps and recipe, with CoOp's optimiser for the vectors beside it. The
teacher is zero-shot CLIP with the template's class vectors, as for R-AMT alone, so that gradient dropout ties the masks
to what the template knows; the vectors follow the task loss alone.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import rmt_kernels

from .. import clip
from ..backward import backward
from ..config import RunConfig
from ..data import prefetch
from ..masked import Mask
from ..optim import MaskAdam
from ..rivals import drop
from ..step import both_logits
from .context import Context
from .coop import LR, CoOp, coop_chosen, coop_epochs, coop_optimizer
from .footing import Footing
from .heads import dassl_rates
from .masks import MaskTuning
from .method import Fit, Method, State, cosine_logits


class Joint(Method):
    """One unit of masks and context. Not in METHODS: `names.parse` makes it of `coop+ramt`."""

    kind = "image"

    def __init__(self, masks: MaskTuning, context: CoOp) -> None:
        self.masks, self.context = masks, context
        self.name, self.title = f"{context.name}+{masks.name}", f"{context.title} + {masks.title}"
        self.source = "Zheng et al., ICCV 2023, its README's synergy table; training ours, no code is published"

    def fit(self, footing: Footing, state: State) -> Fit:
        """Trains both; the task folder and the vectors are what is stored."""
        masks = self.masks
        config, made, published = masks.schedule(footing, masks.config(footing))
        setup = masks.setup(footing, state, config)
        context = self.context.context(footing, setup.clip.model)
        steps = len(made.rates)
        lr = footing.rate(self.context.name, LR)
        rates = dassl_rates(lr, steps, coop_epochs(footing.config))
        optimizer = MaskAdam(setup.masks, lr=made.rates[0], state=config.train.adam)
        _train(footing, config, setup.masks, state, context, optimizer, list(zip(made.rates, rates)), self.title)
        fit = masks.stored(footing, setup, config, made, published)
        chosen = {**fit.chosen, "context": coop_chosen(footing, self.context) | {"lr": lr, "epochs": None}}
        return Fit(
            context.stored(), fit.trained + context.vectors.numel(), chosen, steps, published, files=fit.files,
            facts=fit.facts, notes=fit.notes,
        )  # fmt: skip

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """A plain model with the masks merged in, and the class vectors that its text tower makes of the context."""
        masked = self.masks.restore(footing, state, {})
        context = self.context.context(footing, masked.model)
        context.load(stored)
        with torch.no_grad():
            text = context.text()
        return State(masked.model, (*state.stack, self.name), text, cosine_logits(masked.model, text))


@dataclass(frozen=True)
class Prompted(clip.Text):
    """The student's class vectors are the context's, the teacher's the template's."""

    context: Context

    def student(self) -> Tensor:
        """(C, D), with a graph to the vectors."""
        return self.context.text()


def _train(
    footing: Footing, config: RunConfig, masks: list[Mask], state: State, context: Context, optimizer: MaskAdam,
    rates: list[tuple[float, float]], label: str,
) -> None:  # fmt: skip
    """One step of both for each pair of rates. The two gradients of the masks are those of `rmt.step.gradients`."""
    train, device = config.train, footing.device
    vectors = coop_optimizer([context.vectors])
    text = Prompted(context.model, footing.text.tokens, state.text, context)
    steps = range(len(rates))
    with footing.training(label, len(rates)) as done:
        for step, (image, target) in zip(steps, prefetch(footing.batches(), steps)):
            image, target = image.to(device), target.to(device)
            optimizer.set_lr(rates[step][0])
            vectors.param_groups[0]["lr"] = rates[step][1]
            logits, teacher = both_logits(context.model, text, image, train, alike=False)
            task = F.cross_entropy(logits, target)
            # The vectors' gradient first: their path is the text tower alone, and the graph is needed once more.
            (context.vectors.grad,) = torch.autograd.grad(task, [context.vectors], retain_graph=True)
            cotangents = rmt_kernels.logit_cotangents(logits.detach(), teacher, target, train.temperature)
            backward(
                task, (logits, cotangents[1]), optimizer, strength=train.strength, seed=config.seed, step=step,
                l2=train.l2,
            )  # fmt: skip
            if train.dropout != "agreement":
                drop(optimizer, train.dropout)
            optimizer.step()
            vectors.step()
            done(step, task.item())
