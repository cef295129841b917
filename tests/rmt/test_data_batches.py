import functools
import gc
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torchvision import transforms

from rmt.config import UserError
from rmt.data import Cache, Item, TrainBatches, decode, eval_batches, prefetch, read_folder
from rmt.data.batches import FLIP, RATIO, SCALE, crop_box

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return read_folder(tiny.splits(tmp_path_factory.mktemp("images")))


def made(items, batch=4, seed=1, size=(32, 32), **more):
    return TrainBatches(items, size, MEAN, STD, batch, seed, **more)


def threads(name):
    return [t for t in threading.enumerate() if t.name.startswith(name)]


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_broken_image_is_named_before_training(tmp_path, content):
    items = read_folder(tiny.splits(tmp_path, 2, 2)).train
    path = tmp_path / "train" / "red ball" / "001.png"
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    with pytest.raises(UserError, match=r"train/red ball/001\.png cannot be read as an image: [^<]*$"):
        made(items)
    with pytest.raises(UserError, match=r"train/red ball/001\.png cannot be read as an image: [^<]*$"):
        list(eval_batches(items, transforms.ToTensor()))
    path.unlink()
    with pytest.raises(UserError, match=r"train/red ball/001\.png cannot be read: No such file"):
        made(items)
    with pytest.raises(UserError, match="at least one image, got none"):
        made([])


def test_batches_are_a_function_of_seed_and_step(split):
    batches = made(split.train)
    first = batches(11)
    torch.manual_seed(123)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate()
    fresh = made(split.train)
    for again in (batches(11), fresh(11), (fresh(0), fresh(11))[1]):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert not torch.equal(made(split.train, seed=2)(11)[0], first[0])
    assert first[0].shape == (4, 3, 32, 32) and first[0].dtype == torch.float32 and first[1].dtype == torch.int64
    assert first[0].is_contiguous()


def test_batches_do_not_depend_on_threads(split):
    one, four = made(split.train, threads=1), made(split.train, threads=4)
    want = [one(step) for step in range(12)]
    with ThreadPoolExecutor(4) as callers:
        for got in (callers.map(one, range(12)), callers.map(four, range(12)), callers.map(four, range(12))):
            for (image, label), (x, y) in zip(want, got, strict=True):
                assert torch.equal(image, x) and torch.equal(label, y)


def test_an_epoch_shows_every_image_once_and_drops_the_rest(split):
    batches = made(split.train[:28], batch=8)
    seen = []
    batches._pixels = lambda index, epoch: seen.append((epoch, index)) or np.zeros((2, 2, 3), np.uint8)
    assert batches.steps_per_epoch == 3
    for step in range(6):
        batches(step)
    epochs = [[index for e, index in seen if e == epoch] for epoch in (0, 1)]
    assert [len(set(epoch)) for epoch in epochs] == [24, 24] and epochs[0] != epochs[1]


def test_fewer_images_than_a_batch_make_one_whole_batch(split):
    batches = made(split.train[:8], batch=32)
    assert batches.steps_per_epoch == 1 and len(batches(0)[1]) == 8
    batches = made(split.train[:1])
    assert batches.steps_per_epoch == 1 and batches(3)[0].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("size", [(40, 36), (500, 375), (30, 100), (100, 30), (7, 5), (1, 1), (2, 300)])
def test_crops_are_torchvisions(size, monkeypatch):
    image, taken = Image.new("L", size), set()
    assert SCALE == (0.5, 1.0) and RATIO == (3 / 4, 4 / 3)
    for seed in range(300):
        rng = random.Random(seed)

        def uniform(self, low, high, rng=rng):
            return torch.tensor([rng.uniform(float(low), float(high))], dtype=torch.float64)

        def randint(low, high, size, rng=rng):
            return torch.tensor([rng.randrange(low, high)])

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", uniform)
            patch.setattr(torch, "randint", randint)
            want = transforms.RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
        own = random.Random(seed)
        assert crop_box(*size, own) == want, seed
        assert own.getstate() == rng.getstate(), "the same number of draws"
        taken.add(want)
    assert len(taken) > 200 or min(size) < 31, "the draws must matter"


def test_areas_and_ratios_of_crops_are_spread_as_torchvisions():
    size, n = (4000, 4000), 4000
    rng, image = random.Random(0), Image.new("L", size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = [transforms.RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(n)]
    ours = [crop_box(*size, rng) for _ in range(n)]
    for measure in (lambda i, j, h, w: h * w, lambda i, j, h, w: w / h, lambda i, j, h, w: i, lambda i, j, h, w: j):
        a, b = (np.sort([measure(*box) for box in boxes]) for boxes in (ours, theirs))
        both = np.concatenate([a, b])
        gap = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right")).max() / n
        # Kolmogorov and Smirnov: equal distributions stay below with probability 0.999.
        assert gap < 1.95 * (2 / n) ** 0.5


def test_pixels_are_torchvisions(split, monkeypatch):
    item, size = split.train[0], (24, 16)
    batches = made([item], batch=1, size=size)
    crop = transforms.RandomResizedCrop(size, SCALE, interpolation=transforms.InterpolationMode.BICUBIC)
    seen = set()
    for epoch in range(6):
        rng, image = random.Random(f"image 1 {epoch} 0"), decode(item.path, item.path)
        box = crop_box(*image.size, rng)
        flip = rng.random() < FLIP
        monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(lambda *_, box=box: box))
        mirror = transforms.RandomHorizontalFlip(p=float(flip))
        want = transforms.Compose([crop, mirror, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)
        assert torch.equal(batches(epoch)[0][0], want)
        seen.add(flip)
    assert seen == {True, False}


def test_half_of_the_images_are_mirrored(tmp_path):
    # A ramp: every crop of it shows which way it was mirrored.
    pixels = np.broadcast_to(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], (20, 40, 3))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    batches = made([Item(str(tmp_path / "a.png"), 0, "a")], batch=1, size=(8, 8))
    n, flipped = 1000, 0
    for epoch in range(n):
        image = batches._pixels(0, epoch).astype(int)
        flipped += int(image[:, 0].sum() > image[:, -1].sum())
    # Five standard deviations of a fair coin.
    assert abs(flipped - n / 2) < 5 * (n / 4) ** 0.5


