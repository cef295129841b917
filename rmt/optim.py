"""Adam over mask scores: one call updates every layer's scores, bits and cached masked weight."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import rmt_kernels

from .masked import Mask, masks


class MaskAdam(torch.optim.Optimizer):
    """`torch.optim.Adam` (no weight decay) fused with thresholding and repacking.

    Args:
        model: a model with masked modules, or their masks.
        lr: step size. Learning-rate schedulers of torch work.
        betas, eps: Adam's.

    Raises: ValueError where there is nothing to train, or masks differ in threshold.
    """

    def __init__(
        self, model: nn.Module | Iterable[Mask], lr: float = 8e-5, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:  # fmt: skip
        self.masks = masks(model) if isinstance(model, nn.Module) else list(model)
        if not self.masks:
            raise ValueError("the model has no masked weights: swap some layers for rmt's masked ones first")
        thresholds = {m.module.threshold for m in self.masks}
        if len(thresholds) > 1:
            raise ValueError(f"all masks must have one threshold, got {sorted(thresholds)}")
        self.threshold = thresholds.pop()
        for name, value in {"lr": lr, "eps": eps}.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number from 0 up, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas!r}")
        super().__init__([m.scores for m in self.masks], {"lr": lr, "betas": betas, "eps": eps, "step": 0})

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"masks": self.masks, "threshold": self.threshold}

    @torch.no_grad()
    def step(self, closure=None):
        """One Adam step; returns the closure's loss. Masks whose scores have no gradient keep theirs."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        live = [m for m in self.masks if m.scores.grad is not None]
        if not live:
            return loss
        # One count for all: a mask that had no gradient in some step is bias-corrected as if it had.
        step = group["step"] = group["step"] + 1
        for mask in live:
            if not self.state[mask.scores]:
                averages = (torch.zeros_like(mask.scores) for _ in range(2))
                self.state[mask.scores] = dict(zip(("exp_avg", "exp_avg_sq"), averages))
        step = torch.tensor(step, device=live[0].scores.device)
        factors = rmt_kernels.adam_factors(step, group["lr"], *group["betas"])
        self._update_full([m for m in live if m.selected is None], factors)
        self._update_compact([m for m in live if m.selected is not None], factors)
        return loss

    def _update_full(self, live: list[Mask], factors: Tensor) -> None:
        self._update(
            live, [m.scores for m in live], [m.bits for m in live], factors,
            dense=[m.dense for m in live], weights=[m.weight.contiguous() for m in live],
        )  # fmt: skip
        for mask in live:
            mask.module.mark_fresh(mask.prefix)

    def _update_compact(self, live: list[Mask], factors: Tensor) -> None:
        rows = [m.scores.view(1, -1) for m in live]
        words = [torch.empty(1, -(-r.shape[1] // 32), dtype=torch.int32, device=r.device) for r in rows]
        self._update(live, rows, words, factors)
        for mask in live:
            mask.refresh()

    def _update(
        self, live: list[Mask], scores: list[Tensor], bits: list[Tensor], factors: Tensor, **dense: list[Tensor]
    ) -> None:
        group, states = self.param_groups[0], [self.state[m.scores] for m in live]
        averages = [[s[name].view_as(v) for s, v in zip(states, scores)] for name in ("exp_avg", "exp_avg_sq")]
        rmt_kernels.mask_update_(
            scores, bits, *averages, [m.scores.grad.view_as(v) for m, v in zip(live, scores)], factors, **dense,
            beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"], threshold=self.threshold,
        )  # fmt: skip
