"""docs/routing.md: its python blocks run in order, on a small CoCa in the place of the pretrained one; what its table
says is kept for the backward pass is what autograd keeps."""

import re
from pathlib import Path

import coca_tools
import open_clip
import pytest
import torch

from rmt.routing import FUNCTIONS, RoutedLoRAConfig
from rmt.routing.context import VisualContext
from rmt.routing.layers import LowRank

TEXT = (Path(__file__).parents[2] / "docs" / "routing.md").read_text()
BLOCKS = re.findall(r"^```python[ \t]*\n(.*?)^```[ \t]*$", TEXT, re.M | re.S)


def test_the_blocks_train_save_load_and_remove(monkeypatch, tmp_path, capsys):
    assert len(BLOCKS) == TEXT.count("```python") == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: coca_tools.coca())
    batches, spaces = [coca_tools.batch(seed=seed) for seed in range(4)], []
    for block in BLOCKS:
        spaces.append({"batches": batches})
        exec(block, spaces[-1])
    image, text = batches[0]
    with torch.no_grad():
        removed = spaces[0]["model"](image, text)["logits"]
        assert torch.equal(removed, coca_tools.coca()(image, text)["logits"])
        # mul with x_R = 0 is the host alone.
        torch.testing.assert_close(spaces[1]["without"], removed, rtol=0, atol=1e-5)
    assert float(capsys.readouterr().out.removeprefix("tensor(").rstrip(")\n")) > 1e-5


def test_every_function_has_its_rows():
    for function in FUNCTIONS:
        assert TEXT.count(f"\n| `{function}` |") == 2


@pytest.mark.parametrize(
    ("function", "more"),
    [
        ("none", lambda b, t, v, d, r: 0),
        ("add", lambda b, t, v, d, r: b * v * d),
        ("mul", lambda b, t, v, d, r: b * d + b * r + b * t * r),
        ("expand", lambda b, t, v, d, r: b * d + d + b * r + b * d + b * t - b * t * r),
        ("gram", lambda b, t, v, d, r: b * v * d + b * v * r + b * t * v + b * t * r),
    ],
)
def test_what_is_kept_for_the_backward_pass(function, more):
    b, t, d, r, v = 2, 7, 48, 5, 3 if function == "gram" else 1
    context = VisualContext(d, function == "gram")
    layer = LowRank(d, d, RoutedLoRAConfig(function=function, r=r), context)
    layer.reset(torch.Generator().manual_seed(0))
    weights, kept = {p.data_ptr() for p in layer.parameters()}, []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with context.set(torch.randn(b, v, d)), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(b, t, d, requires_grad=True))
    sizes = {
        k.untyped_storage().data_ptr(): k.untyped_storage().nbytes() // 4 for k in kept if k.data_ptr() not in weights
    }
    assert sum(sizes.values()) == b * t * d + b * t * r + more(b, t, v, d, r)
