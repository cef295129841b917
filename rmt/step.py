"""One training step: both forwards, both backward passes, the update."""

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmt_kernels

from . import clip
from .backward import backward
from .config import TrainConfig
from .optim import MaskAdam
from .rivals import drop
from .tail import class_token_tail


class Step:
    """One step after the other, each run as it stands.

    Args:
        model: a masked model. text: (C, D) text features, or a `clip.Text` where the text tower has masks.
        optimizer: of the model's masks. config: a resolved one. seed: of the draws.
        total: images of the whole batch, where this process has a share of it; None: those of the call.
    """

    def __init__(
        self, model: nn.Module, text: Tensor | clip.Text, optimizer: MaskAdam, config: TrainConfig, *, seed: int,
        total: int | None = None,
    ) -> None:  # fmt: skip
        self.model, self.text, self.optimizer, self.config, self.seed = model, text, optimizer, config, seed
        self.total = total
        self.outputs: tuple[Tensor, ...] = ()

    def __call__(self, image: Tensor, label: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, teacher logits (B, C) and labels, before the update. Raises ValueError for scores that became NaN."""
        self.outputs = gradients(
            self.model, self.text, image, label, self.optimizer, self.config, seed=self.seed, step=step,
            total=self.total,
        )  # fmt: skip
        self.optimizer.step()
        return self.outputs


def gradients(
    model: nn.Module, text: Tensor | clip.Text, image: Tensor, label: Tensor, optimizer: MaskAdam, config: TrainConfig,
    *, seed: int | Tensor, step: int | Tensor, alike: bool | None = None, total: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One student forward, one teacher forward without a graph and two backward passes, into the optimizer's buffers.

    No loss is scaled: the sign test has an absolute constant, GDR_EPS. With `accumulate` the batch comes in parts whose
    gradients are summed, task and general apart, before the test. Returns logits, teacher logits (B, C) and labels.

    With `shortcuts` the general loss has its cotangent in closed form, and while every bit is on, so that student and
    teacher are one model, that is 0: one forward serves both, no pass carries the 0 through the network, and a step
    costs half, to the same bits. And the last block's tail runs for the class token alone (`rmt.tail`). Without, the
    step is the official one op for op. `alike` says whether every bit is on; None: ask the masks. `total` counts the
    images of the whole batch where other processes have the rest: None, those here.

    Where `dropout` is a rival of the method's (`rmt.rivals`), one gradient takes the place of the two at the end.
    """
    device, outputs = optimizer.masks[0].scores.device, []
    if alike is None:
        alike = config.shortcuts and optimizer.all_on()
    # Neither dropout in the towers nor text that is masked: what else could tell the two apart.
    alike = alike and not model.training and not (isinstance(text, clip.Text) and text.masked)
    parts = list(zip(*(optimizer.gradients.parts(t, config.accumulate, total) for t in (image, label))))
    for n, (x, y) in enumerate(parts):
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        logits, teacher = both_logits(model, text, x, config, alike)
        share = len(x) / (total or len(image))
        if alike:
            general = 0
        elif config.shortcuts:
            general = logits, rmt_kernels.logit_cotangents(logits.detach(), teacher, y, config.temperature)[1] * share
        else:
            general = general_loss(logits, teacher, config.temperature) * share
        backward(
            F.cross_entropy(logits, y) * share, general, optimizer, strength=config.strength, seed=seed, step=step,
            l2=config.l2, more=n + 1 < len(parts),
        )  # fmt: skip
        outputs.append((logits.detach(), teacher, y))
    if config.dropout != "agreement":
        drop(optimizer, config.dropout)
    return tuple(torch.cat(t) for t in zip(*outputs))


def both_logits(
    model: nn.Module, text: Tensor | clip.Text, image: Tensor, config: TrainConfig, alike: bool
) -> tuple[Tensor, Tensor]:
    """Student's (B, C) logits with a graph, and the teacher's; `alike`: no bit is off, so that they are the same."""
    tail = class_token_tail(model) if config.shortcuts else contextlib.nullcontext()
    with tail, torch.autocast(image.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        # The teacher first: its activations are gone before the student's are kept.
        if not alike:
            teacher = clip.frozen_logits(model, image, text.teacher() if isinstance(text, clip.Text) else text)
        logits = clip.logits(model, image, text.student() if isinstance(text, clip.Text) else text)
    return logits, logits.detach() if alike else teacher


def general_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * H(softmax(teacher / T), softmax(logits / T)), the official KLLoss: the KL divergence and a constant.

    logits, teacher: (B, C) fp32.
    """
    t = temperature
    return -((teacher / t).softmax(1) * (logits / t).log_softmax(1)).sum(1).mean() * t * t
