"""Options of routed LoRA (ReLU, split A, after-B), torch.compile, autocast, and an image folded into a plain model."""

import coca_tools
import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
)
from rmt.routing.functions import after_b, route

SITES = ("self.q", "self.k", "self.v", "cross.q")


def trained(model, std=0.1, inject=inject_routed_lora, **config):
    """An injection with no zeros in it."""
    kind = RoutedLoRAConfig if inject is inject_routed_lora else RoutedAdapterConfig
    routed = inject(model, kind(**{"r": 4} | config))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in routed.parameters():
            p.add_(std * torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.dtype))
    return routed


def rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Conv1D(nn.Module):
    """Hugging Face's, by what matters here: weight (in, out)."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(inside, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Linears(nn.Module):
    """A host without attention: a fused projection and three of its own. forward(image (B, V, 8), x (B, T, 8))."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.c_attn, self.q, self.v = Conv1D(8, 24), nn.Linear(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)
        self.body = nn.Identity()

    def routing_host(self) -> Host:
        fused = {f"self.{part}": Site(self.c_attn, "linear", part) for part in "qkv"}
        alone = {"self.q": Site(self.q, "linear"), "self.v": Site(self.v, "linear")}
        blocks = (Block((self.c_attn,), fused, (self.c_attn,)), Block((self.q, self.v), alone, (self.q, self.v)))
        return Host(8, self, blocks, lambda args, kwargs: args[0])

    def forward(self, image, x):
        return self.q(x) * self.v(x) + self.c_attn(x).unflatten(-1, (3, 8)).square().sum(-2)


def test_relu_is_of_the_score_alone():
    x_t, x_v = rows(2, 5, 4), rows(2, 3, 4, seed=1)
    want = torch.stack([(t.clamp(min=0) @ v.clamp(min=0).T) @ v for t, v in zip(x_t, x_v)])
    torch.testing.assert_close(route("gram", x_t, x_v, relu=True), want, rtol=0, atol=1e-12)
    model = coca_tools.coca(dtype=torch.float64)
    routed = trained(model, function="gram", relu=True)
    branch, image, x = model.text_decoder.resblocks[0].attn.routed_q, rows(2, 1, 32), rows(2, 5, 32, seed=2)
    with routed.context(image), torch.no_grad():
        want = route("gram", x @ branch.A.T, image @ branch.A.T, relu=True) @ branch.B[0].T
        torch.testing.assert_close(branch(x), want, rtol=0, atol=1e-10)
    with pytest.raises(UserError, match="relu is of the function gram alone, got 'mul'"):
        RoutedLoRAConfig(function="mul", relu=True)


