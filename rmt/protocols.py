"""Many runs that make one table: a grid of shots and seeds, base to new, and a run's task on other data sets.

The protocol is CoOp's: the sample is drawn over all classes, before the base half is taken; the last step's masks are
measured, once, on the test images, and nothing is chosen by looking at these. Every finished part lies in a folder of
its own and is read back when the command is given again; a part that fails leaves the others alone and is listed.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .checkpoint import environment, load_task, write_json
from .config import RunConfig, UserError
from .data import Split, indices_sha256, read, subset
from .evaluate import RESULT_FILE, TASK_FOLDER, TEMPLATE, Setup, load_run, read_run
from .failures import FAILURES
from .run import run

TABLE_FILE = "table.json"
_MEASURES = ("acc1", "mean_per_class_recall", "macro_f1")


def check_protocol(name: str) -> None:
    """Raises UserError for every protocol but CoOp's, and says why there is no other."""
    if name != "coop":
        raise UserError(
            f"protocol must be coop (a few-shot sample over all classes, the last step, nothing chosen), got {name!r}: "
            "rmt has no protocol that chooses a step or a setting, least of all on the test split"
        )


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample deviation (n - 1); the deviation of one value is None."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}


def harmonic(base: float, new: float) -> float:
    """Harmonic mean of two accuracies; 0 where both are."""
    return 2 * base * new / (base + new) if base + new else 0.0


def grid(config: RunConfig, out: str | Path, shots: Sequence[int | str], seeds: Sequence[int]) -> dict:
    """Runs every cell into OUT/shots{K}/seed{S}, prints the table and writes OUT/table.json, which it returns.

    The table's `rows` hold, for each number of shots, mean and deviation over the seeds that ended, `failed` the rest.
    """
    # All configs first: a bad number among them must not be found hours later.
    configs = {(k, s): dataclasses.replace(config, shots=k, seed=s) for k in shots for s in seeds}
    cells = {(k, s): Path(out) / f"shots{k}" / f"seed{s}" for k, s in configs}
    known: dict = {}
    results, failed = each(cells, lambda cell, folder: run(configs[cell], folder, known))
    rows = []
    for k in shots:
        done = {s: results[k, s] for s in seeds if (k, s) in results}
        if done:
            rows.append({"shots": k, "seeds": list(done), **_summary(list(done.values()))})
    table = {"protocol": "coop", "rows": rows, "failed": failed}
    publish(table, out, ("shots", "seeds", "zero-shot", "tuned", "mean per class", "macro F1", "% off"), [
        (r["shots"], len(r["seeds"]), shown(r["zero_shot"]), *(shown(r[m]) for m in _MEASURES), shown(r["percent_off"]))
        for r in rows
    ])  # fmt: skip
    return table


def _summary(results: list[dict]) -> dict:
    return {
        **{name: spread([r["metrics"][name] for r in results]) for name in _MEASURES},
        "zero_shot": spread([r["zero_shot"]["acc1"] for r in results]),
        "percent_off": spread([r["percent_off"] for r in results]),
        "tuning_seconds": spread([r["tuning_seconds"] for r in results]),
        "bits_sha256": [r["bits_sha256"] for r in results],
    }


def base_to_new(config: RunConfig, out: str | Path, seeds: Sequence[int]) -> dict:
    """CoOp's protocol: tune on the base half of the classes, test on both halves, each among its own classes only.

    Runs into OUT/seed{S}, prints the table and writes OUT/table.json, which it returns. The papers' harmonic mean is
    that of the seeds' mean accuracies; the mean of the seeds' harmonic means stands beside it.
    """
    if config.classes != "all":
        raise UserError(f"base to new takes both halves itself: classes must be all, got {config.classes!r}")
    cells = {seed: Path(out) / f"seed{seed}" for seed in seeds}
    pairs, failed = each(cells, lambda seed, folder: _base_and_new(config, seed, folder))
    table = {"protocol": "coop", "seeds": {str(seed): pair for seed, pair in pairs.items()}, "failed": failed}
    table["rows"] = {name: _halves([pair[name] for pair in pairs.values()]) for name in ("zero_shot", "tuned") if pairs}
    header = ("", "base", "new", "H of the means", "mean of the H")
    publish(table, out, header, [
        (
            name.replace("_", "-"), shown(r["base"]), shown(r["new"]), f"{r['harmonic_of_means']:.2f}",
            shown(r["harmonic"]),
        )
        for name, r in table["rows"].items()
    ])  # fmt: skip
    return table


