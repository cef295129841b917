"""Launch configurations as data, and the one place that launches a kernel.

No autotuning: it runs a kernel many times, which would apply an in-place update many times, and its choice changes
the order of a sum, hence the result, from run to run. A measured table can replace DOTS and TILES: no kernel names a
tile size.
"""

import math

import torch
import triton
from torch import Tensor

# (op, precision): {architecture: {condition: tile}}; the first condition that holds decides, and it is a number of
# rows that the product does not exceed, or RAGGED. An architecture serves every later one without an entry. The
# sm_80 tiles stay under 99 KiB of shared memory, so that they fit sm_86, sm_89 and sm_120 too.
# masked_linear, masked_linear_dx: (rows, columns, reduction, warps, stages).
# mask_grad: (BLOCK_N, BLOCK_K, BLOCK_M, warps, stages, slices). Slices cut the epilogue: in one piece it needs more
# registers than a thread has (kernels.md 2a).
# RAGGED: rows do not start on 16 elements (K = 588, a 14 x 14 patch). Loads are then not vectorized, every element
# has its own 64-bit address, and the large tiles spill up to 960 bytes a thread.
RAGGED, ANY = "ragged", math.inf
_HALF = {32: (16, 64, 64, 4, 3), RAGGED: (64, 64, 32, 8, 3), 512: (64, 64, 64, 4, 3), ANY: (128, 128, 64, 8, 3)}
_TF32 = {32: (16, 64, 64, 4, 3), RAGGED: (64, 64, 32, 8, 3), 512: (64, 64, 32, 4, 3), ANY: (128, 64, 32, 4, 3)}
# On the fp32 pipe Triton keeps the whole reduction block in registers: 32 deep it spills.
_IEEE = {32: (16, 64, 16, 4, 3), RAGGED: (16, 64, 16, 4, 3), ANY: (64, 64, 16, 8, 3)}
DOTS = {
    ("masked_linear", "half"): {80: _HALF},
    ("masked_linear", "tf32"): {80: _TF32},
    ("masked_linear", "ieee"): {80: _IEEE},
    ("masked_linear_dx", "half"): {80: _HALF},
    ("masked_linear_dx", "tf32"): {80: _TF32},
    ("masked_linear_dx", "ieee"): {80: _IEEE},
    ("mask_grad", "half"): {80: {RAGGED: (64, 64, 32, 8, 3, 1), ANY: (128, 128, 64, 8, 3, 4)}},
    ("mask_grad", "tf32"): {80: {ANY: (64, 64, 32, 4, 3, 2)}},
    ("mask_grad", "ieee"): {80: {ANY: (32, 64, 16, 4, 2, 1)}},
}
# Kernels that wait for memory: (BLOCK_N, BLOCK_K, warps).
TILES = dict.fromkeys(("mask_update_", "gradient_dropout", "pack_scores", "masked_weight"), (16, 128, 4))
# Row blocks that run side by side and share weight tiles in L2.
GROUP = 8
# Pinned: Triton 3.10 turns contraction to fused multiply-adds off unless asked, which would change every result.
OPTIONS = {"enable_fp_fusion": True}


def capability(device: torch.device) -> int:
    """90 for sm_90. The interpreter runs the tiles of sm_80."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """half, tf32 or ieee: what `F.linear` would do with this dtype here."""
    if dtype != torch.float32:
        return "half"
    if device.type != "cuda":
        return "ieee"
    try:
        allowed = torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # torch refuses to read the old flags once the new one has been set.
        allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def dot_tile(op: str, rows: int, *operands: Tensor) -> tuple[tuple[int, ...], str]:
    """Tile and `input_precision` of a product with this many rows. The first operand sets dtype and device."""
    dtype, device = operands[0].dtype, operands[0].device
    kind = precision(dtype, device)
    here = capability(device)
    # sm_120 comes after sm_100 but has sm_86's shared memory.
    here = 80 if here >= 120 else here
    by_architecture = DOTS[op, kind]
    conditions = by_architecture[max(arch for arch in by_architecture if arch <= here)]
    ragged = any(stride != 1 and stride % 16 for t in operands for stride in t.stride())
    tile = next(t for limit, t in conditions.items() if (ragged if limit == RAGGED else rows <= limit))
    if here < 90 and any(t.element_size() > operands[0].element_size() for t in operands):
        # fp32 weights under half-precision rows: their buffers are twice as large, so there is one fewer.
        tile = (*tile[:4], tile[4] - 1, *tile[5:])
    return tile, "tf32" if kind == "tf32" else "ieee"


# What copies of captured graphs read, at every replay.
_captured: list[Tensor] = []


def upload(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on `device`, in one copy that nothing waits for."""
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(table)
    return table.to(device, non_blocking=True)


def launch(kernel: triton.JITFunction, blocks: int, out: Tensor, *args, **constants) -> None:
    """Runs `kernel` on a one-dimensional grid, which unlike the other two axes has room for 2^31 blocks."""
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(out):
        kernel[(blocks,)](*args, **OPTIONS, **constants)
