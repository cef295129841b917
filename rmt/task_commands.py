"""Commands on task folders: inspect, diff, merge, convert to-official. A run folder stands for the task in it."""

import json
from typing import TYPE_CHECKING

from .config import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

TASK = "task folder, run folder, or user/name[@revision] on the hub"


def inspect_options(parser: "ArgumentParser") -> None:
    """Of inspect."""
    parser.add_argument("task", type=str, metavar="TASK", help=TASK)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def inspect(args: "Namespace") -> None:
    """Prints what a task belongs to and its masks, layer by layer."""
    from .checkpoint import load_task
    from .compare_tasks import facts, format_rows, inspect
    from .evaluate import task_path

    task = load_task(task_path(args.task))
    about, rows = facts(task), inspect(task)
    if args.json:
        print(json.dumps({**about, "masks": rows}, indent=2))
        return
    classnames, size = about.pop("classnames"), task.path.stat().st_size
    features = about.pop("text_features")
    about.pop("config")
    about |= {"classes": f"{len(classnames)}: {', '.join(classnames)}", "file": f"{size:,} bytes"}
    about["text features"] = features and " x ".join(map(str, features))
    for name, value in about.items():
        print(f"{name:13}  {'not recorded' if value is None else value}")
    print(format_rows(rows))


def diff_options(parser: "ArgumentParser") -> None:
    """Of diff."""
    parser.add_argument("tasks", type=str, nargs="+", metavar="TASK", help=f"two or more, on one base model: {TASK}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def diff(args: "Namespace") -> None:
    """Prints what two tasks switch off in common, layer by layer; of more, how every two of them overlap."""
    from .checkpoint import load_task
    from .compare_tasks import P_NOTE, diff, format_matrix, format_rows, matrix
    from .evaluate import task_path

    tasks = [load_task(task_path(path)) for path in args.tasks]
    if len(tasks) == 2:
        rows = diff(*tasks)
        text = f"{format_rows(rows)}\n{P_NOTE.format(len(rows) - 1)}"
        print(json.dumps({"masks": rows}, indent=2) if args.json else text)
        return
    found = matrix(tasks)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for name, about, digits in (
        ("jaccard", "off in both / off in any", 3),
        ("lift", "off in both / so many by chance", 2),
        ("log10_p", "so many or more by chance, one-sided", 2),
    ):
        print(f"{name}: {about}\n{format_matrix(found['names'], found[name], digits)}\n")


def base_options(parser: "ArgumentParser") -> None:
    """A task, and which base model it goes on."""
    add = parser.add_argument
    add("task", type=str, metavar="TASK", help=TASK)
    add("--model", type=str, help="base model, as for rmt train (default: as the task names it)")
    add("--pretrained", type=str, help="its weights: a tag or a file")
    add("--allow-base-mismatch", action="store_true", help="use the masks on other base weights than they are made for")


def merge_options(parser: "ArgumentParser") -> None:
    """Of merge."""
    base_options(parser)
    parser.add_argument("--out", type=str, required=True, help="folder to make; open_clip loads it as local-dir:OUT")


def merge(args: "Namespace") -> None:
    """Writes a plain open_clip model."""
    from .evaluate import task_path
    from .merge import merge

    out = merge(
        task_path(args.task), args.out, args.model, args.pretrained, allow_base_mismatch=args.allow_base_mismatch
    )
    print(f"merged     local-dir:{out}, equal to the masked model bit for bit")


def to_official_options(parser: "ArgumentParser") -> None:
    """Of convert to-official."""
    base_options(parser)
    parser.add_argument("--epoch", type=int, default=30, help="that the official code looks for: the E of the name")
    parser.add_argument("--out", type=str, required=True, help="file to write: FOLDER/shared/model.pth.tar-E")


def to_official(args: "Namespace") -> None:
    """Writes an official checkpoint of a task."""
    import torch

    from . import clip
    from .checkpoint import load_task
    from .evaluate import task_path
    from .model import MaskModel
    from .official import write_official

    task = load_task(task_path(args.task))
    name, pretrained = args.model or task.model, args.pretrained or (None if args.model else task.pretrained)
    if name is None:
        raise UserError(f"{task.path} does not name its base model: --model must be given")
    loaded = clip.load(name, pretrained, task.config.get("image_size"), torch.device("cpu"))
    model = MaskModel.from_pretrained(loaded.model, task.path, allow_base_mismatch=args.allow_base_mismatch)
    write_official(args.out, model.masks, args.epoch)
    print(f"official   {args.out}, {len(model.masks)} masks")
