"""Which product serves which shape, by measurement: dispatch.json, written by `python bench/dispatch.py --write`.

Paths: `bits`, straight from the packed words; `made`, the masked weight made for this call and torch's GEMM over it;
`dense`, torch's GEMM over a masked weight that the caller keeps. A kept one always serves: its product equals the
merged layer's bit for bit, which no product from the bits does, so there the table only reports what it would save.
"""

import bisect
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("dispatch.json")
PATHS = ("bits", "made", "dense")
_WORDS = {"bits": "from the bits", "made": "made, then GEMM", "dense": "GEMM over the kept masked weight"}
_CONTRACT = "always, as it is bit for bit the merged layer's product"


class Row(NamedTuple):
    """One row of the table: products of `above` < M <= `up_to` rows take `path`."""

    device: str  # "cpu avx512 amx", "sm_90"; of a default "cpu default"
    op: str
    dtype: str  # of x and weight, as torch names it; "*" in a default: any
    n: int | None  # of the measured layer; None in a default
    k: int | None
    m: int | None  # rows of the measurement
    above: int
    up_to: int | None  # None: no limit
    path: str
    ms: dict[str, float | None]  # median by path, None where no kernel has it; empty in a default
    note: str  # why, where it is no measurement alone
    date: str

    def text(self) -> str:
        """The row for people: limit, path, what the other path costs, and where that was measured."""
        limit = f"M <= {self.up_to}" if self.up_to else f"M > {self.above}" if self.above else "any M"
        other = {"bits": "made", "made": "bits", "dense": "bits"}[self.path]
        mine, its = self.ms.get(self.path), self.ms.get(other)
        ratio = ""
        if mine and its and self.path == "dense":
            ratio = f"; the bits took {its / mine:.2f}x of it at M = {self.m}: reported, not taken"
        elif mine and its:
            ratio = f", {mine / its:.2f}x of {'the bits' if other == 'bits' else other} at M = {self.m}"
        note = f"; {self.note}" if self.note else ""
        where = f"{self.device}, {self.n}x{self.k}, {self.dtype}, {self.date}" if self.ms else self.device
        return f"{limit} {_WORDS[self.path]}{ratio}{note} ({where})"


@functools.cache
def table() -> dict[tuple[str, str, str], dict[tuple[int | None, int | None], list[Row]]]:
    """{(device, op, dtype): {(N, K): rows by rising M}}; defaults: "cpu default", "cuda default", N = K = None."""
    return index(json.loads(FILE.read_text()))


def index(content: dict) -> dict:
    """`table()` of a file's content."""
    found: dict = {}
    order = sorted(content["rows"] + content["defaults"], key=lambda r: math.inf if r["up_to"] is None else r["up_to"])
    for r in order:
        date = content["measured"][r["device"]]["date"][:10] if "ms" in r else ""
        device = r["device"] if "ms" in r else f"{r['device']} default"
        rows = found.setdefault((device, r["op"], r["dtype"]), {}).setdefault((r.get("N"), r.get("K")), [])
        above = rows[-1].up_to if rows else 0
        rows.append(Row(
            device, r["op"], r["dtype"], r.get("N"), r.get("K"), r.get("M"), above, r["up_to"], r["path"],
            r.get("ms", {}), r.get("note", ""), date,
        ))  # fmt: skip
    return found


@functools.cache
def _rows(device_kind: str, op: str, dtype: torch.dtype, n: int, k: int, kept: bool) -> tuple[list[float], list[Row]]:
    name = str(dtype).removeprefix("torch.")
    measured = table().get((device_kind, op, name))
    if measured:
        rows = measured[min(measured, key=lambda shape: _distance(shape, n, k))]
    else:
        family = "cpu default" if device_kind.startswith("cpu") else "cuda default"
        defaults = table().get((family, op, name)) or table()[family, op, "*"]
        unmeasured = f"not measured on this device ({device_kind}, {name})"
        rows = [r._replace(note=f"{unmeasured}: {r.note}") for r in defaults[None, None]]
        if kept:
            rows = [rows[-1]._replace(above=0, note=unmeasured)]
    if kept:
        rows = [r._replace(path="dense", note="; ".join(filter(None, (_CONTRACT, r.note)))) for r in rows]
    return [math.inf if r.up_to is None else r.up_to for r in rows], rows


def _distance(shape: tuple[int, int], n: int, k: int) -> tuple[float, float]:
    """How far a measured (N, K) is: by the weight's size, which the traffic follows; then by its proportions."""
    return abs(math.log(shape[0] * shape[1] / (n * k))), abs(math.log(shape[0] / shape[1] * k / n))


def row(device_kind: str, op: str, dtype: torch.dtype, n: int, k: int, m: int, kept: bool = False) -> Row:
    """The row that decides for a product of M rows over an (N, K) weight.

    Of the layers measured on `device_kind` the nearest in log(N K), then in log(N / K); of its rows the first with
    M <= up_to. A device kind or dtype without measured rows gets the default of its family, and the row says so.
    """
    limits, rows = _rows(device_kind, op, dtype, n, k, kept)
    return rows[bisect.bisect_left(limits, m)]
