"""Tip-Adapter: few-shot features as a cache that votes beside the logits of CLIP; training-free, or keys trained."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .footing import Footing
from .heads import augmented, shuffled, train_head
from .method import Fit, Method, State
from .train import cosine_rates

AUGMENTED, BATCH, LR, EPS, INIT_BETA = 10, 256, 1e-3, 1e-4, 1.0
SEARCH_STEPS = 200, 20  # values of beta, of alpha


class Recipe(NamedTuple):
    """What is set for a data set. alpha: while keys are trained; None: as without training. scales: upper ends of the
    search of beta, of alpha; several are searched one after the other. epochs: of training keys."""

    alpha: float | None
    scales: tuple[tuple[float, float], ...]
    epochs: int = 20


# configs/*.yaml. Their README calls them best overall for a data set, so that they may have seen its test images: an
# advantage that is left to the method.
RECIPES = {
    "imagenet": Recipe(1.17, ((7, 3),)),
    "caltech101": Recipe(3, ((12, 5),)),
    "oxford_pets": Recipe(1.17, ((7, 3),)),
    "stanford_cars": Recipe(3, ((20, 10),)),
    "oxford_flowers": Recipe(10, ((50, 50),)),
    "food101": Recipe(1.17, ((10, 10),)),
    "fgvc_aircraft": Recipe(5, ((30, 30),)),
    "sun397": Recipe(1.17, ((12, 10),)),
    "dtd": Recipe(2, ((13, 13),)),
    "eurosat": Recipe(2, ((12, 10),), 100),
    "ucf101": Recipe(3, ((7, 3),)),
}


def recipe(dataset: str | None, images: int) -> Recipe:
    """The authors' for a data set that they have.

    Ours for others, whose CLIP logits may be as poor as those of Flowers, where the authors set alpha to 10, or poorer:
    the search goes through their narrowest range, then through their widest; keys are trained at the alpha and beta
    that it finds without training; where an epoch is one step, for their 100 epochs of EuroSAT, the one of their sets
    of which that is true at 16 shots.
    """
    return RECIPES.get(dataset) or Recipe(None, ((7, 3), (50, 50)), 100 if images <= BATCH else 20)


class TipAdapter(Method):
    """logits = CLIP's + alpha * exp(-beta (1 - f K^T)) V: f (B, D) of length 1, keys K (N, D), V (N, C) one-hot labels.

    A key is the mean of an image's features over augmented passes, then scaled to length 1. alpha and beta are those of
    `search` on the validation images. A class without training images
    has no keys and keeps CLIP's logits.
    Ours: as many passes as the footing keeps, the authors' 10 at most; one template, where the authors take seven on
    ImageNet; the model's own logit scale for their 100; keys are computed in fp32 and stored in fp16, as theirs.
    """

    name, title, kind = "tip", "Tip-Adapter", "head"
    source = "Zhang et al., ECCV 2022; gaopengcuhk/Tip-Adapter, main.py, utils.py and configs"
    needs_val = True

    def fit(self, footing: Footing, state: State) -> Fit:
        """stored: keys (N, D) fp16, labels (N,) int32, alpha and beta () fp32. Raises UserError without validation
        images."""
        footing.need_val(self.name)
        return _searched(footing, state, _keys(footing, state), {})

    def restore(self, footing: Footing, state: State, stored: dict[str, Tensor]) -> State:
        """The formula of the class, over the logits of `state`."""
        keys, labels = stored["keys"].to(footing.device).float(), stored["labels"].to(footing.device).long()
        values = F.one_hot(labels, footing.classes).float()
        # As Python numbers: exact ones of fp32, the same on every device.
        alpha, beta = stored["alpha"].item(), stored["beta"].item()

        def logits(features: Tensor) -> Tensor:
            return state.logits(features) + alpha * votes(affinity(features, keys), values, beta)

        return State(state.model, state.stack, state.text, logits)


class TipAdapterF(TipAdapter):
    """Tip-Adapter with its keys trained, from the training-free ones, at the first alpha and beta of `recipe`.

    After every epoch the validation images are counted, and the keys of the best epoch are kept: the authors count test
    images there. Then alpha and beta are searched for as without training.
    Ours: keys are trained in fp32; epoch e sees the footing's augmented pass e modulo their number.
    """

    name, title = "tip_f", "Tip-Adapter-F"

    def fit(self, footing: Footing, state: State) -> Fit:
        """stored: as of TipAdapter. Raises UserError without validation images, or for a loss that is not finite."""
        footing.need_val(self.name)
        labels, first = footing.labels("train"), recipe(footing.config.dataset, len(footing.split.train))
        keys, values = _keys(footing, state), F.one_hot(labels, footing.classes).float()
        alpha, beta = first.alpha, INIT_BETA
        if alpha is None:
            alpha, beta = (_found(footing, state, keys.half())[key] for key in ("alpha", "beta"))
        keys.requires_grad_()
        val, truth = footing.features(state, "val"), footing.labels("val")
        # Once: under CoCoOp a text pass for every image.
        clip = state.logits(val)
        each = -(-len(labels) // BATCH)
        published = first.epochs * each
        steps, lr = footing.feature_steps(published), footing.rate(self.name, LR)
        images = augmented(footing, state, -(-steps // each))
        random = torch.Generator().manual_seed(footing.config.seed)

        def added(features: Tensor) -> Tensor:
            return alpha * votes(affinity(features, keys), values, beta)

        best, kept = (-1, 0), keys

        @torch.no_grad()
        def count(epoch: int) -> None:
            nonlocal best, kept
            hits = int(((clip + added(val)).argmax(-1) == truth).sum())
            if hits > best[0]:
                best, kept = (hits, epoch), keys.detach().clone()

        train_head(
            footing, torch.optim.AdamW([keys], lr, eps=EPS), cosine_rates(lr, steps),
            lambda epoch: shuffled(images(epoch), labels, BATCH, random), lambda f: state.logits(f) + added(f),
            self.name, count,
        )  # fmt: skip
        hits, epoch = best
        chosen = {
            "epoch": epoch + 1, "epoch_val_acc1": 100 * hits / len(truth), "lr": lr, "batch": BATCH,
            "epochs": first.epochs, "init_alpha": alpha, "init_beta": beta,
        }  # fmt: skip
        return _searched(footing, state, kept, chosen, keys.numel(), steps, published)


def affinity(features: Tensor, keys: Tensor) -> Tensor:
    """(B, D), (N, D) -> (B, N); features are scaled to length 1, keys are taken as they are."""
    return F.normalize(features.float(), dim=-1) @ keys.T


def votes(affinity: Tensor, values: Tensor, beta: float) -> Tensor:
    """(B, N), (N, C) -> (B, C): exp(-beta (1 - affinity)) @ values."""
    return torch.exp(beta * (affinity - 1)) @ values


def search(
    clip: Tensor, votes: Callable[[float], Tensor], truth: Tensor, scales: tuple[tuple[float, float], ...]
) -> dict[str, float]:
    """The alpha and beta that give the most images their label; of equals the first, betas in the outer loop.

    clip: (n, C) logits. votes: beta -> (n, C). truth: (n,). A grid, as the authors', from 0.1 up to below each scale.
    """
    best = {"val_acc1": -1.0}
    for scale in scales:
        betas, alphas = ([i * (top - 0.1) / n + 0.1 for i in range(n)] for top, n in zip(scale, SEARCH_STEPS))
        column = torch.tensor(alphas, device=clip.device)[:, None, None]
        hits = torch.stack([((clip + column * votes(beta)).argmax(-1) == truth).sum(-1) for beta in betas])
        score, at = 100 * int(hits.max()) / len(truth), hits.flatten().tolist().index(int(hits.max()))
        if score > best["val_acc1"]:
            best = {"alpha": alphas[at % len(alphas)], "beta": betas[at // len(alphas)], "val_acc1": score}
    return best


def _keys(footing: Footing, state: State) -> Tensor:
    views = range(min(AUGMENTED, footing.views))
    return F.normalize(sum(footing.features(state, "train", view) for view in views) / len(views), dim=-1)


def _found(footing: Footing, state: State, keys: Tensor) -> dict[str, float]:
    """`search` for keys as they are stored."""
    labels, val = footing.labels("train"), footing.features(state, "val")
    near, values = affinity(val, keys.float()), F.one_hot(labels, footing.classes).float()
    scales = recipe(footing.config.dataset, len(labels)).scales
    return search(state.logits(val), lambda beta: votes(near, values, beta), footing.labels("val"), scales)


def _searched(
    footing: Footing, state: State, keys: Tensor, chosen: dict, trained: int = 0, steps: int = 0,
    published: int | None = None,
) -> Fit:  # fmt: skip
    labels, kept = footing.labels("train"), keys.half()
    found = _found(footing, state, kept)
    stored = {
        "keys": kept.cpu(), "labels": labels.int().cpu(),
        "alpha": torch.tensor(found["alpha"]), "beta": torch.tensor(found["beta"]),
    }  # fmt: skip
    scales = [list(scale) for scale in recipe(footing.config.dataset, len(labels)).scales]
    chosen = found | {"scales": scales, "views": min(AUGMENTED, footing.views)} | chosen
    return Fit(stored, trained, chosen, steps, published)
