"""The plan of many ranks against cases worked out by hand, and against what the reduction really hands over."""

import json

import pytest
import tiny
import torch

from rmt.cli import main
from rmt.config import MaskConfig, TrainConfig, UserError
from rmt.masking import apply_masks
from rmt.plan import StepPlan, plan_step
from rmt.plan_traffic import Link, Sharing, Travel, owned, traffic
from rmt.plan_world import Rates, bend, gradients_tail, memory, plan_rank, plan_world, weight_sized
from rmt.reduction import Reduction
from rmt.world import World

KIB = 1024
# Four masks of 1,024 scores. A third of the FLOPs is forward, a third each backward pass.
PLAN = StepPlan(
    4, 4 * KIB, 40 * KIB,
    {"weights": 160 * KIB, "scores": 16 * KIB, "moments": 32 * KIB, "bits": KIB // 2, "masked weight": 16 * KIB,
     "gradients": 32 * KIB, "activations": 1000},
    "", {"forward": 1, "teacher": 1, "input cotangents": 2, "weight gradients": 2, "attention": 0},
    {"mask_update_": 40 * KIB * 4, "others": 8 * KIB}, (KIB,) * 4, 30 * KIB, (5 * KIB,) * 4,
)  # fmt: skip
SLOW = Link(1e6, 1e-3, 0.0)
RATES = Rates(1e-2, 0.1)


def kinds(found, ranks, of):
    return {travel.kind: getattr(travel, of)(ranks) for travel in found}


def test_gradients_of_both_losses_and_a_logged_row_travel_in_the_replicated_layout():
    found = traffic(PLAN, 4, Sharing())
    assert kinds(found, 4, "handed") == {"gradients": 2 * 4 * 4 * KIB, "metrics": 4.0}
    assert kinds(found, 4, "wire") == {"gradients": 1.5 * 2 * 4 * 4 * KIB, "metrics": 6.0}
    assert traffic(PLAN, 1, Sharing()) == []
    low = traffic(PLAN, 4, Sharing(reduce="bf16", log_every=1))
    assert kinds(low, 4, "handed") == {"gradients": 2 * 2 * 4 * KIB, "metrics": 40.0}


class Counting(World):
    """Two ranks, of which the other is not asked."""

    def start_sum_(self, tensor, owner=None):
        self.sent += tensor.numel() * tensor.element_size()
        return lambda: None


@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_what_is_planned_is_what_the_reduction_hands_over(tmp_path, reduce):
    """Of all weights that can have a mask, the patch convolution among them, gaps between masks included."""
    mask = MaskConfig(targets=("attention", "mlp", "conv"))
    found, world = apply_masks(tiny.model(), mask), Counting(0, 2, reduce)
    reduction = Reduction(world, found)
    for side in (0, 1):
        reduction.begin(side)
        reduction.end([False] * len(found))
    reduction.wait()
    plan = plan_step(tiny.model_folder(tmp_path / "model"), mask, TrainConfig(batch=2, strength=1.0), classes=4)
    assert plan.sizes == tuple(m.scores.numel() for m in found)
    assert kinds(traffic(plan, 2, Sharing(reduce=reduce)), 2, "handed")["gradients"] == world.sent
    gap = StepPlan(2, 23, 23, sizes=(16, 7), bytes={"gradients": 2 * 4 * 23})
    assert sum(traffic(gap, 2, Sharing())[0].calls) == 2 * 4 * 32, "the second mask lies at 0, the first at 16"
    assert memory(gap, 2, Sharing())["gradients"] == 2 * 4 * 32
    # The text tower's one block is no list of like ones.
    blocks = tiny.model().visual.transformer.resblocks
    image = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in blocks]
    assert len(image) == 2 and (plan.sharded, plan.blocks) == (sum(image), tuple(image))


