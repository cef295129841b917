"""Learned context against a text tower written out, and CoOp and CoCoOp against their steps written out."""

import math
import threading
from dataclasses import replace

import open_clip
import peer_tools
import pytest
import safetensors.torch
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from rmt import UserError, clip
from rmt.peers import cocoop, coop, names
from rmt.peers.context import Context, encode

NAMES = sorted(tiny.COLOURS)
TEXTS = ["coop", "coop_photo", "coop_csc", "cocoop"]
PHOTO = "a photo of a"
WEIGHTS = tiny.SHARED / "weights" / "deit_ti16_lit"


@pytest.fixture(scope="module")
def longer():
    """CoOp's 16 vectors need more than the 16 tokens of the tiny tower, and more than its one block: in a first block
    the class name's tokens do not see the vectors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.MODEL["text_cfg"], "context_length", 32)
        patch.setitem(tiny.MODEL["text_cfg"], "layers", 3)
        yield


@pytest.fixture(scope="module", params=[open_clip.CLIP, open_clip.CustomTextCLIP])
def model(request, longer):
    return tiny.model(kind=request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def footing(longer, tmp_path_factory):
    """Its text tower tells the class names apart more than a random one does."""
    made = peer_tools.footing(tmp_path_factory.mktemp("texts"), max_feature_steps=100)
    model = made.loaded.model.requires_grad_(False)
    model.token_embedding.weight.mul_(20)
    for block in model.transformer.resblocks:
        for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.weight.mul_(2)
    text = clip.Text.make(made.loaded, made.split.classnames, peer_tools.TEMPLATE)
    return replace(made, text=text)


tokenizer = open_clip.SimpleTokenizer(context_length=32)


def make(model, n_ctx=4, init=None, class_specific=False, seed=5, tokenizer=tokenizer, classnames=NAMES):
    return Context(model, tokenizer, classnames, n_ctx=n_ctx, init=init, class_specific=class_specific, seed=seed)


def text_tower(model, ids, vectors):
    """(C, D) of length 1, in the dtype of vectors (C, n, W): every product of the text tower written out."""
    tower = getattr(model, "text", model)
    weight = {k: v.detach().to(vectors.dtype) for k, v in tower.state_dict().items()}
    x = weight["token_embedding.weight"][ids]
    x = torch.cat([x[:, :1], vectors, x[:, 1 + vectors.shape[1] :]], 1) + weight["positional_embedding"]
    (count, length, width), heads = x.shape, tower.transformer.resblocks[0].attn.num_heads
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for i in range(len(tower.transformer.resblocks)):
        w = {k.removeprefix(f"transformer.resblocks.{i}."): v for k, v in weight.items()}
        y = F.layer_norm(x, (width,), w["ln_1.weight"], w["ln_1.bias"])
        y = y @ w["attn.in_proj_weight"].T + w["attn.in_proj_bias"]
        q, k, v = y.view(count, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(width // heads)).masked_fill(future, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, length, width)
        x = x + y @ w["attn.out_proj.weight"].T + w["attn.out_proj.bias"]
        y = F.layer_norm(x, (width,), w["ln_2.weight"], w["ln_2.bias"])
        y = F.gelu(y @ w["mlp.c_fc.weight"].T + w["mlp.c_fc.bias"])
        x = x + y @ w["mlp.c_proj.weight"].T + w["mlp.c_proj.bias"]
    x = F.layer_norm(x, (width,), weight["ln_final.weight"], weight["ln_final.bias"])
    y = x[torch.arange(count), ids.argmax(1)] @ weight["text_projection"]
    return y / y.norm(dim=-1, keepdim=True)


def ids(n_ctx):
    return tokenizer([" ".join(["X"] * n_ctx) + f" {name.replace('_', ' ')}." for name in NAMES])


def test_words_give_zero_shot(model):
    """The template's own embeddings: the very same operations on the very same numbers."""
    loaded = clip.Clip(model, None, tokenizer)
    want = clip.text_features(loaded, NAMES, "a photo of a {}.")
    assert torch.equal(make(model, init=PHOTO).text(), want)
    assert torch.equal(make(model, init=PHOTO, class_specific=True).text(), want)
    assert not torch.allclose(make(model).text(), want, atol=1e-2)


