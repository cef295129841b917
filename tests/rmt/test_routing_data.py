"""Captions and questions: what is read, what is refused, targets, the official accuracy, and batches."""

import csv
import json
import shutil

import pytest
import text_tools
import tiny
import torch

from rmt import UserError
from rmt.cli import main
from rmt.data import CaptionBatches, QuestionBatches, check, prefetch, read_captions, read_vqa
from rmt.data.vqa import Question, accuracy, normalise, soft_target, vocabulary

FLICKR = tiny.SHARED / "captions" / "flickr8k_3000"
needs_flickr = pytest.mark.skipif(not FLICKR.exists(), reason=f"needs the captions of {FLICKR}")


def names(items):
    return [item.path.rpartition("/")[2] for item in items]


def rows(folder):
    return json.loads((folder / "captions.json").read_text())


def write(folder, value):
    (folder / "captions.json").write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    return text_tools.captions(tmp_path / "captions", each=2)


def test_parts_by_folder_or_by_split(folder):
    split = read_captions(folder)
    assert [len(part) for part in (split.train, split.val, split.test)] == [8, 8, 8]
    assert split.val[0].path == str(folder / "val/red0.png")
    assert split.val[0].captions == ("A red wall .", "the whole picture is red")
    write(folder, [row | {"split": "restval" if "val/" in row["image"] else "test"} for row in rows(folder)])
    split = read_captions(folder)
    assert len(split.train) == 8 and all("/val/" in item.path for item in split.train)
    assert (len(split.val), len(split.test)) == (0, 16)


def test_a_plain_folder_gets_a_split_of_its_own(tmp_path):
    folder = text_tools.captions(tmp_path / "plain", each=5, parts=("pictures",))
    first = read_captions(folder)
    assert [len(part) for part in (first.train, first.val, first.test)] == [16, 2, 2]
    together = {*names(first.train), *names(first.val), *names(first.test)}
    assert len(together) == 20
    write(folder, rows(folder)[::-1])
    again = read_captions(folder)
    for part in ("train", "val", "test"):
        assert sorted(names(getattr(again, part))) == sorted(names(getattr(first, part))), "not by the file's order"


def test_csv_is_a_line_for_each_caption(folder):
    listed = rows(folder)
    (folder / "captions.json").unlink()
    with open(folder / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows(
            [row["image"], text] for place in (0, 1) for row in listed for text in [row["captions"][place]]
        )
    split = read_captions(folder)
    assert [(item.path, list(item.captions)) for item in split.train] == [
        (str(folder / row["image"]), row["captions"]) for row in listed if row["image"].startswith("train/")
    ]
    (folder / "captions.csv").write_text("image,caption,split\ntrain/red0.png,a,train\ntrain/red0.png,b,val\n")
    with pytest.raises(UserError, match=r"line 3: train/red0.png is in train already, got val"):
        read_captions(folder)


def test_karpathys_coco(folder):
    entries = [
        {
            "filepath": row["image"].split("/")[0], "filename": row["image"].split("/")[1],
            "split": {"train": "train", "val": "restval", "test": "val"}[row["image"].split("/")[0]],
            "sentences": [{"raw": f" {text}\n", "tokens": []} for text in row["captions"]],
        }
        for row in rows(folder)
    ]  # fmt: skip
    (folder / "captions.json").unlink()
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    split = read_captions(folder)
    assert (len(split.train), len(split.val), len(split.test)) == (16, 8, 0), "train and restval are trained on"
    assert split.train[0].captions[0] == "A red wall ."
    (folder / "dataset_coco.json").write_text(json.dumps({"images": [{"filename": "x"}]}))
    with pytest.raises(UserError, match=r"images\[0\] must have filepath, filename, split and sentences"):
        read_captions(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"a": 1}, "must be a list of objects"),
        (lambda r: [], "must name at least one image"),
        (lambda r: [{"image": "train/red0.png"}], r"\[0\] must have image and captions"),
        (lambda r: [r[0] | {"captions": []}], r"\[0\]: captions must be at least one text"),
        (lambda r: [r[0] | {"captions": ["a", " "]}], "none of them empty"),
        (lambda r: [r[0] | {"split": "dev"}], "split must be one of train, val, test, restval, got 'dev'"),
        (lambda r: [r[0], r[1], r[0]], r"\[2\]: train/red0.png is at .*\[0\] already"),
        (lambda r: [r[0] | {"image": "train/no.png"}], "names 1 images that are not there: .*train/no.png"),
        (lambda r: [r[0], r[1] | {"image": "../captions/train/red1.png"}], r"\[1\] must have a split, as .*\[0\]"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folder, change, message):
    write(folder, change(rows(folder)))
    with pytest.raises(UserError, match=message):
        read_captions(folder)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(UserError, match="which is missing"):
        read_captions(tmp_path / "none")
    with pytest.raises(UserError, match=r"must hold one of dataset_coco.json, captions.json, captions.csv, got none"):
        read_captions(tmp_path)
    (folder / "captions.json").write_text("[")
    with pytest.raises(UserError, match=r"captions.json must be JSON"):
        read_captions(folder)


