"""The servers that bench/serving.py compares: `rmt serve` itself, and its code over other ways to hold many tasks.

python bench/serving_variants.py VARIANT TASKS... --model NAME
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import rmt

MIXED, SWAP, ALONE, GROUPED = "rmt serve", "swap per request", "model per task", "model per task, batched"
VARIANTS = (MIXED, SWAP, ALONE, GROUPED)
MAX_BATCH = 32


class Strategy:
    """What `rmt.serve` asks of a bank, over a bank that only holds the tasks."""

    def __init__(self, bank: rmt.TaskBank) -> None:
        self.bank, self.tasks, self.info, self.preprocess = bank, bank.tasks, bank.info, bank.preprocess
        loaded = rmt.clip.Clip(bank.model, bank.preprocess, bank.tokenizer)
        infos = {name: bank.info(name) for name in bank.tasks}
        self.text = {n: rmt.clip.text_features(loaded, i["classnames"], i["template"]) for n, i in infos.items()}
        self.scale = float(bank.logit_scale.exp())

    @torch.no_grad()
    def probabilities(self, x: Tensor, names: list[str]) -> list[Tensor]:
        """As `rmt.TaskBank.probabilities`; rows of one task are neighbours."""
        out, first = [], 0
        while first < len(names):
            last = first + names[first:].count(names[first])
            features = F.normalize(self.encode(x[first:last], names[first]).float(), dim=-1)
            out += [(self.scale * (self.text[names[first]] @ row)).softmax(0) for row in features]
            first = last
        return out

    def encode(self, x: Tensor, name: str) -> Tensor:
        """(B, 3, H, W) -> (B, D) of one task."""
        raise NotImplementedError


class Swap(Strategy):
    """`set_adapter`, then a plain forward: over kept masked weights, of which a swap rewrites the flipped words."""

    def encode(self, x: Tensor, name: str) -> Tensor:
        self.bank.set_adapter(name)
        return self.bank.encode_image(x)


class Models(Strategy):
    """A merged plain image tower for each task, all in memory."""

    def __init__(self, bank: rmt.TaskBank) -> None:
        super().__init__(bank)
        self.dtype = bank.logit_scale.dtype
        self.towers = {name: bank.merge_and_unload(name).visual for name in bank.tasks}

    def encode(self, x: Tensor, name: str) -> Tensor:
        return self.towers[name](x.to(self.dtype))


def main() -> int:
    """Serves one variant until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    if args.variant == MIXED:
        from rmt import cli

        return cli.main(
            [
                "serve",
                *args.tasks,
                "--model",
                args.model,
                "--port",
                "0",
                "--max-batch",
                str(MAX_BATCH),
                "--precision",
                args.precision,
            ]
        )
    from rmt.serve.command import run
    from rmt.serve.service import Options, Service

    rmt.keep_freed_memory()
    tasks = {Path(path).name: path for path in args.tasks}
    bank = rmt.load(args.model, tasks=tasks, device="cpu", kept=args.variant == SWAP, precision=args.precision)
    strategy = Swap(bank) if args.variant == SWAP else Models(bank)
    options = Options(
        max_batch=MAX_BATCH if args.variant == GROUPED else 1, max_wait_ms=2.0 if args.variant == GROUPED else 0.0
    )
    return run(Service(strategy, options), "127.0.0.1", 0)


if __name__ == "__main__":
    sys.exit(main())
