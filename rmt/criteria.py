"""How much a weight matters before tuning: importance scores (N, K) of the candidate weights of a plain model.

With a mask m on a weight w the loss has dL/dm = g * w at m = 1, so that SNIP and Taylor are the first-order criteria
for tuning masks; squared gradients (Fisher, SPT) are those for updating weights freely. All scores are at least 0 and
more is more important. Every function takes the candidates, and where it looks at data the batches and the loss as
well. Costs are for B batches.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .evidence import Candidate, Loss, gradients, input_squares, samples

Scores = list[Tensor]


def magnitude(model: nn.Module, found: list[Candidate]) -> Scores:
    """|w|. Looks at no data. The usual baseline; as multiflow's mag.py."""
    return [c.matrix().abs() for c in found]


def lamp(model: nn.Module, found: list[Candidate]) -> Scores:
    """w_u^2 / sum of w_v^2 over all v of the layer with |w_v| >= |w_u|. Looks at no data.

    Layer-adaptive magnitude (Lee et al., ICLR 2021, arXiv:2010.07611). Equal weights share one score; 0 has 0.
    """
    return [_lamp(c.matrix()) for c in found]


def _lamp(weight: Tensor) -> Tensor:
    squares = weight.flatten().double().square()
    ordered, place = squares.sort(descending=True)
    # A run of equal squares shares the sum that includes all of them: the one at its last place.
    last = torch.searchsorted(-ordered, -ordered, right=True) - 1
    share = (ordered / ordered.cumsum(0)[last].clamp_min(torch.finfo(torch.float64).tiny)).float()
    return torch.empty_like(share).scatter_(0, place, share).view_as(weight)


def snip(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> Scores:
    """|mean over batches of g * w|: gradients are averaged before the absolute value, which cancels their noise.

    SNIP (Lee et al., ICLR 2019, arXiv:1810.02340), by multiflow's snip.py; its division by the sum of all scores
    changes no rank and is left out. B forward and backward passes.
    """
    totals, count = _zeros(found), 0
    for grads in gradients(model, found, batches, loss):
        count += 1
        for total, g in zip(totals, grads):
            total += g
    return [(total / count * c.matrix()).abs_() for total, c in zip(totals, found)]


def taylor(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> Scores:
    """Sum over batches of (g * w)^2: Molchanov et al., CVPR 2019 (arXiv:1906.10771), for single weights.

    B forward and backward passes.
    """
    totals = _zeros(found)
    for grads in gradients(model, found, batches, loss):
        for total, g, c in zip(totals, grads, found):
            total += (g * c.matrix()).square_()
    return totals


def spt(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> Scores:
    """Sum over batches of g^2, the square of the batch's gradient; the paper takes up to 16 batches.

    Sensitivity of SPT (He et al., ICCV 2023, arXiv:2303.08566), as its code's get_sensitivity, but in eval mode: its
    code leaves dropout on. B forward and backward passes.
    """
    totals = _zeros(found)
    for grads in gradients(model, found, batches, loss):
        for total, g in zip(totals, grads):
            total.addcmul_(g, g)
    return totals


def fisher(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> Scores:
    """Sum over samples of g^2, each sample's own gradient: the empirical Fisher information's diagonal.

    FISH mask (Sung et al., NeurIPS 2021, arXiv:2111.09839). One forward and backward pass for every sample, not every
    batch: of all criteria here the dearest by the batch size. `loss` gets each sample as a batch of one.
    """
    return spt(model, found, samples(batches), loss)


def influence(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> Scores:
    """(g . g)^2 / (2 g' H g) / K N for each whole weight, a tensor () for each: the loss drop, a parameter, of the best
    step along the gradient g of that weight alone, by the loss's second-order expansion.

    Our reading of AdaPEFT (Xu and Bu, arXiv:2505.12579), whose full text and code we have not: influence
    (G . g)^2 / (2 g' H g) with plain gradient steps, G = g, ranked by influence per parameter. H is the block of this
    weight, exact by a Hessian-vector product for each weight and batch: B * (2 + candidates) backward passes, over
    math attention, as the fused kinds have no second derivative. Looks at the batches twice and keeps them. Where
    g' H g is not positive the expansion has no best step: such a weight counts 0.
    """
    batches = list(batches)
    mean = _zeros(found)
    for grads in gradients(model, found, batches, loss):
        for total, g in zip(mean, grads):
            total += g / len(batches)
    curvature = [torch.zeros((), dtype=torch.float64, device=c.weight.device) for c in found]
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            _add_curvature(curvature, loss(model, batch) / len(batches), [c.weight for c in found], mean)
    return [_influence(g.double(), h) for g, h in zip(mean, curvature)]


def _add_curvature(totals: list[Tensor], value: Tensor, weights: list[Tensor], directions: list[Tensor]) -> None:
    """Adds d' H d of the loss `value` in every weight's own direction d (N, K) to its total ()."""
    for total, g, d, weight in zip(totals, torch.autograd.grad(value, weights, create_graph=True), directions, weights):
        d = d.view_as(weight).to(weight.dtype)
        product = torch.autograd.grad((g * d).sum(), weight, retain_graph=True, allow_unused=True)[0]
        if product is not None:
            total += (product * d).double().sum()


def _influence(gradient: Tensor, curvature: Tensor) -> Tensor:
    drop = gradient.square().sum().square() / (2 * curvature) / gradient.numel()
    return torch.where(curvature > 0, drop, 0)


def multiflow(model: nn.Module, found: list[Candidate], batches: Iterable, loss: Loss) -> Scores:
    """|w_ij| * mean over j' of (|w_ij'| a_j') * mean over i' of (|w_i'j| a_j), with a_j the norm of input j.

    MULTIFLOW (Farina et al., CVPR 2024, arXiv:2404.05621). a_j = sqrt(sum of x_j^2 over tokens), without padded text
    tokens; the paper's division by the number of samples changes no rank within a layer and is left out. Scores of two
    layers do not compare: `rmt.select` gives each layer the count that magnitude would. No labels, no gradient: B
    forward passes, of whatever `loss` runs; a convolution's inputs are its patches.
    """
    squares = input_squares(model, found, batches, loss)
    return [_flow(c.matrix().abs(), s.sqrt().float()) for c, s in zip(found, squares)]


def _flow(weight: Tensor, inputs: Tensor) -> Tensor:
    moved = weight * inputs
    return weight * moved.mean(1, keepdim=True) * moved.mean(0, keepdim=True)


SCORES: dict[str, Callable[..., Scores]] = {
    f.__name__: f for f in (magnitude, lamp, snip, taylor, fisher, spt, multiflow, influence)
}
# Those that look at no data.
DATA_FREE = ("magnitude", "lamp")


def _zeros(found: list[Candidate]) -> Scores:
    return [torch.zeros_like(c.matrix()) for c in found]