def test_a_step_is_images_update_bandwidth_and_latency():
    row = plan_rank(PLAN, 4, 8, Sharing(), SLOW, RATES)
    assert row.seconds == pytest.approx({
        "images": 0.08, "update": 0.1, "bandwidth": (1.5 * 32768 + 6) / 1e6,
        # A call a side, 2 * 3 messages each; two calls a logged row, which is every tenth.
        "latency": 1e-3 * (2 * 6 + 2 * 6 / 10),
    })  # fmt: skip
    assert row.step == pytest.approx(0.08 + 0.1 + 0.049158 + 0.0132)


# Passes of 2 s each fill two buckets each, at 1, 2, 3 and 4 s.
@pytest.mark.parametrize(("call", "tail"), [(0.5, 0.5), (1.0, 1.0), (1.5, 3.0), (3.0, 9.0)])
def test_what_is_left_when_both_passes_are_over(call, tail):
    travel = Travel("gradients", 2, [1000] * 4)
    assert gradients_tail(PLAN, 2, Link(1000 / call, 0.0), 6.0, travel) == pytest.approx(tail)
    # Two messages a call, and no bytes to speak of.
    assert gradients_tail(PLAN, 2, Link(1e15, call / 2), 6.0, travel) == pytest.approx(tail)


def test_overlap_hides_all_but_the_tail_and_parts_of_a_batch_hide_less():
    products = 6e-3 * 4096 * 4 / 1e3  # as long as each side's travel at N = 2, times 6
    link = Link(4096 * 4 / 4e-3, 0.0)  # a side takes 4 ms
    rates = Rates(products / 8, 0.0)
    a_pass, side, row = products / 3, 4e-3, {}
    for overlap in (0.0, 0.5, 1.0):
        at = Link(link.bandwidth, 0.0, overlap)
        row[overlap] = plan_rank(PLAN, 2, 8, Sharing(log_every=10**9), at, rates).seconds["bandwidth"]
    assert a_pass > side, "the task gradients are there before the general pass ends"
    assert row[0.0] == pytest.approx(2 * side) and row[1.0] == pytest.approx(side)
    assert row[0.5] == pytest.approx(1.5 * side)
    parts = plan_rank(PLAN, 2, 8, Sharing(accumulate=1000, log_every=10**9), Link(link.bandwidth, 0.0), rates)
    assert parts.seconds["bandwidth"] == pytest.approx(2 * side - a_pass / 1000)


def test_zero_shares_out_whole_masks():
    assert owned(PLAN, 2) == ([4 * KIB] * 4, 0.5)
    assert owned(PLAN, 3)[1] == 0.5 and owned(PLAN, 4)[1] == owned(PLAN, 64)[1] == 0.25, "no less than a mask"
    world = World(0, 3, zero=True)
    there = Reduction(world, apply_masks(tiny.model(), MaskConfig()))
    sizes = [m.scores.numel() for m in there.masks]
    most = max(sum(n for i, n in enumerate(sizes) if there.owner(i) == rank) for rank in range(3))
    assert owned(StepPlan(len(sizes), sum(sizes), 0, sizes=tuple(sizes)), 3)[1] == most / sum(sizes)
    zero = Sharing("zero")
    found = traffic(PLAN, 4, zero)
    assert kinds(found, 4, "handed") == {"gradients": 32 * KIB, "bits": KIB / 8, "metrics": 4.0}
    assert kinds(found, 4, "wire") == {"gradients": 24 * KIB, "bits": 3 * KIB / 8, "metrics": 6.0}
    held = memory(PLAN, 4, zero)
    assert (held["scores"], held["moments"], held["gradients"]) == (4 * KIB, 8 * KIB, 32 * KIB)
    assert all(held[kind] == PLAN.bytes[kind] for kind in ("weights", "bits", "masked weight", "activations"))
    # 160 + 8 KiB alone; here 40 of the update, and three quarters of 16.5 + 16 KiB to make masked weights anew.
    assert weight_sized(PLAN, 4, zero) == pytest.approx((40 + 8 + 0.75 * 32.5) / 168)
    assert weight_sized(PLAN, 4, Sharing()) == weight_sized(PLAN, 1, zero) == 1


