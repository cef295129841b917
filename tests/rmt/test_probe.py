import numpy as np
import pytest
import tiny
import torch
from sklearn.linear_model import LogisticRegression

from rmt.config import UserError
from rmt.probe import features, linear_probe


def blobs(each, seed, classes=3):
    """Overlapping clouds, so that C matters: (n, 6) features, (n,) labels."""
    random = torch.Generator().manual_seed(seed)
    label = torch.arange(classes).repeat_interleave(each)
    return torch.eye(6)[label] * 1.5 + torch.randn(len(label), 6, generator=random), label


def coop(train, val, test):
    """CoOp's lpclip/linear_probe.py, step by step: (C, validation accuracy, test accuracy in percent)."""

    def fit(c):
        return LogisticRegression(solver="lbfgs", max_iter=1000, C=c).fit(*train)

    grid = [1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6]
    peak = grid[int(np.argmax([np.mean(fit(c).predict(val[0]) == val[1]) for c in grid]))]
    left, right = 1e-1 * peak, 1e1 * peak
    for _ in range(8):
        of_left, of_right = (np.mean(fit(c).predict(val[0]) == val[1]) for c in (left, right))
        middle = np.power(10, 0.5 * (np.log10(right) + np.log10(left)))
        final, left, right = (right, middle, right) if of_left < of_right else (left, left, middle)
    found = fit(final)
    return final, np.mean(found.predict(val[0]) == val[1]), 100 * np.mean(found.predict(test[0]) == test[1])


@pytest.mark.parametrize("classes", [2, 3])
def test_the_probe_is_coops(classes):
    parts = [blobs(n, seed, classes) for seed, n in enumerate((8, 7, 50))]
    probe = linear_probe(*(tensor for part in parts for tensor in part))
    c, val, test = coop(*[tuple(tensor.numpy() for tensor in part) for part in parts])
    assert np.isclose(probe.C, c) and np.isclose(probe.val_acc1, 100 * val)
    assert np.isclose(probe.test.top1, test) and probe.test.confusion.sum() == 50 * classes
    assert 100 / classes < probe.test.top1 < 100


def test_the_test_labels_choose_nothing():
    (x, y), (vx, vy), (tx, ty) = (blobs(n, seed) for seed, n in enumerate((8, 7, 50)))
    first, other = linear_probe(x, y, vx, vy, tx, ty), linear_probe(x, y, vx, vy, tx, ty.flip(0))
    assert first.C == other.C and first.test.top1 != other.test.top1


def test_bad_input():
    (x, y), (vx, vy), (tx, ty) = (blobs(n, seed) for seed, n in enumerate((4, 4, 4)))
    with pytest.raises(UserError, match="validation images: expected some, got none"):
        linear_probe(x, y, vx[:0], vy[:0], tx, ty)
    with pytest.raises(UserError, match=r"training images of every class.*got labels \[0, 1\]"):
        linear_probe(x[:8], y[:8], vx, vy, tx, ty)
    with pytest.raises(UserError, match=r"two classes or more, got labels \[0\]"):
        linear_probe(x[:4], y[:4], vx[:4], vy[:4], tx[:4], ty[:4])


def test_features_are_the_towers_own():
    model, image, label = tiny.model(), torch.rand(5, 3, 32, 32), torch.arange(5)
    x, y = features(model, [(image[:3], label[:3]), (image[3:], label[3:])])
    assert torch.equal(y, label) and torch.allclose(x, model.encode_image(image), atol=1e-6)
    assert not x.requires_grad