def _base_and_new(config: RunConfig, seed: int, folder: Path) -> dict:
    config = dataclasses.replace(config, seed=seed, classes="base")
    base = run(config, folder)
    new = dataclasses.replace(config, classes="new")
    split = subset(read(new), "new")
    template = config.template or split.template or TEMPLATE
    measured = _measured(
        folder / "new.json", base["bits_sha256"], split, template, new,
        lambda: load_run(config, load_task(folder / TASK_FOLDER)),
    )  # fmt: skip
    return {
        "tuned": (base["metrics"]["acc1"], measured["metrics"]["acc1"]),
        "zero_shot": (base["zero_shot"]["acc1"], measured["zero_shot"]["acc1"]),
    }


def _halves(pairs: list[tuple[float, float]]) -> dict:
    base, new = (spread(half) for half in zip(*pairs))
    return {
        "base": base, "new": new, "harmonic_of_means": harmonic(base["mean"], new["mean"]),
        "harmonic": spread([harmonic(*pair) for pair in pairs]),
    }  # fmt: skip


def cross_domain(folder: str | Path, datasets: Sequence[str], root: str | Path, **changed: str) -> dict:
    """Measures a finished run's task on other data sets, each among its own class names and in its own template.

    So ImageNet-A and -R are told apart among their 200 classes only. Writes RUN/xd/{data set}.json, then
    RUN/xd/table.json, which it returns. changed: fields of the run's config to replace, such as device.
    """
    config, task = read_run(folder)
    config = dataclasses.replace(config, **changed)
    out, opened = Path(folder) / "xd", []
    out.mkdir(exist_ok=True)

    def measure(key: str, path: Path) -> dict:
        other = dataclasses.replace(config, data=None, root=str(root), dataset=key, classes="all")
        split = read(other)

        def setup() -> Setup:
            # One model for all data sets, and none where all are measured already.
            if not opened:
                opened.append(load_run(config, task, split))
            return opened[0]

        template = split.template or config.template or TEMPLATE
        return _measured(path, task.bits_sha256, split, template, other, setup)

    results, failed = each({key: out / f"{key}.json" for key in datasets}, measure)
    table = {"protocol": "coop", "run": str(folder), "rows": results, "failed": failed}
    if (source := Path(folder) / RESULT_FILE).is_file():
        table["source"] = {
            k: v for k, v in json.loads(source.read_text()).items() if k in ("dataset", "metrics", "zero_shot")
        }
    rows = [
        (key, r["classes"], r["n"], *(f"{r[m]['acc1']:.2f}" for m in ("zero_shot", "metrics")))
        for key, r in results.items()
    ]
    publish(table, out, ("data set", "classes", "images", "zero-shot", "tuned"), rows)
    return table


def _measured(
    path: Path, bits_sha256: str, split: Split, template: str, config: RunConfig, setup: Callable[[], Setup]
) -> dict:
    """Tuned and zero-shot measures on the test images of `split`; read back where `path` holds them for these masks."""
    key = {"bits_sha256": bits_sha256, "indices_sha256": indices_sha256(split.test, config), "template": template}
    if path.is_file():
        found = json.loads(path.read_text())
        if {name: found.get(name) for name in key} == key:
            return found
    ready = setup().on(split, template)
    tuned, zero_shot = ready.test(), ready.test(frozen=True)
    print(f"{path.stem:10} {tuned}, zero-shot {zero_shot.top1:.2f} %", flush=True)
    result = key | {
        "n": tuned.n, "classes": len(split.classnames), "metrics": tuned.metrics(), "zero_shot": zero_shot.metrics(),
        "environment": environment(ready.device),
    }  # fmt: skip
    write_json(path, result)
    return result


def each(cells: dict, work: Callable) -> tuple[dict, dict[str, str]]:
    """`work(name, path)` for every cell: (results by name, the failures' messages by path)."""
    results, failed = {}, {}
    for number, (name, path) in enumerate(cells.items(), 1):
        print(f"[{number}/{len(cells)}] {path}", flush=True)
        try:
            results[name] = work(name, path)
        except FAILURES as error:
            failed[str(path)] = " ".join(str(error).split())
            print(f"failed     {failed[str(path)]}", flush=True)
    return results, failed


def shown(value: dict[str, float | None]) -> str:
    """What `spread` returns, as text."""
    return f"{value['mean']:.2f}" if value["sd"] is None else f"{value['mean']:.2f} ± {value['sd']:.2f}"


def publish(table: dict, out: str | Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Prints aligned columns and writes table.json."""
    lines = [header, *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))]))
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / TABLE_FILE, table)
    print(f"table      {Path(out) / TABLE_FILE}", flush=True)
