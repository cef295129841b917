"""`rmt sweep`: what it takes and calls."""

from typing import TYPE_CHECKING, Any, Literal

from .config import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def options(parser: "ArgumentParser") -> None:
    """Of sweep."""
    add = parser.add_argument
    add("sweep", type=str, metavar="SWEEP.YAML", help="base options, and the lists whose cross product makes the runs")
    add("--out", type=str, required=True, help="folder of the sweep; one that was stopped there goes on")
    add("--engine", type=Literal["local", "ray", "slurm"], default="local", help="what runs the runs")
    about = "most runs at once (default: one a GPU, or one a core; ray: what fits; slurm: what it gives)"
    add("--workers", type=int | None, default=None, help=about)
    add("--retries", type=int, default=2, help="how often a run is started again whose process or node was lost")
    add("--cpus", type=float, default=1.0, help="ray: cores that a run takes, also a part of one")
    add("--gpus", type=float, default=0.0, help="ray: GPUs that a run takes, also a part: 0.25 puts four on one")
    add(
        "--address",
        type=str | None,
        default=None,
        help="ray: the cluster's (default: RAY_ADDRESS, or one that is here)",
    )
    about = "ray: keep one backbone in the memory of each GPU, for all runs on it (no GPU has confirmed it)"
    add("--hold", action="store_true", help=about)
    about = "slurm: parameters of submitit's executor: '{timeout_min: 60, gpus_per_node: 1, slurm_partition: a100}'"
    add("--slurm", type=dict[str, Any], default={}, help=about)
    add("--dry-run", action="store_true", help="list the runs and how they stand, and write nothing")


def command(args: "Namespace") -> None:
    """Runs the sweep, or lists it. Raises UserError; where runs failed, after the others."""
    from .sweep.drive import Engine, planned, sweep

    engine = Engine(
        args.engine, args.workers, args.retries, args.cpus, args.gpus, args.address, args.slurm, args.hold
    )  # fmt: skip
    if args.dry_run:
        found = planned(args.sweep, args.out)
        for job, state in found:
            print(f"{state:9} {job.run.label}  {job.id[:16]}")
        print(f"sweep      {len(found)} runs, {sum(state == 'finished' for _, state in found)} finished")
        return
    failed = [row for row in sweep(args.sweep, args.out, engine) if row["status"] == "failed"]
    if failed:
        raise UserError(f"{len(failed)} failed, the others are done: {failed[0]['run']}: {failed[0]['why']}")
