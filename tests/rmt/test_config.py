import pytest

from rmt.config import MaskConfig, RunConfig, SelectConfig, TrainConfig, UserError, from_yaml, resolve, to_yaml

CONFIG = RunConfig(
    model="local-dir:x", data="/home/me/pets", template="a {}.", mask=MaskConfig(("conv", "mlp"), init=0.02),
    select=SelectConfig("snip", 0.2), train=TrainConfig(lr=1e-3, steps=7, strength=0.3),
)  # fmt: skip
GIVEN = "model: local-dir:x\ndata: y\n"


def test_config_goes_to_yaml_and_back():
    assert from_yaml(to_yaml(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "must be YAML"),
        ("[]", "must be an object"),
        ("model: local-dir:x", "a run needs data, or root and dataset"),
        ("data: x", "incomplete"),
        (GIVEN + "speed: 3", r"got \['speed'\]"),
        (GIVEN + "train: {lr: x}", "lr must be a finite number above 0, or None, got 'x'"),
        (GIVEN + "template: a photo", "template must be a text with one {}"),
        ("model: ViT-B-32\ndata: y", "pretrained must be a tag or a file"),
        (GIVEN + "mask: {targets: [bias]}", "targets must be some of"),
        (GIVEN + "mask: {init: 0.005}", "init must be a finite number above thr"),
    ],
)  # fmt: skip
def test_config_says_what_it_expected_and_what_came(text, message):
    with pytest.raises(UserError, match=message):
        from_yaml(text)


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0.0), ("lr", float("nan")), ("epochs", 0), ("steps", 0), ("batch", 1.5), ("strength", 1.1),
        ("strength", -0.1), ("l2", -1e-4), ("temperature", 0), ("log_every", 0), ("accumulate", True),
    ],
)  # fmt: skip
def test_train_config_refuses_bad_values(name, value):
    with pytest.raises(UserError, match=f"{name} must be .*, got {value!r}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("value", [-1, True, 1 << 63])
def test_run_config_refuses_bad_seeds(value):
    with pytest.raises(UserError, match=f"seed must be .*, got {value!r}"):
        RunConfig(model="local-dir:x", data="y", seed=value)


@pytest.mark.parametrize(
    "change, lr, epochs, strength",
    [
        ({}, 8e-5, 30, 0.3),
        ({"shots": 8}, 8e-5, 30, 1.0),
        ({"shots": "all"}, 8e-5, 30, 1.0),
        ({"classes": "base"}, 8e-5, 30, 1.0),
        ({"dataset": "sun397"}, 8e-5, 30, 1.0),
        ({"dataset": "food101"}, 8e-5, 30, 1.0),
        ({"dataset": "imagenet"}, 3e-5, 10, 1.0),
        ({"preset": "amt", "shots": 1}, 8e-5, 30, 0.0),
        ({"train": TrainConfig(lr=1e-3, steps=7, strength=0.5), "preset": "amt"}, 1e-3, None, 0.5),
    ],
)
def test_the_official_recipe_fills_what_is_left_open(change, lr, epochs, strength):
    config = resolve(RunConfig(**{"model": "local-dir:m", "root": "r", "dataset": "dtd"} | change))
    assert (config.train.lr, config.train.epochs, config.train.strength) == (lr, epochs, strength)
    assert resolve(config) == config


@pytest.mark.parametrize(
    "preset, targets",
    [
        ("ramt", ("attention", "conv")),
        ("amt", ("attention", "conv")),
        ("rmmt", ("mlp",)),
        ("rpmt", ("attention", "mlp", "conv")),
    ],
)
def test_presets_name_their_targets(preset, targets):
    config = RunConfig("local-dir:m", data="d", preset=preset)
    assert resolve(config).mask.targets == targets
    own = RunConfig("local-dir:m", data="d", preset=preset, mask=MaskConfig(targets=("conv",)))
    assert resolve(own).mask.targets == ("conv",)
    named = RunConfig("local-dir:m", data="d", preset=preset, mask=MaskConfig(modules=("a.*",)))
    assert resolve(named).mask.targets is None