@needs_flickr
def test_the_real_captions():
    split = read_captions(FLICKR)
    assert [len(part) for part in (split.train, split.val, split.test)] == [2000, 500, 500]
    assert all(len(item.captions) == 5 for item in split.train)
    assert split.train[0].captions[0] == "A man lays on a bench while his dog sits by him ."


def test_data_check(folder, tmp_path, capsys):
    assert main(["data", "check", "--captions", str(folder)]) == 0
    assert "ok       8 train, 8 val, 8 test images, 48 captions" in capsys.readouterr().out
    shutil.rmtree(folder / "val")
    assert main(["data", "check", "--captions", str(folder)]) == 1
    assert "problem" in (out := capsys.readouterr().out) and "names 8 images that are not there" in out
    assert main(["data", "check"]) == 2 and "--root must be given, or --captions" in capsys.readouterr().err
    text_tools.questions(tmp_path / "vqav2")
    assert main(["data", "check", "--root", str(tmp_path), "--dataset", "vqav2", "coco_captions"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "{'train': 8, 'val': 8}, expected {'train': 443757, 'val': 214354}" in out[0] and "8 train, 8 val" in out[0]
    assert out[1].startswith("coco_captions    problem  captions must be a folder")
    assert check(tmp_path, "vqav2").notes == ["8 train, 8 val"]


def test_questions(tmp_path):
    split = read_vqa(text_tools.questions(tmp_path / "vqav2"))
    question = split.train[2]
    assert question.path == str(tmp_path / "vqav2/train2014/COCO_train2014_000000000010.jpg")
    assert (question.id, question.text, question.answer) == (10, "What colour is it?", "green")
    assert question.answers == ("green",) * 7 + ("pink", "pink", "a wall")
    # Images beside COCO's captions are found there.
    (tmp_path / "coco").mkdir()
    for part in ("train2014", "val2014"):
        (tmp_path / "vqav2" / part).rename(tmp_path / "coco" / part)
    assert read_vqa(tmp_path / "vqav2").val[0].path.startswith(str(tmp_path / "coco/val2014"))
    (tmp_path / "coco" / "val2014" / "COCO_val2014_000000000010.jpg").unlink()
    with pytest.raises(UserError, match=r"1 images that are not there, the first is .*val2014_000000000010"):
        read_vqa(tmp_path / "vqav2")


@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        ("questions", None, "there is no file"),
        ("questions", {"questions": [{"question_id": 1}]}, r"questions\[0\] must have question_id, question and image"),
        ("annotations", {"annotations": 3}, "must be an object with a list annotations"),
        ("annotations", {"annotations": [{"question_id": 0}]}, "must have question_id, multiple_choice_answer and"),
        ("annotations", {"annotations": []}, "an answered question at least, and all of them"),
        ("annotations", {"annotations": [{"question_id": 7, "multiple_choice_answer": "a", "answers":
                                          [{"answer": "a"}]}]}, "question_id 7 is not in"),
    ],
)  # fmt: skip
def test_wrong_question_files(tmp_path, which, change, message):
    root = text_tools.questions(tmp_path / "vqav2")
    file = next(root.glob(f"*train2014_{which}.json"))
    file.unlink() if change is None else file.write_text(json.dumps(change))
    with pytest.raises(UserError, match=message):
        read_vqa(root)


def test_answers_are_normalised_as_officially():
    for raw, want in {
        "The Dog.": "dog", "none": "0", "two, or three": "2 or 3", "dont": "don't", "1,000 people": "1000 people",
        "black/white": "black white", "black / white": "black  white".replace("  ", " "), "3.5": "3.5", "an t-shirt":
        "t shirt", "yall'll": "y'all'll", "somebody'd": "somebodyd", "it's": "it's",
    }.items():  # fmt: skip
        assert normalise(raw) == want, raw


