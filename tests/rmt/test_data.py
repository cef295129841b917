import csv
import dataclasses
import json
import os
import random
from pathlib import Path

import pytest
import tiny

from rmt.config import RunConfig, UserError
from rmt.data import Item, Split, few_shot, read, read_csv, read_data, read_folder, read_json, subset, write_csv

ROWS = [["red ball/000.png", 0, "ball"], ["blue sky/000.png", 1, "sky"], ["blue sky/001.png", 1, "sky"]]


def table(folder, text, images=2):
    """A CSV file beside images."""
    tiny.images(folder, images)
    (folder / "data.csv").write_text(text)
    return folder / "data.csv"


def split_json(folder, rows=ROWS, **parts):
    """A split JSON beside images."""
    if not (folder / "red ball").is_dir():
        tiny.images(folder, 2)
    (folder / "split.json").write_text(json.dumps({"train": rows, "val": [], "test": rows[:2]} | parts))
    return folder / "split.json"


def test_few_shot_takes_all_of_a_small_class_and_says_so():
    items = [Item(f"{label}/{i}", label, f"class {label}") for label, n in enumerate((2, 5)) for i in range(n)]
    with pytest.warns(UserWarning, match="'class 0' has 2 images, fewer than 4"):
        train, _ = few_shot(items, [], 4, 1)
    assert [item.label for item in train] == [0, 0, 1, 1, 1, 1]
    assert [item.path for item in train[:2]] == ["0/0", "0/1"]
    # The small class drew nothing from the stream.
    assert [item.path for item in train[2:]] == random.Random(1).sample([f"1/{i}" for i in range(5)], 4)


@pytest.mark.parametrize("total", [2, 5, 37])
def test_halves_are_the_first_and_the_other_labels_from_0(total):
    order = random.Random(0).sample(range(total), total)
    items = [Item(f"{label}/{i}", label, f"name {label}") for label in order for i in range(3)]
    split = Split(items, items[:4], items[::2], tuple(f"name {label}" for label in range(total)), "a {}", "key")
    half = (total + 1) // 2
    base, new = subset(split, "base"), subset(split, "new")
    assert subset(split, "all") is split
    assert base.classnames + new.classnames == split.classnames and len(base.classnames) == half
    for part in ("train", "val", "test"):
        mine = getattr(split, part)
        assert getattr(base, part) == [item for item in mine if item.label < half]
        assert getattr(new, part) == [i._replace(label=i.label - half) for i in mine if i.label >= half]
    for got in (base, new):
        assert all(got.classnames[item.label] == item.classname for item in got.train)
        assert (got.template, got.dataset) == ("a {}", "key")


def test_halves_need_a_known_name_and_two_classes():
    split = Split([Item("a", 0, "one")], [], [], ("one",))
    with pytest.raises(UserError, match="classes must be all, base or new, got 'old'"):
        subset(split, "old")
    with pytest.raises(UserError, match="classes new needs at least two classes, got 1"):
        subset(split, "new")


def test_read_folder_with_splits(tmp_path):
    split = read_folder(tiny.splits(tmp_path, train=3, test=2))
    assert split.classnames == ("blue sky", "green_leaf", "grey stone", "red ball")
    assert (len(split.train), len(split.val), len(split.test)) == (12, 0, 8)
    assert split.train[3] == Item(str(tmp_path / "train" / "green_leaf" / "000.png"), 1, "green_leaf")
    assert (split.template, split.dataset) == (None, None)


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


def test_a_run_reads_any_of_them(tmp_path):
    folder = tiny.splits(tmp_path / "folder", 2, 2)
    file = split_json(tmp_path / "json")
    write_csv(tmp_path / "folder" / "all.csv", read_folder(folder))
    for path, count in ((folder, 8), (file, 3), (tmp_path / "folder" / "all.csv", 8)):
        assert len(read(RunConfig("local-dir:x", data=str(path))).train) == count
        assert read_data(path) == read(RunConfig("local-dir:x", data=str(path)))
    for name, got in (("nowhere", "missing"), ("nowhere.csv", "missing"), ("folder/test/red ball/000.png", "no such")):
        with pytest.raises(UserError, match=f"data must be a folder of images, .*{name}', which is {got}"):
            read_data(tmp_path / name)


