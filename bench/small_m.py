"""Where the product straight from the bits stops paying: python bench/small_m.py [--json FILE]

Against making the masked weight and torch's GEMM over it, for callers that keep the bits alone. Decides SMALL_M in
rmt_kernels/backends/cpu.py. A row per dtype, layer and M: both times, their ratio, and the GEMM's alone.
"""

import argparse

import harness
import torch

import rmt_kernels as rk
from rmt_kernels.backends import cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=0.5)
    args = parser.parse_args()
    device = torch.device("cpu")
    base = harness.provenance(device) | {"bench": "small_m"}
    rows = []
    with torch.no_grad(), harness.progress(2 * 4 * 7, "timing") as bar:
        for dtype in (torch.float32, torch.bfloat16):
            for name in ("ViT-B attn.in_proj", "ViT-B attn.out_proj", "ViT-B mlp.c_proj", "ViT-L attn.in_proj"):
                for m in (1, 2, 4, 8, 16, 32, 64):
                    rows.append(base | compare(m, *harness.LAYERS[name], dtype, device, args.seconds) | {"layer": name})
                    bar.update()
    print(f"{base['device_name']}, torch {base['torch']}, {cpu.ISA}; SMALL_M is {cpu.SMALL_M}")
    columns = ("bits_ms", "made_ms", "gemm_ms", "bits_over_made", "bits_over_gemm")
    lines = [[r["dtype"], r["layer"], str(r["M"]), *(f"{r[c]:.3f}" for c in columns)] for r in rows]
    harness.print_table(["dtype", "layer", "M", *columns], lines)
    if args.json:
        harness.write_json(args.json, rows)


def compare(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, seconds: float) -> dict:
    """Times the public op with the product forced one way and the other."""
    x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    bits = rk.pack_bits(torch.rand(n, k) > 0.025)
    dense = rk.masked_weight(weight, bits)

    def forced(limit: int):
        def run():
            before, cpu.SMALL_M[dtype] = cpu.SMALL_M[dtype], limit
            y = rk.masked_linear(x, weight, bits, bias)
            cpu.SMALL_M[dtype] = before
            return y

        return run

    plain = {"gemm": lambda: rk.masked_linear(x, weight, bits, bias, dense=dense)}
    times = harness.time_all({"bits": forced(m), "made": forced(0)} | plain, device, seconds)
    bits_ms, made_ms, gemm_ms = (times[name][1] for name in ("bits", "made", "gemm"))
    return {
        "dtype": str(dtype).removeprefix("torch."), "M": m, "N": n, "K": k, "bits_ms": bits_ms, "made_ms": made_ms,
        "gemm_ms": gemm_ms, "bits_over_made": bits_ms / made_ms, "bits_over_gemm": bits_ms / gemm_ms,
    }  # fmt: skip


if __name__ == "__main__":
    main()
