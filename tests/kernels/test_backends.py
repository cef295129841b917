"""Which backend serves a call, what it says about it, and that no unproved GPU kernel is ever a default."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import THRESHOLD, layer

import rmt_kernels as rk
from rmt_kernels import backends, reference
from rmt_kernels.backends import native

ROOT = Path(__file__).parents[2]
needs_cpu_kernels = pytest.mark.skipif(native.extension is None, reason=f"no C++ kernels: {native.missing}")


@pytest.fixture(autouse=True)
def no_backend_forced(monkeypatch):
    """As a user finds it, even where the whole suite runs under RMT_BACKEND."""
    monkeypatch.setattr(backends, "_forced", None)
    monkeypatch.setattr(backends, "_last", {})


def fake_backend(reason=None, lacks=None, **functions):
    """A backend module that offers `functions`."""
    return types.SimpleNamespace(unavailable=lambda device: reason, lacks=lambda name, args: lacks, **functions)


def row(op, device):
    (found,) = (r for r in rk.explain(op) if r["device"] == device)
    return found


def python(code, **environment):
    """Runs code in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "RMT_BACKEND"} | environment | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_has_a_row_for_every_op_and_device():
    rows = rk.explain()
    assert {(r["op"], r["device"]) for r in rows} == {(op, d) for op in backends.OPS for d in ("cpu", "cuda")}
    assert len(rows) == 2 * len(backends.OPS)
    for r in rows:
        assert set(r) == {"op", "device", "backend", "why", "last", "row"}
        assert r["backend"] in backends.NAMES and r["why"]


def test_every_public_op_is_a_row():
    public = {name for name in rk.__all__ if hasattr(torch.ops.rmt_kernels, name)}
    assert public == set(backends.OPS)


def test_a_row_gives_the_reason_for_every_backend_passed_over(monkeypatch):
    monkeypatch.setitem(backends._modules, "cpu", fake_backend(reason="the compiler was eaten"))
    got = row("pack_bits", "cpu")
    assert got["backend"] == "reference"
    assert got["why"] == "cpu: the compiler was eaten; triton: " + got["why"].partition("triton: ")[2]
    assert got["why"].count(": ") >= 2, "triton's own reason must follow"


def test_last_is_empty_before_and_the_backend_that_ran_after():
    assert row("pack_bits", "cpu")["last"] == ""
    with rk.use_backend("reference"):
        rk.pack_bits(torch.ones(2, 2, dtype=torch.bool))
    assert row("pack_bits", "cpu")["last"] == "reference"
    assert row("pack_bits", "cuda")["last"] == ""
    assert row("unpack_bits", "cpu")["last"] == ""


@needs_cpu_kernels
def test_the_cpu_kernels_are_the_first_choice_on_the_cpu():
    for op in backends.OPS:
        assert row(op, "cpu")["backend"] == "cpu" and row(op, "cpu")["why"].startswith("first choice"), op


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_a_backend_without_the_function_falls_to_the_next(monkeypatch):
    ran = []

    def pack_bits(mask):
        ran.append("cpu")
        return reference.pack_bits(mask)

    monkeypatch.setitem(backends._modules, "cpu", fake_backend(pack_bits=pack_bits))
    mask = torch.rand(3, 40) > 0.5
    bits = rk.pack_bits(mask)
    assert ran == ["cpu"] and row("pack_bits", "cpu")["backend"] == "cpu"
    assert torch.equal(rk.unpack_bits(bits, 40), mask)
    assert ran == ["cpu"], "unpack_bits is not offered"
    got = row("unpack_bits", "cpu")
    assert got["backend"] == got["last"] == "reference" and got["why"].startswith("cpu: not implemented")


def test_a_backend_that_lacks_one_call_falls_to_the_next_for_that_call(monkeypatch):
    def never(*args):
        raise AssertionError("must not run")

    monkeypatch.setitem(backends._modules, "cpu", fake_backend(lacks="no such layout", masked_linear=never))
    t = layer((2, 3, 5))
    y = rk.masked_linear(t["x"], t["weight"], t["bits"])
    assert torch.equal(y, reference.masked_linear(t["x"], t["weight"], t["bits"], None, None))
    assert row("masked_linear", "cpu")["last"] == "reference"


@needs_cpu_kernels
def test_float64_runs_the_reference_by_default_and_is_refused_on_request():
    t = layer((2, 3, 5), torch.float64)
    rk.masked_linear(t["x"], t["weight"], t["bits"])
    assert row("masked_linear", "cpu")["last"] == "reference"
    with rk.use_backend("cpu"), pytest.raises(rk.BackendUnavailable, match=r"'cpu'.*masked_linear on cpu.*float64"):
        rk.masked_linear(t["x"], t["weight"], t["bits"])


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_unconfirmed_gpu_kernel_is_never_the_default(name, monkeypatch):
    def never(*args):
        raise AssertionError("must not run")

    unproved = fake_backend(**dict.fromkeys(backends.OPS, never))
    other = {"cuda": "triton", "triton": "cuda"}[name]
    monkeypatch.setitem(backends._modules, name, unproved)
    monkeypatch.setitem(backends._modules, other, fake_backend(reason="not here"))
    monkeypatch.setattr(backends, "CONFIRMED", frozenset())
    for op in backends.OPS:
        assert backends.choose(op, "cuda", ()) == "reference"
        assert f"{name}: no GPU run has confirmed it yet" in row(op, "cuda")["why"]
    monkeypatch.setattr(backends, "CONFIRMED", frozenset({f"{name}.pack_bits"}))
    assert backends.choose("pack_bits", "cuda", ()) == name == row("pack_bits", "cuda")["backend"]
    assert backends.choose("unpack_bits", "cuda", ()) == "reference", "confirmed one by one"
    with rk.use_backend(name):
        assert backends.choose("unpack_bits", "cuda", ()) == name, "an explicit request may run it"


