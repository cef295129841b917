"""How should both cotangents cross the network? python bench/cotangents.py [--cases ViT-B-32:32 ...] [--json FILE]

R-AMT needs two gradients of every masked weight. From one forward they come by

    a1  two passes; both leave their output cotangents (M, N) at every masked layer, and `mask_grad` makes the rest of
        them. Keeps two cotangents of every layer.
    a2  two passes; each product writes its weight gradient (N, K) into a buffer of its mask and pass, made once: what
        `rmt.backward` does.
    b1c one pass of stacked cotangents, torch.func.vmap over torch.autograd.grad, to cotangents as in a1
    b1w the same, to gradients of the scores (N, K).

vmap makes one product of 2 M rows of every linear layer's two; attention's backward has no rule in torch and runs once
for each cotangent. Rows stacked by hand (b2) would be b1 without vmap. It takes the batch twice through the forward,
which costs as much as a pass back and keeps all activations twice, or a hand-written backward of every module of the
host: neither is sane, neither is measured.

Timed is the way from the two losses to dropped-out gradients, after the forward; peak is what torch allocates on it.
Gradients before the dropout are compared first. fp32, random weights, attention and patch convolution masked.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import harness
import torch
from step_variants import SEED, STRENGTH, Problem, Setup
from torch import Tensor
from torch.autograd.graph import GradientEdge

import rmt.clip
import rmt_kernels as rk
from rmt.config import MaskConfig
from rmt.gradients import GENERAL, TASK, Gradients
from rmt.masked import Mask
from rmt.masking import apply_masks

# Fewer rows than columns, then more, of each.
CASES = ("ViT-S-32-alt:4", "ViT-S-32-alt:32", "ViT-B-32:4", "ViT-B-32:32", "ViT-B-16:2", "ViT-B-16:8", "ViT-L-14:1",
         "ViT-L-14:5")  # fmt: skip
CLOSE = 1e-4


class Pass:
    """A masked model after its forward, with the two cotangents (2, B, C) of its logits."""

    def __init__(self, setup: Setup) -> None:
        problem = Problem(setup)
        self.device, self.rng = problem.device, rk.rng_state(SEED, 0, problem.device)
        self.masks: list[Mask] = apply_masks(problem.model, MaskConfig(targets=("attention", "conv")))
        first = problem.scores(usual=True)
        with torch.no_grad():
            for mask in self.masks:
                mask.scores.copy_(first[mask.key].flatten(1))
        image, label = problem.batches[0]
        teacher = rmt.clip.frozen_logits(problem.model, image, problem.text)
        self.logits = rmt.clip.logits(problem.model, image, problem.text)
        self.cotangents = torch.stack(rk.reference.logit_cotangents(self.logits.detach(), teacher, label, 1.0))
        self.nodes = self._products()
        self.held = Gradients(self.masks)

    def _products(self) -> dict[int, object]:
        """Mask -> the graph's node of its product, where that is a masked linear; a convolution's is not."""
        index = {id(mask.scores): i for i, mask in enumerate(self.masks)}
        found, seen, stack = {}, set(), [self.logits.grad_fn]
        while stack:
            node = stack.pop()
            for child, _ in node.next_functions:
                i = index.get(id(getattr(child, "variable", None)))
                if i is not None and "masked_linear" in node.name():
                    found[i] = node
                elif child is not None and child not in seen:
                    seen.add(child)
                    stack.append(child)
        return found

    def rows(self) -> int:
        return max(node.saved_tensors[0].numel() // node.saved_tensors[0].shape[-1] for node in self.nodes.values())


def grad(run: Pass, inputs: list, cotangent: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run.logits, inputs, cotangent, retain_graph=True)


def stacked(run: Pass, inputs: list) -> list[tuple[Tensor, Tensor]]:
    both = torch.func.vmap(lambda cotangent: grad(run, inputs, cotangent))(run.cotangents)
    return [tuple(pair) for pair in both]


def two_passes(run: Pass, inputs: list) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(grad(run, inputs, cotangent) for cotangent in run.cotangents)))


@torch.no_grad()
def by_cotangents(cross: Callable, run: Pass, finish: Callable) -> dict[int, Tensor]:
    """`finish(mask, stream, x, pair)` of every mask; x None where the pair are gradients of the scores already."""
    edges = {i: GradientEdge(node, 0) for i, node in run.nodes.items()}
    rest = [i for i in range(len(run.masks)) if i not in edges]
    # Gradients of their scores would be thrown away.
    with rk.weight_gradients_to({run.masks[i].scores: lambda g, x: None for i in run.nodes}):
        pairs = cross(run, [*edges.values(), *(run.masks[i].scores for i in rest)])
    inputs = {i: node.saved_tensors[0] for i, node in run.nodes.items()}
    return {i: finish(run, i, inputs.get(i), pair) for i, pair in zip([*edges, *rest], pairs)}


def by_weights(cross: Callable, run: Pass, finish: Callable) -> dict[int, Tensor]:
    pairs = cross(run, [mask.scores for mask in run.masks])
    return {i: finish(run, i, None, pair) for i, pair in enumerate(pairs)}


@torch.no_grad()
def in_buffers(run: Pass, finish: Callable) -> dict[int, Tensor]:
    """a2. A gradient of the masked weight still lacks the factor W of the chain rule."""
    run.held.clear()
    for side, cotangent in zip((TASK, GENERAL), run.cotangents):
        with run.held.collecting(side):
            scores = [mask.scores for mask in run.masks]
            torch.autograd.grad(run.logits, scores, cotangent, retain_graph=True, allow_unused=True)
    pairs = {i: run.held.pair(i, general=True) for i in range(len(run.masks))}
    return {i: finish(run, i, None, (a, b), run.masks[i].weight if chained else None)
            for i, (a, b, chained) in pairs.items()}  # fmt: skip


STRATEGIES = {
    "a1": partial(by_cotangents, two_passes), "a2": in_buffers,
    "b1c": partial(by_cotangents, stacked), "b1w": partial(by_weights, stacked),
}  # fmt: skip


def dropped(run: Pass, i: int, x: Tensor | None, pair: tuple[Tensor, Tensor], weight: Tensor | None = None) -> Tensor:
    mask, options = run.masks[i], {"rng": run.rng, "strength": STRENGTH, "stream": i}
    if x is None:
        return rk.gradient_dropout(*pair, weight, mask.scores.detach(), **options)
    return rk.mask_grad(x, *pair, mask.weight, mask.scores.detach(), **options)


def check(run: Pass) -> None:
    """Both gradients of every mask, before the dropout, are the same by all four."""

    def only(side: int) -> Callable:
        def finish(run: Pass, i: int, x: Tensor | None, pair: tuple, weight: Tensor | None = None) -> Tensor:
            g = pair[side]
            if x is None:
                return g.clone() if weight is None else g * weight
            return rk.mask_grad(x, g, None, run.masks[i].weight)

        return finish

    for side, what in enumerate(("task", "general")):
        want = by_weights(two_passes, run, only(side))
        for name, strategy in STRATEGIES.items():
            for i, got in strategy(run, only(side)).items():
                off = float((got - want[i]).norm() / want[i].norm())
                if not off <= CLOSE:
                    raise SystemExit(f"{name}: the {what} gradient of {run.masks[i].key} is off by {off:.1e}")


def peak_mib(device: torch.device, call: Callable[[], object]) -> float:
    """MiB that torch allocates during the call, at its highest."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


