"""Compact storage: scores of the selected weights alone train as the dense ones do at those places."""

import copy
import io

import pytest
import torch
from torch import nn

import rmt
import rmt_kernels as rk
from rmt import compact, masked
from rmt_kernels import reference

THRESHOLD = 5e-3


class Model(nn.Module):
    """A convolution, an attention and a linear, over enough rows that dense masks take autograd's path too."""

    def __init__(self):
        super().__init__()
        self.conv = rmt.FusedMaskedConv2d.from_module(nn.Conv2d(3, 16, 2, stride=2, bias=False))
        self.attn = rmt.FusedMaskedMultiheadAttention.from_module(nn.MultiheadAttention(16, 2, batch_first=True))
        self.head = rmt.FusedMaskedLinear(16, 9)
        self.example = torch.randn(6, 3, 8, 8)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.head(self.attn(x, x, x, need_weights=False)[0])


def model(seed=0):
    torch.manual_seed(seed)
    return Model()


def losses(net):
    y = net(net.example)
    return y.square().mean(), y.tanh().mean()


def select(net, share, seed=1):
    """Selects that share of every weight at random; returns the chosen places as bool matrices."""
    generator = torch.Generator().manual_seed(seed)
    places = []
    for mask in rmt.masks(net):
        places.append(torch.rand(mask.weight.shape, generator=generator) < share)
        mask.module.select(mask.prefix, reference.pack_bits(places[-1]))
    return places


def scatter(net, dense):
    """Gives compact scores the values that dense ones have."""
    with torch.no_grad():
        for mask, other in zip(rmt.masks(net), rmt.masks(dense)):
            chosen = reference.unpack_bits(mask.selected, mask.weight.shape[1])
            mask.scores.copy_(other.scores[chosen])


