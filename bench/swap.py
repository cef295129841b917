"""What a swap costs: the masks of a whole image tower replaced: python bench/swap.py [--device cuda] [--json FILE]

Host time is what the caller waits for; back to back, on CUDA, the time of the work itself or of its launches, whichever
is longer. Swaps of bits alone, and of kept masked weights: all of them, or the words in which two tasks differ. Checks
results first.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import harness
import torch
from torch import Tensor

import rmt_kernels as rk

BLOCK = [(2304, 768), (768, 768)]  # in- and out-projection of a block, (N, K)
MODELS = {"ViT-B-16": [(768, 768), *BLOCK * 12], "ViT-B-16, 2 blocks": [(768, 768), *BLOCK * 2]}
OFF = 0.025  # of the weights of a task, as the paper reports


class Swap:
    """Two tasks' bits of one tower, the buffers that hold the active one's, and kept masked weights."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.weights = [torch.randn(s, device=device).to(dtype) for s in shapes]
        self.tasks = [[rk.pack_bits(torch.rand(s, device=device) > OFF) for s in shapes] for _ in range(2)]
        self.buffers = [b.clone() for b in self.tasks[0]]
        self.dense = [rk.masked_weight(w, b) for w, b in zip(self.weights, self.buffers)]
        self.active = 0

    def turn(self) -> tuple[list[Tensor], list[Tensor]]:
        """Bits of the task that comes, and of the one that goes."""
        self.active = 1 - self.active
        return self.tasks[self.active], self.tasks[1 - self.active]

    def bits(self) -> None:
        torch._foreach_copy_(self.buffers, self.turn()[0])

    def bits_one_by_one(self) -> None:
        for buffer, new in zip(self.buffers, self.turn()[0]):
            buffer.copy_(new)

    def rewritten(self) -> None:
        rk.masked_weights_(self.dense, self.weights, self.turn()[0])

    def differing(self) -> None:
        new, old = self.turn()
        rk.masked_weights_(self.dense, self.weights, new, old)

    def differing_one_by_one(self) -> None:
        for out, weight, new, old in zip(self.dense, self.weights, *self.turn()):
            rk.masked_weight_(out, weight, new, old=old)

    def check(self) -> None:
        for swap in (self.bits, self.bits_one_by_one):
            swap()
            assert all(torch.equal(b, new) for b, new in zip(self.buffers, self.tasks[self.active])), swap.__name__
        for swap in (self.rewritten, self.differing, self.differing_one_by_one):
            swap()
            want = (rk.masked_weight(w, b) for w, b in zip(self.weights, self.tasks[self.active]))
            assert all(torch.equal(d, w) for d, w in zip(self.dense, want)), swap.__name__


def host_us(run: Callable[[], None], device: torch.device, calls: int) -> dict[str, float]:
    """Microseconds until the call returns; on CUDA each finds an idle device."""
    samples = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        samples.append(1e6 * (time.perf_counter() - start))
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"p20": p20, "median": statistics.median(samples), "p80": p80}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="fp32")
    parser.add_argument("--quick", action="store_true", help="two blocks, few samples")
    parser.add_argument("--seconds", type=float, help="of device time for each swap")
    parser.add_argument("--json", metavar="FILE", help="write all rows here")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    name = list(MODELS)[args.quick]
    with torch.no_grad():
        swap = Swap(MODELS[name], dtype or torch.float32, device)
        swap.check()
        runs = {
            "bits, one call": swap.bits,
            "bits, a copy a layer": swap.bits_one_by_one,
            "kept weights, one call": swap.rewritten,
            "kept weights where bits differ, one call": swap.differing,
            "kept weights where bits differ, an op a layer": swap.differing_one_by_one,
        }
        host = {key: host_us(run, device, 20 if args.quick else 200) for key, run in runs.items()}
        times = harness.time_all(runs, device, args.seconds or (0.2 if args.quick else 3))
    served = {r["device"]: r["last"] for r in rk.explain("masked_weight_")}[device.type]
    base = harness.provenance(device) | {"bench": "swap", "model": name, "dtype": args.dtype, "backend": served}
    base |= {"layers": len(MODELS[name]), "masked": sum(n * k for n, k in MODELS[name]), "percent_off": 100 * OFF}
    rows = [
        base | {"op": key, "host_us": host[key], "ms": dict(zip(("p20", "median", "p80"), times[key]))} for key in runs
    ]
    print(f"{rows[0]['device_name']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}, {name}, {args.dtype}")
    lines = [[r["op"], f"{r['host_us']['median']:.0f}", f"{r['host_us']['p80']:.0f}", f"{r['ms']['median']:.3f}"]
             for r in rows]  # fmt: skip
    harness.print_table(["swap", "host us", "p80", "back to back ms"], lines)
    if args.json:
        harness.write_json(args.json, rows)


if __name__ == "__main__":
    main()
