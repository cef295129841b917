"""Result files as rmt compare, train and b2n write them, with made-up numbers: for tests of the page alone."""

import json
import random
from pathlib import Path

from PIL import Image

from rmt.peers.names import DEFAULT, MASKS

# Accuracy above zero-shot at 1 and at 16 images a class, trained numbers, seconds.
GAINS = {
    "zeroshot": (0, 0, 0, 0), "linear_probe": (-28, 6, 5_130, 3), "coop": (-1, 9, 8_192, 410), "tip": (1, 5, 0, 2),
    "tip_f": (2, 10, 81_920, 25), "lora": (1.5, 11, 184_320, 300), "clip_adapter": (0.5, 7, 131_072, 40),
    "bitfit": (1, 8, 102_912, 260), "ln": (1.2, 8.5, 39_936, 262), "full_ft": (-6, 7, 86_192_640, 350),
    "wise_ft": (0.5, 9, 86_192_640, 350), "ramt": (1.8, 11.5, 28_901_376, 330), "amt": (1.1, 10.2, 28_901_376, 280),
    "coop+ramt": (1.6, 12, 28_909_568, 450), "tip+ramt": (2.4, 11.9, 28_901_376, 333),
    "tip_f+ramt": (2.9, 12.8, 28_983_296, 356), "lora+ramt": (2, 12.1, 29_085_696, 640),
}  # fmt: skip
TITLES = {
    "zeroshot": "zero-shot", "linear_probe": "linear probe", "coop": "CoOp", "tip": "Tip-Adapter",
    "tip_f": "Tip-Adapter-F", "lora": "LoRA", "clip_adapter": "CLIP-Adapter", "bitfit": "BitFit", "ln": "LayerNorm",
    "full_ft": "full fine-tuning", "wise_ft": "WiSE-FT", "ramt": "R-AMT", "amt": "AMT",
}  # fmt: skip
KEYS = ["visual.conv1.weight"] + [
    f"visual.transformer.resblocks.{i}.{part}" for i in range(12)
    for part in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
]  # fmt: skip
NAMES = ["cat", "dog", "<b>bird</b>"]


def cell(dataset: str, method: str, shots: int, seed: int, zero: float = 60.0) -> dict:
    """One result; equal arguments give equal numbers."""
    draw = random.Random(f"{dataset} {method} {shots} {seed}")
    low, high, trained, seconds = GAINS[method]
    gain = low + (high - low) * (shots.bit_length() - 1) / 4
    noise = 0.0 if method == "zeroshot" else draw.gauss(0, 1.4 / shots**0.3)
    masked = set(method.split("+")) & set(MASKS)
    result = {
        "kind": "compare", "dataset": dataset, "method": method, "parts": method.split("+"),
        "shots": shots, "seed": seed, "title": " + ".join(TITLES[part] for part in method.split("+")), "split": "test",
        "metrics": {"acc1": min(99.5, zero + gain + noise), "mean_per_class_recall": 70.0, "macro_f1": 69.0},
        "classnames": NAMES, "confusion": [[5, 1, 0], [2, 4, 0], [0, 3, 3]], "per_class": [83.3, 66.7, 50.0],
        "trained_parameters": trained, "stored_bytes": trained // 8 if masked else 4 * trained,
        "training_seconds": seconds * draw.uniform(0.95, 1.05), "own_seconds": float(seconds),
        "peak_bytes": None if method == "zeroshot" else 300_000_000 + trained * 8,
        "images_per_second": draw.uniform(40, 45),
        "steps": 50, "published_steps": 200, "chosen": {}, "sources": {method: "hand-written source"},
        "notes": ["a note of R-AMT"] if method == "ramt" else [], "reused": [], "worst": [],
        "model": "ViT-B-16", "pretrained": "openai", "base_sha256": "b" * 64,
        "indices_sha256": f"{dataset}{shots}{seed}" * 8,
        "environment": {"torch": "2.11.0", "commit": "abc123", "device": "cpu",
                        "date": f"2026-01-0{seed}T00:00:00+00:00"},
        "command": f"rmt compare --dataset {dataset} --shots 1 4 16 --seeds 1 2 3",
    }  # fmt: skip
    if masked:
        mask = next(iter(masked))
        chosen = random.Random(f"{dataset} {mask} {shots} {seed}")
        layers = [[key, int(1000 * chosen.uniform(0, 0.02 + 0.012 * i / 4)), 10_000] for i, key in enumerate(KEYS)]
        off, total = (sum(layer[i] for layer in layers) for i in (1, 2))
        result |= {"per_layer": layers, "off": off, "masked": total, "percent_off": 100 * off / total,
                   "bits_sha256": f"{dataset}{mask}{shots}{seed}" * 6, "task_bytes": 100_000}  # fmt: skip
    return result


