"""The list of `rmt` commands: what each takes and calls. Heavy modules are imported by the command that needs them."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from . import ablate_command as ablating
from . import compare_command as comparing
from . import plan_command as planning
from . import route_command as routing
from . import run_commands as runs
from . import share_commands as share
from . import sweep_command as sweeping
from . import task_commands as tasks
from .config import MaskConfig, RunConfig, SelectConfig, TrainConfig, UserError
from .hub_id import is_id
from .serve import command as serving

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

SHORT_CUTS = """
The part of a name before its dot may be left out (--lr for --train.lr), dashes may stand for underscores, and lists may
be given bare (--shots 1 4 16, --targets attention,mlp). A run folder's config.yaml is a --config that runs it again.
"""
# What the dataclasses' docstrings leave to the command line.


class Command(NamedTuple):
    """One command. run: its options are those of a RunConfig, with `rmt.cli.expand`'s short cuts."""

    summary: str
    options: Callable[["ArgumentParser"], None]
    call: Callable[["Namespace"], int | None]
    run: bool = False

    def parser(self, name: str) -> "ArgumentParser":
        """It raises argparse.ArgumentError on what it does not accept."""
        from jsonargparse import ArgumentParser

        text = self.summary + (SHORT_CUTS if self.run else "")
        parser = ArgumentParser(prog=f"rmt {name}", description=text, exit_on_error=False, allow_abbrev=False)
        if self.run:
            parser.add_argument("--config", action="config", help="YAML file; options after it change its values")
            parser.add_class_arguments(RunConfig, skip={"shots"})
            shots = int | Literal["all"] | list[int | Literal["all"]]
            parser.add_argument("--shots", type=shots, default=16)
            _add_helps(parser)
        self.options(parser)
        return parser


def _add_helps(parser: "ArgumentParser") -> None:
    """From the dataclasses' docstrings, where several fields may share a line: `lr: step size. epochs: passes.`"""
    for part, kind in {"": RunConfig, "mask.": MaskConfig, "select.": SelectConfig, "train.": TrainConfig}.items():
        names = [field.name for field in dataclasses.fields(kind)]
        text = " ".join(kind.__doc__.partition("Args:")[2].split())
        pieces = re.split(rf"(?:^|(?<=\. ))({'|'.join(names)}): ", text)
        helps = {part + name: text.strip() for name, text in zip(pieces[1::2], pieces[2::2])}
        for action in parser._actions:
            action.help = helps.get(action.dest, action.help)


def _data_list(args: "Namespace") -> None:
    from .data import listing

    rows = listing()
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        sizes = [row[part] for part in ("train", "val", "test")]
        counts = " / ".join("?" if size is None else f"{size:,}" for size in sizes)
        print(f"{row['dataset']:16} {row['classes']:5,} classes, {counts} images, {row['template']!r}")
        print(f"{'':16} {row['folder']}: {row['images']}{', ' + row['files'] if row['files'] else ''}")


def _data_check_options(parser: "ArgumentParser") -> None:
    parser.add_argument("--root", type=str, help="folder of data sets in CoOp's layout, or with coco/ and vqav2/")
    about = "keys of data sets: see rmt data list, and coco_captions, vqav2 (default: all of the list)"
    parser.add_argument("--dataset", type=str, nargs="+", help=about)
    parser.add_argument("--captions", type=str, help="folder with captions.json, captions.csv or dataset_coco.json")


def _data_check(args: "Namespace") -> int:
    """Returns 1 where a data set has a problem."""
    from .data import DATASETS, check, check_captions

    if args.root is None and args.captions is None:
        raise UserError("--root must be given, or --captions (--help says how)")
    reports = [check_captions(args.captions)] if args.captions else []
    reports += [check(args.root, key) for key in args.dataset or DATASETS] if args.root else []
    for report in reports:
        state = "problem" if report.problems else "ok"
        print(f"{report.key:16} {state:8} {'; '.join([*report.problems, *report.notes])}")
    return int(any(report.problems for report in reports))


