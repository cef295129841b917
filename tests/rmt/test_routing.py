"""Routed LoRA in CoCa: a no-op at first, the formula per sample, checkpointing, and out again bit for bit."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import coca_tools
import open_clip
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rmt import UserError
from rmt.routing import (
    FUNCTIONS,
    Block,
    Host,
    RoutedAdapterConfig,
    RoutedLoRAConfig,
    Site,
    inject_routed_adapter,
    inject_routed_lora,
    load_routed,
    matrix,
    route,
)
from rmt.routing.context import VisualContext
from rmt.routing.layers import Adapter, LowRank

SITES = ("self.q", "self.v", "cross.q")


def injected(function, dtype=torch.float32, std=0.1, **options):
    model = coca_tools.coca(dtype=dtype)
    routed = inject_routed_lora(model, RoutedLoRAConfig(function=function, r=4, sites=SITES, **options))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in routed.named_parameters():
            if name.endswith(".B"):
                p.copy_(std * torch.randn(p.shape, generator=random))
    return model, routed


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_affine_map_is_the_function(function):
    random = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, 5, 4, dtype=torch.float64, generator=random)
    x_v = torch.randn(3, 2 if function == "gram" else 1, 4, dtype=torch.float64, generator=random)
    m, c = matrix(function, x_v)
    torch.testing.assert_close(route(function, x_t, x_v), x_t @ m.mT + c[:, None], rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_no_op_at_first_and_removed_bit_for_bit(function):
    model = coca_tools.coca()
    image, text = coca_tools.batch()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trained = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        want = model(image, text)["logits"]
    routed = inject_routed_lora(model, RoutedLoRAConfig(function=function, r=4, sites=SITES))
    logits = model(image, text)["logits"]
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-5)
    logits.logsumexp(-1).mean().backward()
    assert {p for p in model.parameters() if p.requires_grad} == set(routed.parameters())
    for name, p in routed.named_parameters():
        assert bool(p.grad.any()) == name.endswith(".B"), name
    routed.remove()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], t) for name, t in before.items())
    assert [p.requires_grad for p in model.parameters()] == trained
    with torch.no_grad():
        assert torch.equal(model(image, text)["logits"], want)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_checkpointing_computes_again_with_the_image_of_its_call(function):
    """Also where another image has been shown before the backward pass."""
    model, routed = injected(function, torch.float64)
    image, text = coca_tools.batch(dtype=torch.float64)

    def gradients(then=lambda: None):
        loss = model(image, text)["logits"].logsumexp(-1).mean()
        then()
        return torch.autograd.grad(loss, list(routed.parameters()))

    want = gradients()
    model.set_grad_checkpointing(True)
    model.train()
    for got in (gradients(), gradients(lambda: model(image + 1, text)), gradients(lambda: model(image[:1], text[:1]))):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_without_an_image_it_raises():
    model, _ = injected("mul")
    tokens = torch.randn(2, 4, coca_tools.WIDTH)
    with pytest.raises(UserError, match="without a visual context"):
        model.text_decoder.resblocks[0](tokens)


def test_saved_and_loaded(tmp_path):
    model, routed = injected("gram", couple_qv=True)
    image, text = coca_tools.batch()
    with torch.no_grad():
        want = model(image, text)["logits"]
    routed.save(tmp_path / "routed")
    other = coca_tools.coca()
    load_routed(other, tmp_path / "routed")
    with torch.no_grad():
        assert torch.equal(other(image, text)["logits"], want)


def test_removal_in_order():
    model, routed = injected("add")
    with pytest.raises(UserError, match="has routed lora already"):
        inject_routed_lora(model)
    routed.remove()
    with pytest.raises(UserError, match="removed already"):
        routed.remove()


def oracle(model, image, text):
    """Logits of a CoCa with routed LoRA, sample by sample: plain torch over W + scale B M A and b + scale B c."""
    tokens, words = model.visual(image)[1], model.text(text)[1][:, :-1]
    decoder, out = model.text_decoder, []
    for x, seen in zip(words, tokens):
        causal = decoder.attn_mask[: len(x), : len(x)]
        for block, cross in zip(decoder.resblocks, decoder.cross_attn):
            y = block.ln_1(x)
            x = x + oracle_attention(block.attn, y, y, seen.mean(0), causal)
            x = x + block.mlp(block.ln_2(x))
            x = x + oracle_attention(cross.attn, cross.ln_1(x), cross.ln_1_kv(seen), seen.mean(0), 0)
            x = x + cross.mlp(cross.ln_2(x))
        out.append(decoder.ln_final(x) @ decoder.text_projection)
    return torch.stack(out)


def oracle_attention(attn, x, seen, x_r, bias):
    weights, biases = list(attn.in_proj_weight.chunk(3)), list(attn.in_proj_bias.chunk(3))
    for n, part in enumerate("qkv"):
        branch = getattr(attn, f"routed_{part}", None)
        if branch is not None:
            a, b = branch.A, branch.B[0]
            v, ones = a @ x_r, torch.ones(len(a), dtype=x.dtype)
            m = {
                "none": torch.eye(len(a), dtype=x.dtype), "add": torch.eye(len(a), dtype=x.dtype), "mul": v.diag(),
                "expand": torch.outer(v, ones), "gram": torch.outer(v, v),
            }[branch.function]  # fmt: skip
            weights[n] = weights[n] + branch.scale * b @ m @ a
            biases[n] = biases[n] + branch.scale * (b @ v if branch.function == "add" else 0)
    q, k, v = (x @ weights[0].T + biases[0], seen @ weights[1].T + biases[1], seen @ weights[2].T + biases[2])
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(0, 1) for t in (q, k, v))
    y = ((q @ k.mT) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
    return attn.out_proj(y.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_whole_decoder_per_sample(function):
    model, _ = injected(function, torch.float64, alpha=6.0)
    image, text = coca_tools.batch(dtype=torch.float64)
    with torch.no_grad():
        got = model(image, text)["logits"]
        torch.testing.assert_close(got, oracle(model, image, text), rtol=0, atol=1e-10)
        plain = coca_tools.coca(dtype=torch.float64)(image, text)["logits"]
    assert (got - plain).abs().max() > 1e-5


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind", ("lora", "adapter"))
def test_gradients(function, kind):
    random = torch.Generator().manual_seed(2)
    context = VisualContext(3, True)
    if kind == "lora":
        layer = LowRank(3, 5, RoutedLoRAConfig(function=function, r=2, alpha=3.0), context).double()
    else:
        layer = Adapter(3, RoutedAdapterConfig(function=function, r=2), context).double()
    names, start = zip(*[(n, torch.randn(p.shape, generator=random).double()) for n, p in layer.named_parameters()])
    x, image = (torch.randn(2, t, 3, generator=random, dtype=torch.float64) for t in (4, 1))

    def f(x, image, *values):
        with context.set(image):
            return torch.func.functional_call(layer, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (x, image, *start)])


def branch_of(function):
    model, routed = injected(function, torch.float64)
    return model.text_decoder.resblocks[0].attn.routed_q, routed, torch.randn(2, 5, 32, dtype=torch.float64)


def test_identities_are_plain_lora_bit_for_bit():
    """mul with x_v = 1, add with x_v = 0: at one branch, and gone through the decoder."""
    x_t = torch.randn(3, 5, 4)
    assert torch.equal(route("mul", x_t, torch.ones(3, 1, 4)), x_t)
    assert torch.equal(route("add", x_t, torch.zeros(3, 1, 4)), x_t)
    image, text = coca_tools.batch()
    model, _ = injected("none")
    with torch.no_grad():
        want = model(image, text)["logits"]
        for function, feature in (("mul", 1.0), ("add", 0.0)):
            other, routed = injected(function)
            for name, branch in other.named_modules():
                if isinstance(branch, LowRank):
                    # A row of A that sums to one at the feature of ones, exactly: 2^-k steps.
                    branch.A.copy_((branch.A * 64).round() / 64)
                    branch.A[:, -1] += feature - branch.A.sum(1) if feature else 0
                    model.get_submodule(name).A.copy_(branch.A)
            want = model(image, text)["logits"]
            with routed.context(torch.full((3, coca_tools.WIDTH), feature)):
                assert torch.equal(other(image, text)["logits"], want), function
            assert not torch.equal(other(image, text)["logits"], want), function


@pytest.mark.parametrize(("function", "sign"), (("gram", 1), ("mul", -1), ("expand", -1)))
def test_parity_in_the_image(function, sign):
    branch, routed, x = branch_of(function)
    image = torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        with routed.context(image):
            want = branch(x)
        with routed.context(-image):
            torch.testing.assert_close(branch(x), sign * want, rtol=0, atol=1e-12)
    assert want.abs().max() > 1e-6


@pytest.mark.parametrize(("function", "rank"), (("none", 4), ("add", 4), ("mul", 4), ("expand", 1), ("gram", 1)))
def test_rank_over_tokens(function, rank):
    branch, routed, x = branch_of(function)
    with torch.no_grad(), routed.context(torch.randn(2, 32, dtype=torch.float64)):
        assert torch.linalg.matrix_rank(branch(x), rtol=1e-9).tolist() == [rank, rank]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_samples_know_nothing_of_each_other_nor_tokens_of_later_ones(function):
    model, _ = injected(function, torch.float64)
    image, text = coca_tools.batch(dtype=torch.float64)
    with torch.no_grad():
        want = model(image, text)["logits"]
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(model(image[order], text[order])["logits"], want[order], rtol=0, atol=1e-12)
        changed = image.clone()
        changed[1] += 1
        apart = (model(changed, text)["logits"] - want).abs().amax((1, 2))
        assert apart[1] > 1e-6 and apart[[0, 2]].max() < 1e-12
        later = text.clone()
        later[:, 4] = later[:, 4] % (coca_tools.WORDS - 1) + 1
        apart = (model(image, later)["logits"] - want).abs().amax((0, 2))
        assert apart[:4].max() < 1e-12 and apart[4] > 1e-6


@pytest.mark.parametrize("source", ("mean", "first", "tokens"))
def test_sources(source):
    model, routed = injected("gram", torch.float64, source=source)
    image, text = coca_tools.batch(dtype=torch.float64)
    with torch.no_grad():
        want, tokens = model(image, text)["logits"], model.visual(image)[1]
        assert tokens.shape[1] > 1
        given = {"mean": tokens.mean(1), "first": tokens[:, 0], "tokens": tokens}[source]
        with routed.context(given):
            torch.testing.assert_close(model(image, text)["logits"], want, rtol=0, atol=1e-12)


def test_beams_see_their_own_image():
    """A call with every image repeated, as beam search makes it, is the call without beams repeated."""
    model, _ = injected("mul", torch.float64)
    image, text = coca_tools.batch(dtype=torch.float64)
    with torch.no_grad():
        want = model(image, text)["logits"].repeat_interleave(4, 0)
        tokens = model.visual(image)[1].repeat_interleave(4, 0)
        words = model.text(text)[1][:, :-1].repeat_interleave(4, 0)
        torch.testing.assert_close(model.text_decoder(tokens, words), want, rtol=0, atol=1e-12)


def greedy(model, image, length, start=1):
    text = torch.full((len(image), 1), start)
    with torch.no_grad():
        while text.shape[1] < length:
            logits = model(image, text, output_labels=False)["logits"][:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
    return text


def test_generate_is_the_loop_and_the_folded_model_s():
    from open_clip import coca_model

    if not coca_model._has_transformers:
        pytest.skip(f"open_clip {open_clip.__version__} finds no transformers that its generate can use")
    model, routed = injected("mul", std=1.0)
    image, _ = coca_tools.batch()
    options = {"seq_len": 6, "min_seq_len": 1, "sot_token_id": 1, "eos_token_id": 99, "pad_token_id": 0}
    beams = model.generate(image, generation_type="beam_search", num_beams=6, num_beam_groups=3, **options)
    top = model.generate(image, generation_type="top_k", top_k=1, fixed_output_length=True, **options)
    want = greedy(model, image, top.shape[1])
    ended = (want == 99).cumsum(1) > 0
    assert torch.equal(torch.where(ended, 0, top), torch.where(ended, 0, want)) and len(beams) == 3
    for n in range(3):
        folded = routed.fold_for(image[n])
        alone = folded.generate(
            image[n : n + 1], generation_type="beam_search", num_beams=6, num_beam_groups=3, **options
        )
        assert torch.equal(alone[0], beams[n][: alone.shape[1]])


def test_folded_decoding_word_by_word():
    model, routed = injected("mul", std=1.0)
    image, _ = coca_tools.batch()
    want = greedy(model, image, 7)
    assert len({tuple(row) for row in want.tolist()}) > 1
    for n in range(3):
        assert torch.equal(greedy(routed.fold_for(image[n]), image[n : n + 1], 7)[0], want[n])


@pytest.mark.parametrize(
    "copied", (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))), ids=("copy", "pickle")
)
@pytest.mark.parametrize("kind", ("lora", "both"))
def test_a_copy_is_routed_by_itself(copied, kind):
    model, _ = injected("mul", std=0.5)
    if kind == "both":
        inject_routed_adapter(model, RoutedAdapterConfig(r=4, share=True, zero_init=False))
    image, text = coca_tools.batch()
    plain, twin = coca_tools.coca(), copied(model)
    with torch.no_grad():
        want = model(image, text)["logits"]
        assert torch.equal(twin(image, text)["logits"], want)
        for routed in reversed(list(twin.__dict__["_rmt_routed"])):
            assert routed.model is twin
            own = {id(p) for p in twin.parameters()}
            assert all(id(p) in own for p in routed.parameters())
            routed.remove()
        assert torch.equal(twin(image, text)["logits"], plain(image, text)["logits"])
        assert torch.equal(model(image, text)["logits"], want), "the original is as it was"


def test_threads_have_images_of_their_own():
    model, _ = injected("mul", torch.float64)
    image, text = coca_tools.batch(8, dtype=torch.float64)
    want = model(image, text)["logits"].detach()
    inside = threading.Barrier(2)

    def wait(*_):
        inside.wait(10)

    model.text_decoder.cross_attn[0].register_forward_pre_hook(wait)

    def run(rows):
        with torch.no_grad():
            return model(image[rows], text[rows])["logits"]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (slice(0, 3), slice(3, 8)))
    torch.testing.assert_close(torch.cat([first, second]), want, rtol=0, atol=1e-12)


def test_replicas_as_data_parallelism_makes_them():
    """torch.nn.parallel.replicate, on one device: shallow copies with tensors for parameters, each in a thread."""
    model, routed = injected("mul", torch.float64)
    inject_routed_adapter(model, RoutedAdapterConfig(r=4, share=True, zero_init=False))
    image, text = coca_tools.batch(4, dtype=torch.float64)
    want = torch.autograd.grad(model(image, text)["logits"].square().sum(), list(routed.parameters()))

    def replica():
        twins = {m: m._replicate_for_data_parallel() for m in model.modules()}
        for m, twin in twins.items():
            for name, child in m._modules.items():
                twin._modules[name] = None if child is None else twins[child]
            for name, p in m._parameters.items():
                if p is None:
                    twin._parameters[name] = None
                else:
                    setattr(twin, name, p.clone())
        return twins[model]

    pair = [replica(), replica()]
    with ThreadPoolExecutor(2) as pool:
        outs = list(pool.map(lambda n: pair[n](image[2 * n : 2 * n + 2], text[2 * n : 2 * n + 2])["logits"], range(2)))
    for a, b in zip(torch.autograd.grad(torch.cat(outs).square().sum(), list(routed.parameters())), want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_whole_call_checkpointed():
    model, routed = injected("mul", torch.float64)
    image, text = coca_tools.batch(dtype=torch.float64)
    want = torch.autograd.grad(model(image, text)["logits"].square().sum(), list(routed.parameters()))

    def run():
        logits = checkpoint(lambda *given: model(*given)["logits"], image, text, use_reentrant=False)
        model(image + 1, text)
        return torch.autograd.grad(logits.square().sum(), list(routed.parameters()))

    for a, b in zip(run(), want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    model.train().set_grad_checkpointing(True)
    with pytest.raises(UserError, match="not lie within another"):
        run()


def test_one_tensor_with_two_images_is_not_guessed():
    model, routed = injected("mul")
    block, x = model.text_decoder.resblocks[0], torch.randn(2, 4, coca_tools.WIDTH)
    losses = []
    for n in range(2):
        with routed.context(torch.full((2, coca_tools.WIDTH), float(n))):
            losses.append(checkpoint(block, x, use_reentrant=False).sum())
    with pytest.raises(UserError, match="went with two images"):
        losses[0].backward()
    assert copy.deepcopy(x)._rmt_visual == {}, "a copy is another tensor: it has no image"


def test_an_error_inside_a_call_leaves_no_image_behind():
    model, routed = injected("mul")
    image, text = coca_tools.batch()
    block = model.text_decoder.resblocks[0]
    want = model(image, text)["logits"]

    def fail(*_):
        raise RuntimeError("inside")

    for module in (model.text_decoder.cross_attn[1], block.attn, model.text_decoder):
        handle = module.register_forward_pre_hook(fail, prepend=True)
        with routed.context(torch.zeros(3, coca_tools.WIDTH)):
            before = routed.context_of_calls.frame
            with pytest.raises(RuntimeError, match="inside"):
                model(image, text)
            assert routed.context_of_calls.frame is before, "what was around the call is so still"
        with pytest.raises(RuntimeError, match="inside"):
            model(image, text)
        handle.remove()
        assert routed.context_of_calls.frame is None
        with pytest.raises(UserError, match="without a visual context"):
            block(torch.randn(3, 4, coca_tools.WIDTH))
    assert torch.equal(model(image, text)["logits"], want)


def test_a_call_within_a_call():
    model, _ = injected("mul")
    image, text = coca_tools.batch()
    want, inner = (model(shown, text)["logits"].detach() for shown in (image, image + 1))
    seen = []

    def once(*_):
        handle.remove()
        seen.append(model(image + 1, text)["logits"])

    handle = model.text_decoder.cross_attn[0].register_forward_pre_hook(once)
    assert torch.equal(model(image, text)["logits"], want) and torch.equal(seen[0], inner)


def test_a_shared_adapter_is_counted_and_named_once(tmp_path, capsys):
    def made():
        model = coca_tools.coca()
        return model, inject_routed_adapter(model, RoutedAdapterConfig(r=4, share=True, zero_init=False))

    model, routed = made()
    block = model.text_decoder.resblocks[0]
    assert block.attn.routed_adapter is block.mlp.routed_adapter
    names = [name for name, _ in routed.named_parameters()]
    assert len(names) == len(set(names)) == 2 * 4 and len(set(map(id, routed.parameters()))) == 8
    assert set(names) <= set(model.state_dict()) and set(names) <= {name for name, _ in model.named_parameters()}
    torch.optim.AdamW(routed.parameters())
    routed.print_trainable_parameters()
    count = 2 * (2 * 32 * 4 + 32 + 4)
    assert f"{count:,} of {sum(p.numel() for p in model.parameters()):,}" in capsys.readouterr().out
    image, text = coca_tools.batch()
    routed.save(tmp_path / "shared")
    other = coca_tools.coca()
    load_routed(other, tmp_path / "shared")
    with torch.no_grad():
        assert torch.equal(other(image, text)["logits"], model(image, text)["logits"])
    assert all(torch.equal(a, b) for a, b in zip(routed.parameters(), made()[1].parameters())), "by the seed"
    routed.remove()
    assert model.state_dict().keys() == coca_tools.coca().state_dict().keys()


def test_layers_and_coupling():
    model, routed = injected("gram", torch.float64, layers=(1,), couple_qv=True)
    assert {name.split(".")[2] for name, _ in routed.named_parameters()} == {"1"}
    attn, x = model.text_decoder.resblocks[1].attn, torch.randn(2, 5, 32, dtype=torch.float64)
    image = torch.randn(2, 1, 32, dtype=torch.float64)
    branch = attn.routed_qv
    with routed.context(image), torch.no_grad():
        q, v = branch(x).chunk(2, -1)
        inner = route("gram", x @ branch.A.T, image @ branch.A.T)
    torch.testing.assert_close(q, inner[..., :4] @ branch.B[0].T, rtol=0, atol=1e-12)
    torch.testing.assert_close(v, inner[..., 4:] @ branch.B[1].T, rtol=0, atol=1e-12)


def test_lora_and_adapters_train_side_by_side_and_go_in_order():
    model, lora = injected("mul")
    adapter = inject_routed_adapter(model, RoutedAdapterConfig(r=4))
    assert {p for p in model.parameters() if p.requires_grad} == {*lora.parameters(), *adapter.parameters()}
    with pytest.raises(UserError, match="routed adapter was injected after this lora"):
        lora.remove()
    adapter.remove()
    assert {p for p in model.parameters() if p.requires_grad} == set(lora.parameters())
    lora.remove()
    assert all(p.requires_grad for p in model.parameters()) and "_rmt_routed" not in model.__dict__


def test_branches_have_their_module_s_dtype():
    model = coca_tools.coca()
    model.text_decoder.double()
    routed = inject_routed_lora(model, RoutedLoRAConfig(r=4))
    assert {p.dtype for p in routed.parameters()} == {torch.float64}


class Own(torch.nn.Module):
    """Attention with a forward of its own, as open_clip main's."""

    def __init__(self, parts, honest=True):
        super().__init__()
        self.in_proj_weight, self.parts = torch.nn.Parameter(torch.randn(24, 8, dtype=torch.float64)), parts
        self.honest = honest

    def forward(self, x):
        if not self.honest:
            return x @ self.in_proj_weight.T
        if self.parts:
            return torch.cat([torch.nn.functional.linear(x, w) for w in self.in_proj_weight.chunk(3)], -1)
        return torch.nn.functional.linear(x, self.in_proj_weight)


