"""A blind visual question: with the image reaching the model through routing alone, plain LoRA is at chance and every
routing function answers; gram, which is even in the image, only where images have more than a sign.

bench/routing_blind.py prints the table. Of ten seeds (gram: five) none was below 0.998 where the
answer can be had, and each was at 0.5000 where it cannot (gram: five).
"""

import blind_tools
import pytest
import torch

from rmt.routing import RoutedLoRAConfig, inject_routed_lora

SEEDS = (0, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "mean"), [("add", 0.0), ("mul", 0.0), ("expand", 0.0), ("gram", 1.0)], ids=lambda value: str(value)
)
def test_the_image_is_seen(function, mean):
    for seed in SEEDS:
        assert blind_tools.accuracy(function, seed, mean) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("function", "mean"), [("none", 0.0), ("gram", 0.0)], ids=lambda value: str(value))
def test_at_chance(function, mean):
    for seed in SEEDS:
        assert blind_tools.accuracy(function, seed, mean) < 0.6


def test_nothing_but_routing_reads_the_image():
    model = blind_tools.Blind()
    question, image, answer = blind_tools.Task.draw(torch.Generator().manual_seed(0), 0.0).everything()
    assert answer.float().mean() == 0.5
    assert torch.equal(model(question, image), model(question, -image))


@pytest.mark.parametrize("function", ["add", "mul", "expand", "gram"])
def test_gram_alone_cannot_tell_an_image_from_its_negative(function):
    model = blind_tools.Blind()
    routed = inject_routed_lora(model, RoutedLoRAConfig(function=function, r=blind_tools.RANK))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in routed.parameters():
            p.copy_(torch.randn(p.shape, generator=random) / 8)
        question, image, _ = blind_tools.Task.draw(random, 0.0).batch(50, random)
        same = torch.allclose(model(question, image), model(question, -image), rtol=0, atol=1e-4)
    assert same == (function == "gram")
