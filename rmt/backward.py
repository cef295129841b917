"""One call that runs both cotangents and leaves the dropped-out gradient in every layer's `scores.grad`."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

import rmt_kernels

from .masked import Mask, masks

Loss = Tensor | tuple[Tensor, Tensor]


def backward(
    task: Loss, general: Loss | None, model: nn.Module | Iterable[Mask], *, strength: float = 1.0,
    seed: int | Tensor = 0, step: int | Tensor = 0, l2: float = 1e-4, retain_graph: bool = False,
    pending: list | None = None, more: bool = False,
) -> None:  # fmt: skip
    """Sets `scores.grad` of every masked weight from two losses, with gradient dropout.

    A layer of few rows (M <= K) hands its two output cotangents, taken from the graph, to `rmt_kernels.mask_grad` in
    one go. For a layer of more rows keeping cotangents (M, N) until the second pass is done would cost more memory than
    gradients (N, K): autograd then makes the two score gradients as it goes, and only the dropout follows. So it does
    where the graph does not show a layer's products (inside `torch.compile`, or scores used in some other way). The
    numbers are the same. A layer used more than once contributes all its rows. `.grad` is replaced, not added to:
    dropout is nonlinear, so adding dropped-out gradients of two batches is not the gradient of both.

    Args:
        task: scalar loss, or a pair (tensor, its cotangent).
        general: the same for the loss that ties the model to zero-shot CLIP, or None for no dropout.
        model: whose masks are meant, or those masks. A mask's position is its random stream.
        strength: R-AMT's lambda, in [0, 1]: 1 zeroes dropped elements, 0 is no dropout.
        seed, step: every draw depends on them, the mask's position and the element; 0-d int64 tensors stay on device.
        l2: coefficient of the per-tensor L2 norm (not squared) that joins the task gradient before the dropout.
        retain_graph: keep the graph for another call.
        pending, more: for a batch that comes in parts. `pending` is one list for all of them, empty at first; with
            `more` the part's two gradients are added to it, apart from each other, and `.grad` is left alone; the last
            part, without `more`, adds its own, drops out, sets `.grad` and empties the list. Losses must be weighted
            by the parts' shares of the batch. Keeps both gradients of every mask: two times its scores.

    Raises: ValueError where nothing masked is reached from `task`, or for a strength outside [0, 1].
    """
    found = masks(model) if isinstance(model, nn.Module) else list(model)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength!r}")
    losses = [_pair(loss) for loss in (task, general) if loss is not None]
    uses, opaque = _plan([output for output, _ in losses], found)
    if pending is not None:
        uses, opaque = {}, sorted({*uses, *opaque})
    if not uses and not opaque:
        raise ValueError(f"the task loss does not depend on any of the {len(found)} masked weights given")
    edges = [GradientEdge(node, 0) for nodes in uses.values() for node in nodes]
    rng = torch.stack([torch.as_tensor(v, dtype=torch.int64, device=found[0].scores.device) for v in (seed, step)])
    options = {"l2": l2, "rng": rng, "strength": strength}
    keep, pairs, left = retain_graph or bool(edges), [], []
    with _taken(uses):
        for n, loss in enumerate(losses):
            waiting = left[0] if left and pending is None else {}
            with _dropped_on_arrival(found, waiting, options):
                cotangents, rest = _grads(loss, edges, found, opaque, keep or n + 1 < len(losses))
            pairs.append(cotangents)
            left.append(rest)
    with torch.no_grad():
        if pending is not None:
            left = _added(pending, left)
            pending[:] = [left] if more else []
        if not more:
            _set_fused(found, uses, list(zip(*pairs)), options)
            _set_left(found, opaque, left, options)


def _grads(loss: tuple, edges: list, found: list[Mask], opaque: list[int], keep: bool) -> tuple[tuple, dict]:
    """Cotangents at `edges`, and {mask: gradient of its scores}, None where the loss does not reach them."""
    output, cotangent = loss
    inputs = edges + [found[i].scores for i in opaque]
    got = torch.autograd.grad(output, inputs, cotangent, keep, allow_unused=True)
    return got[: len(edges)], dict(zip(opaque, got[len(edges) :]))


@contextlib.contextmanager
def _dropped_on_arrival(found: list[Mask], waiting: dict[int, Tensor | None], options: dict) -> Iterator[None]:
    """Inside, a general gradient that reaches scores is dropped out with the task gradient that waits for it.

    Done after the pass, both gradients of every mask would live until then. What is dropped out waits no longer.
    """

    def hook(i: int):
        return lambda b: _dropped(found[i], i, waiting.pop(i), b, options)

    handles = [found[i].scores.register_hook(hook(i)) for i, a in waiting.items() if a is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _taken(uses: dict[int, list]) -> Iterator[None]:
    """Inside, products whose cotangents are taken make no gradient of their scores: it would be thrown away."""
    nodes = [node for nodes in uses.values() for node in nodes]
    for node in nodes:
        node.rmt_taken = True
    try:
        yield
    finally:
        for node in nodes:
            node.rmt_taken = False


def _added(pending: list, left: list[dict]) -> list[dict]:
    """This part's gradients and those of the parts before it, task and general apart."""
    if not pending:
        return left
    if [part.keys() for part in pending[0]] != [part.keys() for part in left]:
        raise ValueError("all parts of a batch must reach the same masks, by the same losses")
    return [{i: _sum(a[i], b[i]) for i in a} for a, b in zip(pending[0], left)]


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _pair(loss: Loss) -> tuple[Tensor, Tensor | None]:
    output, cotangent = loss if isinstance(loss, tuple) else (loss, None)
    if not isinstance(output, Tensor) or output.grad_fn is None:
        raise ValueError("a loss must be a tensor with a graph, or a pair (tensor with a graph, cotangent)")
    if cotangent is None and output.numel() != 1:
        raise ValueError(f"a loss without cotangent must be a scalar, got shape {tuple(output.shape)}")
    return output, cotangent


