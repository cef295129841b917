"""Pictures with captions, drawn as they are needed: what the demo's CLIP learns from. No file, no network.

Characters in every text font that matplotlib ships, and coloured shapes, each with a caption: "a photo of the number
seven.", "the letter k.", "a red star.". A glyph is warped (turn, size, place, shear, wobble), recoloured, coarsened and
made noisy anew for every batch. Everything is a function of (seed, step).
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE, GLYPH = 16, 48
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "ring", "square", "triangle", "diamond", "star", "cross", "crescent")
COLOURS = {
    "red": (0.85, 0.1, 0.1), "green": (0.1, 0.65, 0.2), "blue": (0.15, 0.25, 0.9), "yellow": (0.95, 0.85, 0.1),
    "orange": (0.95, 0.5, 0.05), "purple": (0.55, 0.15, 0.7), "pink": (0.95, 0.55, 0.75), "brown": (0.45, 0.28, 0.1),
}  # fmt: skip
NUMBER_CAPTIONS = ("a photo of the number {}.", "the number {}.", "the digit {}.", "a picture of the digit {}.")
LETTER_CAPTIONS = ("a photo of the letter {}.", "the letter {}.", "a picture of the letter {}.")
SHAPE_CAPTIONS = ("a photo of a {}.", "a {}.", "a picture of a {}.")


class Concept(NamedTuple):
    """What two pictures have in common: the glyphs that may show it, its colour or None, its captions."""

    glyphs: tuple[int, ...]
    colour: tuple[float, float, float] | None
    captions: tuple[str, ...]


class Scene(NamedTuple):
    """A batch. image: (B, 3, SIZE, SIZE) in 0..1; concept: (B,) int64; captions: B texts."""

    image: Tensor
    concept: Tensor
    captions: list[str]


@cache
def bank() -> tuple[Tensor, tuple[Concept, ...]]:
    """All glyphs, (G, GLYPH, GLYPH) in 0..1, and all concepts: ten numbers, 26 letters, 64 coloured shapes."""
    fonts, glyphs, concepts = _fonts(), [], []

    def add(drawn: list[Tensor]) -> tuple[int, ...]:
        glyphs.extend(drawn)
        return tuple(range(len(glyphs) - len(drawn), len(glyphs)))

    for value, name in enumerate(NUMBERS):
        texts = tuple(caption.format(word) for caption in NUMBER_CAPTIONS for word in (name, str(value)))
        concepts.append(Concept(add([_glyph(str(value), font) for font in fonts]), None, texts))
    for letter in "abcdefghijklmnopqrstuvwxyz":
        drawn = [_glyph(form, font) for form in (letter, letter.upper()) for font in fonts]
        concepts.append(Concept(add(drawn), None, tuple(caption.format(letter) for caption in LETTER_CAPTIONS)))
    for shape in SHAPES:
        place = add([_shape(shape)])
        for colour, rgb in COLOURS.items():
            texts = tuple(caption.format(f"{colour} {shape}") for caption in SHAPE_CAPTIONS)
            concepts.append(Concept(place, rgb, texts))
    return torch.stack(glyphs), tuple(concepts)


def _fonts() -> list[Path]:
    """matplotlib's text fonts; the others hold mathematical signs in the places of letters."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*", "cmb10*", "cmr10*", "cmss10*", "cmti10*", "cmtt10*")
    return [p for name in names for p in sorted(folder.glob(f"{name}.ttf")) if "Display" not in p.name]


