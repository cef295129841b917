"""`weight_grad_`: the weight gradient with fp32 sums and result, on every instruction set, beside torch's own tiles."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPES, assert_no_worse, shape_id

import rmt_kernels as rk
from rmt_kernels import reference
from rmt_kernels.backends import cpu, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (M, N, K): around the kernel's 32 rows a block, 32 columns a tile, 512 rows a pass, 2048 rows a stretch, 384 a square.
RAGGED = [(31, 16, 17), (32, 32, 32), (33, 47, 65), (1, 40, 100), (70, 1, 500), (511, 33, 31), (513, 64, 15)]
LONG = [(2047, 17, 33), (2049, 33, 16), (4100, 5, 40), (40, 800, 33), (40, 33, 801)]
ISAS = ["baseline", "avx2", "avx512", "amx"]
REAL = [(1600, 768, 768), (1576, 2304, 768)]
needs_kernel = pytest.mark.skipif(
    native.extension is None or not native.extension.cpu_weight_grad_rate(),
    reason="no C++ kernel of bf16 products here",
)


@pytest.fixture(autouse=True)
def even_where_it_does_not_pay(monkeypatch):
    """Runs the kernel wherever it can: where torch's GEMM is faster, that would be tested in its place."""
    if native.extension is not None and native.extension.cpu_weight_grad_rate():
        monkeypatch.setattr(cpu, "multiplies_bf16", lambda: True)


def factors(shape, dtype=torch.bfloat16, seed=0):
    m, n, k = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m, columns, generator=generator).to(dtype) for columns in (n, k)]


def product(g, x, **options):
    out = torch.full((g.shape[-1], x.shape[-1]), float("nan"))
    rk.weight_grad_(out, g, x, **options)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *RAGGED, *LONG, *REAL], ids=shape_id)
def test_it_is_no_worse_than_the_fp32_product(shape, dtype):
    g, x = factors(shape, dtype)
    before = g.clone(), x.clone()
    truth, scale = g.double().T @ x.double(), g.double().abs().T @ x.double().abs()
    plain = g.float().T @ x.float()
    assert_no_worse(product(g, x), plain, truth, scale=scale)
    start = torch.randn(shape[1:], generator=torch.Generator().manual_seed(1))
    out = start.clone()
    rk.weight_grad_(out, g, x, accumulate=True)
    assert_no_worse(out, start + plain, start.double() + truth, scale=scale + start.abs())
    assert torch.equal(g, before[0]) and torch.equal(x, before[1])


def test_of_many_rows_the_sums_stay_as_accurate_as_a_gemms():
    # Of one sign: the sum grows with every row, and so does what a running sum rounds off.
    g, x = (t.abs() for t in factors((6304, 48, 48)))
    truth = g.double().T @ x.double()
    got, plain = (product(g, x).double() - truth).norm(), ((g.float().T @ x.float()).double() - truth).norm()
    assert got <= 2 * plain, f"error {got:.3e}, the fp32 product's {plain:.3e}"


def test_16_bits_are_never_in_between():
    g, x = factors((256, 64, 64))
    truth = g.double().T @ x.double()
    # A gradient rounded to bf16 on its way is some 1e-3 off.
    assert (product(g, x).double() - truth).norm() < 1e-6 * truth.norm()


def test_in_fp32_it_is_autograds_weight_gradient_bit_for_bit():
    x, g, weight = torch.randn(1600, 96), torch.randn(1600, 160), torch.randn(160, 96, requires_grad=True)
    (want,) = torch.autograd.grad(F.linear(x, weight), weight, g)
    assert torch.equal(product(g, x), want)
    with rk.use_backend("reference"):
        assert torch.equal(product(g, x), want)
    weight.grad = torch.randn(160, 96)
    out = weight.grad.clone()
    rk.weight_grad_(out, g, x, accumulate=True)
    assert torch.allclose(out, weight.grad + want, rtol=1e-6, atol=1e-5)


