"""What is measured of a classifier: counts over images, and the usual measures that follow from them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import UserError

BINS = 15


@dataclass(frozen=True, eq=False)
class Accuracy:
    """What was counted over some images, and the measures that follow from it, all in percent.

    Args:
        confusion: (C, C) int64, row: the true class, column: the predicted one.
        bins: (BINS, 3) fp64; bin i holds the images whose confidence, the largest softmax probability, lies in
            (i / BINS, (i + 1) / BINS]: their number, the sum of their confidences, the number of them that are right.
    """

    confusion: Tensor
    bins: Tensor

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of all images that were given their label."""
        return 100 * int(self.confusion.trace()) / self.n

    @property
    def per_class(self) -> list[float | None]:
        """Share of each class's images; None for a class without images."""
        pairs = zip(self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist())
        return [100 * hits / total if total else None for hits, total in pairs]

    @property
    def mean_per_class(self) -> float:
        """Mean of `per_class` over the classes that have images."""
        known = [p for p in self.per_class if p is not None]
        return sum(known) / len(known)

    @property
    def macro_f1(self) -> float:
        """Mean of 2 TP / (true + predicted) over the classes that have images, as Dassl's evaluator."""
        true = self.confusion.sum(1).double()
        f1 = 2 * self.confusion.diagonal() / (true + self.confusion.sum(0))
        return 100 * float(f1[true > 0].mean())

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |accuracy - confidence| of the bins, weighted by their images.

        Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, with their 15 bins of equal width.
        """
        _, confidence, hits = self.bins.unbind(1)
        return 100 * float((confidence - hits).abs().sum()) / self.n

    def metrics(self) -> dict[str, float]:
        """By CLIP_benchmark's keys, where it has them."""
        return {
            "acc1": self.top1, "mean_per_class_recall": self.mean_per_class, "macro_f1": self.macro_f1, "ece": self.ece,
        }  # fmt: skip

    def __str__(self) -> str:
        hits = int(self.confusion.trace())
        return f"{self.top1:.2f} % ({hits} of {self.n}; mean per class {self.mean_per_class:.2f} %)"


@torch.no_grad()
def accuracy(
    logits: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], classes: int, device: torch.device
) -> Accuracy:
    """Counts over (image, label) batches. logits: (B, 3, H, W) on `device` -> (B, classes).

    Raises: UserError where there is no image, or where logits are not finite: no class is the largest of NaN.
    """
    confusion = torch.zeros(classes * classes, dtype=torch.int64)
    bins = torch.zeros(BINS, 3, dtype=torch.float64)
    for image, label in batches:
        scored = logits(image.to(device)).cpu()
        if not scored.isfinite().all():
            raise UserError("logits must be finite, got inf or NaN")
        confidence, predicted = scored.double().softmax(-1).max(-1)
        confusion += torch.bincount(label * classes + predicted, minlength=classes * classes)
        place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        rows = torch.stack([torch.ones_like(confidence), confidence, (predicted == label).double()], 1)
        bins.index_add_(0, place, rows)
    if not confusion.sum():
        raise UserError("evaluation needs at least one image, got none")
    return Accuracy(confusion.view(classes, classes), bins)