def _glyph(text: str, font: Path) -> Tensor:
    """`text` in white on black, its longer side 3/4 of the square, in its middle."""
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(str(font), 64)
    left, top, right, bottom = face.getbbox(text)
    drawn = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(drawn).text((-left, -top), text, fill=255, font=face)
    scale = 0.75 * GLYPH / max(drawn.size)
    width, height = (max(2, round(side * scale)) for side in drawn.size)
    square = Image.new("L", (GLYPH, GLYPH))
    square.paste(drawn.resize((width, height)), ((GLYPH - width) // 2, (GLYPH - height) // 2))
    return _tensor(square)


def _shape(name: str) -> Tensor:
    """In white on black; drawn four times as large and shrunk, for smooth edges."""
    from PIL import Image, ImageDraw

    side = 4 * GLYPH
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)

    def disc(x: float, y: float, radius: float, fill: int) -> None:
        draw.ellipse([side * v for v in (x - radius, y - radius, x + radius, y + radius)], fill=fill)

    def polygon(turn: float, radii: tuple[float, ...]) -> None:
        angles = (turn + 2 * math.pi * i / len(radii) for i in range(len(radii)))
        draw.polygon([side * (0.5 + r * f(a)) for a, r in zip(angles, radii) for f in (math.cos, math.sin)], fill=255)

    def bar(width: float, height: float) -> None:
        draw.rectangle([side * v for v in (0.5 - width, 0.5 - height, 0.5 + width, 0.5 + height)], fill=255)

    if name in ("circle", "ring", "crescent"):
        disc(0.5, 0.5, 0.36, 255)
    if name in ("ring", "crescent"):
        disc(0.5 if name == "ring" else 0.64, 0.5, 0.2 if name == "ring" else 0.3, 0)
    elif name == "square":
        bar(0.3, 0.3)
    elif name == "cross":
        bar(0.36, 0.12), bar(0.12, 0.36)
    elif name != "circle":
        radii = {"triangle": (0.4,) * 3, "diamond": (0.4, 0.26) * 2, "star": (0.42, 0.17) * 5}[name]
        polygon(-math.pi / 2, radii)
    return _tensor(canvas.resize((GLYPH, GLYPH), Image.Resampling.BOX))


def _tensor(image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(GLYPH, GLYPH).float() / 255


def render(seed: int, step: int, batch: int) -> Scene:
    """Batch number `step`: half of it numbers and letters in random colours, the other half any concept."""
    glyphs, concepts = bank()
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=random)

    characters = sum(c.colour is None for c in concepts)
    concept = torch.where(uniform(0, 1) < 0.7, uniform(0, characters), uniform(0, len(concepts))).long()
    chosen = [concepts[i] for i in concept.tolist()]
    pick = uniform(0, 1, 2).tolist()
    shown = glyphs[[c.glyphs[int(p * len(c.glyphs))] for c, (p, _) in zip(chosen, pick)]]
    captions = [c.captions[int(p * len(c.captions))] for c, (_, p) in zip(chosen, pick)]
    ink = _spoil(_warp(shown, uniform), uniform)
    front, back = _colours(chosen, uniform)
    image = ink * front + (1 - ink) * back
    noise = torch.randn(image.shape, generator=random) * uniform(0, 0.1, 1, 1, 1)
    return Scene((image + noise).clamp(0, 1), concept, captions)


def _warp(shown: Tensor, uniform: Callable) -> Tensor:
    """(B, GLYPH, GLYPH) -> (B, 1, 2 SIZE, 2 SIZE): turned, sheared, scaled and moved; strokes wobble."""
    side, turn, shear = 2 * SIZE, uniform(-0.25, 0.25), uniform(-0.25, 0.25)
    wide, high = uniform(0.75, 1.3), uniform(0.75, 1.1)
    matrix = torch.stack([
        turn.cos() * wide, (shear - turn.sin()) * high, uniform(-0.15, 0.15),
        turn.sin() * wide, turn.cos() * high, uniform(-0.15, 0.15),
    ], 1).reshape(-1, 2, 3)  # fmt: skip
    grid = F.affine_grid(matrix, [len(shown), 1, side, side], align_corners=False)
    wobble = uniform(-0.2, 0.2, 2, 4, 4) * uniform(0, 1, 1, 1, 1)
    wobble = F.interpolate(wobble, size=(side, side), mode="bilinear", align_corners=False)
    return F.grid_sample(shown[:, None], grid + wobble.permute(0, 2, 3, 1), align_corners=False)


def _spoil(ink: Tensor, uniform: Callable) -> Tensor:
    """(B, 1, 2 SIZE, 2 SIZE) -> (B, 1, SIZE, SIZE): between sharp and coarse; strokes thicker or thinner by a gamma."""
    sharp = F.avg_pool2d(ink, 2)
    coarse = F.interpolate(F.avg_pool2d(ink, 4), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return torch.lerp(sharp, coarse, uniform(0, 1, 1, 1, 1)) ** uniform(-0.7, 0.7, 1, 1, 1).exp()


def _colours(chosen: list[Concept], uniform: Callable) -> tuple[Tensor, Tensor]:
    """Front and back, (B, 3, 1, 1) each: a shape has its colour; two characters of three are grey on grey."""
    named = torch.tensor([c.colour or (-1.0,) * 3 for c in chosen])
    has_colour = named[:, :1] >= 0
    grey = uniform(0, 1, 1) < 0.8
    light = uniform(0, 1, 1) < 0.5
    strong, weak = uniform(0.55, 1, 3), uniform(0, 0.45, 3)
    strong, weak = (torch.where(grey, c[:, :1].expand(-1, 3), c) for c in (strong, weak))
    front, back = torch.where(light, strong, weak), torch.where(light, weak, strong)
    front = torch.where(has_colour, (named + uniform(-0.08, 0.08, 3)).clamp(0, 1), front)
    back = torch.where(has_colour, torch.where(light, uniform(0, 0.2, 1), uniform(0.8, 1, 1)), back)
    return front[..., None, None], back[..., None, None]
