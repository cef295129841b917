"""What can be proved of the CUDA C++ kernels without a GPU.

Every .cu compiles for sm_80 and sm_90a within its ceilings; the wgmma kernel takes operand A from registers and no
register is touched while a wgmma may use it; and the arithmetic and bit layouts of csrc/cuda/method.cuh, compiled for
the host, agree with the reference.
"""

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import THRESHOLD, layer
from kernels import sass_lint

from rmt_kernels import reference

CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
SOURCES = sorted(p.stem for p in CSRC.glob("*.cu"))
ARCHS = ("80", "90a")
# Kernel: (registers, static shared memory in bytes). No kernel spills. 64 registers keep 4 blocks of 256 threads on an
# SM, 32 eight; the products trade occupancy for accumulators, of few rows down to 2 blocks of 256 threads; setmaxnreg
# moves the wgmma kernel's 168 to 40 and 232.
CEILINGS = {
    "pack_kernel": (40, 0),
    "unpack_kernel": (40, 0),
    "masked_weight_kernel": (40, 0),
    "masked_weight_vector_kernel": (40, 0),
    "masked_weights_kernel": (32, 0),
    "gradient_dropout_kernel": (40, 0),
    "mask_update_kernel": (64, 160),
    "mask_update_sums_kernel": (40, 192),
    "fragment_bits_kernel": (40, 0),
    "masked_linear_mma_kernel": (128, 32 * 1024),
    "masked_linear_fma_kernel": (128, 0),
    "masked_gemm_kernel": (168, 0),
}


def need(tool: str, *elsewhere: Path) -> str:
    found = next((str(p) for p in elsewhere if p.is_file()), None) or shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not on the PATH")
    return found


@pytest.fixture(scope="session")
def cubins(tmp_path_factory):
    """{(source, arch): (cubin, compiler output)}, compiled once."""
    nvcc, folder = need("nvcc", Path("/usr/local/cuda/bin/nvcc")), tmp_path_factory.mktemp("cubins")

    def build(job):
        source, arch = job
        cubin = folder / f"{source}.{arch}.cubin"
        command = [
            nvcc, "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++17", "-O3", "-Xptxas", "-v",
            "-o", str(cubin), str(CSRC / f"{source}.cu"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return job, (cubin, done.stderr)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(build, [(s, a) for s in SOURCES for a in ARCHS]))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_resources(cubins, source, arch):
    output = cubins[source, arch][1]
    assert "warning" not in output, output  # among them C7508 (setmaxnreg ignored) and C75xx (wgmma serialised)
    kernels = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)",
        output,
        re.DOTALL,
    )
    assert kernels
    for mangled, stack, spill, registers, rest in kernels:
        name = re.search(r"\d([a-z_]+_kernel)", mangled)[1]
        shared = re.search(r"(\d+) bytes smem", rest)
        most_registers, most_shared = CEILINGS[name]
        assert (int(stack), int(spill)) == (0, 0), f"{mangled}: stack frame of {stack} bytes, {spill} bytes spilled"
        assert int(registers) <= most_registers, f"{mangled}: {registers} registers"
        assert shared is None or int(shared[1]) <= most_shared, f"{mangled}: {shared[0]}"


