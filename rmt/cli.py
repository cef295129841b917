"""The `rmt` command: finds the command, parses its options, calls it, and says what went wrong in one line.

What the commands take and do is in `rmt.commands`. jsonargparse makes the options of a run from the config dataclasses;
two short cuts are written out before it parses: the part of a name before its dot may be left out (`--lr` for
`--train.lr`), and lists may be given bare (`--shots 1 4 16`, `--targets attention,mlp`).
"""

import dataclasses
import difflib
import json
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence

from . import __version__
from .config import MaskConfig, SelectConfig, TrainConfig, UserError
from .meet import launched

SHORT = {
    field.name: f"{part}.{field.name}"
    for part, kind in {"mask": MaskConfig, "select": SelectConfig, "train": TrainConfig}.items()
    for field in dataclasses.fields(kind)
}
LISTS = ("shots", "seeds", "methods", "mask.targets", "mask.towers", "mask.modules")
TABLES = ("rates",)
SHARED = ("train",)  # commands that several processes of torchrun may run together
INTERRUPTED = 130


def expand(argv: Sequence[str]) -> list[str]:
    """The short cuts written out: `--image-size 8` as `--image_size 8`, `--lr 1` as `--train.lr 1`, lists as JSON."""
    done, rest = [], list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            done.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        name = name.replace("-", "_")
        name = SHORT.get(name, name)
        if name in TABLES and not equals:
            values = []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            done += [f"--{name}", *_as_table(values)]
            continue
        if name not in LISTS:
            done.append(f"--{name}{equals}{value}")
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("-"):
            values.append(rest.pop(0))
        done += [f"--{name}", *_as_list(name, values)]
    return done


def _as_list(name: str, tokens: list[str]) -> list[str]:
    if not tokens or (len(tokens) == 1 and (tokens[0] == "null" or tokens[0].startswith("["))):
        return tokens
    values = [value for token in tokens for value in token.split(",") if value]
    if name == "shots" and len(values) == 1:
        return values
    return ["[" + ",".join(v if re.fullmatch(r"-?\d+", v) else json.dumps(v) for v in values) + "]"]


def _as_table(tokens: list[str]) -> list[str]:
    """`lora=1e-3 ln=2e-3` as JSON; anything else is left for the parser to refuse."""
    pairs = [token.partition("=") for token in tokens]
    if not all(name and equals and re.fullmatch(r"[-+.\deE]+", value) for name, equals, value in pairs):
        return [" ".join(tokens)]
    return ["{" + ", ".join(f"{json.dumps(name)}: {value}" for name, _, value in pairs) + "}"]


def reason(error: ArgumentError, known: Sequence[str]) -> str:
    """jsonargparse's message in one line: the option, what was expected, what came. known: all options."""
    text = str(error)
    key = re.match(r'Parser key "(.+?)":', text)
    came = re.search(r"(?:Given value|Got value): (.*)\Z", text, re.S)
    if key and came:
        kinds = re.findall(r"Expected an? (.+?)(?:\. Got value|\n|\Z)", text)
        expected = " or ".join(dict.fromkeys(filter(None, map(_kind, kinds)))) or "another value"
        return f"--{key[1]} must be {expected}, got {came[1].strip()!r}"
    if missing := re.search(r"arguments are required: (.*)", text):
        names = [f"--{name}" if f"--{name}" in known else name.upper() for name in missing[1].split(", ")]
        return f"{', '.join(names)} must be given (--help says how)"
    if odd := re.match(r"unrecognized arguments: --([^\s=]+)", text):
        near = difflib.get_close_matches(odd[1], [k.removeprefix("--") for k in known], 1, 0.7)
        return " ".join(text.split()) + (f": did you mean --{near[0]}?" if near else "")
    return " ".join(text.split())


def _kind(text: str) -> str:
    """`<class 'float'>` -> a number; `typing.Literal['a', 'b']` -> a or b; None's class -> nothing, for brevity."""
    if literal := re.search(r"Literal\[(.*?)\]", text):
        return " or ".join(part.strip(" '") for part in literal[1].split(","))
    name = re.sub(r"<class '(\w+)'>", r"\1", text)
    return {"NoneType": "", "str": "a text", "int": "an integer", "float": "a number", "bool": "true or false"}.get(
        name, name
    )


def _usage() -> str:
    from .commands import COMMANDS

    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: rmt COMMAND [OPTIONS]", "", "Regularized mask tuning of CLIP.", "", *lines, "",
         "rmt COMMAND --help describes a command's options; rmt --version prints the version."]
    )  # fmt: skip


def _call(argv: list[str]) -> int:
    """Parses and runs. Raises UserError, and all that `rmt.failures` names."""
    from .commands import COMMANDS

    words = 2 if argv[0] in ("data", "convert", "route") else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        near = [known for known in COMMANDS if known.startswith(f"{argv[0]} ")]
        near = near or difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f": did you mean {' or '.join(near)}?" if near else f", one of {', '.join(COMMANDS)} is expected"
        raise UserError(f"there is no command {name!r}{hint}")
    if name not in SHARED and launched():
        raise UserError(f"torchrun's ranks can share only rmt {' and '.join(SHARED)}: start rmt {name} without it")
    command = COMMANDS[name]
    parser = command.parser(name)
    try:
        args = parser.parse_args(expand(rest) if command.run else rest)
    except ArgumentError as error:
        known = [*parser._option_string_actions, *(SHORT if command.run else ())]
        raise UserError(f"rmt {name}: {reason(error, known)}") from error
    return command.call(args) or 0


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"rmt: warning: {' '.join(str(message).split())}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status.

    0; 1 where a check found something; 2 with one line on stderr for a mistake of the user's or of the machine; 130
    where the user stopped it. Finished work stays, and a run that was stopped goes on when it is started again.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--version"]:
        print(f"rmt {__version__}")
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    from .failures import FAILURES
    from .memory import keep_freed_memory

    keep_freed_memory()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _call(argv)
        except FAILURES as error:
            print(f"rmt: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("rmt: stopped; what is finished is kept, and the same command goes on from there", file=sys.stderr)
            return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
