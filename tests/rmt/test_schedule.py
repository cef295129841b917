import math

import pytest
import torch

from rmt.config import MaskConfig, TrainConfig
from rmt.schedule import REACH, adam_reach, learning_rates, plan

OFFICIAL = TrainConfig(lr=8e-5, epochs=30)
DISTANCE = 5e-3


@pytest.mark.parametrize("steps, spe", [(None, 4), (10, 4), (3, 4), (7, 1), (None, 1)])
def test_rates_are_those_of_cosine_annealing_stepped_once_an_epoch(steps, spe):
    rates = learning_rates(TrainConfig(lr=0.3, epochs=None if steps else 6, steps=steps), spe)
    epochs = 6 if steps is None else -(-steps // spe)
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    want = []
    for _ in range(epochs):
        want += [optimizer.param_groups[0]["lr"]] * spe
        optimizer.step()
        schedule.step()
    assert len(rates) == (steps or 6 * spe)
    assert rates == pytest.approx(want[: len(rates)])


@pytest.mark.parametrize("spe, reach", [(1, 1.31e-3), (2, 2.89e-3), (3, 4.81e-3), (4, 7.04e-3), (5, 9.55e-3)])
def test_reach_of_the_official_recipe(spe, reach):
    """The bounds that method.md 1.5 derives for lr 8e-5 and 30 epochs."""
    assert adam_reach(learning_rates(OFFICIAL, spe)) == pytest.approx(reach, abs=5e-6)


def adam_travel(gradients, rates):
    x = torch.zeros(gradients.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([x], eps=0.0)
    for gradient, rate in zip(gradients, rates):
        optimizer.param_groups[0]["lr"], x.grad = rate, gradient
        optimizer.step()
    return x.detach().abs()


def test_no_gradient_moves_adam_beyond_its_reach():
    rates = learning_rates(TrainConfig(lr=1e-3, epochs=20), 2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(rates), 1000, generator=generator)
    growing = torch.linspace(-0.3, 0.6, 200)[None] * torch.arange(len(rates))[:, None]
    gradients = torch.cat([noise, noise.abs(), noise.exp() ** 3, growing.exp(), torch.ones(len(rates), 1)], 1)
    travel = adam_travel(gradients, rates)
    assert travel.max() <= adam_reach(rates)
    assert travel.max() > 0.85 * adam_reach(rates), "a bound that nothing comes near says little"
    assert travel[-1] == pytest.approx(sum(rates), rel=1e-4)


@pytest.mark.parametrize("spe", [1, 2, 3, 5, 7])
def test_auto_stretches_a_run_that_is_too_short(spe):
    made = plan(OFFICIAL, MaskConfig(), spe, stretch=True)
    epochs = len(made.rates) // spe
    assert len(made.rates) == epochs * spe and sum(made.rates) >= REACH * DISTANCE
    assert sum(learning_rates(TrainConfig(lr=8e-5, epochs=epochs - 1), spe)) < REACH * DISTANCE
    assert f"stretched to {epochs} epochs" in made.message
    assert made.message.startswith("no mask can flip in" if spe <= 3 else "few masks can flip in")


@pytest.mark.parametrize(
    "config, stretch",
    [
        (TrainConfig(lr=8e-5, epochs=30, schedule="paper"), True),
        (OFFICIAL, False),
        (TrainConfig(lr=8e-5, steps=60), True),
    ],
)
def test_a_length_that_was_asked_for_is_kept_and_said_to_be_too_short(config, stretch):
    made = plan(config, MaskConfig(), 2, stretch=stretch)
    assert len(made.rates) == 60 and made.message.startswith("no mask can flip in 60 steps")


def test_a_long_run_is_left_as_it_is():
    made = plan(OFFICIAL, MaskConfig(), 50, stretch=True)
    assert made.message is None and made.rates == learning_rates(OFFICIAL, 50)
    assert made.rates[0] == 8e-5 and made.rates[-1] == 8e-5 * (1 + math.cos(math.pi * 29 / 30)) / 2


@pytest.mark.parametrize("spe", [1, 2, 5])
def test_first_scores_that_are_spread_to_the_threshold_have_no_way_to_fall(spe):
    made = plan(OFFICIAL, MaskConfig(spread=1.0), spe, stretch=True)
    assert made.message is None and made.rates == learning_rates(OFFICIAL, spe)


def test_with_a_little_spread_the_way_is_that_of_the_lowest_score():
    made = plan(OFFICIAL, MaskConfig(spread=0.5), 1, stretch=True)
    assert REACH * DISTANCE / 2 <= sum(made.rates) < 1.1 * REACH * DISTANCE / 2
    assert "has 0.0025 to fall from the lowest first score to threshold: stretched to" in made.message
    assert plan(OFFICIAL, MaskConfig(spread=0.5), 2, stretch=False).message is None, "0.0029 reach 0.0025"