def _report_options(parser: "ArgumentParser") -> None:
    about = (
        "folder that rmt compare, train (grids too) or b2n wrote, a folder of such folders, a bundle of results "
        "(JSON), or a task; of two or more tasks on one base model the page shows the overlap"
    )
    parser.add_argument("runs", type=str, nargs="+", metavar="PATH", help=about)
    parser.add_argument(
        "-o", "--out", type=str, help="HTML file to write (default: PATH/report.html; of several, report.html)"
    )


def _report(args: "Namespace") -> None:
    from .report_compare import report

    first, alone = Path(args.runs[0]), len(args.runs) == 1
    inside = alone and not first.is_file() and (first.is_dir() or not is_id(args.runs[0]))
    out = args.out or (f"{args.runs[0]}/report.html" if inside else "report.html")
    print(f"report     {report(args.runs, out, f'rmt report {shlex.join(args.runs)} --out {out}')}")


def _demo_options(parser: "ArgumentParser") -> None:
    parser.add_argument("--out", type=str, default="rmt_demo", help="folder to make")
    parser.add_argument("--seed", type=int, default=1, help="of the model, and the first of the runs'")
    parser.add_argument("--quick", action="store_true", help="test the path in seconds; its numbers say nothing")


def _demo(args: "Namespace") -> None:
    from .demo import demo

    demo(args.out, args.seed, args.quick)


def _doctor(args: "Namespace") -> int:
    from .doctor import main

    return main(["--json"] if args.json else [])


def _json_option(parser: "ArgumentParser") -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


COMMANDS = {
    "train": Command("Tune masks on a few images a class.", runs.shared_train_options, runs.train, run=True),
    "eval": Command("Measure a finished run, or a task that was shared.", runs.eval_options, runs.evaluate),
    "b2n": Command("Base to new: tune on half of the classes, test on both.", runs.b2n_options, runs.b2n, run=True),
    "ablate": Command("Vary one part of the method at a time, and tabulate.",
                      ablating.options, ablating.command, run=True),
    "xd": Command("Measure a run's masks on other data sets.", runs.xd_options, runs.xd),
    "compare": Command("Mask tuning beside its peers, and on top of them: one sample, one table.",
                       comparing.options, comparing.compare, run=True),
    "sweep": Command("Many runs from one YAML file: here, on a Ray cluster, or on SLURM.",
                     sweeping.options, sweeping.command),
    "plan": Command("What a training step needs: memory, FLOPs, its floor on a device.",
                    planning.options, planning.command),
    "select": Command("Show which weights a criterion would select.", runs.no_options, runs.select, run=True),
    "data list": Command("The data sets that rmt knows, and where it expects them.", _json_option, _data_list),
    "data check": Command("What is missing from a folder of data sets.", _data_check_options, _data_check),
    "route train": Command("Tune routed layers on captions or questions: LoRA and adapters that the image steers.",
                           routing.train_options, routing.train),
    "route eval": Command("Measure such a run: held-out loss, perplexity, captions; of questions the accuracy.",
                          routing.eval_options, routing.evaluate),
    "inspect": Command("What is in a task, layer by layer.", tasks.inspect_options, tasks.inspect),
    "diff": Command("What two tasks have in common, layer by layer; how more of them overlap.",
                    tasks.diff_options, tasks.diff),
    "compose": Command("Make one task of several: union, intersection, difference, vote.",
                       share.compose_options, share.compose),
    "merge": Command("Write a task and its model as a plain open_clip model.", tasks.merge_options, tasks.merge),
    "export": Command("Write a task and its image tower as one file for torch.export or ONNX.",
                      share.export_options, share.export),
    "push": Command("Push a task to the Hugging Face hub.", share.push_options, share.push),
    "convert from-official": Command("Make a run folder of a checkpoint of the official R-AMT code.",
                                     runs.from_official_options, runs.from_official, run=True),
    "convert to-official": Command("Write a task as a checkpoint of the official R-AMT code.",
                                   tasks.to_official_options, tasks.to_official),
    "demo": Command("The main job from nothing, with no network: a small CLIP, then handwritten digits.",
                    _demo_options, _demo),
    "serve": Command("Answer over HTTP, many tasks in one batch (pip install 'rmt[serve]').",
                     serving.options, serving.serve),
    "report": Command("Write one HTML page about runs, comparisons, tables, tasks.", _report_options, _report),
    "doctor": Command("Versions, backends and a self-test.", _json_option, _doctor),
}  # fmt: skip