def test_csv_with_names_and_splits(tmp_path):
    text = 'split,path,classname\ntrain,red ball/000.png,"ball, red"\n\ntrain, blue sky/000.png ,sky\n'
    path = table(tmp_path, "\ufeff" + text + 'test,red ball/001.png,"ball, red"\nval,blue sky/001.png,sky\n')
    split = read_csv(path)
    assert split.classnames == ("ball, red", "sky")
    assert split.train == [
        Item(str(tmp_path / "red ball/000.png"), 0, "ball, red"), Item(str(tmp_path / "blue sky/000.png"), 1, "sky"),
    ]  # fmt: skip
    assert [item.path[-7:] for item in split.test + split.val] == ["001.png", "001.png"]


def test_csv_with_numbers_keeps_their_order(tmp_path):
    text = "path,label,classname,split\nred ball/000.png,1,ball\nblue sky/000.png,0,sky\n"
    path = table(tmp_path, text.replace("ball\n", "ball,train\n").replace("sky\n", "sky,train\n"))
    assert read_csv(path).classnames == ("sky", "ball")
    path.write_text("path,label,split\nred ball/000.png,1,train\nblue sky/000.png,0,test\nred ball/001.png,0,train\n")
    split = read_csv(path)
    assert split.classnames == ("0", "1") and [item.label for item in split.train] == [1, 0]


def test_csv_without_splits_gets_the_folders_own_split(tmp_path):
    folder = tiny.images(tmp_path / "all", 6)
    rows = [f"{name}/{i:03}.png,{name}" for i in range(6) for name in tiny.COLOURS]
    (folder / "data.csv").write_text("\n".join(["path,label", *rows]))
    assert read_csv(folder / "data.csv") == read_folder(folder)


def test_written_csv_is_read_back(tmp_path):
    split = read_folder(tiny.splits(tmp_path, 3, 2))
    odd = [item._replace(label=3 - item.label, classname=item.classname + ', "so"') for item in split.train]
    split = dataclasses.replace(
        split, train=odd, test=[], classnames=tuple(f'{n}, "so"' for n in split.classnames[::-1])
    )
    write_csv(tmp_path / "train" / "out.csv", split)
    assert read_csv(tmp_path / "train" / "out.csv") == split
    with open(tmp_path / "train" / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"path": "blue sky/000.png", "label": "3", "classname": 'blue sky, "so"', "split": "train"}


WRONG_CSV = {
    "empty": ("", r"line 1 must be a header .* got \[\]"),
    "no-header": ("a.png,cat\n", r"line 1 must be a header of path, classname or label, and split, got \['a.png'"),
    "no-class": ("path,split\n", "line 1 must be a header"),
    "unknown-column": ("path,label,colour\n", "line 1 must be a header"),
    "twice": ("path,label,path\n", "line 1 must be a header"),
    "no-rows": ("path,label\n\n", "must have a line for each image, got none"),
    "short": ("path,label\nred ball/000.png,a\n\nblue sky/000.png\n", r"line 4 must have path, label, got \['blue"),
    "blank": ("path,label\nred ball/000.png, \n", "line 2 must have path, label"),
    "quotes": ('path,label\n"red ball/000.png"x,a\n', "line 2 must be CSV"),
    "no-file": ("path,label\nred ball/000.png,a\nred ball/no.png,a\n", r"line 3: there is no file .*red ball/no\.png"),
    "same-file": ("path,label\nred ball/000.png,a\nred ball/000.png,b\n", r"line 3: .*000\.png is on line 2 already"),
    "split": ("path,label,split\nred ball/000.png,a,valid\n", "line 2: split must be train, val or test, got 'valid'"),
    "number": ("path,label,classname\nred ball/000.png,a,ball\n", "line 2: label must be a number .* got 'a'"),
    "too-few": ("path,label\nred ball/000.png,a\n", "'a' needs at least 4 images"),
    "gap": ("path,label,classname,split\nred ball/000.png,1,ball,train\n", "labels must be 0 to 0, got 1"),
    "names": (
        "path,label,classname,split\nred ball/000.png,0,ball,train\nblue sky/000.png,0,sky,test\n",
        "one class name for a label, but label 0 is 'ball' and 'sky'",
    ),
    "untrained": (
        "path,label,split\nred ball/000.png,a,train\nblue sky/000.png,b,test\n",
        "training images of all classes, got none of 'b'",
    ),
    "binary": (b"path,label\n\xff\xfe", "cannot be read as text"),
}  # fmt: skip