def test_what_is_confirmed_exists():
    for entry in backends.CONFIRMED:
        name, _, op = entry.partition(".")
        assert name in ("cuda", "triton") and op in backends.OPS, entry
        assert hasattr(backends.load(name), op), f"{entry} is confirmed but not implemented"


def test_tritons_interpreter_is_never_the_default(monkeypatch):
    monkeypatch.setitem(backends._modules, "cpu", fake_backend(reason="not built"))
    monkeypatch.setitem(backends._modules, "triton", fake_backend(pack_bits=None))
    assert backends.choose("pack_bits", "cpu", ()) == "reference"
    assert "interpreter" in row("pack_bits", "cpu")["why"]


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_a_backend_offers_the_references_own_names_and_arguments(name):
    import inspect

    module = backends.load(name)
    if name != "cpu" and module.unavailable("cuda") and not hasattr(module, "masked_linear"):
        pytest.skip(f"{name}: {module.unavailable('cuda')}")
    for op in backends.OPS:
        if hasattr(module, op):
            want = list(inspect.signature(getattr(reference, op)).parameters)
            assert list(inspect.signature(getattr(module, op)).parameters) == want, f"{name}.{op}"


# --- forcing ----------------------------------------------------------------------------------------------------------


def test_use_backend_forces_and_restores():
    mask = torch.ones(2, 2, dtype=torch.bool)
    with rk.use_backend("reference"):
        assert row("pack_bits", "cpu")["backend"] == "reference"
        assert row("pack_bits", "cpu")["why"] == "requested"
        with rk.use_backend(None):
            assert backends._forced is None
        rk.pack_bits(mask)
    assert backends._forced is None
    with pytest.raises(KeyError), rk.use_backend("reference"):
        raise KeyError
    assert backends._forced is None, "restored after an exception too"


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="one of cpu, cuda, triton, reference, got 'cuda2'"), rk.use_backend("cuda2"):
        pass
    assert backends._forced is None


def test_a_request_that_cannot_be_met_raises_with_the_reason_and_says_so(monkeypatch):
    monkeypatch.setitem(backends._modules, "triton", fake_backend(reason="no GPU on this machine"))
    with rk.use_backend("triton"):
        with pytest.raises(rk.BackendUnavailable, match=r"'triton' was requested, but for pack_scores on cpu: no GPU"):
            rk.pack_scores(torch.ones(2, 2), THRESHOLD)
        assert row("pack_scores", "cpu")["backend"] == "none"
        assert row("pack_scores", "cpu")["why"] == "triton: no GPU on this machine"


def test_cuda_kernels_are_refused_for_tensors_on_the_cpu():
    t = layer((2, 3, 5))
    for call in (
        lambda: rk.masked_linear(t["x"], t["weight"], t["bits"]),
        lambda: rk.pack_scores(t["scores"], THRESHOLD),
        lambda: rk.mask_grad(t["x"], t["g_task"], t["g_general"], t["weight"], rng=t["rng"]),
    ):
        with rk.use_backend("cuda"), pytest.raises(rk.BackendUnavailable, match="no cpu kernels"):
            call()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_forced_gpu_backend_leaves_the_hosts_tensors_alone(name, monkeypatch):
    """A run on a GPU packs and counts bits on the host too: for its task file and its report."""
    monkeypatch.setitem(backends._modules, name, fake_backend(pack_bits=None))
    with rk.use_backend(name):
        assert rk.pack_bits(torch.ones(2, 2, dtype=torch.bool)).tolist() == [[3], [3]]
        assert row("pack_bits", "cpu")["backend"] == backends.choose("pack_bits", "cpu", ()) != name
        assert row("pack_bits", "cuda") | {"last": ""} == row("pack_bits", "cuda") | {"backend": name, "last": ""}


RUN = """
import torch, rmt_kernels as rk
rk.pack_bits(torch.ones(1, 1, dtype=torch.bool))
print(rk.explain('pack_bits')[0])
"""


def test_rmt_backend_forces_a_whole_process():
    done = python(RUN, RMT_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "'backend': 'reference', 'why': 'requested', 'last': 'reference'" in done.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "'cuda' was requested, but for pack_bits on cpu: no cpu kernels"), ("nonsense", "one of cpu, cuda")],
    ids=["elsewhere", "unknown"],
)
def test_rmt_backend_that_cannot_be_met_raises(name, message):
    done = python(RUN, RMT_BACKEND=name)
    assert done.returncode != 0 and message in done.stderr, done.stderr
