"""Routed LoRA in CoCa: a no-op at first, the formula per sample, checkpointing, and out again bit for bit."""

import coca_tools
import pytest
import torch

from rmt import UserError
from rmt.routing import FUNCTIONS, RoutedLoRAConfig, inject_routed_lora, load_routed, matrix, route

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
