"""Held-out next-token loss of real captions: plain LoRA against every routing function, at equal parameters.

    python bench/real/captions.py --data FOLDER --model local-dir:PATH --json bench/results/real/captions.json

A small decoder learns the captions of half the training images without images, and is frozen. LoRA on q and v of every
layer then learns those of the other half with x_R, the frozen image tower's class token (before its projection, over
one number for all images that makes their mean square 1). Two tables:

    blind     the image reaches the decoder through routing alone: plain LoRA never sees it
    prefix    the image is also a token before the text, for plain LoRA too, as in the paper

Each function has the same parameters, steps, batches and choice of --rates, made by the first seed's validation loss;
seeds change A and the order of the captions. The test captions are looked at once a seed, at the chosen rate, in nats a
token (the end of a caption is one), and again with other images: `shuffled`, in every place where the image goes, and
`routed`, in x_R alone. Loss that another image does not raise owes nothing to the image.

Cells are kept in --runs, so that it can be stopped and called again; --quick says nothing, in a minute.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import statistics
import time
from pathlib import Path

import torch
from captions_model import Captions, Decoder, loss, read
from safetensors.torch import load_file, save
from torch import Tensor

from rmt.checkpoint import environment
from rmt.files import write_json, write_whole
from rmt.routing import FUNCTIONS, Routed, RoutedLoRAConfig, inject_routed_lora, load_routed

MODES = ("blind", "prefix")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a cell's numbers depend on; model and data by the names of their folders.

    limit: captions of val and test that are looked at, 0 for all.
    """

    model: str
    data: str
    layers: int = 3
    heads: int = 4
    length: int = 24
    least: int = 5
    dropout: float = 0.1
    text_steps: int = 600
    text_rate: float = 2e-3
    text_batch: int = 64
    r: int = 16
    steps: int = 300
    batch: int = 32
    limit: int = 0

    def key(self) -> str:
        """Names the cells of these settings."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:12]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an open_clip model whose image tower has a class token")
    parser.add_argument("--data", required=True, help="captions.json and its images")
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=FUNCTIONS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 4e-3, 1.6e-2])
    parser.add_argument("--quick", action="store_true", help="a few steps: does it run")
    parser.add_argument("--runs", default="runs/captions", help="folder of features, decoder, cells (%(default)s)")
    parser.add_argument("--json", help="file for the table")
    return parser.parse_args()


@torch.no_grad()
def image_features(model: str, folder: Path, cache: Path) -> dict[str, Tensor]:
    """image -> class token (width,) of the frozen tower, for every image of captions.json. Kept in `cache`."""
    import open_clip
    from PIL import Image

    names = [row["image"] for row in json.loads((folder / "captions.json").read_text())]
    features: dict[str, Tensor] = load_file(cache) if cache.is_file() else {}
    if len(features) == len(names):
        return {name: features[name] for name in names}
    clip, _, transform = open_clip.create_model_and_transforms(model)
    tower = clip.visual.eval()
    tower.proj = None
    for start in range(len(features), len(names), 50):
        part = names[start : start + 50]
        rows = tower(torch.stack([transform(Image.open(folder / name).convert("RGB")) for name in part]))
        features |= {name: row.clone() for name, row in zip(part, rows)}
        print(f"features: {len(features)} of {len(names)} images", flush=True)
        # Whole or not at all: what is there may be all that the next call needs.
        write_whole(cache, save(features))
    return features


def scaled(features: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Over the root mean square of the training images; and how much of their mean square is a constant's."""
    rows = torch.stack([row for name, row in features.items() if name.startswith("train")])
    size = rows.square().mean().sqrt()
    share = rows.mean(0).square().mean() / size.square()
    return {name: row / size for name, row in features.items()}, {"over": size.item(), "constant_share": share.item()}


