"""Ablations of the method: one part of a run varied at a time, the rest as the user's options and the recipe have it.

    rmt ablate strength dropout --model local-dir:PATH --data FOLDER --out DIR

Every cell is an ordinary run in DIR/{ablation}/{label}/seed{S}. A setting that several ablations have runs once: the
default one in DIR/default/seed{S}, any other in the folder of the first ablation of the registry that has it, whichever
were asked for; a table says in `folder` where its runs lie. The masks of the last step are measured, on the test
images; nothing is chosen by these numbers here, and a setting for use must not be.
"""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import write_whole
from .config import CRITERIA, TARGETS, RunConfig, UserError, from_yaml, resolve, to_yaml
from .protocols import each, publish, shown, spread
from .run import run

BASE_FILE = "default.yaml"
Changes = dict[str, Any]  # dotted name of a field -> value


class Ablation(NamedTuple):
    """changes: the default config, settled -> label -> what the label changes of it."""

    summary: str
    changes: Callable[[RunConfig], dict[str, Changes]]


def _values(field: str, values: Sequence[float]) -> Callable[[RunConfig], dict[str, Changes]]:
    return lambda base: {f"{value:g}": {field: value} for value in values}


def _targets(base: RunConfig) -> dict[str, Changes]:
    sets = {"attention+conv": ("attention", "conv"), "attention": ("attention",), "mlp": ("mlp",), "all": TARGETS}
    return {label: {"mask.targets": targets} for label, targets in sets.items()}


def _selection(base: RunConfig) -> dict[str, Changes]:
    cells: dict[str, Changes] = {"none": {"select.criterion": None}}
    for criterion in CRITERIA:
        cells[criterion] = {"select.criterion": criterion}
    cells["influence"]["select.unit"] = "module"  # it ranks nothing else
    return cells


def _budget(base: RunConfig) -> dict[str, Changes]:
    # snip where none is named: |dL/dbit| at the start, the gradient that the masks themselves are trained by.
    criterion = base.select.criterion or "snip"
    budgets = {f"{b:g}": {"select.criterion": criterion, "select.budget": b} for b in (0.01, 0.03, 0.1, 0.3)}
    return budgets | {"all": {"select.criterion": None}}


def _l2(base: RunConfig) -> dict[str, Changes]:
    return {"with": {"train.l2": base.train.l2 or 1e-4}, "without": {"train.l2": 0.0}}


def _dropout(base: RunConfig) -> dict[str, Changes]:
    if not base.train.strength:
        raise UserError("ablation dropout compares rules at one strength above 0, got 0: give --train.strength")
    rules = {rule: {"train.dropout": rule} for rule in ("agreement", "random", "sign", "kl")}
    return {"off": {"train.strength": 0.0, "train.dropout": "agreement"}} | rules


ABLATIONS = {
    "strength": Ablation("strength of gradient dropout; 0 is AMT",
                         _values("train.strength", (0.0, 0.1, 0.3, 0.5, 0.7, 1.0))),
    "threshold": Ablation("threshold that a score falls below to go off; the way there from init changes with it",
                          _values("mask.threshold", (1e-3, 2.5e-3, 5e-3, 7.5e-3, 9e-3))),
    "init": Ablation("first score; the way from it to the threshold changes with it",
                     _values("mask.init", (6e-3, 7.5e-3, 1e-2, 1.5e-2, 2e-2))),
    "spread": Ablation("first scores all at init, as published, or drawn around it",
                       _values("mask.spread", (0.0, 0.25, 0.5, 1.0))),
    "targets": Ablation("which weights get masks", _targets),
    "selection": Ablation("which weights get a score: each criterion, at --select.budget", _selection),
    "budget": Ablation("how many weights get a score, by --select.criterion (snip where none is given)", _budget),
    "l2": Ablation("with the scores' norm in the loss and without", _l2),
    "dropout": Ablation("gradient dropout, none, and its rivals, at one strength: see rmt.rivals", _dropout),
    "shots": Ablation("training images a class; the recipe's strength goes with them, unless one is given",
                      _values("shots", (1, 2, 4, 8, 16))),
}  # fmt: skip


def chosen(names: Sequence[str]) -> list[str]:
    """Ablations by name, each once; all stands for every one. Raises UserError for a name that is unknown."""
    for name in names:
        if name != "all" and name not in ABLATIONS:
            near = difflib.get_close_matches(name, ABLATIONS, 1, 0.5)
            hint = f": did you mean {near[0]}?" if near else ""
            raise UserError(f"an ablation must be all or one of {', '.join(ABLATIONS)}, got {name!r}{hint}")
    return list(dict.fromkeys(ABLATIONS if "all" in names else names))


def cells(config: RunConfig, what: str) -> dict[str, RunConfig]:
    """label -> settled config, of one ablation; the default setting is always among them.

    Raises: UserError, naming the ablation, where one of its values does not go with the rest of `config`.
    """
    base, made = settled(config), {}
    for label, changes in ABLATIONS[what].changes(base).items():
        try:
            made[label] = settled(_changed(config, changes))
        except UserError as error:
            raise UserError(f"ablation {what}, {label}: {error}") from error
    return made if base in made.values() else {"default": base} | made


def settled(config: RunConfig) -> RunConfig:
    """With the recipe's values written out, so that equal runs have equal configs.

    Not the epochs: a length that the config names is never stretched (`rmt.schedule`).
    """
    full = resolve(config)
    return dataclasses.replace(full, train=dataclasses.replace(full.train, epochs=config.train.epochs))


