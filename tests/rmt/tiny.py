"""A randomly initialised open_clip model that takes milliseconds, and folders of generated images."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

SHARED = Path(__file__).parents[3] / "shared" / "data"
COLOURS = {"red ball": (200, 40, 40), "green_leaf": (40, 180, 60), "blue sky": (50, 60, 210), "grey stone": (128,) * 3}
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
PREPROCESS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "squash"}


def model(seed: int = 0, kind: type = open_clip.CLIP, **vision) -> nn.Module:
    """Image size 32, patches of 8, width 64, 2 blocks; text context 16."""
    torch.manual_seed(seed)
    config = MODEL | {"vision_cfg": MODEL["vision_cfg"] | vision}
    made = kind(**config)
    with torch.no_grad():
        # Random towers give all classes nearly one logit; a larger scale makes gradients worth comparing.
        made.logit_scale.fill_(3.5)
        for name, parameter in made.named_parameters():
            if name.endswith("in_proj_weight"):
                parameter.mul_(3)
    return made.eval()


def model_folder(folder: Path, seed: int = 0, context: int = 16) -> str:
    """Writes `model(seed)` as an open_clip local-dir; returns the name to load it by. context: of the text tower."""
    folder.mkdir(parents=True)
    config = MODEL | {"text_cfg": MODEL["text_cfg"] | {"context_length": context}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    state = model(seed).state_dict()
    rows = torch.randn(max(0, context - len(state["positional_embedding"])), state["positional_embedding"].shape[1])
    state["positional_embedding"] = torch.cat([state["positional_embedding"], 0.01 * rows])[:context].clone()
    save_file(state, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def images(folder: Path, each: int, seed: int = 0) -> Path:
    """`each` noisy images of 40 x 36 pixels in a folder for every class of COLOURS."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noisy = np.clip(np.array(colour) + rng.normal(0, 40, (36, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name / f"{i:03}.png")
    return folder


def splits(folder: Path, train: int = 8, test: int = 6) -> Path:
    """FOLDER/{train,test}/{class}/*.png."""
    images(folder / "train", train, seed=1)
    images(folder / "test", test, seed=2)
    return folder
