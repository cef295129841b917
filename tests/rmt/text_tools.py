"""Generated images with captions and questions, and an open_clip CoCa folder that the commands can load."""

import json
from collections.abc import Callable
from pathlib import Path

import coca_tools
import numpy as np
import open_clip
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file

WORDS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 210), "grey": (128, 128, 128)}
VOCABULARY, CONTEXT = 49408, 16


def image(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    """24 x 20 pixels of one colour with noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 20, (20, 24, 3))
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(path)


def killed_at(step: Callable, call: int) -> Callable:
    """`step`, interrupted in place of its call of that number."""
    calls = []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    return killed


def captions(folder: Path, each: int = 3, parts=("train", "val", "test")) -> Path:
    """captions.json with `each` images a colour in every part, two captions each."""
    rows = []
    for part in parts:
        for place, (word, colour) in enumerate(WORDS.items()):
            for n in range(each):
                name = f"{part}/{word}{n}.png"
                image(folder / name, colour, 100 * place + n)
                rows.append({"image": name, "captions": [f"A {word} wall .", f"the whole picture is {word}"]})
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def questions(root: Path, each: int = 2) -> Path:
    """VQAv2's layout: which colour, answered by ten, three of whom say otherwise."""
    for part in ("train", "val"):
        asked, answered = [], []
        for place, (word, colour) in enumerate(WORDS.items()):
            for n in range(each):
                key = 10 * place + n
                image(root / f"{part}2014" / f"COCO_{part}2014_{key:012}.jpg", colour, key)
                asked.append({"question_id": key, "image_id": key, "question": "What colour is it?"})
                given = [{"answer": text} for text in [word] * 7 + ["pink"] * 2 + ["a wall"]]
                answered.append({"question_id": key, "multiple_choice_answer": word, "answers": given})
        names = f"v2_OpenEnded_mscoco_{part}2014_questions.json", f"v2_mscoco_{part}2014_annotations.json"
        (root / names[0]).write_text(json.dumps({"questions": asked}))
        (root / names[1]).write_text(json.dumps({"annotations": answered}))
    return root


def coca_folder(folder: Path, seed: int = 0) -> str:
    """A CoCa of `coca_tools`' widths with CLIP's vocabulary as an open_clip local-dir; returns its name."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(coca_tools.CONFIG))
    for part in ("text_cfg", "multimodal_cfg"):
        config[part] |= {"vocab_size": VOCABULARY, "context_length": CONTEXT}
    torch.manual_seed(seed)
    model = open_clip.CoCa(**config)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=coca_tools.WIDTH**-0.5)
    model_cfg = config | {"custom_text": True}
    text = {"model_cfg": model_cfg, "preprocess_cfg": tiny.PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(text))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"
