"""Commands that make a run or measure one: train, b2n, select, eval, xd, convert from-official."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal

from .config import CRITERIA, RunConfig, UserError, build
from .meet import WAIT_S, joined, launched

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def run_config(args: "Namespace") -> RunConfig:
    """Of the parsed options; of several shots the first. Raises UserError."""
    known = [field.name for field in dataclasses.fields(RunConfig)]
    values = {name: value for name, value in args.as_dict().items() if name in known}
    if isinstance(values["shots"], list):
        values["shots"] = (values["shots"] or [None])[0]
    return build(RunConfig, values, "config")


def many_seeds(asked: list[int] | None, config: RunConfig) -> list[int]:
    """Those of --seeds, 1 2 3 where there are none. Raises UserError for a --seed alone: nothing would look at it."""
    if asked is None and config.seed != RunConfig.seed:
        raise UserError(f"--seed is one run's, and there are several here: give --seeds {config.seed}")
    return [1, 2, 3] if asked is None else asked


def train_options(parser: "ArgumentParser", some: str = "several: one run for each") -> None:
    """Of train, and of b2n."""
    add = parser.add_argument
    add("--seeds", type=list[int] | None, help=f"in place of --seed, {some}")
    add("--protocol", type=str, default="coop", help="how samples are drawn and what is measured: coop")
    add("--out", type=str, required=True, help="run folder; a run that was stopped there goes on")


def shared_train_options(parser: "ArgumentParser") -> None:
    """Of train, which several processes can share."""
    train_options(parser)
    group = parser.add_argument_group("of several processes, under torchrun")
    add = group.add_argument
    add("--reduce", type=Literal["fp32", "bf16"], default="fp32",
        help="what gradients are summed in over ranks: bf16 for half the traffic")  # fmt: skip
    add(
        "--zero", action="store_true", help="keep scores and moments of each mask on one rank alone, to the same result"
    )
    add(
        "--shard", action="store_true",
        help="keep a share of frozen weights, scores, moments and gradients on each rank: the least memory",
    )  # fmt: skip
    add("--timeout", type=float, default=WAIT_S, help="seconds that a rank waits for the others in any one step")


def train(args: "Namespace") -> None:
    """One run, or a grid of them where there are several shots or seeds; one run where several processes share it."""
    from .protocols import check_protocol, grid
    from .run import run

    check_protocol(args.protocol)
    config, shots = run_config(args), args.shots
    if args.seeds is None and not isinstance(shots, list):
        layout = {"reduce": args.reduce, "zero": args.zero, "shard": args.shard}
        with joined(config.device, **layout, timeout=args.timeout) as world, world.quiet():
            run(config, args.out, world=world)
        return
    if launched():
        raise UserError("torchrun shares one run among its ranks: give one number of shots and --seed, without --seeds")
    shots = shots if isinstance(shots, list) else [shots]
    report_failures(grid(config, args.out, shots, args.seeds or [config.seed]))


def b2n_options(parser: "ArgumentParser") -> None:
    """Of b2n."""
    train_options(parser, "one run for each (default: 1 2 3)")


def b2n(args: "Namespace") -> None:
    """Base to new."""
    from .protocols import base_to_new, check_protocol

    check_protocol(args.protocol)
    config = run_config(args)
    seeds = many_seeds(args.seeds, config)
    if isinstance(args.shots, list) or not seeds:
        raise UserError(f"b2n needs one number of shots and some seeds, got {args.shots} and {seeds}")
    report_failures(base_to_new(config, args.out, seeds))


def report_failures(table: dict) -> None:
    """Raises UserError where a table has cells that failed."""
    if failed := table["failed"]:
        path, why = next(iter(failed.items()))
        raise UserError(f"{len(failed)} failed, the others are done: {path}: {why}")


def no_options(parser: "ArgumentParser") -> None:
    """None beside those of a run."""


def select(args: "Namespace") -> None:
    """Prints what a run with this config would select."""
    from .evaluate import prepare, sampled
    from .run import choose

    config = run_config(args)
    if config.select.criterion is None:
        raise UserError(f"select needs --criterion, one of {', '.join(CRITERIA)}")
    prepare(config, sampled(config), choose)


def from_official_options(parser: "ArgumentParser") -> None:
    """Of convert from-official."""
    parser.add_argument("checkpoint", type=str, metavar="CHECKPOINT", help="the official code's model.pth.tar-30")
    parser.add_argument("--out", type=str, required=True, help="run folder to make, for rmt eval, merge and the rest")


def from_official(args: "Namespace") -> None:
    """Makes a run folder, with config.yaml and task/, of an official checkpoint. The data give the class names."""
    from pathlib import Path

    from .checkpoint import save_task, write_whole
    from .config import to_yaml
    from .evaluate import CONFIG_FILE, TASK_FOLDER, prepare
    from .official import read_official

    config, out = run_config(args), Path(args.out)
    if (out / CONFIG_FILE).exists() or (out / TASK_FOLDER).exists():
        raise UserError(f"out must be a new folder, but {out} holds a run")
    setup = prepare(config)
    epochs = read_official(args.checkpoint, setup.masks)
    out.mkdir(parents=True, exist_ok=True)
    task = save_task(out / TASK_FOLDER, setup.masks, setup.split.classnames, setup.config, setup.template)
    write_whole(out / CONFIG_FILE, to_yaml(config).encode())
    print(f"task       {task.path}, {len(setup.masks)} masks after {epochs} epochs")


def eval_options(parser: "ArgumentParser") -> None:
    """Of eval."""
    add = parser.add_argument
    add("run", type=str, metavar="RUN", help="folder that rmt train wrote, or a task folder, with --data")
    add("--data", type=str, help="other images of the same classes: folder, CSV or split JSON (default: the run's own)")
    add("--root", type=str, help="folder of data sets, if it is another one now")
    add("--dataset", type=str, help="key of a data set under --root with the same classes")
    add("--split", type=Literal["test", "val", "train"], default="test", help="part to measure")
    add("--model", type=str, help="base model (default: as the run names it)")
    add("--pretrained", type=str, help="its weights: a tag or a file")
    add("--device", type=str, help="auto, cpu, cuda, cuda:1, ... (default: the run's own)")
    add("--per-class", action="store_true", help="print each class's accuracy as well")
    add("--allow-base-mismatch", action="store_true", help="use the masks on other base weights than they are made for")
    add("--json", action="store_true", help="print one JSON object instead of text")


def evaluate_run(
    run: str, *, split: str = "test", allow_base_mismatch: bool = False, data: str | None = None,
    root: str | None = None, dataset: str | None = None, **changed: str | None,
) -> dict[str, Any]:  # fmt: skip
    """Measures a finished run, or a task, on its own images or others of the same classes.

    changed: fields of its config to replace, such as device; None leaves one as it is. Returns measures in percent,
    `n`, and what they belong to: hashes of images and masks, and the environment.
    """
    from .checkpoint import environment
    from .data import indices_sha256
    from .evaluate import load_run, read_run
    from .masking import percent_off

    given = {"data": data, "root": root, "dataset": dataset} if data or (root and dataset) else {}
    given = given or {name: value for name, value in {"root": root, "dataset": dataset}.items() if value is not None}
    config, task = read_run(run, **given, **{name: value for name, value in changed.items() if value is not None})
    setup = load_run(config, task, allow_base_mismatch=allow_base_mismatch)
    found = setup.test(part=split)
    return {
        "split": split, "acc1": found.top1, "mean_per_class": found.mean_per_class, "macro_f1": found.macro_f1,
        "ece": found.ece, "n": found.n, "percent_off": percent_off(setup.masks),
        "per_class": dict(zip(setup.split.classnames, found.per_class)),
        "indices_sha": indices_sha256(getattr(setup.split, split), config), "mask_sha": task.bits_sha256,
        "env": environment(setup.device),
    }  # fmt: skip


def evaluate(args: "Namespace") -> None:
    """Measures a run and prints it."""
    result = evaluate_run(**{k: v for k, v in args.as_dict().items() if k not in ("per_class", "json")})
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(f"accuracy   {result['acc1']:.2f} % of {result['n']} {args.split} images")
    print(f"per class  {result['mean_per_class']:.2f} % on average, macro F1 {result['macro_f1']:.2f} %")
    print(f"ECE        {result['ece']:.2f} %")
    print(f"off        {result['percent_off']:.2f} %")
    for name, value in result["per_class"].items() if args.per_class else ():
        print(f"  {'no images' if value is None else f'{value:.2f} %':>10}  {name}")


def xd_options(parser: "ArgumentParser") -> None:
    """Of xd."""
    add = parser.add_argument
    add("run", type=str, metavar="RUN", help="folder that rmt train wrote, for ImageNet as a rule")
    add("--datasets", type=str, nargs="+", default=["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"],
        help="keys of data sets: see rmt data list")  # fmt: skip
    add("--root", type=str, help="folder of data sets (default: the run's own)")
    add("--device", type=str, help="auto, cpu, cuda, ... (default: the run's own)")


def xd(args: "Namespace") -> None:
    """Domain generalisation."""
    from .evaluate import read_config
    from .protocols import cross_domain

    root = args.root or read_config(args.run).root
    if root is None:
        raise UserError(f"xd needs --root, the folder of data sets: {args.run} was trained on a folder of its own")
    report_failures(cross_domain(args.run, args.datasets, root, **({"device": args.device} if args.device else {})))
