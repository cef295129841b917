"""The `rmt` command: parse, call, print."""

import argparse
import sys
import warnings
from collections.abc import Sequence

from torch import OutOfMemoryError

from rmt_kernels import BackendUnavailable

from . import __version__
from .config import TARGETS, MaskConfig, RunConfig, TrainConfig, UserError, parse_targets

EPILOG = """\
rmt train --model local-dir:weights/my_clip --data folders/pets --template "a photo of a {}." --shots 16 --out runs/pets
rmt eval runs/pets
"""


def _shots(text: str) -> int | None:
    return None if text == "all" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rmt", description="Regularized mask tuning of CLIP.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"rmt {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands)
    evaluate = commands.add_parser("eval", help="measure a finished run again, from its files")
    evaluate.add_argument("run", metavar="RUN", help="folder that rmt train wrote")
    evaluate.add_argument("--data", help="folder with the same classes (default: the run's own)")
    evaluate.add_argument("--device", help="auto, cpu, cuda, cuda:1, ... (default: the run's own)")
    evaluate.add_argument("--per-class", action="store_true", help="print each class's accuracy as well")
    commands.add_parser("doctor", help="versions, backends and a self-test; --json for a machine", add_help=False)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    mask, train, run = MaskConfig(), TrainConfig(), RunConfig(model="local-dir:", data="")
    add = commands.add_parser("train", help="tune masks on a folder of images").add_argument
    add("--model", required=True, help="local-dir:PATH, hf-hub:ID or an open_clip name (with --pretrained)")
    add("--pretrained", help="open_clip's tag of the weights, or a file")
    add("--data", required=True, help="FOLDER/{train,val,test}/{class}/*.jpg, or FOLDER/{class}/*.jpg")
    add("--out", required=True, help="run folder, made new")
    add("--template", default=run.template, help=f"text with {{}} for the class name (default: {run.template!r})")
    add("--shots", type=_shots, default=run.shots, help=f"training images a class, or all (default: {run.shots})")
    add("--seed", type=int, default=train.seed, help=f"of sample, order, crops and dropout (default: {train.seed})")
    add("--image-size", type=int, help="side in pixels (default: the model's own)")
    add("--targets", default=",".join(mask.targets),
        help=f"some of {','.join(TARGETS)}, or ramt, rmmt, rpmt (default: %(default)s)")  # fmt: skip
    add("--init", type=float, default=mask.init, help="first score (default: %(default)s)")
    add("--threshold", type=float, default=mask.threshold, help="a weight is on above it (default: %(default)s)")
    add("--lr", type=float, default=train.lr, help="Adam's first step size (default: %(default)s)")
    add("--epochs", type=int, default=train.epochs, help="(default: %(default)s)")
    add("--steps", type=int, help="stop after so many, in place of --epochs")
    add("--batch", type=int, default=train.batch, help="images a step (default: %(default)s)")
    add("--strength", type=float, default=train.strength,
        help="of gradient dropout, the paper's lambda: 1 zeroes, 0 is none (default: %(default)s)")  # fmt: skip
    add("--l2", type=float, default=train.l2, help="coefficient of the scores' norms (default: %(default)s)")
    add("--temperature", type=float, default=train.temperature, help="of the general loss (default: %(default)s)")
    add("--log-every", type=int, default=train.log_every, help="steps between two lines (default: %(default)s)")
    add("--device", default=run.device, help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")


def _run_config(args: argparse.Namespace) -> RunConfig:
    mask = MaskConfig(parse_targets(args.targets), args.init, args.threshold)
    train = TrainConfig(
        lr=args.lr, epochs=args.epochs, steps=args.steps, batch=args.batch, strength=args.strength, l2=args.l2,
        temperature=args.temperature, seed=args.seed, log_every=args.log_every,
    )  # fmt: skip
    return RunConfig(
        model=args.model, data=args.data, template=args.template, pretrained=args.pretrained, shots=args.shots,
        image_size=args.image_size, device=args.device, mask=mask, train=train,
    )  # fmt: skip


def _train(args: argparse.Namespace) -> None:
    from .train import run

    run(_run_config(args), args.out)


def _eval(args: argparse.Namespace) -> None:
    import dataclasses

    from .evaluate import load_run, read_run
    from .masking import percent_off

    config, task = read_run(args.run)
    changed = {name: value for name in ("data", "device") if (value := getattr(args, name)) is not None}
    setup = load_run(dataclasses.replace(config, **changed), task)
    measured = setup.test()
    print(f"tuned      {measured}")
    print(f"off        {percent_off(setup.masks):.2f} %")
    if args.per_class:
        for name, value in zip(setup.split.classnames, measured.per_class):
            print(f"  {'no images' if value is None else f'{value:.2f} %':>10}  {name}")


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"rmt: warning: {message}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0, or 2 with one line on stderr for a mistake of the user's."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["doctor"]:
        from .doctor import main as doctor

        return doctor(argv[1:])
    args = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            {"train": _train, "eval": _eval}[args.command](args)
        # OSError: a full disk, a folder without permission, a file that went away.
        except (UserError, OSError, BackendUnavailable, OutOfMemoryError) as error:
            print(f"rmt: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
