"""Where a step's time goes: by phase, and by operator outside of the floor's set. For bench/train_step.py --profile."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import official
import torch
from floor import ATTENTION, OTHERS, WITH_OUT
from step_variants import LR, Official, Problem, Rmt, Variant

import rmt.clip

FORWARD = ("teacher forward", "student forward")
REST = "in between"
_PRODUCTS = {"aten::" + packet.__name__ for packet in (*WITH_OUT, *OTHERS)}
# What the profiler books a product under: below the aten call, the library's own convolution and attention.
_INNER = ("aten::mkldnn_convolution", "aten::_convolution", "aten::cudnn_convolution", "aten::_flash_attention",
          "aten::_efficient_attention", "aten::_cudnn_attention", "rmt_kernels::masked_linear",
          "rmt_kernels::mask_grad", "rmt_kernels::weight_grad_")  # fmt: skip


class Phases:
    """Seconds by phase. A phase within a phase belongs to the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.inside = device, {}, False

    @contextlib.contextmanager
    def timed(self, owner: object, attribute: str, names: tuple[str, ...]) -> Iterator[None]:
        """Within it, the n-th call of `owner.attribute` in a step is phase names[n], further ones the last of them."""
        plain, own = getattr(owner, attribute), vars(owner).get(attribute)
        calls = iter(range(1 << 30))

        def wrapped(*args, **kwargs):
            if self.inside:
                return plain(*args, **kwargs)
            name = names[min(next(calls), len(names) - 1)]
            self.inside, start = True, self._now()
            try:
                return plain(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

        setattr(owner, attribute, wrapped)
        try:
            yield
        finally:
            delattr(owner, attribute) if own is None else setattr(owner, attribute, own)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _parts(variant: Variant) -> list[tuple[object, str, tuple[str, ...]]]:
    if isinstance(variant, Rmt):
        passes = ("task backward", "general backward")
        return [
            (rmt.clip, "frozen_logits", FORWARD[:1]), (rmt.clip, "logits", FORWARD[1:]),
            (torch.autograd, "grad", passes), (torch.autograd, "backward", passes),
            (variant.optimizer, "step", ("update",)),
        ]  # fmt: skip
    assert isinstance(variant, Official)
    return [
        (variant.tuner, "teacher_logits", FORWARD[:1]), (variant.tuner, "student_logits", FORWARD[1:]),
        (torch.autograd, "backward", ("general backward", "task backward")), (variant.tuner, "update", ("update",)),
    ]  # fmt: skip


def phases(problem: Problem, variant: Variant, steps: int) -> dict[str, float]:
    """Median milliseconds of a step by phase; REST is what lies between them; "step" is the whole, clocked alike."""
    rows = []
    for step in range(steps):
        clock = Phases(problem.device)
        with contextlib.ExitStack() as stack:
            for part in _parts(variant):
                stack.enter_context(clock.timed(*part))
            start = clock._now()
            variant.run(*problem.batches[step % 2])
            whole = clock._now() - start
        rows.append(clock.seconds | {REST: whole - sum(clock.seconds.values()), "step": whole})
    return {name: 1e3 * statistics.median(row.get(name, 0.0) for row in rows) for name in rows[-1]}


def weight_sized(problem: Problem, variant: Rmt, time_all: Callable) -> dict[str, tuple]:
    """Times of the weight-sized work of all layers: R-AMT's sequence on gradients at hand, and `optimizer.step`.

    The official one is the chain rule, the L2 term, the dropout and Adam. Binarizing, which it does in the forward, and
    repacking, which it does not do, are left out.
    """
    state = [[t.clone() for t in row] for row in variant.state()]
    weights = [mask.weight for mask in variant.masks]
    grads = [(torch.randn_like(w) * 1e-5, torch.randn_like(w) * 1e-5) for w in weights]

    def sequence() -> None:
        for (scores, *moments), weight, pair in zip(state, weights, grads):
            official.epilogue_and_update(*pair, weight, scores, *moments, 0.3)

    return time_all({"official": sequence, "rmt": _update(problem, variant)}, problem.device, 1.0)


def _update(problem: Problem, variant: Rmt) -> Callable[[], None]:
    """`optimizer.step` with both gradients of one real step at hand, at every call anew."""
    optimizer, before = variant.optimizer, [m.scores.detach().clone() for m in variant.masks]
    taken, take = [], optimizer.take
    optimizer.take = lambda dropout, more: taken.append(dropout) or take(dropout, more)
    optimizer.set_lr(LR)
    variant.run(*problem.batches[0])
    if all(torch.equal(m.scores, b) for m, b in zip(variant.masks, before)):
        raise RuntimeError("the update that would be timed moves no score")

    def update() -> None:
        # A step forgets that its gradients have arrived; the buffers still hold them.
        optimizer.gradients._arrived = [[True] * len(variant.masks) for _ in range(2)]
        take(taken[-1], False)
        optimizer.step()

    return update


def operators(problem: Problem, variant: Variant) -> tuple[list[tuple[str, float, int]], float]:
    """((operator, own milliseconds, calls) outside of the floor's set, longest first; milliseconds inside of it)."""
    cuda = problem.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        variant.run(*problem.batches[0])
        if cuda:
            torch.cuda.synchronize()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [(e.key, getattr(e, own) / 1e3, e.count) for e in profiler.key_averages()]
    rows = [row for row in rows if row[1] > 0 and ("::" in row[0] or not cuda)]
    outside = [row for row in rows if not _is_product(row[0])]
    return sorted(outside, key=lambda row: -row[1]), sum(row[1] for row in rows if _is_product(row[0]))


def _is_product(key: str) -> bool:
    return key in _PRODUCTS or key.startswith((*_INNER, "aten::" + ATTENTION))
