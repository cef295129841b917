"""Many tasks over one weight, and a change of task: python bench/grouped.py [--device cuda] [--quick] [--json FILE]

Rows grouped by task through one linear layer: `grouped_masked_linear` (`rmt`, and `invariant` with invariant=True)
beside T products over T folded copies of the weight (`folded`: a model per task; copies rotate, so that they come from
memory), one product of all rows over one copy (`dense`: what no mask would cost), a loop over `masked_linear`
(`looped`) and the reference; on CUDA one batched product over the stacked copies too (`batched`), which needs as many
rows of every task. Then the masked weights of ViT-B's image tower rewritten in place for another task: whole (`whole`),
the words that differ (`differing`), and the packed bits alone (`bits`).
"""

import argparse

import harness
import torch
import torch.nn.functional as F

import rmt_kernels as rk
from rmt_kernels import backends, reference

SHAPES = ("ViT-B mlp.c_proj", "ViT-B mlp.c_fc", "ViT-B attn.in_proj", "ViT-B attn.out_proj")
TASKS, ROWS = (1, 4, 16, 32, 64), (1, 4, 16, 50)
REFERENCE_ROWS = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# R-AMT's masks after training: 2.56 % of the weights off.
OFF = 0.0256
# Folded copies that are rotated through, together: more than a core's second cache, and than most third ones.
ROTATED_BYTES = 512 << 20
# conv1 and the attention of ViT-B/16's image tower.
TOWER = [(768, 768), *[(2304, 768), (768, 768)] * 12]
# How many weights two masks of a tower differ in: drawn apart, or of one task at two times of its training.
PAIRS = {"two tasks": None, "0.1 % flipped": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="one layer, 16 tasks of 1 and 16 rows")
    parser.add_argument("--tasks", type=int, nargs="+", default=TASKS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of each task")
    parser.add_argument("--seconds", type=float, default=0.3, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, seconds = torch.device(args.device), 0.1 if args.quick else args.seconds
    how = f"--threads {args.threads}" if device.type == "cpu" else f"--device {device}"
    base = harness.provenance(device) | {"bench": "grouped", "command": f"python bench/grouped.py {how}"}
    layers = SHAPES[:1] if args.quick else SHAPES
    cases = [(t, m) for t in ((16,) if args.quick else args.tasks) for m in ((1, 16) if args.quick else args.rows)]
    products, swaps = [], []
    with torch.no_grad(), harness.progress(len(DTYPES) * (len(layers) * len(cases) + len(PAIRS)), "timing") as bar:
        for dtype in DTYPES.values():
            for name in layers:
                weight = Layer(*harness.LAYERS[name], dtype, device)
                for tasks, m in cases:
                    products.append(base | {"layer": name} | weight.compare(tasks, m, seconds))
                    bar.update()
                del weight
            for pair, flipped in PAIRS.items():
                swaps.append(base | {"pair": pair} | swap(dtype, flipped, device, seconds))
                bar.update()
    print(f"{base['device_name']}, torch {base['torch']}, {backends.load(device.type).device_kind()}")
    show(products, swaps)
    if args.json:
        harness.write_json(args.json, products + swaps)


class Layer:
    """A weight, masks for as many tasks as are asked for, and folded copies to rotate through."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        # A backend that is forced for the products need not serve what makes their operands.
        with rk.use_backend(None):
            self._make(n, k, dtype, device, generator)

    def _make(self, n: int, k: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
        self.weight = torch.randn(n, k, generator=generator).to(device, dtype)
        masks = (torch.rand(n, k, generator=generator) > OFF for _ in range(max(TASKS)))
        self.bits = [rk.pack_bits(mask.to(device)) for mask in masks]
        copies = max(len(self.bits), min(256, ROTATED_BYTES // self.weight.nbytes))
        self.folded = [rk.masked_weight(self.weight, self.bits[i % len(self.bits)]) for i in range(copies)]

    def compare(self, tasks: int, m: int, seconds: float) -> dict:
        """Checks every way against float64, then times it."""
        (n, k), dtype, device = self.weight.shape, self.weight.dtype, self.weight.device
        x = torch.randn(tasks * m, k, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        bits, offsets, turn = self.bits[:tasks], [i * m for i in range(tasks + 1)], 0

        def separate(first: int) -> torch.Tensor:
            copies = (self.folded[(first + i) % len(self.folded)] for i in range(tasks))
            return torch.cat([F.linear(x[i : i + m], copy) for i, copy in zip(offsets, copies)])

        def folded() -> torch.Tensor:
            nonlocal turn
            turn = (turn + tasks) % len(self.folded)
            return separate(turn)

        def dense() -> torch.Tensor:
            return F.linear(x, self.weight)

        variants = {
            "rmt": lambda: rk.grouped_masked_linear(x, self.weight, bits, offsets),
            "invariant": lambda: rk.grouped_masked_linear(x, self.weight, bits, offsets, invariant=True),
            "looped": lambda: torch.cat(
                [rk.masked_linear(x[i : i + m], self.weight, words) for i, words in zip(offsets, bits)]
            ),
        }
        if device.type == "cuda":
            stacked = torch.stack(self.folded[:tasks])
            variants["batched"] = lambda: torch.bmm(x.view(tasks, m, k), stacked.mT).view(tasks * m, n)
        if tasks * m <= REFERENCE_ROWS:  # it takes seconds for more
            variants["reference"] = lambda: reference.grouped_masked_linear(x, self.weight, bits, None, offsets, False)
        truth = torch.cat([x[i : i + m].double() @ c.double().T for i, c in zip(offsets, self.folded)])
        results = {"folded": separate(0), **{name: run() for name, run in variants.items()}}
        error = {name: float((y.double() - truth).norm() / truth.norm()) for name, y in results.items()}
        for name, wrong in error.items():
            if wrong > 2 * error["folded"]:
                raise SystemExit(f"T={tasks} m={m} {n}x{k}: {name}'s error {wrong:.1e}, folded {error['folded']:.1e}")
        times = harness.time_all(variants | {"folded": folded, "dense": dense}, device, seconds, least=3)
        return {
            "dtype": str(dtype).removeprefix("torch."), "T": tasks, "rows": m, "N": n, "K": k, "error": error,
            "ms": {name: dict(zip(("p20", "median", "p80"), t)) for name, t in times.items()},
        }  # fmt: skip


def swap(dtype: torch.dtype, flipped: float | None, device: torch.device, seconds: float) -> dict:
    """Another task's masked weights in the place of one's, there and back, for every layer of the tower."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator).to(device, dtype) for s in TOWER]
    masks = [torch.rand(s, generator=generator) > OFF for s in TOWER]
    others = [
        torch.rand(m.shape, generator=generator) > OFF if flipped is None else m ^ (torch.rand(m.shape) < flipped)
        for m in masks
    ]
    with rk.use_backend(None):
        tasks = [[rk.pack_bits(m.to(device)) for m in task] for task in (masks, others)]
        out = [rk.masked_weight(w, b) for w, b in zip(weights, tasks[0])]
    kept, now = [b.clone() for b in tasks[0]], 0

    def turn(write) -> None:
        nonlocal now
        old, new, now = tasks[now], tasks[1 - now], 1 - now
        for i, (before, after) in enumerate(zip(old, new)):
            write(i, before, after)

    variants = {
        "whole": lambda: turn(lambda i, old, new: rk.masked_weight_(out[i], weights[i], new)),
        "differing": lambda: turn(lambda i, old, new: rk.masked_weight_(out[i], weights[i], new, old=old)),
        "bits": lambda: turn(lambda i, old, new: kept[i].copy_(new)),
    }
    for name, run in list(variants.items())[:2]:
        # From a known state: the ways take turns below, and only these two leave `out` as `now` says.
        for _ in range(2):
            run()
            for o, w, b in zip(out, weights, tasks[now]):
                assert torch.equal(o, reference.masked_weight(w, b)), name
    times = {name: harness.time_all({name: run}, device, seconds, least=3)[name] for name, run in variants.items()}
    differing = sum(int((a != b).sum()) for a, b in zip(*tasks)) / sum(b.numel() for b in tasks[0])
    return {
        "dtype": str(dtype).removeprefix("torch."), "weights": sum(w.numel() for w in weights),
        "differing_words": differing, "ms": {n: dict(zip(("p20", "median", "p80"), t)) for n, t in times.items()},
    }  # fmt: skip


def show(products: list[dict], swaps: list[dict]) -> None:
    names = [name for name in ("rmt", "invariant", "looped", "folded", "batched", "dense") if name in products[0]["ms"]]
    lines = []
    for r in products:
        ms = {name: r["ms"][name]["median"] for name in names}
        ratios = [
            f"{ms['folded'] / ms['rmt']:.2f}",
            f"{ms['rmt'] / ms['dense']:.2f}",
            f"{ms['invariant'] / ms['dense']:.2f}",
        ]
        lines.append(
            [f"{r['N']}x{r['K']}", r["dtype"], str(r["T"]), str(r["rows"]), *(f"{t:.3f}" for t in ms.values()), *ratios]
        )
    ratios = ["folded / rmt", "rmt / dense", "invariant / dense"]
    harness.print_table(["N x K", "dtype", "T", "rows", *(f"{n} ms" for n in names), *ratios], lines)
    print(f"\nAnother task in {len(TOWER)} layers, {swaps[0]['weights'] / 1e6:.1f} M weights")
    lines = [
        [
            r["pair"],
            r["dtype"],
            f"{100 * r['differing_words']:.1f} %",
            *(f"{t['median']:.2f}" for t in r["ms"].values()),
        ]
        for r in swaps
    ]
    harness.print_table(["masks", "dtype", "words that differ", *(f"{n} ms" for n in swaps[0]["ms"])], lines)


if __name__ == "__main__":
    main()
