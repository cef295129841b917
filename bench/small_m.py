"""Where the product straight from the bits stops beating torch's GEMM: python bench/small_m.py [--json FILE]

Decides SMALL_M in rmt_kernels/backends/cpu.py. A row per dtype, layer and M: both times and their ratio.
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
    with torch.no_grad(), harness.progress(2 * 4 * 8, "timing") as bar:
        for dtype in (torch.float32, torch.bfloat16):
            for name in ("ViT-B attn.in_proj", "ViT-B attn.out_proj", "ViT-B mlp.c_proj", "ViT-L attn.in_proj"):
                for m in (1, 2, 4, 6, 8, 12, 16, 24):
                    rows.append(base | compare(m, *harness.LAYERS[name], dtype, device, args.seconds) | {"layer": name})
                    bar.update()
    print(f"{base['device_name']}, torch {base['torch']}, {cpu.ISA}; SMALL_M is {cpu.SMALL_M}")
    lines = [
        [
            r["dtype"],
            r["layer"],
            str(r["M"]),
            f"{r['bits_ms']:.3f}",
            f"{r['dense_ms']:.3f}",
            f"{r['bits_over_dense']:.2f}",
        ]
        for r in rows
    ]
    harness.print_table(["dtype", "layer", "M", "bits ms", "dense ms", "bits / dense"], lines)
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
            y = rk.masked_linear(x, weight, bits, bias, dense=dense)
            cpu.SMALL_M[dtype] = before
            return y

        return run

    times = harness.time_all({"bits": forced(m), "dense": forced(0)}, device, seconds)
    ours, theirs = times["bits"][1], times["dense"][1]
    return {
        "dtype": str(dtype).removeprefix("torch."), "M": m, "N": n, "K": k, "bits_ms": ours, "dense_ms": theirs,
        "bits_over_dense": ours / theirs,
    }  # fmt: skip


if __name__ == "__main__":
    main()