def test_float64_factors_make_a_float64_gradient():
    g, x = factors((20, 7, 9), torch.float64)
    out = torch.empty(7, 9, dtype=torch.float64)
    rk.weight_grad_(out, g, x)
    assert torch.equal(out, g.T @ x)
    rk.weight_grad_(out, g, x.float(), accumulate=True)
    assert torch.allclose(out, g.T @ x + g.T @ x.float().double())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)], ids=str)
def test_mixed_factors_are_widened(dtypes):
    g, x = (t.to(d) for t, d in zip(factors((50, 20, 30), torch.float32), dtypes))
    assert torch.equal(product(g, x), g.float().T @ x.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows_are_a_gradient_of_zero(dtype):
    g, x = factors((0, 5, 7), dtype)
    assert product(g, x).eq(0).all()
    out = torch.arange(35.0).view(5, 7)
    rk.weight_grad_(out, g, x, accumulate=True)
    assert torch.equal(out, torch.arange(35.0).view(5, 7))


def test_any_strides_and_leading_dimensions():
    g, x = factors((24, 40, 50))
    want = product(g, x)
    layouts = {
        "rows apart": lambda t: F.pad(t, (3, 6))[:, 3:-6],
        "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
        "transposed": lambda t: t.T.contiguous().T,
        "stepped": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "3d": lambda t: t.view(2, 12, -1),
        "batch second": lambda t: t.view(2, 12, -1).transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, laid_out in layouts.items():
        assert torch.equal(product(laid_out(g), laid_out(x)), want), name
    one = g[:1].expand(24, -1), x[:1].expand(24, -1)
    assert torch.equal(product(*one), product(*(t.contiguous() for t in one)))
    assert torch.equal(product(g[0], x[0]), product(g[:1], x[:1]))


def test_nothing_is_read_or_written_outside():
    wall = float("nan")
    for m, n, k in ((33, 17, 47), (2, 31, 1)):
        g, x = factors((m, n, k))
        inner = [F.pad(t, (5, 5, 1, 1), value=wall)[1:-1, 5:-5] for t in (g, x)]
        around = torch.full((n + 2, k), wall)
        rk.weight_grad_(around[1:-1], *inner)
        assert torch.equal(around[1:-1], product(g, x))
        assert around[0].isnan().all() and around[-1].isnan().all()


def test_inf_and_nan_reach_their_rows_and_columns_only():
    g, x = factors((40, 20, 24))
    g[7, 3], x[9, 5] = float("inf"), float("nan")
    got, want = product(g, x), reference_product(g, x)
    assert got[:, 5].isnan().all() and got[3].isfinite().logical_not().all()
    assert torch.equal(got.isfinite(), want.isfinite())


def reference_product(g, x):
    with rk.use_backend("reference"):
        return product(g, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mask_gradient_is_its_product(dtype):
    g, x = factors((70, 40, 50), dtype)
    weight = torch.randn(40, 50)
    assert torch.equal(rk.mask_grad(x, g, None, weight), product(g, x) * weight)


# --- bf16 as it is ----------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("shape", [(100, 96, 96), (700, 333, 129), (2500, 64, 64), (40, 1000, 200)], ids=shape_id)
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    g, x = factors(shape)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        out = torch.ones(shape[1:])
        rk.weight_grad_(out, g, x, accumulate=True)
        results.append((product(g, x), out))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])


@needs_kernel
def test_torchs_own_bf16_kernels_find_their_tiles_as_they_left_them():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    g, x = factors((200, 300, 400))
    a, b = factors((128, 96, 160), seed=1)
    q = factors((2 * 4 * 64, 32, 1), seed=2)[0].view(2, 4, 64, 32)
    ours, mm, attention = product(g, x), a.T @ b, F.scaled_dot_product_attention(q, q, q)
    for _ in range(4):
        # Our call between two of torch's, then two of torch's, of other shapes, between ours.
        assert torch.equal(a.T @ b, mm)
        assert torch.equal(product(g, x), ours)
        assert torch.equal(a.T @ b, mm)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), attention)
        assert torch.equal(product(g, x), ours)
    torch.set_num_threads(before)