def randomise(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for mask in rmt.masks(net):
            mask.scores.copy_(THRESHOLD + 1e-3 * torch.randn(mask.scores.shape, generator=generator))
    return net


def want_bits(mask):
    """By loops, from the words of `selected`."""
    scores, words, (rows, columns) = iter(mask.scores.tolist()), mask.selected.tolist(), mask.weight.shape
    on = torch.ones(rows, columns, dtype=torch.bool)
    for n in range(rows):
        for k in range(columns):
            if words[n][k // 32] >> k % 32 & 1:
                on[n, k] = next(scores) > torch.tensor(mask.module.threshold, dtype=torch.float32)
    return reference.pack_bits(on)


def assert_fresh(net):
    for mask in rmt.masks(net):
        assert torch.equal(mask.bits, want_bits(mask)), mask.key
        assert torch.equal(mask.dense, reference.masked_weight(mask.weight, mask.bits)), mask.key


# The C++ kernel multiplies a convolution's gradient by the weight and adds the L2 term in one rounding, for dense
# masks alone: without that term both round alike, and the reference always does.
@pytest.mark.parametrize(("backend", "l2"), [("reference", 1e-4), (None, 0.0)])
@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
def test_with_everything_selected_training_equals_dense_training_bit_for_bit(strength, backend, l2):
    with rk.use_backend(backend):
        train_both(strength, l2)


def train_both(strength, l2):
    dense, small = randomise(model()), model()
    select(small, 2.0)
    scatter(small, dense)
    steps = [rmt.MaskAdam(net, lr=1e-3) for net in (dense, small)]
    for step in range(4):
        for net, optimizer in zip((dense, small), steps):
            rmt.backward(*losses(net), net, strength=strength, seed=5, step=step, l2=l2)
            optimizer.step()
        for a, b in zip(rmt.masks(dense), rmt.masks(small)):
            assert b.scores.shape == (a.scores.numel(),)
            assert torch.equal(a.scores.grad.flatten(), b.scores.grad), f"{a.key}, step {step}"
            assert torch.equal(a.scores.flatten(), b.scores), f"{a.key}, step {step}"
            assert torch.equal(a.bits, b.bits) and torch.equal(a.dense, b.dense)
    assert all((m.scores <= THRESHOLD).any() for m in rmt.masks(small))


def test_gradients_are_the_dense_ones_at_the_selected_places():
    # A dense model with the same bits: its scores off the selection stay above the threshold.
    dense, small = model(), model()
    places = select(small, 0.3)
    randomise(small)
    with torch.no_grad():
        for a, b, chosen in zip(rmt.masks(dense), rmt.masks(small), places):
            a.scores[chosen] = b.scores
    for name, run in {
        "rmt.backward": lambda net: rmt.backward(*losses(net), net, strength=0.0, l2=0.0),
        "plain": lambda net: losses(net)[0].backward(),
    }.items():
        for net in (dense, small):
            net.zero_grad()
            run(net)
        for a, b, chosen in zip(rmt.masks(dense), rmt.masks(small), places):
            assert torch.equal(a.bits, b.bits)
            assert b.scores.grad.shape == b.scores.shape
            assert torch.equal(a.scores.grad[chosen], b.scores.grad), f"{name}: {a.key}"


def test_draw_and_penalty_are_those_of_the_compact_vector():
    small = model()
    select(small, 0.3)
    randomise(small)
    found, (task, general) = rmt.masks(small), losses(small)
    a = torch.autograd.grad(task, [m.scores for m in found], retain_graph=True)
    b = torch.autograd.grad(general, [m.scores for m in found], retain_graph=True)
    rmt.backward(task, general, small, strength=1.0, seed=3, step=2, l2=1e-2)
    for i, mask in enumerate(found):
        s = mask.scores.detach()
        want = reference.gradient_dropout(a[i], b[i], None, s, 1e-2 / s.norm(), rk.rng_state(3, 2), 1.0, i)
        kept = want != 0
        assert 0.02 < kept.double().mean() < 0.98
        wrong = (mask.scores.grad - want).abs() > 1e-5 * want.abs().max()
        assert wrong.sum() <= 1, f"{mask.key}: {int(wrong.sum())} of {wrong.numel()}"


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_unselected_weights_never_turn_off_and_bits_follow_the_scores(share):
    small = model()
    places = select(small, share)
    optimizer = rmt.MaskAdam(small, lr=4e-3)
    for step in range(4):
        rmt.backward(*losses(small), small, step=step)
        optimizer.step()
        assert_fresh(small)
        for mask, chosen in zip(rmt.masks(small), places):
            assert reference.unpack_bits(mask.bits, mask.weight.shape[1])[~chosen].all()
    assert all((m.scores <= THRESHOLD).any() for m in rmt.masks(small) if m.scores.numel() > 20)


def test_torchs_own_optimizer_trains_compact_scores():
    small = model()
    select(small, 0.4)
    optimizer = torch.optim.Adam([m.scores for m in rmt.masks(small)], lr=4e-3)
    for _ in range(2):
        optimizer.zero_grad()
        losses(small)[0].backward()
        optimizer.step()
        assert_fresh(small)


def bytes_of(net, optimizer):
    states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return sum(t.numel() * t.element_size() for t in [*net.parameters(), *net.buffers(), *states])


def test_memory_falls_with_the_budget():
    totals = []
    for share in (None, 0.5, 0.1):
        net = model()
        if share is not None:
            select(net, share)
        optimizer = rmt.MaskAdam(net)
        rmt.backward(*losses(net), net)
        optimizer.step()
        count = sum(m.scores.numel() for m in rmt.masks(net))
        states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        assert sum(t.numel() * t.element_size() for t in states) == 2 * count * 4
        totals.append((count, bytes_of(net, optimizer)))
    (every, most), (half, less), (tenth, least) = totals
    words = sum(m.selected.numel() for m in rmt.masks(net))
    assert most - less == 12 * (every - half) - 4 * words and less - least == 12 * (half - tenth)


def test_a_full_and_a_compact_mask_are_stepped_together():
    net = model()
    first = rmt.masks(net)[0]
    first.module.select(first.prefix, torch.ones_like(first.bits))
    optimizer = rmt.MaskAdam(net, lr=4e-3)
    before = [m.scores.detach().clone() for m in rmt.masks(net)]
    rmt.backward(*losses(net), net)
    optimizer.step()
    assert [m.selected is None for m in rmt.masks(net)] == [False, True, True, True]
    assert all(not torch.equal(m.scores, b) for m, b in zip(rmt.masks(net), before))
    for mask in rmt.masks(net)[1:]:
        assert torch.equal(mask.bits, reference.pack_scores(mask.scores.detach(), THRESHOLD))


def test_a_weight_of_which_nothing_is_selected_is_no_mask_and_stays_on():
    net = model()
    net.head.select("", torch.zeros_like(net.head.bits))
    assert [m.key for m in rmt.masks(net)] == ["conv.weight", "attn.in_proj_weight", "attn.out_proj.weight"]
    rmt.backward(*losses(net), net)
    rmt.MaskAdam(net).step()
    assert net.head.scores.shape == (0,) and not net.head.scores.requires_grad
    assert torch.equal(net.head.dense(), net.head.weight)
    net.load_state_dict(copy.deepcopy(net).state_dict())


def test_set_bits_of_a_compact_mask():
    net = model()
    places = select(net, 0.4)
    for mask, chosen in zip(rmt.masks(net), places):
        wanted = reference.pack_bits((torch.rand(chosen.shape) > 0.5) | ~chosen)
        mask.set_bits(wanted)
        assert torch.equal(mask.bits, wanted)
        with pytest.raises(ValueError, match=rf"{mask.key}: weights that are not selected must be on, got \d+ that"):
            mask.set_bits(torch.zeros_like(wanted))
        assert torch.equal(mask.bits, wanted), "a refused mask is left as it was"
    assert_fresh(net)


def test_state_dict_loads_back_and_carries_the_selection():
    net, other = model(), model()
    select(net, 0.4)
    randomise(net)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert saved["head.scores"].shape == net.head.scores.shape and saved["head.selected"].dtype == torch.int32
    with pytest.raises(RuntimeError, match="selected"):
        other.load_state_dict(saved)
    select(other, 0.4)
    other(other.example)
    other.load_state_dict(saved)
    assert_fresh(other)
    assert torch.equal(other(net.example), net(net.example))


def test_another_selection_of_the_same_size_is_noticed():
    layer = rmt.FusedMaskedLinear(40, 3)
    words = torch.tensor([[1, 0], [0, 1], [2, 0]], dtype=torch.int32)
    layer.select("", words)
    with torch.no_grad():
        layer.scores.zero_()
    assert_fresh(layer)
    with torch.no_grad():
        layer.selected.copy_(words.flip(0))
    assert_fresh(layer)
    assert torch.equal(words, torch.tensor([[1, 0], [0, 1], [2, 0]], dtype=torch.int32)), "the words are a copy"


def test_copies_and_dtypes():
    net = model()
    select(net, 0.4)
    randomise(net)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        for mask in rmt.masks(clone):
            mask.scores.zero_()
    assert_fresh(clone)
    assert_fresh(net)
    scores = [m.scores.detach().clone() for m in rmt.masks(net)]
    losses(net)[0].backward()
    for move in (net.bfloat16, net.half, net.float):
        move()
        for mask, s in zip(rmt.masks(net), scores):
            assert mask.scores.dtype == torch.float32 and torch.equal(mask.scores, s)
            assert mask.scores.grad.dtype == torch.float32 and mask.selected.dtype == torch.int32
    assert_fresh(net)


def test_merging_a_compact_linear_and_disabling_it():
    layer = randomise(rmt.FusedMaskedLinear(37, 12))
    layer.select("", reference.pack_bits(torch.rand(12, 37) < 0.5))
    randomise(layer)
    x = torch.randn(50, 37)
    assert torch.equal(layer.to_linear()(x), layer(x))
    with rmt.disabled(layer):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_compiles_without_a_graph_break_and_follows_the_scores():
    net = model()
    select(net, 0.4)
    randomise(net)
    eager = copy.deepcopy(net)
    compiled = torch.compile(net.forward, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        got, want = compiled(net.example), eager(eager.example)
        torch.testing.assert_close(got, want)
        got.square().mean().backward()
        want.square().mean().backward()
        for mine, theirs in zip(rmt.masks(net), rmt.masks(eager)):
            torch.testing.assert_close(mine.scores.grad, theirs.scores.grad)
            with torch.no_grad():
                for scores in (mine.scores, theirs.scores):
                    scores.sub_(1e-3 * theirs.scores.grad.sign())
            mine.scores.grad = theirs.scores.grad = None
    assert_fresh(net)


def test_every_backend_takes_the_stand_in():
    x, outs = torch.randn(3, 37), []
    for backend in ("reference", None):
        torch.manual_seed(0)
        layer = rmt.FusedMaskedLinear(37, 12)
        layer.select("", reference.pack_bits(torch.rand(12, 37) < 0.5))
        randomise(layer)
        with rk.use_backend(backend):
            layer(x).square().sum().backward()
        outs.append(layer.scores.grad)
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)


def test_the_stand_in_has_no_storage():
    selected = torch.full((12, 2), -1, dtype=torch.int32) & 0x1F
    stand_in = compact.StandIn.apply(torch.zeros(120), selected, 37)
    assert stand_in.shape == (12, 37) and stand_in.untyped_storage().nbytes() == 4


def test_masks_start_at_the_root_that_a_wrapper_names():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.model = inner

        @property
        def mask_root(self):
            return self.model

    net = model()
    assert [m.key for m in rmt.masks(Wrapper(net))] == [m.key for m in rmt.masks(net)]


ERRORS = {
    "shape": (torch.zeros(12, 1, dtype=torch.int32), r"words must be int32 \(12, 2\), got torch.int32 \(12, 1\)"),
    "dtype": (torch.zeros(12, 2, dtype=torch.int64), r"int32 \(12, 2\), got torch.int64"),
    "kind": ([[1]], r"int32 \(12, 2\), got \[\[1\]\]"),
    "pad": (torch.full((12, 2), 1 << 5, dtype=torch.int32), "pad bits of 0 from column 37 on"),
    "pad-sign": (torch.full((12, 2), -1, dtype=torch.int32), "pad bits of 0 from column 37 on"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refused_with_what_was_expected_and_what_came(name):
    words, message = ERRORS[name]
    layer = rmt.FusedMaskedLinear(37, 12)
    with pytest.raises(ValueError, match=message):
        layer.select("", words)
    assert layer.scores.shape == (12, 37), "a refused selection changes nothing"


def test_nan_scores_do_not_pass_unseen():
    layer = rmt.FusedMaskedLinear(37, 12)
    layer.select("", torch.ones(12, 2, dtype=torch.int32))
    nn.init.constant_(layer.scores, float("nan"))
    with pytest.raises(ValueError, match="NaN, got 24 NaN of 24"):
        layer(torch.randn(1, 37))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("captured", [compact, None])
def test_what_is_gathered_while_a_stream_captures_has_the_bytes_of_what_is_gathered_otherwise(
    share, captured, monkeypatch
):
    """masked_select waits for the device, which a capture does not permit: it must not be called then."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(7, 70, generator=generator)
    chosen = torch.rand(7, 70, generator=generator) < share
    if captured:
        monkeypatch.setattr(compact, "capturing", lambda tensor: True)
        monkeypatch.setattr(torch.Tensor, "masked_select", lambda *args: pytest.fail("waits for the device"))
    got = compact.gather(matrix, reference.pack_bits(chosen), int(chosen.sum()))
    assert torch.equal(got, matrix[chosen])


def test_a_captured_refresh_writes_where_the_captured_forward_reads(monkeypatch):
    net = randomise(model())
    select(net, 0.4)
    found = rmt.masks(net)
    before = [(mask.kept, mask.bits) for mask in found]
    monkeypatch.setattr(masked, "capturing", lambda tensor: True)
    with torch.no_grad():
        for mask in found:
            mask.scores.fill_(0.0)
            mask.refresh()
    for mask, (kept, bits) in zip(found, before):
        assert mask.kept is kept and mask.bits is bits
        assert torch.equal(bits, mask.selected ^ reference.pack_bits(torch.ones_like(kept, dtype=torch.bool)))
        assert torch.equal(kept, reference.masked_weight(mask.weight, bits))
