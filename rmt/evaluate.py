"""Top-1 accuracy; a run's model, masks and data ready for use; a finished run read back and measured again."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import clip
from .checkpoint import Task, apply_task, load_task
from .config import RunConfig, UserError, from_json
from .data import Split, eval_batches, read_folder
from .masked import Mask
from .masking import apply_masks

CONFIG_FILE, TASK_FILE, RESULT_FILE = "config.json", "task.safetensors", "result.json"


@dataclass(frozen=True)
class Accuracy:
    """Counts a class: `correct[c]` of `total[c]` images of class c were given label c."""

    correct: tuple[int, ...]
    total: tuple[int, ...]

    @property
    def top1(self) -> float:
        """Percent of all images."""
        return 100 * sum(self.correct) / sum(self.total)

    @property
    def per_class(self) -> list[float | None]:
        """Percent of each class's images; None for a class without images."""
        return [100 * c / t if t else None for c, t in zip(self.correct, self.total)]

    @property
    def mean_per_class(self) -> float:
        """Mean of `per_class` over the classes that have images, in percent."""
        known = [p for p in self.per_class if p is not None]
        return sum(known) / len(known)

    def __str__(self) -> str:
        return (
            f"{self.top1:.2f} % ({sum(self.correct)} of {sum(self.total)}; mean per class {self.mean_per_class:.2f} %)"
        )


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], classes: int, device: torch.device
) -> Accuracy:
    """Counts over (image, label) batches. logits: (B, 3, H, W) on `device` -> (B, classes).

    Raises: UserError where there is no image, or where logits are not finite: no class is the largest of NaN.
    """
    correct, total = (torch.zeros(classes, dtype=torch.int64) for _ in range(2))
    for image, label in batches:
        scored = logits(image.to(device))
        if not scored.isfinite().all():
            raise UserError("logits must be finite, got inf or NaN")
        predicted = scored.argmax(-1).cpu()
        total += torch.bincount(label, minlength=classes)
        correct += torch.bincount(label[predicted == label], minlength=classes)
    if not total.sum():
        raise UserError("evaluation needs at least one image, got none")
    return Accuracy(tuple(correct.tolist()), tuple(total.tolist()))


@dataclass
class Setup:
    """What a run works on. text: (C, D) text features of the split's class names, fixed from here on."""

    clip: clip.Clip
    masks: list[Mask]
    split: Split
    text: Tensor

    def test(self, *, frozen: bool = False) -> Accuracy:
        """Of the test images, with the masks as they are or, frozen, without them: the zero-shot model."""
        compute = clip.frozen_logits if frozen else clip.logits
        batches = eval_batches(self.split.test, self.clip.preprocess)
        classes = len(self.split.classnames)
        return accuracy(lambda image: compute(self.clip.model, image, self.text), batches, classes, self.text.device)


def pick_device(name: str) -> torch.device:
    """`auto` is a CUDA device where there is one. Raises UserError for a device that is unknown or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device must be auto, cpu or a device of this machine, got {name!r}: {error}") from error


def prepare(config: RunConfig) -> Setup:
    """Loads model and data, swaps the masked modules in and computes the text features. Raises UserError."""
    device = pick_device(config.device)
    split = read_folder(config.data)
    loaded = clip.load(config.model, config.pretrained, config.image_size, device)
    masks = apply_masks(loaded.model, config.mask)
    return Setup(loaded, masks, split, clip.text_features(loaded, split.classnames, config.template))


def read_run(folder: str | Path) -> tuple[RunConfig, Task]:
    """Config and task of a finished run. Raises UserError where one is missing or damaged."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"expected a run folder with {CONFIG_FILE} and {TASK_FILE}, got {str(folder)!r}, which lacks the first"
        )
    return from_json(path.read_text()), load_task(Path(folder) / TASK_FILE)


def load_run(config: RunConfig, task: Task) -> Setup:
    """`prepare`, with the bits of `task`. Raises UserError where model or class names are not the task's."""
    setup = prepare(config)
    if setup.split.classnames != task.classnames:
        raise UserError(f"{config.data} must have the task's classes {task.classnames}, got {setup.split.classnames}")
    apply_task(task, setup.masks)
    return setup
