"""Adam, threshold and repacking in one pass over a layer; packing and masking on their own."""

import torch
import triton
import triton.language as tl

from .bits import apply_mask, block_mask, block_offsets, expand_words, load_masked, load_words, pack_words
from .launch import TILES, launch


@triton.jit
def mask_update_kernel(
    scores_ptr, bits_ptr, exp_avg_ptr, exp_avg_sq_ptr, dense_ptr, grad_ptr, weight_ptr, factors_ptr, N, K, words,
    rate1, beta2, rate2, eps, threshold, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rate1, rate2: 1 - beta1 and 1 - beta2, rounded once, from float64, as the reference has them."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    k0 = tl.program_id(0) % blocks_k * BLOCK_K
    offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    inside = block_mask(offs_n, offs_k, N, K)
    offs = block_offsets(offs_n, offs_k, K, 1)
    g_blk = tl.load(grad_ptr + offs, mask=inside, other=0.0)
    m_blk = tl.load(exp_avg_ptr + offs, mask=inside, other=0.0)
    v_blk = tl.load(exp_avg_sq_ptr + offs, mask=inside, other=0.0)
    s_blk = tl.load(scores_ptr + offs, mask=inside, other=0.0)
    m_blk += rate1 * (g_blk - m_blk)
    v_blk = v_blk * beta2 + rate2 * g_blk * g_blk
    # Correctly rounded root and quotient: the pass waits for memory, and a score near the threshold decides a bit.
    root = tl.sqrt_rn(v_blk) * tl.load(factors_ptr + 1) + eps
    s_blk -= tl.div_rn(m_blk * tl.load(factors_ptr), root)
    tl.store(exp_avg_ptr + offs, m_blk, mask=inside)
    tl.store(exp_avg_sq_ptr + offs, v_blk, mask=inside)
    tl.store(scores_ptr + offs, s_blk, mask=inside)

    new = pack_words((s_blk > threshold) & inside, BLOCK_N, BLOCK_K)
    if dense_ptr is not None:
        # Few words change in a step: weight is read and dense written only where one did.
        changed = load_words(bits_ptr, offs_n, k0 // 32, N, words, BLOCK_K // 32) != new
        # Several warps read one old word and one of them overwrites it below: none may still have to read it then.
        tl.debug_barrier()
        touched = (expand_words(-changed.to(tl.int32), 0, BLOCK_N, BLOCK_K) != 0) & inside
        w_blk = tl.load(weight_ptr + offs, mask=touched, other=0.0)
        d_blk = apply_mask(w_blk, expand_words(new, 0, BLOCK_N, BLOCK_K)).to(dense_ptr.dtype.element_ty)
        tl.store(dense_ptr + offs, d_blk, mask=touched)
    offs_w = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    tl.store(bits_ptr + block_offsets(offs_n, offs_w, words, 1), new, mask=block_mask(offs_n, offs_w, N, words))


@triton.jit
def pack_scores_kernel(
    scores_ptr, bits_ptr, N, K, words, stride_n, stride_k, threshold, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    blocks_k = tl.cdiv(K, BLOCK_K)
    k0 = tl.program_id(0) % blocks_k * BLOCK_K
    offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    inside = block_mask(offs_n, offs_k, N, K)
    s_blk = tl.load(scores_ptr + block_offsets(offs_n, offs_k, stride_n, stride_k), mask=inside, other=0.0)
    new = pack_words((s_blk.to(tl.float32) > threshold) & inside, BLOCK_N, BLOCK_K)
    offs_w = k0 // 32 + tl.arange(0, BLOCK_K // 32)
    tl.store(bits_ptr + block_offsets(offs_n, offs_w, words, 1), new, mask=block_mask(offs_n, offs_w, N, words))


@triton.jit
def masked_weight_kernel(
    weight_ptr, bits_ptr, out_ptr, N, K, words, stride_n, stride_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    blocks_k = tl.cdiv(K, BLOCK_K)
    k0 = tl.program_id(0) % blocks_k * BLOCK_K
    offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    w_blk = load_masked(weight_ptr, bits_ptr, offs_n, k0, N, K, words, stride_n, stride_k, BLOCK_N, BLOCK_K)
    tl.store(out_ptr + block_offsets(offs_n, offs_k, K, 1), w_blk, mask=block_mask(offs_n, offs_k, N, K))


@triton.jit
def swap_kernel(
    out_ptr, weight_ptr, bits_ptr, old_ptr, N, K, words, stride_n, stride_k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The masked weight where words of bits differ from old's; elsewhere nothing is read or written."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    k0 = tl.program_id(0) % blocks_k * BLOCK_K
    offs_n = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    new = load_words(bits_ptr, offs_n, k0 // 32, N, words, BLOCK_K // 32)
    changed = load_words(old_ptr, offs_n, k0 // 32, N, words, BLOCK_K // 32) != new
    touched = (expand_words(-changed.to(tl.int32), 0, BLOCK_N, BLOCK_K) != 0) & block_mask(offs_n, offs_k, N, K)
    w_blk = tl.load(weight_ptr + block_offsets(offs_n, offs_k, stride_n, stride_k), mask=touched, other=0.0)
    tl.store(
        out_ptr + block_offsets(offs_n, offs_k, K, 1),
        apply_mask(w_blk, expand_words(new, 0, BLOCK_N, BLOCK_K)), mask=touched,
    )  # fmt: skip


def _blocks(op, shape):
    block_n, block_k, warps = TILES[op]
    grid = triton.cdiv(shape[0], block_n) * triton.cdiv(shape[1], block_k)
    return grid, {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps}


def mask_update_(
    scores, bits, exp_avgs, exp_avg_sqs, dense, grads, weights, factors, beta1, beta2, eps, threshold, generals=(),
    chained=(), scales=(), norms=None, counts=None, rng=None, l2=0.0, strength=1.0, streams=(), offsets=(),
):  # fmt: skip
    """From ready gradients: what `lacks` has not refused of the arguments from `generals` on plays no part then."""
    factors = factors.contiguous()
    for i, s in enumerate(scores):
        grid, tile = _blocks("mask_update_", s.shape)
        launch(
            mask_update_kernel, grid, s,
            s, bits[i], exp_avgs[i], exp_avg_sqs[i], dense[i] if dense else None, grads[i],
            weights[i] if dense else None, factors, *s.shape, bits[i].shape[1],
            1 - beta1, beta2, 1 - beta2, eps, threshold, **tile,
        )  # fmt: skip


def pack_scores(scores, threshold):
    bits = scores.new_empty((scores.shape[0], -(-scores.shape[1] // 32)), dtype=torch.int32)
    grid, tile = _blocks("pack_scores", scores.shape)
    launch(
        pack_scores_kernel, grid, bits, scores, bits, *scores.shape, bits.shape[1], *scores.stride(), threshold, **tile
    )
    return bits


def masked_weight(weight, bits):
    out = weight.new_empty(weight.shape)
    masked_weight_(out, weight, bits, None)
    return out


def masked_weight_(out, weight, bits, old):
    grid, tile = _blocks("masked_weight", weight.shape)
    rest = (*weight.shape, bits.shape[1], *weight.stride())
    if grid == 0:
        return
    if old is None:
        launch(masked_weight_kernel, grid, out, weight, bits, out, *rest, **tile)
    else:
        launch(swap_kernel, grid, out, out, weight, bits, old, *rest, **tile)
