"""Every Triton kernel and every tile of its table, compiled for sm_80, sm_90 and sm_100 on a machine without a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")
if not hasattr(triton, "knobs"):
    pytest.skip("reading ptxas's report needs Triton 3.4", allow_module_level=True)
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
import triton_compile as compiler  # noqa: E402

from rmt_kernels.backends import triton as backend  # noqa: E402
from rmt_kernels.backends.triton import launch  # noqa: E402

# Bytes a block may have: the device's limit on sm_90 and sm_100; on sm_80 that of its smaller sisters sm_86, sm_89.
SHARED = {80: 101376, 90: 232448, 100: 232448}
# Most registers a thread, measured on Triton 3.6 and 3.9, plus a few. 255 is all there are.
REGISTERS = {
    ("masked_linear", 80): 250, ("masked_linear", 90): 168, ("masked_linear", 100): 160,
    ("masked_linear_dx", 80): 250, ("masked_linear_dx", 90): 160, ("masked_linear_dx", 100): 136,
    ("grouped_masked_linear", 80): 255, ("grouped_masked_linear", 90): 168, ("grouped_masked_linear", 100): 152,
    ("mask_grad", 80): 255, ("mask_grad", 90): 240, ("mask_grad", 100): 176,
    ("gradient_dropout", 80): 128, ("gradient_dropout", 90): 128, ("gradient_dropout", 100): 128,
    ("mask_update_", 80): 136, ("mask_update_", 90): 136, ("mask_update_", 100): 136,
    ("pack_scores", 80): 64, ("pack_scores", 90): 64, ("pack_scores", 100): 64,
    ("masked_weight", 80): 64, ("masked_weight", 90): 64, ("masked_weight", 100): 64,
    ("masked_weight_", 80): 48, ("masked_weight_", 90): 48, ("masked_weight_", 100): 48,
}  # fmt: skip
# Bytes a thread; aligned rows spill none. Unaligned rows have a 64-bit address for each element: a few bytes of spilled
# addresses are cheaper than a third tile.
RAGGED_SPILLS = 16
ALIGNED, RAGGED = (768, 768), (771, 771)
# Triton turns every size and stride of 1 into a constant, which other code paths then meet.
ONE = (1, 1)
FP32, INT32, INT64 = torch.float32, torch.int32, torch.int64


def empty(*shape, dtype=FP32):
    return torch.empty(shape, dtype=dtype, device="meta")


def masked_linear(m, n, k, dtype, weight_dtype=None):
    weight = empty(n, k, dtype=weight_dtype or dtype)
    backend.masked_linear(empty(m, k, dtype=dtype), weight, empty(n, -(-k // 32), dtype=INT32), empty(n), None)


def masked_linear_dx(m, n, k, dtype):
    weight, bits = empty(n, k, dtype=dtype), empty(n, -(-k // 32), dtype=INT32)
    backend.masked_linear_dx(empty(m, n, dtype=dtype), weight, bits, None)


def grouped_masked_linear(m, n, k, dtype):
    groups, words = 1 if m == 1 else 8, empty(n, -(-k // 32), dtype=INT32)
    offsets = [m * i for i in range(groups + 1)]
    x, weight = empty(groups * m, k, dtype=dtype), empty(n, k, dtype=dtype)
    backend.grouped_masked_linear(x, weight, [words] * groups, empty(n), offsets, False)


def masked_weight_(m, n, k, dtype):
    out, bits = empty(n, k, dtype=dtype), empty(n, -(-k // 32), dtype=INT32)
    backend.masked_weight_(out, out, bits, bits)


def mask_grad(m, n, k, dtype, cotangents=2):
    x, g, weight = empty(m, k, dtype=dtype), empty(m, n, dtype=dtype), empty(n, k, dtype=dtype)
    general = g if cotangents == 2 else None
    backend.mask_grad(x, g, general, weight, empty(n, k), empty(), empty(2, dtype=INT64), 0.5, 1)


def gradient_dropout(m, n, k, dtype):
    grad, rng = empty(n, k), empty(2, dtype=INT64)
    backend.gradient_dropout(grad, grad, empty(n, k, dtype=dtype), empty(n, k), empty(), rng, 0.5, 1)


def mask_update_(m, n, k, dtype, dense=True):
    s, w = empty(n, k), [empty(n, k, dtype=dtype)] if dense else []
    bits = empty(n, -(-k // 32), dtype=INT32)
    backend.mask_update_([s], [bits], [s], [s], w, [s], w, empty(2), 0.9, 0.999, 1e-8, 5e-3)


def pack_scores(m, n, k, dtype):
    backend.pack_scores(empty(n, k, dtype=dtype), 5e-3)


def masked_weight(m, n, k, dtype):
    backend.masked_weight(empty(n, k, dtype=dtype), empty(n, -(-k // 32), dtype=INT32))


def cases():
    """(capability, precision, function, m, (n, k), extra arguments)."""
    for capability in SHARED:
        for precision in ("half", "tf32", "ieee"):
            for make in (masked_linear, masked_linear_dx, grouped_masked_linear):
                limits = launch.DOTS[make.__name__.removeprefix("grouped_"), precision][80]
                rows = [6304 if limit == launch.ANY else limit for limit in limits if limit != launch.RAGGED]
                for m in rows if precision == "half" or make is not grouped_masked_linear else rows[-1:]:
                    yield capability, precision, make, m, ALIGNED, {}
                yield capability, precision, make, 6304, RAGGED, {}
            yield capability, precision, mask_grad, 6304, ALIGNED, {}
            yield capability, precision, mask_grad, 6304, ALIGNED, {"cotangents": 1}
            if launch.RAGGED in launch.DOTS["mask_grad", precision][80]:
                yield capability, precision, mask_grad, 6304, RAGGED, {}
        for make in (gradient_dropout, mask_update_, pack_scores, masked_weight, masked_weight_):
            yield capability, "half", make, 0, ALIGNED, {}
        yield capability, "half", gradient_dropout, 0, RAGGED, {}
        if capability == 90:
            for make in (masked_linear, masked_linear_dx, grouped_masked_linear, mask_grad):
                yield capability, "half", make, 1, ONE, {}
            for make in (gradient_dropout, mask_update_, pack_scores, masked_weight, masked_weight_):
                yield capability, "half", make, 0, ONE, {}
        yield capability, "half", mask_update_, 0, RAGGED, {"dense": False}
        yield capability, "half", masked_linear, 6304, ALIGNED, {"weight_dtype": FP32}


def case_id(case):
    capability, precision, make, m, (n, k), extra = case
    return "-".join([f"sm_{capability}", precision, make.__name__, f"M{m}-N{n}-K{k}", *map(str, extra.values())])


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing of another run is read, and nothing is left behind."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_compiled_kernel_keeps_within_its_ceilings(case):
    capability, precision, make, m, shape, extra = case
    dtype = torch.bfloat16 if precision == "half" else FP32
    kernel = compiler.compile_launch(capability, precision, lambda: make(m, *shape, dtype, **extra))
    limit = REGISTERS[make.__name__, capability] if shape == ALIGNED else 255
    spills = 0 if shape == ALIGNED else RAGGED_SPILLS
    assert kernel.registers <= limit, f"{kernel.registers} registers a thread, the ceiling is {limit}"
    assert kernel.spills <= spills, f"{kernel.spills} bytes spilled"
    assert kernel.shared <= SHARED[capability], f"{kernel.shared} bytes of shared memory"
    assert not kernel.warnings, "ptxas serialized the wgmmas: they wait for each other"
    if capability == 90:
        tensor_cores = precision != "ieee" and (make is mask_grad or ("linear" in make.__name__ and m > 32))
        assert ("wgmma.mma_async" in kernel.ptx) == tensor_cores, "wgmma on sm_90 exactly where it was intended"
        listing = compiler.disassemble(kernel.cubin) if tensor_cores else []
        assert not any(compiler.fragment(line) for line in listing), "both operands belong in shared memory"
        assert not compiler.overwritten_fragments(listing)


@triton.jit
def masked_left_operand(w_ptr, m_ptr, x_ptr, y_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, K, 64):
        offs_k = k0 + tl.arange(0, 64)
        words = tl.load(m_ptr + offs * (K // 64) + k0 // 64)
        w_blk = tl.load(w_ptr + offs[:, None] * K + offs_k[None, :])
        keep = -((words[:, None] >> tl.arange(0, 64)[None, :]) & 1).to(tl.int16)
        w_blk = (w_blk.to(tl.int16, bitcast=True) & keep).to(tl.bfloat16, bitcast=True)
        acc = tl.dot(w_blk, tl.load(x_ptr + offs[:, None] * K + offs_k[None, :]).T, acc)
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


def test_the_lint_finds_an_overwritten_fragment():
    """In a made-up listing; and what Triton makes of a masked left operand is what our kernels must not be."""
    listing = [
        "  .L_x_1:",
        "  /*0010*/  LDSM.16.M88.4 R4, [R2] ;",
        "  /*0020*/  HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;",
        "  /*0030*/  WARPGROUP.DEPBAR.LE gsb0, 0x1 ;",
        "  /*0040*/  @P0 BRA `(.L_x_1) ;",
    ]
    assert compiler.overwritten_fragments(listing) == ["LDSM.16.M88.4 R4, [R2]"]
    waited = [line.replace("0x1", "0x0") for line in listing]
    assert compiler.overwritten_fragments(waited) == []
    w, words, y = empty(128, 768, dtype=torch.bfloat16), empty(128, 12, dtype=INT64), empty(128, 128)
    args, options = (w, words, w, y, 768), {"BLOCK": 128}
    source = compiler.source(masked_left_operand, args, options)
    target = compiler.GPUTarget("cuda", 90, 32)
    built = triton.compile(source, target=target, options=launch.OPTIONS | {"num_warps": 8})
    assert any(compiler.fragment(line) for line in compiler.disassemble(built.asm["cubin"]))


def test_a_word_of_the_mask_is_loaded_once():
    """Not as a dense [BLOCK_N, BLOCK_K] int32 tile, which would take more shared memory than the weight itself."""
    kernel = compiler.compile_launch(90, "half", lambda: masked_linear(6304, *ALIGNED, torch.bfloat16))
    x_and_weight = 3 * 128 * 64 * 2 + 3 * 128 * 64 * 2
    assert kernel.shared <= x_and_weight + 3 * 128 * 2 * 4


def test_every_tile_of_the_table_is_compiled():
    """The cases above visit every condition of every entry, so a new tile cannot be added untested."""
    seen = {
        (precision, make.__name__.removeprefix("grouped_"), m, shape) for _, precision, make, m, shape, _ in cases()
    }
    for (op, precision), architectures in launch.DOTS.items():
        for conditions in architectures.values():
            for limit in conditions:
                want = (6304, RAGGED) if limit == launch.RAGGED else (6304 if limit == launch.ANY else limit, ALIGNED)
                assert (precision, op, *want) in seen, f"{op} {precision} {limit} is not compiled by any case"
