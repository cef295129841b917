"""Data as few-shot tasks: reading splits, CoOp's sample, training batches and evaluation batches."""

from .batches import TrainBatches, eval_batches, prefetch
from .captions import Captioned, CaptionSplit, read_captions
from .check import Report, check, check_captions, listing
from .datasets import DATASETS, Dataset, indices_sha256, read, read_dataset
from .folders import read_csv, read_data, read_folder, read_json, write_csv
from .images import Cache, decode
from .items import Item, Split, few_shot, subset
from .text_batches import CaptionBatches, QuestionBatches
from .vqa import Question, QuestionSplit, read_vqa

__all__ = [
    "DATASETS", "Cache", "CaptionBatches", "CaptionSplit", "Captioned", "Dataset", "Item", "Question",
    "QuestionBatches", "QuestionSplit", "Report", "Split", "TrainBatches", "check", "check_captions", "decode",
    "eval_batches", "few_shot", "indices_sha256", "listing", "prefetch", "read", "read_captions", "read_csv",
    "read_data", "read_dataset", "read_folder", "read_json", "read_vqa", "subset", "write_csv",
]  # fmt: skip
