"""What a run is made of: frozen dataclasses that check themselves and go to JSON and back. Imports nothing of rmt."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

# Which weights of a vision transformer each target stands for: see `rmt.masking`.
TARGETS = ("attention", "mlp", "conv")
# The paper's names. R-AMT masks the patch convolution too, as the official code does.
PRESETS = {"ramt": ("attention", "conv"), "rmmt": ("mlp",), "rpmt": TARGETS}


class UserError(ValueError):
    """A mistake of the caller's, in one line that says what was expected and what came. The CLI prints it alone."""


def parse_targets(text: str) -> tuple[str, ...]:
    """A preset's name or targets joined by commas -> targets. Raises UserError for an unknown one."""
    targets = PRESETS.get(text) or tuple(text.split(","))
    MaskConfig(targets=targets)
    return targets


def _need(owner: object, name: str, expected: str, good: bool) -> None:
    if not good:
        raise UserError(f"{name} must be {expected}, got {getattr(owner, name)!r}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


@dataclass(frozen=True)
class MaskConfig:
    """Which weights get a mask, and its scale: a score starts at `init`, and its weight is on while > `threshold`."""

    targets: tuple[str, ...] = PRESETS["ramt"]
    init: float = 1e-2
    threshold: float = 5e-3

    def __post_init__(self) -> None:
        known = bool(self.targets) and all(target in TARGETS for target in self.targets)
        presets = ", ".join(PRESETS)
        _need(self, "targets", f"some of {', '.join(TARGETS)} (or, as text, a preset: {presets})", known)
        _need(self, "threshold", "a finite number of at least 0", _finite(self.threshold) and self.threshold >= 0)
        above = _finite(self.init) and self.init > self.threshold
        _need(self, "init", f"a finite number above threshold ({self.threshold!r}), so that all masks start on", above)


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. Defaults are the official code's for 16 shots; `strength` is the paper's lambda.

    steps: how many to take; None means `epochs` whole epochs. l2: coefficient of the sum of the scores' norms.
    """

    lr: float = 8e-5
    epochs: int = 30
    steps: int | None = None
    batch: int = 32
    strength: float = 1.0
    l2: float = 1e-4
    temperature: float = 1.0
    seed: int = 1
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            _need(self, name, "a finite number above 0", _finite(value) and value > 0)
        _need(self, "l2", "a finite number of at least 0", _finite(self.l2) and self.l2 >= 0)
        _need(self, "strength", "a number from 0 to 1", _finite(self.strength) and 0 <= self.strength <= 1)
        for name in ("epochs", "batch", "log_every"):
            _need(self, name, "an integer of at least 1", _count(getattr(self, name)))
        _need(self, "steps", "an integer of at least 1, or None", self.steps is None or _count(self.steps))
        _need(self, "seed", "an integer from 0 to 2**63 - 1", _count(self.seed, 0) and self.seed < 1 << 63)


@dataclass(frozen=True)
class RunConfig:
    """A whole run: model and data by name, then the two above. What `config.json` in a run folder holds.

    model: `local-dir:PATH`, `hf-hub:ID` or an open_clip name, the last with a `pretrained` tag or file.
    shots: training images a class, None for all. image_size: side in pixels, None for the model's own.
    """

    model: str
    data: str
    template: str = "a photo of a {}."
    pretrained: str | None = None
    shots: int | None = 16
    image_size: int | None = None
    device: str = "auto"
    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        _need(self, "template", "a text with one {} for the class name", self.template.count("{}") == 1)
        for name in ("shots", "image_size"):
            value = getattr(self, name)
            _need(self, name, "an integer of at least 1, or None", value is None or _count(value))
        has_weights = ":" in self.model or self.pretrained is not None
        _need(self, "pretrained", f"a tag or a file, since {self.model!r} names no weights", has_weights)


def to_json(config: RunConfig) -> str:
    """JSON text that `from_json` turns into an equal config."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> RunConfig:
    """Raises UserError where the text is no JSON, lacks a field, has an unknown one or a bad value."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"the config must be JSON: {error}") from error
    return _build(RunConfig, values, "config")


def _build(kind: type, values: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(values, dict) or not set(values) <= set(fields):
        got = sorted(set(values) - set(fields)) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{where} must be an object with fields of {', '.join(fields)}, got {got}")
    nested = {"mask": MaskConfig, "train": TrainConfig}
    made = {k: _build(nested[k], v, f"{where}.{k}") if k in nested else v for k, v in values.items()}
    made = {k: tuple(v) if isinstance(v, list) else v for k, v in made.items()}
    try:
        return kind(**made)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where} is incomplete or has a value of a wrong type: {error}") from error
