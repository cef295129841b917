"""What a bank knows of a task, and how its callers wait for each other."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .bank_layers import Bits
from .checkpoint import Task, count_on
from .config import PRESETS, MaskConfig, UserError
from .files import sha256
from .masking import find_targets
from .named import is_attention

BASE = "__base__"


@dataclass(frozen=True, eq=False)
class Entry:
    """A task in a bank. It never changes: a call that has one is not disturbed by what others add or remove.

    bits: without the masks in which nothing is off. text: (C, D) fp32 features of its class names; None where there is
    no way to them.
    """

    name: str
    bits: Bits
    shapes: Mapping[str, tuple[int, int]]
    classnames: tuple[str, ...]
    template: str | None
    text: Tensor | None
    path: Path | None
    bits_sha256: str

    @classmethod
    def make(cls, name: str, task: Task, device) -> "Entry":
        """Of a task file's content, its bits copied to `device`."""
        sizes = {key: n * k for key, (n, k) in task.shapes.items()}
        bits = {key: words.to(device, copy=True) for key, words in task.bits.items() if count_on(words) < sizes[key]}
        text = None if task.text_features is None else task.text_features.to(device)
        return cls(name, bits, task.shapes, task.classnames, task.template, text, task.path, task.bits_sha256)

    @property
    def bytes(self) -> int:
        """Of the packed bits and the text features."""
        text = 0 if self.text is None else self.text.numel() * 4
        return sum(4 * words.numel() for words in self.bits.values()) + text

    def info(self) -> dict[str, Any]:
        """For people: see `TaskBank.info`."""
        weights = sum(n * k for n, k in self.shapes.values())
        off = sum(self.shapes[key][0] * self.shapes[key][1] - count_on(w.cpu()) for key, w in self.bits.items())
        return {
            "name": self.name, "path": None if self.path is None else str(self.path), "classnames": self.classnames,
            "template": self.template, "weights": weights, "off": off, "percent_off": 100 * off / max(1, weights),
            "bytes": self.bytes, "bits_sha256": self.bits_sha256,
        }  # fmt: skip

    def moved(self, fn) -> "Entry":
        """After what `nn.Module._apply` does: on another device, in the same dtypes."""
        text = None if self.text is None else self.text.to(fn(self.text).device)
        return replace(self, bits={key: fn(words) for key, words in self.bits.items()}, text=text)


class BaseWeights:
    """Whether a task was made for a model: by names, shapes and the hash of the weights that it masks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._hashes: dict[frozenset[str], str] = {}
        self._exact = True

    def remember(self) -> None:
        """Hashes what the presets mask, while the weights are still those that tasks are tuned on."""
        for preset in PRESETS.values():
            for towers in (("image",), ("image", "text")):
                with contextlib.suppress(UserError):
                    names = find_targets(self._model, MaskConfig(targets=preset.targets, towers=towers))
                    self._hash(key for name in names for key in _keys(self._model, name))
        self._exact = False

    def _hash(self, keys: Iterable[str]) -> str | None:
        """None where the weights have been rounded since."""
        chosen = frozenset(keys)
        if chosen not in self._hashes and self._exact:
            found = {key: weight for key in chosen if (weight := self._find(key)) is not None}
            self._hashes[chosen] = sha256({key: weight.float() for key, weight in found.items()})
        return self._hashes.get(chosen)

    def need(self, task: Task, allow_mismatch: bool) -> None:
        """Raises UserError where it was not. allow_mismatch: names and shapes must be right, the weights need not."""
        weights = {key: self._weight(task, key) for key in task.shapes}
        for key, shape in task.shapes.items():
            if tuple(weights[key].shape) != tuple(shape):
                got = tuple(weights[key].shape)
                raise UserError(f"{task.path} is for another model: {key} is {got} here, and {shape} there")
        got = None if allow_mismatch else self._hash(task.shapes)
        if not allow_mismatch and got is None:
            raise UserError(
                f"{task.path} must be added before the bank's weights are rounded to 16 bits: whether it is for this "
                "backbone cannot be told any more. allow_base_mismatch uses it all the same"
            )
        if not allow_mismatch and got != task.base_sha256:
            name = f" ({task.model}, pretrained {task.pretrained})" if task.model else ""
            raise UserError(
                f"{task.path} is for another backbone: expected base weights with sha256 {task.base_sha256}{name}, got "
                f"{got}. allow_base_mismatch uses it all the same"
            )

    def _weight(self, task: Task, key: str) -> Tensor:
        weight = self._find(key)
        if weight is None:
            raise UserError(f"{task.path} is for another model: {type(self._model).__name__} has no weight {key}")
        return weight

    def _find(self, key: str) -> Tensor | None:
        owner, _, attribute = key.rpartition(".")
        with contextlib.suppress(AttributeError):
            weight = self._model.get_submodule(owner)._parameters.get(attribute)
            return None if weight is None else weight.flatten(1)
        return None


def _keys(model: nn.Module, name: str) -> list[str]:
    """Of the weights that a masked module `name` has."""
    module = model.get_submodule(name)
    packed = is_attention(module)
    return [f"{name}.{key}" for key in (("in_proj_weight", "out_proj.weight") if packed else ("weight",))]


class ReadWrite:
    """Many readers or one writer, who goes first once he waits."""

    def __init__(self) -> None:
        self._changed, self._readers, self._writers = threading.Condition(), 0, 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._changed:
            self._writers += 1
            self._changed.wait_for(lambda: not self._readers)
            try:
                yield
            finally:
                self._writers -= 1
                self._changed.notify_all()


def need_name(name: str) -> None:
    """Raises UserError for what cannot be a task's name: empty, "__base__", or with a slash or control character."""
    if not isinstance(name, str) or not name.strip() or name in (BASE, ".", "..") or len(name) > 200:
        raise UserError(f"a task's name must be a text of 1 to 200 characters other than {BASE!r}, got {name!r}")
    if any(c in "/\\" or not c.isprintable() for c in name):
        raise UserError(f"a task's name must have no slash and no control character, got {name!r}")
