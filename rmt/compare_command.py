"""rmt compare: what it takes and calls."""

import shlex
import sys
from typing import TYPE_CHECKING

from .config import UserError
from .run_commands import many_seeds, run_config

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def options(parser: "ArgumentParser") -> None:
    """Of compare, beside those of a run."""
    from .peers.names import METHODS

    add = parser.add_argument
    about = f"some of {', '.join(METHODS)}, and what + makes of them: tip+ramt (default: the README's list)"
    add("--methods", type=list[str], default=None, help=about)
    about = "in place of --seed, one sample of the training images for each (default: 1 2 3)"
    add("--seeds", type=list[int] | None, help=about)
    about = "augmented passes over the training images whose frozen features are kept, for methods that train on these"
    add("--views", type=int, default=10, help=about)
    about = "most gradient steps through the image tower of any method (default: its authors' number)"
    add("--max_steps", type=int | None, default=None, help=about)
    add("--max_feature_steps", type=int | None, default=None, help="the same for methods that train on frozen features")
    add("--rates", type=dict[str, float], default={}, help="learning rates in place of the authors': lora=1e-3 ln=3e-3")
    add("--out", type=str, required=True, help="folder of the comparison; one that was stopped there goes on")


def compare(args: "Namespace") -> int:
    """Runs the comparison. Returns 1 where a method is missing from the table."""
    from .peers.compare import Options
    from .peers.compare import compare as run
    from .peers.names import DEFAULT

    config = run_config(args)
    shots = args.shots if isinstance(args.shots, list) else [args.shots]
    if not shots:
        raise UserError("a comparison needs at least one number of shots, got none")
    made = Options(args.views, args.max_steps, args.max_feature_steps, args.rates)
    command = f"rmt {shlex.join(sys.argv[1:])}"
    seeds = many_seeds(args.seeds, config)
    table = run(config, args.out, args.methods or DEFAULT, shots, seeds, made, command)
    return int(bool(table["missing"]))
