"""Timing, provenance and tables shared by the benchmarks. Columns of the rows: bench/README.md."""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

# Layers of CLIP's image towers, (N, K).
LAYERS = {
    "ViT-B attn.in_proj": (2304, 768),
    "ViT-B attn.out_proj": (768, 768),
    "ViT-B mlp.c_fc": (3072, 768),
    "ViT-B mlp.c_proj": (768, 3072),
    "ViT-L attn.in_proj": (3072, 1024),
    "ViT-L attn.out_proj": (1024, 1024),
    "ViT-L mlp.c_fc": (4096, 1024),
    "ViT-L mlp.c_proj": (1024, 4096),
}
# One row, 16 rows, one ViT-B/32 image, a batch of 32 at ViT-B/32 and at ViT-B/16.
ROWS = (1, 16, 50, 1600, 6304)


def time_all(
    variants: dict[str, Callable[[], object]], device: torch.device, budget_s: float, least: int = 5
) -> dict[str, tuple]:
    """(20 %, median, 80 %) milliseconds of each variant. They take turns, so that drift of the machine hits all alike.

    A sample is the mean of enough calls to last 2 ms, so that the clock and, on CUDA, the launch queue do not count. As
    many untimed calls precede it: each variant finds its own operands in the caches, not those of the one before it.
    None precede calls of 100 ms and more, which fill the caches many times over. At least `least` samples, at most 50.
    """
    calls, untimed, samples = {}, {}, {name: [] for name in variants}
    for name, run in variants.items():
        once = _seconds(run, 1, device)
        if once < 0.1:
            run()
            once = _seconds(run, 1, device)
        calls[name] = max(1, min(100, int(2e-3 / max(once, 1e-6))))
        untimed[name] = calls[name] if once < 0.1 else 0
    end = time.perf_counter() + budget_s
    while len(next(iter(samples.values()))) < least or (
        time.perf_counter() < end and len(next(iter(samples.values()))) < 50
    ):
        for name, run in variants.items():
            if untimed[name]:
                _seconds(run, untimed[name], device)
            samples[name].append(1e3 * _seconds(run, calls[name], device))
    return {name: _quantiles(values) for name, values in samples.items()}


def _seconds(run: Callable, calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return p20, statistics.median(values), p80


def copy_bandwidth(device: torch.device, budget_s: float = 0.5) -> float:
    """Bytes per second, read plus written, of a copy too large for any cache."""
    source = torch.ones((256 if device.type == "cuda" else 64) << 18, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    _, median, _ = time_all({"copy": lambda: target.copy_(source)}, device, budget_s)["copy"]
    return 2 * source.nbytes / (median / 1e3)


def dense_rate(device: torch.device, dtype: torch.dtype, budget_s: float = 0.5) -> float:
    """FLOP per second of a square product, the rate that a product of this dtype reaches here."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    _, median, _ = time_all({"mm": lambda: a @ b}, device, budget_s)["mm"]
    return 2 * size**3 / (median / 1e3)


def provenance(device: torch.device) -> dict:
    """What every row says about where it came from."""
    root = Path(__file__).parent
    commit = _run(["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"])
    row = {
        "commit": commit or os.environ.get("RMT_COMMIT", "unknown"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": device.type,
    }
    if device.type == "cuda":
        driver = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        return row | {"device_name": torch.cuda.get_device_name(device), "driver": driver, "cuda": torch.version.cuda}
    return row | {"device_name": f"{_cpu_name()}, {torch.get_num_threads()} threads", "driver": None, "cuda": None}


def _run(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def progress(total: int, what: str) -> tqdm:
    """A bar on a terminal, silence elsewhere."""
    return tqdm(total=total, desc=what, disable=not sys.stderr.isatty(), leave=False)


def write_json(path: str, rows: list[dict]) -> None:
    """Writes the rows, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".part")
    draft.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(draft, target)


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """Columns as wide as they need to be; the first is left-aligned."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, ["-" * w for w in widths], *lines]:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))))
