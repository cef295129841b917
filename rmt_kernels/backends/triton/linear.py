"""y = x @ (weight * bits).T + bias, its input cotangent, and the same over rows grouped by task."""

import torch
import triton
import triton.language as tl

from .bits import block_mask, block_offsets, load_masked
from .launch import GROUP, dot_tile, launch


@triton.jit
def _rows(
    x_ptr, weight_ptr, bits_ptr, bias_ptr, y_ptr, offs_m, end_m, offs_n, N, K, words,
    stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        inside = block_mask(offs_m, offs_k, end_m, K)
        x_blk = tl.load(x_ptr + block_offsets(offs_m, offs_k, stride_xm, stride_xk), mask=inside, other=0.0)
        w_blk = load_masked(weight_ptr, bits_ptr, offs_n, k0, N, K, words, stride_wn, stride_wk, BLOCK_N, BLOCK_K)
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
    x_ptr, weight_ptr, bits_ptr, bias_ptr, offsets_ptr, y_ptr, T, N, K, words, max_blocks_m,
    stride_xm, stride_xk, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    # Row blocks of one column run side by side: they share the weight tile in L2, whatever their task.
    pid_m, pid_n = tl.program_id(0) % max_blocks_m, tl.program_id(0) // max_blocks_m
    offs_t = tl.arange(0, BLOCK_T)
    starts = tl.load(offsets_ptr + offs_t, mask=offs_t < T, other=0)
    ends = tl.load(offsets_ptr + 1 + offs_t, mask=offs_t < T, other=0)
    # The host does not know the split: each program finds its task among the row blocks that the tasks need.
    blocks = (ends - starts + BLOCK_M - 1) // BLOCK_M
    next_task = tl.cumsum(blocks, 0)
    task = tl.sum((next_task <= pid_m).to(tl.int32), 0)
    if task < T:
        mine = offs_t == task
        start = tl.sum(tl.where(mine, starts - (next_task - blocks) * BLOCK_M, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
        offs_m = start + pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        _rows(
            x_ptr, weight_ptr, bits_ptr + task.to(tl.int64) * N * words, bias_ptr, y_ptr, offs_m, end, offs_n,
            N, K, words, stride_xm, stride_xk, stride_wn, stride_wk, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
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
    bits, offsets = torch.stack(bits), torch.tensor(offsets, device=x.device)
    (m, k), (tasks, n, words) = x.shape, bits.shape
    y = x.new_empty((m, n))
    if m == 0:
        return y
    (block_m, block_n, block_k, warps, stages), dots = dot_tile("masked_linear", m // tasks, x, weight)
    # However the rows are split, the tasks' last blocks waste less than one block each.
    max_blocks_m = min(m, m // block_m + tasks)
    launch(
        grouped_masked_linear_kernel, max_blocks_m * triton.cdiv(n, block_n), y,
        x, weight, bits, None if bias is None else bias.contiguous(), offsets.contiguous(), y, tasks, n, k, words,
        max_blocks_m, *x.stride(), *weight.stride(),
        PRECISION=dots, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_T=triton.next_power_of_2(tasks), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y
