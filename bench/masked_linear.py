"""One masked layer against its baselines: python bench/masked_linear.py [--quick] [--json FILE] [--device cuda]

Checks results first, then times forward, input cotangent, mask gradient, epilogue + update and the whole layer step
against the dense `F.linear`, R-AMT's op sequence as published, the same under `torch.compile`, and the physical limit
(bytes at the measured copy bandwidth, FLOPs at the measured dense rate). Columns: bench/README.md.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import official
import torch
import torch.nn.functional as F
from torch import Tensor

import rmt
import rmt_kernels as rk

STRENGTH = 0.3
LEGEND = (
    "'over it': rmt's time over the dense product's alone (over a copy of the same bytes, for the update); "
    "'from bits': the same, straight from the bits, without a kept masked weight; 'published', 'compiled': how many "
    "times as long those take as rmt."
)
# The op whose backend a row names.
SERVED = {
    "forward": "masked_linear", "input cotangent": "masked_linear_dx", "mask gradient": "mask_grad",
    "epilogue + update": "mask_update_", "layer step": "mask_update_",
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Layer:
    """Tensors of one layer. x (M, K), weight and scores (N, K), cotangents (M, N)."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    scores: Tensor
    bits: Tensor
    dense: Tensor
    g_task: Tensor
    g_general: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    rng: Tensor
    module: rmt.FusedMaskedLinear

    @classmethod
    def random(cls, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> "Layer":
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(device)

        weight = normal(n, k, scale=k**-0.5).to(dtype)
        # 2.5 % of the weights off, as the paper reports.
        scores = official.THRESHOLD + normal(n, k, scale=2.5e-3) + 4.9e-3
        bits = rk.pack_scores(scores, official.THRESHOLD)
        g_task, g_general = (normal(m, n, scale=1e-4).to(dtype) for _ in range(2))
        zeros = torch.zeros_like(scores), torch.zeros_like(scores)
        x, bias = normal(m, k).to(dtype), normal(n).to(dtype)
        dense = rk.masked_weight(weight, bits)
        plain = torch.nn.Linear(k, n, device="meta")
        plain.weight, plain.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        module = rmt.FusedMaskedLinear.from_linear(plain)
        module.scores.data.copy_(scores)
        rng = rk.rng_state(1, 1, device)
        return cls(x, weight, bias, scores, bits, dense, g_task, g_general, *zeros, rng, module)

    @property
    def penalty(self) -> Tensor:
        return official.L2 / self.scores.norm()

    def masked_linear(self) -> Tensor:
        return rk.masked_linear(self.x, self.weight, self.bits, self.bias, dense=self.dense)

    def from_bits(self) -> Tensor:
        return rk.masked_linear(self.x, self.weight, self.bits, self.bias)

    def masked_linear_dx(self) -> Tensor:
        return rk.masked_linear_dx(self.g_task, self.weight, self.bits, dense=self.dense)

    def mask_grad(self) -> Tensor:
        return rk.mask_grad(
            self.x, self.g_task, self.g_general, self.weight, self.scores, penalty=self.penalty, rng=self.rng,
            strength=STRENGTH,
        )  # fmt: skip

    def epilogue_and_update(self, grad_task: Tensor, grad_general: Tensor, factors: Tensor) -> None:
        grad = rk.gradient_dropout(
            grad_task, grad_general, self.weight, self.scores, penalty=self.penalty, rng=self.rng, strength=STRENGTH
        )
        self.update(grad, factors)

    def update(self, grad: Tensor, factors: Tensor) -> None:
        rk.mask_update_(
            [self.scores], [self.bits], [self.exp_avg], [self.exp_avg_sq], [grad], factors, dense=[self.dense],
            weights=[self.weight],
        )  # fmt: skip

    def step(self, factors: Tensor) -> None:
        """Forward, both input cotangents, mask gradient, update."""
        self.masked_linear()
        self.masked_linear_dx()
        rk.masked_linear_dx(self.g_general, self.weight, self.bits, dense=self.dense)
        self.update(self.mask_grad(), factors)

    def official_step(self, effective: Callable, after: Callable) -> None:
        """The same of the published sequence. The effective weight of the forward is saved for both backward passes."""
        weight = effective(self.weight, self.scores)
        F.linear(self.x, weight, self.bias)
        for g in (self.g_task, self.g_general):
            g @ weight
        products = [(g.T @ self.x).float() for g in (self.g_task, self.g_general)]
        after(*products, self.weight, self.scores, self.exp_avg, self.exp_avg_sq, STRENGTH)


def check(layer: Layer) -> None:
    """Refuses to time what is not right. Raises AssertionError."""
    t, tol = layer, {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[layer.x.dtype]

    def close(got: Tensor, want: Tensor, what: str) -> None:
        error = (got.float() - want.float()).norm() / want.float().norm()
        assert error < tol, f"{what}: relative error {error:.1e} against the published sequence"

    weight = official.effective_weight(t.weight, t.scores).to(t.x.dtype)
    forward = F.linear(t.x, weight, t.bias)
    for got, what in ((t.module(t.x), "module"), (t.masked_linear(), "op"), (t.from_bits(), "op from the bits")):
        close(got, forward, f"forward of the {what}")
    close(t.masked_linear_dx(), t.g_task @ weight, "input cotangent")
    x, g_task, g_general, w = (v.float() for v in (t.x, t.g_task, t.g_general, t.weight))
    a, b = official.score_gradients(x, g_task, g_general, w, t.scores)
    uniform = rk.philox_uniform(t.rng, 0, a.shape)
    want, got = official.gradient_dropout(a, b, STRENGTH, uniform), t.mask_grad()
    near = (rk.keep_probability(a, b) - uniform).abs() < 1e-3
    close(torch.where(near, want, got), want, "mask gradient")


def variants(t: Layer, compiled: tuple[Callable, Callable] | None) -> dict[str, dict[str, Callable]]:
    """{op: {variant: call}}. `step size` 0 keeps the scores, so that every repetition does the same work."""
    factors = torch.tensor([0.0, 1.0], device=t.x.device)
    effective = official.effective_weight
    saved = t.dense.clone()
    products = [(g.T @ t.x).float() for g in (t.g_task, t.g_general)]
    target = torch.empty(48 // 8 * t.scores.numel(), device=t.x.device)
    source = torch.ones_like(target)

    published_after = official.epilogue_and_update
    ops = {
        "forward": {
            "rmt": lambda: t.module(t.x),
            "rmt op": t.masked_linear,
            "rmt bits only": t.from_bits,
            "dense": lambda: F.linear(t.x, t.weight, t.bias),
            "published": lambda: F.linear(t.x, effective(t.weight, t.scores).to(t.x.dtype), t.bias),
        },
        "input cotangent": {
            "rmt": t.masked_linear_dx,
            "dense": lambda: t.g_task @ t.weight,
            "published": lambda: t.g_task @ saved,
        },
        "mask gradient": {
            "rmt": t.mask_grad,
            "dense": lambda: (t.g_task.T @ t.x, t.g_general.T @ t.x),
            "published": lambda: official.gradient_dropout(
                *official.score_gradients(t.x, t.g_task, t.g_general, t.weight, t.scores), STRENGTH
            ),
        },
        "epilogue + update": {
            "rmt": lambda: t.epilogue_and_update(*products, factors),
            # 20 bytes an element for the epilogue, 28 for the update; the masked weight costs only where bits flip.
            "copy of the bytes": lambda: target.copy_(source),
            "published": lambda: published_after(
                *products, t.weight, t.scores, t.exp_avg, t.exp_avg_sq, STRENGTH
            ),
        },
        "layer step": {
            "rmt": lambda: t.step(factors),
            "dense": lambda: (F.linear(t.x, t.weight, t.bias), t.g_task @ t.weight, t.g_general @ t.weight,
                              t.g_task.T @ t.x, t.g_general.T @ t.x),
            "published": lambda: t.official_step(effective, published_after),
        },
    }  # fmt: skip
    if compiled is not None:
        fast_effective, fast_after = compiled
        after_args = (*products, t.weight, t.scores, t.exp_avg, t.exp_avg_sq, STRENGTH)
        ops["forward"]["compiled"] = lambda: F.linear(t.x, fast_effective(t.weight, t.scores).to(t.x.dtype), t.bias)
        ops["epilogue + update"]["compiled"] = lambda: fast_after(*after_args)
        ops["layer step"]["compiled"] = lambda: t.official_step(fast_effective, fast_after)
    return ops


def work(op: str, m: int, n: int, k: int, item: int) -> tuple[float, float]:
    """(bytes, FLOPs) that cannot be avoided. Weights as stored, masks as bits, scores and moments fp32."""
    weight, rows = n * k * item, (m * k + m * n) * item
    product = 2.0 * m * n * k
    update_bytes = n * k * (28 + 1 / 8)
    return {
        "forward": (weight + rows, product),
        "input cotangent": (weight + rows, product),
        "mask gradient": (weight + rows + m * n * item + 8 * n * k, 2 * product),
        "epilogue + update": (8 * n * k + weight + 8 * n * k + update_bytes, 0.0),
        "layer step": (3 * weight + 4 * rows + 8 * n * k + update_bytes, 5 * product),
    }[op]


def mask_file_round_trip(budget_s: float) -> tuple[float, float, float]:
    """Quantiles in ms of pack, write, read and unpack of a ViT-B/16 attention mask (28.9 M bits) as one file."""
    from safetensors.torch import load_file, save_file

    shapes = {"conv1": (768, 768)}
    for i in range(12):
        shapes |= {f"{i}.in_proj": (2304, 768), f"{i}.out_proj": (768, 768)}
    on = {name: torch.rand(shape) > 0.0256 for name, shape in shapes.items()}

    def run() -> None:
        save_file({name: rk.pack_bits(mask) for name, mask in on.items()}, path)
        for name, bits in load_file(path).items():
            back[name] = rk.unpack_bits(bits, shapes[name][1])

    back = {}
    # On the CPU whatever backend the layers were asked to run on.
    with rk.use_backend(None), tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "mask.safetensors")
        times = harness.time_all({"run": run}, torch.device("cpu"), budget_s)["run"]
    assert all(torch.equal(back[name], mask) for name, mask in on.items()), "the mask file does not round-trip"
    return times


def compile_baselines() -> tuple[Callable, Callable]:
    """The published sequence under torch.compile: the effective weight, and everything after the two products."""
    return torch.compile(official.effective_weight, dynamic=True), torch.compile(
        official.epilogue_and_update, dynamic=True
    )


def row_of(base: dict, op: str, m: int, shape: tuple, name: str, times: dict, limit_ms: float) -> dict:
    n, k = shape
    medians = {variant: t[1] for variant, t in times.items()}
    floor = medians.get("dense", medians.get("copy of the bytes"))

    def ratio(variant: str, base_ms: float) -> float | None:
        return medians[variant] / base_ms if variant in medians else None

    return base | {
        "op": op, "layer": name, "M": m, "N": n, "K": k,
        "ms": {variant: {"p20": t[0], "median": t[1], "p80": t[2]} for variant, t in times.items()},
        "limit_ms": limit_ms,
        "rmt_over_floor": ratio("rmt", floor), "bits_only_over_floor": ratio("rmt bits only", floor),
        "published_over_rmt": ratio("published", medians["rmt"]),
        "compiled_over_rmt": ratio("compiled", medians["rmt"]),
    }  # fmt: skip


def show(rows: list[dict]) -> None:
    lines = []
    for r in rows:
        if r["op"] == "mask file":
            continue
        ms = {name: value["median"] for name, value in r["ms"].items()}
        floor = ms.get("dense", ms.get("copy of the bytes"))
        bits_only = "-" if r["bits_only_over_floor"] is None else f"{r['bits_only_over_floor']:.2f}x"
        compiled = "-" if r["compiled_over_rmt"] is None else f"{r['compiled_over_rmt']:.1f}x"
        ours = r["ms"]["rmt"]
        lines.append([
            r["op"], f"{r['N']}x{r['K']}", str(r["M"]), r["backend"], f"{ours['median']:.3f}", f"{ours['p20']:.3f}",
            f"{ours['p80']:.3f}", f"{floor:.3f}", f"{r['rmt_over_floor']:.2f}x", bits_only,
            f"{r['published_over_rmt']:.1f}x", compiled, f"{100 * r['limit_ms'] / ours['median']:.0f} %",
        ])  # fmt: skip
    header = [
        "op", "N x K", "M", "backend", "rmt ms", "p20", "p80", "dense/copy ms", "over it", "from bits", "published",
        "compiled", "of limit",
    ]  # fmt: skip
    harness.print_table(header, lines)
    for r in rows:
        if r["op"] == "mask file":
            print(f"\nmask file of 28.9 M bits, pack + write + read + unpack: {r['ms']['rmt']['median']:.0f} ms")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, four row counts: under 60 s on 2 cores")
    parser.add_argument("--json", metavar="FILE", help="write all rows here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--layers", nargs="+", choices=harness.LAYERS, metavar="NAME", help="default: all")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M", help=f"default: {harness.ROWS}")
    parser.add_argument("--no-compile", action="store_true", help="leave the torch.compile baseline out")
    parser.add_argument("--seconds", type=float, help="time for each op and shape")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    layers = args.layers or (["ViT-B attn.in_proj"] if args.quick else list(harness.LAYERS))
    row_counts = args.rows or (harness.ROWS[:4] if args.quick else harness.ROWS)
    budget = args.seconds or (0.4 if args.quick else 1.0)
    start = time.perf_counter()
    base = harness.provenance(device) | {"bench": "masked_linear", "dtype": args.dtype}
    bandwidth, rate = harness.copy_bandwidth(device), harness.dense_rate(device, dtype)
    base |= {"copy_bytes_per_s": bandwidth, "dense_flop_per_s": rate}
    print(f"{base['device_name']}, torch {base['torch']}, commit {base['commit']}, {args.dtype}: "
          f"copy {bandwidth / 1e9:.1f} GB/s, dense {rate / 1e9:.0f} GFLOP/s")  # fmt: skip
    compiled = None if args.no_compile else compile_baselines()
    rows = []
    with torch.no_grad(), harness.progress(5 * len(layers) * len(row_counts), "timing") as bar:
        for name in layers:
            shape = harness.LAYERS[name]
            for i, m in enumerate(row_counts):
                t = Layer.random(m, *shape, dtype, device)
                check(t)
                for op, calls in variants(t, compiled).items():
                    # The epilogue and update see no rows: once a layer is enough.
                    if op == "epilogue + update" and i:
                        bar.update()
                        continue
                    times = harness.time_all(calls, device, budget)
                    size, flops = work(op, m, *shape, dtype.itemsize)
                    limit = 1e3 * max(size / bandwidth, flops / rate)
                    last = {r["op"]: r["last"] for r in rk.explain() if r["device"] == device.type}
                    rows.append(row_of(base | {"backend": last[SERVED[op]]}, op, m, shape, name, times, limit))
                    bar.update()
        p20, median, p80 = mask_file_round_trip(budget)
    file_ms = {"rmt": {"p20": p20, "median": median, "p80": p80}}
    rows.append(base | {"op": "mask file", "bits": 28_901_376, "ms": file_ms})
    show(rows)
    print(f"\n{time.perf_counter() - start:.0f} s in all. {LEGEND}")
    if args.json:
        harness.write_json(args.json, rows)


if __name__ == "__main__":
    main()
