"""R-AMT's own op sequence as published (wuw2019/R-AMT at 07f8d2c, transcribed), of a layer and of a whole step."""

import contextlib
import copy
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THRESHOLD, L2, EPS = 5e-3, 1e-4, 1e-8
# What R-AMT masks (MASK_MLP False): the patch convolution, and every block's in- and out-projection.
MASKED = re.compile(r"visual\.(conv1\.|transformer\.resblocks\.\d+\.attn\.(in_proj_|out_proj\.))weight")


class Binarizer(torch.autograd.Function):
    """1 where a score is above the threshold, else 0; the gradient goes straight through."""

    @staticmethod
    def forward(ctx, scores: Tensor) -> Tensor:
        mask = scores.clone()
        mask[scores.le(THRESHOLD)] = 0
        mask[scores.gt(THRESHOLD)] = 1
        return mask

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def effective_weight(weight: Tensor, scores: Tensor) -> Tensor:
    """Binarizer, then the product with the frozen weight: clone, le, fill, gt, fill, mul."""
    return Binarizer.apply(scores) * weight


def forward(x: Tensor, weight: Tensor, scores: Tensor, bias: Tensor) -> Tensor:
    """One training forward: the mask is made anew every time."""
    return F.linear(x, effective_weight(weight, scores), bias)


def score_gradients(x: Tensor, g_task: Tensor, g_general: Tensor, weight: Tensor, scores: Tensor) -> tuple:
    """The two backward passes of one layer, up to the scores: two products, two chain rules, the norm's gradient."""
    return chain_rule(g_task.T @ x, g_general.T @ x, weight, scores)


def chain_rule(grad_task: Tensor, grad_general: Tensor, weight: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """From the weight gradients to the scores' own, with the gradient of 1e-4 * norm(scores)."""
    b = (grad_general * weight).clone()
    norm = torch.norm(scores, 2)
    penalty = (scores / norm * L2).masked_fill_(norm == 0, 0)
    return penalty + grad_task * weight, b


def gradient_dropout(a: Tensor, b: Tensor, strength: float, uniform: Tensor | None = None) -> Tensor:
    """graddrop_backward_and_update: 16 elementwise passes. `uniform` replaces torch.rand where a check needs it."""
    grad = a.clone()
    purity = torch.div(torch.sign(grad) * (grad + b), torch.abs(grad) + torch.abs(b) + EPS)
    probability = (purity + 1) / 2
    uniform = torch.rand(grad.shape, device=grad.device) if uniform is None else uniform
    keep = torch.gt(probability, uniform)
    return ((1 - strength) + strength * keep) * grad


def adam(scores: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float) -> None:
    """torch.optim.Adam's single-tensor update: seven passes."""
    exp_avg.lerp_(grad, 0.1)
    exp_avg_sq.mul_(0.999).addcmul_(grad, grad, value=0.001)
    denom = (exp_avg_sq.sqrt() / (1 - 0.999**step) ** 0.5).add_(1e-8)
    scores.addcdiv_(exp_avg, denom, value=-lr / (1 - 0.9**step))


def epilogue_and_update(grad_task, grad_general, weight, scores, exp_avg, exp_avg_sq, strength: float) -> None:
    """Everything weight-sized after the two products."""
    a, b = chain_rule(grad_task, grad_general, weight, scores)
    adam(scores, gradient_dropout(a, b, strength), exp_avg, exp_avg_sq, 1, 0.0)


def masked_names(clip: nn.Module) -> list[str]:
    """State-dict names of the weights that R-AMT masks."""
    return [name for name, _ in clip.named_parameters() if MASKED.fullmatch(name)]


class Tuner:
    """R-AMT's training step of an open_clip model: two image towers, two backward passes, torch's Adam.

    As in the published code the teacher's tower is not frozen: the backward of the general loss goes through it and
    adds to gradients that nothing reads.

    Args:
        clip: the teacher, left as it is but for those gradients. text: (C, D) normalised text features.
        scores: state-dict name of a masked weight -> its first scores, in the weight's shape; trained in place.
        lr: of Adam. strength: of the dropout.
        teacher_graph: False runs the teacher under `no_grad`, which changes no other number.
        autocast: dtype of both towers (losses, scores and Adam stay fp32), or None.
    """

    def __init__(
        self, clip: nn.Module, text: Tensor, scores: dict[str, Tensor], lr: float, strength: float,
        teacher_graph: bool = True, autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        # Without a graph the flag costs nothing and keeps the numbers: F.linear folds transposed rows into one product
        # only while its weight has it, and rounds differently where it does not.
        self.clip, self.text, self.strength = clip.requires_grad_(True), text, strength
        self.teacher_graph, self.autocast = teacher_graph, autocast
        self.student = copy.deepcopy(clip.visual).requires_grad_(False)
        self.scores = {name: value.requires_grad_() for name, value in scores.items()}
        self.optimizer = torch.optim.Adam(self.scores.values(), lr=lr)

    def logits(self, features: Tensor) -> Tensor:
        features = features.float()
        with torch.autocast(features.device.type, enabled=False):
            features = features / features.norm(dim=-1, keepdim=True)
            return self.clip.logit_scale.exp() * features @ self.text.t()

    def teacher_logits(self, image: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.teacher_graph), self._towers(image):
            return self.logits(self.clip.visual(image))

    def student_logits(self, image: Tensor) -> Tensor:
        names = {name: name.removeprefix("visual.") for name in self.scores}
        weights = {
            short: effective_weight(self.student.get_parameter(short), self.scores[name])
            for name, short in names.items()
        }
        with self._towers(image):
            return self.logits(torch.func.functional_call(self.student, weights, (image,)))

    def _towers(self, image: Tensor) -> contextlib.AbstractContextManager:
        return torch.autocast(image.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def losses(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy with the L2 term (norms, not squared), and the cross entropy to the teacher's softmax."""
        teacher, logits = self.teacher_logits(image), self.student_logits(image)
        norms = sum(torch.norm(m, 2) for m in self.scores.values())
        general = torch.mean(torch.sum(-teacher.softmax(1) * logits.log_softmax(1), 1))
        return F.cross_entropy(logits, label) + L2 * norms, general

    def step(self, image: Tensor, label: Tensor, uniforms: list[Tensor] | None = None) -> None:
        """One step. uniforms: the draws of each mask, in place of torch.rand."""
        with plain_attention():
            task, general = self.losses(image, label)
        self.optimizer.zero_grad()
        general.backward(retain_graph=True)
        kept = [m.grad.clone() for m in self.scores.values()]
        self.optimizer.zero_grad()
        task.backward()
        self.update(kept, uniforms)

    def update(self, kept: list[Tensor], uniforms: list[Tensor] | None) -> None:
        """Dropout of the task's gradients, which lie in `.grad`, by the general ones `kept`; then Adam."""
        for i, (m, b) in enumerate(zip(self.scores.values(), kept)):
            m.grad = gradient_dropout(m.grad, b, self.strength, None if uniforms is None else uniforms[i])
        self.optimizer.step()

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """Adam's two running means of each mask, live; there from the first step on."""
        states = [self.optimizer.state[m] for m in self.scores.values()]
        return tuple([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Inside, nn.MultiheadAttention without a graph computes as with one: its own fast path rounds differently."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
