"""`rmt ablate`: runs ablations of the method, see `rmt.ablations`."""

import argparse
from typing import TYPE_CHECKING, Any

from .config import UserError
from .run_commands import many_seeds, report_failures, run_config

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class _List(argparse.Action):
    """Prints the ablations and ends, as --help does: without the options that a run needs."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=options["help"])

    def __call__(self, parser: "ArgumentParser", *_: Any) -> None:
        from .ablations import ABLATIONS

        for name, ablation in ABLATIONS.items():
            print(f"{name:10} {ablation.summary}")
        parser.exit()


def options(parser: "ArgumentParser") -> None:
    """Of ablate."""
    add = parser.add_argument
    add("what", type=str, nargs="+", metavar="WHAT", help="ablations by name (--list), or all")
    add("--list", action=_List, help="print the ablations and end")
    about = "in place of --seed, one run of every cell for each (default: 1 2 3)"
    add("--seeds", type=list[int] | None, help=about)
    add("--out", type=str, required=True, help="folder of all cells; what is finished there is read back")


def command(args: "Namespace") -> None:
    """Runs and tabulates. Raises UserError; where cells failed, after the others."""
    from .ablations import ablate

    if isinstance(args.shots, list):
        raise UserError(f"ablate needs one number of shots (the ablation shots varies it), got {args.shots}")
    config = run_config(args)
    tables = ablate(config, args.out, args.what, many_seeds(args.seeds, config))
    report_failures({"failed": {path: why for table in tables.values() for path, why in table["failed"].items()}})
