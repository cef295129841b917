"""One training step shared by processes on this machine, measured against `rmt plan --world`.

    python bench/data_parallel.py [--json FILE]          ViT-B/32, batch 32 in total, at 1, 2 and 4 gloo processes
    python bench/data_parallel.py --layouts [--json FILE]    replicated, zero and sharded on 2 processes
    python bench/data_parallel.py --quick                a small model, once: that it works; its numbers say nothing

Random weights and images, a few bits off. A process has one thread and one core, its rank modulo the cores there are;
beside them runs one process with two threads on two cores, of which two processes should reach 0.9. Every variant
has processes of its own, all take turns, and the median of all steps after the first WARM counts. Before the table
stands that all took the same steps: the same loss, and the bytes that the plan says.

The plan knows of this machine what is measured here, in the same run, without any exchange: steps of two other shares
of the batch in one process alone, and in as many at once as there are cores, which share their memory; bandwidth and
latency of gloo's all_reduce between two processes. Processes beyond the cores take turns on them, so that computing
and sending take as many times as long. Nothing overlaps: sending takes the cores that compute. Rows: bench/README.md.

--layouts: what a rank holds at most in a step, the bytes that it hands over, and the time, of each layout that
`rmt train` has. Memory is the process's, with what Python and torch take (`empty_bytes`: before there is a model), and
with MALLOC_MMAP_THRESHOLD_ set: by itself glibc keeps much of what is freed, most where most is gathered and freed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from rmt.config import MaskConfig, TrainConfig  # noqa: E402
from rmt.masking import apply_masks  # noqa: E402
from rmt.meet import joined  # noqa: E402
from rmt.plan import plan_step  # noqa: E402
from rmt.plan_traffic import LAYOUTS, Link, Sharing  # noqa: E402
from rmt.plan_world import Rates, memory, plan_rank  # noqa: E402
from rmt.train import tune  # noqa: E402
from rmt.world import World  # noqa: E402

CLASSES, STRENGTH, LR, LOG_EVERY, WARM = 100, 0.3, 1e-6, 10, 2
MASK = MaskConfig(targets=("attention", "conv"))
RANKS = (1, 2, 4)
WITHIN, OF_TWO_THREADS, LOSS = 0.15, 0.9, 1e-4
LIMIT_S = 540.0
SMALL, LARGE, TIMES = 8, 25 << 20, 15  # bytes of a sum, and how often it is timed


@dataclass(frozen=True)
class Setup:
    model: str = "ViT-B-32"
    size: int | None = None
    batch: int = 32
    steps: int = 5
    rounds: int = 3


QUICK = Setup("ViT-S-32-alt", 64, 8, 2, 1)


@dataclass(frozen=True)
class Variant:
    """processes at once, each of `batch` images, or sharing them in a layout; link: no step, the all_reduce alone."""

    processes: int
    batch: int
    sharing: bool = False
    threads: int = 1
    link: bool = False
    layout: str = "replicated"


def resident(peak: bool) -> int:
    """Bytes of this process, now or at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    name = "VmHWM:" if peak else "VmRSS:"
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def work(setup: Setup, variant: Variant) -> dict:
    """What one process measures, in a process of its own."""
    rank, cores = int(os.environ.get("RANK", 0)), sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[(rank + n) % len(cores)] for n in range(variant.threads)])
    torch.set_num_threads(variant.threads)
    layout = {"zero": variant.layout == "zero", "shard": variant.layout == "sharded"}
    with joined("cpu", **layout, timeout=LIMIT_S) as world:
        return time_link(world) if variant.link else time_steps(setup, variant, world)


