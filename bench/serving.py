"""Many tasks behind one server: python bench/serving.py [--quick] [--json FILE] [--model ViT-B-32] [--tasks 1 4 16 64]

Real server processes on loopback, real client processes, closed loop: every connection asks for one image and one task
drawn at random, waits for the answer and asks again. Compared: `rmt serve` (tasks mixed in one forward), and its code
over other ways to hold tasks (serving_variants.py): one adapter swapped per request, and one merged model per task in
memory, one request at a time or batched task by task. Random weights, random masks with 2.56 % off. All variants of a
number of tasks run at once, and their loads take turns; answers are compared before. Columns: bench/README.md.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import torch
from serving_variants import ALONE, GROUPED, MIXED, SWAP, VARIANTS

HERE = Path(__file__).parent
OFF = 0.0256
CLASSES = ("cat", "dog", "bird", "car", "tree")
# A connection is a thread of a client process: one that waits takes nothing.
CONNECTIONS_A_PROCESS = 16


def make(folder: Path, model: str, size: int | None, tasks: int, images: int) -> tuple[str, list[Path], list[Path]]:
    """(model's name, task folders, JPEG files) on disk."""
    import numpy as np
    import open_clip
    from PIL import Image
    from safetensors.torch import save_file

    import rmt
    import rmt_kernels as rk

    torch.manual_seed(0)
    config = open_clip.get_model_config(model)
    if size is not None:
        config["vision_cfg"]["image_size"] = size
    (folder / "model").mkdir()
    (folder / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    name = f"local-dir:{folder / 'model'}"
    net = open_clip.create_model(model, force_image_size=size)
    with torch.no_grad():
        # Random towers look nearly alike to the text: a larger scale makes answers worth comparing.
        net.logit_scale.fill_(4.6)
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()}, folder / "model" / "open_clip_model.safetensors"
    )
    masked = rmt.get_mask_model(net)
    folders = [folder / "tasks" / f"task{i:02}" for i in range(tasks)]
    with harness.progress(tasks, "tasks") as bar:
        for path in folders:
            for mask in masked.masks:
                mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape) >= OFF))
            masked.save_pretrained(path, CLASSES, "a photo of a {}.")
            bar.update()
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(images)]
    for path in files:
        small = Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=85)
    return name, folders, files


@contextlib.contextmanager
def server(variant: str, model: str, tasks: list[Path], precision: str) -> Iterator[int]:
    """Its port. It must stop with status 0 at the end."""
    command = [sys.executable, str(HERE / "serving_variants.py"), variant, *map(str, tasks), "--model", model]
    command += ["--precision", precision]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            for line in process.stdout:
                if match := re.match(r"serving +http://.*:(\d+)/", line):
                    yield int(match[1])
                    break
            else:
                raise RuntimeError(f"{variant} did not start")
            process.terminate()
            if process.wait(60):
                raise RuntimeError(f"{variant} ended with status {process.returncode}")
        finally:
            process.kill()


def check(ports: dict[str, int], tasks: list[str], images: list[Path], most: float) -> None:
    """All variants give the same classes and probabilities. Raises AssertionError."""
    found = {}
    for variant, port in ports.items():
        answers = []
        for image in images[:4]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            body = {"images": [base64.b64encode(image.read_bytes()).decode()], "tasks": tasks, "top_k": 5}
            connection.request("POST", "/v1/classify", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            assert response.status == 200, f"{variant}: {response.status} {text[:200]!r}"
            answers += json.loads(text)["images"][0]["answers"]
        found[variant] = answers
    for variant, answers in found.items():
        for got, want in zip(answers, found[MIXED], strict=True):
            values = [{one["class"]: one["probability"] for one in answer["top"]} for answer in (got, want)]
            worst = max(abs(values[0][name] - values[1][name]) for name in values[1])
            assert worst < most, f"{variant}: {got} against {want}"
            # Two classes that are nearly equal may change places.
            top = sorted(values[1].values())[-2:]
            assert got["class"] == want["class"] or top[1] - top[0] < 2 * most, f"{variant}: {got} against {want}"


def load(port: int, tasks: list[str], images: list[Path], clients: int, seconds: float) -> list[float]:
    """Seconds of each request that began and ended within `seconds`, after a third of them untimed."""
    seeds = random.Random(clients).sample(range(10**6), clients)
    warm = time.time() + 0.3
    begin = warm + seconds / 3
    plan = {
        "port": port,
        "tasks": tasks,
        "images": list(map(str, images)),
        "warm": warm,
        "begin": begin,
        "end": begin + seconds,
    }
    parts = [seeds[i : i + CONNECTIONS_A_PROCESS] for i in range(0, clients, CONNECTIONS_A_PROCESS)]
    command = [sys.executable, "-S", str(HERE / "serving_client.py")]
    running = [
        subprocess.Popen([*command, json.dumps(plan | {"seeds": part})], stdout=subprocess.PIPE, text=True)
        for part in parts
    ]
    found = []
    for process in running:
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"a client ended with status {process.returncode}")
        found += json.loads(out)["seconds"]
    return found


