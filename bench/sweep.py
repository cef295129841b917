"""How near a sweep on a Ray cluster comes to the ideal: the sum of its runs' times over the workers.

    python bench/sweep.py                      60 runs on three nodes of one core each
    python bench/sweep.py --lose               the same, with a node killed when a third of the runs are done
    python bench/sweep.py --quick              six short runs: that it works; its numbers say nothing

The nodes are processes of this machine with addresses of their own (bench/ray_cluster.py). A run's time is what its row
in the table says, from the start of its work to its result. Beside it the wall clock has Ray's scheduling, the start of
Python and torch on the nodes, reading and sharing the model, writing the table and, with --lose, noticing the loss and
the work that was lost. Nodes are up before it starts. Needs `pip install 'rmt[ray]'`.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import yaml
from harness import provenance, write_json
from ray_cluster import cluster, wait_for_nodes

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "rmt")]

import tiny  # noqa: E402

from rmt.sweep.drive import Engine, sweep  # noqa: E402

LIMITS = {False: 1.15, True: 1.4}
LOSE_AT = 1 / 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=150, help="training steps of a run on the tests' tiny CLIP")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--lose", action="store_true", help="kill a node when a third of the runs are done")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the row to this file")
    args = parser.parse_args()
    if args.quick:
        args.runs, args.steps = 6, 5
    with tempfile.TemporaryDirectory(prefix="rmt-bench-sweep-") as scratch:
        row = measure(Path(scratch), args.runs, args.steps, args.nodes, args.lose)
    print(json.dumps(row, indent=2))
    limit = LIMITS[args.lose]
    print(f"at most {limit}x of the ideal: {'yes' if row['over_ideal'] <= limit else 'NO'}, {row['over_ideal']:.3f}")
    if args.json:
        write_json(args.json, [row])
    # A quick run shows that all is there; how fast, it cannot say.
    return 0 if args.quick else int(row["over_ideal"] > limit)


def measure(folder: Path, runs: int, steps: int, count: int, lose: bool) -> dict:
    """One sweep. Raises AssertionError where a run is lost, failed, or there twice."""
    import ray

    tiny.splits(folder / "data", train=8, test=6)
    train = {"lr": 2e-3, "steps": steps, "batch": 8}
    base = {"model": tiny.model_folder(folder / "model"), "data": str(folder / "data"), "device": "cpu", "train": train}
    spec = folder / "sweep.yaml"
    spec.write_text(yaml.safe_dump({"base": base, "shots": [4], "seeds": list(range(1, runs + 1))}))
    with cluster(count) as nodes:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
        # Without a shutdown before the cluster's end, Ray aborts the process and hides what went wrong.
        try:
            wait_for_nodes(ray, count)
            if lose:
                threading.Thread(target=_lose, args=(nodes, folder / "out", runs), daemon=True).start()
            start = time.perf_counter()
            rows = sweep(spec, folder / "out", Engine("ray"))
            wall = time.perf_counter() - start
        finally:
            ray.shutdown()
        apart = nodes.apart
    lines = (folder / "out" / "results.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) == runs, "a run is lost, or there twice"
    assert all(row["status"] == "done" for row in rows), [row for row in rows if row["status"] != "done"][:1]
    retried = sum(row["attempt"] > 1 for row in rows)
    assert retried or not lose, "the lost node had no run"
    seconds = sum(row["seconds"] for row in rows)
    return {
        "bench": "sweep", "runs": runs, "steps": steps, "nodes": count, "namespaces": apart, "lost_a_node": lose,
        "retried": retried, "wall_s": wall, "sum_of_runs_s": seconds, "ideal_s": seconds / count,
        "over_ideal": wall / (seconds / count), **provenance(torch.device("cpu")),
    }  # fmt: skip


def _lose(nodes, out: Path, runs: int) -> None:
    table = out / "results.jsonl"
    while not table.is_file() or len(table.read_text().splitlines()) < LOSE_AT * runs:
        time.sleep(0.05)
    nodes.kill(0)


if __name__ == "__main__":
    sys.exit(main())