def fit(model: Decoder, parameters: list, captions: Captions, steps: int, batch: int, rate: float, seed: int,
        decay: float, images: bool, say: str) -> None:  # fmt: skip
    """AdamW on the mean loss of a batch's tokens; warm-up over a twentieth of the steps, then a cosine to 0."""

    def factor(n: int) -> float:
        return min(1.0, (n + 1) / max(1, steps // 20)) * (1 + math.cos(math.pi * n / steps)) / 2

    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    random, start = torch.Generator().manual_seed(seed), time.process_time()
    model.train()
    for n, (tokens, owners) in zip(range(1, steps + 1), captions.endless(batch, random)):
        mean = loss(model, tokens, captions.features[owners] if images else None) / (tokens[:, 1:] >= 0).sum()
        optimizer.zero_grad(set_to_none=True)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if n % max(1, steps // 3) == 0:
            print(
                f"  {say}: step {n} of {steps}, loss {mean.item():.3f}, {time.process_time() - start:.0f} CPU s",
                flush=True,
            )
    model.eval()


@torch.no_grad()
def held_out(model: Decoder, captions: Captions, routed: Routed | None = None, other: str = "") -> float:
    """Nats a token. other: where the image of another goes, "" nowhere, "shuffled" everywhere, "routed" in x_R."""
    model.eval()
    mine = captions.owners.unique()
    # Half way round the list: never an image's own.
    another = dict(zip(mine.tolist(), mine.roll(len(mine) // 2).tolist()))
    total = 0.0
    for tokens, owners in captions.batches(100):
        swapped = captions.features[torch.tensor([another[n] for n in owners.tolist()])]
        image = swapped if other == "shuffled" else captions.features[owners]
        with routed.context(swapped) if other == "routed" else contextlib.nullcontext():
            total += loss(model, tokens, image).item()
    return total / captions.targets


class Experiment:
    """The captions, the frozen decoder, and the folder of what was computed already."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self.args, self.settings, self.folder = args, settings, Path(args.runs) / settings.key()
        self.folder.mkdir(parents=True, exist_ok=True)
        data, name = Path(args.data), f"{Path(args.model).name}-{Path(args.data).name}"
        features, self.images = scaled(image_features(args.model, data, Path(args.runs) / f"{name}.safetensors"))
        self.splits, self.about = read(data, features, settings.length, settings.least)
        if settings.limit:
            for split in ("val", "test"):
                whole, n = self.splits[split], settings.limit
                self.splits[split] = Captions(whole.captions[:n], whole.owners[:n], whole.features)
        width = self.splits["text"].features.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            words, size = self.about["words"], (settings.layers, settings.heads, settings.length, settings.dropout)
            self.decoder = Decoder(words, width, *size)
            self._learn_text()

    def _learn_text(self) -> None:
        file, s = self.folder / "decoder.safetensors", self.settings
        if not file.is_file():
            text = self.splits["text"]
            everything = list(self.decoder.parameters())
            fit(self.decoder, everything, text, s.text_steps, s.text_batch, s.text_rate, 0, 0.1, False, "decoder")
            write_whole(file, save(self.decoder.state_dict()))
        self.decoder.load_state_dict(load_file(file))
        # LoRA has none in the paper's scripts; the decoder's was for learning the text.
        for layer in self.decoder.layers:
            layer.dropout = 0.0

    def frozen(self, mode: str) -> dict:
        """The decoder without LoRA."""
        self.decoder.prefix = mode == "prefix"
        return {"mode": mode, "test": held_out(self.decoder, self.splits["test"])}

    def tuned(self, mode: str, function: str, rate: float, seed: int) -> dict:
        """Validation loss after training, which is kept in `cell`."""
        cell, s = self.cell(mode, function, rate, seed), self.settings
        if not (cell / "val.json").is_file():
            self.decoder.prefix, start = mode == "prefix", time.process_time()
            routed = inject_routed_lora(self.decoder, RoutedLoRAConfig(function=function, r=s.r, seed=seed))
            mine = list(routed.parameters())
            fit(self.decoder, mine, self.splits["tuning"], s.steps, s.batch, rate, seed, 0.0, True, cell.name)
            seconds = time.process_time() - start
            routed.save(cell)
            val = held_out(self.decoder, self.splits["val"])
            routed.remove()
            row = {"mode": mode, "function": function, "rate": rate, "seed": seed, "val": val}
            row |= {"parameters": sum(p.numel() for p in mine), "cpu_seconds": round(seconds, 1)}
            write_json(cell / "val.json", row)
        return json.loads((cell / "val.json").read_text())

    def tested(self, mode: str, function: str, rate: float, seed: int) -> dict:
        """The same with the test losses, with the captions' own images and with others."""
        row, file = self.tuned(mode, function, rate, seed), self.cell(mode, function, rate, seed) / "test.json"
        if not file.is_file():
            self.decoder.prefix = mode == "prefix"
            routed, test = load_routed(self.decoder, file.parent), self.splits["test"]
            found = {"test": held_out(self.decoder, test), "shuffled": held_out(self.decoder, test, routed, "shuffled")}
            if mode == "prefix":
                found["routed"] = held_out(self.decoder, test, routed, "routed")
            routed.remove()
            write_json(file, found)
        row |= json.loads(file.read_text())
        print(f"{row['mode']} {function} seed {seed} rate {rate:g}: val {row['val']:.4f}, test {row['test']:.4f}, "
              f"shuffled {row['shuffled']:.4f}", flush=True)  # fmt: skip
        return row

    def cell(self, mode: str, function: str, rate: float, seed: int) -> Path:
        """Its folder."""
        return self.folder / f"{mode}-{function}-{rate:g}-{seed}"


def table(rows: list[dict], frozen: list[dict]) -> str:
    """Mean and sample deviation over the seeds of the test loss; what other images add to it, mean likewise."""

    def cell(values: list[float], form: str = ".4f") -> str:
        return f"{statistics.mean(values):{form}}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")

    lines = ["| image | function | rate | test loss, nats a token | another image adds | in x_R alone | parameters |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for base in frozen:
        lines.append(f"| {base['mode']} | (no LoRA) | | {base['test']:.4f} | | | 0 |")
        mine = [row for row in rows if row["mode"] == base["mode"]]
        for function in dict.fromkeys(row["function"] for row in mine):
            part = [row for row in mine if row["function"] == function]
            more = [
                cell([r[key] - r["test"] for r in part], "+.4f") if key in part[0] else ""
                for key in ("shuffled", "routed")
            ]
            lines.append(f"| {base['mode']} | {function} | {part[0]['rate']:g} | {cell([r['test'] for r in part])} | "
                         f"{more[0]} | {more[1]} | {part[0]['parameters']} |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    small = {"text_steps": 20, "steps": 6, "limit": 200, "layers": 2} if args.quick else {}
    experiment = Experiment(args, Settings(Path(args.model).name, Path(args.data).name, **small))
    frozen, choices, rows = [experiment.frozen(mode) for mode in args.modes], [], []
    for mode in args.modes:
        for function in args.functions:
            tried = [experiment.tuned(mode, function, rate, args.seeds[0]) for rate in args.rates]
            choices += tried
            rate = min(tried, key=lambda row: row["val"])["rate"]
            rows += [experiment.tested(mode, function, rate, seed) for seed in args.seeds]
    print(table(rows, frozen))
    if args.json:
        asked = {k: v for k, v in vars(args).items() if k not in ("json", "runs")}
        result = {"command": asked, "settings": dataclasses.asdict(experiment.settings), "captions": experiment.about,
                  "images": experiment.images, "frozen": frozen, "choices": choices, "rows": rows,
                  "environment": environment(torch.device("cpu"))}  # fmt: skip
        write_json(Path(args.json), result)


if __name__ == "__main__":
    main()