def _changed(config: RunConfig, changes: Changes) -> RunConfig:
    parts: dict[str, Changes] = {}
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        parts.setdefault(part, {})[field] = value
    values = parts.pop("", {})
    return dataclasses.replace(
        config, **values, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in parts.items()}
    )


def difference(base: RunConfig, other: RunConfig) -> Changes:
    """Dotted names of the fields that differ, with the values of `other`."""
    flat = []
    for config in (base, other):
        values = dataclasses.asdict(config)
        parts = {part: values.pop(part) for part in ("mask", "select", "train")}
        flat.append(values | {f"{part}.{name}": v for part, fields in parts.items() for name, v in fields.items()})
    return {name: value for name, value in flat[1].items() if value != flat[0][name]}


def folders(config: RunConfig) -> dict[RunConfig, Path]:
    """Settled config -> where below DIR its runs lie: a function of the default setting alone."""
    places = {settled(config): Path("default")}
    for what in ABLATIONS:
        try:
            made = cells(config, what)
        except UserError:
            continue  # raised by whoever asks for this one
        for label, cell in made.items():
            places.setdefault(cell, Path(what, label))
    return places


def ablate(config: RunConfig, out: str | Path, what: Sequence[str], seeds: Sequence[int]) -> dict[str, dict]:
    """Runs every cell of the ablations `what`, prints a table of each and writes it to OUT/{ablation}/table.json.

    A row has mean and deviation over the seeds that ended: of accuracy on the test images, of its difference from the
    default setting at the same seed (`versus_default`), percent of the weights off, seconds; and `schedule`, what there
    was to say of masks that cannot flip or of epochs that were added. `changes`: what differs from the default.

    Returns: ablation -> table. `failed` of a table: folder -> message; a cell that fails leaves the others alone.

    Raises: UserError for an unknown ablation, a value that does not go with `config`, all before the first run, and
        where `out` holds ablations of another default setting.
    """
    if not seeds:
        raise UserError("ablations need at least one seed, got none")
    config = dataclasses.replace(config, seed=seeds[0])
    wanted = {name: cells(config, name) for name in chosen(what)}
    for seed in seeds:
        dataclasses.replace(config, seed=seed)
    _need_same_default(settled(config), Path(out))
    places, known = folders(config), {}
    tables = {}
    for name, made in wanted.items():
        runs = {
            (label, seed): Path(out) / places[cell] / f"seed{seed}" for label, cell in made.items() for seed in seeds
        }
        print(f"ablation   {name}: {ABLATIONS[name].summary}", flush=True)
        results, failed = each(
            runs, lambda cell, folder, made=made: run(dataclasses.replace(made[cell[0]], seed=cell[1]), folder, known)
        )
        tables[name] = _tabulate(name, settled(config), made, places, results, failed)
        _print(tables[name], Path(out) / name)
    return tables


def _need_same_default(base: RunConfig, out: Path) -> None:
    path, base = out / BASE_FILE, dataclasses.replace(base, seed=1)
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, to_yaml(base).encode())
    elif odd := difference(from_yaml(path.read_text()), base):
        raise UserError(f"{out} holds ablations of another default setting, which differs in {odd}: give another --out")


def _tabulate(
    what: str, base: RunConfig, made: dict[str, RunConfig], places: dict[RunConfig, Path], results: dict, failed: dict
) -> dict:
    """The table; results: (label, seed) -> result of a run."""
    rows = []
    of = {label: {s: r for (mine, s), r in results.items() if mine == label} for label in made}
    default = next(of[label] for label, config in made.items() if config == base)
    for label, config in made.items():
        if not of[label]:
            continue
        done = list(of[label].values())
        acc1 = {seed: r["metrics"]["acc1"] for seed, r in of[label].items()}
        pairs = [acc - default[seed]["metrics"]["acc1"] for seed, acc in acc1.items() if seed in default]
        rows.append({
            "label": label, "default": config == base, "changes": difference(base, config), "seeds": list(acc1),
            "acc1": spread(list(acc1.values())), "versus_default": spread(pairs) if pairs else None,
            "zero_shot": spread([r["zero_shot"]["acc1"] for r in done]),
            "percent_off": spread([r["percent_off"] for r in done]),
            "tuning_seconds": spread([r["tuning_seconds"] for r in done]),
            "steps": [r["steps"] for r in done], "schedule": done[0]["schedule"],
            "folder": places[config].as_posix(), "bits_sha256": [r["bits_sha256"] for r in done],
        })  # fmt: skip
    dataset = base.dataset or Path(base.data).stem
    return {"kind": "ablation", "what": what, "dataset": dataset, "rows": rows, "failed": failed}


def _print(table: dict, folder: Path) -> None:
    """What the schedule says stands above the table, for every row that it concerns."""
    for row in table["rows"]:
        if row["schedule"]:
            print(f"schedule   {row['label']}: {row['schedule']}")
    publish(table, folder, ("* default", "seeds", "zero-shot", "tuned", "vs default", "% off", "steps", "seconds"), [
        (
            f"{r['label']}{' *' if r['default'] else ''}", len(r["seeds"]), shown(r["zero_shot"]), shown(r["acc1"]),
            shown(r["versus_default"]) if r["versus_default"] else "", shown(r["percent_off"]), r["steps"][0],
            shown(r["tuning_seconds"]),
        )
        for r in table["rows"]
    ])  # fmt: skip