@pytest.mark.skipif(not WEIGHTS.exists(), reason=f"needs the real towers of {WEIGHTS}")
def test_words_give_zero_shot_in_a_trained_tower():
    loaded = clip.load(f"local-dir:{WEIGHTS}", None, None, torch.device("cpu"))
    classnames = ["airplane", "brontosaurus", "sea_horse"]
    context = make(loaded.model, init=PHOTO, tokenizer=loaded.tokenizer, classnames=classnames)
    assert torch.equal(context.text(), clip.text_features(loaded, classnames, "a photo of a {}."))
    assert make(loaded.model, 16, tokenizer=loaded.tokenizer, classnames=classnames).text().shape == (3, 256)


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("n_ctx", [1, 16])
def test_text_is_the_tower_written_out(model, n_ctx, class_specific):
    context = make(model, n_ctx, class_specific=class_specific)
    assert context.vectors.shape == ((4, n_ctx, 32) if class_specific else (n_ctx, 32))
    assert [name for name, _ in context.named_parameters()] == ["vectors"]
    with torch.no_grad():
        context.vectors.mul_(20)  # so that they matter beside the positional embedding
        want, single = (text_tower(model, ids(n_ctx), v.expand(4, -1, -1)) for v in (
            context.vectors.double(), context.vectors))  # fmt: skip
        # The house's rule: at most twice as far from float64 as the formula in fp32.
        assert (context.text() - want).norm() <= 2 * (single - want).norm() < 1e-4


def test_gradient_is_the_slope_of_the_tower(model):
    """Central differences of the written-out tower in float64, in every direction; nothing else gets a gradient."""
    context = make(model, 1)
    pull = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    (context.text() * pull).sum().backward()
    vectors, want, h = context.vectors.detach().double(), torch.zeros(1, 32).double(), 1e-5
    for index in range(vectors.numel()):
        step = torch.zeros_like(vectors)
        step.view(-1)[index] = h
        up, down = (text_tower(model, ids(1), (vectors + s).expand(4, -1, -1)) for s in (step, -step))
        want.view(-1)[index] = ((up - down) * pull).sum() / (2 * h)
    assert want.abs().max() > 0.1
    torch.testing.assert_close(context.vectors.grad.double(), want, rtol=1e-4, atol=1e-4 * want.abs().max())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_class_specific_vectors_act_on_their_class(model):
    context = make(model, class_specific=True)
    (grad,) = torch.autograd.grad(context.text()[1, 0], context.vectors)
    assert (grad[1] != 0).any(1).all() and not grad[[0, 2, 3]].any()


def test_random_start():
    a, b, other = (make(tiny.model(), 200, seed=seed, tokenizer=lambda texts, context_length=300: torch.cat([
        torch.zeros(4, 1).long(), torch.ones(4, 200).long(), torch.full((4, context_length - 201), 2)], 1
    )).vectors for seed in (3, 3, 4))  # fmt: skip
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert a.std().item() == pytest.approx(0.02, rel=0.05) and abs(a.mean()) < 1e-3


def test_other_calls_are_not_touched(model):
    """While the context's pass runs, a plain call, even of equal tokens, gives what it gives without."""
    context, seen, inside = make(model), [], []
    plain = model.encode_text(context.tokens)

    def call(*_):
        if not inside:
            inside.append(True)
            seen.append(model.encode_text(context.tokens))

    handle = getattr(model, "text", model).transformer.register_forward_pre_hook(call)
    want = make(model).text()
    handle.remove()
    assert torch.equal(seen[0], plain) and torch.equal(context.text(), want)
    assert not torch.allclose(F.normalize(plain, dim=-1), want, atol=1e-2)


