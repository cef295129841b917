"""Batches of images with text, for tuning on captions and on questions. Functions of (seed, step), as `batches` says.

Images go through the model's own eval preprocessing, without augmentation, as in the official routing code. Unlike the
few-shot batches these do not decode every image at the start: MSCOCO has 123,287.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ..config import UserError
from .batches import THREADS
from .captions import Captioned
from .images import Cache, decode
from .vqa import Question, soft_target

Encode = Callable[[list[str]], Tensor]


class _Batches:
    """An epoch is a fresh permutation cut into batches; an incomplete last one is dropped, unless it is the only."""

    def __init__(
        self, count: int, preprocess: Callable, encode: Encode, pad: int, batch: int, seed: int, threads: int
    ) -> None:
        if not count:
            raise UserError("batches need at least one image with text, got none")
        if batch < 1:
            raise UserError(f"batch must be at least 1, got {batch}")
        self.count, self.batch, self.seed = count, min(batch, count), seed
        self._preprocess, self._encode, self._pad = preprocess, encode, pad
        self._cache, self._epoch = Cache(), (-1, [])
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rmt-text")

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """Batch number `step`, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._made(self._order(epoch)[place * self.batch : (place + 1) * self.batch])

    def _order(self, epoch: int) -> list[int]:
        """Kept for the calls of one epoch, as that of `TrainBatches`."""
        known, order = self._epoch
        if known != epoch:
            order = list(range(self.count))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._epoch = epoch, order
        return order

    def in_order(self) -> Iterator[tuple[Tensor, ...]]:
        """All of it once, in its own order, none dropped: for measuring."""
        for start in range(0, self.count, self.batch):
            yield self._made(range(start, min(start + self.batch, self.count)))

    def _made(self, chosen: Sequence[int]) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def images(self, paths: Sequence[str]) -> Tensor:
        """(B, 3, H, W), each file decoded once. Raises UserError that names an unreadable image."""
        once = {path: place for place, path in enumerate(dict.fromkeys(paths))}
        return torch.stack(list(self._pool.map(self._image, once)))[[once[path] for path in paths]]

    def _image(self, path: str) -> Tensor:
        return self._preprocess(decode(self._cache.read(path), path))

    def _text(self, texts: list[str]) -> Tensor:
        """(B, T) int64, without the columns that are padding in every row: what is behind them they do not change."""
        ids = self._encode(texts)
        return ids[:, : int((ids != self._pad).any(0).nonzero().max()) + 1]


class CaptionBatches(_Batches):
    """Every caption with its image: image (B, 3, H, W), text (B, T) int64, T that of the longest caption.

    Args:
        preprocess: an image -> (3, H, W). encode: texts -> (B, context) int64, padded. pad: the id of padding.
        threads: that decode a batch.
    """

    def __init__(
        self, items: Sequence[Captioned], preprocess: Callable, encode: Encode, *, pad: int = 0, batch: int = 40,
        seed: int = 1, threads: int = THREADS,
    ) -> None:  # fmt: skip
        self.pairs = [(item.path, caption) for item in items for caption in item.captions]
        super().__init__(len(self.pairs), preprocess, encode, pad, batch, seed, threads)

    def _made(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
        paths, captions = zip(*(self.pairs[index] for index in chosen))
        return self.images(paths), self._text(list(captions))


class QuestionBatches(_Batches):
    """Questions: image (B, 3, H, W), text (B, T) int64, target (B, C) fp32. Arguments as for captions.

    classes: answer -> class, as `vocabulary` makes it.
    """

    def __init__(
        self, questions: Sequence[Question], classes: Mapping[str, int], preprocess: Callable, encode: Encode, *,
        pad: int = 0, batch: int = 512, seed: int = 1, threads: int = THREADS,
    ) -> None:  # fmt: skip
        self.questions, self.classes = list(questions), classes
        super().__init__(len(self.questions), preprocess, encode, pad, batch, seed, threads)

    def _made(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        asked = [self.questions[index] for index in chosen]
        target = torch.stack([soft_target(question.answers, self.classes) for question in asked])
        return self.images([q.path for q in asked]), self._text([q.text for q in asked]), target