def time_link(world: World) -> dict:
    """Seconds of a small and of a large all_reduce, medians."""
    found = {}
    for name, size in {"small": SMALL, "large": LARGE}.items():
        tensor, taken = torch.zeros(size // 4), []
        for _ in range(TIMES + WARM):
            start = time.perf_counter()
            world.start_sum_(tensor)()
            taken.append(time.perf_counter() - start)
        found[name] = statistics.median(taken[WARM:])
    return found


def time_steps(setup: Setup, variant: Variant, world: World) -> dict:
    import open_clip

    empty = resident(peak=False)
    torch.manual_seed(0)
    model = open_clip.create_model(setup.model, pretrained=None, force_image_size=setup.size).eval()
    side = model.visual.image_size
    side = (side, side) if isinstance(side, int) else tuple(side)
    text = F.normalize(torch.randn(CLASSES, model.visual.output_dim), dim=-1)
    image, label = torch.randn(variant.batch, 3, *side), torch.randint(CLASSES, (variant.batch,))
    for mask in apply_masks(model, MASK):
        with torch.no_grad():
            # 2.5 % off, as the paper reports.
            mask.scores.copy_(MASK.threshold + 4.9e-3 + 2.5e-3 * torch.randn(mask.scores.shape))
    mine = world.share(variant.batch) if variant.sharing else slice(None)
    image, label = image[mine], label[mine]
    config = TrainConfig(batch=variant.batch, strength=STRENGTH, lr=LR, log_every=LOG_EVERY)
    world.sum([0.0])  # until all are there
    world.sent = 0
    ends, rows, peaks = [time.perf_counter()], [], []

    def tick(step: int) -> None:
        # The first step makes what is kept.
        forget_peak() if step == 1 else peaks.append(resident(peak=True))
        ends.append(time.perf_counter())

    tune(
        model, text, lambda step: (image, label), [LR] * (WARM + setup.steps), config, log=rows.append, tick=tick,
        world=world if variant.sharing else None,
        total=variant.batch if variant.sharing and not world.alone else None,
    )  # fmt: skip
    taken = [end - start for start, end in pairwise(ends)][WARM:]
    held = {"peak_bytes": max(peaks), "empty_bytes": empty}
    return {"seconds": taken, "task": rows[-1]["task"], "sent": world.sent, "rows": len(rows)} | held


def launch(setup: Setup, variant: Variant) -> list[dict]:
    """What each process says, by rank."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60))
    started, found = [], []
    with tempfile.TemporaryFile("w+") as errors:
        for rank in range(variant.processes):
            where = {"RANK": rank, "WORLD_SIZE": variant.processes, "MASTER_ADDR": "localhost"}
            where |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            where |= {"TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": variant.threads, "PYTHONPATH": ROOT}
            command = [sys.executable, __file__, "--work", json.dumps([vars(setup), vars(variant)])]
            env = os.environ | {name: str(value) for name, value in where.items()}
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True))
        end = time.monotonic() + LIMIT_S
        try:
            for process in started:
                out, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
                if process.returncode:
                    errors.seek(0)
                    raise SystemExit(f"{variant} failed: {errors.read()[-2000:]}")
                found.append(json.loads(out.splitlines()[-1]))
        finally:
            for process in started:
                process.kill()
                process.wait()
    return found


def check(setup: Setup, variant: Variant, said: list[dict], loss: float, handed: float) -> None:
    """Raises SystemExit where processes that share a batch took other steps, or handed over other bytes than planned.

    loss: of one process with the whole batch, after as many steps. handed: gradients' bytes a step, planned.
    """
    for one in said:
        if abs(one["task"] - loss) > LOSS * abs(loss):
            raise SystemExit(f"{variant}: a loss of {one['task']}, and {loss} in one process")
        # Logged rows are few: 40 bytes each.
        want = (WARM + setup.steps) * handed + 40 * one["rows"] if variant.processes > 1 else 0
        if one["sent"] != want:
            raise SystemExit(f"{variant}: {one['sent']} bytes handed to collectives, {want} planned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write all rows here")
    parser.add_argument("--model", default=Setup.model)
    parser.add_argument("--batch", type=int, default=Setup.batch, help="in total; a multiple of 4")
    parser.add_argument("--steps", type=int, default=Setup.steps, help="timed ones of each process")
    parser.add_argument("--rounds", type=int, default=Setup.rounds, help="how often all variants take their turns")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layouts", action="store_true", help="the layouts of two processes instead")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        setup, variant = json.loads(args.work)
        print(json.dumps(work(Setup(**setup), Variant(**variant))))
        return 0
    setup = QUICK if args.quick else Setup(args.model, None, args.batch, args.steps, args.rounds)
    cores = len(os.sched_getaffinity(0))
    b, busy = setup.batch, sorted({1, min(cores, max(RANKS))})
    two = Variant(1, b, threads=min(2, cores))
    shared = {n: Variant(n, b, sharing=True) for n in RANKS}
    rates = {n: [Variant(n, images) for images in (b // 4, 3 * b // 4)] for n in busy}
    links = {n: Variant(n, 0, link=True) for n in RANKS if n > 1}
    variants = [two, *shared.values(), *(v for row in rates.values() for v in row), *links.values()]
    if args.layouts:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
        variants = [Variant(2, b, sharing=True, layout=layout) for layout in LAYOUTS]
    said: dict[Variant, list[dict]] = {v: [] for v in variants}
    with harness.progress(len(variants) * setup.rounds, "variants") as bar:
        for _ in range(setup.rounds):
            for variant in variants:
                said[variant] += launch(setup, variant)
                bar.update()
    rows = layouts(setup, said) if args.layouts else judge(setup, cores, two, shared, rates, links, said)
    if args.json:
        base = harness.provenance(torch.device("cpu")) | {"bench": "data_parallel", "cores": cores, "quick": args.quick}
        harness.write_json(args.json, [base | row for row in rows])
    good = all(row["good"] for row in rows if "good" in row)
    # A quick run shows that all is there; how fast, it cannot say.
    return 0 if args.quick else int(not good)


def layouts(setup: Setup, said: dict[Variant, list[dict]]) -> list[dict]:
    """A row for each layout, of its rank that holds most. Prints them; raises SystemExit where losses differ."""
    rows, lines, loss = [], [], next(iter(said.values()))[0]["task"]
    plan = plan_step(setup.model, MASK, TrainConfig(batch=-(-setup.batch // 2), strength=STRENGTH),
                     image_size=setup.size, classes=CLASSES)  # fmt: skip
    for variant, ranks in said.items():
        if any(abs(one["task"] - loss) > LOSS * abs(loss) for one in ranks):
            raise SystemExit(f"{variant.layout}: losses {[one['task'] for one in ranks]}, and {loss} replicated")
        ms = 1e3 * statistics.median(s for one in ranks for s in one["seconds"])
        peak, sent = (max(one[name] for one in ranks) for name in ("peak_bytes", "sent"))
        planned = sum(memory(plan, variant.processes, Sharing(variant.layout)).values())
        error = planned / (peak - ranks[0]["empty_bytes"]) - 1
        rows.append({
            "what": "layout", "model": setup.model, "batch": setup.batch, "processes": variant.processes,
            "layout": variant.layout, "ms": ms, "peak_bytes": peak, "empty_bytes": ranks[0]["empty_bytes"],
            "planned_bytes": planned, "error": error, "handed": sent / (WARM + setup.steps),
            "good": abs(error) <= WITHIN,
        })  # fmt: skip
        mib = [f"{rows[-1][name] / 2**20:,.1f}" for name in ("peak_bytes", "empty_bytes", "planned_bytes", "handed")]
        mib.insert(3, f"{100 * error:+.1f} %")
        lines.append([variant.layout, f"{ms:.1f}", *mib])
    print(f"\n{setup.model}, batch {setup.batch}, two processes; planned: peak less empty; handed: of a run, a step")
    harness.print_table(["layout", "ms", "peak MiB", "empty MiB", "planned MiB", "error", "handed MiB"], lines)
    return rows


def judge(
    setup: Setup, cores: int, two: Variant, shared: dict, rates: dict, links: dict, said: dict[Variant, list[dict]]
) -> list[dict]:  # fmt: skip
    """The rows: what was measured, and planned from it. Prints both."""
    train = TrainConfig(batch=setup.batch, strength=STRENGTH)
    shares = {n: -(-setup.batch // n) for n in shared}
    options = {"image_size": setup.size, "classes": CLASSES}
    plan = {n: plan_step(setup.model, MASK, TrainConfig(batch=b, strength=STRENGTH), **options)
            for n, b in shares.items()}  # fmt: skip

    def ms(variant: Variant) -> float:
        return 1e3 * statistics.median(s for one in said[variant] for s in one["seconds"])

    base = {"model": setup.model, "steps": setup.steps, "rounds": setup.rounds}
    rows, fits, found = [], {}, {}
    for n, row in rates.items():
        fits[n] = Rates.fit([(v.batch, ms(v) / 1e3) for v in row], Rates(0.0, 0.0))
        # `rmt plan --measured` takes steps of a device alone.
        name = "step_ms" if n == 1 else "busy_step_ms"
        rows += [base | {"what": "rate", "processes": n, "batch": v.batch, name: ms(v)} for v in row]
    for n, variant in links.items():
        small, large = (statistics.median(one[name] for one in said[variant]) for name in ("small", "large"))
        latency = small / (2 * (n - 1))
        found[n] = Link(2 * (n - 1) / n * LARGE / max(large - small, 1e-9), latency, 0.0)
        rows.append(base | {"what": "link", "processes": n, "bytes_per_s": found[n].bandwidth, "latency_s": latency})
        print(f"gloo, {n} processes: {found[n].bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.0f} us a message")
    base["batch"], alone = setup.batch, ms(two)
    rows.append(base | {"what": "threads", "processes": 1, "threads": two.threads, "ms": alone})
    loss, lines = said[shared[1]][0]["task"], []
    for n, variant in shared.items():
        crowd = max(1.0, n / cores)
        fit = fits[min(n, cores)] if min(n, cores) in fits else fits[max(fits)]
        link = Link(found[2].bandwidth / crowd, found[2].latency * crowd, 0.0)
        sharing = Sharing(log_every=LOG_EVERY)
        one = plan_rank(plan[n], n, shares[n], sharing, link, Rates(fit.image * crowd, fit.fixed * crowd))
        check(setup, variant, said[variant], loss, one.handed.get("gradients", 0))
        measured, planned = ms(variant), 1e3 * one.step
        error, ratio = planned / measured - 1, alone / measured
        good = abs(error) <= WITHIN and (n != 2 or ratio >= OF_TWO_THREADS)
        rows.append(base | {
            "what": "shared", "processes": n, "measured_ms": measured, "planned_ms": planned, "error": error,
            "seconds": one.seconds, "handed": one.handed, "of_two_threads": ratio, "good": good,
        })  # fmt: skip
        parts = [f"{1e3 * one.seconds[term]:.1f}" for term in ("images", "update", "bandwidth", "latency")]
        lines.append([
            f"{n}", f"{measured:.1f}", f"{planned:.1f}", f"{100 * error:+.1f} %", *parts, f"{ratio:.3f}",
            "yes" if good else "NO",
        ])  # fmt: skip
    print(f"\n{setup.model}, batch {train.batch}, {cores} cores; ms a step, one process with {two.threads} threads: "
          f"{alone:.1f}; losses and bytes handed over are equal to the planned")  # fmt: skip
    header = ["processes", "measured", "planned", "error", "images", "update", "bandwidth", "latency", "of two threads"]
    harness.print_table([*header, f"within {100 * WITHIN:.0f} %"], lines)
    print(f"two processes are to reach {OF_TWO_THREADS} of one with two threads: {alone / ms(shared[2]):.3f}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
