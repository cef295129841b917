"""The linear probe: logistic regression on a model's frozen image features, the baseline that every paper prints.

Recipe of CLIP and CoOp (`lpclip`): L-BFGS with at most 1000 iterations on features that are not normalised; C is the
best of 1e6, 1e4, ..., 1e-6 on the few-shot validation images, then narrowed in eight halvings of the range around it.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UserError
from .measures import Accuracy, accuracy

GRID = tuple(10.0**power for power in range(6, -7, -2))
HALVINGS = 8
ITERATIONS = 1000


class Fitted(NamedTuple):
    """logits: `features @ weight.T + bias`. weight: (C, D) fp32; bias: (C,) fp32. penalty: the inverse penalty C that
    was chosen; val_acc1: in percent, at it."""

    weight: Tensor
    bias: Tensor
    penalty: float
    val_acc1: float


class Probe(NamedTuple):
    """test: counts over the test images; C: the inverse penalty that was chosen; val_acc1: in percent, at this C."""

    test: Accuracy
    C: float
    val_acc1: float


@torch.no_grad()
def features(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(n, D) fp32 image features, not normalised, and (n,) labels of all (image, label) batches, on the CPU."""
    device = model.logit_scale.device
    pairs = [(model.encode_image(image.to(device)).float().cpu(), label) for image, label in batches]
    return torch.cat([feature for feature, _ in pairs]), torch.cat([label for _, label in pairs])


def linear_probe(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor,
    test_features: Tensor, test_labels: Tensor,
) -> Probe:  # fmt: skip
    """Fits on the training images, chooses C on the validation images, measures the test images once.

    features: (n, D); labels: (n,) int64 from 0. Test labels are looked at after the choice, never for it.

    Raises: UserError where there is no validation image, or fewer than two classes to tell apart.
    """
    if not len(val_labels):
        raise UserError("a linear probe chooses C on validation images: expected some, got none")
    classes = len(train_labels.unique())
    if classes < 2 or classes != 1 + int(torch.cat([train_labels, val_labels, test_labels]).max()):
        raise UserError(
            f"a linear probe needs training images of every class and two classes or more, got labels "
            f"{train_labels.unique().tolist()}"
        )
    fitted = fit(train_features, train_labels, val_features, val_labels)

    def logits(features: Tensor) -> Tensor:
        return F.linear(features, fitted.weight, fitted.bias)

    counted = accuracy(logits, [(test_features, test_labels)], classes, torch.device("cpu"))
    return Probe(counted, fitted.penalty, fitted.val_acc1)


def fit(train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor) -> Fitted:
    """The recipe, without test images; all tensors on the CPU. train_labels: every class from 0, two or more."""
    train, val = ((x.numpy(), y.numpy()) for x, y in ((train_features, train_labels), (val_features, val_labels)))
    chosen, score = _choose(train, val)
    fitted = _fit(train, chosen)
    weight, bias = (torch.from_numpy(values).float().contiguous() for values in (fitted.coef_, fitted.intercept_))
    if len(bias) == 1:
        # Of two classes scikit-learn gives the second one's score alone; the first one's is 0.
        weight, bias = (torch.cat([torch.zeros_like(values), values]) for values in (weight, bias))
    return Fitted(weight, bias, chosen, 100 * score)


def _choose(train: tuple, val: tuple) -> tuple[float, float]:
    """(C, its validation accuracy in 0..1). Ties as in CoOp: the larger C of the grid, then the smaller."""

    @functools.cache  # one end of a halving is an end of the one before
    def score(c: float) -> float:
        return float(_fit(train, c).score(*val))

    _, chosen = max((score(c), c) for c in GRID)
    low, high = chosen / 10, chosen * 10
    for _ in range(HALVINGS):
        middle, at_low, at_high = (low * high) ** 0.5, score(low), score(high)
        chosen, best = (high, at_high) if at_low < at_high else (low, at_low)
        low, high = (middle, high) if at_low < at_high else (low, middle)
    return chosen, best


def _fit(train: tuple, c: float):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # Matrices this small are slower with BLAS's threads, many times so on a busy machine.
    with threadpool_limits(1), warnings.catch_warnings():
        # 1000 iterations are the recipe's, enough or not: at C = 1e6 they may not be.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=ITERATIONS).fit(*train)
