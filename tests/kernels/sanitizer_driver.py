"""Every GPU kernel on small odd shapes, for compute-sanitizer: python tests/kernels/sanitizer_driver.py cuda|triton

Inputs are made and results checked on the CPU, so that the tool sees our kernels and copies, not torch's kernels. Exit
status 1 where a result is wrong. --emulated: the CUDA kernels' own source in the CPU emulator, to rehearse.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    # Every tensor an allocation of its own: an access out of bounds does not land in a neighbour's memory.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from helpers import THRESHOLD, layer
from torch import Tensor

from rmt_kernels import backends, reference
from rmt_kernels.backends import dispatch
from rmt_kernels.backends.native import MOMENTS

# The last one's K is for kernels that read 16 bytes at once, and for 8-bit moments.
SHAPES = [(1, 1, 1), (5, 9, 31), (17, 40, 197), (64, 40, 224)]
# Rows for the wgmma kernel, K a multiple of 8, several tiles and a ragged edge in every direction.
GEMM_SHAPE = (70, 130, 72)
# Served by torch's GEMM: no kernel of ours beside those that are called here anyway.
NO_KERNEL = {"cuda": {"masked_linear_dx", "mask_grad", "weight_grad_"}, "triton": {"weight_grad_"}}


def calls(shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[tuple[str, tuple]]:
    """(op, arguments as in reference.py) for every op, on the CPU."""
    m, _, k = shape
    t = layer(shape, dtype)
    x, weight, bits, bias, scores = (t[name] for name in ("x", "weight", "bits", "bias", "scores"))
    grad, other = (layer(shape, seed=seed)["weight"] for seed in (1, 2))
    dropout = (weight, scores, t["penalty"], t["rng"], 0.3, 2)
    moments = torch.zeros_like(scores), torch.zeros_like(scores)
    dense, factors = reference.masked_weight(weight, bits), torch.tensor([4e-3, 2.0])
    yield "pack_bits", (scores > THRESHOLD,)
    yield "pack_scores", (scores, THRESHOLD)
    yield "unpack_bits", (bits, k)
    yield "masked_weight", (weight, bits)
    yield "masked_linear", (x, weight, bits, bias, None)
    yield "masked_linear_dx", (t["g_task"], weight, bits, None)
    other_bits = reference.pack_scores(-scores, THRESHOLD)
    yield "masked_weight_", (weight.clone(), weight, bits, None)
    yield "masked_weight_", (dense.clone(), weight, other_bits, bits)
    offsets = [0, m // 2, m // 2, m]
    yield "grouped_masked_linear", (x, weight, [bits, other_bits, bits], bias, offsets, False)
    yield "gradient_dropout", (grad, other, *dropout)
    yield "mask_grad", (x, t["g_task"], t["g_general"], *dropout)
    adam = (factors, 0.9, 0.999, 1e-8, THRESHOLD)
    yield "mask_update_", ([scores], [bits], [moments[0]], [moments[1]], [dense], [grad], [weight], *adam)
    # All that one call can do: dropout, the L2 term, norms and counts, of two layers, and every format of the moments.
    both = [[u.clone() for _ in range(2)] for u in (scores, bits, dense, grad, weight, other)]
    norms, counts = torch.stack([scores.norm()] * 2), torch.zeros(2, 2, dtype=torch.int64)
    for kind in MOMENTS:
        if kind == torch.uint8 and scores.shape[0] > 1 and k % 32:
            continue
        narrow = -(-scores.numel() // reference.MOMENT_BLOCK) if kind == torch.uint8 else 0
        scales = [torch.zeros(narrow, dtype=torch.uint8) for _ in range(4 if narrow else 0)]
        first, second = ([torch.zeros_like(scores, dtype=kind) for _ in range(2)] for _ in range(2))
        yield "mask_update_", (
            both[0], both[1], first, second, both[2], both[3], both[4], *adam, both[5], [True, False], scales, norms,
            counts, t["rng"], 1e-4, 0.3, [2, 5], [0, 0],
        )  # fmt: skip


def moved(value, device: str):
    """Copies of the tensors in `value` on `device`, its tuples, lists and the rest as they are."""
    if isinstance(value, Tensor):
        return value.clone().to(device)
    return type(value)(moved(v, device) for v in value) if isinstance(value, list | tuple) else value


def tensors(value) -> list[Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def wrong(op: str, got: Tensor | None, want: Tensor | None, got_args: tuple, want_args: tuple) -> str | None:
    """What differs between two runs: results, or the arguments of an op that writes those."""
    pairs = zip(tensors(got_args), tensors(want_args)) if want is None else [(got, want)]
    for g, w in pairs:
        g = g.cpu()
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"{g.dtype} {tuple(g.shape)}, expected {w.dtype} {tuple(w.shape)}"
        if not w.is_floating_point():
            if not torch.equal(g, w):
                return f"{int((g != w).sum())} of {w.numel()} elements differ"
            continue
        # A tie of P and U may fall either way: the tests look closer, this run is about memory.
        loose = w.dtype != torch.float32 or op in ("gradient_dropout", "mask_grad", "mask_update_")
        error, scale = float((g.double() - w.double()).norm()), float(w.double().norm())
        if not error <= (2e-2 if loose else 1e-5) * scale:
            return f"error {error:.1e} of {scale:.1e}"
    return None


def run(name: str, module, device: str) -> list[str]:
    """Runs everything on `device`. Returns what went wrong, a line each."""
    problems, count = [], 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        jobs = [job for shape in SHAPES for job in calls(shape, dtype)]
        if name == "cuda" and dtype != torch.float32 and has_wgmma(device):
            t = layer(GEMM_SHAPE, dtype)
            jobs.append(("masked_gemm", (t["x"], t["weight"], t["bits"], t["bias"])))
        for op, args in jobs:
            here, there = moved(args, "cpu"), moved(args, device)
            if op in NO_KERNEL[name] or not hasattr(module, op) or (name == "triton" and module.lacks(op, there)):
                continue
            want = reference.masked_linear(*here, None) if op == "masked_gemm" else getattr(reference, op)(*here)
            found = wrong(op, getattr(module, op)(*there), want, there, here)
            count += 1
            if found:
                problems.append(
                    f"{name}.{op} in {dtype}, {[tuple(a.shape) for a in args if isinstance(a, Tensor)]}: {found}"
                )
    print(f"{name}: {count} calls, {len(problems)} wrong")
    return problems if count else [f"{name}: nothing ran"]


def has_wgmma(device: str) -> bool:
    return device == "cpu" or torch.cuda.get_device_capability()[0] == 9


def from_bits(*key) -> dispatch.Row:
    """The dispatch table's stand-in: every product by the kernel."""
    return dispatch.table()["cuda default", "masked_linear", "*"][None, None][0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("--emulated", action="store_true", help="cuda in the CPU emulator; triton in its interpreter")
    args = parser.parse_args()
    if args.emulated and args.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    module, dispatch.row = backends.load(args.backend), from_bits
    with tempfile.TemporaryDirectory() as folder:
        if args.emulated and args.backend == "cuda":
            from kernels import cuda_on_cpu

            library = cuda_on_cpu.build(Path(folder))
            module.extension, module.device_kind = library, lambda index=None: "sm_90"
            module._launch = lambda name, _, *a: getattr(library, f"cuda_{name}")(*a, 0)
        else:
            reason = module.unavailable("cpu" if args.emulated else "cuda")
            if reason is not None:
                raise SystemExit(f"nothing to run: {reason}")
        problems = run(args.backend, module, "cpu" if args.emulated else "cuda")
        if not args.emulated:
            torch.cuda.synchronize()
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
