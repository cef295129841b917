"""The commands `rmt route train` and `rmt route eval`: routed layers in a host, tuned on captions or on questions."""

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Literal

from .config import UserError, build

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

# What an evaluation may ask otherwise than its run.
EVAL = ("captions", "questions", "generate", "beams", "limit", "batch", "device")
MANY = {"sites": str, "layers": int}


def train_options(parser: "ArgumentParser") -> None:
    """Of route train: the fields of a RouteConfig, what is not given left to preset and defaults."""
    from .routing.run_config import RouteConfig
    from .routing.train import PRESETS

    add, helps = parser.add_argument, _helps(RouteConfig)
    add("--config", type=str, help="a run's config.yaml; options beside it change its values")
    about = "recipe of the official code's scripts; options beside it change its values"
    add("--preset", type=Literal[tuple(PRESETS)], help=about)
    for field in dataclasses.fields(RouteConfig):
        about, default = helps[field.name], field.default
        if default not in (dataclasses.MISSING, None, False):
            about += f" (default: {' '.join(default) if isinstance(default, tuple) else default})"
        option = f"--{field.name.replace('_', '-')}"
        if field.name in MANY:
            add(option, type=MANY[field.name], nargs="+", help=about)
        else:
            kind = field.type if field.default is None else field.type | None
            add(option, type=kind, **({"nargs": "?", "const": True} if field.type is bool else {}), help=about)
    add("--out", type=str, required=True, help="run folder; a run that was stopped there goes on")


def _helps(kind: type) -> dict[str, str]:
    """From the docstring, where several fields may share a line: `r: width. alpha: of the scale.`"""
    names = [field.name for field in dataclasses.fields(kind)]
    text = " ".join(kind.__doc__.partition("Args:")[2].split())
    pieces = re.split(rf"(?:^|(?<=\. ))({'|'.join(names)}): ", text)
    return {name: about.strip().rstrip(".") for name, about in zip(pieces[1::2], pieces[2::2])}


def train(args: "Namespace") -> None:
    """Runs, or goes on."""
    from .routing.run import run_routing

    run_routing(_config(args), args.out)


def _config(args: "Namespace"):
    """File, then preset, then what was given. Raises UserError."""
    from .routing.run_config import HOSTS, RouteConfig, host_of, read_yaml
    from .routing.train import PRESETS

    values = read_yaml(args.config) if args.config else {}
    values |= PRESETS[args.preset] if args.preset else {}
    given = args.as_dict()
    names = [field.name for field in dataclasses.fields(RouteConfig)]
    values |= {name: given[name] for name in names if given[name] is not None}
    # The config cannot tell an epochs that was asked for from its default, which steps stand in place of.
    if given["epochs"] is not None and values.get("steps") is not None:
        raise UserError(f"--epochs or steps must be given, not both, got {given['epochs']} and {values['steps']}")
    # Before the config, which would complain of the preset's values one by one.
    host = host_of(values.get("model"), values.get("questions"))
    if args.preset and (own := args.preset.partition("-")[0]) != host:
        raise UserError(f"--preset {args.preset} is of {HOSTS[own]}, not of {HOSTS[host]}")
    return build(RouteConfig, values, "config")


def eval_options(parser: "ArgumentParser") -> None:
    """Of route eval."""
    add = parser.add_argument
    add("run", type=str, metavar="RUN", help="folder that rmt route train wrote")
    add("--captions", type=str, help="another caption folder (default: the run's own)")
    add("--questions", type=str, help="another folder of questions (default: the run's own)")
    add(
        "--split", type=Literal["train", "val", "test"] | None, help="part to measure (default: test; of questions val)"
    )
    add("--generate", type=int, help="caption so many images and score them (default: the run's own)")
    add("--beams", type=int, help="of the search for captions (default: the run's own)")
    add("--limit", type=int, help="measure on no more than so many images or questions (default: the run's own)")
    add("--batch", type=int, help="captions or questions a batch (default: the run's own)")
    add("--device", type=str, help="auto, cpu, cuda, cuda:1, ... (default: the run's own)")
    add("--json", action="store_true", help="print one JSON object instead of text")


def evaluate(args: "Namespace") -> None:
    """Measures a finished run."""
    import contextlib
    import io
    from pathlib import Path

    from .routing.run import CONFIG_FILE, evaluate_routing
    from .routing.run_config import RouteConfig, read_yaml

    path = Path(args.run) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{args.run} has no {CONFIG_FILE}: it must be a folder that rmt route train wrote")
    given = {name: getattr(args, name) for name in EVAL}
    values = read_yaml(path) | {name: value for name, value in given.items() if value is not None}
    config = build(RouteConfig, values, str(path))
    with contextlib.redirect_stdout(io.StringIO()) if args.json else contextlib.nullcontext():
        found = evaluate_routing(config, args.run, args.split)
    if args.json:
        print(json.dumps(found, indent=2))
