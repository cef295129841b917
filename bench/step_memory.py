"""Memory that a training step takes, for bench/train_step.py: every variant in a process of its own.

Interpreter, libraries, the plain model and a batch are there first (`base`). Then the variant is made, one step is
taken (compilation, Adam's moments), the peak is reset and STEPS more are taken. On a CPU the peak is that of the
resident memory (the kernel's VmHWM), on CUDA that of torch's allocator. What a method adds is peak - base: scores,
moments, second tower, gradients, activations and temporaries; for a compiled step its code and compiler too, on a CPU.
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from step_variants import MAKE, Problem, Setup, Skipped

# Adam's moments are made in the first step; from the second on the peak stays.
STEPS = 2
MIB = 1 << 20


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory on a CPU is measured on Linux alone")


class Meter:
    """Memory of this process, or of torch's allocator on a CUDA device, in MiB."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def now(self) -> float:
        gc.collect()
        return torch.cuda.memory_allocated() / MIB if self.cuda else resident("VmRSS")

    def reset(self) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats() if self.cuda else Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else resident("VmHWM")


def measure(setup: Setup, name: str) -> dict[str, float]:
    """base and peak MiB of a variant's steps in this process, which should have done nothing else."""
    problem = Problem(setup)
    meter = Meter(problem.device)
    base = meter.now()
    variant = MAKE[name](problem)
    variant.run(*problem.batches[0])
    meter.reset()
    for _ in range(STEPS):
        variant.run(*problem.batches[1])
    return {"base_mib": base, "peak_mib": meter.peak()}


def in_its_own_process(setup: Setup, name: str) -> dict[str, float]:
    """`measure` in a child. Raises Skipped where the variant cannot run here."""
    command = [sys.executable, __file__, name, json.dumps(vars(setup))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    if "skipped" in answer:
        raise Skipped(answer["skipped"])
    return answer | {"added_mib": answer["peak_mib"] - answer["base_mib"]}


if __name__ == "__main__":
    try:
        print(json.dumps(measure(Setup(**json.loads(sys.argv[2])), sys.argv[1])))
    except Skipped as reason:
        print(json.dumps({"skipped": str(reason)}))
