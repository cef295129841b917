"""Compact storage: scores of a layer's selected weights only. All other weights are on for good.

`selected` is a bitmap as bits are, (N, ceil(K / 32)) int32, with S ones; scores are (S,), in row-major order of the
weights they belong to. Scores, gradient and Adam's moments then take 16 S bytes in place of 16 N K. The matrix of
scores that the products' straight-through gradient is routed by is a stand-in without storage; its (N, K) gradient
lives until the S elements of it are gathered. Gradient dropout draws by an element's place in the compact vector: with
everything selected that is the draw of the full matrix.
"""

import torch
from torch import Tensor, nn

import rmt_kernels


def check_selected(name: str, selected: Tensor, rows: int, in_features: int) -> None:
    """Raises ValueError where `selected` is no bitmap of an (N, K) weight: shape, dtype, or a pad bit that is set."""
    want = (rows, -(-in_features // 32))
    if not isinstance(selected, Tensor) or selected.dtype != torch.int32 or tuple(selected.shape) != want:
        got = f"{selected.dtype} {tuple(selected.shape)}" if isinstance(selected, Tensor) else repr(selected)
        raise ValueError(f"{name} must be int32 {want}, got {got}")
    if in_features % 32 and (selected[:, -1] >> in_features % 32 & (1 << 32 - in_features % 32) - 1).any():
        raise ValueError(f"{name} must have pad bits of 0 from column {in_features} on, got some that are set")


def expand_bits(on: Tensor, selected: Tensor, in_features: int) -> Tensor:
    """(S,) bool: which selected weights are on; (N, ceil(K / 32)) selected -> (N, ceil(K / 32)) bits of all weights.

    bits = not selected | `on` deposited in the selected places, pad bits 0. Costs N K bytes twice while it runs.
    """
    chosen = rmt_kernels.unpack_bits(selected, in_features)
    return rmt_kernels.pack_bits(chosen.logical_not().masked_scatter_(chosen, on))


def capturing(tensor: Tensor) -> bool:
    """Whether work on the tensor's device goes into a CUDA graph: nothing may wait, and a replay knows addresses."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def gather(matrix: Tensor, selected: Tensor, count: int) -> Tensor:
    """The S = count elements of an (N, K) matrix at the selected places, (S,)."""
    chosen = rmt_kernels.unpack_bits(selected, matrix.shape[1])
    if not (torch.compiler.is_compiling() or capturing(matrix)):
        return matrix.masked_select(chosen)
    # masked_select's shape depends on values, which a full graph cannot have and a capture may not wait for. All others
    # go to one place past the end.
    place = chosen.flatten().cumsum(0) - 1
    place = torch.where(chosen.flatten(), place, count)
    return matrix.new_zeros(count + 1).scatter(0, place, matrix.flatten())[:count]


def pack_compact(scores: Tensor, threshold: float, selected: Tensor, in_features: int) -> Tensor:
    """(S,) scores -> (N, ceil(K / 32)) bits. Raises ValueError for NaN scores, as `rmt_kernels.pack_scores`."""
    if not scores.numel():
        return expand_bits(scores.bool(), selected, in_features)
    words = rmt_kernels.pack_scores(scores.view(1, -1), threshold)
    return expand_bits(rmt_kernels.unpack_bits(words, scores.numel())[0], selected, in_features)


class StandIn(torch.autograd.Function):
    """(S,) scores -> an (N, K) matrix of one stored element, whose gradient comes back gathered: (S,)."""

    @staticmethod
    def forward(scores: Tensor, selected: Tensor, in_features: int) -> Tensor:
        return scores.new_zeros(()).expand(selected.shape[0], in_features)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        scores, selected, _ = inputs
        ctx.save_for_backward(selected)
        ctx.count = scores.numel()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gather(gradient, ctx.saved_tensors[0], ctx.count), None, None


class ScoreStorage(nn.Module):
    """A masked module's scores: one for every weight, (N, K), or for the selected ones only, (S,)."""

    init: float
    threshold: float
    # Prefixes whose scores another process keeps. Their bits are told, not packed.
    _away: frozenset[str] = frozenset()
    # And of them those whose masked weight each product makes anew.
    _unkept: frozenset[str] = frozenset()

    def _weight(self, prefix: str) -> Tensor:
        """(N, K) view of the frozen weight; a convolution's K is C * kh * kw."""
        return self._parameters[prefix + "weight"].flatten(1)

    def _selected(self, prefix: str) -> Tensor | None:
        return self._buffers.get(prefix + "selected")

    def select(self, prefix: str, words: Tensor) -> None:
        """Give `{prefix}weight` scores for its selected weights alone, a new parameter (S,) of init; the rest is on.

        words: (N, ceil(K / 32)) int32, copied. Raises ValueError for a wrong shape, dtype or a pad bit that is set.
        """
        weight, old = self._weight(prefix), self._parameters[prefix + "scores"]
        check_selected("words", words, *weight.shape)
        words = words.to(weight.device, copy=True).contiguous()
        count = int(rmt_kernels.unpack_bits(words, weight.shape[1]).sum())
        scores = torch.full((count,), self.init, dtype=torch.float32, device=weight.device)
        # Without elements there is nothing to train: `masks` leaves such a weight out.
        self.register_parameter(prefix + "scores", nn.Parameter(scores, old.requires_grad and count > 0))
        self.register_buffer(prefix + "selected", words)
        self._buffers[prefix + "bits"] = self._packed_bits(prefix)

    def send_away(self, prefix: str, keep: bool = True) -> None:
        """Frees the scores of `{prefix}weight`: they are kept elsewhere, and their bits told (`rmt.shards`).

        In their place is NaN without storage, of the same shape: who would read it fails, or gets NaN. Bits stay; keep:
        and so does the masked weight.
        """
        scores = self._parameters[prefix + "scores"]
        scores.data = scores.detach().new_full((), float("nan")).expand(scores.shape)
        self._away = self._away | {prefix}
        self._unkept = self._unkept if keep else self._unkept | {prefix}

    def bring_back(self, prefix: str, values: Tensor) -> None:
        """Takes values, of the scores' shape, as the scores of `{prefix}weight` that were sent away; not a copy."""
        self._parameters[prefix + "scores"].data = values
        self._away, self._unkept = self._away - {prefix}, self._unkept - {prefix}

    def _packed_bits(self, prefix: str) -> Tensor:
        """(N, ceil(K / 32)) int32 bits of the scores as they are now. Raises ValueError where one is NaN."""
        if prefix in self._away:
            return self._buffers[prefix + "bits"]
        scores, selected = self._parameters[prefix + "scores"].detach(), self._selected(prefix)
        if selected is None:
            return rmt_kernels.pack_scores(scores, self.threshold)
        return pack_compact(scores, self.threshold, selected, self._weight(prefix).shape[1])

    def _routed_scores(self, prefix: str) -> Tensor:
        """(N, K) scores for a product to send its gradient to: the parameter, or a compact one's stand-in."""
        scores, selected = self._parameters[prefix + "scores"], self._selected(prefix)
        return scores if selected is None else StandIn.apply(scores, selected, self._weight(prefix).shape[1])