@needs_kernel
def test_calls_from_several_python_threads_do_not_share_memory():
    cases = [factors((300, 100 + 20 * i, 90), seed=i) for i in range(4)]
    want = [product(*case) for case in cases]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(product(*cases[i]), want[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_kernel
def test_where_the_instruction_does_not_pay_torchs_gemm_serves(monkeypatch):
    monkeypatch.setattr(cpu, "multiplies_bf16", lambda: False)
    g, x = factors((200, 96, 96))
    assert torch.equal(product(g, x), g.float().T @ x.float())


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_narrower_instruction_sets_pass_the_same_tests(isa):
    if native.extension is None or ISAS.index(cpu.ISA) <= ISAS.index(isa):
        pytest.skip(f"not narrower than what runs here: {cpu.ISA}")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not narrower", __file__]
    done = subprocess.run(command, env=os.environ | {"RMT_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_requested_instruction_set_is_used():
    asked = os.environ.get("RMT_CPU_ISA")
    assert asked is None or native.extension is None or asked == cpu.ISA


# --- the public function ----------------------------------------------------------------------------------------------


def test_autograd_is_told_of_the_write():
    for dtype in DTYPES:
        out = torch.empty(5, 7)
        before = out._version
        rk.weight_grad_(out, *factors((4, 5, 7), dtype))
        assert out._version > before
    with torch.inference_mode():
        rk.weight_grad_(torch.empty(5, 7), *factors((4, 5, 7)))


def test_compiled_it_writes_in_place():
    g, x = factors((40, 20, 24))
    got, want = torch.ones(20, 24), torch.ones(20, 24)
    compiled = torch.compile(lambda *args: rk.weight_grad_(*args, accumulate=True), fullgraph=True, backend="aot_eager")
    compiled(got, g, x)
    rk.weight_grad_(want, g, x, accumulate=True)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": torch.empty(5)}, ValueError, r"out must be a non-empty matrix, got shape \(5,\)"),
        ({"out": [1.0]}, TypeError, "out must be a tensor, got list"),
        ({"out": torch.empty(5, 7).bfloat16()}, TypeError, "out must be torch.float32, got torch.bfloat16"),
        ({"g": torch.ones(4, 5).double()}, TypeError, "out must be torch.float64, got torch.float32"),
        ({"out": torch.empty(7, 5).T}, ValueError, r"out must be contiguous, got strides \(1, 5\)"),
        ({"g": torch.ones(3, 5)}, ValueError, r"g must have shape \(4, 5\), got \(3, 5\)"),
        ({"g": torch.ones(4, 6)}, ValueError, r"g must have shape \(4, 5\), got \(4, 6\)"),
        ({"g": torch.ones(4, 5).int()}, TypeError, "g must be floating point, got torch.int32"),
        ({"g": torch.ones(4, 5, device="meta")}, ValueError, "g must be on cpu, got meta"),
        ({"x": torch.ones(4, 8)}, ValueError, r"x must be \(\.\.\., 7\) on cpu, got .*\(4, 8\)"),
        ({"x": None}, TypeError, "x must be a floating point tensor, got None"),
        ({"x": torch.ones(4, 7, requires_grad=True)}, ValueError, "no backward: call it under torch.no_grad"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected_and_what_came(changes, error, message):
    arguments = {"out": torch.empty(5, 7), "g": torch.ones(4, 5), "x": torch.ones(4, 7)} | changes
    with pytest.raises(error, match=message):
        rk.weight_grad_(**arguments)


def test_a_gradient_may_be_required_where_none_is_recorded():
    g, x = factors((4, 5, 7), torch.float32)
    with torch.no_grad():
        assert torch.equal(product(g, x.clone().requires_grad_()), reference_product(g, x))


def test_the_reference_takes_out_in_any_layout():
    g, x = factors((4, 5, 7), torch.float32)
    out = torch.ones(7, 5).T
    reference.weight_grad_(out, g, x, True)
    assert torch.allclose(out, 1 + g.T @ x)