class OwnHost(torch.nn.Module):
    def __init__(self, *options):
        super().__init__()
        self.attn = Own(*options)

    def routing_host(self):
        sites = {f"self.{part}": Site(self.attn, "packed", part) for part in "qkv"}
        return Host(8, self, (Block((self.attn,), sites, (self.attn,)),), lambda args, kwargs: args[0])

    def forward(self, image, x):
        return self.attn(x)


@pytest.mark.parametrize("parts", (False, True))
@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode, torch.enable_grad))
def test_attention_with_a_forward_of_its_own(parts, mode):
    model = OwnHost(parts)
    routed = inject_routed_lora(model, RoutedLoRAConfig(r=4))
    image, x = (torch.randn(2, t, 8, dtype=torch.float64) for t in (1, 5))
    want = model(image, x).detach()
    with torch.no_grad():
        model.attn.routed_v.B.normal_()
        with routed.context(image):
            want[..., 16:] += model.attn.routed_v(x)
    with mode():
        torch.testing.assert_close(model(image, x), want, rtol=0, atol=1e-12)
    blind = OwnHost(parts, False)
    inject_routed_lora(blind, RoutedLoRAConfig(r=4))
    with pytest.raises(UserError, match="routed_q was left out"):
        blind(image, x)


def test_bad_contexts():
    model, routed = injected("mul")
    image, text = coca_tools.batch()
    many, tokens = injected("gram", source="tokens"), torch.randn(3, 4, coca_tools.WIDTH)
    for x, match in (
        (torch.zeros(3, 31), r"\(B, 32\) or \(B, V, 32\), got torch.float32 \(3, 31\)"),
        (torch.zeros(32), r"got torch.float32 \(32,\)"),
        (torch.zeros(3, 32, dtype=torch.int64), "must be floating"),
        ("image", "got str"),
        (tokens, "takes one visual token, got 4"),
    ):
        with pytest.raises(UserError, match=match), routed.context(x):
            pass
    with many[1].context(tokens), torch.no_grad():
        many[0](image, text)
    for x, match in ((torch.zeros(2, 32), "3 on cpu, got 2 on cpu"), (torch.zeros(3, 32, device="meta"), "3 on meta")):
        with pytest.raises(UserError, match=match), routed.context(x):
            model(image, text)
    assert routed.context_of_calls.frame is None


