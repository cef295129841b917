"""Hugging Face hosts of routed modules: what they compute, through checkpointing, threads, padding and beams."""

import copy
import pickle
import threading

import hf_tools
import pytest
import torch
import torch.nn.functional as F

from rmt import UserError
from rmt.routing import (
    FUNCTIONS,
    RoutedAdapterConfig,
    RoutedLoRAConfig,
    inject_routed_adapter,
    inject_routed_lora,
    matrix,
)  # fmt: skip
from rmt.routing.bart import pooled


@pytest.mark.parametrize("kind", hf_tools.HOSTS)
@pytest.mark.parametrize("what", ["lora", "adapter"])
def test_a_no_op_at_first_that_trains_what_was_injected_and_nothing_else(kind, what):
    model, batch = hf_tools.host(kind), hf_tools.batch(kind)
    with torch.no_grad():
        want = model(**batch).logits
    if what == "lora":
        routed = inject_routed_lora(model, RoutedLoRAConfig(function="mul", r=4, sites=hf_tools.SITES[kind]))
    else:
        routed = inject_routed_adapter(model, RoutedAdapterConfig(function="mul", r=4))
    out = model(**batch)
    torch.testing.assert_close(out.logits, want, rtol=0, atol=1e-12)
    out.loss.backward()
    names = dict(routed.named_parameters())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(names)
    for name, p in names.items():
        # The key bias of attention aside, all of B and up has a gradient, and A and down none while those are zero.
        assert bool(p.grad.any()) == (name.endswith(".B") or ".up." in name), name
    routed.remove()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, want)
    layer = model.routing_host().blocks[0].units[0]
    assert type(layer).__module__.startswith("transformers")


def watched(module):
    """Inputs and outputs of a module's calls, without what is injected into it."""
    seen = []
    module.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    return seen


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_fused_product_of_gpt2_is_the_formula(function):
    model, _ = hf_tools.injected("gpt2", function)
    batch, layer = hf_tools.batch("gpt2"), model.text.model.transformer.h[1].attn.c_attn
    seen = watched(layer)
    model(**batch)
    (x, got), = seen  # fmt: skip
    x_r = torch.tanh(model.vit.pooler.dense(model.vit(batch["image"]).last_hidden_state[:, 0]))
    want = list((x @ layer.weight + layer.bias).chunk(3, -1))
    for n, name in ((0, "routed_q"), (2, "routed_v")):
        branch = getattr(layer, name)
        m, c = matrix(function, (x_r @ branch.A.T)[:, None])
        want[n] = want[n] + x @ (branch.B[0] @ m @ branch.A).mT + (c @ branch.B[0].T)[:, None]
    torch.testing.assert_close(got, torch.cat(want, -1), rtol=0, atol=1e-10)