def test_threads_do_not_meet(model):
    contexts = [make(model, seed=seed) for seed in range(3)]
    want, plain, wrong = [c.text() for c in contexts], model.encode_text(contexts[0].tokens), []

    def work(index):
        for _ in range(15):
            if index == 3:
                wrong.extend([] if torch.equal(model.encode_text(contexts[0].tokens), plain) else ["plain"])
            elif not torch.equal(contexts[index].text(), want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_hook_goes_whatever_happens(model):
    context, tower = make(model), getattr(model, "text", model)
    context.text()

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = tower.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        context.text()
    handle.remove()
    assert not tower.token_embedding._forward_hooks


def test_autocast(model):
    """As a plain call under it, to the bit; fp32 outside."""
    tokens = clip.Text.make(clip.Clip(model, None, tokenizer), NAMES, "a photo of a {}.").tokens
    context = make(model, init=PHOTO)
    with torch.autocast("cpu", torch.bfloat16):
        low, want = context.text(), F.normalize(model.encode_text(tokens).float(), dim=-1)
    assert low.dtype == torch.float32 and torch.equal(low, want) and not torch.equal(low, context.text())
    (grad,) = torch.autograd.grad(low.sum(), context.vectors)
    assert grad.dtype == torch.float32 and grad.any()


def test_what_does_not_fit(model):
    exact, over = (" ".join(["ball"] * count) for count in (25, 26))  # 32 tokens: start, 4, 25, full stop, end
    assert make(model, classnames=[*NAMES, exact]).text().shape == (5, 32)
    with pytest.raises(UserError, match=f"class name '{over}' must fit into the text tower's 32 tokens.*coop_photo"):
        make(model, classnames=[*NAMES, over])
    with pytest.raises(UserError, match="must have 5 tokens, 'a photo of a' has 4"):
        make(model, 5, init=PHOTO)
    with pytest.raises(UserError, match="starts with a token of its own"):
        make(model, tokenizer=lambda texts, context_length=32: tokenizer(texts, context_length + 1)[:, 1:])
    context = make(model, class_specific=True)
    with pytest.raises(UserError, match=r"shape \(4, 4, 32\), got \(3, 4, 32\)"):
        context.load({"context": context.vectors[:3]})


def test_towers_of_others():
    class Foreign(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.text, self.logit_scale = own, nn.Parameter(torch.zeros(()))

        def encode_text(self, tokens):
            return self.text.token_embedding(tokens.flip(1)).sum(1)

    with pytest.raises(UserError, match=r"own text tower.*Foreign has another"):
        make(Foreign(nn.Linear(2, 2)))
    context = make(Foreign(tiny.model()))
    with pytest.raises(UserError, match="embeds other tokens"):
        context.text()


@pytest.mark.parametrize("shots,dataset,epochs", [
    (16, None, 200), (8, None, 200), (4, None, 100), (2, None, 100), (1, None, 50), ("all", None, 200),
    (16, "imagenet", 50),
])  # fmt: skip
def test_epochs(footing, shots, dataset, epochs):
    data = {"data": None, "root": "r", "dataset": dataset} if dataset else {}
    assert coop.coop_epochs(replace(footing.config, shots=shots, **data)) == epochs


def test_rates_are_dassls():
    """Dassl's wrapper: an epoch at 1e-5, then torch's scheduler from its beginning."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    want = [1e-5] * 3
    for _ in range(49):
        want += [optimizer.param_groups[0]["lr"]] * 3
        optimizer.step()
        schedule.step()
    rates = coop.dassl_rates(2e-3, 150, 50)
    assert rates == pytest.approx(want, rel=1e-9)
    assert coop.dassl_rates(2e-3, 10, 50) == rates[::15]


@pytest.mark.parametrize("name", ["coop", "coop_csc"])
def test_two_steps_written_out(longer, tmp_path, name):
    """SGD with momentum 0.9 and weight decay 5e-4 on all eight images at once, at the rates of epochs 0 and 50 of 100;
    the class vectors are of the written-out tower, in float64."""
    footing = peer_tools.footing(tmp_path, shots=2, max_feature_steps=2)
    state, method = footing.start(), names.method(name)
    fit = method.fit(footing, state)
    v = make(state.model, 16, class_specific=name == "coop_csc", seed=1).vectors.detach().double()
    moment = torch.zeros_like(v)
    for step, rate in enumerate([1e-5, 2e-3 * (1 + math.cos(math.pi * 49 / 100)) / 2]):
        v.requires_grad_(True)
        image = F.normalize(footing.features(state, "train", step).double(), dim=-1)
        logits = math.exp(3.5) * image @ text_tower(state.model, ids(16), v.expand(4, -1, -1)).T
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, footing.labels("train")), v)
        v = v.detach()
        moment = 0.9 * moment + grad + 5e-4 * v
        v = v - rate * moment
    start = make(state.model, 16, class_specific=name == "coop_csc", seed=1).vectors
    moved = (v - start).abs().max().item()
    assert moved > 1e-4
    torch.testing.assert_close(fit.stored["context"].double(), v, rtol=0, atol=1e-4 * moved)
    assert (fit.steps, fit.published_steps, fit.trained) == (2, 100, v.numel())
    assert all(p.grad is None for p in state.model.parameters())


@pytest.mark.parametrize("name", TEXTS)
def test_fit_and_restore(footing, name, tmp_path):
    footing = replace(footing, max_feature_steps=8)
    state, method = footing.start(), names.method(name)
    fit = method.fit(footing, state)
    again = method.fit(footing, state)
    assert fit.stored.keys() == again.stored.keys()
    assert all(torch.equal(fit.stored[key], again.stored[key]) for key in fit.stored)
    assert all(value.dtype == torch.float32 for value in fit.stored.values())
    assert fit.trained == sum(value.numel() for value in fit.stored.values())
    safetensors.torch.save_file(fit.stored, tmp_path / "stored")
    features = footing.features(state, "test")
    a, b = (method.restore(footing, state, stored) for stored in (
        fit.stored, safetensors.torch.load_file(tmp_path / "stored")))  # fmt: skip
    assert torch.equal(a.logits(features), b.logits(features)) and not a.logits(features).requires_grad
    assert a.model is state.model and a.stack == () and a.text.shape == (4, 32)


@pytest.mark.parametrize("name", TEXTS)
def test_learns(footing, name):
    """At the authors' rate, from where its vectors start."""
    state, method = footing.start(), names.method(name)
    features, labels = footing.features(state, "test"), footing.labels("test")
    module = method._module(footing, state) if name == "cocoop" else method.context(footing, state.model)
    logits = [method.restore(footing, state, stored).logits(features) for stored in (
        module.stored(), method.fit(footing, state).stored)]  # fmt: skip
    loss = [F.cross_entropy(x, labels).item() for x in logits]
    right = [(x.argmax(1) == labels).float().mean().item() for x in logits]
    assert loss[1] < 0.8 * loss[0] and right[1] > right[0], (loss, right)


def test_coop_is_the_written_out_classifier(footing):
    state, method = footing.start(), names.method("coop_photo")
    context = {"context": torch.randn(4, 32, generator=torch.Generator().manual_seed(2))}
    got = method.restore(footing, state, context)
    features = footing.features(state, "test")
    text = text_tower(state.model, ids(4), context["context"].expand(4, -1, -1))
    want = math.exp(3.5) * features / features.norm(dim=1, keepdim=True) @ text.T
    torch.testing.assert_close(got.logits(features), want, rtol=1e-4, atol=1e-4)


def test_cocoop_written_out(footing, monkeypatch):
    """Every image with a text tower pass of its own; the passes of the method are cut anywhere."""
    state, method = footing.start(), names.method("cocoop")
    rng = torch.Generator().manual_seed(7)
    shapes = {"context.vectors": (4, 32), "down.weight": (2, 32), "down.bias": (2,), "up.weight": (32, 2)}
    shapes["up.bias"] = (32,)
    stored = {k: torch.randn(s, generator=rng) for k, s in shapes.items()}
    features = footing.features(state, "test")
    got = method.restore(footing, state, stored).logits(features)
    monkeypatch.setattr(cocoop, "TEXTS", 7)
    torch.testing.assert_close(method.restore(footing, state, stored).logits(features), got, rtol=1e-5, atol=1e-5)
    for image, row in zip(features, got, strict=True):
        f = image / image.norm()
        hidden = (stored["down.weight"] @ f + stored["down.bias"]).clamp(min=0)
        shift = stored["up.weight"] @ hidden + stored["up.bias"]
        text = text_tower(state.model, ids(4), (stored["context.vectors"] + shift).expand(4, -1, -1))
        torch.testing.assert_close(row, math.exp(3.5) * text @ f, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got[0] - got[0].mean(), got[-1] - got[-1].mean(), atol=1e-2)


def test_cocoop_starts_as_the_authors(footing):
    """Words, and nn.Linear's own start; batch 1 over 10 epochs, of which the first is warm-up."""
    still = replace(footing, max_feature_steps=16, rates={"cocoop": 1e-20})
    fit = names.method("cocoop").fit(still, footing.start())
    assert fit.published_steps == 160 and fit.steps == 16
    table = footing.loaded.model.token_embedding.weight
    words = table[tokenizer([PHOTO])[0, 1:5]]
    torch.testing.assert_close(fit.stored["context.vectors"], words, rtol=0, atol=1e-3)
    for layer, inputs in (("down", 32), ("up", 2)):
        for kind in ("weight", "bias"):
            value = fit.stored[f"{layer}.{kind}"]
            assert value.abs().max() <= inputs**-0.5 + 1e-3 and (value != 0).all()
    assert fit.stored["down.weight"].abs().max() > 0.8 * 32**-0.5
    state = footing.start()
    with pytest.raises(UserError, match=r"must have the shapes .*'up.bias': \(32,\)"):
        names.method("cocoop").restore(footing, state, {k: v for k, v in fit.stored.items() if k != "up.bias"})


@pytest.mark.parametrize("name", ["coop", "cocoop"])
def test_bf16(footing, name):
    """Training under autocast goes another way than in fp32, but along it."""
    train = replace(footing.config.train, precision="bf16")
    full, still = (replace(footing, max_feature_steps=n, rates=r) for n, r in ((3, {}), (1, {name: 1e-20})))
    low = replace(full, config=replace(full.config, train=train))
    a, b, start = (names.method(name).fit(f, footing.start()).stored for f in (full, low, still))
    for key in a:
        assert b[key].dtype == torch.float32
        assert not torch.equal(a[key], b[key])
        assert F.cosine_similarity((a[key] - start[key]).flatten(), (b[key] - start[key]).flatten(), dim=0).item() > 0.9


def test_a_name_too_long_for_16_vectors(tmp_path):
    footing = peer_tools.footing(tmp_path, context=16, max_feature_steps=1)
    with pytest.raises(UserError, match=r"16 context vectors and the class name 'blue sky' must fit.*coop_photo"):
        names.method("coop").fit(footing, footing.start())
    assert names.method("coop_photo").fit(footing, footing.start()).steps == 1


def test_encode_takes_vectors_of_each_text(model):
    a, b = make(model, seed=1), make(model, seed=2)
    both = encode(model, a.tokens, torch.stack([a.vectors, b.vectors, a.vectors, b.vectors]))
    torch.testing.assert_close(both[::2], a.text()[::2], rtol=0, atol=0)
    torch.testing.assert_close(both[1::2], b.text()[1::2], rtol=0, atol=0)
