"""bench/train_step.py: what it counts, what it refuses, and a run from end to end."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import floor  # noqa: E402
import official  # noqa: E402
import step_check  # noqa: E402
import step_variants as variants  # noqa: E402
import step_verdict  # noqa: E402

SETUP = variants.Setup("ViT-S-32-alt", 2, size=64, layers=2)
BLOCKS = 2


@pytest.fixture(scope="module")
def problem():
    return variants.Problem(SETUP)


@pytest.fixture(scope="module")
def judged(problem):
    return step_check.judge(problem, usual=True)


def recorded(problem, name, low=None):
    variant = variants.MAKE[name](problem)
    return floor.record(lambda: variant.run(*problem.batches[0]), low)


def counts(calls):
    """How many calls of each kind: products of matrices, attention and convolutions, and those of a backward."""
    kinds = collections.Counter()
    for call in calls:
        name = str(call.func).removeprefix("aten.").removesuffix(".default")
        kinds["product" if name in ("mm", "addmm", "bmm", "baddbmm") else name.replace("_for_cpu", "")] += 1
    return kinds


@pytest.mark.parametrize("name", [variants.EAGER, variants.RMT])
def test_the_floor_counts_a_step_as_by_hand(problem, name):
    """Per block in-projection, out-projection and two of the MLP; then `proj`, then the text features."""
    forward, attention = 4 * BLOCKS + 2, "_scaled_dot_product_flash_attention"
    weights = 2 * BLOCKS
    assert counts(recorded(problem, name)) == {
        "product": 2 * forward + 2 * (forward + weights),
        attention: 2 * BLOCKS, attention + "_backward": 2 * BLOCKS,
        "convolution": 2, "convolution_backward": 2,
    }  # fmt: skip


def test_the_teachers_backward_is_in_no_floor(problem):
    """As published: the general pass goes through the teacher too, with gradients of all its weights."""
    ours, published = (len(recorded(problem, name)) for name in (variants.EAGER, variants.PUBLISHED))
    assert published > ours + 4 * BLOCKS


def test_hidden_products_cost_what_they_are(problem):
    """rmt's operators hide theirs from the recorder: by formula its step has as many FLOPs as the eager one.

    With the class token's tail it has fewer.
    """
    names = variants.EAGER, variants.LONG, variants.RMT
    eager, whole, short = (floor.Floor(recorded(problem, name)) for name in names)
    assert eager.flops == whole.flops > short.flops > 1e8
    short()


def test_hidden_products_of_each_operator():
    x, g, weight, bits = torch.randn(6, 5), torch.randn(6, 3), torch.randn(3, 5), None
    made = {
        "masked_linear": (x.view(2, 3, 5), weight, bits), "masked_linear_dx": (g, weight, bits, None),
        "mask_grad": (x, g, g, weight), "weight_grad_": (torch.empty(3, 5), g, x, False), "mask_update_": (),
    }  # fmt: skip
    calls = {name: floor.hidden_products(name, args) for name, args in made.items()}
    shapes = {name: [(*(a.shape for a in c.args), c.out.shape) for c in of] for name, of in calls.items()}
    assert shapes == {
        "masked_linear": [((6, 5), (5, 3), (6, 3))], "masked_linear_dx": [((6, 3), (3, 5), (6, 5))],
        "mask_grad": [((3, 6), (6, 5), (3, 5))] * 2, "weight_grad_": [((3, 6), (6, 5), (3, 5))], "mask_update_": [],
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"no formula for the products of rmt_kernels\.unheard_of"):
        floor.hidden_products("unheard_of", ())


def test_bf16_products_are_recorded_as_such():
    calls = recorded(
        variants.Problem(variants.Setup(**vars(SETUP) | {"precision": "bf16"})), variants.RMT, torch.bfloat16
    )
    dtypes = collections.Counter(next(a.dtype for a in call.args if isinstance(a, floor.Like)) for call in calls)
    # In fp32 the text features' product and, on a CPU, attention in two blocks: each twice forward, twice back.
    assert dtypes == {torch.float32: 4 * (1 + 2), torch.bfloat16: len(calls) - 12}


def test_the_replay_writes_each_product_beside_its_operands():
    a = torch.randn(8, 8)
    replay = floor.Floor(floor.record(lambda: a @ a))
    ((_, args, kwargs),) = replay._bound
    assert len({t.data_ptr() for t in (*args, kwargs["out"])}) == 3
    with pytest.raises(ValueError, match="expected a step with matrix products"):
        floor.Floor([])


def test_first_scores_leave_the_papers_share_off(problem):
    usual, fresh = problem.scores(usual=True).values(), problem.scores(usual=False).values()
    off = sum(int((s <= official.THRESHOLD).sum()) for s in usual) / sum(s.numel() for s in usual)
    assert abs(off - 0.025) < 1e-3
    assert all(bool((s == 1e-2).all()) for s in fresh)


@pytest.mark.parametrize(
    "name, apart", [(variants.PUBLISHED, 0.0), (variants.EAGER, 0.0), (variants.LONG, 1e-5), (variants.RMT, 1e-3)]
)
def test_right_variants_pass_and_flip_bits(problem, judged, name, apart):
    verdict = step_check.check(problem, name, variants.MAKE[name](problem), judged)
    # Without shortcuts rmt's products are the official ones, but for the order of their rows.
    assert verdict.apart <= apart * verdict.total and verdict.cosine > 0.99999
    first = [s.flatten(1) > official.THRESHOLD for s in problem.scores(usual=True).values()]
    assert sum(int((now != (s > official.THRESHOLD)).sum()) for now, s in zip(first, judged[-1].scores)) > 1000


@pytest.mark.parametrize("changed", [{"strength": 0.2}, {"l2": 0.0}, {"temperature": 2.0}], ids=str)
def test_a_wrong_recipe_is_refused(problem, judged, changed):
    variant = variants.Rmt(problem)
    variant.take.config = variants.TrainConfig(**vars(variant.take.config) | changed)
    with pytest.raises(step_check.NotEqual, match=r"apart .*Nothing is timed"):
        step_check.check(problem, variants.RMT, variant, judged)


@pytest.mark.parametrize("wrong", ["draws of another step", "a step that does nothing"])
def test_a_wrong_step_is_refused(problem, judged, wrong):
    variant = variants.Rmt(problem)
    if wrong == "draws of another step":
        variant.taken = 7
    else:
        variant.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(step_check.NotEqual):
        step_check.check(problem, variants.RMT, variant, judged)


def test_a_single_wrong_bit_is_counted():
    want = torch.full((1, 4), 6e-3)
    want[0, 1] = official.THRESHOLD
    got = want.clone()
    got[0, 1] = official.THRESHOLD * (1 + 2e-7)  # close, yet on
    got[0, 2] *= 1.01
    undecided = torch.tensor([[True, False, False, False]])
    verdict = step_check.Verdict(4)
    where = step_check._count(verdict, got, step_check.Judged([want], [], [], [undecided]), 0)
    assert (verdict.undecided, verdict.ties, verdict.apart) == (1, 1, 1)
    assert where.tolist() == [[True, True, True, False]]


def test_verdicts_say_yes_no_and_not_measured():
    def row(name, ms, over=1.0, memory=None):
        base = {"device": "cpu", "precision": "fp32", "variant": name, "over_floor": over, "of_published": memory}
        return base | {"ms": {"median": ms}}

    lines = step_verdict.verdicts([row("as published", 145.0), row("fixed eager", 100.0), row("rmt", 100.0, 1.04, 0.5)])
    assert [line.rpartition(": ")[2] for line in lines] == [
        "yes, 1.04",
        "yes, 1.45",
        "NO, 1.00",
        "not measured",
        "yes, 0.50",
    ]


def run(*arguments):
    command = [sys.executable, str(ROOT / "bench" / "train_step.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_a_quick_run_from_end_to_end(tmp_path):
    done = run("--quick", "--profile", "--variants", "as published", "fixed eager", "rmt", "rmt + graph",
               "--json", str(tmp_path / "rows.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "numbers mean nothing" in done.stdout and "rmt + graph: skipped, a CUDA graph needs" in done.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    timed = {row["variant"]: row for row in rows if row["bench"] == "train_step"}
    assert list(timed) == ["as published", "fixed eager", "rmt", "floor", "rmt's own floor"]
    assert timed["floor"]["over_floor"] == timed["as published"]["of_published"] == 1.0
    assert all(row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"] for row in timed.values())
    assert timed["rmt"]["added_mib"] > 0 and {"commit", "torch", "date", "device_name"} <= timed["rmt"].keys()
    phases = next(row["phase_ms"] for row in rows if row["variant"] == "rmt" and "phase_ms" in row)
    parts = {"teacher forward", "student forward", "task backward", "general backward", "update", "in between"}
    assert parts <= phases.keys()


def test_cotangents_quick(tmp_path):
    done = run("--cotangents", "--quick", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["strategy"] for row in rows] == ["a1", "a2", "b1c", "b1w"]
    assert sum(row["fastest"] for row in rows) == 1 and all(row["peak_mib"] > 0 for row in rows)


def test_tf32_is_refused_on_a_cpu():
    done = run("--precision", "tf32")
    assert done.returncode == 2 and "needs --device cuda" in done.stderr