@pytest.fixture(scope="session")
def gemm_sass(cubins):
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [need("nvdisasm", bundled), "-c", str(cubins["masked_gemm_sm90", "90a"][0])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = {name: lines for name, lines in sass_lint.functions(text).items() if "masked_gemm_kernel" in name}
    assert len(kernels) == 8  # fp16 and bf16, two tiles, masked and not
    return kernels


def test_wgmma_takes_a_from_registers_without_hazards(gemm_sass):
    for name, lines in gemm_sass.items():
        instructions, labels = sass_lint.parse(lines)
        hgmma = [i for i in instructions if "HGMMA" in i]
        assert sass_lint.register_operand_count(instructions) == len(hgmma) == 4, name
        assert sass_lint.hazards(instructions, labels) == [], name
        loop = "\n".join(instructions)
        assert loop.count("UTMALDG.2D") == 2 and "USETMAXREG" in loop, name
        # The masks are PRMT and LOP3; without the flag neither is spent on them.
        assert ("0x9988" in loop) == ("Lb1E" in name), name


def test_mask_is_made_while_wgmma_runs(gemm_sass):
    """Between an HGMMA and the wait after it stand the ANDs of the next one's registers."""
    for name, lines in gemm_sass.items():
        if "Lb1E" not in name:
            continue
        instructions, _ = sass_lint.parse(lines)
        shadows = re.findall(r"HGMMA[^|]*?DEPBAR", "|".join(instructions).replace("|", "\n"))
        assert sum("LOP3" in shadow for shadow in shadows) >= 3, name


def test_lint_finds_a_wait_that_is_too_weak(gemm_sass):
    """The same code with one more group pending rewrites an operand in flight, and the lint says so."""
    for lines in gemm_sass.values():
        instructions, labels = sass_lint.parse([line.replace("gsb0, 0x2", "gsb0, 0x3") for line in lines])
        assert any("writes a register" in h for h in sass_lint.hazards(instructions, labels))


@pytest.mark.parametrize(
    "line, hazard",
    [
        ("LDSM.16.M88.4 R152, [R15+UR7]", "writes a register"),
        ("LOP3.LUT R155, R9, R13, RZ, 0xc0, !PT", "writes a register"),
        ("IMAD.WIDE R154, R13, 0x4, R10", "writes a register"),
        ("FADD R8, R24, R6", "reads an accumulator"),
        ("STG.E.128 desc[UR12][R4.64], R20", "reads an accumulator"),
        ("LOP3.LUT R156, R155, R13, RZ, 0xc0, !PT", None),
        ("ISETP.GE.AND P0, PT, R3, 0x2, PT", None),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", None),
    ],
)
def test_lint_on_a_small_sample(line, hazard):
    sample = [
        "HGMMA.64x256x16.F32.BF16 R23, R152, gdesc[UR8], R23, gsb0",
        line,
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "EXIT",
    ]
    instructions, labels = sass_lint.parse([f"        /*{i:04x}*/   {text} ;" for i, text in enumerate(sample)])
    found = sass_lint.hazards(instructions, labels)
    assert (found == []) if hazard is None else (len(found) == 1 and hazard in found[0])
    late = [instructions[0], instructions[2], instructions[1], instructions[3]]
    assert sass_lint.hazards(late, labels) == [], "after the wait every register is free"


# --- csrc/cuda/method.cuh, compiled for the host ----------------------------------------------------------------------

HOST = """
#include "method.cuh"
using namespace rmt::cuda;
extern "C" {
void uniform(int64_t seed, int64_t step, int64_t stream, int64_t first_group, int64_t groups, float* out) {
  for (int64_t i = 0; i < groups; ++i)
    philox_uniform(seed, step, stream, first_group + i, reinterpret_cast<float(&)[4]>(out[4 * i]));
}
void dropout(const float* ga, const float* gb, const float* w, const float* s, float penalty, const float* u,
             float rest, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = drop(product(ga[i], w[i]) + product(penalty, s[i]), product(gb[i], w[i]), u[i], rest);
}
void adam(float beta1_rest, float beta2, float beta2_rest, float eps, float f0, float f1, const float* g, float* s,
          float* m, float* v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) adam_step({beta1_rest, beta2, beta2_rest, eps}, f0, f1, g[i], s[i], m[i], v[i]);
}
uint32_t word_of(uint32_t g0, uint32_t g1, uint32_t h0, uint32_t h1, int t) {
  const uint32_t rows[2][2] = {{g0, g1}, {h0, h1}};
  return fragment_word(rows, t);
}
void masks_of(uint32_t word, int step, uint32_t* out) {
  fragment_masks(word, step, reinterpret_cast<uint32_t(&)[4]>(*out));
}
uint32_t halves(uint32_t bits) { return half_masks(bits); }
uint32_t full(uint32_t bits) { return full_mask(bits); }
uint32_t spread(uint32_t bits, uint32_t selector) { return spread_signs(sign_bytes(bits), selector); }
}
"""


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "host.cpp").write_text(HOST)
    command = [need("c++"), "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{CSRC}", "host.cpp", "-o", "host.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "host.so"))
    f32, i64, address = ctypes.c_float, ctypes.c_int64, ctypes.c_void_p
    library.uniform.argtypes = [i64, i64, i64, i64, i64, address]
    library.dropout.argtypes = [address, address, address, address, f32, address, f32, i64, address]
    library.adam.argtypes = [f32, f32, f32, f32, f32, f32, address, address, address, address, i64]
    for name in ("word_of", "halves", "full", "spread"):
        getattr(library, name).restype = ctypes.c_uint32
    library.word_of.argtypes = [ctypes.c_uint32] * 4 + [ctypes.c_int]
    library.masks_of.argtypes = [ctypes.c_uint32, ctypes.c_int, address]
    return library


@pytest.mark.parametrize(
    "seed, step, stream", [(0, 0, 0), (1234567890123, 42, 7), (-5, 2**40 + 3, 2**31 - 1), (2**63 - 1, -1, 1)]
)
def test_philox(host, seed, step, stream):
    out = torch.empty(1000)
    host.uniform(seed, step, stream, 0, 250, out.data_ptr())
    assert torch.equal(out, reference.philox_uniform(torch.tensor([seed, step]), stream, (1000,)))


def test_philox_counts_past_32_bits(host):
    """Group 2^32 + g must not repeat group g: the counter is 64 bits wide."""
    near, far = torch.empty(40), torch.empty(40)
    host.uniform(1, 2, 3, 5, 10, near.data_ptr())
    host.uniform(1, 2, 3, 2**32 + 5, 10, far.data_ptr())
    assert not torch.equal(near, far)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_dropout_is_the_reference_bit_for_bit(host, strength):
    t = layer((50, 48, 771))
    ga, gb = t["g_task"].T @ t["x"], t["g_general"].T @ t["x"]
    ga[0, :5] = 0
    out, uniform = torch.empty_like(ga), reference.philox_uniform(t["rng"], 3, ga.shape)
    args = [v.data_ptr() for v in (ga, gb, t["weight"], t["scores"])]
    host.dropout(*args, float(t["penalty"]), uniform.data_ptr(), 1 - strength, ga.numel(), out.data_ptr())
    want = reference.gradient_dropout(ga, gb, t["weight"], t["scores"], t["penalty"], t["rng"], strength, 3)
    assert torch.equal(out, want)
    assert 0.02 < (want != ga * t["weight"] + t["penalty"] * t["scores"]).float().mean() < 0.98 or strength == 0


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
def test_adam(host, beta1):
    s, g = layer((1, 33, 197))["scores"], layer((1, 33, 197), seed=1)["weight"]
    m, v = torch.zeros_like(s), torch.zeros_like(s)
    mine = [x.clone() for x in (s, m, v)]
    truth, bits = [x.double() for x in (s, m, v)], reference.pack_scores(s, THRESHOLD)
    for step in range(1, 4):
        factors = reference.adam_factors(torch.tensor(step), 1e-3, beta1, 0.999)
        f = factors.tolist()
        addresses = [x.data_ptr() for x in (g, *mine)]
        host.adam(1 - beta1, 0.999, 1 - 0.999, 1e-8, *f, *addresses, s.numel())
        for state, grad in (([s, m, v], g), (truth, g.double())):
            reference.mask_update_(
                *([x] for x in (state[0], bits, state[1], state[2])), [], [grad], [], factors, beta1, 0.999, 1e-8,
                THRESHOLD,
            )  # fmt: skip
    for got, plain, exact in zip(mine, (s, m, v), truth):
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-7 * exact.abs().max()


def test_register_masks(host):
    for bits in range(16):
        assert host.halves(bits) == 0xFFFF * (bits & 1) | 0xFFFF0000 * (bits >> 1 & 1)
        assert host.full(bits) == 0xFFFFFFFF * (bits & 1)
        for above in (0, 0xF0, 0xFFFFFFF0):  # what else is in the word plays no part
            assert host.spread(bits | above, 0x9988) == host.halves(bits)
            assert host.spread(bits | above, 0xBBAA) == host.halves(bits >> 2)


def test_fragment_words_mask_what_the_bits_say(host):
    """Of 16 rows x 64 columns: each lane's word, spread over the registers of wgmma's operand A, is the canonical mask.

    Operand A, 16 columns at a time: lane 4 g + t holds in register v + 2 h the columns 8 h + 2 t and 8 h + 2 t + 1 of
    row g + 8 v, the lower column in the lower half (PTX ISA, wgmma and mma.m16n8k16).
    """
    mask = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    words = [[int(w) & 0xFFFFFFFF for w in row] for row in reference.pack_bits(mask)]
    spread = torch.zeros(16, 64, dtype=torch.bool)
    out = (ctypes.c_uint32 * 4)()
    for lane in range(32):
        g, t = divmod(lane, 4)
        word = host.word_of(*words[g], *words[g + 8], t)
        assert word == model_fragment_word(mask, g, t)
        for step in range(4):
            host.masks_of(word, step, ctypes.addressof(out))
            for register, value in enumerate(out):
                assert value in (0, 0xFFFF, 0xFFFF0000, 0xFFFFFFFF)
                h, v = divmod(register, 2)
                for e in range(2):
                    spread[g + 8 * v, 16 * step + 8 * h + 2 * t + e] = bool(value >> (16 * e) & 1)
    assert torch.equal(spread, mask)


def model_fragment_word(mask, g: int, t: int) -> int:
    """The layout as method.cuh states it."""
    word = 0
    for v in range(2):
        for s in range(4):
            for h in range(2):
                for e in range(2):
                    on = int(mask[g + 8 * v, 16 * s + 8 * h + 2 * t + e])
                    word |= on << (8 * (2 * v + e) + 7 - (2 * s + h))
    return word