def fits(variant: str, count: int, model: Path) -> str | None:
    """Why a variant cannot hold so many models here, or None."""
    if variant not in (ALONE, GROUPED):
        return None
    # Half of the variants' processes hold them; the text tower is not copied.
    need = 2 * count * 0.6 * (model / "open_clip_model.safetensors").stat().st_size
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return (
        f"{count} models need some {need / 2e9:.0f} GB, twice; {free / 1e9:.0f} GB are free"
        if need > 0.8 * free
        else None
    )


def measure(args: argparse.Namespace, model: str, folders: list[Path], images: list[Path], count: int) -> list[dict]:
    """Rows of all variants and loads at one number of tasks."""
    tasks, rows = folders[:count], []
    names = [path.name for path in tasks]
    with contextlib.ExitStack() as stack:
        ports = {}
        for variant in args.variants:
            if why := fits(variant, count, Path(model.removeprefix("local-dir:"))):
                print(f"left out   {variant}, {count} tasks: {why}")
                continue
            ports[variant] = stack.enter_context(server(variant, model, tasks, args.precision))
        # bf16 has three digits, and the ways round at other places.
        check(ports, names, images, 1e-3 if args.precision == "fp32" else 0.03)
        taken: dict[tuple[str, int], list[float]] = {}
        total = args.rounds * len(ports) * len(args.clients)
        with harness.progress(total, f"{count} tasks") as bar:
            for _ in range(args.rounds):
                for clients in args.clients:
                    for variant, port in ports.items():
                        taken.setdefault((variant, clients), []).extend(
                            load(port, names, images, clients, args.seconds)
                        )
                        bar.update()
    for (variant, clients), seconds in taken.items():
        if len(seconds) < 2:
            raise RuntimeError(f"{variant} answered {len(seconds)} requests: --seconds must be more")
        p = statistics.quantiles([1e3 * s for s in seconds], n=100, method="inclusive")
        rows.append({
            "bench": "serving", "model": args.model, "precision": args.precision,
            "tasks": count, "variant": variant, "clients": clients,
            "requests": len(seconds), "per_s": len(seconds) / (args.seconds * args.rounds),
            "p50_ms": p[49], "p99_ms": p[98],
        })  # fmt: skip
    return rows


def same_p99(rows: list[dict]) -> list[dict]:
    """Of each variant at each load of swap-per-request: its most throughput at no longer a p99, over swap's."""
    found = []
    for swap in (row for row in rows if row["variant"] == SWAP):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            mine = [
                r
                for r in rows
                if r["variant"] == variant and r["tasks"] == swap["tasks"] and r["p99_ms"] <= swap["p99_ms"]
            ]
            best = max(mine, key=lambda r: r["per_s"], default=None)
            if variant != SWAP:
                found.append({
                    "bench": "serving, same p99", "tasks": swap["tasks"], "variant": variant,
                    "swap_clients": swap["clients"],
                    "swap_p99_ms": swap["p99_ms"], "swap_per_s": swap["per_s"],
                    "clients": best and best["clients"], "per_s": best and best["per_s"],
                    "over_swap": best and best["per_s"] / swap["per_s"],
                })  # fmt: skip
    return found


def show(rows: list[dict], ratios: list[dict]) -> None:
    """Two tables."""
    lines = [[f"{r['tasks']} tasks, {r['variant']}", str(r["clients"]), str(r["requests"]), f"{r['per_s']:.1f}",
              f"{r['p50_ms']:.1f}", f"{r['p99_ms']:.1f}"] for r in rows]  # fmt: skip
    harness.print_table(["", "clients", "requests", "per s", "p50 ms", "p99 ms"], lines)
    lines = [[f"{r['tasks']} tasks, {r['variant']}", str(r["swap_clients"]), f"{r['swap_p99_ms']:.0f}",
              f"{r['swap_per_s']:.1f}",
              *(["", "", "none"] if r["per_s"] is None else
                [str(r["clients"]), f"{r['per_s']:.1f}", f"{r['over_swap']:.2f}"])]
             for r in ratios]  # fmt: skip
    print("\nmost throughput at no longer a p99 than swap-per-request's")
    harness.print_table(["", "swap: clients", "p99 ms", "per s", "it: clients", "per s", "over swap"], lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="ViT-B-32", help="open_clip's name; its weights are random")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="connections that ask")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seconds", type=float, default=6.0, help="of a load, beside a third of it untimed")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a small model and few loads: shows that it runs")
    parser.add_argument("--json", help="file for the rows")
    args = parser.parse_args()
    if args.quick:
        args.model, args.image_size, args.tasks, args.clients = "ViT-S-32-alt", 64, [1, 4], [1, 8]
        args.seconds, args.rounds = 1.0, 1
    if MIXED not in args.variants:
        parser.error(f"--variants must have {MIXED!r}")
    # Without it a SIGTERM (`timeout`) would leave the servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch:
        made = make(Path(scratch), args.model, args.image_size, max(args.tasks), args.images)
        for count in args.tasks:
            rows += measure(args, *made, count)
    ratios = same_p99(rows)
    show(rows, ratios)
    if args.json:
        about = harness.provenance(torch.device("cpu")) | {"seconds": args.seconds * args.rounds, "off": OFF}
        harness.write_json(args.json, [row | about for row in rows + ratios])


if __name__ == "__main__":
    main()
