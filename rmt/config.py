"""What a run is made of: frozen dataclasses that check themselves and go to YAML and back. Imports nothing of rmt."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# Which weights of a tower each target stands for: see `rmt.masking`.
TARGETS = ("attention", "mlp", "conv")
TOWERS = ("image", "text")
CRITERIA = ("magnitude", "lamp", "snip", "taylor", "fisher", "spt", "multiflow", "influence")


class Preset(NamedTuple):
    """The paper's name for a choice of targets. strength None: what the recipe says for data set and shots."""

    targets: tuple[str, ...]
    strength: float | None


# R-AMT masks the patch convolution too, as the official code does.
PRESETS = {
    "ramt": Preset(("attention", "conv"), None),
    "amt": Preset(("attention", "conv"), 0.0),
    "rmmt": Preset(("mlp",), None),
    "rpmt": Preset(TARGETS, None),
}


class UserError(ValueError):
    """A mistake of the caller's, in one line that says what was expected and what came. The CLI prints it alone."""


def _need(owner: object, name: str, expected: str, good: bool) -> None:
    if not good:
        raise UserError(f"{name} must be {expected}, got {getattr(owner, name)!r}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: object, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _some_of(value: object, known: tuple[str, ...]) -> bool:
    return isinstance(value, tuple) and bool(value) and all(v in known for v in value)


@dataclass(frozen=True)
class MaskConfig:
    """Which weights get a mask, and its scale.

    Args:
        targets: some of attention, mlp, conv; None: attention and conv, as R-AMT.
        towers: some of image, text.
        modules: patterns of module names (`fnmatch`: `visual.trunk.blocks.*.attn.qkv`), in place of targets and towers:
            for models that rmt does not know.
        init: a score's first value. threshold: a weight is on while its score is above it.
        spread: draw first scores evenly around init, up to this share of the way to the threshold. 0, the published
            start, has all at init: no bit flips for the first steps, and then those of one mind at once.
    """

    targets: tuple[str, ...] | None = None
    towers: tuple[str, ...] = ("image",)
    modules: tuple[str, ...] = ()
    init: float = 1e-2
    threshold: float = 5e-3
    spread: float = 0.0

    def __post_init__(self) -> None:
        _need(self, "targets", f"some of {', '.join(TARGETS)}", self.targets is None or _some_of(self.targets, TARGETS))
        _need(self, "towers", f"some of {', '.join(TOWERS)}", _some_of(self.towers, TOWERS))
        texts = isinstance(self.modules, tuple) and all(isinstance(m, str) and m for m in self.modules)
        _need(self, "modules", "patterns of module names", texts)
        if self.modules and self.targets is not None:
            raise UserError(f"modules take the place of targets, got both: {self.modules} and {self.targets}")
        _need(self, "threshold", "a finite number of at least 0", _finite(self.threshold) and self.threshold >= 0)
        above = _finite(self.init) and self.init > self.threshold
        _need(self, "init", f"a finite number above threshold ({self.threshold!r}), so that all masks start on", above)
        _need(self, "spread", "a number from 0 to 1", _finite(self.spread) and 0 <= self.spread <= 1)


@dataclass(frozen=True)
class SelectConfig:
    """Importance identification before tuning: see `rmt.select`.

    Args:
        criterion: magnitude, lamp, snip, taylor, fisher, spt, multiflow or influence; None selects nothing: every
            candidate weight gets a score.
        budget: share of the candidate weights (or modules) that is selected.
        scope: what the budget holds for: all candidates together, each layer, or each modality (tower).
        unit: weight, for compact scores of single weights, or module, for whole modules.
        batches: of training images that the criterion looks at.
    """

    criterion: str | None = None
    budget: float = 0.1
    scope: Literal["global", "layer", "modality"] = "global"
    unit: Literal["weight", "module"] = "weight"
    batches: int = 16

    def __post_init__(self) -> None:
        known = self.criterion is None or self.criterion in CRITERIA
        _need(self, "criterion", f"one of {', '.join(CRITERIA)}, or None", known)
        _need(self, "budget", "a number above 0 and at most 1", _finite(self.budget) and 0 < self.budget <= 1)
        _need(self, "scope", "global, layer or modality", self.scope in ("global", "layer", "modality"))
        _need(self, "unit", "weight or module", self.unit in ("weight", "module"))
        if self.criterion == "influence" and self.unit == "weight":
            raise UserError("criterion influence ranks modules: it needs unit module, got weight")
        _need(self, "batches", "an integer of at least 1", _count(self.batches))


@dataclass(frozen=True)
class TrainConfig:
    """The recipe. None stands for the official code's value, which depends on data set and shots: see `resolve`.

    Args:
        lr: Adam's first step size. epochs: whole passes. steps: how many to take in place of epochs.
        batch: images a step. accumulate: equal parts that a batch is cut into, to save memory.
        strength: of gradient dropout, the paper's lambda: 1 zeroes what is dropped, 0 drops nothing (AMT).
        dropout: agreement is the method; random, sign and kl are its rivals, for experiments: see `rmt.rivals`.
        l2: coefficient of the sum of the scores' norms. temperature: of the general loss.
        schedule: auto adds epochs where a run is too short for masks to flip; paper keeps the recipe.
        flip: mirror half of the training images, as the official code; not for digits, text or signs.
        precision: bf16 runs the towers under autocast; scores, moments and the sign test stay fp32.
        adam: format of Adam's moments: fp32 (8 bytes a score), bf16 (4) or 8bit (2), the latter two rounded
            stochastically.
        shortcuts: while no bit is off, one forward serves student and teacher; the last block's tail runs for the class
            token alone. Equal but for rounding; without, a step is the official one op for op.
        graph: capture the step in a CUDA graph. CUDA only.
        log_every: steps between two logged rows. save_every: seconds between two writings of the resume file.
    """

    lr: float | None = None
    epochs: int | None = None
    steps: int | None = None
    batch: int = 32
    accumulate: int = 1
    strength: float | None = None
    dropout: Literal["agreement", "random", "sign", "kl"] = "agreement"
    l2: float = 1e-4
    temperature: float = 1.0
    schedule: Literal["auto", "paper"] = "auto"
    flip: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    adam: Literal["fp32", "bf16", "8bit"] = "fp32"
    shortcuts: bool = True
    graph: bool = False
    log_every: int = 10
    save_every: float = 60.0

    def __post_init__(self) -> None:
        good = self.lr is None or (_finite(self.lr) and self.lr > 0)
        _need(self, "lr", "a finite number above 0, or None", good)
        _need(self, "temperature", "a finite number above 0", _finite(self.temperature) and self.temperature > 0)
        _need(self, "l2", "a finite number of at least 0", _finite(self.l2) and self.l2 >= 0)
        good = self.strength is None or (_finite(self.strength) and 0 <= self.strength <= 1)
        _need(self, "strength", "a number from 0 to 1, or None", good)
        for name in ("batch", "accumulate", "log_every"):
            _need(self, name, "an integer of at least 1", _count(getattr(self, name)))
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            _need(self, name, "an integer of at least 1, or None", value is None or _count(value))
        _need(self, "save_every", "a number of at least 0", _finite(self.save_every) and self.save_every >= 0)
        if self.epochs is not None and self.steps is not None:
            raise UserError(f"epochs or steps must be given, not both, got {self.epochs} and {self.steps}")
        for name in ("flip", "shortcuts", "graph"):
            _need(self, name, "true or false", isinstance(getattr(self, name), bool))
        _need(self, "adam", "fp32, bf16 or 8bit", self.adam in ("fp32", "bf16", "8bit"))
        _need(self, "schedule", "auto or paper", self.schedule in ("auto", "paper"))
        _need(self, "precision", "fp32 or bf16", self.precision in ("fp32", "bf16"))
        _need(self, "dropout", "agreement, random, sign or kl", self.dropout in ("agreement", "random", "sign", "kl"))
        if self.graph and self.dropout != "agreement":
            raise UserError(
                f"graph captures the method's own step, dropout agreement: the rival {self.dropout} is plain PyTorch, "
                "which no test has captured. Leave graph out"
            )
        if self.batch < self.accumulate:
            raise UserError(f"accumulate must be at most batch ({self.batch}), got {self.accumulate}")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: model and data by name, then the parts above. What `config.yaml` in a run folder holds.

    Args:
        model: `local-dir:PATH`, `hf-hub:ID` or an open_clip name, the last with pretrained.
        pretrained: open_clip's tag of the weights, or a file.
        data: an ImageFolder, a CSV or a split JSON; or, instead, root and dataset.
        root: folder of data sets in CoOp's layout. dataset: the key of one of them (`rmt data list`).
        template: text with one {} for the class name; None: the data set's own, else "a photo of a {}.".
        shots: training images a class, or all. seed: of sample, order, augmentation and dropout.
        classes: all of them, or CoOp's base or new half.
        image_size: side in pixels; None: the model's own. device: auto, cpu, cuda, cuda:1, ...
        preset: ramt, amt, rmmt or rpmt: targets and strength where those are None.
        text_features: keep those of the class names in the task file, so that it classifies with the image tower alone.
    """

    model: str
    pretrained: str | None = None
    data: str | None = None
    root: str | None = None
    dataset: str | None = None
    template: str | None = None
    shots: int | Literal["all"] = 16
    seed: int = 1
    classes: Literal["all", "base", "new"] = "all"
    image_size: int | None = None
    device: str = "auto"
    preset: Literal["ramt", "amt", "rmmt", "rpmt"] = "ramt"
    text_features: bool = False
    mask: MaskConfig = field(default_factory=MaskConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        one = self.template is None or (isinstance(self.template, str) and self.template.count("{}") == 1)
        _need(self, "template", "a text with one {} for the class name", one)
        if (self.data is None) == (self.root is None) or (self.root is None) != (self.dataset is None):
            given = {name: getattr(self, name) for name in ("data", "root", "dataset")}
            raise UserError(f"a run needs data, or root and dataset, got {given}")
        _need(self, "shots", "an integer of at least 1, or all", self.shots == "all" or _count(self.shots))
        _need(self, "seed", "an integer from 0 to 2**63 - 1", _count(self.seed, 0) and self.seed < 1 << 63)
        _need(self, "classes", "all, base or new", self.classes in ("all", "base", "new"))
        size = self.image_size
        _need(self, "image_size", "an integer of at least 1, or None", size is None or _count(size))
        _need(self, "preset", f"one of {', '.join(PRESETS)}", self.preset in PRESETS)
        has_weights = ":" in self.model or self.pretrained is not None
        _need(self, "pretrained", f"a tag or a file, since {self.model!r} names no weights", has_weights)


def resolve(config: RunConfig) -> RunConfig:
    """`config` with every None of mask and train filled in from its preset and the official recipe.

    lr 8e-5 and 30 epochs, ImageNet 3e-5 and 10. strength: the official README's text has 0.3 at 16 shots for all data
    sets but ImageNet, SUN397 and Food101, and 1 in all other experiments (its example says the reverse); its script for
    base to new has 1. Source: wuw2019/R-AMT at 07f8d2c.
    """
    preset, imagenet = PRESETS[config.preset], config.dataset == "imagenet"
    large = config.dataset in ("imagenet", "sun397", "food101")
    recipe = 0.3 if config.shots == 16 and config.classes == "all" and not large else 1.0
    train, mask = config.train, config.mask
    filled = {
        "lr": (3e-5 if imagenet else 8e-5) if train.lr is None else train.lr,
        "epochs": (10 if imagenet else 30) if train.epochs is None and train.steps is None else train.epochs,
        "strength": train.strength if train.strength is not None
        else recipe if preset.strength is None else preset.strength,
    }  # fmt: skip
    if mask.targets is None and not mask.modules:
        mask = dataclasses.replace(mask, targets=preset.targets)
    return dataclasses.replace(config, mask=mask, train=dataclasses.replace(train, **filled))


def meaning(config: RunConfig) -> tuple[RunConfig, bool]:
    """Equal for two configs of one run, however much of it is written out.

    That is `resolve`d, and whether epochs may be added (`rmt.schedule`), which a resolved one does not say.
    """
    train = config.train
    return resolve(config), train.schedule == "auto" and train.epochs is None and train.steps is None


def to_yaml(config: RunConfig) -> str:
    """YAML text that `from_yaml` turns into an equal config."""
    import yaml

    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def from_yaml(text: str, kind: type = RunConfig) -> Any:
    """A config. Raises UserError where the text is no YAML, lacks a field, has an unknown one or a bad value."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the config must be YAML: {error}") from error
    return build(kind, values, "config")


def same_yaml(theirs: str, mine: str, kind: type = RunConfig) -> bool:
    """Whether two texts are of one config: 1 is 1.0, and fields that are newer than a text have their defaults."""
    try:
        return theirs == mine or from_yaml(theirs, kind) == from_yaml(mine, kind)
    except UserError:
        return False


def build(kind: type, values: Any, where: str) -> Any:
    """A config dataclass from plain dicts, lists and scalars. Raises UserError that names what is wrong."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(values, dict) or not set(values) <= set(fields):
        got = sorted(set(values) - set(fields)) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{where} must be an object with fields of {', '.join(fields)}, got {got}")
    nested = {"mask": MaskConfig, "select": SelectConfig, "train": TrainConfig}
    made = {k: build(nested[k], v, f"{where}.{k}") if k in nested else v for k, v in values.items()}
    made = {k: tuple(v) if isinstance(v, list) else v for k, v in made.items()}
    try:
        return kind(**made)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where} is incomplete or has a value of a wrong type: {error}") from error