def test_sharded_gathers_every_weight_in_each_of_four_passes():
    sharded = Sharing("sharded")
    found = traffic(PLAN, 4, sharded)
    assert kinds(found, 4, "wire") == {
        "gradients": 24 * KIB, "weights": 0.75 * 4 * 4 * 20 * KIB, "bits": 0.75 * KIB / 2,
        "norms and counts": 1.5 * (4 * 24 + 4 * 8), "metrics": 6.0,
    }  # fmt: skip
    assert [len(travel.calls) for travel in found] == [2 * 4, 4 * 4, 1, 1, 2]
    low = Sharing("sharded", "bf16", width=2)
    assert kinds(traffic(PLAN, 4, low), 4, "wire")["weights"] == 0.75 * 4 * 2 * 20 * KIB
    assert memory(PLAN, 4, low)["gathered"] == 2 * 2 * 5 * KIB and memory(PLAN, 4, low)["masked weight"] == 2 * KIB
    held = memory(PLAN, 4, Sharing("sharded", "bf16"))
    assert held["weights"] == 40 * KIB + 120 * KIB // 4 and held["scores"] == 4 * KIB and held["moments"] == 8 * KIB
    assert held["masked weight"] == 4 * KIB and held["bits"] == KIB // 2 and held["gathered"] == 2 * 4 * 5 * KIB
    # A quarter of both sides' sums; all that travels, here less than may, and one more that is being made.
    assert held["gradients"] == 8 * KIB + 4 * (4 + 1) * KIB and held["reduction copies"] == 2 * (4 + 1) * KIB
    assert memory(PLAN, 1, sharded) == PLAN.bytes
    # A quarter of the update, the other weight-sized work, and three times 16.5 + 16 KiB to make masked weights.
    assert weight_sized(PLAN, 4, sharded) == pytest.approx((40 + 8 + 3 * 32.5) / 168)
    # Products hide gradients as long as they last, and weights not at all.
    row = plan_rank(PLAN, 4, 1, sharded, Link(1e6, 0.0), Rates(0.01, 0.0))
    assert row.seconds["bandwidth"] == pytest.approx((24 * KIB + 240 * KIB + KIB * 0.375 + 192 + 6) / 1e6 - 0.01)


def test_rows_double_up_to_the_world_and_say_where_it_bends():
    asked = []
    link = Link(1e9, 0.0, 0.0)
    rows = plan_world(lambda n: asked.append(n) or PLAN, 32, 12, Sharing(), link, RATES)
    assert [row.ranks for row in rows] == [1, 2, 4, 8, 12] and asked == [32, 16, 8, 4, 3]
    assert [row.efficiency(rows[0]) for row in rows[:2]] == pytest.approx([1, 0.42 / (2 * 0.26)], rel=1e-3)
    assert bend(rows) == (rows[2], "update"), "80 ms for images, 100 for the update"
    assert bend(rows[:2]) is None
    slow = plan_world(lambda n: PLAN, 32, 4, Sharing(), Link(1e9, 1.0, 0.0), RATES)
    assert bend(slow) == (slow[1], "latency")


def test_measured_steps_become_a_line_of_images():
    floor = Rates(1e-3, 6e-3)
    assert vars(Rates.fit([(10, 1.5), (20, 2.5), (30, 3.5)], floor)) == pytest.approx({"image": 0.1, "fixed": 0.5})
    # One batch: as the floor, whose 10 images take 16 ms.
    assert vars(Rates.fit([(10, 0.032)], floor)) == pytest.approx({"image": 2e-3, "fixed": 12e-3})
    assert vars(Rates.fit([(1, 0.9), (2, 2.05)], floor)) == pytest.approx({"image": 5.0 / 5, "fixed": 0})
    with pytest.raises(UserError, match="the longer the more images"):
        Rates.fit([(8, 2.0), (16, 1.0)], floor)
    with pytest.raises(UserError, match="times above 0"):
        Rates.fit([(8, 0.0)], floor)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return tiny.model_folder(tmp_path_factory.mktemp("files") / "model")


