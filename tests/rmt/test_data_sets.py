import dataclasses
import functools
import hashlib
import json
import random
import shutil

import open_clip
import pytest
import tiny

from rmt.config import RunConfig, UserError
from rmt.data import DATASETS, check, few_shot, folders, imagenet, indices_sha256, listing, read, read_dataset, subset

COOP = tiny.SHARED / "coop"
ELEVEN = [
    "imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft", "sun397",
    "dtd", "eurosat", "ucf101",
]  # fmt: skip
VARIANTS = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
# Test images of the base and new classes, as counted in CoOp's split files.
HALVES = {
    "caltech101": (1549, 916), "oxford_pets": (1881, 1788), "stanford_cars": (4002, 4039), "dtd": (864, 828),
    "oxford_flowers": (1053, 1410), "eurosat": (4200, 3900), "ucf101": (1934, 1849),
}  # fmt: skip
needs_shared = pytest.mark.skipif(not tiny.SHARED.exists(), reason=f"needs the real splits of {tiny.SHARED}")
needs_caltech = pytest.mark.skipif(not COOP.exists(), reason=f"needs Caltech101 under {COOP}")


def split_file(key):
    """CoOp's own split file, wherever it lies here; skips where it does not."""
    for name in DATASETS[key].files:
        for folder in (tiny.SHARED / "splits", COOP / DATASETS[key].folder):
            if (folder / name).is_file():
                return folder / name
    pytest.skip(f"{', '.join(DATASETS[key].files)} of {key} is not under {tiny.SHARED}")


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Puts the official split of a data set in a root without images: returns the root."""

    def make(key):
        place = tmp_path / DATASETS[key].folder
        (place / DATASETS[key].images[0]).mkdir(parents=True)
        shutil.copy(split_file(key), place)
        monkeypatch.setattr(folders, "missing", lambda paths: [])
        return tmp_path

    return make


def config(root, key):
    return RunConfig("local-dir:x", root=str(root), dataset=key)


@functools.cache
def oracle():
    return json.loads((tiny.SHARED / "splits" / "fewshot_oracle.json").read_text())


@needs_shared
@pytest.mark.parametrize("key", [key for key in ELEVEN if key != "imagenet"])
def test_few_shot_equals_coops_published_samples(official, key):
    root = official(key)
    split = read_dataset(root, key)
    for shots, seeds in oracle()[key].items():
        for seed, want in seeds.items():
            # What others draw from the global generator must not matter.
            random.seed(99)
            for part, got in zip(("train", "val"), few_shot(split.train, split.val, int(shots), int(seed))):
                digest = indices_sha256(got, config(root, key))
                assert (len(got), digest) == (want[part]["n"], want[part]["sha256"]), (shots, seed, part)


@needs_caltech
@pytest.mark.parametrize("folder", ["caltech-101", "Caltech101"])
def test_caltech_on_disk(folder, tmp_path):
    (tmp_path / folder).symlink_to(COOP / "caltech-101")
    here = config(tmp_path, "caltech101")
    split = read(here)
    assert (len(split.train), len(split.val), len(split.test), len(split.classnames)) == (4128, 1649, 2465, 100)
    assert (split.template, split.dataset) == ("a photo of a {}.", "caltech101")
    assert split.classnames[:3] == ("face", "leopard", "motorbike")
    train, _ = few_shot(split.train, split.val, 1, 1)
    want = oracle()["caltech101"]["1"]["1"]["train"]
    assert indices_sha256(train, here) == want["sha256"], "CoOp's own, whatever the folder is called"
    assert all(item.path.startswith(str(tmp_path / folder)) for item in train)
    base = subset(dataclasses.replace(split, train=train), "base")
    assert [i.path for i in base.train] == [i.path for i in train if i.label < 50] and len(base.train) == 50
    report = check(tmp_path, "caltech101")
    assert report.problems == [] and ("Caltech101, where CoOp has" in report.notes[0]) == (folder == "Caltech101")


@needs_shared
@pytest.mark.parametrize("key", HALVES)
def test_official_splits_have_the_tables_numbers(official, key):
    root = official(key)
    report = check(root, key)
    assert report.problems == [] and report.notes == ["{} train, {} val, {} test".format(*DATASETS[key].counts)]
    split = read_dataset(root, key)
    assert tuple(len(subset(split, half).test) for half in ("base", "new")) == HALVES[key]
    assert len(subset(split, "base").classnames) == -(-DATASETS[key].classes // 2)


@needs_shared
def test_a_changed_split_file_is_found(official):
    root = official("dtd")
    path = root / "dtd" / DATASETS["dtd"].files[0]
    split = json.loads(path.read_text())
    path.write_text(json.dumps(split | {"test": split["test"][1:]}))
    assert check(root, "dtd").problems == [
        f"{root / 'dtd'} has (2820, 1128, 1691) images to train, val and test, expected (2820, 1128, 1692)"
    ]
    path.write_text(json.dumps(split | {"train": [*split["train"][1:], split["test"][0]]}))
    assert "1 test images are in another part too" in check(root, "dtd").problems[0]
    path.write_text(json.dumps(split | {"train": split["train"][::-1]}))
    assert "is not CoOp's own: sha256" in check(root, "dtd").problems[0]
    path.write_text(json.dumps({part: [row for row in split[part] if row[1] < 46] for part in split}))
    assert f"{root / 'dtd'} has 46 classes, expected 47" in check(root, "dtd").problems


def test_the_table_is_whole():
    assert list(DATASETS) == ELEVEN + VARIANTS
    rows = listing()
    assert [row["dataset"] for row in rows] == list(DATASETS) and len({tuple(row) for row in rows}) == 1
    assert all(row["template"].count("{}") == 1 and row["classes"] > 1 for row in rows)
    assert rows[8] == {
        "dataset": "dtd", "folder": "dtd or DTD", "images": "images", "files": "split_zhou_DescribableTextures.json",
        "classes": 47, "train": 2820, "val": 1128, "test": 1692, "template": "{} texture.",
    }  # fmt: skip
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("key", DATASETS)
def test_what_is_missing_is_said_with_its_place(tmp_path, key):
    dataset = DATASETS[key]
    report = check(tmp_path, key)
    assert len(report.problems) == 1 and f"there is no folder {tmp_path / dataset.folder}" in report.problems[0]
    assert all(name in report.problems[0] for name in (*dataset.aliases, *dataset.files, dataset.images[0]))
    (tmp_path / dataset.folder).mkdir()
    problems = check(tmp_path, key).problems
    wanted = [tmp_path / dataset.folder / name for name in dataset.files]
    if dataset.images != (".",):
        wanted.append(tmp_path / dataset.folder / dataset.images[0])
    assert len(problems) == len(wanted) and all(str(path) in line for path, line in zip(wanted, problems))
    with pytest.raises(UserError, match=f"^{key}: there is no f"):
        read_dataset(tmp_path, key)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / dataset.folder], "nothing is made"


def test_an_unknown_data_set_or_root_is_refused(tmp_path):
    for call in (read_dataset, check):
        with pytest.raises(UserError, match=r"dataset must be one of imagenet, caltech101, .*, got 'cats'"):
            call(tmp_path, "cats")
        with pytest.raises(UserError, match=r"root must be a folder of data sets, got .*nowhere', which is missing"):
            call(tmp_path / "nowhere", "dtd")


def test_a_split_that_names_missing_images_is_a_problem(tmp_path):
    place = tmp_path / "eurosat"
    (place / "2750").mkdir(parents=True)
    rows = [["Forest/Forest_1.jpg", 0, "Forest"], ["Forest/Forest_2.jpg", 0, "Forest"]]
    (place / "split_zhou_EuroSAT.json").write_text(json.dumps({"train": rows, "val": [], "test": []}))
    problem = f"names 2 files that are not in {place / '2750'}: Forest/Forest_1.jpg, Forest/Forest_2.jpg"
    assert check(tmp_path, "eurosat").problems[0].endswith(problem)


def aircraft(root, folder="fgvc_aircraft"):
    place = root / folder
    (place / "images").mkdir(parents=True)
    for n in range(6):
        (place / "images" / f"000{n}.jpg").touch()
    (place / "variants.txt").write_text("707-320\nF/A-18\nBAE 146-200\n")
    (place / "images_variant_train.txt").write_text("0003 BAE 146-200\n0000 707-320\n0001 F/A-18\n")
    (place / "images_variant_val.txt").write_text("0002 F/A-18\n")
    (place / "images_variant_test.txt").write_text("0004 707-320\n0005 BAE 146-200\n")
    return place


@pytest.mark.parametrize("folder", ["fgvc_aircraft", "fgvc-aircraft-2013b/data"])
def test_aircraft(tmp_path, folder):
    place = aircraft(tmp_path, folder)
    split = read_dataset(tmp_path, "fgvc_aircraft")
    assert split.classnames == ("707-320", "F/A-18", "BAE 146-200"), "in the order of variants.txt"
    assert split.train[0] == (str(place / "images" / "0003.jpg"), 2, "BAE 146-200")
    assert [len(p) for p in (split.train, split.val, split.test)] == [3, 1, 2]
    lines = "fgvc_aircraft/images/0004.jpg\nfgvc_aircraft/images/0005.jpg"
    digest = indices_sha256(split.test, config(tmp_path, "fgvc_aircraft"))
    assert digest == hashlib.sha256(lines.encode()).hexdigest()
    assert check(tmp_path, "fgvc_aircraft").problems == [f"{place} has 3 classes, expected 100"]


def test_aircraft_with_an_unknown_class_or_without_an_image(tmp_path):
    place = aircraft(tmp_path)
    (place / "images" / "0005.jpg").unlink()
    with pytest.raises(UserError, match=r"lists 1 images that are not there, the first is .*0005\.jpg"):
        read_dataset(tmp_path, "fgvc_aircraft")
    (place / "images_variant_val.txt").write_text("0002 F/A-18\n0003 747\n")
    with pytest.raises(UserError, match=r"images_variant_val\.txt line 2: '747' is not a class of variants\.txt"):
        read_dataset(tmp_path, "fgvc_aircraft")


def fill(folder, names, suffix=".JPEG"):
    """An empty file in every class folder: readers open no image."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}_1{suffix}").touch()


