"""LoRA on masks of few and of many steps: what masks leave for LoRA to fit, and what the pair gains or loses by it.

    python bench/real/mask_first.py --model local-dir:PATH --data FOLDER [FOLDER ...] --json FILE
        --rates bench/results/real/rates_spread.json bench/results/real/rates_towers.json

`lora+ramt_spread` trains masks first, then LoRA on the merged model. If the pair stays behind LoRA because masks have
fitted the few training images before LoRA begins, it must come back to LoRA as their steps get fewer and the loss on
the training images before LoRA rises. Row 0 is LoRA alone. `--random-off` is the control: a share of the weights
off, drawn by chance.
"""

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from rmt.checkpoint import environment, write_json
from rmt.config import MaskConfig, RunConfig, TrainConfig
from rmt.evaluate import sampled
from rmt.model import get_mask_model
from rmt.peers.compare import Shared
from rmt.peers.footing import Footing, class_vectors
from rmt.peers.lora import LoRA
from rmt.peers.masks import SpreadRAMT
from rmt.peers.method import State, cosine_logits


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--template", default="a photo of a {}.")
    parser.add_argument("--rates", nargs="+", required=True, help="files of bench/real/rates.py: their chosen rates")
    parser.add_argument("--mask-steps", type=int, nargs="+", default=[0, 15, 30, 60, 120])
    parser.add_argument("--random-off", type=float, nargs="*", default=[], help="percent, instead of trained masks")
    parser.add_argument("--lora-steps", type=int, default=120)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--json", required=True)
    return parser.parse_args()


def measured(footing: Footing, state: State) -> dict[str, float]:
    """Loss on the training images as they are, and accuracy on those of the test, in percent."""
    with torch.no_grad():
        train, test = (state.logits(footing.features(state, part)) for part in ("train", "test"))
    hit = test.argmax(-1) == footing.labels("test")
    loss = F.cross_entropy(train, footing.labels("train"))
    return {"train_loss": loss.item(), "acc1": 100 * hit.double().mean().item()}


def rows(args: argparse.Namespace, data: str, seed: int, rates: dict[str, float]):
    """A row for each number of mask steps, and for each percent that is off by chance."""
    train = TrainConfig(batch=args.batch, log_every=max(1, *args.mask_steps))
    config = RunConfig(
        args.model, data=data, template=args.template, shots=args.shots, seed=seed, image_size=args.image_size,
        train=train,
    )  # fmt: skip
    shared = Shared.load(config)
    footing = Footing(
        config, shared.loaded, sampled(config), shared.text, shared.template, shared.shelf, shared.cache, rates=rates,
        max_steps=args.lora_steps,
    )  # fmt: skip
    for steps in args.mask_steps:
        state, row = footing.start(), {"dataset": shared.dataset, "seed": seed, "mask_steps": steps}
        if steps:
            with tempfile.TemporaryDirectory() as folder:
                short = dataclasses.replace(footing, max_steps=steps, folder=Path(folder))
                fit = SpreadRAMT().fit(short, state)
                state = SpreadRAMT().restore(short, state, fit.stored)
            row["percent_off"] = fit.facts["percent_off"]
        yield row | with_lora(footing, state)
    for percent in args.random_off:
        row = {"dataset": shared.dataset, "seed": seed, "random_off": percent}
        yield row | with_lora(footing, by_chance(footing, percent))


def by_chance(footing: Footing, percent: float) -> State:
    """The zero-shot model with this share of the weights that R-AMT masks off."""
    masked = get_mask_model(footing.copy(footing.start()), MaskConfig())
    rng = torch.Generator().manual_seed(footing.config.seed)
    with torch.no_grad():
        for mask in masked.masks:
            mask.scores[torch.rand(mask.scores.shape, generator=rng) < percent / 100] = 0.0
    model = masked.merge_and_unload()
    text = class_vectors(footing, model)
    return State(model, ("random",), text, cosine_logits(model, text))


def with_lora(footing: Footing, state: State) -> dict[str, float]:
    """What `state` measures, and what it does with LoRA trained on top."""
    before = measured(footing, state)
    after = measured(footing, LoRA().restore(footing, state, LoRA().fit(footing, state).stored))
    # Features are kept by the methods' names alone, and the next row's have the same.
    footing.shelf.drop(lambda key: isinstance(key[0], tuple) and key[0])
    return {"masks_train_loss": before["train_loss"], "masks_acc1": before["acc1"], "acc1": after["acc1"]}


def main() -> None:
    args, made = arguments(), []
    rates: dict[str, float] = {}
    for path in args.rates:
        rates |= json.loads(Path(path).read_text())["chosen"]
    for data, seed in itertools.product(args.data, args.seeds):
        for row in rows(args, data, seed, rates):
            made.append(row)
            print("  ".join(f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items()), flush=True)
    asked = {name: value for name, value in vars(args).items() if name != "json"}
    write_json(args.json, {"command": asked, "rows": made, "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
