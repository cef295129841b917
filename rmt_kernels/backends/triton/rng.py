"""The draw of gradient dropout: Philox-4x32-10, bit for bit `reference.philox_uniform`."""

import triton
import triton.language as tl

from .bits import block_offsets


@triton.jit
def uniform_block(rng_ptr, stream, offs_n, k0, K, FOURS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] uniforms of columns k0 and on. k0 is a multiple of BLOCK_K; FOURS says that K % 4 == 0.

    Philox makes four words at once. Where rows begin on a multiple of four, one call serves four neighbours; elsewhere
    a group straddles two rows and every element makes the call for itself, at four times the cost.
    """
    # tl.philox splits a 64-bit seed into the two key words, so adding above bit 32 adds to the second one only.
    key = tl.load(rng_ptr) + (tl.cast(stream, tl.int64) << 32)
    step = tl.load(rng_ptr + 1)
    if FOURS:
        group = block_offsets(offs_n, k0 // 4 + tl.arange(0, BLOCK_K // 4), K // 4, 1)
    else:
        flat = block_offsets(offs_n, k0 + tl.arange(0, BLOCK_K), K, 1)
        group = flat >> 2
    w0, w1, w2, w3 = tl.philox(
        key, group.to(tl.uint32), (group >> 32).to(tl.uint32), step.to(tl.uint32), (step >> 32).to(tl.uint32)
    )
    if FOURS:
        # The last join is the fastest axis: w0, w1, w2, w3 in turn.
        words_blk = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_N, BLOCK_K))
    else:
        odd = (flat & 1) != 0
        words_blk = tl.where((flat & 2) != 0, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
    return (words_blk >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
