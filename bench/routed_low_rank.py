"""Low-rank branches with routing: python bench/routed_low_rank.py [--device cpu|cuda] [--quick] [--json FILE]

out + scale * route(x A^T, x_v) B^T beside a product, forward and with its backward pass to x, A, B, x_v and out, at the
shapes of GPT-2, RoBERTa and CoCa: `rmt` (`rmt_kernels.routed_low_rank`) against the plain composition (`plain`), the
same under torch.compile (`compiled`), and for mul B scaled by x_v for each image (`per image`), which spares the
bottleneck a pass. Errors are relative to float64.

Would a kernel that does the forward in one pass pay? `at best` is its time were nothing in its way: the larger of its
bytes (x and out read, y written, A and B) at the rate of a copy and its FLOPs at that of a square product, both
measured in the same run. `saved` are the bytes that it spares (the bottleneck's and the sum's), of those that `rmt`
moves. Above `rmt`'s time, `at best` says that the operands stayed in the caches, which the copy does not fit in.
"""

import argparse

import harness
import torch
import torch.nn.functional as F

import rmt_kernels as rk
from rmt_kernels import routing
from rmt_kernels.low_rank import thin

# name: B, T, d, r, V
SHAPES = {
    "GPT-2, RoBERTa-base": (40, 50, 768, 128, 1),
    "CoCa-B/32": (32, 76, 512, 8, 1),
    "CoCa-B/32 r 32": (32, 76, 512, 32, 1),
    "CoCa-B/32 r 128": (32, 76, 512, 128, 1),
    "width 1024": (32, 76, 1024, 8, 1),
    "width 1024 r 128": (32, 76, 1024, 128, 1),
    "CoCa-B/32, all tokens": (32, 76, 512, 8, 255),
}
QUICK = ("CoCa-B/32",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIFFERENTIATED = ("x", "a", "b", "x_v", "out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--quick", action="store_true", help="one shape, without torch.compile")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--functions", nargs="+", choices=routing.FUNCTIONS, default=routing.FUNCTIONS)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.5, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    shapes = QUICK if args.quick else args.shapes
    base = harness.provenance(device) | {
        "bench": "routed_low_rank", "dtype": str(dtype).removeprefix("torch."),
        "command": f"python bench/routed_low_rank.py --device {args.device} --dtype {args.dtype} "
        f"--threads {args.threads}",
        "copy_bytes_per_s": harness.copy_bandwidth(device, args.seconds),
        "dense_flop_per_s": harness.dense_rate(device, dtype, args.seconds),
    }  # fmt: skip
    cases = [(s, f) for s in shapes for f in args.functions if SHAPES[s][-1] == 1 or f in routing.MANY]
    rows = []
    with harness.progress(len(cases), "timing") as bar:
        for shape, function in cases:
            branch = Branch(*SHAPES[shape], function, dtype, device)
            rows += [base | {"shape": shape} | row for row in branch.compare(args, base)]
            bar.update()
    print(f"{base['device_name']}, torch {base['torch']}, {base['dtype']}")
    show(rows)
    if args.json:
        harness.write_json(args.json, rows)


def plain(x, a, b, x_v, function, scale, out):
    """The composition as one writes it."""
    return out + scale * F.linear(routing.route(function, F.linear(x, a), x_v), b)


def per_image(x, a, b, x_v, function, scale, out):
    """mul with B scaled for each image: (B, N, r) of weights, one product for each."""
    return torch.baddbmm(out, F.linear(x, a), (b * (x_v * scale)).mT)


class Branch:
    """The operands of one branch, and its variants."""

    def __init__(self, batch: int, tokens: int, d: int, rank: int, images: int, function: str, dtype, device) -> None:
        self.shape = {"B": batch, "T": tokens, "d": d, "r": rank, "V": images}
        self.function, self.device, self.scale = function, device, 1.0
        random = torch.Generator().manual_seed(0)
        sizes = [(batch, tokens, d), (rank, d), (d, rank), (batch, images, rank), (batch, tokens, d)]
        self.t = {n: torch.randn(s, generator=random) for n, s in zip(DIFFERENTIATED, sizes)}
        self.t["a"] /= d**0.5
        self.t["b"] /= rank**0.5
        if function == "none":
            del self.t["x_v"]
        self.t = {n: t.to(device, dtype).requires_grad_() for n, t in self.t.items()}
        self.cotangent = torch.randn(sizes[0], generator=random).to(device, dtype)

    def call(self, run, t: dict) -> torch.Tensor:
        return run(t["x"], t["a"], t["b"], t.get("x_v"), self.function, self.scale, t["out"])

    def step(self, run, t: dict | None = None) -> list[torch.Tensor]:
        """The result and all its cotangents."""
        t = self.t if t is None else t
        y = self.call(run, t)
        return [y, *torch.autograd.grad(y, list(t.values()), self.cotangent.to(y.dtype))]

    def compare(self, args: argparse.Namespace, base: dict):
        """Checks every variant against float64, then times its forward, and both passes."""
        variants = {"plain": plain, "rmt": rk.routed_low_rank}
        if not args.quick and not args.no_compile:
            torch._dynamo.reset()
            variants["compiled"] = torch.compile(plain, fullgraph=True)
        if self.function == "mul":
            variants["per image"] = per_image
        double = {n: t.detach().double().requires_grad_() for n, t in self.t.items()}
        truth = self.step(plain, double)
        error = {n: self.errors(self.step(run), truth) for n, run in variants.items()}
        for name, wrong in error.items():
            for e, allowed in zip(wrong, error["plain"]):
                # per image rounds the scaled B once more.
                if e > 4 * allowed + torch.finfo(self.cotangent.dtype).eps:
                    raise SystemExit(f"{self.function} {self.shape}: {name}'s error {e:.1e}, plain's {allowed:.1e}")
        fixed = {n: t.detach() for n, t in self.t.items()}
        with torch.no_grad():
            runs = {n: (lambda run=run: self.call(run, fixed)) for n, run in variants.items()}
            forward = harness.time_all(runs, self.device, args.seconds)
        both = harness.time_all({n: (lambda r=r: self.step(r)) for n, r in variants.items()}, self.device, args.seconds)
        for what, times in (("forward", forward), ("forward and backward", both)):
            yield {
                "op": what, "function": self.function, **self.shape, "thin": self.thin(), "error": error,
                "ms": {n: dict(zip(("p20", "median", "p80"), t)) for n, t in times.items()},
                "plain_over_rmt": times["plain"][1] / times["rmt"][1], **self.roofline(base, what),
            }  # fmt: skip

    @staticmethod
    def errors(got: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
        return [float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, truth)]

    def thin(self) -> bool:
        return thin(self.function, self.t["x"], self.t["a"], self.t["b"], self.t.get("x_v"))

    def roofline(self, base: dict, what: str) -> dict:
        """Of the forward: what a fused pass must at least take, and the share of rmt's bytes that it spares."""
        if what != "forward":
            return {}
        batch, tokens, d, rank, _ = self.shape.values()
        m, size = batch * tokens, self.cotangent.element_size()
        moved, flops = size * (3 * m * d + 2 * rank * d), 4 * m * rank * d
        if self.thin():
            spared, flops = 2 * m * self.shape["V"] * size, 4 * m * d * self.shape["V"]
        else:
            # x_t and what routing makes of it, written and read; x_t + x_v is a pass of its own.
            spared = size * m * rank * (2 if self.function == "none" else 4) + 2 * size * m * d
        return {
            "fused_bytes": moved, "fused_flop": flops, "spared_share": spared / (moved + spared),
            "fused_least_ms": 1e3 * max(moved / base["copy_bytes_per_s"], flops / base["dense_flop_per_s"]),
        }  # fmt: skip


def show(rows: list[dict]) -> None:
    names = ["plain", "compiled", "per image", "rmt"]
    for what in ("forward", "forward and backward"):
        print(f"\n{what}, ms")
        lines = []
        for r in (r for r in rows if r["op"] == what):
            ms = [f"{r['ms'][n]['median']:.3f}" if n in r["ms"] else "" for n in names]
            line = [r["shape"], str(r["r"]), r["function"], "thin" if r["thin"] else "", *ms]
            line.append(f"{r['plain_over_rmt']:.2f}")
            if what == "forward":
                line += [f"{r['fused_least_ms']:.3f}", f"{100 * r['spared_share']:.0f} %"]
            lines.append(line)
        header = ["shape", "r", "function", "order", *names, "plain / rmt"]
        harness.print_table(header + (["at best", "saved"] if what == "forward" else []), lines)


if __name__ == "__main__":
    main()
