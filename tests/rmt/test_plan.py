"""A plan of fake tensors is what real ones take; its FLOPs are those of the textbook."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F

from rmt import clip, devices
from rmt.cli import main
from rmt.config import MaskConfig, TrainConfig, UserError
from rmt.masking import apply_masks
from rmt.plan import KINDS, ROLES, STEPS, follow, plan_step
from rmt.plan_command import largest_batch
from rmt.tracking import Tracker
from rmt_kernels.backends import native

CLASSES = 4
# A layer takes 17 rows an image, and its cotangents while those are no more than its 64 columns.
FEW, MANY = 3, 8


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("files") / "model")


def real(mask, train, steps=STEPS):
    """What the same steps take on the CPU, with our kernels there: the reference looks for NaN with tensors more."""
    if native.extension is None:
        pytest.skip(f"needs the extension: {native.missing}")
    model = tiny.model()
    found = apply_masks(model, mask)
    tokens = torch.randint(1, 9, (CLASSES, 16))
    with torch.no_grad(), clip.disabled(model):
        text = clip.Text(model, tokens, F.normalize(model.encode_text(tokens), dim=-1))
    image, label = torch.randn(train.batch, 3, 32, 32), torch.arange(train.batch) % CLASSES
    tracker = follow(model, found, text, image, label, train, steps)
    live, op = tracker.peak()
    assert live.keys() <= set(KINDS) and tracker.flops.keys() <= set(ROLES)
    return live, op, dict(tracker.flops), dict(tracker.moved)


@pytest.mark.parametrize("images", [FEW, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "mask",
    [MaskConfig(targets=("attention", "conv")), MaskConfig(targets=("mlp",), towers=("image", "text"))],
    ids=["ramt", "mlp of both towers"],
)
def test_a_plan_is_what_real_tensors_take_to_the_byte(name, mask, precision, images):
    train = TrainConfig(batch=images, precision=precision, strength=0.3)
    plan = plan_step(name, mask, train, classes=CLASSES)
    live, op, flops, moved = real(mask, train)
    assert {k: n for k, n in plan.bytes.items() if n} == {k: n for k, n in live.items() if n} and plan.peak == op
    assert {k: n for k, n in plan.flops.items() if n} == flops
    assert plan.moved == moved


def test_a_batch_in_parts_is_planned_too(name):
    mask = MaskConfig(targets=("attention",))
    train = TrainConfig(batch=MANY, accumulate=2, strength=1.0)
    plan = plan_step(name, mask, train, classes=CLASSES)
    assert {k: n for k, n in plan.bytes.items() if n} == {k: n for k, n in real(mask, train)[0].items() if n}
    whole = plan_step(name, mask, TrainConfig(batch=MANY, strength=1.0), classes=CLASSES)
    assert plan.bytes["activations"] < 0.6 * whole.bytes["activations"]
    assert sum(plan.flops.values()) == sum(whole.flops.values())


def test_the_second_step_is_like_all_that_follow():
    mask, train = MaskConfig(), TrainConfig(batch=FEW, strength=1.0)
    assert real(mask, train, 2) == real(mask, train, 4)


def test_what_is_kept_from_step_to_step_is_what_it_must_be(name):
    plan = plan_step(name, MaskConfig(targets=("attention",)), TrainConfig(batch=FEW, strength=1.0), classes=CLASSES)
    width, blocks = 64, 2
    masked = 4 * width * width * blocks
    assert (plan.masks, plan.masked) == (4, masked)
    assert plan.weights == sum(p.numel() for p in tiny.model().parameters())
    assert plan.bytes["scores"] == plan.bytes["masked weight"] == 4 * masked
    assert plan.bytes["moments"] == 8 * masked + (4 + 2 * 8) * plan.masks and plan.bytes["bits"] == masked // 8
    buffers = sum(b.nbytes for b in tiny.model().buffers())
    assert plan.bytes["weights"] == 4 * plan.weights + buffers
    assert plan.bytes["inputs"] == FEW * (3 * 32 * 32 * 4 + 8) + CLASSES * (16 * 8 + 32 * 4)


@pytest.mark.parametrize("shortcuts", [False, True])
def test_flops_are_those_of_the_textbook(name, shortcuts):
    batch, width, embed, blocks, patches, inner = 3, 64, 32, 2, 16, 3 * 8 * 8
    train = TrainConfig(batch=batch, strength=1.0, shortcuts=shortcuts)
    plan = plan_step(name, MaskConfig(), train, classes=CLASSES)
    tokens = patches + 1
    # Of the last block, all but the in-projection and the keys runs for the class token alone.
    rows = batch * tokens * (blocks - 1) + batch * (1 if shortcuts else tokens)
    conv = 2 * batch * patches * inner * width
    in_proj, out_proj, mlp = blocks * 2 * batch * tokens * 3 * width**2, 2 * rows * width**2, 2 * rows * 8 * width**2
    head = 2 * batch * width * embed + 2 * batch * embed * CLASSES
    # Q K^T and A V forward, by student and teacher; Q K^T again, dV, dA, dQ and dK in each of two backward passes.
    product = 2 * rows * tokens * width
    forward = conv + in_proj + out_proj + mlp + head
    assert plan.flops == {
        "forward": forward,
        "teacher": forward,
        "input cotangents": 2 * (forward - conv),
        "weight gradients": 2 * (conv + in_proj + out_proj),
        "attention": (2 * 2 + 2 * 5) * product,
    }


@pytest.mark.parametrize(("adam", "moments"), [("fp32", 8), ("bf16", 4), ("8bit", 2 + 2 / 256)])
def test_the_update_moves_every_weight_sized_tensor_once(name, adam, moments):
    train = TrainConfig(batch=FEW, strength=1.0, adam=adam)
    plan = plan_step(name, MaskConfig(targets=("mlp",)), train, classes=CLASSES)
    # Scores, moments and bits read and written, two gradients and the weight read.
    each = 2 * (4 + moments + 1 / 8) + 2 * 4 + 4
    # Besides, for each of 4 masks its norm and two counts, both read and written; two factors, seed and step.
    assert plan.moved["mask_update_"] == plan.masked * each + 4 * 2 * (4 + 2 * 8) + 2 * 4 + 2 * 8
    assert plan.bytes["moments"] == plan.masked * moments + 4 * (4 + 2 * 8)


def test_the_tracker_sees_lifetimes_views_and_writes_in_place():
    tracker = Tracker(lambda: "forward", ())
    kept = torch.zeros(1000)
    tracker.track([kept], "inputs")
    with tracker:
        tracker.restart()
        a = kept + 1
        view = a[:10]
        a = kept.new_zeros(500)  # the view still holds the first
        a.add_(1)
        del view
        a = torch.cat([a, a]) * 2  # the sum of both, then two of 1000
    live, op = tracker.peak()
    assert live == {"inputs": 4000, "temporaries": 4000 + 4000 + 2000} and op.endswith("aten::mul")


@pytest.mark.parametrize("limit", [0, 1, 2, 31, 32, 33, 64, 100])
def test_the_largest_batch_is_found(limit):
    asked = []
    assert largest_batch(lambda n: asked.append(n) or n <= limit, 1, 32) == limit
    assert len(asked) <= 14


def test_every_device_names_its_sources():
    for key in devices.table():
        for precision in devices.PRECISIONS:
            row = devices.device(key.lower(), precision)
            assert row.memory > 1e10 and row.copy > 1e11 and row.rate > 1e13
            assert all(source.startswith(("data sheet: ", "measured: ")) for source in row.sources.values())
        assert devices.device(key, "bf16").rate > devices.device(key, "fp32").rate


def test_this_machine_is_measured():
    here = devices.device("here", "fp32")
    assert here.memory > 1e8 and here.rate > 1e8 and here.copy > 1e7 and "measured" in here.sources["rate"]


def command(name, *flags):
    return main(["plan", "--model", name, "--batch", "3", "--classes", "4", *flags])


def test_the_command_prints_the_plan_and_writes_it(name, tmp_path, capsys):
    assert command(name, "--device", "L4", "--json", str(tmp_path / "plan.json")) == 0
    printed = capsys.readouterr().out
    row = json.loads((tmp_path / "plan.json").read_text())
    assert all(f"  {title} " in printed for title in (*KINDS, *ROLES, "total", "products", "update", "floor"))
    assert "fits in 22.4 GiB" in printed and "data sheet: NVIDIA L4" in printed
    assert row["total"] == sum(row["bytes"].values()) and row["batch"] == 3
    products, update = sum(row["flops"].values()) / 30.3e12, sum(row["moved"].values()) / 300e9
    assert row["floor_ms"] == pytest.approx({"products": 1e3 * products, "update": 1e3 * update,
                                             "floor": 1e3 * (products + update)})  # fmt: skip


def test_fit_finds_the_batch_that_just_fits(name, tmp_path, capsys, monkeypatch):
    of = {n: plan_step(name, MaskConfig(), TrainConfig(batch=n, strength=1.0), classes=4).total for n in (20, 21)}
    assert of[20] < of[21]
    card = devices.Device("a card", of[20], 1e12, 1e11, dict.fromkeys(("memory", "rate", "copy"), "measured: no"))
    monkeypatch.setattr("rmt.plan_command.device", lambda *_: card)
    assert command(name, "--fit") == 0 and "batch 20, " in capsys.readouterr().out
    assert command(name, "--batch", "21") == 0 and "does not fit in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "ViT-L-15"], "open_clip has no model 'ViT-L-15': did you mean ViT-L-1"),
        (["--model", "hf-hub:a/b"], "must be an open_clip name or local-dir:PATH"),
        (["--model", "local-dir:/nowhere"], "open_clip cannot build 'local-dir:/nowhere'"),
        (["--device", "abacus"], "device must be one of H200, "),
        (["--targets", "nose"], "targets must be some of attention, mlp, conv"),
        (["--batch", "0"], "batch must be an integer of at least 1, got 0"),
        (["--classes", "0"], "classes must be an integer of at least 1, got 0"),
    ],
)
def test_mistakes_are_said_in_one_line(name, flags, said, capsys):
    assert command(name, *flags) == 2
    assert said in capsys.readouterr().err


def test_tf32_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="tf32 needs a CUDA device"):
        devices.device("here", "tf32")
