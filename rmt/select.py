"""Importance identification: which weights of a plain model get a score at all, before any tuning.

    chosen = rmt.select(model, batches, criterion="snip", budget=0.05, loss=clip_loss(text_features))
    model = rmt.get_mask_model(model, config, chosen)

The paper claims it and the official code lacks it; the criteria are in `rmt.criteria`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmt_kernels

from .budget import pools_of, single, top, whole
from .clip import logits
from .config import MaskConfig, SelectConfig, UserError
from .criteria import DATA_FREE, SCORES, magnitude
from .evidence import Candidate, Loss
from .masked import masks
from .masking import find_targets
from .named import is_attention

DEFAULT = MaskConfig()


@dataclass(frozen=True, eq=False)
class Selection:
    """Which weights are to be masked.

    Args:
        words: mask key -> (N, ceil(K / 32)) int32 bitmap, for every candidate weight, also those without a one.
        shapes: mask key -> (N, K).
        criterion, budget, scope, unit: as `select` was called.
    """

    words: dict[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    criterion: str
    budget: float
    scope: str
    unit: str

    def rows(self) -> list[dict[str, Any]]:
        """One row a candidate weight: key, chosen, total, percent."""
        rows = []
        for key, (n, k) in self.shapes.items():
            chosen = int(rmt_kernels.unpack_bits(self.words[key], k).sum())
            rows.append({"key": key, "chosen": chosen, "total": n * k, "percent": 100 * chosen / (n * k)})
        return rows

    def report(self) -> str:
        """`rows` as a text table, with their sum at the end."""
        rows = self.rows()
        chosen, total = (sum(row[name] for row in rows) for name in ("chosen", "total"))
        rows.append({"key": "all", "chosen": chosen, "total": total, "percent": 100 * chosen / total})
        width = max(len(row["key"]) for row in rows)
        head = f"criterion {self.criterion}, budget {self.budget:g}, scope {self.scope}, unit {self.unit}"
        lines = [head, f"{'weight':{width}}  {'chosen':>11}  {'total':>11}  {'%':>6}"]
        lines += [f"{r['key']:{width}}  {r['chosen']:>11,}  {r['total']:>11,}  {r['percent']:6.2f}" for r in rows]
        return "\n".join(lines)


def select(
    model: nn.Module, batches: Iterable = (), *, criterion: str, budget: float = 0.1, scope: str = "global",
    unit: str = "weight", config: MaskConfig = DEFAULT, loss: Loss | None = None,
) -> Selection:  # fmt: skip
    """Ranks the weights that `config` would mask and chooses the most important ones. The model is left as it was.

    Gradients are taken in eval mode, of the candidates alone. Scores take 4 bytes a candidate weight, and as much again
    for the criteria with gradients while they run. Ties go to the weight that comes first.

    Args:
        model: without masks. batches: whatever `loss` takes; criteria magnitude and lamp need none.
        criterion: one of `rmt.config.CRITERIA`; each is described in `rmt.criteria`.
        budget: share of the candidate weights that is chosen, rounded, at least one weight.
        scope: what the budget holds for: all candidates together (global), each weight matrix (layer), or each tower
            (modality). For multiflow: where magnitudes are ranked, for the count that each layer gets; the paper's is
            modality, which is the same as global for one tower.
        unit: weight; or module: whole weight matrices by their mean score. Those are taken from the best on as long as
            they fit into the budget of weights, the best one always.
        config: names the candidates, as for `rmt.get_mask_model`.
        loss: callable (model, batch) -> scalar; `clip_loss` makes one for (image, label) batches.

    Raises: UserError for a choice that is unknown or makes no sense, no batches, a model with masks, and gradients that
        are missing or not finite.
    """
    _check(model, criterion, budget, scope, unit, loss)
    found = candidates(model, config)
    scores = _scores(model, found, criterion, batches, loss)
    pools = pools_of([c.key for c in found], scope)
    if unit == "module":
        taken = whole([float(s.mean()) for s in scores], [c.weight.numel() for c in found], pools, budget)
        chosen = [torch.full_like(c.matrix(), i in taken, dtype=torch.bool) for i, c in enumerate(found)]
    elif criterion == "multiflow":
        counts = [int(places.sum()) for places in single(magnitude(model, found), pools, budget)]
        chosen = [top([s], count)[0] for s, count in zip(scores, counts)]
    else:
        chosen = single(scores, pools, budget)
    return Selection(
        {c.key: rmt_kernels.pack_bits(b) for c, b in zip(found, chosen)},
        {c.key: tuple(b.shape) for c, b in zip(found, chosen)}, criterion, budget, scope, unit,
    )  # fmt: skip


def clip_loss(text: Tensor) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Cross entropy of (image, label) batches over all classes, for a CLIP.

    text: (C, D) L2-normalised text features; or (C, L) integer tokens, encoded anew for every batch, which a selection
        in the text tower needs.
    """

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        image, label = batch
        features = text if text.is_floating_point() else F.normalize(model.encode_text(text).float(), dim=-1)
        return F.cross_entropy(logits(model, image, features), label)

    return loss


def candidates(model: nn.Module, config: MaskConfig) -> list[Candidate]:
    """The weights that `config` would mask, by the keys that their masks would have."""
    found = []
    for name in find_targets(model, config):
        module = model.get_submodule(name)
        names = ("in_proj_weight", "out_proj.weight") if is_attention(module) else ("weight",)
        for weight in names:
            try:
                found.append(Candidate(f"{name}.{weight}", model.get_parameter(f"{name}.{weight}"), module))
            except AttributeError as error:
                raise UserError(f"{name} ({type(module).__name__}) has no parameter {weight} to select in") from error
    return found


def _check(model: nn.Module, criterion: str, budget: float, scope: str, unit: str, loss: Loss | None) -> None:
    if criterion is None:
        raise UserError(f"criterion must be one of {', '.join(SCORES)}, got None")
    SelectConfig(criterion, budget, scope, unit)
    if unit == "module" and scope == "layer":
        raise UserError("scope layer leaves no choice among whole modules: unit module needs global or modality")
    if unit == "module" and criterion == "multiflow":
        raise UserError("criterion multiflow ranks weights within their layer only: it needs unit weight, got module")
    if loss is None and criterion not in DATA_FREE:
        raise UserError(f"criterion {criterion} needs a loss (model, batch) -> scalar, got None: see clip_loss")
    if masks(model):
        raise UserError("select needs a plain model, got one with masks: select first, then mask")


def _scores(
    model: nn.Module, found: list[Candidate], criterion: str, batches: Iterable, loss: Loss | None
) -> list[Tensor]:
    if criterion in DATA_FREE:
        scores = SCORES[criterion](model, found)
    else:
        batches = iter(batches)
        first = list(itertools.islice(batches, 1))
        if not first:
            raise UserError(f"criterion {criterion} needs at least one batch, got none")
        with _ready(model, found):
            scores = SCORES[criterion](model, found, itertools.chain(first, batches), loss)
    for c, s in zip(found, scores):
        if not s.isfinite().all():
            raise UserError(f"importance must be finite, but {criterion} is not for {c.key}")
    return scores


@contextlib.contextmanager
def _ready(model: nn.Module, found: list[Candidate]) -> Iterator[None]:
    """Inside, the model is in eval mode, where no BatchNorm statistic moves, and gradients reach candidates alone."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for c in found:
            c.weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
