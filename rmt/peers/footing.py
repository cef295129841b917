"""Equal footing: the sample, the images, the backbone and the frozen features that all methods share."""

import contextlib
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import clip
from ..config import RunConfig, UserError
from ..data import Cache, Split, TrainBatches, eval_batches
from ..files import write_whole
from ..progress import progress
from .memory import PeakMemory
from .method import State, cosine_logits

# Preprocessed images that are kept; beyond, they are decoded anew for every encoder.
IMAGES_LIMIT = 1 << 30
PARTS = ("train", "val", "test")


@dataclass
class Tally:
    """Of one run. made: seconds that went into shared values now. used: keys of all it used, and of what those were
    made of. reused: names of those that were there already."""

    made: float = 0.0
    used: set[tuple] = field(default_factory=set)
    reused: list[str] = field(default_factory=list)


class Shelf:
    """Values that runs share, by key, and the seconds that each took to make."""

    def __init__(self) -> None:
        self._kept: dict[tuple, Any] = {}
        # Of each key: its label, seconds without those of what it was made of, and the keys of all that.
        self._costs: dict[tuple, tuple[str, float, frozenset[tuple]]] = {}
        self._tallies: list[Tally] = []
        self._watch: PeakMemory | None = None

    def get(self, key: tuple, label: str, make: Callable[[], Any]) -> Any:
        """The value of `key`, made where it is missing. label: what a run says that it reused."""
        known = key in self._kept
        if not known:
            start = time.perf_counter()
            watch, self._watch = self._watch, None
            with self.tally() as inner, watch.paused() if watch else contextlib.nullcontext():
                value = make()
            self._watch = watch
            seconds = time.perf_counter() - start
            self.put(key, label, value, seconds - inner.made, inner.used)
            for tally in self._tallies[-1:]:
                tally.made += seconds
        for tally in self._tallies[-1:]:
            if known and key not in tally.used:
                tally.reused.append(label)
            tally.used |= {key, *self._costs[key][2]}
        return self._kept[key]

    def put(self, key: tuple, label: str, value: Any, seconds: float, made_of: Iterable[tuple] = ()) -> None:
        """Keeps a value that took `seconds` to make, beside what `made_of` took."""
        self._kept[key], self._costs[key] = value, (label, seconds, frozenset(made_of))

    def costs(self, tally: Tally) -> dict[str, float]:
        """Seconds that each thing took that a run used, by its label, whenever it was made."""
        return {label: seconds for label, seconds, _ in map(self._costs.__getitem__, tally.used)}

    @contextlib.contextmanager
    def tally(self) -> Iterator[Tally]:
        """Inside, what is asked for is counted."""
        self._tallies.append(Tally())
        try:
            yield self._tallies[-1]
        finally:
            self._tallies.pop()

    @contextlib.contextmanager
    def watched(self, peak: PeakMemory) -> Iterator[None]:
        """Inside, what making shared values takes is not counted by `peak`."""
        before, self._watch = self._watch, peak
        try:
            yield
        finally:
            self._watch = before

    def drop(self, unwanted: Callable[[tuple], bool]) -> None:
        """Forgets the values whose key is `unwanted`; what they cost is remembered."""
        self._kept = {key: value for key, value in self._kept.items() if not unwanted(key)}


