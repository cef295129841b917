"""sweep.yaml: what it may hold, and the runs that its lists' cross product makes.

base       fields of a run, as in a run's config.yaml; for `rmt compare` those of all cells
datasets   keys below base.root, or paths of data (folder, CSV, split JSON); left out: what base names
shots      numbers of images a class, or all.  seeds: samples.  Left out: base's
methods    cells of `rmt compare` (rmt/peers/names.py); left out: runs of `rmt train`
settings   option -> list of values: `train.lr`, or `lr` for short, as on the command line
options    of `rmt compare`: views, max_steps, max_feature_steps, rates
"""

import copy
import dataclasses
import difflib
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import MaskConfig, RunConfig, SelectConfig, TrainConfig, UserError, build

if TYPE_CHECKING:
    from ..peers.compare import Options

PARTS = {"mask": MaskConfig, "select": SelectConfig, "train": TrainConfig}
KEYS = ("base", "datasets", "shots", "seeds", "methods", "settings", "options")
LIMIT = 100_000
FOLDER = "local-dir:"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of `rmt train`, or with a method one cell of `rmt compare`. settings: its values of what else varies."""

    config: RunConfig
    method: str | None = None
    options: "Options | None" = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def dataset(self) -> str:
        """As results name it."""
        return self.config.dataset or Path(self.config.data).stem

    @property
    def label(self) -> str:
        """For people: data set, method, shots, seed and settings, in one line."""
        named = [f"{name.rpartition('.')[2]}={_short(value)}" for name, value in self.settings]
        words = [self.dataset, self.method or "train", f"shots{self.config.shots}", f"seed{self.config.seed}", *named]
        return " ".join(words)


def read_spec(path: str | Path) -> list[Run]:
    """The runs of a file. Raises UserError for what it must not hold, naming the place."""
    import yaml

    try:
        values = yaml.load(Path(path).read_text(), _loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} must be YAML: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return expand(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _loader() -> type:
    """YAML 1.1 takes 1e-3 for a text; everyone who writes a learning rate means a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def expand(values: Any) -> list[Run]:
    """All runs, each checked, in the order data sets, settings, methods, shots, seeds. Raises UserError."""
    if not isinstance(values, dict):
        raise UserError(f"a sweep must be an object with some of {', '.join(KEYS)}, got {type(values).__name__}")
    _known(values, KEYS, "a sweep")
    base = _nested(_object(values, "base"), "base")
    lists = {name: _list(values, name) for name in ("datasets", "shots", "seeds", "methods")}
    settings = {_field(name): _values(some, f"settings.{name}") for name, some in _object(values, "settings").items()}
    for name in settings:
        if name in ("data", "root", "dataset", "shots", "seed"):
            raise UserError(f"settings cannot vary {name}: datasets, shots and seeds have lists of their own")
    stems = [Path(str(path)).stem for path in lists["datasets"]]
    if "root" not in base and len(set(stems)) < len(stems):
        same = max(set(stems), key=stems.count)
        raise UserError(f"datasets must differ in their last names, by which results go: {same!r} is there twice")
    options, methods = _options(values, lists["methods"])
    axes = [lists["datasets"], *settings.values(), methods, lists["shots"], lists["seeds"]]
    count = 1
    for axis in axes:
        count *= len(axis or [None])
    if count > LIMIT:
        raise UserError(f"a sweep may have {LIMIT:,} runs, got {count:,}: cut a list")
    runs = []
    for dataset, *chosen, method, shots, seed in itertools.product(*(axis or [None] for axis in axes)):
        fields = copy.deepcopy(base)
        _set_data(fields, dataset)
        fields |= {name: value for name, value in (("shots", shots), ("seed", seed)) if value is not None}
        for name, value in zip(settings, chosen):
            _put(fields, name, value)
        config = _absolute(build(RunConfig, fields, "base"))
        runs.append(Run(config, method, options, tuple(zip(settings, chosen))))
    return runs


def _known(values: dict, names: Sequence[str], where: str) -> None:
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1)
            hint = f": did you mean {near[0]}?" if near else f", it has {', '.join(names)}"
            raise UserError(f"{where} has no {name!r}{hint}")


def _object(values: dict, name: str) -> dict:
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{name} must be an object, got {found!r:.80}")
    return found or {}


def _list(values: dict, name: str) -> list:
    return _values(values[name], name) if name in values else []


def _values(found: Any, where: str) -> list:
    if not isinstance(found, list) or not found:
        raise UserError(f"{where} must be a list of at least one value, got {found!r:.80}")
    seen = set()
    for value in found:
        if (text := json.dumps(value, default=str)) in seen:
            raise UserError(f"{where} must name each value once, got {value!r} twice")
        seen.add(text)
    return found


def _field(name: str) -> str:
    """`lr` -> `train.lr`. Raises UserError for no field of a run's."""
    fields = [field.name for field in dataclasses.fields(RunConfig) if field.name not in PARTS]
    full = fields + [f"{part}.{field.name}" for part, kind in PARTS.items() for field in dataclasses.fields(kind)]
    short = {one.rpartition(".")[2]: one for one in reversed(full)}
    name = str(name).replace("-", "_")
    if name not in full and name not in short:
        near = difflib.get_close_matches(name, [*full, *short], 1)
        raise UserError(f"settings: a run has no option {name!r}" + (f": did you mean {near[0]}?" if near else ""))
    return name if name in full else short[name]


def _nested(base: dict, where: str) -> dict:
    """Dotted names as objects of objects; the fields themselves are checked with each run."""
    made: dict = {}
    for name, value in base.items():
        if name in PARTS and isinstance(value, dict):
            for inner, one in value.items():
                _put(made, f"{name}.{inner}", one)
        else:
            _put(made, str(name), value)
    return made


def _put(fields: dict, name: str, value: Any) -> None:
    part, dot, inner = name.partition(".")
    if dot:
        fields.setdefault(part, {})[inner] = value
    else:
        fields[part] = value


def _set_data(fields: dict, dataset: Any) -> None:
    if dataset is None:
        return
    if not isinstance(dataset, str):
        raise UserError(f"datasets must be keys below base.root or paths, got {dataset!r}")
    fields["data" if fields.get("root") is None else "dataset"] = dataset


def _absolute(config: RunConfig) -> RunConfig:
    """Paths of files as every process finds them, whatever its working folder is."""
    changed: dict[str, str] = {}
    for name in ("data", "root"):
        if (value := getattr(config, name)) is not None:
            changed[name] = os.path.abspath(value)
    if config.model.startswith(FOLDER):
        changed["model"] = FOLDER + os.path.abspath(config.model.removeprefix(FOLDER))
    if config.pretrained is not None and os.path.isfile(config.pretrained):
        changed["pretrained"] = os.path.abspath(config.pretrained)
    return dataclasses.replace(config, **changed)


def _options(values: dict, methods: list) -> tuple["Options | None", list]:
    if not methods:
        if "options" in values:
            raise UserError("options are those of rmt compare: they need methods")
        return None, []
    from ..peers.compare import Options
    from ..peers.names import parse

    names = []
    for method in methods:
        if not isinstance(method, str):
            raise UserError(f"methods must be names, got {method!r}")
        names.append(parse(method).name)
    _values(names, "methods")
    given = _object(values, "options")
    _known(given, [field.name for field in dataclasses.fields(Options)], "options")
    try:
        return Options(**given), names
    except (TypeError, AttributeError) as error:
        raise UserError(f"options have a value of a wrong type: {error}") from error


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
