"""Adam over mask scores: one call does all weight-sized work of a step, for every layer at once.

Where `rmt.backward` has left both gradients in this optimizer's buffers that is gradient dropout, L2 term, Adam,
threshold, repacking and the refreshed masked weight; where `.grad` is set, all but the first two.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

import rmt_kernels

from .gradients import Dropout, Gradients
from .masked import Mask, masks
from .row_shards import RowShards
from .shards import Shards

# Formats of Adam's two moments -> bytes a score. bf16 and 8 bits are rounded stochastically: see mask_update_.
STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
BLOCK = 256  # scores that share an exponent in 8 bits


class MaskAdam(torch.optim.Optimizer):
    """`torch.optim.Adam` (no weight decay) fused with gradient dropout, thresholding and repacking.

    Args:
        model: a model with masked modules, or their masks.
        lr: step size, a number or a 0-d tensor on the scores' device. Learning-rate schedulers of torch work.
        betas, eps: Adam's.
        state: format of the moments: "fp32" (8 bytes a score), "bf16" (4) or "8bit" (2).
        capturable: count steps on the device, as a CUDA graph needs it.

    Raises: ValueError where there is nothing to train, masks differ in threshold, or for an unknown state.
    """

    def __init__(
        self, model: nn.Module | Iterable[Mask], lr: float | Tensor = 8e-5, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, state: str = "fp32", capturable: bool = False,
    ) -> None:  # fmt: skip
        self.masks = masks(model) if isinstance(model, nn.Module) else list(model)
        if not self.masks:
            raise ValueError("the model has no masked weights: swap some layers for rmt's masked ones first")
        thresholds = {m.module.threshold for m in self.masks}
        if len(thresholds) > 1:
            raise ValueError(f"all masks must have one threshold, got {sorted(thresholds)}")
        self.threshold = thresholds.pop()
        for name, value in {"lr": float(lr), "eps": eps}.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number from 0 up, got {value!r}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas!r}")
        if state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)}, got {state!r}")
        step = torch.zeros((), dtype=torch.int64, device=self.masks[0].scores.device) if capturable else 0
        self._reset(state, capturable)
        super().__init__([m.scores for m in self.masks], {"lr": lr, "betas": betas, "eps": eps, "step": step})

    def _reset(self, state: str, capturable: bool) -> None:
        self.state_format, self.capturable = state, capturable
        self.gradients = Gradients(self.masks)
        # Of several processes each of which updates masks, or rows of masks, of its own alone.
        self.shards: Shards | RowShards | None = None
        # Of a batch in parts: what the parts so far came with. Of the next step: what it is to do with its gradients.
        self.parts: Dropout | None = None
        self._dropout: Dropout | None = None
        device = self.masks[0].scores.device
        self._norms = torch.zeros(len(self.masks), device=device)
        self.counts = torch.zeros(len(self.masks), 2, dtype=torch.int64, device=device)
        # The masks' versions that norms, and counts, belong to.
        self._seen: tuple | None = None
        self._counted: tuple | None = None
        self._some_off = False
        self._made: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict:
        kept = {"masks", "threshold", "state_format", "capturable"}
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "masks" in state:  # a copy, not a loaded state dict
            self._reset(self.state_format, self.capturable)
            self._adopt_norms()

    def take(self, dropout: Dropout, more: bool) -> None:
        """What `rmt.backward` calls once it has filled `gradients`: the next step is of them, unless there are more."""
        self.parts, self._dropout = (dropout, None) if more else (None, dropout)

    def send_away(self) -> None:
        """Frees the scores of the masks that `shards` gives to others; norms, of a loaded state too, stay."""
        self._refresh_norms()
        self.shards.send_away()
        self._seen, self._counted = self._versions(), None

    def _mine(self, live: list[int]) -> list[int]:
        return live if self.shards is None else [i for i in live if self.shards.mine(i)]

    @torch.no_grad()
    def combine(self, rule: Callable[[Tensor, Tensor, Dropout, int], Tensor]) -> None:
        """One gradient of the two that every mask holds, in place of the next step's own dropout.

        rule: (a, b, dropout, stream) -> gradient, all of the scores' shape; `a` has the L2 term in it already.
        """
        dropout = self._dropout
        self._refresh_norms()
        for i in self._mine(self.gradients.live):
            mask = self.masks[i]
            a, b, chained = self.gradients.pair(i, general=True)
            a, b = (a * mask.weight, b * mask.weight) if chained else (a, b)
            if dropout.l2:
                # As the fused update has it, 0 / 0 kept out.
                a = a + dropout.l2 / self._norms[i].clamp_min(torch.finfo(torch.float32).tiny) * mask.scores
            self.gradients.replace(i, rule(a, b, dropout, i))
        self._dropout = replace(dropout, general=False, l2=0.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients, those in the buffers too."""
        self.parts = self._dropout = None
        self.gradients.clear()
        super().zero_grad(set_to_none)

    def set_lr(self, lr: float) -> None:
        """Of the next step; a learning rate on the device is written there."""
        group = self.param_groups[0]
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's. Raises ValueError where the moments have another format."""
        want = STATES[self.state_format]
        for state in state_dict["state"].values():
            if state["exp_avg"].dtype != want:
                raise ValueError(f"moments must be {want} (state={self.state_format!r}), got {state['exp_avg'].dtype}")
        groups = self.param_groups
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, groups):
            for name in ("step", "lr"):
                if isinstance(before[name], Tensor):
                    group[name] = before[name].copy_(torch.as_tensor(group[name]))
        # torch gives every moment the dtype of its scores, fp32, which holds the others exactly.
        for state in self.state.values():
            state |= {k: v.to(torch.uint8 if k.endswith("scale") else want) for k, v in state.items() if k != "norm"}
        self._adopt_norms()

    def _adopt_norms(self) -> None:
        """Takes over the norms that a loaded state brings, if they are those of the scores, to go on to the same bits.

        The update's own sums and torch's norm differ in the last bits.
        """
        self._refresh_norms()
        for norm, mask in zip(self._norms, self.masks):
            state = self.state.get(mask.scores)
            if state:
                if "norm" in state and torch.isclose(state["norm"], norm, rtol=1e-4):
                    norm.copy_(state["norm"])
                state["norm"] = norm

    def _refresh_norms(self) -> None:
        """Norms of the scores as they are, unless the last step has left them."""
        if self._seen != self._versions():
            self._follow_the_scores()
            with torch.no_grad():
                norms = torch.stack([m.scores.norm() for m in self.masks])
                self._norms.copy_(self.shards.whole_norms(norms) if self.shards else norms)
            self._seen = self._versions()

    def _follow_the_scores(self) -> None:
        """To another device, where a model has been moved after its optimizer was made."""
        device = self.masks[0].scores.device
        if self._norms.device != device:
            self._norms, self.counts, self._made = self._norms.to(device), self.counts.to(device), {}
            for norm, mask in zip(self._norms, self.masks):
                if self.state[mask.scores]:
                    self.state[mask.scores]["norm"] = norm

    def all_on(self) -> bool:
        """Whether every bit of every mask is on: the model is then the frozen one, bit for bit.

        Steps count bits as they go. Here they are counted anew where scores have changed otherwise. Waits for the
        device until a bit is off; from then on the answer is no, without asking, even if all should come on again.
        """
        if self._counted != self._versions():
            # Of rows, a rank may have none.
            on = [m.bits.numel() and int(rmt_kernels.unpack_bits(m.bits, m.weight.shape[1]).sum()) for m in self.masks]
            on = torch.tensor(on, device=self.counts.device)
            self.counts[:, 1] = self.shards.whole_counts(on) if self.shards else on
            self._counted, self._some_off = self._versions(), False
        if not self._some_off:
            self._some_off = self.counts[:, 1].tolist() != [m.size for m in self.masks]
        return not self._some_off

    def _versions(self) -> tuple:
        return tuple(
            v for m in self.masks for v in (m.scores._version, rmt_kernels.checks.address(m.scores), m.bits._version)
        )

    @torch.no_grad()
    def step(self, closure=None):
        """One Adam step; returns the closure's loss. Masks whose scores have no gradient keep theirs."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dropout, self._dropout = self._dropout, None
        live = self.gradients.live if dropout else [i for i, m in enumerate(self.masks) if m.scores.grad is not None]
        if not live:
            return loss
        group = self.param_groups[0]
        # One count for all: a mask that had no gradient in some step is bias-corrected as if it had.
        group["step"] += 1
        mine = self._mine(live)
        for i in mine:
            self._make_state(i)
        counted = len(live) == len(self.masks) or self._counted == self._versions()
        self._refresh_norms()
        step = torch.as_tensor(group["step"], device=self._norms.device)
        factors = rmt_kernels.adam_factors(step, group["lr"], *group["betas"])
        # One launch for all that are alike: in whether they are compact, and in the dtypes of weight and kept weight.
        parts: dict[tuple, list[int]] = {}
        for i in mine:
            parts.setdefault(self._kind(i), []).append(i)
        try:
            for kind, part in parts.items():
                self._update(part, dropout, factors, step, compact=not kind)
        except ValueError:
            if self.shards:
                self.shards.tell(self.counts, self._norms, live, failed=True)
            raise
        if self.shards:
            self.shards.tell(self.counts, self._norms, live)
        self.gradients.clear()
        self._seen = self._versions()
        self._counted = self._seen if counted else None
        return loss

    def _make_state(self, i: int) -> None:
        scores = self.masks[i].scores
        if not self.state[scores]:
            dtype = STATES[self.state_format]
            state = {name: torch.zeros_like(scores, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
            if dtype == torch.uint8:
                blocks = -(-scores.numel() // BLOCK)
                state |= {f"{name}_scale": scores.new_zeros(blocks, dtype=torch.uint8) for name in list(state)}
            self.state[scores] = state | {"norm": self._norms[i]}

    def _update(self, live: list[int], dropout: Dropout | None, factors: Tensor, step: Tensor, compact: bool) -> None:
        found, group = [self.masks[i] for i in live], self.param_groups[0]
        # Compact scores (S,) go as one row, with words of their own.
        rows = [m.scores.view(1, -1) if compact else m.scores for m in found]
        states = [self.state[m.scores] for m in found]
        averages = [[s[name].view_as(r) for s, r in zip(states, rows)] for name in ("exp_avg", "exp_avg_sq")]
        words = (rmt_kernels.pack_scores(r.detach(), self.threshold) for r in rows)
        bits = list(words) if compact else [m.bits for m in found]
        grads, options = self._gradients(live, rows, dropout, step)
        if not compact:
            dense = [kept for m in found if (kept := m.kept) is not None]
            options |= {"weights": [m.weight.contiguous() for m in found], "dense": dense}
            options |= {"offsets": [m.offset for m in found]}
        if self.state_format == "8bit":
            options |= {"scales": [s[name] for s in states for name in ("exp_avg_scale", "exp_avg_sq_scale")]}
        where, others = self._places(live)
        norms, counts = self._norms.index_select(0, where), self.counts.index_select(0, where)
        rmt_kernels.mask_update_(
            rows, bits, *averages, grads, factors, **options, norms=norms, counts=counts, beta1=group["betas"][0],
            beta2=group["betas"][1], eps=group["eps"], threshold=self.threshold,
        )  # fmt: skip
        counts[:, 1] += others
        self._norms.index_copy_(0, where, norms)
        self.counts.index_copy_(0, where, counts)
        for mask in found:
            mask.refresh() if compact else mask.mark_fresh()

    def _places(self, live: list[int]) -> tuple[Tensor, Tensor]:
        """(L,) positions of these masks, and (L,) how many weights of each have no score.

        Made once: a CUDA graph may not copy from the host.
        """
        key = tuple(live)
        if key not in self._made:
            others = [self.masks[i].weight.numel() - self.masks[i].scores.numel() for i in live]
            self._made[key] = tuple(torch.tensor(v, device=self.counts.device) for v in (live, others))
        return self._made[key]

    def _gradients(
        self, live: list[int], rows: list[Tensor], dropout: Dropout | None, step: Tensor
    ) -> tuple[list[Tensor], dict]:
        """The task gradients, and the options of `mask_update_` that go with them."""
        options = {"streams": live}
        if dropout is None:
            # The moments' stochastic rounding draws, whether gradients are dropped or not.
            options |= {"rng": torch.stack([torch.zeros_like(step), step])}
            return [self.masks[i].scores.grad.view_as(r) for i, r in zip(live, rows)], options
        pairs = [self.gradients.pair(i, dropout.general) for i in live]
        options |= {"rng": dropout.rng, "strength": dropout.strength, "l2": dropout.l2}
        options |= {"chained": [chained for *_, chained in pairs]}
        if dropout.general:
            options |= {"generals": [b.view_as(r) for (_, b, _), r in zip(pairs, rows)]}
        return [a.view_as(r) for (a, *_), r in zip(pairs, rows)], options

    def _kind(self, i: int) -> tuple:
        """What masks of one launch have in common: dtypes of weight and kept weight; nothing of compact scores."""
        mask = self.masks[i]
        return (mask.weight.dtype, getattr(mask.kept, "dtype", None)) if mask.selected is None else ()
