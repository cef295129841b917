import pytest

from rmt.config import MaskConfig, RunConfig, SelectConfig, TrainConfig, UserError, from_yaml, to_yaml

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
