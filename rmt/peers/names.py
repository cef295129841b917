"""The methods by name, and what `a+b` means: which can be put on top of one another, in which order, and why not."""

import difflib
import importlib
from collections.abc import Sequence
from typing import NamedTuple

from ..config import UserError
from .method import Kind, Method

# name -> (module, class). Imported when it is asked for: a method's optional packages are its own affair.
METHODS = {
    "zeroshot": ("zeroshot", "ZeroShot"),
    "linear_probe": ("linear_probe", "LinearProbe"),
    "linear_probe_zs": ("linear_probe", "ZeroShotProbe"),
    "coop": ("coop", "CoOp"),
    "coop_photo": ("coop", "CoOpPhoto"),
    "coop_csc": ("coop", "CoOpClassSpecific"),
    "cocoop": ("cocoop", "CoCoOp"),
    "tip": ("tip", "TipAdapter"),
    "tip_f": ("tip", "TipAdapterF"),
    "clip_adapter": ("clip_adapter", "ClipAdapter"),
    "lora": ("lora", "LoRA"),
    "bitfit": ("parts", "BitFit"),
    "ln": ("parts", "LayerNormTuning"),
    "full_ft": ("full_ft", "FullFineTuning"),
    "wise_ft": ("full_ft", "WiseFT"),
    "ramt": ("masks", "RAMT"),
    "ramt_spread": ("masks", "SpreadRAMT"),
    "amt": ("masks", "AMT"),
    "rmmt": ("masks", "RMMT"),
    "rpmt": ("masks", "RPMT"),
}
DEFAULT = (
    "zeroshot", "linear_probe", "coop", "tip", "tip_f", "lora", "clip_adapter", "bitfit", "ln", "full_ft", "wise_ft",
    "ramt", "amt", "coop+ramt", "tip+ramt", "tip_f+ramt", "lora+ramt",
)  # fmt: skip
ORDER: tuple[Kind, ...] = ("image", "text", "head")
MASKS = ("ramt", "ramt_spread", "amt", "rmmt", "rpmt")
WHOLE = ("full_ft", "wise_ft")
# A context that is learned together with masks, as in the paper's CoOp+R-AMT, by these.
JOINT = ("coop", "coop_photo", "coop_csc")


class Stack(NamedTuple):
    """A method of --methods: its name in the one spelling, and its parts in the order in which they are fitted."""

    name: str
    parts: tuple[str, ...]

    @property
    def joint(self) -> bool:
        """Whether it begins with masks and context that are trained together."""
        return len(self.parts) > 1 and self.parts[0] in MASKS and self.parts[1] in JOINT


def method(name: str) -> Method:
    """One method by name. Raises UserError for an unknown one."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f": did you mean {near[0]}?" if near else f"; known are {', '.join(METHODS)}"
        raise UserError(f"there is no method {name!r}{hint}")
    module, kind = METHODS[name]
    return getattr(importlib.import_module(f".{module}", __package__), kind)()


def parse(text: str) -> Stack:
    """`tip+ramt` -> its parts in order: masks, what is trained on top of them, class vectors, head.

    Raises: UserError for an unknown method, or for two that cannot be combined, with the reason.
    """
    names = text.split("+")
    found = {name: method(name) for name in names}
    if len(found) < len(names):
        raise UserError(f"{text}: each method can be there once")
    if len(names) > 1:
        _need_combinable(text, found)
    place = {name: (ORDER.index(m.kind), name not in MASKS, list(METHODS).index(name)) for name, m in found.items()}
    return Stack("+".join(_spelled(names)), tuple(sorted(names, key=place.get)))


def _spelled(names: Sequence[str]) -> list[str]:
    """As the paper writes them: CoOp+R-AMT, masks last."""
    return sorted(names, key=lambda name: (name in MASKS, list(METHODS).index(name)))


def _need_combinable(text: str, found: dict[str, Method]) -> None:
    names = list(found)

    def refuse(reason: str) -> None:
        raise UserError(f"{text} cannot be combined: {reason}")

    if "zeroshot" in found:
        rest = "+".join(name for name in names if name != "zeroshot")
        refuse(f"zeroshot trains nothing, so that this is {rest} alone")
    masks = [name for name in names if name in MASKS]
    if len(masks) > 1:
        refuse(f"{' and '.join(masks)} would train one set of masks twice")
    whole = [name for name in names if name in WHOLE]
    image = [name for name, m in found.items() if m.kind == "image"]
    if whole and len(image) > 1:
        others = ", ".join(name for name in image if name not in whole[:1])
        refuse(f"{whole[0]} moves every weight of the image tower, those that {others} set too")
    if len(image) - len(masks) > 1:
        refuse(f"{' and '.join(n for n in image if n not in masks)} both train parameters beside the weights: take one")
    for kind, what in (("text", "class vectors"), ("head", "the head")):
        same = [name for name, m in found.items() if m.kind == kind]
        if len(same) > 1:
            refuse(f"{' and '.join(same)} both make {what}")
    for name, m in found.items():
        text_methods = [other for other, o in found.items() if o.kind == "text"]
        if m.kind == "head" and not m.reads_text and text_methods:
            refuse(f"{name} does not read the class vectors that {text_methods[0]} learns")
    if {"linear_probe_zs", "cocoop"} <= set(found):
        refuse("linear_probe_zs starts from one vector a class, and cocoop makes other ones for every image")
