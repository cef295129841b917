"""LowRank over `rmt_kernels.routed_low_rank`: the plain formula, with dropout before A and the image's draw its own."""

import pytest
import torch
import torch.nn.functional as F

from rmt.routing import FUNCTIONS, RoutedLoRAConfig, route
from rmt.routing.context import VisualContext
from rmt.routing.layers import LowRank


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_branch_is_the_plain_formula(function, parts, dropout):
    images = 3 if function == "gram" else 1
    context = VisualContext(16, many=True)
    config = RoutedLoRAConfig(function=function, r=6, alpha=3.0, dropout=dropout)
    branch = LowRank(16, 12, config, context, parts).double().train()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in branch.parameters():
            p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64))
    x, x_r = (torch.randn(2, n, 16, generator=random, dtype=torch.float64) for n in (30, images))

    def plain():
        x_v = F.linear(F.dropout(x_r, dropout), branch.A) if function != "none" else None
        routed = route(function, F.linear(F.dropout(x, dropout), branch.A), x_v).unflatten(-1, (parts, 6))
        return torch.einsum("btpr,por->btpo", routed, branch.B).flatten(2) * 0.5

    with context.set(x_r):
        torch.manual_seed(1)
        got = branch(x)
    torch.manual_seed(1)
    want = plain()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    weights = torch.randn(got.shape, generator=random, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), list(branch.parameters())) for y in (got, want))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