def measure(setup: Setup, seconds: float, least: int) -> list[dict]:
    run = Pass(setup)
    check(run)
    calls = {name: partial(strategy, run, dropped) for name, strategy in STRATEGIES.items()}
    times = harness.time_all(calls, run.device, seconds, least)
    base = harness.provenance(run.device) | {"bench": "cotangents"} | vars(setup)
    sizes = {"rows": run.rows(), "columns": max(mask.weight.shape[1] for mask in run.masks[1:])}
    best = min(times, key=lambda name: times[name][1])
    return [
        base | sizes | {"strategy": name, "ms": dict(zip(("p20", "median", "p80"), times[name])),
                        "peak_mib": peak_mib(run.device, calls[name]), "fastest": name == best}
        for name in STRATEGIES
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="MODEL:BATCH")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=20.0, help="timing of each case, all ways together")
    parser.add_argument("--quick", action="store_true", help="a toy; its numbers mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write the rows here")
    args = parser.parse_args(arguments)
    setups = [Setup(model, int(batch), args.device) for model, batch in (case.rsplit(":", 1) for case in args.cases)]
    if args.quick:
        setups = [Setup("ViT-S-32-alt", 2, args.device, size=64, layers=2)]
        print("--quick: a toy that shows that the benchmark runs. Its numbers mean nothing.")
    warnings.filterwarnings("ignore", message="There is a performance drop")  # vmap's, for each operator without a rule
    rows, start = [], time.perf_counter()
    for setup in setups:
        rows += measure(setup, 0.2 if args.quick else args.seconds, 2 if args.quick else 3)
        print(f"{setup.model}, batch {setup.batch}: done after {time.perf_counter() - start:.0f} s", flush=True)
    cases = [rows[i : i + len(STRATEGIES)] for i in range(0, len(rows), len(STRATEGIES))]
    header = ["", "batch", "rows", "columns", *(f"{name} {unit}" for unit in ("ms", "MiB") for name in STRATEGIES)]
    harness.print_table([*header, "fastest"], [
        [c[0]["model"], *(str(c[0][key]) for key in ("batch", "rows", "columns")),
         *(f"{r['ms']['median']:.1f}" for r in c), *(f"{r['peak_mib']:.0f}" for r in c),
         next(r["strategy"] for r in c if r["fastest"])]
        for c in cases
    ])  # fmt: skip
    if args.json:
        harness.write_json(args.json, rows)


if __name__ == "__main__":
    main()
