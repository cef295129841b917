"""VQAv2: questions on images with ten people's answers, soft targets to train on, and the official accuracy.

    ROOT/vqav2   v2_OpenEnded_mscoco_{train,val}2014_questions.json, v2_mscoco_{train,val}2014_annotations.json, and
                 {train,val}2014/COCO_{train,val}2014_%012d.jpg, there or below ROOT/coco

Sources: the official evaluation (GT-Vision-Lab/VQA, vqaEval.py) for the accuracy and what it does to answers;
hengyuan-hu/bottom-up-attention-vqa, compute_softscore.py, for targets and the vocabulary, as most code since.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import UserError
from .captions import load_json
from .images import missing

QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}2014_questions.json", "v2_mscoco_{}2014_annotations.json"
PARTS = ("train", "val")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COUNT = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(_COUNT)}}
# What the official table writes with its apostrophes again. It has capital ones too, which meet no lowered word.
_SHORT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# One apostrophe of each left out, in every way. The last entry is the official table's own slip, kept.
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in _SHORT.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


class Question(NamedTuple):
    """One question on the image at `path`; the people's answers, and the one that most of them gave."""

    id: int
    path: str
    text: str
    answers: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class QuestionSplit:
    """In the order of the annotation files. VQAv2's test answers are not public."""

    train: list[Question]
    val: list[Question]


def read_vqa(root: str | Path) -> QuestionSplit:
    """Reads VQAv2 from its folder. Raises UserError for missing files or images, and malformed entries."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root} with {QUESTIONS.format('train')} and the rest of VQAv2")
    return QuestionSplit(*(_read_part(root, part) for part in PARTS))


def _read_part(root: Path, part: str) -> list[Question]:
    files = [root / name.format(part) for name in (QUESTIONS, ANNOTATIONS)]
    texts: dict[int, tuple[str, int]] = {}
    for number, row in enumerate(_rows(files[0], "questions")):
        where = f"{files[0]}: questions[{number}]"
        try:
            key, text, image = row["question_id"], row["question"], row["image_id"]
        except (TypeError, KeyError) as error:
            raise UserError(f"{where} must have question_id, question and image_id: {error}") from error
        if not isinstance(text, str) or not isinstance(image, int):
            raise UserError(f"{where}: question must be a text and image_id a number, got {text!r} and {image!r}")
        texts[key] = text, image
    folder, found = _images(root, part), []
    for number, row in enumerate(_rows(files[1], "annotations")):
        where = f"{files[1]}: annotations[{number}]"
        try:
            answers = tuple(answer["answer"] for answer in row["answers"])
            key, answer = row["question_id"], row["multiple_choice_answer"]
        except (TypeError, KeyError) as error:
            message = f"{where} must have question_id, multiple_choice_answer and answers with answer: {error}"
            raise UserError(message) from error
        if not answers or not all(isinstance(text, str) for text in (*answers, answer)):
            raise UserError(f"{where} must have at least one answer, all of them texts, got {answers!r} and {answer!r}")
        if key not in texts:
            raise UserError(f"{where}: question_id {key!r} is not in {files[0].name}")
        text, image = texts[key]
        found.append(Question(key, str(folder / f"COCO_{part}2014_{image:012}.jpg"), text, answers, answer))
    if not found or len(found) != len(texts):
        raise UserError(f"{root} must have an answered question at least, and all of them: {len(texts)}, {len(found)}")
    if lost := missing(list(dict.fromkeys(question.path for question in found))):
        raise UserError(f"{root} asks about {len(lost)} images that are not there, the first is {lost[0]}")
    return found


def _rows(file: Path, name: str) -> list:
    if not file.is_file():
        raise UserError(f"there is no file {file}, and rmt makes none")
    found = load_json(file)
    if not isinstance(found, dict) or not isinstance(found.get(name), list):
        raise UserError(f"{file} must be an object with a list {name}")
    return found[name]


def _images(root: Path, part: str) -> Path:
    places = [root / f"{part}2014", root.parent / "coco" / f"{part}2014"]
    return next((place for place in places if place.is_dir()), places[0])


def vocabulary(questions: Sequence[Question], least: int = 9) -> dict[str, int]:
    """Answer -> its class: every question's most frequent answer, normalised, that `least` questions have.

    In the order in which they first appear, so that classes are the same wherever the vocabulary is made. 9 is the
    source's, which counts over train and val together.

    Raises: UserError where no answer is frequent enough.
    """
    counts: dict[str, int] = {}
    for question in questions:
        answer = normalise(question.answer).replace(",", "")
        counts[answer] = counts.get(answer, 0) + 1
    kept = [answer for answer, count in counts.items() if count >= least]
    if not kept:
        raise UserError(f"at least one answer must occur {least} times, got at most {max(counts.values(), default=0)}")
    return {answer: label for label, answer in enumerate(kept)}


def soft_target(answers: Sequence[str], classes: Mapping[str, int]) -> Tensor:
    """(C,) fp32: min(1, 0.3 * count) for each answer in the vocabulary; the people's answers as they stand.

    Of ten answers that is the official accuracy of each, its mean over ten choices of nine.
    """
    target = torch.zeros(len(classes))
    for answer in set(answers):
        if answer in classes:
            target[classes[answer]] = min(1.0, 0.3 * answers.count(answer))
    return target


def accuracy(answer: str, answers: Sequence[str]) -> float:
    """The official accuracy, 0 to 1: min(1, matches / 3) among the other people, a mean over each person left out.

    The answer is normalised; the people's lose punctuation alone, and that only where they differ: as the official
    code has it.
    """
    given = normalise(" ".join(re.split(r"[\n\t]", answer)).strip())
    if len(set(answers)) > 1:
        answers = [_unpunctuated(text) for text in answers]
    matches = answers.count(given)
    return sum(min(1.0, (matches - (own == given)) / 3) for own in answers) / len(answers)


def normalise(answer: str) -> str:
    """Punctuation and articles out, small numbers as digits, contractions with their apostrophes, in lower case."""
    words = [_NUMBERS.get(word, word) for word in _unpunctuated(answer).lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in ("a", "an", "the"))


def _unpunctuated(text: str) -> str:
    """A mark beside a space goes, another becomes a space; with a comma between digits anywhere, all go."""
    thousands, out = re.search(r"\d,\d", text), text
    for mark in _PUNCTUATION:
        gone = f"{mark} " in text or f" {mark}" in text or thousands
        out = out.replace(mark, "" if gone else " ")
    # 32 of them: the official code passes re.UNICODE where the count belongs.
    return re.sub(r"\.(?!\d)", "", out, count=32)
