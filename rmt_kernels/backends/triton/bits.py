"""Packed bits inside kernels: expand words to lane masks, mask weights by AND, pack decisions into words."""

import triton
import triton.language as tl


@triton.jit
def block_mask(offs_a, offs_b, size_a, size_b):
    return (offs_a < size_a)[:, None] & (offs_b < size_b)[None, :]


@triton.jit
def block_offsets(offs_a, offs_b, stride_a, stride_b):
    # 64 bits before the product: n * K + k and m * K + k pass 2^31 in large layers and batches.
    return offs_a.to(tl.int64)[:, None] * stride_a + offs_b.to(tl.int64)[None, :] * stride_b


@triton.jit
def load_words(
    bits_ptr, offs_n, first_word, N, words, COUNT: tl.constexpr, present=True, OPTIONAL: tl.constexpr = False
):  # fmt: skip
    # Compact, one load per word. A load broadcast to [BLOCK_N, BLOCK_K] would be pipelined as a dense int32 tile:
    # 2x the shared memory of a half-precision weight tile and 4-byte copies (kernels.md 1c).
    offs_w = first_word + tl.arange(0, COUNT)
    inside = block_mask(offs_n, offs_w, N, words)
    at = bits_ptr + block_offsets(offs_n, offs_w, words, 1)
    # Outside the matrix the weight is 0 whatever its bits, so that only `present` asks for ones. A constant: the fill
    # of ones costs registers that products without it need.
    if OPTIONAL:
        return tl.load(at, mask=(inside & present) != 0, other=-1)
    return tl.load(at, mask=inside, other=0)


@triton.jit
def expand_words(words_blk, first_bit, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # [BLOCK_N, words] -> [BLOCK_N, BLOCK_K] of 0 or -1. BLOCK_K below 32 takes bits first_bit and on of one word.
    BITS: tl.constexpr = min(BLOCK_K, 32)
    planes = words_blk[:, :, None] >> (first_bit + tl.arange(0, BITS))[None, None, :]
    return tl.reshape(-(planes & 1), (BLOCK_N, BLOCK_K))


@triton.jit
def apply_mask(w_blk, lanes):
    # AND, not where or multiply: off inf and NaN become +0, and `where` costs several selects per element.
    if w_blk.dtype.primitive_bitwidth == 16:
        off = w_blk.to(tl.int16, bitcast=True) & lanes.to(tl.int16)
    else:
        off = w_blk.to(tl.int32, bitcast=True) & lanes
    return off.to(w_blk.dtype, bitcast=True)


@triton.jit
def load_masked(
    weight_ptr, bits_ptr, offs_n, k0, N, K, words, stride_n, stride_k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    present=True, OPTIONAL: tl.constexpr = False,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] of the masked weight, in the weight's dtype. k0 is a multiple of BLOCK_K.

    present: with OPTIONAL, False where bits_ptr points nowhere: every bit is on.
    """
    offs_k = k0 + tl.arange(0, BLOCK_K)
    inside = block_mask(offs_n, offs_k, N, K)
    w_blk = tl.load(weight_ptr + block_offsets(offs_n, offs_k, stride_n, stride_k), mask=inside, other=0.0)
    COUNT: tl.constexpr = (BLOCK_K + 31) // 32
    words_blk = load_words(bits_ptr, offs_n, k0 // 32, N, words, COUNT, present, OPTIONAL)
    return apply_mask(w_blk, expand_words(words_blk, k0 % 32 if BLOCK_K < 32 else 0, BLOCK_N, BLOCK_K))


@triton.jit
def pack_words(keep, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # A sum of distinct powers of two is their OR, and a sum is the reduction that Triton lowers to shuffles.
    planes = tl.reshape(keep.to(tl.int32), (BLOCK_N, BLOCK_K // 32, 32))
    return tl.sum(planes << tl.arange(0, 32)[None, None, :], axis=2)