@dataclass
class Footing:
    """What the methods of one sample stand on.

    Args:
        config: as asked for: seed, batch, precision and augmentation of all methods are its own, the rest the masks'.
        loaded: the plain model, frozen. split: the sample. text: of its class names, zero-shot.
        shelf: features and images; those of the test images outlive the sample.
        views: augmented passes over the training images whose frozen features are kept for methods that train on
            features: their epoch e sees view e % views.
        max_steps: most gradient steps of a method that trains through the image tower; None: as many as its authors.
        max_feature_steps: the same for methods that train on frozen features, whose steps are far cheaper.
        rates: method -> learning rate, in place of its authors'.
        folder: of this run, for files that a method writes itself.
        fitted: name of a method -> what it stored on this sample, fitted now if it is not yet: for a method that starts
            from another (WiSE-FT from fine-tuning).
    """

    config: RunConfig
    loaded: clip.Clip
    split: Split
    text: clip.Text
    template: str
    shelf: Shelf
    cache: Cache
    views: int = 10
    max_steps: int | None = None
    max_feature_steps: int | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    fitted: Callable[[str], dict[str, Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        """Of the model and of all features."""
        return self.text.zero_shot.device

    @property
    def classes(self) -> int:
        """C."""
        return len(self.split.classnames)

    def start(self) -> State:
        """The zero-shot classifier."""
        text = self.text.zero_shot
        return State(self.loaded.model, (), text, cosine_logits(self.loaded.model, text))

    def copy(self, state: State) -> nn.Module:
        """The state's model, to be changed: a copy, in eval mode, with nothing that requires a gradient."""
        return copy.deepcopy(state.model).requires_grad_(False)

    def steps(self, published: int) -> int:
        """How many gradient steps to take through the image tower where the authors take `published`."""
        return published if self.max_steps is None else min(published, self.max_steps)

    def feature_steps(self, published: int) -> int:
        """The same of a method that trains on frozen features."""
        return published if self.max_feature_steps is None else min(published, self.max_feature_steps)

    def rate(self, method: str, published: float) -> float:
        """The learning rate of a method."""
        return self.rates.get(method, published)

    def labels(self, part: str) -> Tensor:
        """(n,) int64, in the order of `features`."""
        return torch.tensor([item.label for item in getattr(self.split, part)], device=self.device)

    def need_val(self, method: str) -> None:
        """Raises UserError where there is no validation image to choose on."""
        if not self.split.val:
            raise UserError(
                f"{method} chooses on validation images, and there are none: put some into a val folder of the data, "
                "or leave the method out"
            )

    def batches(self) -> TrainBatches:
        """The augmented training batches, one sequence for all methods: `batches()(step)`."""
        form, train = clip.image_format(self.loaded.model), self.config.train
        return self.shelf.get(
            ("batches",), "training images",
            lambda: TrainBatches(self.split.train, *form, train.batch, self.config.seed, flip=train.flip),
        )  # fmt: skip

    def features(self, state: State, part: str, view: int | None = None) -> Tensor:
        """(n, D) fp32 features of the state's image tower, not normalised, without a graph, in the part's order.

        part: train, val or test. view: of train, one augmented pass over it, numbered from 0; None: as for evaluation.
        """
        if view is None:
            key, label = (state.stack, part), f"{part} features"
        else:
            view %= self.views
            key, label = (state.stack, part, view), f"augmented features, view {view}"
        name = "+".join(state.stack)
        label += f" of {name}" if name else ""
        return self.shelf.get(key, label, lambda: self._encoded(state.model, part, view, label))

    def _encoded(self, model: nn.Module, part: str, view: int | None, label: str) -> Tensor:
        done, items = [], getattr(self.split, part)
        images = self.images(part) if view is None else (x for x, _ in self.batches().whole_epoch(view))
        with progress(label, len(items)) as advance:
            for image in images:
                done.append(encode(model, image.to(self.device)))
                advance(sum(map(len, done)))
        return torch.cat(done)

    def images(self, part: str) -> Iterable[Tensor]:
        """(B, 3, H, W) batches of a part, preprocessed as for evaluation; decoded once, where they may be kept."""
        items = getattr(self.split, part)
        batches = (image for image, _ in eval_batches(items, self.loaded.preprocess, cache=self.cache))
        (height, width), *_ = clip.image_format(self.loaded.model)
        if 4 * 3 * height * width * len(items) > IMAGES_LIMIT:
            return batches
        return self.shelf.get((part, "images"), f"decoded {part} images", lambda: list(batches))

    @contextlib.contextmanager
    def training(self, label: str, steps: int) -> Iterator[Callable[[int, float], None]]:
        """Yields `done(step, loss)`, to be called after every step: progress, and rows in the run's metrics.jsonl.

        `done` raises UserError for a loss that is not finite.
        """
        rows, every = [], self.config.train.log_every
        with progress(label, steps) as advance:

            def done(step: int, loss: float) -> None:
                if not loss == loss or abs(loss) == float("inf"):
                    raise UserError(f"{label}: the loss must be finite, got {loss}: is the learning rate too large?")
                last = step + 1 == steps
                if (step + 1) % every == 0 or last:
                    rows.append({"step": step + 1, "loss": loss})
                advance(step + 1, f"loss {loss:.3g}" if last else None)

            yield done
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


@torch.no_grad()
def encode(model: nn.Module, image: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, D) fp32 features, not normalised."""
    return model.encode_image(image).float()


@torch.no_grad()
def class_vectors(footing: Footing, model: nn.Module) -> Tensor:
    """(C, D) class vectors of length 1 of the template's texts, by `model`'s own text tower."""
    return F.normalize(model.encode_text(footing.text.tokens).float(), dim=-1)
