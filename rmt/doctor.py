"""`rmt doctor`: versions, what was built, which backend serves each op and why, and whether each one is right.

Exit status 1 where a backend disagrees with the reference.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import rmt_kernels as rk
from rmt_kernels import backends, reference
from rmt_kernels.backends import native

PACKAGES = ("torch", "triton", "open_clip_torch", "timm", "safetensors", "numpy")
THRESHOLD = 5e-3


def main(argv: list[str] | None = None) -> int:
    """Runs the report. Returns the exit status: 0, or 1 on a mismatch."""
    parser = argparse.ArgumentParser(
        prog="rmt doctor", description="What is installed, what serves each op, is it right"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    report = {
        "versions": versions(), "build": build(), "devices": devices(), "ops": rk.explain(), "checks": check_all(),
    }  # fmt: skip
    report["seconds"] = round(time.perf_counter() - start, 2)
    report["ok"] = all(row["ok"] for row in report["checks"])
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 0 if report["ok"] else 1


def versions() -> dict[str, str | None]:
    """Installed versions; None where a package is missing."""
    found = {"rmt": _version("rmt"), "python": platform.python_version()}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def build() -> dict:
    """What the extension was built from, or why it is missing."""
    info = native.build_info()
    if info is None:
        return {"extension": None, "why": native.missing}
    return {"extension": native.extension.__file__, "isa": native.extension.cpu_isa()} | info


def devices() -> list[str]:
    """The devices that torch can use here."""
    if not torch.cuda.is_available():
        return [f"cpu ({torch.get_num_threads()} threads)"]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *(f"cuda:{i} ({name})" for i, name in enumerate(names))]


def check_all() -> list[dict]:
    """A row for every backend, device and op: agrees with the reference, or how far off it is, or why it is not run."""
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in backends.ORDER[device]:
            if name == "reference":
                continue
            reason = backends.load(name).unavailable(device)
            if reason is not None:
                rows.append(
                    {"backend": name, "device": device, "op": "all", "ok": True, "result": f"not run: {reason}"}
                )
                continue
            rows += [_check(name, device, op, call) for op, call in _calls(device).items()]
    return rows


def _check(name: str, device: str, op: str, call: Callable) -> dict:
    row = {"backend": name, "device": device, "op": op}
    with rk.use_backend("reference"):
        want = call()
    try:
        with rk.use_backend(name):
            got = call()
    except rk.BackendUnavailable as reason:
        return row | {"ok": True, "result": f"not run: {reason}"}
    if not want.is_floating_point():
        wrong = int((got != want).sum())
        return row | {"ok": wrong == 0, "result": "exact" if wrong == 0 else f"{wrong} of {want.numel()} differ"}
    error = float((got.double() - want.double()).norm() / want.double().norm())
    # fp32 sums of 100 terms in another order differ by some 1e-7; TF32 products by 1e-3.
    allowed = 5e-3 if device == "cuda" and torch.get_float32_matmul_precision() != "highest" else 1e-5
    return row | {"ok": error <= allowed, "result": f"relative error {error:.1e}, allowed {allowed:.0e}"}


def _calls(device: str) -> dict[str, Callable[[], Tensor]]:
    """One small, ragged call of every op. Where a draw is within 1e-3 of its probability, both outcomes are right."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    m, n, k, tasks = 7, 48, 100, 3
    x, weight, bias, g_task, g_general = normal(m, k), normal(n, k), normal(n), normal(m, n), normal(m, n)
    scores = THRESHOLD + normal(n, k, scale=1e-2)
    bits = reference.pack_scores(scores, THRESHOLD)
    task_bits = [reference.pack_bits(normal(n, k) > 0) for _ in range(tasks)]
    offsets, rng = [0, 2, 3, m], rk.rng_state(1, 2, device)
    penalty, factors = 1e-4 / scores.norm(), torch.tensor([1e-3, 2.0], device=device)
    a, b = (g_task.T @ x) * weight + penalty * scores, (g_general.T @ x) * weight
    clear = (rk.keep_probability(a, b) - rk.philox_uniform(rng, 0, (n, k))).abs() > 1e-3

    def update() -> Tensor:
        state = [t.clone() for t in (scores, bits, torch.zeros_like(scores), torch.zeros_like(scores))]
        rk.mask_update_(*([t] for t in state), [a], factors)
        return torch.cat([state[0].flatten(), state[2].flatten(), state[3].flatten()])

    def swapped() -> Tensor:
        out = torch.empty_like(weight)
        rk.masked_weight_(out, weight, bits)
        rk.masked_weight_(out, weight, task_bits[0], old=bits)
        return out

    def weight_gradient() -> Tensor:
        out = torch.ones_like(weight)
        rk.weight_grad_(out, g_task.bfloat16(), x.bfloat16(), accumulate=True)
        return out

    dropout = {"scores": scores, "penalty": penalty, "rng": rng, "strength": 0.3}
    return {
        "pack_bits": lambda: rk.pack_bits(scores > THRESHOLD),
        "pack_scores": lambda: rk.pack_scores(scores, THRESHOLD),
        "unpack_bits": lambda: rk.unpack_bits(bits, k),
        "masked_weight": lambda: rk.masked_weight(weight, bits),
        "masked_weight_": swapped,
        "masked_linear": lambda: rk.masked_linear(x, weight, bits, bias),
        "masked_linear_dx": lambda: rk.masked_linear_dx(g_task, weight, bits),
        "grouped_masked_linear": lambda: rk.grouped_masked_linear(x, weight, task_bits, offsets, bias),
        "weight_grad_": weight_gradient,
        "mask_grad": lambda: rk.mask_grad(x, g_task, g_general, weight, **dropout) * clear,
        "gradient_dropout": lambda: rk.gradient_dropout(g_task.T @ x, g_general.T @ x, weight, **dropout) * clear,
        "mask_update_": update,
    }


def as_text(report: dict) -> str:
    """The report for people."""
    lines = ["Versions"]
    lines += [f"  {name:16} {value or 'not installed'}" for name, value in report["versions"].items()]
    built = report["build"]
    lines.append("Build")
    if built["extension"] is None:
        lines.append(f"  pure Python: {built['why']}")
    else:
        cuda = built["cuda"] if isinstance(built["cuda"], str) else f"{built['cuda']['nvcc']}, {_archs(built['cuda'])}"
        lines += [f"  C++   {built['cpu']['compiler']}; {', '.join(built['cpu']['isas'])}; runs {built['isa']}"]
        lines += [f"        without {isa}: {why}" for isa, why in built["cpu"].get("left_out", {}).items()]
        lines += [f"  CUDA  {cuda}"]
    lines.append("Devices")
    lines += [f"  {name}" for name in report["devices"]]
    if len(report["devices"]) == 1:
        lines.append("  no CUDA device: GPU kernels are not checked here")
    lines.append("Which backend serves what")
    for row in report["ops"]:
        lines.append(f"  {row['op']:22} {row['device']:5} {row['backend']:10} {row['why']}")
        if row["row"]:
            lines.append(f"  {'':39} table: {row['row']}")
    lines.append("Checks against the reference")
    for row in report["checks"]:
        state = "ok" if row["ok"] else "MISMATCH"
        lines.append(f"  {state:9} {row['backend']:8} {row['device']:5} {row['op']:22} {row['result']}")
    verdict = "all checks passed" if report["ok"] else "A BACKEND DISAGREES WITH THE REFERENCE"
    return "\n".join([*lines, f"{verdict} ({report['seconds']} s)"])


def _archs(cuda: dict) -> str:
    return " ".join(flag.rsplit("=", 1)[-1] for flag in cuda["archs"])
