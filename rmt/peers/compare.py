"""All methods on one data set: `rmt compare`. Same images, backbone, precision and evaluation for all.

OUT/compare.yaml                         what was asked for, without methods, shots and seeds: those may grow
OUT/{method}/shots{K}-seed{S}/fit.json   what fitting gave; its tensors lie beside it, masks in task/
OUT/{method}/shots{K}-seed{S}/result.json  measured: written last, so that it stands for a finished cell
OUT/compare.json                         the table
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import clip
from ..checkpoint import sha256, write_json, write_whole
from ..config import RunConfig, UserError, build, meaning
from ..data import Cache, read, subset
from ..evaluate import TEMPLATE, sampled
from ..failures import FAILURES
from ..protocols import spread
from .cells import Sample
from .footing import Footing, Shelf
from .names import Stack, parse

OPTIONS_FILE, TABLE_FILE = "compare.yaml", "compare.json"
_OF_SAMPLES = ("shots", "seed", "device")  # what cells of one folder may differ in


@dataclasses.dataclass(frozen=True)
class Options:
    """views, max_steps, max_feature_steps, rates: as of `Footing`."""

    views: int = 10
    max_steps: int | None = None
    max_feature_steps: int | None = None
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("views", "max_steps", "max_feature_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        for name, rate in self.rates.items():
            if len(parse(name).parts) > 1 or not 0 < rate < float("inf"):
                raise UserError(f"a rate must be that of one method, above 0, got {name}={rate}")


def compare(
    config: RunConfig, out: str | Path, methods: Sequence[str], shots: Sequence[int | str], seeds: Sequence[int],
    options: Options | None = None, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Fits and measures every method on every sample, prints the table and writes it. Returns what compare.json holds.

    A finished cell is read back. A method that cannot run leaves the others alone and stands under `missing`, with the
    reason.

    Args:
        config: model and data; `train` holds the masks' recipe, and batch, precision and flip of all methods.
        command: what to say in results that made them.

    Raises: UserError for unknown methods, for those that cannot be combined, and where OUT holds another comparison.
    """
    out, options = Path(out), options or Options()
    stacks = list({stack.name: stack for stack in map(parse, methods)}.values())
    if not (stacks and shots and seeds):
        raise UserError(f"a comparison needs methods, shots and seeds, got {methods}, {shots} and {seeds}")
    samples = [dataclasses.replace(config, shots=k, seed=s) for k in shots for s in seeds]
    _need_same(samples, options, out)
    shared = Shared.load(config)
    rows, missing = [], []
    for number, asked in enumerate(samples, 1):
        print(f"\n[{number}/{len(samples)}] {shared.dataset}, shots {asked.shots}, seed {asked.seed}", flush=True)
        for stack, result in _one_sample(shared, asked, stacks, options, out, command):
            if isinstance(result, str):
                missing.append({"method": stack.name, "shots": asked.shots, "seed": asked.seed, "why": result})
            else:
                rows.append(result)
    table = {"kind": "compare_table", "dataset": shared.dataset, "rows": _rows(rows), "missing": missing}
    write_json(out / TABLE_FILE, table)
    print_table(table)
    print(f"table      {out / TABLE_FILE}", flush=True)
    return table


@dataclasses.dataclass
class Shared:
    """Of all samples: the model, zero-shot class vectors, and what of the test images is kept."""

    loaded: clip.Clip
    text: clip.Text
    template: str
    dataset: str
    model_sha256: str
    shelf: Shelf
    cache: Cache

    @classmethod
    def load(cls, config: RunConfig) -> "Shared":
        """Raises UserError where the model or the data cannot be read."""
        split = subset(read(config), config.classes)
        loaded = clip.load(config.model, config.pretrained, config.image_size, clip.pick_device(config.device))
        loaded.model.requires_grad_(False)
        template = config.template or split.template or TEMPLATE
        text = clip.Text.make(loaded, split.classnames, template)
        name = config.dataset or Path(config.data).stem
        return cls(loaded, text, template, name, sha256(loaded.model.state_dict()), Shelf(), Cache())