def test_images_are_read_once(tmp_path):
    items = read_folder(tiny.splits(tmp_path)).train
    batches = made(items)
    for item in items:
        (tmp_path / item.path).unlink()
    assert batches(0)[0].isfinite().all()


def test_prefetch_gives_what_direct_calls_give(split):
    batches = made(split.train)
    for depth in (1, 2, 5):
        got = list(prefetch(batches, range(3, 10), depth))
        assert len(got) == 7
        for step, (image, label) in zip(range(3, 10), got):
            want = batches(step)
            assert torch.equal(image, want[0]) and torch.equal(label, want[1])
    assert list(prefetch(batches, [])) == [] and not threads("rmt-prefetch")


def test_prefetch_works_ahead_but_no_further_than_asked():
    called, third = [], threading.Event()

    def batches(step):
        called.append(step)
        if step == 2:
            third.set()
        return step

    stream = prefetch(batches, itertools.count(), depth=2)
    assert not threads("rmt-prefetch") and next(stream) == 0
    assert third.wait(10), "made while the caller holds batch 0"
    stream.close()
    assert called == [0, 1, 2] and not threads("rmt-prefetch")


def test_prefetch_raises_in_its_batchs_place_and_ends():
    def batches(step):
        if step == 2:
            raise UserError("images/x.jpg cannot be read")
        return step

    stream, got = prefetch(batches, range(9)), []
    with pytest.raises(UserError, match=r"x\.jpg"):
        for batch in stream:
            got.append(batch)
    assert got == [0, 1] and not threads("rmt-prefetch")


def test_prefetch_leaves_no_thread_when_it_is_dropped():
    for _, batch in zip(range(2), prefetch(lambda step: step, itertools.count())):
        assert batch in (0, 1)
    gc.collect()
    assert not threads("rmt-prefetch")


def test_the_threads_of_batches_go_with_them(split):
    gc.collect()
    others = set(threads("rmt-train"))
    batches = made(split.train, threads=3)
    batches(0)
    mine = set(threads("rmt-train")) - others
    assert 1 <= len(mine) <= 3
    del batches
    gc.collect()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


def test_eval_batches_keep_order_and_the_short_last_batch(split):
    items = split.test[:12]
    got = list(eval_batches(items, transforms.ToTensor(), batch=5))
    assert [len(label) for _, label in got] == [5, 5, 2]
    assert torch.cat([label for _, label in got]).tolist() == [item.label for item in items]
    want = torch.stack([transforms.ToTensor()(decode(item.path, item.path)) for item in items])
    assert torch.equal(torch.cat([image for image, _ in got]), want)
    assert list(eval_batches([], transforms.ToTensor())) == [] and not threads("rmt-eval")


def test_eval_batches_leave_no_thread_when_closed(split):
    stream = eval_batches(split.test, transforms.ToTensor(), batch=2)
    next(stream)
    assert threads("rmt-eval")
    stream.close()
    assert not threads("rmt-eval")


def test_a_cache_reads_every_file_once(tmp_path):
    items, cache = read_folder(tiny.splits(tmp_path, 1, 2)).test, Cache()
    batches = functools.partial(eval_batches, items, transforms.ToTensor(), batch=3)
    want = torch.cat([image for image, _ in batches(cache=cache)])
    assert cache.size == sum((tmp_path / item.path).stat().st_size for item in items)
    for item in items:
        (tmp_path / item.path).unlink()
    assert torch.equal(torch.cat([image for image, _ in batches(cache=cache)]), want)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(batches())


def test_a_cache_keeps_to_its_limit(tmp_path):
    for name, size in (("a", 600), ("b", 600), ("c", 300)):
        (tmp_path / name).write_bytes(name.encode() * size)
    cache = Cache(limit=1000)
    assert [len(cache.read(str(tmp_path / name))) for name in "abca"] == [600, 600, 300, 600]
    assert cache.size == 900
    (tmp_path / "a").unlink()
    assert cache.read(str(tmp_path / "a")) == b"a" * 600
    (tmp_path / "b").write_bytes(b"new")
    assert cache.read(str(tmp_path / "b")) == b"new"


def test_without_flip_the_same_crops_are_not_mirrored(tmp_path):
    items = read_folder(tiny.splits(tmp_path / "data")).train
    both = [
        TrainBatches(items, (20, 20), [0.5] * 3, [0.5] * 3, len(items), 1, flip=flip)(3)[0] for flip in (True, False)
    ]
    mirrored = [not torch.equal(a, b) for a, b in zip(*both)]
    assert 0 < sum(mirrored) < len(items)
    assert all(torch.equal(a.flip(-1), b) for a, b, other in zip(*both, mirrored) if other)
