"""The weight gradient of 16-bit factors with fp32 sums: python bench/weight_grad.py [--device cuda] [--json FILE]

g.T @ x of CLIP's layers in bf16: rmt's `weight_grad_`, torch's bf16 product (rounded to bf16 at the end) and torch's
fp32 product of the widened factors, casts included. Errors are relative to float64, root mean square. `as it is` forces
the kernel that multiplies bf16 where it is not the default, since there it would be slower (MIN_RATE in
rmt_kernels/backends/cpu.py).
"""

import argparse

import harness
import torch

import rmt_kernels as rk
from rmt_kernels import backends
from rmt_kernels.backends import cpu, native

# ViT-B/32 at batch 32 and ViT-B/16 at batch 8.
ROWS = {"ViT-B/32 b32": 1600, "ViT-B/16 b8": 1576}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one layer of each model")
    parser.add_argument("--seconds", type=float, default=0.5, help="per row")
    args = parser.parse_args()
    device = torch.device(args.device)
    base = harness.provenance(device) | {"bench": "weight_grad", "dtype": "bfloat16"}
    layers = {name: shape for name, shape in harness.LAYERS.items() if name.startswith("ViT-B")}
    layers = dict(list(layers.items())[:1]) if args.quick else layers
    rows = []
    with torch.no_grad(), harness.progress(len(ROWS) * len(layers), "timing") as bar:
        for model, m in ROWS.items():
            for layer, shape in layers.items():
                rows.append(base | {"model": model, "layer": layer} | compare(m, *shape, device, args.seconds))
                bar.update()
    isa = f", {cpu.ISA}" if device.type == "cpu" else ""
    print(f"{base['device_name']}, torch {base['torch']}{isa}")
    names = sorted({name for row in rows for name in row["ms"]}, key=list(rows[0]["ms"]).index)
    header = ["model", "layer", "M", "N", "K", *(f"{n} ms" for n in names), "rmt / bf16", "fp32 / rmt"]
    lines = [
        [r["model"], r["layer"].removeprefix("ViT-B "), *(str(r[c]) for c in "MNK")]
        + [f"{r['ms'][n]['median']:.2f}" for n in names]
        + [f"{r['rmt_over_bf16']:.2f}", f"{r['fp32_over_rmt']:.2f}", *(f"{r['error'][n]:.1e}" for n in names)]
        for r in rows
    ]
    harness.print_table([*header, *(f"{n} error" for n in names)], lines)
    if args.json:
        harness.write_json(args.json, rows)


def compare(m: int, n: int, k: int, device: torch.device, seconds: float) -> dict:
    """Checks each variant against float64, then times them."""
    g, x = (torch.randn(m, columns, device=device).bfloat16() for columns in (n, k))
    out = torch.empty(n, k, device=device)

    def rmt() -> torch.Tensor:
        rk.weight_grad_(out, g, x)
        return out

    def as_it_is() -> torch.Tensor:
        before, cpu.multiplies_bf16 = cpu.multiplies_bf16, lambda: True
        rk.weight_grad_(out, g, x)
        cpu.multiplies_bf16 = before
        return out

    variants = {"rmt": rmt, "bf16": lambda: g.T @ x, "fp32": lambda: g.float().T @ x.float()}
    if (
        device.type == "cpu"
        and native.extension is not None
        and 0 < native.extension.cpu_weight_grad_rate() < cpu.MIN_RATE
    ):
        variants["as it is"] = as_it_is
    truth = g.double().T @ x.double()
    error = {name: float((run().double() - truth).norm() / truth.norm()) for name, run in variants.items()}
    if error["rmt"] > 2 * error["fp32"]:
        raise SystemExit(f"M={m} N={n} K={k}: error {error['rmt']:.1e}, the fp32 product's is {error['fp32']:.1e}")
    times = harness.time_all(variants, device, seconds)
    ms = {name: dict(zip(("p20", "median", "p80"), t)) for name, t in times.items()}
    return {
        "M": m, "N": n, "K": k, "backend": backends.last("weight_grad_", device.type), "ms": ms, "error": error,
        "isa": cpu.ISA, "rmt_over_bf16": times["rmt"][1] / times["bf16"][1],
        "fp32_over_rmt": times["fp32"][1] / times["rmt"][1],
    }  # fmt: skip


if __name__ == "__main__":
    main()
