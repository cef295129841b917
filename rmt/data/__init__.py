"""Data as few-shot tasks: reading splits, CoOp's sample, training batches and evaluation batches."""

from .batches import TrainBatches, eval_batches, prefetch
from .check import Report, check, listing
from .datasets import DATASETS, Dataset, indices_sha256, read, read_dataset
from .folders import read_csv, read_data, read_folder, read_json, write_csv
from .images import Cache, decode
from .items import Item, Split, few_shot, subset

__all__ = [
    "DATASETS", "Cache", "Dataset", "Item", "Report", "Split", "TrainBatches", "check", "decode", "eval_batches",
    "few_shot", "indices_sha256", "listing", "prefetch", "read", "read_csv", "read_data", "read_dataset", "read_folder",
    "read_json", "subset", "write_csv",
]  # fmt: skip