def test_bad_configurations_leave_the_model_alone():
    model = coca_tools.coca()
    plain = model.__dict__.keys() | set(), dict(model.named_modules()), [type(m) for m in model.modules()]
    for make, match in (
        (lambda: RoutedLoRAConfig(sites=("self.o",)), "sites must be some of"),
        (lambda: RoutedLoRAConfig(sites=("self.q", "self.q")), "each site once"),
        (lambda: RoutedLoRAConfig(source="tokens"), "source tokens needs"),
        (lambda: RoutedLoRAConfig(layers=(True,)), "layers must be numbers"),
        (lambda: RoutedLoRAConfig(layers=()), "layers must be numbers"),
        (lambda: RoutedLoRAConfig(couple_qv=True, sites=("self.q",)), "couple_qv needs the sites"),
        (lambda: inject_routed_lora(model, RoutedLoRAConfig(layers=(2,))), "layers must be from 0 to 1, got 2"),
        (lambda: inject_routed_lora(torch.nn.Linear(2, 2)), "Linear is no host"),
        (lambda: inject_routed_lora(OwnHost(False), RoutedLoRAConfig(sites=("cross.q",))), "no site cross.q: it has"),
    ):
        with pytest.raises(UserError, match=match):
            make()
    model.text_decoder.resblocks[1].attn.add_zero_attn = True
    with pytest.raises(UserError, match="without add_bias_kv and add_zero_attn"):
        inject_routed_lora(model)
    assert (model.__dict__.keys(), dict(model.named_modules()), [type(m) for m in model.modules()]) == plain
    assert all(p.requires_grad for p in model.parameters())
