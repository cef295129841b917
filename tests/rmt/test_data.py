import hashlib
import json
import random

import pytest
import tiny
import torch
from torchvision import transforms

from rmt.config import UserError
from rmt.data import Item, TrainBatches, decode, eval_batches, few_shot, read_folder

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
# Data set -> split file and folder of its paths in the oracle.
OFFICIAL = {
    "oxford_pets": ("split_zhou_OxfordPets.json", "oxford_pets/images/"),
    "dtd": ("split_zhou_DescribableTextures.json", "dtd/images/"),
    "eurosat": ("split_zhou_EuroSAT.json", "eurosat/2750/"),
}


def made(split, batch=4, seed=1, size=(32, 32)):
    return TrainBatches(split.train, size, MEAN, STD, batch, seed)


@pytest.mark.skipif(not tiny.SHARED.exists(), reason=f"needs the real splits of {tiny.SHARED}")
@pytest.mark.parametrize("name", OFFICIAL)
def test_few_shot_equals_coops_published_samples(name):
    oracle = json.loads((tiny.SHARED / "splits" / "fewshot_oracle.json").read_text())[name]
    file, prefix = OFFICIAL[name]
    split = json.loads((tiny.SHARED / "splits" / file).read_text())
    train, val = ([Item(prefix + path, label, cls) for path, label, cls in split[part]] for part in ("train", "val"))
    for shots, seeds in oracle.items():
        for seed, want in seeds.items():
            # What others draw from the global generator must not matter.
            random.seed(99)
            for part, got in zip(("train", "val"), few_shot(train, val, int(shots), int(seed))):
                digest = hashlib.sha256("\n".join(item.path for item in got).encode()).hexdigest()
                assert (len(got), digest) == (want[part]["n"], want[part]["sha256"]), (shots, seed, part)


def test_few_shot_takes_all_of_a_small_class_and_says_so():
    items = [Item(f"{label}/{i}", label, f"class {label}") for label, n in enumerate((2, 5)) for i in range(n)]
    with pytest.warns(UserWarning, match="'class 0' has 2 images, fewer than 4"):
        train, _ = few_shot(items, [], 4, 1)
    assert [item.label for item in train] == [0, 0, 1, 1, 1, 1]
    assert [item.path for item in train[:2]] == ["0/0", "0/1"]
    # The small class drew nothing from the stream.
    assert [item.path for item in train[2:]] == random.Random(1).sample([f"1/{i}" for i in range(5)], 4)


def test_read_folder_with_splits(tmp_path):
    split = read_folder(tiny.splits(tmp_path, train=3, test=2))
    assert split.classnames == ("blue sky", "green_leaf", "grey stone", "red ball")
    assert (len(split.train), len(split.val), len(split.test)) == (12, 0, 8)
    assert split.train[3] == Item(str(tmp_path / "train" / "green_leaf" / "000.png"), 1, "green_leaf")


def test_read_folder_without_split_makes_its_own_always_the_same(tmp_path):
    split = read_folder(tiny.images(tmp_path / "all", 10))
    assert [len(part) for part in (split.train, split.val, split.test)] == [4 * 5, 4 * 2, 4 * 3]
    paths = [item.path for part in (split.train, split.val, split.test) for item in part]
    assert len(set(paths)) == 40
    random.seed(5)
    assert read_folder(tmp_path / "all") == split
    assert [item.path[-7:] for item in split.test[:3]] == ["004.png", "006.png", "007.png"]


@pytest.mark.parametrize("missing", ["train", "test"])
def test_read_folder_names_a_missing_part(tmp_path, missing):
    kept = {"train", "test"} - {missing}
    tiny.images(tmp_path / kept.pop(), 2)
    with pytest.raises(UserError, match=f"{missing}, which is missing"):
        read_folder(tmp_path)


def test_read_folder_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(UserError, match="which is missing"):
        read_folder(tmp_path / "no")
    with pytest.raises(UserError, match="a folder for each class, got none"):
        read_folder(tmp_path)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"cat must hold images .* got none"):
        read_folder(tmp_path)


def test_read_folder_refuses_too_few_images_to_split(tmp_path):
    with pytest.raises(UserError, match=r"'blue sky' needs at least 4 images .* got 3"):
        read_folder(tiny.images(tmp_path, 3))


def test_read_folder_refuses_parts_with_other_classes(tmp_path):
    (tiny.splits(tmp_path, 2, 2) / "test" / "grey stone").rename(tmp_path / "test" / "gray stone")
    with pytest.raises(UserError, match="'gray stone', 'grey stone'"):
        read_folder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_broken_image_is_named_before_training(tmp_path, content):
    split = read_folder(tiny.splits(tmp_path, 2, 2))
    path = tmp_path / "train" / "red ball" / "001.png"
    path.write_bytes(path.read_bytes()[:900] if content is None else content)
    with pytest.raises(UserError, match=r"train/red ball/001\.png cannot be read as an image"):
        made(split)


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    split = read_folder(tiny.splits(tmp_path))
    batches = made(split)
    first = batches(11)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = made(split)(11)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(made(split, seed=2)(11)[0], first[0])
    assert first[0].shape == (4, 3, 32, 32) and first[0].dtype == torch.float32 and first[1].dtype == torch.int64


def test_an_epoch_shows_every_image_once_and_drops_the_rest(tmp_path):
    split = read_folder(tiny.splits(tmp_path, train=7))  # 28 images
    batches = made(split, batch=8)
    seen = []
    batches._image = lambda index, epoch: seen.append((epoch, index)) or torch.zeros(3, 2, 2)
    assert batches.steps_per_epoch == 3
    for step in range(6):
        batches(step)
    epochs = [[index for e, index in seen if e == epoch] for epoch in (0, 1)]
    assert [len(set(epoch)) for epoch in epochs] == [24, 24] and epochs[0] != epochs[1]


def test_fewer_images_than_a_batch_make_one_whole_batch(tmp_path):
    batches = made(read_folder(tiny.splits(tmp_path, train=2)), batch=32)
    assert batches.steps_per_epoch == 1 and len(batches(0)[1]) == 8


def test_augmentation_is_torchvisions(tmp_path):
    split = read_folder(tiny.splits(tmp_path, train=1))
    batches = made(split, batch=1, size=(24, 16))
    image = batches._image(0, 5)
    bicubic = transforms.InterpolationMode.BICUBIC
    torch.manual_seed(random.Random("image 1 5 0").getrandbits(63))
    want = transforms.RandomResizedCrop((24, 16), (0.5, 1.0), interpolation=bicubic)(decode(split.train[0].path, ""))
    want = transforms.ToTensor()(transforms.RandomHorizontalFlip()(want))
    torch.testing.assert_close(image, transforms.Normalize(MEAN, STD)(want))


def test_images_are_read_once(tmp_path):
    split = read_folder(tiny.splits(tmp_path))
    batches = made(split)
    for item in split.train:
        (tmp_path / item.path).unlink()
    assert batches(0)[0].isfinite().all()


def test_eval_batches_keep_order_and_the_short_last_batch(tmp_path):
    split = read_folder(tiny.splits(tmp_path, test=3))
    got = list(eval_batches(split.test, transforms.ToTensor(), batch=5))
    assert [len(label) for _, label in got] == [5, 5, 2]
    assert torch.cat([label for _, label in got]).tolist() == [item.label for item in split.test]
