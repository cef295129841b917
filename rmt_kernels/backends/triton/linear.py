"""y = x @ (weight * bits).T + bias, its input cotangent, and the same over rows grouped by task."""

import triton
import triton.language as tl

from .bits import block_mask, block_offsets, load_masked
from .launch import GROUP, dot_tile, launch, upload

# Of a row block of `grouped_masked_linear_kernel`: address of its bits or 0 for none, first row, end of its group.
ENTRY = tl.constexpr(3)


@triton.jit
def _rows(
    x_ptr, weight_ptr, bits_ptr, bias_ptr, y_ptr, offs_m, end_m, offs_n, N, K, words,
    stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, present=True,
    OPTIONAL: tl.constexpr = False,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        inside = block_mask(offs_m, offs_k, end_m, K)
        x_blk = tl.load(x_ptr + block_offsets(offs_m, offs_k, stride_xm, stride_xk), mask=inside, other=0.0)
        w_blk = load_masked(
            weight_ptr, bits_ptr, offs_n, k0, N, K, words, stride_wn, stride_wk, BLOCK_N, BLOCK_K, present,
            OPTIONAL,
        )  # fmt: skip
        # The masked weight is the right operand: on sm_90 it then passes through shared memory. As the left one it
        # would stay in registers, which Triton 3.6 may overwrite under a pending wgmma (kernels.md 1c).
        acc = tl.dot(x_blk, w_blk.to(x_blk.dtype).T, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        bias_blk = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)
        # Through x's dtype, as the reference does.
        acc += bias_blk.to(y_ptr.dtype.element_ty).to(tl.float32)[None, :]
    y_blk = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + block_offsets(offs_m, offs_n, N, 1), y_blk, mask=block_mask(offs_m, offs_n, end_m, N))


@triton.jit
def masked_linear_kernel(
    x_ptr, weight_ptr, bits_ptr, bias_ptr, y_ptr, M, N, K, words, stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # GROUP row blocks share the weight tiles that are in L2.
    pid_m, pid_n = tl.swizzle2d(tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n, blocks_m, blocks_n, GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    _rows(
        x_ptr, weight_ptr, bits_ptr, bias_ptr, y_ptr, offs_m, M, offs_n, N, K, words,
        stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def grouped_masked_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, table_ptr, first, blocks_m, y_ptr, N, K, words,
    stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Row blocks of one column run side by side: they share the weight tile in L2, whatever their group.
    pid_m, pid_n = tl.program_id(0) % blocks_m, tl.program_id(0) // blocks_m
    entry = table_ptr + (first + pid_m) * ENTRY
    address, start, end = tl.load(entry), tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    offs_m = start + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    _rows(
        x_ptr, weight_ptr, address.to(tl.pointer_type(tl.int32)), bias_ptr, y_ptr, offs_m, end, offs_n,
        N, K, words, stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, address != 0,
        True,
    )  # fmt: skip


@triton.jit
def masked_linear_dx_kernel(
    g_ptr, weight_ptr, bits_ptr, dx_ptr, M, N, K, words, stride_gm, stride_gn, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    pid_m, pid_k = tl.swizzle2d(pid // blocks_k, pid % blocks_k, blocks_m, blocks_k, GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        offs_n = n0 + tl.arange(0, BLOCK_N)
        inside = block_mask(offs_m, offs_n, M, N)
        g_blk = tl.load(g_ptr + block_offsets(offs_m, offs_n, stride_gm, stride_gn), mask=inside, other=0.0)
        w_blk = load_masked(
            weight_ptr, bits_ptr, offs_n, pid_k * BLOCK_K, N, K, words, stride_wn, stride_wk, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(g_blk, w_blk.to(g_blk.dtype), acc, input_precision=PRECISION)
    dx_blk = acc.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + block_offsets(offs_m, offs_k, K, 1), dx_blk, mask=block_mask(offs_m, offs_k, M, K))


def masked_linear(x, weight, bits, bias, dense):
    rows, (n, k) = x.reshape(-1, weight.shape[1]), weight.shape
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    m = rows.shape[0]
    (block_m, block_n, block_k, warps, stages), dots = dot_tile("masked_linear", m, rows, weight)
    launch(
        masked_linear_kernel, triton.cdiv(m, block_m) * triton.cdiv(n, block_n), y,
        rows, weight, bits, None if bias is None else bias.contiguous(), y, m, n, k, bits.shape[1],
        *rows.stride(), *weight.stride(),
        PRECISION=dots, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def masked_linear_dx(g, weight, bits, dense):
    rows, (n, k) = g.reshape(-1, weight.shape[0]), weight.shape
    dx = g.new_empty((*g.shape[:-1], k))
    if dx.numel() == 0:
        return dx
    m = rows.shape[0]
    (block_m, block_k, block_n, warps, stages), dots = dot_tile("masked_linear_dx", m, rows, weight)
    launch(
        masked_linear_dx_kernel, triton.cdiv(m, block_m) * triton.cdiv(k, block_k), dx,
        rows, weight, bits, dx, m, n, k, bits.shape[1], *rows.stride(), *weight.stride(),
        PRECISION=dots, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dx


def grouped_masked_linear(x, weight, bits, bias, offsets, invariant):
    n, k = weight.shape
    if invariant:
        x = x.contiguous()  # the tile depends on strides
    buckets = {}  # the groups of one tile share a launch: alone each would have that tile, and so the same sums
    for words, start, end in zip(bits, offsets, offsets[1:]):
        if end > start:
            tile = dot_tile("masked_linear", 1 if invariant else end - start, x, weight)
            address = 0 if words is None else words.data_ptr()
            blocks = buckets.setdefault(tile, [])
            blocks += [(address, first, end) for first in range(start, end, tile[0][0])]
    y = x.new_empty((x.shape[0], n))
    if not buckets:
        return y
    table, first = upload([entry for blocks in buckets.values() for entry in blocks], x.device), 0
    for ((block_m, block_n, block_k, warps, stages), dots), blocks in buckets.items():
        launch(
            grouped_masked_linear_kernel, len(blocks) * triton.cdiv(n, block_n), y,
            x, weight, None if bias is None else bias.contiguous(), table, first, len(blocks), y, n, k, -(-k // 32),
            *x.stride(), *weight.stride(),
            PRECISION=dots, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        first += len(blocks)
    return y