@pytest.mark.parametrize("coupled", (False, True))
@pytest.mark.parametrize("function", FUNCTIONS[1:])
def test_split_has_a_way_down_for_each(function, coupled):
    model = coca_tools.coca(dtype=torch.float64)
    routed = trained(model, function=function, r=8, split=True, couple_qv=coupled)
    branch = getattr(model.text_decoder.resblocks[0].attn, "routed_qv" if coupled else "routed_q")
    parts = 2 if coupled else 1
    shapes = {name: tuple(p.shape) for name, p in branch.named_parameters()}
    rank = 8 * parts
    assert shapes == {
        "A_text": (rank // 4, 32), "A_image": (rank // 4, 32), "U_text": (rank, rank // 4),
        "U_image": (rank, rank // 4), "B": (parts, 32, 8),
    }  # fmt: skip
    image, x = rows(2, 1, 32), rows(2, 5, 32, seed=2)
    with routed.context(image), torch.no_grad():
        inner = route(function, x @ branch.A_text.T @ branch.U_text.T, image @ branch.A_image.T @ branch.U_image.T)
        want = torch.cat([inner[..., 8 * n : 8 * n + 8] @ branch.B[n].T for n in range(parts)], -1)
        torch.testing.assert_close(branch(x), want, rtol=0, atol=1e-10)
    for bad in ({"r": 6}, {"function": "none"}):
        with pytest.raises(UserError, match="split needs"):
            RoutedLoRAConfig(**{"r": 8, "split": True} | bad)


def test_after_b_is_a_dead_end():
    """All gradients are exactly 0 where B is 0, and nowhere else; so that a configuration of it raises."""
    a, x, image = rows(4, 8).requires_grad_(), rows(2, 5, 8, seed=1), rows(2, 1, 8, seed=2)
    for start, moves in ((torch.zeros(6, 4, dtype=torch.float64), False), (rows(6, 4, seed=3), True)):
        b = start.requires_grad_()
        out = after_b(x @ a.T, image @ a.T, b)
        for gradient in torch.autograd.grad((out - 1).square().sum(), (a, b)):
            assert bool(gradient.any()) == moves
    with pytest.raises(UserError, match="gradients are exactly 0"):
        RoutedLoRAConfig(function="gram", after_b=True)


@pytest.mark.parametrize("options", ({}, {"couple_qv": True}, {"split": True, "r": 8}), ids=lambda o: "".join(o) or "-")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_folded_for_an_image(function, options):
    if function == "none" and "split" in options:
        options = {"alpha": 9.0}
    model = coca_tools.coca(dtype=torch.float64)
    many = {"source": "tokens"} if function == "gram" else {}
    routed = trained(model, function=function, sites=SITES, **options, **many)
    images, text = coca_tools.batch(dtype=torch.float64)
    plain = {name: p.clone() for name, p in model.named_parameters() if "routed" not in name}
    with torch.no_grad():
        for n in range(2):
            folded = routed.fold_for(images[n])
            assert folded.state_dict().keys() == coca_tools.coca().state_dict().keys() and not folded.training
            assert all(type(a) is type(b) for a, b in zip(folded.modules(), coca_tools.coca().modules()))
            want = model(images[n : n + 1].expand(3, -1, -1, -1), text)["logits"]
            got = folded(images[n : n + 1].expand(3, -1, -1, -1), text)["logits"]
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
            other = folded(images[2:], text[:1])["logits"] - model(images[2:], text[:1])["logits"]
            assert (other.abs().max() > 1e-6) == (function != "none"), "another image has another update"
    assert all(torch.equal(p, plain[name]) for name, p in model.named_parameters() if name in plain)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("function", ("add", "mul", "gram"))
def test_folded_into_linears(function, bias):
    """Conv1D's transposed weight, one fused third of it, and a Linear that gets a bias by add alone."""
    torch.manual_seed(0)
    model = Linears(bias).double()
    routed = trained(model, function=function)
    image, x = rows(1, 1, 8), rows(1, 5, 8, seed=1)
    with torch.no_grad():
        want = model(image, x)
        for given in (image, image[0], image[0, 0]):
            folded = routed.fold_for(x=given)
            assert (folded.q.bias is None) == (not bias and function != "add")
            torch.testing.assert_close(folded(image, x), want, rtol=0, atol=1e-10)
    with pytest.raises(UserError, match="does not say how it encodes an image"):
        routed.fold_for(image)


def test_what_cannot_be_folded():
    model = coca_tools.coca()
    images, _ = coca_tools.batch()
    routed = trained(model)
    for given, match in (
        (lambda: routed.fold_for(images), "one image, got 3"),
        (lambda: routed.fold_for(x=torch.zeros(2, 32)), "one image, got 2"),
        (lambda: routed.fold_for(x=torch.zeros(1, 31)), "must be floating"),
        (lambda: routed.fold_for(), "takes one image, or x"),
        (lambda: routed.fold_for(images[0], x=torch.zeros(32)), "takes one image, or x"),
    ):
        with pytest.raises(UserError, match=match):
            given()
    adapter = trained(model, inject=inject_routed_adapter)
    for one in (routed, adapter):
        with pytest.raises(UserError, match="an adapter cannot be folded: its activation"):
            one.fold_for(images[0])
    adapter.remove()
    blocks = model.text_decoder.resblocks
    kept = blocks[1].attn.in_proj_weight
    blocks[1].attn.in_proj_weight = blocks[0].attn.in_proj_weight
    with pytest.raises(UserError, match="shared with another module"):
        routed.fold_for(images[0])
    blocks[1].attn.in_proj_weight = kept
    routed.remove()
    with pytest.raises(UserError, match="removed already"):
        routed.fold_for(images[0])
    with pytest.raises(UserError, match="relu cannot be folded"):
        trained(model, function="gram", relu=True).fold_for(images[0])


@pytest.mark.parametrize(("kind", "part"), (("lora", "model"), ("lora", "decoder"), ("shared adapter", "decoder")))
def test_compiled_whole_is_eager_and_a_new_image_is_no_new_graph(kind, part):
    from torch._dynamo.testing import CompileCounter

    model = coca_tools.coca(dtype=torch.float64)
    options = {"sites": SITES} if kind == "lora" else {"inject": inject_routed_adapter, "share": True}
    routed = trained(model, **options)
    image, text = coca_tools.batch(dtype=torch.float64)
    feature = rows(3, 32, seed=5)

    eagerly = model if part == "model" else model.text_decoder

    def run(called, image):
        if part == "model":
            return called(image, text)["logits"]
        with torch.no_grad():
            tokens, words = model.visual(image)[1], model.text(text)[1]
        return called(tokens, words)

    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(eagerly, backend=graphs, fullgraph=True)
    counts = []
    for shown in (image, image + 1):
        want, got = run(eagerly, shown), run(compiled, shown)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        eager, traced = (torch.autograd.grad(y.square().sum(), list(routed.parameters())) for y in (want, got))
        for a, b in zip(traced, eager):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        counts.append(graphs.frame_count)
    # The hooks of what torch.compile is given run before its graph: the mean over image tokens is one of its own.
    assert counts == ([1, 1] if part == "model" else [2, 2])
    with routed.context(feature):
        want = run(eagerly, image)
        torch.testing.assert_close(run(compiled, image), want, rtol=0, atol=1e-12)
    assert not torch.equal(want, run(eagerly, image)), "the given feature is what was routed"
    torch.testing.assert_close(run(compiled, image), run(eagerly, image), rtol=0, atol=1e-12)
    routed.remove()
    torch.testing.assert_close(run(compiled, image), run(eagerly, image), rtol=0, atol=1e-12)


def test_compiled_checkpointing():
    model = coca_tools.coca(dtype=torch.float64)
    routed = trained(model, layers=(0,))
    image, text = coca_tools.batch(dtype=torch.float64)
    with torch.no_grad():
        tokens, words = model.visual(image)[1], model.text(text)[1]
    decoder = model.text_decoder
    want = torch.autograd.grad(decoder(tokens, words).square().sum(), list(routed.parameters()))
    decoder.set_grad_checkpointing(True)
    torch._dynamo.reset()
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    loss = compiled(tokens, words).square().sum()
    compiled(tokens + 1, words)
    for a, b in zip(torch.autograd.grad(loss, list(routed.parameters())), want):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_compiled_model_is_not_injected_into():
    for model in (torch.compile(coca_tools.coca(), backend="eager"), coca_tools.coca()):
        if not hasattr(model, "_orig_mod"):
            model.text_decoder.compile(backend="eager")
        with pytest.raises(UserError, match="inject first, and compile then"):
            inject_routed_lora(model)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_and_a_model_of_16_bits(function, dtype):
    model = coca_tools.coca()
    trained(model, function=function, sites=SITES)
    image, text = coca_tools.batch()
    with torch.no_grad():
        want = model(image, text)["logits"]
        coarse = 64 * torch.finfo(dtype).eps * want.abs().max()
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(model(image, text)["logits"].float(), want, rtol=0, atol=coarse.item())
        model.to(dtype)
        assert all(p.dtype == dtype for p in model.parameters())
        model.to(dtype)(image.to(dtype), text)
        late = coca_tools.coca(dtype=dtype)
        routed = inject_routed_lora(late, RoutedLoRAConfig(function=function, r=4))
        assert {p.dtype for p in routed.parameters()} == {dtype}


def test_linear_is_peft_s_lora():
    peft = pytest.importorskip("peft", reason="the comparison needs the package peft")
    torch.manual_seed(0)
    model = Linears().double()
    twin = nn.Sequential(nn.Linear(8, 8)).double()
    twin[0].load_state_dict(model.q.state_dict())
    trained(model, function="none", layers=(1,), alpha=6.0)
    theirs = peft.get_peft_model(twin, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.0))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(model.q.routed_q.A)
        layer.lora_B["default"].weight.copy_(model.q.routed_q.B[0])
        x = rows(3, 5, 8)
        torch.testing.assert_close(model.q(x), layer(x), rtol=0, atol=1e-14)
        assert not torch.allclose(model.q(x), F.linear(x, model.q.weight, model.q.bias))