def _one_sample(
    shared: Shared, config: RunConfig, stacks: Sequence[Stack], options: Options, out: Path, command: str
):  # fmt: skip
    """(stack, result, or why there is none) of every method."""
    try:
        footing = Footing(
            config,
            shared.loaded,
            sampled(config),
            shared.text,
            shared.template,
            shared.shelf,
            shared.cache,
            **vars(options),
        )
        sample = Sample(footing, out, shared.dataset, shared.model_sha256, options, command)
    except FAILURES as error:
        why = " ".join(str(error).split())
        yield from ((stack, why) for stack in stacks)
        return
    for number, stack in enumerate(stacks):
        try:
            result = sample.result(stack)
            print(f"{stack.name:16} {result['metrics']['acc1']:6.2f} %  {_costs(result)}", flush=True)
            yield stack, result
        except FAILURES as error:
            why = " ".join(str(error).split())
            print(f"{stack.name:16} missing: {why}", flush=True)
            yield stack, why
        sample.forget(stacks[number + 1 :])
    # The test images and the plain model's features of them are those of every sample.
    shared.shelf.drop(lambda key: key not in {((), "test"), ("test", "images")})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _costs(result: dict[str, Any]) -> str:
    reused = f", reused {_few(result['reused'])}" if result["reused"] else ""
    size = f"{result['trained_parameters']:,} numbers trained, {result['stored_bytes']:,} bytes"
    return f"{size}, {result['training_seconds']:.1f} s{reused}"


def _few(names: Sequence[str]) -> str:
    """`a, b and 9 more`."""
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _need_same(samples: Sequence[RunConfig], options: Options, out: Path) -> None:
    import yaml

    path = out / OPTIONS_FILE
    if not path.is_file():
        values = dataclasses.asdict(samples[0]) | dataclasses.asdict(options)
        for name in _OF_SAMPLES:
            values.pop(name)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, yaml.safe_dump(_plain(values), sort_keys=False).encode())
    elif not _is_of(path, samples, options):
        raise UserError(f"out must be a new folder or this comparison's own, but {path} differs from what is asked for")


def _is_of(path: Path, samples: Sequence[RunConfig], options: Options) -> bool:
    """By value: a default that is written out is no difference, as in a sweep's identity of a run."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
        own = {f.name: values.pop(f.name) for f in dataclasses.fields(Options) if f.name in values}
        earlier = build(RunConfig, values, str(path))
        like = [dataclasses.replace(earlier, **{name: getattr(s, name) for name in _OF_SAMPLES}) for s in samples]
        return Options(**own) == options and list(map(meaning, like)) == list(map(meaning, samples))
    except (UserError, yaml.YAMLError, AttributeError, TypeError):
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _rows(results: Sequence[dict]) -> list[dict]:
    """A row for each method and number of shots, in the order in which they were asked for."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result["shots"], result["method"]), []).append(result)
    rows = []
    for (shots, name), mine in groups.items():
        rows.append({
            "method": name, "title": mine[0]["title"], "shots": shots, "seeds": [r["seed"] for r in mine],
            "acc1": spread([r["metrics"]["acc1"] for r in mine]),
            "trained_parameters": max(r["trained_parameters"] for r in mine),
            "stored_bytes": round(sum(r["stored_bytes"] for r in mine) / len(mine)),
            "training_seconds": spread([r["training_seconds"] for r in mine]),
            "peak_bytes": max((r["peak_bytes"] for r in mine if r["peak_bytes"] is not None), default=None),
            "images_per_second": spread([r["images_per_second"] for r in mine]),
        })  # fmt: skip
    return rows


def print_table(table: dict[str, Any]) -> None:
    """Aligned columns; then what is missing, and why."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="none")
    for title in ("shots", "method", "top-1, %", "seeds", "trained", "stored", "seconds", "peak MB", "images/s"):
        shown.add_column(title, justify="left" if title == "method" else "right")
    for row in table["rows"]:
        accuracy = row["acc1"]
        band = "" if accuracy["sd"] is None else f" ± {accuracy['sd']:.2f}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        shown.add_row(
            str(row["shots"]), row["method"], f"{accuracy['mean']:.2f}{band}", str(len(row["seeds"])),
            f"{row['trained_parameters']:,}", f"{row['stored_bytes']:,}", f"{row['training_seconds']['mean']:.1f}",
            peak, f"{row['images_per_second']['mean']:.0f}",
        )  # fmt: skip
    console = Console()
    # Not a terminal: whole lines, whatever the width.
    (console if console.is_terminal else Console(width=160)).print(shown)
    for row in table["missing"]:
        print(f"missing    {row['method']}, shots {row['shots']}, seed {row['seed']}: {row['why']}")
