"""Many tasks over one backbone: `TaskBank` holds their bits, and answers a batch in which every image has its own task.

bank = rmt.load("ViT-B-16-quickgelu", "openai", tasks={"pets": "tasks/pets", "dtd": "tasks/dtd"})
bank.classify(images, ["pets", "dtd", "pets"])          # -> [Answer(task, class_name, probability), ...]
bank.set_adapter("dtd"); features = bank.encode_image(images)
with bank.disable_adapter(): features = bank.encode_image(images)      # zero-shot CLIP

A task costs its packed bits, one a weight, and the text features of its class names. Images of one batch are sorted by
task, and each layer's rows meet their own bits in one product that reads the weight once
(`rmt_kernels.grouped_masked_linear`).
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import clip
from .bank_layers import Plan, running
from .bank_swap import activate, bank_modules, open_invariant, open_weights, plain_copy
from .bank_tasks import BASE, BaseWeights, Entry, ReadWrite, need_name
from .checkpoint import Task, load_task
from .config import UserError
from .hub_id import is_id, split_id, task_source
from .masked import masks
from .wrapping import Wrapping

# Banks whose tasks are off in this thread, by id.
_DISABLED: ContextVar[frozenset[int]] = ContextVar("rmt_bank_disabled", default=frozenset())


class Answer(NamedTuple):
    """What an image is, by the classes of one task."""

    task: str
    class_name: str
    probability: float


class TaskBank(Wrapping):
    """A CLIP model that serves many tasks. Calls and attributes that are not its own are the model's, with one active.

    The model is changed in place: its masked modules become bank layers, which keep its weights and state-dict names.
    Every method may be called from several threads at once. Features have no graph. `bank.bfloat16()` rounds the model,
    for speed where the processor multiplies bf16; tasks that mask other weights than a preset must be there before.

    Args:
        model: an open_clip model, or one masked by module names; in eval mode from then on.
        tokenizer: of its text tower; without it tasks need stored text features to classify.
        preprocess: what turns a PIL image into its input, (3, H, W).
        invariant: the answer for an image does not depend on what else is in its batch, bit for bit. All products of
            the image tower then run row by row in one order, which costs time in large batches; ViT towers only.
        kept: keep the active task's masked weights beside the plain ones, for speed in calls without `adapter_names`,
            at the cost of that memory and of a swap that rewrites them.

    Raises: UserError for a model with masks, or with layers that `invariant` has no product for.
    """

    def __init__(
        self, model: nn.Module, *, tokenizer: clip.Tokenizer | None = None, preprocess: Callable | None = None,
        invariant: bool = False, kept: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if masks(model):
            raise UserError("a bank takes a plain model, got one with masks: save its task, and load the model anew")
        if invariant and kept:
            raise UserError("invariant answers come from the bits, not from kept weights: choose one of the two")
        self.model, self.tokenizer, self.preprocess = model.eval().requires_grad_(False), tokenizer, preprocess
        self.invariant, self.kept = invariant, kept
        self._entries: dict[str, Entry] = {}
        self._base = Entry(BASE, {}, {}, (), None, None, None, "")
        self._active: str | None = None
        self._lock, self._swap = threading.RLock(), ReadWrite()
        self._weights = BaseWeights(model)
        # As it was in fp32: rounded to 16 bits it would change every probability.
        self._scale = float(model.logit_scale.detach().float().exp())
        self.training = False
        if invariant:
            open_invariant(model)

    # --- tasks --------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order they were added."""
        return tuple(self._entries)

    @property
    def active(self) -> str | None:
        """What `set_adapter` set; None: the zero-shot model."""
        return self._active

    def load(
        self, path: str | Path, name: str | None = None, *, replace: bool = False, allow_base_mismatch: bool = False
    ) -> str:
        """Adds a task folder, run folder, task file or hub id user/name[@revision]. Returns its name.

        name: by default the last part of the path or id.

        Raises: UserError where it is missing, damaged, of another backbone, or where the name is taken.
        """
        hub = is_id(path) and not Path(path).exists()
        inside = Path(path) / "task"
        task = load_task(inside if inside.is_dir() else task_source(path))
        if name is None:
            name = split_id(path)[0].rpartition("/")[2] if hub else Path(path).resolve().name
        self.add(name, task, replace=replace, allow_base_mismatch=allow_base_mismatch)
        return name

    def add(self, name: str, task: Task, *, replace: bool = False, allow_base_mismatch: bool = False) -> None:
        """Adds a task. replace: in the place of one of that name, for calls that start from now on.

        Raises: UserError as `load`; the bank is then as it was.
        """
        need_name(name)
        with self._lock:
            self._need_free(name, replace)
            self._weights.need(task, allow_base_mismatch)
            open_weights(self.model, task.shapes)
            entry = Entry.make(name, task, self.logit_scale.device)
            text = self._text(entry) if entry.text is None else entry.text
            self._entries[name] = dataclasses.replace(entry, text=text)
            if name == self._active:
                self.set_adapter(name)

    def remove(self, name: str) -> None:
        """Forgets a task; calls that run keep it until they end. Raises UserError for an unknown name."""
        with self._lock:
            self._entry(name)
            if name == self._active:
                self.set_adapter(None)
            del self._entries[name]

    def info(self, name: str) -> dict[str, Any]:
        """name, path, classnames, template, weights, off, percent_off and bytes in memory. Raises UserError."""
        return self._entry(name).info()

    def set_classes(self, classnames: Sequence[str], template: str) -> None:
        """Gives `__base__`, the zero-shot model, classes to answer with. Raises UserError without a tokenizer."""
        entry = dataclasses.replace(self._base, classnames=tuple(classnames), template=template)
        if not classnames or (text := self._text(entry)) is None:
            raise UserError(f"classes need names, and a bank with a tokenizer, got {len(classnames)} names")
        with self._lock:
            self._base = dataclasses.replace(entry, text=text)

    def memory(self) -> dict[str, int]:
        """Bytes: backbone (the model's own), tasks (bits and text features), active (its bits), kept (its weights)."""
        modules = bank_modules(self.model)
        active = sum(m._buffers[p + "bits"].numel() * 4 for m in modules for p in m.mask_prefixes)
        own = sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers())) - active
        kept = sum(d.numel() * d.element_size() for m in modules for d in m._dense.values())
        tasks = sum(entry.bytes for entry in (*self._entries.values(), self._base))
        return {"backbone": own, "tasks": tasks, "active": active, "kept": kept}

    # --- the active task ----------------------------------------------------------------------------------------------

    def set_adapter(self, name: str | None) -> None:
        """Makes a task the one of calls without `adapter_names`; None or "__base__": the zero-shot model.

        Bits of the layers are rewritten in place, so that a compiled model needs no compilation. Waits for calls that
        use the kept weights. Raises UserError for an unknown name.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            name = None if name == BASE else name
            bits = {} if name is None else self._entry(name).bits
            with self._swap.writing():
                activate(bank_modules(self.model), bits, self.kept)
                self._active = name

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, in this thread, calls without `adapter_names` are the zero-shot model's."""
        token = _DISABLED.set(_DISABLED.get() | {id(self)})
        try:
            yield
        finally:
            _DISABLED.reset(token)

    # --- answers ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_image(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """(B, 3, H, W) images -> (B, D) features, each of its own task: a name an image, "__base__" for zero-shot.

        Without names: of the active task. Raises UserError for unknown names and another number of them.
        """
        _need_images(x)
        if adapter_names is None:
            return self._encode_active(x)
        return self._encode(x, self._rows(adapter_names, len(x)))

    @torch.no_grad()
    def probabilities(self, x: Tensor, adapter_names: Sequence[str]) -> list[Tensor]:
        """(B, 3, H, W) images, B names -> B tensors (C,) fp32, of each image's task's classes. Raises UserError."""
        _need_images(x)
        return self._probabilities(x, self._rows(adapter_names, len(x)))

    @torch.no_grad()
    def classify(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> list[Answer]:
        """The most probable class of each image, by its own task or the active one.

        Raises: UserError for unknown names, and for a task without class names or text features.
        """
        _need_images(x)
        if adapter_names is None:
            adapter_names = [self._current() or BASE] * len(x)
        rows = self._rows(adapter_names, len(x))
        answers = []
        for entry, p in zip(rows, self._probabilities(x, rows)):
            best = int(p.argmax())
            answers.append(Answer(entry.name, entry.classnames[best], float(p[best])))
        return answers

    def merge_and_unload(self, name: str) -> nn.Module:
        """A copy of the model, plain open_clip again, with one task merged in, exact in every dtype; the bank stays."""
        return plain_copy(self.model, self._entry(name).bits)

    def _apply(self, fn, recurse: bool = True):
        with self._lock:
            if fn(torch.empty(0)).itemsize < 4:
                self._weights.remember()
            super()._apply(fn, recurse)
            self._entries = {name: entry.moved(fn) for name, entry in self._entries.items()}
            self._base = self._base.moved(fn)
        return self

    # --- inside -------------------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        entry = self._base if name == BASE else self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            raise UserError(f"there is no task {name!r}: the bank has {', '.join(self._entries) or 'none'}")
        return entry

    def _rows(self, names: Sequence[str], count: int) -> list[Entry]:
        if isinstance(names, str) or len(names) != count:
            raise UserError(f"adapter_names must be one name for each of {count} images, got {names!r}")
        return [self._entry(name) for name in names]

    def _current(self) -> str | None:
        return None if id(self) in _DISABLED.get() else self._active

    def _encode_active(self, x: Tensor) -> Tensor:
        name = self._current()
        if not self.kept or name is None:
            return self._encode(x, [self._entry(BASE if name is None else name)] * len(x))
        with self._swap.reading():
            # Only now: the masked weights may have been another task's a moment ago.
            plan = Plan((self._entry(self._active or BASE).bits,), (0, len(x)), kept=True)
            return self._features(x, plan)

    def _encode(self, x: Tensor, rows: list[Entry]) -> Tensor:
        places: dict[Entry, list[int]] = {}
        for i, entry in enumerate(rows):
            places.setdefault(entry, []).append(i)
        order = [i for indices in places.values() for i in indices]
        ends = [0]
        for indices in places.values():
            ends.append(ends[-1] + len(indices))
        plan = Plan(tuple(entry.bits for entry in places) or ({},), tuple(ends) if places else (0, 0), self.invariant)
        if order == sorted(order):
            return self._features(x, plan)
        index = torch.tensor(order)
        if x.device.type == "cuda":  # a copy of pageable memory would wait for the device
            index = index.pin_memory().to(x.device, non_blocking=True)
        features = self._features(x[index], plan)
        return torch.empty_like(features).index_copy_(0, index, features)

    def _features(self, x: Tensor, plan: Plan) -> Tensor:
        if not len(x):
            return x.new_empty(0, getattr(self.model.visual, "output_dim", 0))
        with running(plan):
            return self.model.encode_image(x.to(self.logit_scale.dtype))

    def _probabilities(self, x: Tensor, rows: list[Entry]) -> list[Tensor]:
        for entry in rows:
            if not entry.classnames or entry.text is None:
                lacks = "class names" if not entry.classnames else "text features, nor the bank a tokenizer"
                raise UserError(f"task {entry.name!r} has no {lacks}: it cannot classify")
        features = F.normalize(self._encode(x, rows).float(), dim=-1)
        return [(self._scale * (entry.text @ f)).softmax(0) for entry, f in zip(rows, features)]

    def _text(self, entry: Entry) -> Tensor | None:
        if self.tokenizer is None or not entry.classnames or not entry.template:
            return None
        tokens = self.tokenizer(clip.prompts(entry.classnames, entry.template)).to(self.logit_scale.device)
        with torch.no_grad(), running(Plan((entry.bits,), (0, len(tokens)))):
            return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    def _need_free(self, name: str, replace: bool) -> None:
        if name in self._entries and not replace:
            raise UserError(f"the bank has a task {name!r} already: replace=True puts another in its place")


def _need_images(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"images must be a floating point tensor (B, 3, H, W), got {got}")


def load(
    name: str, pretrained: str | None = None, tasks: Mapping[str, str | Path] | Sequence[str | Path] = (), *,
    image_size: int | None = None, device: str = "auto", precision: Literal["fp32", "bf16"] = "fp32",
    invariant: bool = False, kept: bool = False, allow_base_mismatch: bool = False,
) -> TaskBank:  # fmt: skip
    """A bank over an open_clip model, loaded as `rmt train` loads it, with `tasks`: {name: path} or paths.

    precision: "bf16" rounds the model once the tasks are there.

    Raises: UserError for a model or task that cannot be loaded, or that is of another backbone.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision must be fp32 or bf16, got {precision!r}")
    loaded = clip.load(name, pretrained, image_size, clip.pick_device(device))
    bank = TaskBank(
        loaded.model, tokenizer=loaded.tokenizer, preprocess=loaded.preprocess, invariant=invariant, kept=kept
    )
    named = tasks.items() if isinstance(tasks, Mapping) else [(None, path) for path in tasks]
    for given, path in named:
        bank.load(path, given, allow_base_mismatch=allow_base_mismatch)
    return bank.bfloat16() if precision == "bf16" else bank
