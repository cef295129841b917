"""The draw and 64-bit indices, run by test_triton_interpret.py with TRITON_INTERPRET=1. Not collected by name."""

import pytest
import torch
import triton
import triton.language as tl

import rmt_kernels as rk
from rmt_kernels import reference
from rmt_kernels.backends.triton.bits import block_offsets
from rmt_kernels.backends.triton.rng import uniform_block


@triton.jit
def draw(rng_ptr, u_ptr, stream, first_row, K, FOURS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_n, offs_k = tl.arange(0, BLOCK_N), tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = first_row + offs_n
    u_blk = uniform_block(rng_ptr, stream, rows, tl.program_id(0) * BLOCK_K, K, FOURS, BLOCK_N, BLOCK_K)
    inside = offs_n[:, None] + (offs_k[None, :] < K).to(tl.int32) > offs_n[:, None]
    tl.store(u_ptr + block_offsets(offs_n, offs_k, K, 1), u_blk, mask=inside)


def philox(seed, step, stream, flat):
    """One uniform, in Python's integers."""
    low = 0xFFFFFFFF
    c = [flat // 4 & low, flat // 4 >> 32, step & low, step >> 32 & low]
    key = [seed & low, (seed >> 32) + stream & low]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ key[0], b & low, a >> 32 ^ c[3] ^ key[1], a & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    return (c[flat % 4] >> 8) * 2.0**-24


@pytest.mark.parametrize("k", [1, 31, 64, 68, 197, 768])
@pytest.mark.parametrize(
    "seed, step, stream", [(0, 0, 0), (1234567890123, 42, 1), (-1, 2**40 + 5, 16), (2**62, 7, 999)]
)
def test_draw_is_the_references_bit_for_bit(seed, step, stream, k):
    rng, u = rk.rng_state(seed, step), torch.empty(8, k)
    for block_k in (32, 128):
        draw[(triton.cdiv(k, block_k),)](rng, u.fill_(-1), stream, 0, k, k % 4 == 0, 8, block_k)
        assert torch.equal(u, reference.philox_uniform(rng, stream, (8, k)))


@pytest.mark.parametrize("k", [768, 771])
def test_draw_counts_in_64_bits(k):
    rng, u, first = rk.rng_state(5, 6), torch.empty(2, k), 2**35 // k
    draw[(triton.cdiv(k, 256),)](rng, u, 2, first, k, k % 4 == 0, 2, 256)
    for n, j in ((0, 0), (0, 3), (0, 5), (1, 0), (1, k - 1)):
        assert u[n, j] == philox(5, 6, 2, (first + n) * k + j)
    assert philox(5, 6, 2, 7) == reference.philox_uniform(rng, 2, (8,))[7]


@triton.jit
def store_offsets(out_ptr, first, stride, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], block_offsets(first + offs, offs, stride, 1))


def test_offsets_do_not_wrap():
    out = torch.empty(16, 16, dtype=torch.int64)
    store_offsets[(1,)](out, 3_000_000, 4096, 16)
    assert torch.equal(out, (3_000_000 + torch.arange(16))[:, None] * 4096 + torch.arange(16))
