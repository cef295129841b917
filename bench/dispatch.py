"""Measures which product serves which shape: python bench/dispatch.py [--device cuda] [--write [FILE]]

A row per op, dtype, layer and M: milliseconds straight from the bits, of making the masked weight and torch's GEMM over
it, and of the GEMM over a kept one, and the path that they decide (`rmt_kernels/backends/dispatch.py`). --write puts
them into `rmt_kernels/backends/dispatch.json` in the place of this kind of device's own; other kinds' rows stay.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from torch import Tensor

import rmt_kernels as rk
from rmt_kernels import backends, reference
from rmt_kernels.backends import dispatch

LAYERS = ("ViT-B attn.in_proj", "ViT-B attn.out_proj", "ViT-B mlp.c_proj", "ViT-L attn.in_proj")
ROWS = {"cpu": (1, 4, 16, 64, 200, 800, 1600), "cuda": (1, 16, 64, 256, 1600, 6304)}
DX_ROWS = {"cpu": (16, 1600), "cuda": (64, 1600, 6304)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What decides where nothing was measured. fp32 32 and bf16 8 hold on each layer of the first CPU measured.
DEFAULTS = [
    {"device": "cpu", "op": "masked_linear", "dtype": "float32", "up_to": 32, "path": "bits",
     "note": "as measured on cpu avx512"},
    {"device": "cpu", "op": "masked_linear", "dtype": "float32", "up_to": None, "path": "made",
     "note": "as measured on cpu avx512"},
    {"device": "cpu", "op": "masked_linear", "dtype": "bfloat16", "up_to": 8, "path": "bits",
     "note": "as measured on cpu avx512"},
    {"device": "cpu", "op": "masked_linear", "dtype": "bfloat16", "up_to": None, "path": "made",
     "note": "as measured on cpu avx512"},
    {"device": "cpu", "op": "masked_linear", "dtype": "*", "up_to": None, "path": "made",
     "note": "no CPU kernel reads this dtype from the bits"},
    {"device": "cpu", "op": "masked_linear_dx", "dtype": "*", "up_to": None, "path": "made",
     "note": "no CPU kernel has it from the bits"},
    {"device": "cuda", "op": "masked_linear", "dtype": "*", "up_to": 64, "path": "bits",
     "note": "what masked_linear_small.cu takes"},
    {"device": "cuda", "op": "masked_linear", "dtype": "*", "up_to": None, "path": "bits",
     "note": "in the wgmma kernel, where it runs; elsewhere the next backend serves"},
    {"device": "cuda", "op": "masked_linear_dx", "dtype": "*", "up_to": None, "path": "made",
     "note": "no CUDA C++ kernel has it from the bits"},
]  # fmt: skip
ABOUT = (
    "Which product serves which shape: rmt_kernels/backends/dispatch.py reads it, `python bench/dispatch.py --write` "
    "measures and writes it. ms are medians in milliseconds, null where no kernel takes the path. Defaults serve "
    "devices and dtypes without a row."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one layer, four row counts")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each shape")
    parser.add_argument("--json", metavar="FILE", help="write the rows with their provenance here")
    parser.add_argument(
        "--write", metavar="FILE", nargs="?", const=dispatch.FILE, type=Path,
        help="put the rows into the table that the package ships; FILE: into a copy of it",
    )  # fmt: skip
    args = parser.parse_args()
    if args.write and args.quick:
        parser.error("--write needs every layer: leave --quick out")
    device = torch.device(args.device)
    reason = backends.load(args.device).unavailable(args.device)
    if reason is not None:
        raise SystemExit(f"nothing to measure: {reason}")
    base = harness.provenance(device) | {"bench": "dispatch", "command": f"python bench/dispatch.py --device {device}"}
    with torch.no_grad(), rk.use_backend(args.device):
        rows = measure(device, LAYERS[:1] if args.quick else LAYERS, args.quick, args.seconds)
    print(f"{base['device_name']}, torch {base['torch']}, {rows[0]['device']}")
    lines = [
        [r["op"], r["dtype"], f"{r['N']}x{r['K']}", str(r["M"]), *(_ms(r["ms"][p]) for p in dispatch.PATHS), r["path"]]
        for r in rows
    ]
    harness.print_table(["op", "dtype", "N x K", "M", *(f"{p} ms" for p in dispatch.PATHS), "takes"], lines)
    if args.json:
        harness.write_json(
            args.json, [base | {"kind": r["device"]} | {k: r[k] for k in r if k != "device"} for r in rows]
        )
    if args.write:
        kind, content = rows[0]["device"], json.loads(dispatch.FILE.read_text())
        content["rows"] = [r for r in content["rows"] if r["device"] != kind] + rows
        content["measured"][kind] = {k: v for k, v in base.items() if k not in ("device", "bench")}
        save(args.write, content | {"defaults": DEFAULTS})


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def measure(device: torch.device, layers: tuple[str, ...], quick: bool, seconds: float) -> list[dict]:
    """Every row of this device, with its path decided."""
    rows, kind = [], backends.load(device.type).device_kind()
    counts = {op: table[device.type][: 4 if quick else None]
              for op, table in (("masked_linear", ROWS), ("masked_linear_dx", DX_ROWS))}  # fmt: skip
    with harness.progress(len(DTYPES) * len(layers) * sum(map(len, counts.values())), "timing") as bar:
        for op, row_counts in counts.items():
            for dtype in DTYPES.values():
                for name in layers:
                    n, k = harness.LAYERS[name]
                    times = []
                    for m in row_counts:
                        times.append(time(op, m, n, k, dtype, device, seconds))
                        bar.update()
                    rows += decide(kind, op, dtype, n, k, row_counts, times)
    return rows


def decide(
    kind: str, op: str, dtype: torch.dtype, n: int, k: int, row_counts: tuple[int, ...], times: list[dict]
) -> list[dict]:
    """Rows of one layer. The bits serve up to the first M where they lose, the last row stands for all larger M."""
    rows, bits = [], True
    for m, ms in zip(row_counts, times):
        bits = bits and ms["bits"] is not None and ms["bits"] <= ms["made"]
        note = {"note": "no kernel of this backend has it from the bits"} if ms["bits"] is None else {}
        rows.append({
            "device": kind, "op": op, "dtype": str(dtype).removeprefix("torch."), "N": n, "K": k, "M": m,
            "up_to": None if m == row_counts[-1] else m, "path": "bits" if bits else "made", "ms": ms,
        } | note)  # fmt: skip
    return rows


def time(op: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, seconds: float) -> dict:
    """Median milliseconds of the public op by path, None where no kernel takes it. Results are compared first."""
    generator = torch.Generator().manual_seed(0)
    rows = m, (k if op == "masked_linear" else n)
    x, weight = (torch.randn(*s, generator=generator).to(device, dtype) for s in (rows, (n, k)))
    bits = reference.pack_bits(torch.rand(n, k, generator=generator) > 0.025).to(device)
    dense = reference.masked_weight(weight, bits)
    run = getattr(rk, op)
    calls = {path: forced(path, lambda: run(x, weight, bits)) for path in ("bits", "made")}
    calls["dense"] = lambda: run(x, weight, bits, dense=dense)
    if not backends.load(device.type).has_bits_kernel(op, x, weight):
        del calls["bits"]
    check(calls)
    times = harness.time_all(calls, device, seconds)
    return {path: float(f"{times[path][1]:.4g}") if path in times else None for path in dispatch.PATHS}


def forced(path: str, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` with the table saying `path`."""
    default = dispatch.table()["cpu default", "masked_linear", "*"][None, None][0]

    def run() -> Tensor:
        before, dispatch.row = dispatch.row, lambda *key: default._replace(path=path)
        try:
            return call()
        finally:
            dispatch.row = before

    return run


def check(calls: dict[str, Callable[[], Tensor]]) -> None:
    """Refuses to time what is not right. Raises AssertionError."""
    want = calls["dense"]().float()
    for path, call in calls.items():
        error = float((call().float() - want).norm() / want.norm())
        assert error < 1e-2, f"{path}: relative error {error:.1e} against the product over the kept masked weight"


def save(path: Path, content: dict) -> None:
    """Writes the table, whole or not at all, one row a line: a new measurement is then a readable diff."""
    lines = [
        f'"{part}": [\n' + ",\n".join(json.dumps(r) for r in content[part]) + "\n]" for part in ("defaults", "rows")
    ]
    measured = ",\n".join(f"{json.dumps(kind)}: {json.dumps(value)}" for kind, value in content["measured"].items())
    parts = [f'"about": {json.dumps(ABOUT)}', f'"measured": {{\n{measured}\n}}', *lines]
    draft = path.with_name(path.name + ".part")
    draft.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    draft.replace(path)


if __name__ == "__main__":
    main()