def _plan(outputs: list[Tensor], found: list[Mask]) -> tuple[dict[int, list], list[int]]:
    """Returns {mask: nodes of its products} where the cotangents are taken, and the masks left to autograd.

    Left to autograd: scores used in any other way, more rows than columns, or losses that do not share their products
    (two forwards).
    """
    index = {id(mask.scores): i for i, mask in enumerate(found)}
    walks = [_uses(output, index) for output in dict.fromkeys(outputs)]
    uses, opaque = walks[0]
    for others, other_opaque in walks[1:]:
        opaque |= (other_opaque & uses.keys()) | {i for i in uses if set(uses[i]) != set(others.get(i, ()))}
    for i, nodes in uses.items():
        if sum(getattr(node, "rows", 0) for node in nodes) > found[i].scores.shape[1]:
            opaque.add(i)
    return {i: nodes for i, nodes in uses.items() if i not in opaque}, sorted(opaque)


def _uses(output: Tensor, index: dict[int, int]) -> tuple[dict[int, list], set[int]]:
    """Walks the graph. Returns {mask: nodes of its products} and the masks that are used in any other way."""
    uses, opaque, seen, stack = defaultdict(list), set(), set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            mask = index.get(id(getattr(child, "variable", None)))
            if mask is not None:
                if hasattr(node, "rmt_op"):
                    uses[mask].append(node)
                else:
                    opaque.add(mask)
            elif child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return uses, opaque


def _set_fused(found: list[Mask], uses: dict[int, list], pairs: list[tuple], options: dict) -> None:
    taken = 0
    for i, nodes in uses.items():
        mine = pairs[taken : taken + len(nodes)]
        taken += len(nodes)
        found[i].scores.grad = _fused(found[i], i, nodes, mine, **options)


def _set_left(found: list[Mask], opaque: list[int], left: list[dict], options: dict) -> None:
    """left: {mask: task gradient}, then, with a general loss, {mask: its gradient, or dropped out already}."""
    for i in opaque:
        if i in left[0]:
            scores = found[i].scores
            a, *b = (torch.zeros_like(scores) if part[i] is None else part[i] for part in left)
            # A general loss that does not reach these scores is a gradient of 0, not the absence of dropout.
            scores.grad = _dropped(found[i], i, a, b[0] if b else None, options)
        else:
            found[i].scores.grad = left[1][i]


def _dropped(mask: Mask, stream: int, a: Tensor, b: Tensor | None, options: dict) -> Tensor:
    """Gradient of one mask's scores from its task and general score gradients.

    Compact scores (S,) go as one row: their draws are keyed by the place among the selected.
    """
    a, b, scores = (t if t is None or t.dim() == 2 else t.view(1, -1) for t in (a, b, mask.scores.detach()))
    options = options | {"penalty": _penalty(mask, options["l2"]), "stream": stream}
    del options["l2"]
    return rmt_kernels.gradient_dropout(a, b, None, scores, **options).view_as(mask.scores)


def _penalty(mask: Mask, l2: float) -> Tensor | None:
    # The subgradient at 0 is 0, as torch.norm's: the clamp keeps 0 / 0 out.
    return l2 / mask.scores.norm().clamp_min(torch.finfo(torch.float32).tiny) if l2 else None


def _padded(pairs: list[tuple]) -> list[tuple]:
    return [(*pair, None)[:2] for pair in pairs]


def _fused(mask: Mask, stream: int, nodes: list, cotangents: list[tuple], rng, strength: float, l2: float) -> Tensor:
    """Gradient of one mask's scores from the cotangents at its products."""
    options = {"penalty": _penalty(mask, l2), "rng": rng, "strength": strength, "stream": stream}
    pairs = _padded(cotangents)
    has_general = len(cotangents[0]) == 2
    if all(node.rmt_op == "masked_linear" for node in nodes):
        rows = [_rows(node.saved_tensors[0]) for node in nodes]
        sides = [[_or_zeros(p[s], r, mask) for p, r in zip(pairs, rows)] for s in (0, 1)]
        x, a, b = (torch.cat(t) if len(t) > 1 else t[0] for t in (rows, *sides))
        return rmt_kernels.mask_grad(x, a, b if has_general else None, mask.weight, mask.scores, **options)
    totals = [torch.zeros_like(mask.scores) for _ in range(1 + has_general)]
    for node, pair in zip(nodes, pairs):
        for total, g in zip(totals, pair):
            if g is not None:
                total += _weight_gradient(node, g)
    return rmt_kernels.gradient_dropout(
        totals[0], totals[1] if has_general else None, mask.weight, mask.scores, **options
    )


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _or_zeros(g: Tensor | None, rows: Tensor, mask: Mask) -> Tensor:
    return rows.new_zeros(len(rows), mask.weight.shape[0]) if g is None else _rows(g)


def _weight_gradient(node, g: Tensor) -> Tensor:
    """(N, K) gradient of the masked weight at one product."""
    if node.rmt_op == "masked_weight":
        return g.float()
    return _rows(g).float().T @ _rows(node.saved_tensors[0]).float()
