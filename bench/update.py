"""The weight-sized work of a training step, all masked layers: python bench/update.py [--quick] [--json FILE]

Chain rule, L2 term, gradient dropout, Adam, repacking and the refreshed masked weight of CLIP's image tower (attention
and patch convolution masked), by `mask_update_` with moments in fp32, bf16 and 8 bits, against R-AMT's op sequence as
published (official.py), the same under `torch.compile` (--compiled), and a copy of the bytes that fp32 moments cannot
avoid moving. Checks results first. Columns: bench/README.md.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import harness
import official
import torch
from torch import Tensor

import rmt_kernels as rk
from rmt_kernels import reference

STRENGTH, LR, BETAS = 0.3, 1e-7, (0.9, 0.999)
BLOCK = [(2304, 768), (768, 768)]  # in- and out-projection of a block, (N, K)
MODELS = {"ViT-B-32": [(768, 3072), *BLOCK * 12], "ViT-B-16": [(768, 768), *BLOCK * 12]}
# Moments -> dtype, bytes a weight: both gradients and the weight read, scores and both moments read and written.
STATES = {"fp32": (torch.float32, 36), "bf16": (torch.bfloat16, 28), "8bit": (torch.uint8, 24)}


@dataclass
class Layers:
    """Every masked layer of one model: lists of (N, K) fp32, and moments by the name of their format."""

    scores: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]
    generals: list[Tensor]
    bits: list[Tensor] = field(init=False)
    dense: list[Tensor] = field(init=False)
    moments: dict[str, dict[str, list[Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        self.device, count = self.scores[0].device, len(self.scores)
        self.bits = [rk.pack_scores(s, official.THRESHOLD) for s in self.scores]
        self.dense = [rk.masked_weight(w, b) for w, b in zip(self.weights, self.bits)]
        self.moments = {name: self.fresh(dtype) for name, (dtype, _) in STATES.items()}
        self.norms = torch.stack([s.norm() for s in self.scores])
        self.counts = torch.zeros(count, 2, dtype=torch.int64, device=self.device)
        self.rng, self.chained = rk.rng_state(1, 1, self.device), [True] * count
        self.factors = self.factors_of(LR)

    @classmethod
    def random(cls, shapes: list[tuple[int, int]], device: torch.device) -> "Layers":
        torch.manual_seed(0)

        def normal(scale: float) -> list[Tensor]:
            return [torch.randn(shape, device=device) * scale for shape in shapes]

        # 2.5 % of the weights off, as the paper reports.
        scores = [s + official.THRESHOLD + 4.9e-3 for s in normal(2.5e-3)]
        return cls(scores, normal(768**-0.5), normal(1e-3), normal(1e-3))

    def fresh(self, dtype: torch.dtype) -> dict[str, list[Tensor]]:
        moments = {n: [torch.zeros_like(s, dtype=dtype) for s in self.scores] for n in ("exp_avgs", "exp_avg_sqs")}
        blocks = [-(-s.numel() // reference.MOMENT_BLOCK) for s in self.scores for _ in range(2)]
        narrow = dtype == torch.uint8
        return moments | {"scales": [torch.zeros(b, dtype=dtype, device=self.device) for b in blocks] if narrow else []}

    def factors_of(self, lr: float) -> Tensor:
        return rk.adam_factors(torch.tensor(1, device=self.device), lr, *BETAS)

    def step(self, state: str) -> None:
        rk.mask_update_(
            self.scores, self.bits, grads=self.grads, factors=self.factors, generals=self.generals,
            weights=self.weights, chained=self.chained, dense=self.dense, norms=self.norms, counts=self.counts,
            l2=official.L2, rng=self.rng, strength=STRENGTH, threshold=official.THRESHOLD, **self.moments[state],
        )  # fmt: skip


def published(layer: tuple[Tensor, ...], lr: float, uniform: Tensor | None = None) -> Tensor:
    """One layer's share of the published step: (weight, scores, exp_avg, exp_avg_sq, both weight gradients)."""
    weight, scores, exp_avg, exp_avg_sq, grad_task, grad_general = layer
    a, b = official.chain_rule(grad_task, grad_general, weight, scores)
    official.adam(scores, official.gradient_dropout(a, b, STRENGTH, uniform), exp_avg, exp_avg_sq, 1, lr)
    return official.effective_weight(weight, scores)