def test_the_official_accuracy_written_out():
    """Three of ten said red: left out is one of the three in 3 choices (2 / 3), another in 7 (1)."""
    answers = ["red"] * 3 + ["blue"] * 6 + ["green"]
    assert accuracy("red", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert accuracy("The Blue.", answers) == 1.0
    assert accuracy("green", answers) == pytest.approx((1 * 0 + 9 * 1 / 3) / 10)
    assert accuracy("pink", answers) == 0.0
    # The people's answers lose punctuation only where they differ, and keep their articles.
    assert accuracy("yes", ["yes."] * 10) == 0.0 and accuracy("yes", ["yes."] * 9 + ["no"]) == 1.0
    assert accuracy("the wall", ["the wall"] * 10) == 0.0


def test_soft_targets_are_the_accuracy_of_ten_answers():
    classes = {"red": 0, "blue": 1, "green": 2, "pink": 3}
    for counts in ((1, 2, 3), (4, 5, 1), (0, 10, 0)):
        answers = [word for word, count in zip(classes, counts) for _ in range(count)]
        answers += ["else"] * (10 - len(answers))
        target = soft_target(answers, classes)
        want = [min(1.0, 0.3 * count) for count in counts] + [0.0]
        assert target.tolist() == pytest.approx(want)
        assert target.tolist() == pytest.approx([accuracy(word, answers) for word in classes])


def test_the_vocabulary_counts_questions():
    def asked(answer):
        return Question(0, "x.jpg", "?", (answer,) * 10, answer)

    questions = [asked(answer) for answer in ["blue", "The red", "red", "1,5", "blue", "green", "red."]]
    assert vocabulary(questions, 2) == {"blue": 0, "red": 1}
    with pytest.raises(UserError, match="must occur 4 times, got at most 3"):
        vocabulary(questions, 4)


def encode(texts):
    """(B, 12): lengths of words, padded with 0."""
    ids = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in zip(ids, texts):
        row[: len(text.split())] = torch.tensor([len(word) for word in text.split()])
    return ids


def preprocess(image):
    return torch.tensor(image.resize((2, 2)).getdata(), dtype=torch.float32).T.reshape(3, 2, 2)


def test_batches_are_functions_of_seed_and_step(folder):
    items = read_captions(folder).train
    batches = CaptionBatches(items, preprocess, encode, batch=6, seed=3)
    assert (batches.steps_per_epoch, len(batches.pairs)) == (2, 16)
    other = CaptionBatches(items, preprocess, encode, batch=6, seed=3, threads=1)
    third = other(3)
    for step, batch in enumerate(prefetch(batches, range(4))):
        for mine, theirs in zip(batch, other(step)):
            assert torch.equal(mine, theirs)
    assert all(torch.equal(a, b) for a, b in zip(third, batches(3)))
    image, text = batches(0)
    assert image.shape == (6, 3, 2, 2) and text.shape[1] in (4, 5), "cut to the longest caption"
    assert not torch.equal(image, CaptionBatches(items, preprocess, encode, batch=6, seed=4)(0)[0])
    seen = [index for step in (0, 1) for index in batches._order(0)[step * 6 : step * 6 + 6]]
    assert len(set(seen)) == 12


def test_in_order_is_everything_once(folder):
    items = read_captions(folder).train
    batches = CaptionBatches(items, preprocess, encode, batch=5)
    image, text = zip(*batches.in_order())
    assert [len(part) for part in image] == [5, 5, 5, 1]
    assert torch.equal(torch.cat(image)[::2], torch.cat(image)[1::2]), "both captions of an image come with it"
    want = encode([caption for item in items for caption in item.captions])
    assert torch.equal(torch.cat([torch.nn.functional.pad(t, (0, 12 - t.shape[1])) for t in text]), want)


def test_question_batches(tmp_path):
    split = read_vqa(text_tools.questions(tmp_path / "vqav2"))
    batches = QuestionBatches(split.train, {"red": 0, "pink": 1}, preprocess, encode, batch=8)
    image, text, target = next(batches.in_order())
    assert (image.shape, text.tolist()) == ((8, 3, 2, 2), [[4, 6, 2, 3]] * 8)
    assert target[0].tolist() == pytest.approx([1.0, 0.6]) and target[2].tolist() == pytest.approx([0.0, 0.6])


def test_an_unreadable_image_is_named(folder):
    (folder / "train" / "red0.png").write_bytes(b"no image")
    batches = CaptionBatches(read_captions(folder).train, preprocess, encode, batch=16)
    with pytest.raises(UserError, match=r"train/red0.png cannot be read as an image"):
        batches(0)
    with pytest.raises(UserError, match="at least one image with text"):
        CaptionBatches([], preprocess, encode)