def image(path: Path, seed: int = 0) -> Path:
    """A picture of noise in a colour, 160 x 120."""
    draw = random.Random(seed)
    colour = [draw.randrange(40, 216) for _ in range(3)]
    pixels = bytes(min(255, max(0, c + draw.randrange(-40, 40))) for _ in range(40 * 30) for c in colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (40, 30), pixels).resize((160, 120)).save(path)
    return path


def compare(
    out: Path,
    dataset: str = "pets",
    methods=DEFAULT,
    shots=(1, 4, 16),
    seeds=(1, 2, 3),
    zero=60.0,
    lost=(),
    images=True,
) -> Path:
    """A folder of `rmt compare`. lost: (method, shots, seed) without a result, which compare.json lists."""
    for method in methods:
        for k in shots:
            for seed in seeds:
                folder = out / method / f"shots{k}-seed{seed}"
                folder.mkdir(parents=True)
                if (method, k, seed) in lost:
                    continue
                result = cell(dataset, method, k, seed, zero)
                wrong = [image(out / "images" / f"{i}.png", i) for i in range(4)] if images else [out / "gone.png"]
                result["worst"] = [
                    {"class": name, "acc1": 50.0 + i, "images": [
                        {"path": str(path), "predicted": "<i>cow</i>", "confidence": 0.61} for path in wrong]}
                    for i, name in enumerate(reversed(NAMES))
                ]  # fmt: skip
                write(folder / "result.json", result)
    missing = [{"method": m, "shots": k, "seed": s, "why": "RuntimeError: no memory"} for m, k, s in lost]
    write(out / "compare.json", {"kind": "compare_table", "dataset": dataset, "rows": [], "missing": missing})
    return out


def spread(mean: float, sd: float | None = 0.5) -> dict:
    """As protocols.spread."""
    return {"mean": mean, "sd": sd}


def base_to_new(out: Path) -> Path:
    """A folder of `rmt b2n` with its table alone."""
    rows = {
        "zero_shot": {"base": spread(70.0, 0.0), "new": spread(74.0, 0.0), "harmonic_of_means": 71.944,
                      "harmonic": spread(71.944, 0.0)},
        "tuned": {"base": spread(81.25), "new": spread(75.5), "harmonic_of_means": 78.27, "harmonic": spread(78.2)},
    }  # fmt: skip
    pairs = {str(seed): {"tuned": [81.0, 75.0], "zero_shot": [70.0, 74.0]} for seed in (1, 2, 3)}
    return write(
        out / "table.json", {"protocol": "coop", "seeds": pairs, "failed": {"x/seed4": "boom"}, "rows": rows}
    ).parent


def grid(out: Path) -> Path:
    """A folder of `rmt train` over shots and seeds with its table alone."""
    rows = [
        {"shots": k, "seeds": [1, 2], "acc1": spread(60.0 + k), "mean_per_class_recall": spread(59.0),
         "macro_f1": spread(58.0), "zero_shot": spread(60.5, 0.0), "percent_off": spread(3.25),
         "tuning_seconds": spread(10.0),
         "bits_sha256": ["a"]}
        for k in (1, 4, 16)
    ]  # fmt: skip
    return write(out / "table.json", {"protocol": "coop", "rows": rows, "failed": {}}).parent


def ablation(out: Path) -> Path:
    """A folder of an ablation."""
    rows = [
        {"label": f"strength {s}", "acc1": spread(70 + s), "percent_off": spread(3 - s, None)} for s in (0.0, 0.3, 1.0)
    ]
    return write(out / "ablation.json", {"kind": "ablation", "what": "gdr", "dataset": "pets", "rows": rows}).parent


def write(path: Path, content: dict) -> Path:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path
