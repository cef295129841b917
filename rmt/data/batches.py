"""Batches of images: augmented ones for training, plain ones for measuring, made ahead of the model by threads.

Everything random is a function of (seed, step) and of the image: batch 7 can be made without batch 6, in any thread.
Threads are enough: Pillow lets go of the interpreter's lock while it decodes and resizes.
"""

import hashlib
import math
import os
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from .images import Cache, decode, read_bytes
from .items import Item

THREADS = min(8, os.cpu_count() or 1)
# The official code's crop: shares of the image's area, width by height, and the chance of a mirrored image.
SCALE, RATIO, FLIP = (0.5, 1.0), (3 / 4, 4 / 3), 0.5


def crop_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop of an image, in pixels.

    The algorithm of torchvision's RandomResizedCrop.get_params, with draws of `rng` in place of torch's generator,
    which all threads share: ten tries of an area in SCALE and a log-uniform ratio in RATIO, then the largest crop at
    the centre whose ratio is in RATIO.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*SCALE)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


class TrainBatches:
    """The few-shot images, their encoded bytes in memory, as endless augmented batches.

    An epoch is a fresh permutation cut into batches; its incomplete last batch is dropped, as in the official code,
    unless it is the only one. Augmentation, also the official one: RandomResizedCrop with scale (0.5, 1), bicubic, and
    a horizontal flip, then the model's own mean and std. Calls may come from several threads.

    Args:
        size: (height, width) in pixels. mean, std: of the model's images. threads: that decode a batch.
        flip: mirror half of the images.
        share: of the images of a batch, by their number: which of them a call gives; None: all. Each is the same, pixel
            for pixel, whatever the share.

    Raises: UserError for an unreadable image, named: all are decoded once here, before any time is spent on training.
    """

    def __init__(
        self, items: Sequence[Item], size: tuple[int, int], mean: Sequence[float], std: Sequence[float],
        batch: int, seed: int, threads: int = THREADS, flip: bool = True, share: Callable[[int], slice] | None = None,
    ) -> None:  # fmt: skip
        if not items:
            raise UserError("training needs at least one image, got none")
        self.items, self.size, self.batch, self.seed = list(items), tuple(size), min(batch, len(items)), seed
        self.mean, self.std = (torch.tensor(t, dtype=torch.float32)[:, None, None] for t in (mean, std))
        self._cache, self._epoch, self._flip = Cache(), (-1, []), FLIP if flip else 0.0
        self._share = share
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="rmt-train")
        # sha256 of the files' bytes and labels, in order.
        self.sha256 = hashlib.sha256(b"".join(self._pool.map(self._check, self.items))).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.items) // self.batch

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Batch number `step`, counted from 0 over all epochs: image (B, 3, H, W) fp32, label (B,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[place * self.batch : (place + 1) * self.batch]
        chosen = chosen[self._share(len(chosen))] if self._share else chosen
        return self._batch(chosen, epoch)

    def _batch(self, chosen: Sequence[int], epoch: int) -> tuple[Tensor, Tensor]:
        pixels = np.stack(list(self._pool.map(lambda index: self._pixels(index, epoch), chosen)))
        image = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return image.sub_(self.mean).div_(self.std), torch.tensor([self.items[i].label for i in chosen])

    def whole_epoch(self, epoch: int, batch: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
        """All images as epoch `epoch` crops them, in their own order, none dropped: batches as of a call."""
        for start in range(0, len(self.items), batch):
            yield self._batch(range(start, min(start + batch, len(self.items))), epoch)

    def _check(self, item: Item) -> bytes:
        data = self._cache.read(item.path)
        decode(data, item.path)
        return hashlib.sha256(data + str(item.label).encode()).digest()

    def _order(self, epoch: int) -> list[int]:
        """Kept for the calls of one epoch: shuffling a million images takes longer than a step."""
        known, order = self._epoch
        if known != epoch:
            order = list(range(len(self.items)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self._epoch = epoch, order
        return order

    def _pixels(self, index: int, epoch: int) -> np.ndarray:
        """(H, W, 3) uint8. No tensor is made here: torch would start threads of its own in every thread of the pool."""
        # Not at the top: torchvision takes longer to import than torch and rmt together.
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        path, rng = self.items[index].path, random.Random(f"image {self.seed} {epoch} {index}")
        image = decode(self._cache.read(path), path)
        image = F.resized_crop(image, *crop_box(*image.size, rng), self.size, InterpolationMode.BICUBIC)
        return np.asarray(F.hflip(image) if rng.random() < self._flip else image)


def prefetch(
    batches: Callable[[int], tuple[Tensor, Tensor]], steps: Iterable[int], depth: int = 2
) -> Iterator[tuple[Tensor, Tensor]]:
    """`batches(step)` for every step, in order; a thread makes up to `depth` of them while the caller works.

    What `batches` raises is raised here, in its batch's place. Closing the generator ends the thread, after the batch
    that is being made.
    """
    steps, ahead = iter(steps), deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="rmt-prefetch")
    try:
        ahead.extend(pool.submit(batches, step) for step in islice(steps, depth))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(batches, step) for step in islice(steps, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def eval_batches(
    items: Sequence[Item], preprocess: Callable, batch: int = 100, cache: Cache | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(image (B, 3, H, W), label (B,)) in order, through the model's own eval preprocessing; one batch is made ahead.

    Args:
        cache: where the files' bytes are kept for the next time.

    Raises: UserError for an unreadable image, named.
    """
    read = cache.read if cache else read_bytes
    parts = deque(items[start : start + batch] for start in range(0, len(items), batch))
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="rmt-eval")

    def start() -> list:
        part = parts.popleft() if parts else []
        return [(pool.submit(lambda i: preprocess(decode(read(i.path), i.path)), item), item.label) for item in part]

    try:
        ready = start()
        while ready:
            following = start()
            yield torch.stack([image.result() for image, _ in ready]), torch.tensor([label for _, label in ready])
            ready = following
    finally:
        pool.shutdown(cancel_futures=True)