def command(name, *flags):
    return main(["plan", "--model", name, "--batch", "12", "--classes", "4", "--device", "L4", *flags])


def test_the_command_prints_a_column_for_each_number_of_ranks(name, tmp_path, capsys):
    link = ["--world", "4", "--link", "1", "--latency", "10", "--json", str(tmp_path / "plan.json")]
    (tmp_path / "rates.json").write_text(json.dumps([{"model": name, "batch": 2, "step_ms": 5.0}, {"other": 1}]))
    measured = ["--step-ms", "4:9", "--measured", str(tmp_path / "rates.json")]
    assert command(name, *link, *measured, "--overlap", "0") == 0
    printed = capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    rows = plan["world"]
    assert [(row["ranks"], row["images"]) for row in rows] == [(1, 12), (2, 6), (4, 3)]
    own = plan_step(name, MaskConfig(), TrainConfig(batch=3, strength=1.0), classes=4)
    assert rows[2]["total"] == own.total, "no mask here leaves a gap"
    assert rows[2]["handed"]["gradients"] == 2 * 4 * own.masked
    # 2 ms an image, 1 ms a step.
    assert [row["seconds"]["images"] for row in rows] == pytest.approx([24e-3, 12e-3, 6e-3])
    assert [row["seconds"]["update"] for row in rows] == pytest.approx([1e-3] * 3)
    assert rows[1]["efficiency"] == pytest.approx(25e-3 / (2 * sum(rows[1]["seconds"].values())))
    for part in ("fits from 1 ranks on", "measured, 4 images 9.00 ms, 2 images 5.00 ms", "efficiency",
                 "link: 1 GB/s, 10 us a message, overlap 0"):  # fmt: skip
        assert part in printed
    link[1] = "2"
    assert command(name, *link, "--layout", "sharded", "--accumulate", "5") == 0
    assert "norms and counts" in capsys.readouterr().out
    assert command(name, "--world", "1") == 0 and "link" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--world", "2"], "several ranks need a link: --link GB/s"),
        (["--world", "13", "--link", "1", "--latency", "1"], "13 ranks share 12: --batch at least 13"),
        (["--world", "0"], "world must be an integer of at least 1, got 0"),
        (["--world", "2", "--link", "0", "--latency", "1"], "link must be a number of GB/s above 0, got 0"),
        (["--world", "2", "--link", "1", "--latency", "-1"], "latency must be a number of us of at least 0, got -1"),
        (["--world", "2", "--link", "1", "--latency", "1", "--overlap", "2"], "overlap must be a number from 0 to 1"),
        (["--world", "1", "--fit"], "--fit is of one device, --world of several"),
        (["--step-ms", "4:9"], "--step-ms says how several ranks do: it needs --world"),
        (["--layout", "zero"], "--layout says how several ranks do: it needs --world"),
        (["--reduce", "fp32"], "--reduce says how several ranks do: it needs --world"),
        (["--overlap", "0"], "--overlap says how several ranks do: it needs --world"),
        (["--world", "1", "--step-ms", "9"], "step-ms must be IMAGES:MS, as 32:410.5, got '9'"),
        (["--world", "1", "--measured", "/nowhere"], "measured must be JSON rows with model, batch and step_ms"),
    ],
)
def test_mistakes_are_said_in_one_line(name, flags, said, capsys):
    assert command(name, *flags) == 2
    assert said in capsys.readouterr().err


def test_steps_of_another_model_are_refused(name, tmp_path, capsys):
    (tmp_path / "rates.json").write_text(json.dumps([{"model": "ViT-B-32", "batch": 2, "step_ms": 5.0}]))
    assert command(name, "--world", "1", "--measured", str(tmp_path / "rates.json")) == 2
    assert "has steps of ViT-B-32, not of local-dir:" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()