def check(device: torch.device) -> None:
    """First steps of small layers from fresh moments: the published sequence's scores, whatever the moments' format."""
    shapes, lr = [(96, 768), (40, 588), (1, 1000)], 1e-3
    for state in STATES:
        if state == "8bit" and device.type == "cuda":  # blocks of 8-bit moments are cut from whole rows there
            shapes = [(n, k) for n, k in shapes if n == 1 or k % 32 == 0]
        t = Layers.random(shapes, device)
        t.factors = t.factors_of(lr)
        before = [s.clone() for s in t.scores]
        old_bits = [b.clone() for b in t.bits]
        t.step(state)
        for i, shape in enumerate(shapes):
            uniform = reference.philox_uniform(t.rng, i, shape)
            s, m, v = before[i].clone(), torch.zeros_like(before[i]), torch.zeros_like(before[i])
            a, b = official.chain_rule(t.grads[i], t.generals[i], t.weights[i], s)
            # A decision within 1e-4 of its draw may go either way.
            clear = (reference.keep_probability(a, b) - uniform).abs() > 1e-4
            dense = published((t.weights[i], s, m, v, t.grads[i], t.generals[i]), lr, uniform)
            torch.testing.assert_close(t.scores[i][clear], s[clear], rtol=1e-5, atol=1e-7)
            sure = clear & ((s - official.THRESHOLD).abs() > 1e-6)
            assert torch.equal(t.dense[i][sure], dense[sure]), f"{state}: the masked weight differs"
            assert torch.equal(t.bits[i], rk.pack_scores(t.scores[i], official.THRESHOLD)), f"{state}: bits"
            flipped = (rk.unpack_bits(t.bits[i], shape[1]) != rk.unpack_bits(old_bits[i], shape[1])).sum()
            assert 0 < int(flipped) == int(t.counts[i, 0]), f"{state}: counts"


def variants(t: Layers, compiled: bool) -> dict[str, Callable[[], object]]:
    zeros = [[torch.zeros_like(s) for s in t.scores] for _ in range(2)]
    layers = list(zip(t.weights, [s.clone() for s in t.scores], *zeros, t.grads, t.generals))
    target = torch.empty(STATES["fp32"][1] // 8 * sum(s.numel() for s in t.scores) + 1, device=t.device)
    source = torch.ones_like(target)
    runs = {f"rmt {state}": lambda state=state: t.step(state) for state in STATES}
    runs |= {"copy of the bytes": lambda: target.copy_(source)}
    runs |= {"published": lambda: [published(layer, LR) for layer in layers]}
    if compiled:
        fast = torch.compile(published, dynamic=True)
        runs["compiled"] = lambda: [fast(layer, LR) for layer in layers]
    return runs


def rows_of(base: dict, model: str, count: int, times: dict[str, tuple]) -> list[dict]:
    ms = {name: {"p20": t[0], "median": t[1], "p80": t[2]} for name, t in times.items()}
    bandwidth = 4 * 2 * (STATES["fp32"][1] // 8 * count) / ms["copy of the bytes"]["median"] * 1e3
    rows = []
    for state, (_, size) in STATES.items():
        median = ms[f"rmt {state}"]["median"]
        rows.append(base | {
            "op": "mask_update_", "model": model, "masked": count, "state": state, "bytes_per_weight": size, "ms": ms,
            "bytes_per_s": size * count / median * 1e3, "copy_bytes_per_s": bandwidth,
            "share_of_copy": size * count / median * 1e3 / bandwidth,
            "published_over_rmt": ms["published"]["median"] / median,
            "compiled_over_rmt": ms["compiled"]["median"] / median if "compiled" in ms else None,
        })  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    lines = []
    for r in rows:
        ms, ours = r["ms"], r["ms"][f"rmt {r['state']}"]
        compiled = "-" if r["compiled_over_rmt"] is None else f"{r['compiled_over_rmt']:.1f}x"
        lines.append([
            r["model"], f"{r['masked'] / 1e6:.1f} M", r["state"], r["backend"], f"{ours['median']:.2f}",
            f"{ours['p20']:.2f}", f"{ours['p80']:.2f}", f"{ms['copy of the bytes']['median']:.2f}",
            f"{ms['published']['median']:.1f}", f"{r['published_over_rmt']:.1f}x", compiled,
            f"{r['bytes_per_s'] / 1e9:.1f}", f"{100 * r['share_of_copy']:.0f} %",
        ])  # fmt: skip
    header = [
        "model", "masked", "moments", "backend", "rmt ms", "p20", "p80", "copy ms", "published ms", "published",
        "compiled", "GB/s", "of copy",
    ]  # fmt: skip
    harness.print_table(header, lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three blocks of ViT-B-32, fewer samples")
    parser.add_argument("--json", metavar="FILE", help="write all rows here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: all")
    parser.add_argument("--compiled", action="store_true", help="also time the published sequence under torch.compile")
    parser.add_argument("--seconds", type=float, help="time for each model")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device, start, rows = torch.device(args.device), time.perf_counter(), []
    with torch.no_grad():
        check(device)
        models = {name: MODELS[name] for name in args.models or MODELS}
        if args.quick:
            models = {"ViT-B-32, 3 blocks": MODELS["ViT-B-32"][:7]}
        for model, shapes in models.items():
            t = Layers.random(shapes, device)
            times = harness.time_all(variants(t, args.compiled), device, args.seconds or (1 if args.quick else 10))
            served = {r["device"]: r["last"] for r in rk.explain("mask_update_")}[device.type]
            base = harness.provenance(device) | {"bench": "update", "dtype": "fp32", "backend": served}
            rows += rows_of(base, model, sum(s.numel() for s in t.scores), times)
    first = rows[0]
    print(f"{first['device_name']}, torch {first['torch']}, commit {first['commit']}")
    show(rows)
    print(f"\n{time.perf_counter() - start:.0f} s in all. 'published', 'compiled': how many times as long as rmt.")
    if args.json:
        harness.write_json(args.json, rows)


if __name__ == "__main__":
    main()
