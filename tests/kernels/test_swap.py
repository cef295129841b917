"""masked_weights_: all layers of a model rewritten at once, whatever backend serves a layer."""

import pytest
import torch
from helpers import layer

import rmt_kernels as rk
from rmt_kernels import backends, reference
from rmt_kernels.backends import cuda


def model(device="cpu"):
    """Weights, bits and other bits of layers of two dtypes, one of them a view."""
    layers = [layer((1, n, k), device=device, seed=n) for n, k in ((8, 64), (5, 33), (16, 128))]
    weights = [layers[0]["weight"], layers[1]["weight"].half(), layers[2]["weight"].T.contiguous().T]
    bits = [t["bits"] for t in layers]
    others = [layer((1, *w.shape), device=device, seed=99)["bits"] for w in weights]
    for b, o in zip(bits, others):
        o[:, ::2] = b[:, ::2]  # words in common
    return weights, bits, others


def check(device):
    weights, bits, others = model(device)
    want = [reference.masked_weight(w, b) for w, b in zip(weights, bits)]
    outs = [torch.full_like(w, 7) for w in want]
    rk.masked_weights_(outs, weights, bits)
    assert all(torch.equal(o, w) for o, w in zip(outs, want))
    outs = [reference.masked_weight(w, b) for w, b in zip(weights, others)]
    rk.masked_weights_(outs, weights, bits, others)
    assert all(torch.equal(o, w) for o, w in zip(outs, want))
    outs = [torch.full_like(w, 7) for w in want]
    rk.masked_weights_(outs, weights, bits, bits)
    assert all((o == 7).all() for o in outs), "bits that do not differ cost no write"


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_every_layer_is_rewritten(name):
    reason = backends.why_not(name, "masked_weight_", "cpu")
    if reason is not None:
        pytest.skip(reason)
    with rk.use_backend(name):
        check("cpu")


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("rewrite", ["masked_weight_", "masked_weights_"])
def test_a_product_over_what_was_rewritten_since_has_no_gradient(name, rewrite):
    """Its backward pass would read the other mask's weight."""
    reason = backends.why_not(name, "masked_weight_", "cpu")
    if reason is not None:
        pytest.skip(reason)
    t = layer((4, 9, 37))
    other, x = t["bits"].flip(0), t["x"].requires_grad_()
    with rk.use_backend(name):
        dense = rk.masked_weight(t["weight"], t["bits"])
        y = rk.masked_linear(x, t["weight"], t["bits"], dense=dense)
        before = dense._version
        if rewrite == "masked_weight_":
            rk.masked_weight_(dense, t["weight"], other, old=t["bits"])
        else:
            rk.masked_weights_([dense], [t["weight"]], [other], [t["bits"]])
        assert dense._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_rewriting_all_at_once_tells_autograd(device, monkeypatch):
    weights, bits, _ = model(device)
    outs = [torch.empty(w.shape, dtype=w.dtype, device=device) for w in weights]
    before = [out._version for out in outs]
    monkeypatch.setattr(backends, "choose", lambda op, where, args: "cuda")
    rk.masked_weights_(outs, weights, bits)
    assert all(out._version > v for out, v in zip(outs, before))


def test_inference_tensors_are_rewritten_too():
    weights, bits, _ = model()
    with torch.inference_mode():
        outs = [torch.empty(w.shape, dtype=w.dtype) for w in weights]
        rk.masked_weights_(outs, weights, bits)
        rk.masked_weight_(outs[0], weights[0], bits[0])
    rk.masked_weights_(outs, weights, bits)
    assert all(torch.equal(o, reference.masked_weight(w, b)) for o, w, b in zip(outs, weights, bits))


def test_layers_of_a_dtype_share_a_launch(device, monkeypatch):
    launched, launch = [], cuda._launch
    monkeypatch.setattr(cuda, "_launch", lambda name, *args: (launched.append(name), launch(name, *args))[1])
    if device == "cpu":
        monkeypatch.setattr(backends, "choose", lambda op, where, args: "cuda")
        check(device)
    else:
        with rk.use_backend("cuda"):
            check(device)
    assert launched == ["masked_weights"] * 6, "two dtypes, three swaps"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda o, w, b, old: b.pop(), "every layer needs one of each"),
        (lambda o, w, b, old: o.__setitem__(1, o[1][:4]), r"out must have shape \(5, 33\)"),
        (lambda o, w, b, old: o.__setitem__(2, o[2].T.contiguous().T), "out must be contiguous"),
        (lambda o, w, b, old: o.__setitem__(0, o[0].half()), "out must be torch.float32"),
        (lambda o, w, b, old: b.__setitem__(0, b[0].long()), "bits must be int32"),
        (lambda o, w, b, old: old.__setitem__(2, old[2][:, :2]), "bits must be int32"),
        (lambda o, w, b, old: old.__setitem__(2, old[2].T.contiguous().T), "bits must be contiguous"),
    ],
)
@pytest.mark.parametrize("listed", [False, True], ids=["layer by layer", "at once"])
def test_what_does_not_fit_is_refused(listed, change, message, monkeypatch):
    if listed:
        monkeypatch.setattr(backends, "choose", lambda op, where, args: "cuda")
        monkeypatch.setattr(cuda, "_launch", lambda *args: None)
    weights, bits, others = model()
    outs = [torch.empty(w.shape, dtype=w.dtype) for w in weights]
    change(outs, weights, bits, others)
    with pytest.raises((ValueError, TypeError), match=message):
        rk.masked_weights_(outs, weights, bits, others)