def test_imagenets_classes_are_open_clips():
    names = imagenet.names()
    assert list(names.values()) == list(open_clip.IMAGENET_CLASSNAMES) and list(names) == sorted(names)
    assert (names["n01440764"], names["n02808304"], names["n15075141"]) == ("tench", "bath towel", "toilet paper")
    for variant in ("_a", "_r"):
        kept = imagenet.wnids(variant)
        assert len(kept) == 200 and list(kept) == sorted(kept) and set(kept) < set(names)


def test_imagenet_needs_timms_list(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"timm 0\.9 or newer.*imagenet_x_synsets\.txt is missing"):
        imagenet.wnids("_x")
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need timm"):
        imagenet.wnids()


@pytest.mark.parametrize("images", ["images/train", "train"])
def test_imagenet(tmp_path, images):
    train = tmp_path / "imagenet" / images
    fill(train, imagenet.wnids())
    with pytest.raises(UserError, match=f"data needs the folder {train.parent / 'val'}, which is missing"):
        read_dataset(tmp_path, "imagenet")
    fill(train.parent / "val", imagenet.wnids())
    split = read_dataset(tmp_path, "imagenet")
    assert (len(split.train), len(split.val), len(split.test)) == (1000, 0, 1000)
    assert split.train[1] == (str(train / "n01443537" / "n01443537_1.JPEG"), 1, "goldfish")
    assert split.classnames[999] == "toilet paper" and len(subset(split, "base").classnames) == 500
    assert check(tmp_path, "imagenet").problems == []
    (train.parent / "val" / "n01440764").rename(train.parent / "val" / "extra")
    with pytest.raises(
        UserError, match=r"val must have 1000 class folders; missing or unknown are 2: extra, n01440764$"
    ):
        read_dataset(tmp_path, "imagenet")


