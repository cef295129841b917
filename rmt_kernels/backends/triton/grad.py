"""Mask gradient from one or two cotangents, with gradient dropout where the products end."""

import torch
import triton
import triton.language as tl

from .bits import block_mask, block_offsets
from .launch import GROUP, TILES, dot_tile, launch
from .rng import uniform_block


@triton.jit
def _keep_probability(a, b):
    sign = tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, 0.0))
    return (1 + sign * (a + b) / (tl.abs(a) + tl.abs(b) + 1e-8)) / 2  # 1e-8: GDR_EPS


@triton.jit
def _score_gradient(
    a, b, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, offs_n, k0, N, K,
    stride_wn, stride_wk, stride_sn, stride_sk, dropped, stream,
    DROPOUT: tl.constexpr, FOURS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_k = k0 + tl.arange(0, BLOCK_K)
    inside = block_mask(offs_n, offs_k, N, K)
    if weight_ptr is not None:
        w_ptrs = weight_ptr + block_offsets(offs_n, offs_k, stride_wn, stride_wk)
        w_blk = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)
        a *= w_blk
        if DROPOUT:
            b *= w_blk
    if penalty_ptr is not None:
        s_ptrs = scores_ptr + block_offsets(offs_n, offs_k, stride_sn, stride_sk)
        a += tl.load(penalty_ptr).to(tl.float32) * tl.load(s_ptrs, mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        kept = _keep_probability(a, b) > uniform_block(rng_ptr, stream, offs_n, k0, K, FOURS, BLOCK_N, BLOCK_K)
        a = tl.where(kept, a, dropped * a)
    tl.store(grad_ptr + block_offsets(offs_n, offs_k, K, 1), a, mask=inside)


@triton.jit
def _halves(acc, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_N, 2, BLOCK_K // 2)), (0, 2, 1)))


@triton.jit
def _score_gradient_sliced(
    a, b, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, offs_n, k0, N, K,
    stride_wn, stride_wk, stride_sn, stride_sk, dropped, stream,
    DROPOUT: tl.constexpr, FOURS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    # The whole tile at once spills 2 KB a thread (kernels.md 2a): its addresses, weights and draws live together.
    if SLICES == 1:
        _score_gradient(
            a, b, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, offs_n, k0, N, K,
            stride_wn, stride_wk, stride_sn, stride_sk, dropped, stream, DROPOUT, FOURS, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = BLOCK_K // 2
        a_left, a_right = _halves(a, BLOCK_N, BLOCK_K)
        b_left, b_right = _halves(b, BLOCK_N, BLOCK_K)
        _score_gradient_sliced(
            a_left, b_left, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, offs_n, k0, N, K,
            stride_wn, stride_wk, stride_sn, stride_sk, dropped, stream, DROPOUT, FOURS, BLOCK_N, HALF, SLICES // 2,
        )  # fmt: skip
        _score_gradient_sliced(
            a_right, b_right, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, offs_n, k0 + HALF, N, K,
            stride_wn, stride_wk, stride_sn, stride_sk, dropped, stream, DROPOUT, FOURS, BLOCK_N, HALF, SLICES // 2,
        )  # fmt: skip


# Each layer has its own stream: a kernel specialised on its value would be compiled for stream 1 and again for 16.
@triton.jit(do_not_specialize=["stream"])
def mask_grad_kernel(
    x_ptr, g_task_ptr, g_general_ptr, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, M, N, K,
    stride_xm, stride_xk, stride_tm, stride_tn, stride_gm, stride_gn, stride_wn, stride_wk, stride_sn, stride_sk,
    dropped, stream, FOURS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    DROPOUT: tl.constexpr = g_general_ptr is not None
    blocks_n, blocks_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    pid_n, pid_k = tl.swizzle2d(pid // blocks_k, pid % blocks_k, blocks_n, blocks_k, GROUP)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    a = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    b = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m0 in range(0, M, BLOCK_M):
        offs_m = m0 + tl.arange(0, BLOCK_M)
        in_x, in_g = block_mask(offs_m, offs_k, M, K), block_mask(offs_n, offs_m, N, M)
        # One load of x serves both products: the fusion saves a third of the reads and both (N, K) gradients.
        x_blk = tl.load(x_ptr + block_offsets(offs_m, offs_k, stride_xm, stride_xk), mask=in_x, other=0.0)
        t_blk = tl.load(g_task_ptr + block_offsets(offs_n, offs_m, stride_tn, stride_tm), mask=in_g, other=0.0)
        a = tl.dot(t_blk, x_blk, a, input_precision=PRECISION)
        if DROPOUT:
            g_blk = tl.load(g_general_ptr + block_offsets(offs_n, offs_m, stride_gn, stride_gm), mask=in_g, other=0.0)
            b = tl.dot(g_blk, x_blk, b, input_precision=PRECISION)
    _score_gradient_sliced(
        a, b, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, offs_n, pid_k * BLOCK_K, N, K,
        stride_wn, stride_wk, stride_sn, stride_sk, dropped, stream, DROPOUT, FOURS, BLOCK_N, BLOCK_K, SLICES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["stream"])
def gradient_dropout_kernel(
    grad_task_ptr, grad_general_ptr, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, N, K,
    stride_tn, stride_tk, stride_gn, stride_gk, stride_wn, stride_wk, stride_sn, stride_sk,
    dropped, stream, FOURS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DROPOUT: tl.constexpr = grad_general_ptr is not None
    blocks_k = tl.cdiv(K, BLOCK_K)
    k0 = tl.program_id(0) % blocks_k * BLOCK_K
    offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    inside = block_mask(offs_n, offs_k, N, K)
    a_ptrs = grad_task_ptr + block_offsets(offs_n, offs_k, stride_tn, stride_tk)
    a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = a
    if DROPOUT:
        b_ptrs = grad_general_ptr + block_offsets(offs_n, offs_k, stride_gn, stride_gk)
        b = tl.load(b_ptrs, mask=inside, other=0.0).to(tl.float32)
    _score_gradient(
        a, b, weight_ptr, scores_ptr, penalty_ptr, rng_ptr, grad_ptr, offs_n, k0, N, K,
        stride_wn, stride_wk, stride_sn, stride_sk, dropped, stream, DROPOUT, FOURS, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def _strides(tensor):
    return (0, 0) if tensor is None else tensor.stride()


def mask_grad(x, g_task, g_general, weight, scores, penalty, rng, strength, stream):
    (m, k), n = x.shape, weight.shape[0]
    common = x.dtype if all(g is None or g.dtype == x.dtype for g in (g_task, g_general)) else torch.float32
    # Cast here, not in the kernel: a left operand that is cast in registers stays there, under the wgmma hazard.
    x, g_task, g_general = (None if t is None else t.to(common) for t in (x, g_task, g_general))
    grad = weight.new_empty((n, k), dtype=torch.float32)
    operands = [t for t in (x, g_task, g_general) if t is not None]
    (block_n, block_k, block_m, warps, stages, slices), dots = dot_tile("mask_grad", m, *operands)
    launch(
        mask_grad_kernel, triton.cdiv(n, block_n) * triton.cdiv(k, block_k), grad,
        x, g_task, g_general, weight, scores, penalty, None if rng is None else rng.contiguous(), grad, m, n, k,
        *x.stride(), *g_task.stride(), *_strides(g_general), *weight.stride(), *_strides(scores),
        1.0 - strength, stream, FOURS=k % 4 == 0, PRECISION=dots,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SLICES=slices, GROUP=GROUP,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad


def gradient_dropout(grad_task, grad_general, weight, scores, penalty, rng, strength, stream):
    n, k = grad_task.shape
    grad = grad_task.new_empty((n, k), dtype=torch.float32)
    block_n, block_k, warps = TILES["gradient_dropout"]
    launch(
        gradient_dropout_kernel, triton.cdiv(n, block_n) * triton.cdiv(k, block_k), grad,
        grad_task, grad_general, weight, scores, penalty, None if rng is None else rng.contiguous(), grad, n, k,
        *grad_task.stride(), *_strides(grad_general), *_strides(weight), *_strides(scores),
        1.0 - strength, stream, FOURS=k % 4 == 0, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return grad