def test_an_adapter_of_roberta_stands_before_residual_and_norm():
    model, _ = hf_tools.injected("roberta", "add", RoutedAdapterConfig)
    batch, layer = hf_tools.batch("roberta"), model.text.model.encoder.layer[1]
    (norm, inner, attended) = (watched(m) for m in (layer.output.LayerNorm, layer.output, layer.attention))
    model(**batch)
    dense, adapter = layer.output.dense, layer.output.dense.routed_adapter
    h = F.linear(inner[0][0], dense.weight, dense.bias)
    x_r = torch.tanh(model.vit.pooler.dense(model.vit(batch["image"]).last_hidden_state[:, 0]))[:, None]
    o = adapter.up(F.gelu(adapter.down(h) + adapter.down(x_r))) + h
    torch.testing.assert_close(norm[0][0], o + attended[0][1][0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_layer_of_bart_is_routed_by_its_own_tokens_without_padding(attention):
    """sdpa is given Boolean masks, eager additive ones."""
    model, _ = hf_tools.injected("bart")
    model.text.set_attn_implementation(attention)
    batch, inside = hf_tools.batch("bart"), model.text.model
    layers = [*inside.encoder.layers, *inside.decoder.layers]
    seen = [watched(layer.self_attn.q_proj) for layer in layers]
    crossed, encoded = watched(inside.decoder.layers[1].encoder_attn.q_proj), watched(inside.encoder.layers[-1])
    model(**batch)
    # Sample 0: three words, two of padding, four image tokens.
    keep = [torch.tensor([0, 1, 2, 5, 6, 7, 8]), torch.arange(9), torch.arange(9)]
    projections = [layer.self_attn.q_proj for layer in layers] + [inside.decoder.layers[1].encoder_attn.q_proj]
    for n, (projection, ((x, got),)) in enumerate(zip(projections, [*seen, crossed])):
        states = x if n < 2 else encoded[0][1]
        x_r = torch.stack([sample[rows].mean(0) for sample, rows in zip(states, keep)])
        a, b = projection.routed_q.A, projection.routed_q.B[0]
        want = F.linear(x, projection.weight, projection.bias) + ((x @ a.T) * (x_r @ a.T)[:, None]) @ b.T
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_masks_of_a_layer():
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(
        pooled(x, torch.tensor([[1, 1, 0], [0, 1, 0]]))[:, 0], torch.stack([x[0, :2].mean(0), x[1, 1]])
    )
    with pytest.raises(UserError, match="a layer's mask must be"):
        pooled(x, torch.ones(2, 4))


@pytest.mark.parametrize("config", [RoutedLoRAConfig, RoutedAdapterConfig])
@pytest.mark.parametrize("kind", hf_tools.HOSTS)
def test_checkpointing_computes_again_with_the_image_of_its_call(kind, config):
    """Also where another image was shown before the backward pass, or is fixed in it."""
    model, routed = hf_tools.injected(kind, config=config)
    batch, other = hf_tools.batch(kind), hf_tools.batch(kind, seed=2)
    fixed = torch.randn(3, hf_tools.WIDTH, dtype=torch.float64)
    parameters = list(routed.parameters())

    def gradients(then=lambda: None):
        loss = model(**batch).loss
        then()
        return torch.autograd.grad(loss, parameters)

    def of_fixed():
        with routed.context(fixed):
            loss = model(**batch).loss
        return torch.autograd.grad(loss, parameters)

    def in_fixed():
        loss = model(**batch).loss
        with routed.context(fixed):
            return torch.autograd.grad(loss, parameters)

    want, want_fixed = gradients(), of_fixed()
    assert not torch.allclose(want[0], want_fixed[0])
    model.set_grad_checkpointing()
    model.train()
    runs = []
    handle = routed.host.blocks[-1].adapters[0].register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients()
    handle.remove()
    assert len(runs) == 2, "the layer was not computed again"
    cases = [(got, want), (gradients(lambda: model(**other)), want), (in_fixed(), want), (of_fixed(), want_fixed)]
    for some, wanted in cases:
        for a, b in zip(some, wanted):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", hf_tools.HOSTS)
def test_two_threads_see_their_own_images(kind):
    model, _ = hf_tools.injected(kind)
    batches = [hf_tools.batch(kind, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        want = [model(**batch).logits for batch in batches]
    # Each waits inside the first layer until the other is there too.
    meeting, got = threading.Barrier(2, timeout=60), [None, None]

    def meet(*_):
        meeting.wait()

    def run(n):
        with torch.no_grad():
            got[n] = model(**batches[n]).logits

    handle = model.routing_host().blocks[0].adapters[0].register_forward_hook(meet)
    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("kind", hf_tools.HOSTS)
def test_a_sample_depends_on_its_own_image_and_on_no_padding(kind):
    model, _ = hf_tools.injected(kind)
    batch = hf_tools.batch(kind)
    with torch.no_grad():
        want = model(**batch).logits
        shown = {**batch, "image": torch.cat([batch["image"][:2], -batch["image"][2:]])}
        got = model(**shown).logits
        torch.testing.assert_close(got[:2], want[:2], rtol=0, atol=1e-12)
        assert (got[2] - want[2]).abs().max() > 1e-3
        hidden = batch["input_ids"].where(batch["attention_mask"] == 1, 5)
        got = model(**{**batch, "input_ids": hidden}).logits
    # What stands at a masked token is of no account, but for GPT-2's own rows there: with its prefix, from the fifth.
    rows = slice(0, 4) if kind == "gpt2" else slice(None)
    torch.testing.assert_close(got[:, rows], want[:, rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1:], want[1:], rtol=0, atol=1e-12)


def test_lora_and_adapters_together_through_checkpointing_and_copies():
    model, lora = hf_tools.injected("gpt2")
    batch = hf_tools.batch("gpt2")
    adapter = inject_routed_adapter(model, RoutedAdapterConfig(function="add", r=4, zero_init=False, share=True))
    parameters = [*lora.parameters(), *adapter.parameters()]
    want = torch.autograd.grad(model(**batch).loss, parameters)
    names = [name for routed in (lora, adapter) for name, _ in routed.named_parameters()]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.set_grad_checkpointing()
        got = torch.autograd.grad(twin.train()(**batch).loss, [twin.get_parameter(name) for name in names])
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    layer = model.text.model.transformer.h[0]
    adapter.remove()
    assert type(layer).__name__ == "RoutedGPT2Block"
    lora.remove()
    assert type(layer).__name__ == "GPT2Block" and "_rmt_enters" not in layer.__dict__


@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_folded_for_an_image(kind):
    model, routed = hf_tools.injected(kind, "add")
    one = {name: t[1:2] for name, t in hf_tools.batch(kind).items()}
    with torch.no_grad():
        torch.testing.assert_close(routed.fold_for(one["image"])(**one).logits, model(**one).logits, rtol=0, atol=1e-10)


def test_without_a_prefix_only_routing_shows_the_image():
    batch = hf_tools.batch("gpt2")
    other = {**batch, "image": -batch["image"]}
    for function, sees in (("none", False), ("mul", True)):
        model, _ = hf_tools.injected("gpt2", function, prefix=False)
        with torch.no_grad():
            a, b = model(**batch).logits, model(**other).logits
        assert a.shape == (3, 5, hf_tools.WORDS)
        assert torch.equal(a, b) != sees


@pytest.mark.parametrize("prefix", [True, False])
def test_the_captioning_loss(prefix):
    model, _ = hf_tools.injected("gpt2", prefix=prefix)
    image, ids = hf_tools.batch("gpt2")["image"], torch.randint(3, hf_tools.WORDS, (3, 4))
    ids[1, 2:] = 0
    with torch.no_grad():
        loss = model(image, ids, labels=ids, ignore_index=0).loss
        terms = []
        for n in range(3):
            for t in range(0 if prefix else 1, 4):
                if ids[n, t]:
                    logits = model(image[n : n + 1], ids[n : n + 1, : max(t, 1)]).logits
                    terms.append(-logits[0, t - (not prefix)].log_softmax(-1)[ids[n, t]])
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_roberta_embeds_once_and_reads_the_image_position():
    batch = hf_tools.batch("roberta")
    logits = []
    for double in (False, True):
        model = hf_tools.host("roberta", double_embeddings=double)
        text, ids = model.text.model, batch["input_ids"]
        with torch.no_grad():
            x_r = model.see(batch["image"])
            words = text.embeddings.word_embeddings(ids)
            if double:
                words = text.embeddings(input_ids=ids)
            embedded = torch.cat([x_r, words], 1) + text.embeddings.token_type_embeddings.weight[0]
            embedded = text.embeddings.LayerNorm(embedded + text.embeddings.position_embeddings.weight[2:8])
            mask = torch.cat([torch.ones(3, 1), batch["attention_mask"]], 1)
            for layer in text.encoder.layer:
                out = layer(embedded, (1 - mask[:, None, None]).to(embedded) * -1e9)
                embedded = out[0] if isinstance(out, tuple) else out
            want = model.head(torch.tanh(text.pooler.dense(embedded[:, 0])))
            logits.append(model(**batch).logits)
        torch.testing.assert_close(logits[-1], want, rtol=0, atol=1e-10)
    assert not torch.allclose(*logits)
