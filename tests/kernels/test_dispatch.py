"""The dispatch table: well formed, every row reachable, read as documented, and obeyed; the bench that writes it."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_no_worse, layer

import rmt_kernels as rk
from rmt_kernels import backends, reference
from rmt_kernels.backends import cpu, cuda, dispatch, native

BENCH = Path(__file__).parents[2] / "bench"
CONTENT = json.loads(dispatch.FILE.read_text())
KINDS = sorted(CONTENT["measured"])
OPS = ("masked_linear", "masked_linear_dx")
needs_cpu_kernels = pytest.mark.skipif(native.extension is None, reason=f"no C++ kernels: {native.missing}")


def groups(part):
    """{(device, op, dtype, N, K): rows} in the file's order."""
    found = {}
    for r in CONTENT[part]:
        found.setdefault((r["device"], r["op"], r["dtype"], r.get("N"), r.get("K")), []).append(r)
    return found


@pytest.fixture
def bench(monkeypatch):
    """bench/dispatch.py as a module."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    spec = importlib.util.spec_from_file_location("bench_dispatch", BENCH / "dispatch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row_of(ms, path, up_to, **more):
    return {"device": "cpu x", "op": "masked_linear", "dtype": "float32", "N": 8, "K": 8, "M": 1, "up_to": up_to,
            "path": path, "ms": ms} | more  # fmt: skip


# --- the committed file -----------------------------------------------------------------------------------------------


def test_every_row_says_what_was_measured_where_and_how():
    assert CONTENT["rows"] and {r["device"] for r in CONTENT["rows"]} == set(KINDS)
    for r in CONTENT["rows"]:
        assert {"device", "op", "dtype", "N", "K", "M", "up_to", "path", "ms"} <= set(r)
        assert r["op"] in OPS and r["dtype"] in ("float32", "bfloat16", "float16")
        assert set(r["ms"]) == set(dispatch.PATHS) and r["up_to"] in (r["M"], None)
        assert all(ms is None or 0 < ms < 1e4 for ms in r["ms"].values()) and r["ms"]["made"] and r["ms"]["dense"]
    for kind, where in CONTENT["measured"].items():
        assert kind.startswith(("cpu ", "sm_"))
        assert all(where[key] for key in ("commit", "date", "device_name", "torch", "python", "command")), kind


def test_a_layer_is_covered_without_gaps_and_every_row_can_be_reached():
    for (device, op, dtype, n, k), rows in groups("rows").items():
        limits = [math.inf if r["up_to"] is None else r["up_to"] for r in rows]
        assert limits == sorted(set(limits)) and limits[-1] == math.inf, "rising, no two alike, the last without limit"
        for r, above in zip(rows, [0, *limits]):
            for m in {above + 1, r["up_to"] or 10**9}:
                got = dispatch.row(device, op, getattr(torch, dtype), n, k, int(m))
                assert (got.n, got.k, got.m, got.path, got.ms) == (n, k, r["M"], r["path"], r["ms"])


def test_the_path_follows_from_the_milliseconds(bench):
    for (_, op, dtype, n, k), rows in groups("rows").items():
        again = bench.decide(rows[0]["device"], op, getattr(torch, dtype), n, k, [r["M"] for r in rows],
                             [r["ms"] for r in rows])  # fmt: skip
        assert [(r["path"], r["up_to"]) for r in again] == [(r["path"], r["up_to"]) for r in rows]


def test_every_kind_covers_the_layers_of_the_bench(bench):
    import harness

    for kind in KINDS:
        for dtype in bench.DTYPES.values():
            name = str(dtype).removeprefix("torch.")
            found = {(n, k) for device, op, d, n, k in groups("rows") if (device, op, d) == (kind, OPS[0], name)}
            assert found == {harness.LAYERS[layer] for layer in bench.LAYERS}, f"{kind}, {name}"


def test_the_defaults_are_the_benchs_own_and_serve_every_dtype(bench):
    assert CONTENT["defaults"] == bench.DEFAULTS and CONTENT["about"] == bench.ABOUT
    for family in ("cpu", "cuda"):
        for op in OPS:
            rows = [r for r in CONTENT["defaults"] if (r["device"], r["op"], r["dtype"]) == (family, op, "*")]
            assert rows[-1]["up_to"] is None and all(r["note"] for r in rows)


# --- looking up -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_table(monkeypatch):
    """Three layers of one kind, two of one size."""
    rows = []
    for n, k in ((8, 8), (64, 16), (16, 64)):
        rows += [row_of({"bits": 1.0, "made": 2.0, "dense": 1.5}, "bits", 4, N=n, K=k, M=4),
                 row_of({"bits": 3.0, "made": 2.0, "dense": 1.5}, "made", None, N=n, K=k, M=9)]  # fmt: skip
    content = CONTENT | {"rows": rows, "measured": {"cpu x": {"date": "2026-01-02T03:04:05+00:00"}}}
    table = dispatch.index(content)
    monkeypatch.setattr(dispatch, "table", lambda: table)
    dispatch._rows.cache_clear()
    yield
    dispatch._rows.cache_clear()


@pytest.mark.parametrize(
    ("n", "k", "nearest"),
    [(8, 8, (8, 8)), (1, 1, (8, 8)), (64, 16, (64, 16)), (16, 64, (16, 64)), (200, 9, (64, 16)), (9, 200, (16, 64)),
     (4, 20, (8, 8))],
)  # fmt: skip
def test_the_nearest_layer_by_size_then_by_proportions(small_table, n, k, nearest):
    got = dispatch.row("cpu x", "masked_linear", torch.float32, n, k, 1)
    assert (got.n, got.k) == nearest


@pytest.mark.parametrize(("m", "path"), [(1, "bits"), (4, "bits"), (5, "made"), (9, "made"), (10**6, "made")])
def test_the_smallest_limit_that_holds(small_table, m, path):
    assert dispatch.row("cpu x", "masked_linear", torch.float32, 8, 8, m).path == path
    assert dispatch.row("cpu x", "masked_linear", torch.float32, 8, 8, m, kept=True).path == "dense"


def test_what_a_row_says(small_table):
    few, many = (dispatch.row("cpu x", "masked_linear", torch.float32, 8, 8, m) for m in (3, 5))
    assert few.text() == "M <= 4 from the bits, 0.50x of made at M = 4 (cpu x, 8x8, float32, 2026-01-02)"
    assert many.text() == "M > 4 made, then GEMM, 0.67x of the bits at M = 9 (cpu x, 8x8, float32, 2026-01-02)"
    kept = dispatch.row("cpu x", "masked_linear", torch.float32, 8, 8, 3, kept=True).text()
    assert "the bits took 0.67x of it at M = 4: reported, not taken" in kept and "bit for bit" in kept


@pytest.mark.parametrize("kind", ["cpu avx1024", "cpu", "sm_123", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_device_that_nobody_measured_gets_its_familys_default_and_says_so(kind, dtype, op):
    for m in (1, 64, 65, 10**6):
        for kept in (False, True):
            got = dispatch.row(kind, op, dtype, 768, 768, m, kept)
            assert got.device == ("cpu default" if kind.startswith("cpu") else "cuda default") and not got.ms
            assert f"not measured on this device ({kind}, " in got.text()
            assert (got.path == "dense") == kept


def test_a_dtype_that_nobody_measured_gets_the_default(small_table):
    assert "not measured" in dispatch.row("cpu x", "masked_linear", torch.bfloat16, 8, 8, 1).text()
    assert dispatch.row("cpu x", "masked_linear", torch.float16, 8, 8, 1).path == "made"


# --- obeyed, and explained --------------------------------------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch):
    """The paths that the CPU backend really took, in order."""
    paths = []

    def spy(owner, name, path):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: (paths.append(path), real(*a))[1], raising=True)

    class Extension:
        def __getattr__(self, name):
            if name in ("cpu_masked_linear_single", "cpu_masked_linear"):
                paths.append("bits")
            elif name == "cpu_masked_weight":
                paths.append("made")
            return getattr(native.extension, name)

    monkeypatch.setattr(cpu, "extension", Extension())
    spy(reference, "masked_linear", "gemm")
    spy(reference, "masked_linear_dx", "gemm")
    monkeypatch.setattr(backends, "_forced", None)
    return paths


STEPS = {"bits": ["bits"], "made": ["made", "gemm"], "dense": ["gemm"]}


def said(op, m, n, k, dtype):
    """The explained row and the paths it names, without and with a kept masked weight."""
    (text,) = (r["row"] for r in rk.explain(op, shape=(m, n, k), dtype=dtype) if r["device"] == "cpu")
    named = [{part.find(words): path for path, words in dispatch._WORDS.items()} for part in text.split("; kept: ")]
    return text, [found[min(set(found) - {-1})] for found in named]


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["here", "unknown", *KINDS])
@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 65])
def test_the_row_that_explain_names_is_the_path_taken(taken, monkeypatch, kind, m, dtype):
    if kind != "here":
        monkeypatch.setattr(cpu, "device_kind", lambda: "cpu unknown" if kind == "unknown" else kind)
    n, k = 40, 64
    t = layer((m, n, k), dtype)
    dense = reference.masked_weight(t["weight"], t["bits"])
    text, paths = said("masked_linear", m, n, k, dtype)
    assert paths[1] == "dense"
    for path, kept in zip(paths, (None, dense)):
        taken.clear()
        y = rk.masked_linear(t["x"].view(1, m, k), t["weight"], t["bits"], t["bias"], dense=kept)
        assert taken == STEPS[path], text
        plain = reference.masked_linear(t["x"], t["weight"], t["bits"], t["bias"], dense)
        assert kept is None or torch.equal(y[0], plain), "a kept masked weight: the merged layer's product"
    text, paths = said("masked_linear_dx", m, n, k, dtype)
    for path, kept in zip(paths, (None, dense)):
        taken.clear()
        rk.masked_linear_dx(t["g_task"], t["weight"], t["bits"], dense=kept)
        assert taken == STEPS[path], text
    (path,) = said("grouped_masked_linear", m, n, k, dtype)[1]
    taken.clear()
    rk.grouped_masked_linear(t["x"], t["weight"], [t["bits"]] * 2, [0, 0, m], t["bias"])
    assert taken == STEPS[path]


@needs_cpu_kernels
def test_operands_that_no_kernel_reads_are_made(taken):
    t = layer((1, 40, 64))
    rk.masked_linear(t["x"], t["weight"].T.contiguous().T, t["bits"])
    assert taken == STEPS["made"]
    taken.clear()
    rk.masked_linear(t["x"], t["weight"].bfloat16(), t["bits"])
    assert "bits" not in taken


def test_without_a_kernel_for_the_dtype_the_row_says_made(monkeypatch):
    monkeypatch.setattr(cpu, "device_kind", lambda: "cpu unknown")
    monkeypatch.setattr(cpu, "_reads_bits", lambda dtype: dtype == torch.float32)
    got = cpu.decide("masked_linear", torch.bfloat16, 40, 64, 1)
    assert got.path == "made" and "no kernel for torch.bfloat16 on cpu unknown" in got.text()


def test_explain_on_a_gpu_says_that_nobody_measured_it(monkeypatch):
    monkeypatch.setattr(backends, "_forced", None)
    (row,) = (r["row"] for r in rk.explain("masked_linear", shape=(64, 768, 768)) if r["device"] == "cuda")
    assert "M <= 64 from the bits" in row
    if not any(kind.startswith("sm_") for kind in KINDS):
        assert "not measured on this device" in row
    if cuda.unavailable("cuda"):
        assert row.startswith("were it served by cuda: ")


def test_explain_of_float64_and_of_ops_that_are_no_products():
    for r in rk.explain(dtype=torch.float64):
        assert (r["op"] in backends.PRODUCTS) == ("float64 runs the reference" in r["row"])
    assert rk.explain("pack_bits")[0]["row"] == ""


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [(ValueError, "three positive integers, got", {"shape": (1, 2)}),
     (ValueError, "three positive integers, got", {"shape": (0, 2, 2)}),
     (ValueError, "three positive integers, got", {"shape": (1.0, 2, 2)}),
     (TypeError, "floating torch.dtype, got torch.int8", {"dtype": torch.int8})],
)  # fmt: skip
def test_explain_refuses_what_is_no_product(error, message, kwargs):
    with pytest.raises(error, match=message):
        rk.explain("masked_linear", **kwargs)


def test_the_cuda_backend_obeys_the_table(monkeypatch):
    calls = []
    monkeypatch.setattr(cuda, "device_kind", lambda index=None: "sm_test")
    monkeypatch.setattr(cuda, "_capability", lambda index: (9, 0))
    monkeypatch.setattr(cuda, "build_info", lambda: {"cuda": {"archs": ["code=sm_90a"]}})
    monkeypatch.setattr(cuda, "masked_weight", lambda w, b: (calls.append("made"), reference.masked_weight(w, b))[1])
    kernel = lambda x, w, b, *rest: (calls.append("bits"), reference.masked_linear(x, w, b, None, None))[1]  # noqa: E731
    monkeypatch.setattr(cuda, "_small", lambda x, w, groups, *rest: kernel(x, w, groups[0][0]))
    monkeypatch.setattr(cuda, "masked_gemm", kernel)
    t = layer((100, 24, 40), torch.bfloat16)
    dense = reference.masked_weight(t["weight"], t["bits"])
    default = dispatch.row("sm_test", "masked_linear", torch.bfloat16, 24, 40, 100)
    for path in ("bits", "made"):
        monkeypatch.setattr(dispatch, "row", lambda *key, path=path: default._replace(path=path))
        for m in (7, 100):
            for kept, want in ((None, [path]), (dense, [])):
                calls.clear()
                args = (t["x"][:m], t["weight"], t["bits"], None, kept)
                assert cuda.lacks("masked_linear", args) is None
                got = cuda.masked_linear(*args)
                assert calls == want
                truth = t["x"][:m].double() @ dense.double().T
                assert_no_worse(got, reference.masked_linear(*args[:4], dense), truth)
    wide = (t["x"].float(), t["weight"].float(), t["bits"], None, None)
    assert cuda.lacks("masked_linear", wide) is None, "made needs no kernel"
    monkeypatch.setattr(dispatch, "row", lambda *key: default._replace(path="bits"))
    assert "fp16 or bf16" in cuda.lacks("masked_linear", wide)


# --- the bench --------------------------------------------------------------------------------------------------------


def test_the_bits_serve_up_to_the_first_loss_and_never_again(bench):
    times = [{"bits": b, "made": 2.0, "dense": 1.0} for b in (1.0, 3.0, 1.0)]
    rows = bench.decide("cpu x", "masked_linear", torch.float32, 8, 8, (1, 2, 4), times)
    assert [(r["path"], r["up_to"]) for r in rows] == [("bits", 1), ("made", 2), ("made", None)]
    rows = bench.decide("cpu x", "masked_linear", torch.float32, 8, 8, (4,), [times[0] | {"bits": None}])
    assert rows[0]["path"] == "made" and rows[0]["note"].startswith("no kernel")


@needs_cpu_kernels
def test_the_bench_measures_checks_and_writes_its_own_kind_only(bench, monkeypatch, tmp_path, capsys):
    import harness

    target = tmp_path / "dispatch.json"
    target.write_text(dispatch.FILE.read_text())
    monkeypatch.setattr(dispatch, "FILE", target)
    monkeypatch.setattr(harness, "LAYERS", {"tiny": (40, 64)})
    monkeypatch.setattr(bench, "LAYERS", ("tiny",))
    monkeypatch.setattr(cpu, "device_kind", lambda: "cpu test")
    command = [
        "dispatch.py",
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--write",
        str(target),
        "--json",
        str(tmp_path / "rows.json"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    written = json.loads(target.read_text())
    assert [r for r in written["rows"] if r["device"] != "cpu test"] == CONTENT["rows"]
    mine = [r for r in written["rows"] if r["device"] == "cpu test"]
    assert len(mine) == 2 * (len(bench.ROWS["cpu"]) + len(bench.DX_ROWS["cpu"]))
    assert written["measured"]["cpu test"]["device_name"] and set(written["measured"]) == {*KINDS, "cpu test"}
    assert all(r["ms"]["bits"] for r in mine if r["op"] == "masked_linear" and r["dtype"] == "float32")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(mine)
    assert "takes" in capsys.readouterr().out


def test_the_bench_refuses_to_time_what_is_wrong(bench):
    right = torch.ones(3, 3)
    with pytest.raises(AssertionError, match="bits: relative error"):
        bench.check({"dense": lambda: right, "bits": lambda: 2 * right})