def test_imagenets_variants(tmp_path):
    folders_of = {
        "imagenetv2": ("imagenetv2/imagenetv2-matched-frequency-format-val", [str(n) for n in range(1000)]),
        "imagenet_sketch": ("imagenet-sketch/images", imagenet.wnids()),
        "imagenet_a": ("imagenet-adversarial/imagenet-a", imagenet.wnids("_a")),
        "imagenet_r": ("imagenet-rendition/imagenet-r", imagenet.wnids("_r")),
    }
    for key, (place, names) in folders_of.items():
        fill(tmp_path / place, names)
        (tmp_path / place / "README.txt").touch()
        split = read_dataset(tmp_path, key)
        assert (len(split.train), len(split.val), len(split.test)) == (0, 0, len(names)), key
        assert len(split.classnames) == len(names) == DATASETS[key].classes
        assert check(tmp_path, key).problems == []
        for item in split.test[::37]:
            assert item.path.split("/")[-2] == names[item.label] and item.classname == split.classnames[item.label]
    # Folder 10 of V2 is label 10, though it sorts before 2.
    v2 = read_dataset(tmp_path, "imagenetv2")
    assert v2.classnames == tuple(open_clip.IMAGENET_CLASSNAMES) and v2.test[10].path.endswith("/10/10_1.JPEG")
    assert read_dataset(tmp_path, "imagenet_r").classnames[:2] == ("goldfish", "great white shark")


def test_only_the_readers_of_imagenet_need_open_clip(tmp_path, monkeypatch):
    aircraft(tmp_path)
    monkeypatch.setattr(imagenet, "names", lambda: pytest.fail("open_clip takes seconds to import"))
    assert len(read_dataset(tmp_path, "fgvc_aircraft").train) == 3 and len(listing()) == 15


def test_hashes_start_at_the_data(tmp_path):
    folder = tiny.splits(tmp_path / "data", 1, 1)
    here = RunConfig("local-dir:x", data=str(folder))
    split = read(here)
    lines = "\n".join(f"test/{name}/000.png" for name in ("blue sky", "green_leaf", "grey stone", "red ball"))
    assert indices_sha256(split.test, here) == hashlib.sha256(lines.encode()).hexdigest()
    (folder / "all.json").write_text(
        json.dumps({p: [[f"{p}/red ball/000.png", 0, "b"]] for p in ("train", "test")} | {"val": []})
    )
    here = dataclasses.replace(here, data=str(folder / "all.json"))
    assert indices_sha256(read(here).test, here) == hashlib.sha256(b"test/red ball/000.png").hexdigest()