@pytest.mark.parametrize("text, message", WRONG_CSV.values(), ids=WRONG_CSV)
def test_a_wrong_csv_is_named_with_its_line(tmp_path, text, message):
    path = table(tmp_path, "")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"{'' if 'at least 4' in message else 'data.csv.*'}{message}"):
        read_csv(path)


def test_split_json(tmp_path):
    split = read_json(split_json(tmp_path))
    assert split.classnames == ("ball", "sky") and len(split.train) == 3 and split.val == []
    assert split.test == [
        Item(str(tmp_path / "red ball/000.png"), 0, "ball"), Item(str(tmp_path / "blue sky/000.png"), 1, "sky"),
    ]  # fmt: skip
    elsewhere = read_json((tmp_path / "split.json").rename(tmp_path / "red ball" / "split.json"), tmp_path)
    assert elsewhere == split


def test_split_json_may_be_for_testing_only(tmp_path):
    assert read_json(split_json(tmp_path, train=[])).classnames == ("ball", "sky")


WRONG_JSON = {
    "gap": ([["red ball/000.png", 0, "a"], ["red ball/001.png", 2, "b"]], "2 classes, so .* must be 0 to 1, got 2"),
    "negative": ([["red ball/000.png", -1, "a"], ["red ball/001.png", 0, "b"]], "labels must be 0 to 1, got -1"),
    "two-names": ([*ROWS, ["red ball/001.png", 1, "ball"]], "label 1 is 'sky' and 'ball'"),
    "missing": (
        [*ROWS, *([f"no/{i}.png", 0, "ball"] for i in range(5))],
        r"names 5 files that are not in .*: no/0\.png, no/1\.png, no/2\.png, \.\.\.$",
    ),
    "short": ([["red ball/000.png", 0]], r"train\[0\] must be \[path, label, class name\], got \['red ball"),
    "text-label": ([*ROWS, ["red ball/001.png", "1", "ball"]], r"train\[3\] must be \[path, label, class name\]"),
    "bool-label": ([*ROWS, ["red ball/001.png", True, "sky"]], r"train\[3\] must be"),
    "no-list": ([*ROWS, "red ball/001.png"], r"train\[3\] must be"),
    "nothing": ([], "must name at least one image, got none"),
}  # fmt: skip


@pytest.mark.parametrize("rows, message", WRONG_JSON.values(), ids=WRONG_JSON)
def test_a_wrong_split_json_is_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=f"split.json.*{message}"):
        read_json(split_json(tmp_path, rows))


def test_a_class_without_training_images_is_named(tmp_path):
    with pytest.raises(UserError, match="training images of all classes, got none of 'leaf'"):
        read_json(split_json(tmp_path, test=[["green_leaf/000.png", 2, "leaf"]]))


@pytest.mark.parametrize("text", ["[", "[]", '{"train": [], "test": []}', '{"train": 1, "val": [], "test": []}'])
def test_what_is_no_split_json_is_refused(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(UserError, match=r"split\.json must be"):
        read_data(tmp_path / "split.json")


@pytest.mark.parametrize("bad", [b"a/caf\xe9.png", b"caf\xe9/x.png"], ids=["file", "class"])
def test_read_folder_refuses_names_that_are_not_utf8(tmp_path, bad):
    folder = tiny.images(tmp_path / "data", 4)
    path = os.fsencode(folder) + b"/" + bad
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        Path(os.fsdecode(path)).write_bytes((folder / "red ball" / "000.png").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(UserError, match=r"must be UTF-8, got b'caf\\xe9(\.png)?': rename it"):
        read_data(folder)
