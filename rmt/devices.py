"""What a device can do: a table of named ones with the source of every number, and this machine, measured."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import UserError

PRECISIONS = ("fp32", "tf32", "bf16")
HERE = "here"


@dataclass(frozen=True)
class Device:
    """One device. memory: bytes. rate: FLOP/s of products in the precision asked for. copy: bytes/s, read + written.

    sources: of memory, rate and copy, each "data sheet: ..." or "measured: ...". A sheet's GB are taken as 10^9 bytes;
    cards have a little more.
    """

    title: str
    memory: float
    rate: float
    copy: float
    sources: dict[str, str]


def table() -> dict[str, dict]:
    """name -> what `devices.json` says of it: 10^9 bytes, 10^12 FLOP/s of dense products, 10^9 bytes/s."""
    return json.loads(Path(__file__).with_name("devices.json").read_text())


def device(name: str, precision: str) -> Device:
    """The named device, in upper case or lower; `here` measures this machine, in a second.

    Raises: UserError for a name that is not in the table, or a precision that this machine lacks.
    """
    if name.lower() == HERE:
        return here(precision)
    known = {key.lower(): row for key, row in table().items()}
    if name.lower() not in known:
        raise UserError(f"device must be one of {', '.join([*table(), HERE])}, got {name!r}")
    row = known[name.lower()]
    fields = {"memory": "memory_gb", "rate": f"{precision}_tflops", "copy": "copy_gbs"}
    sources = {field: row["sources"].get(key, row["sources"].get("all")) for field, key in fields.items()}
    return Device(row["title"], 1e9 * row["memory_gb"], 1e12 * row[fields["rate"]], 1e9 * row["copy_gbs"], sources)


def here(precision: str) -> Device:
    """The first CUDA device, else the CPU with as many threads as torch uses, measured."""
    cuda = torch.cuda.is_available()
    target = torch.device("cuda" if cuda else "cpu")
    if precision == "tf32" and not cuda:
        raise UserError("precision tf32 needs a CUDA device, and there is none here: fp32 or bf16 is expected")
    title = torch.cuda.get_device_name(target) if cuda else f"this CPU, {torch.get_num_threads()} threads"
    memory = torch.cuda.get_device_properties(target).total_memory if cuda else _physical_memory()
    said = f"measured: now, torch {torch.__version__}, {platform.machine()}"
    sources = {"memory": said, "rate": said, "copy": said}
    return Device(title, memory, dense_rate(target, precision), copy_bandwidth(target), sources)


def dense_rate(target: torch.device, precision: str) -> float:
    """FLOP per second of a square product."""
    size = 8192 if target.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=target).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return 2 * size**3 / _seconds(lambda: a @ b, target)
    finally:
        torch.set_float32_matmul_precision(before)


def copy_bandwidth(target: torch.device) -> float:
    """Bytes per second, read plus written, of a copy too large for any cache."""
    source = torch.ones((256 if target.type == "cuda" else 64) << 18, device=target)
    copied = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: copied.copy_(source), target)


def _seconds(run: Callable[[], object], target: torch.device, budget_s: float = 0.4) -> float:
    """Median of calls for `budget_s`, at least five, after two untimed ones. Each waits for the device."""
    wait = torch.cuda.synchronize if target.type == "cuda" else lambda: None
    for _ in range(2):
        run()
    wait()
    taken, end = [], time.perf_counter() + budget_s
    while len(taken) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        wait()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
