"""Commands that make something of tasks for others: compose, push, export."""

from typing import TYPE_CHECKING

from .task_commands import TASK, base_options

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def compose_options(parser: "ArgumentParser") -> None:
    """Of compose."""
    add = parser.add_argument
    add("operation", type=str, metavar="OPERATION", help="union, intersection, difference or vote")
    add("tasks", type=str, nargs="+", metavar="TASK", help=f"two or more, on one base model: {TASK}")
    add("--out", type=str, required=True, help="task folder to write")
    add("--votes", type=int, help="of a vote: how many must have a weight off (default: more than half)")
    add("--classnames", type=str, nargs="+", help="in place of the tasks' own, which are kept where all agree")
    add("--template", type=str, help="in place of the tasks' own, with one {} for the class name")


def compose(args: "Namespace") -> None:
    """Writes the union, intersection, difference or vote of what tasks switch off."""
    from .checkpoint import load_task, write_task
    from .compose import compose
    from .evaluate import task_path

    tasks = [load_task(task_path(path)) for path in args.tasks]
    made = compose(args.operation, tasks, args.votes, args.classnames, args.template)
    written = write_task(args.out, made, {"made by": str(made.path)})
    off, weights = sum(map(written.off, written.shapes)), sum(n * k for n, k in written.shapes.values())
    print(f"composed   {written.path.parent}: {off:,} of {weights:,} weights off ({100 * off / weights:.2f} %)")
    if not written.classnames:
        print("           without class names: the tasks have others, and --classnames gave none")


def push_options(parser: "ArgumentParser") -> None:
    """Of push."""
    add = parser.add_argument
    add("task", type=str, metavar="TASK", help="task folder or run folder")
    add("repo", type=str, metavar="USER/NAME", help="repository on the hub, made where it is missing")
    add("--private", action="store_true", help="make it private, where it is made")
    add("--branch", type=str, help="that is there already (default: main)")
    add("--message", type=str, help="of the commit")


def push(args: "Namespace") -> None:
    """Pushes a task to the hub, with the token of HF_TOKEN or `hf auth login`."""
    from .evaluate import task_path
    from .hub import HubTask

    options = {"private": args.private or None, "branch": args.branch, "commit_message": args.message}
    given = {name: value for name, value in options.items() if value is not None}
    print(f"pushed     {HubTask.of(task_path(args.task)).push_to_hub(args.repo, **given)}")


def export_options(parser: "ArgumentParser") -> None:
    """Of export."""
    from .export import FORMATS

    base_options(parser)
    add = parser.add_argument
    add("--format", type=str, choices=FORMATS, default="torch", help="torch (.pt2 of torch.export) or onnx")
    add("--features", action="store_true", help="image features only, without the classes' text features baked in")
    add("--out", type=str, required=True, help="file to write; OUT.json says what goes in and what comes out")


def export(args: "Namespace") -> None:
    """Writes the merged image tower, with class probabilities, as one file that has been run and compared."""
    from .evaluate import task_path
    from .export import ATOL, export

    out = export(
        task_path(args.task), args.out, args.format, args.features, args.model, args.pretrained,
        allow_base_mismatch=args.allow_base_mismatch,
    )  # fmt: skip
    print(f"exported   {out}, {out.stat().st_size:,} bytes; run and equal to the masked model, cosines within {ATOL:g}")
