"""Two, three and four gloo processes share the steps of a tiny CLIP; and what they say when one of them is odd."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest
import tiny
import torch
import world_tools
from world_tools import RANKS, STEPS, WAIT_S, scores, tuned

import rmt
from rmt.agreement import code_sha256
from rmt.cli import main
from rmt.config import RunConfig, TrainConfig, UserError, to_yaml
from rmt.evaluate import load_run, read_run
from rmt.meet import _meet, joined
from rmt.optim import MaskAdam
from rmt.reduction import Reduction, _buckets, _owners
from rmt.row_shards import RowShards, need_rows
from rmt.run import run
from rmt.world import World

# Two runs of one arithmetic in another order: see test_train.py.
CLOSE = 2e-6
HERE = Path(__file__).parent


def environment(**more):
    return os.environ | {"PYTHONPATH": f"{Path(rmt.__file__).parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data")
    recipe = TrainConfig(lr=1.5e-3, steps=8, batch=7, strength=1.0, log_every=2, save_every=0)
    return RunConfig(tiny.model_folder(root / "model"), data=str(root / "data"), shots=4, device="cpu", train=recipe)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """What the ranks of world_tools have written: {rank: {name: result}}, and the folder."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "config.yaml").write_text(to_yaml(config))
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60))
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    where |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    command = [sys.executable, str(HERE / "world_tools.py"), str(folder)]
    ended = subprocess.run(command, env=environment(**where), capture_output=True, text=True, timeout=240)
    # The last rank ends in the middle of a step, as it is told to, before it can write what it says.
    assert ended.returncode == 0, ended.stderr
    return {rank: torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)}, folder


def clear_bits_agree(a, b, threshold=5e-3):
    clear = ((a - threshold).abs() > 2 * CLOSE) & ((a - b).abs() <= CLOSE)
    return torch.equal((a > threshold)[clear], (b > threshold)[clear])


@pytest.mark.parametrize("name", [name for name in STEPS if "bf16" not in name])
def test_ranks_that_share_a_batch_end_with_the_scores_of_one(done, name):
    alone, ranks = tuned(name), [done[0][rank][name] for rank in range(STEPS[name][0])]
    assert all(torch.equal(found["scores"], ranks[0]["scores"]) for found in ranks[1:]), "bit for bit"
    got, want, before = ranks[0]["scores"], alone["scores"], scores(world_tools.masked(**STEPS[name][3]))
    assert (want - before).abs().max() > 1e-3
    assert ((got - want).abs() <= CLOSE).float().mean() > 0.999 and clear_bits_agree(got, want)
    for found in ranks:
        assert found["packed"], "bits are those of the scores"
        assert found["same"], "frozen weights are what they were"
        assert found["rows"] == ranks[0]["rows"] and len(found["rows"]) == 3
    for mine, row in zip(alone["rows"], ranks[0]["rows"]):
        assert row["batch_acc1"] == pytest.approx(mine["batch_acc1"])
        assert (row["task"], row["general"]) == pytest.approx((mine["task"], mine["general"]), rel=1e-4, abs=1e-5)


def test_bytes_that_travel_are_those_of_the_formula(done):
    """Both gradients of every score in fp32, each step, and 24 + 16 bytes for each of the three logged rows."""
    for name, width, steps in (("two", 4, 5), ("four", 4, 5), ("parts, uneven", 4, 5), ("bf16", 2, 5)):
        found = done[0][0][name]
        assert found["sent"] == 2 * sum(found["sizes"]) * width * steps + 3 * 40, name
    # While all bits are on there is no general gradient.
    found = done[0][0]["all on at first"]
    assert 5 < (found["sent"] - 3 * 40) / (4 * sum(found["sizes"])) < 10


@pytest.mark.parametrize("name", ["two", "all on at first", "selected", "a rival", "bf16"])
def test_sharded_scores_and_moments_end_with_the_bits_of_whole_ones(done, name):
    """Of two ranks: two numbers have one sum. Of more the order of a reduction is the backend's."""
    for rank in (0, 1):
        whole, sharded = done[0][rank][name], done[0][rank][f"zero, {name}"]
        assert torch.equal(whole["scores"], sharded["scores"]) and whole["rows"] == sharded["rows"]
        assert not sharded["scores"].isnan().any()


def test_sharded_each_score_and_moment_is_on_one_rank_and_the_others_have_nan_without_storage(done):
    sizes, ranks = done[0][0]["zero, four"]["sizes"], [done[0][rank]["held"] for rank in range(RANKS)]
    for i, size in enumerate(sizes):
        there = [held["moments"][i] for held in ranks]
        owner = there.index(size)
        assert sorted(there) == [0, 0, 0, size] and [h["scores"][i] for h in ranks] == [
            size if r == owner else 1 for r in range(RANKS)
        ]
        assert [held["nan"][i] for held in ranks] == [r != owner for r in range(RANKS)]
    assert max(sum(held["moments"]) for held in ranks) <= sum(sizes) / RANKS + max(sizes)


def told(found, ranks):
    """Words that each rank tells after a step: those of its masks' bits and four for each mask, padded to the most."""
    reduction = Reduction(World(0, ranks, zero=True), rmt.masks(world_tools.masked()))
    words = [0] * ranks
    for i, count in enumerate(found["words"]):
        words[reduction.owner(i)] += count + 4
    return 2 * -(-max(words) // 2)


def test_bytes_that_travel_where_scores_and_moments_are_sharded_are_those_of_the_formula(done):
    for name, ranks, width in (("zero, two", 2, 4), ("zero, four", 4, 4), ("zero, bf16", 2, 2)):
        found = done[0][0][name]
        a_step = 2 * sum(found["sizes"]) * width + 4 * told(found, ranks)
        assert found["sent"] == 5 * a_step + 4 * sum(found["sizes"]) + 3 * 40, name


def test_a_sharded_run_goes_on_on_another_number_of_ranks_or_whole(done):
    found = done[0][0]["resharded"]
    assert [found[f"zero, two, {n}"]["done"] for n in (2, 1, 4)] == [0, 3, 4]
    for n in (2, 1):
        a, b = found[f"two, {n}"]["file"], found[f"zero, two, {n}"]["file"]
        assert (
            a["scores"].keys() == b["scores"].keys()
            and a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
        )
        assert all(torch.equal(a["scores"][key], b["scores"][key]) for key in a["scores"])
        for i, moments in a["optimizer"]["state"].items():
            assert all(torch.equal(moments[name], b["optimizer"]["state"][i][name]) for name in moments)
        assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"] and a["step"] == b["step"]
    whole, sharded = (found[f"{how}, 4"]["scores"] for how in ("two", "zero, two"))
    assert ((whole - sharded).abs() <= CLOSE).float().mean() > 0.999
    assert all(torch.equal(done[0][rank]["resharded"]["zero, two, 4"]["scores"], sharded) for rank in range(RANKS))


def test_fully_sharded_a_rank_keeps_its_share_of_blocks_and_rows_and_no_masked_weight(done):
    ranks = [done[0][rank]["shares"] for rank in range(RANKS)]
    whole = ranks[0]["whole"]
    # Matrices; the text tower's list has one block, and is none of like ones.
    blocks = {name for name in whole if name.startswith("visual.transformer.resblocks.") and name.endswith("weight")}
    blocks = {name for name in blocks if ".ln_" not in name}
    assert len(blocks) == 2 * 4
    for name in whole:
        stored = [found["stored"][name] for found in ranks]
        if name.endswith("scores"):
            assert stored == [1] * RANKS
        elif name in blocks:
            assert sum(stored) == whole[name] and max(stored) == -(-whole[name] // RANKS), name
        else:
            assert stored == [whole[name]] * RANKS, name
    sizes = [size for name, size in whole.items() if name.endswith("scores")]
    assert [sum(found["scores"][i] for found in ranks) for i in range(len(sizes))] == sizes
    assert all(found["dense"] == 0 and found["same"] for found in ranks)


def gathered(ranks, towers):
    """Elements of all blocks of those towers that a rank brings, each parameter's rows padded to as many."""
    found = 0
    for name, p in world_tools.tiny.model().named_parameters():
        if ".resblocks." in name and name.startswith(towers) and p.dim() == 2:
            found += -(-len(p) // ranks) * p[0].numel()
    return found


def test_bytes_that_travel_where_all_is_sharded_are_those_of_the_formula(done):
    for name, ranks, width, passes, weight in (
        ("shard, two", 2, 4, 4, 4), ("shard, four, 8 bits", 4, 4, 4, 4), ("shard, bf16", 2, 2, 4, 4),
        ("shard, three, parts", 3, 4, 2 * 4, 4), ("shard, bf16 products", 2, 4, 4, 2),
    ):  # fmt: skip
        found, shapes = done[0][0][name], [mask.shape for mask in rmt.masks(world_tools.masked())]
        parts = passes // 4
        rows = [-(-n // ranks) for n, _ in shapes]
        scores = sum(c * k for c, (_, k) in zip(rows, shapes))
        told = sum(4 * c * -(-k // 32) for c, (_, k) in zip(rows, shapes)) + 8 * (3 * len(rows) + ranks)
        a_step = 2 * parts * width * ranks * scores + told + passes * weight * gathered(ranks, ("visual.",))
        # Once: norms and counts of the first step, and at the end scores and weights made whole.
        named = tiny.model().visual.transformer.resblocks.named_parameters()
        blocks = [p for _, p in named if p.dim() == 2]
        once = 16 * len(rows) + 4 * scores + 4 * sum(len(p.chunk(ranks)[0]) * p[0].numel() for p in blocks)
        assert found["sent"] == 5 * a_step + once + 3 * 40, name


def test_matrices_that_travel_rounded_give_the_products_of_whole_ones(done):
    whole, sharded = (done[0][0][name]["scores"] for name in ("bf16 products", "shard, bf16 products"))
    assert ((whole - sharded).abs() <= CLOSE).float().mean() > 0.999
    assert (whole - done[0][0]["two"]["scores"]).abs().max() > 100 * CLOSE, "products in fp32 are others"


def test_a_fully_sharded_run_is_that_of_whole_ones(done):
    found, whole, sharded = done[0][0]["resharded"], *(done[1] / name for name in ("run", "run sharded"))
    assert [found[f"shard, two, {n}"]["done"] for n in (2, 1, 4)] == [0, 3, 4]
    for n in (2, 1):
        a, b = found[f"two, {n}"]["file"], found[f"shard, two, {n}"]["file"]
        assert a["scores"].keys() == b["scores"].keys() and a["step"] == b["step"]
        assert all((a["scores"][key] - b["scores"][key]).abs().max() <= 20 * CLOSE for key in a["scores"])
        for i, moments in a["optimizer"]["state"].items():
            theirs = b["optimizer"]["state"][i]
            assert moments.keys() == theirs.keys()
            assert all(moments[key].shape == theirs[key].shape for key in moments)
            assert torch.allclose(moments["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=1e-7)
    a, b = (found[f"{how}, 4"]["scores"] for how in ("two", "shard, two"))
    assert ((a - b).abs() <= CLOSE).float().mean() > 0.999, "the step after a file was read"
    a, b = (json.loads((out / "result.json").read_text()) for out in (whole, sharded))
    assert (a["shard"], b["shard"]) == (False, True) and a["base_sha256"] == b["base_sha256"]
    assert b["off"] == pytest.approx(a["off"], rel=1e-3)
    # The model that was measured afterwards is whole, and has the masks that were saved.
    assert load_run(*read_run(sharded)).test().metrics() == b["metrics"]


@pytest.mark.parametrize("on", [True, False])
def test_a_rank_without_any_row_of_a_mask_counts_bits_too(on, monkeypatch):
    monkeypatch.setattr(World, "start_sum_", lambda self, tensor: lambda: None)
    found = rmt.masks(world_tools.masked(on=on))
    shards = RowShards(World(8, 9, shard=True), found)
    assert any(len(row.scores) == 0 for row in shards.rows) and any(len(row.scores) for row in shards.rows)
    optimizer = MaskAdam(shards.rows)
    optimizer.shards = shards
    assert optimizer.all_on() is False, "these rows are not all"
    for count, row in zip(optimizer.counts[:, 1].tolist(), shards.rows):
        assert (count == row.scores.numel()) if on else (count <= row.scores.numel())


def test_what_cannot_be_cut_into_rows_is_refused():
    with pytest.raises(UserError, match="--shard needs a score for every masked weight"):
        need_rows(rmt.masks(world_tools.masked(selected=True)), 2, "fp32")
    found = rmt.masks(world_tools.masked())
    need_rows(found, 64, "fp32")
    with pytest.raises(UserError, match="192 weights a rank, which must be a multiple of 256 with moments in 8bit"):
        need_rows(found, 64, "8bit")


def test_gradients_in_bf16_differ_by_its_rounding_and_not_between_ranks(done):
    low, full = ([done[0][rank][name]["scores"] for rank in (0, 1)] for name in ("bf16", "two"))
    assert torch.equal(low[0], low[1])
    far = (low[0] - full[0]).abs()
    assert far.max() > CLOSE and (far < 4e-4).float().mean() > 0.9


def test_a_run_goes_on_on_another_number_of_ranks(done):
    two, three = done[0][0]["resumed"], done[0][2]["resumed"]["three"]
    assert (two["before"]["done"], two["two"]["done"], three["done"]) == (0, 3, 3)
    unbroken = done[0][0]["two"]["scores"]
    assert torch.equal(two["two"]["scores"], unbroken), "on as many ranks to the same bits"
    assert torch.equal(three["scores"], two["three"]["scores"])
    assert ((three["scores"] - unbroken).abs() <= CLOSE).float().mean() > 0.999


def test_what_is_wrong_on_one_rank_is_said_on_every_one_in_time(done):
    rows = [json.loads((done[1] / f"said{rank}.json").read_text()) for rank in range(RANKS - 1)]
    for name, part in {
        "agree": "they differ in code (rank 0, 2: a; rank 1, 3: b)",
        "together": "rank 1: no data on 1; rank 3: no data on 3",
        "first": "a damaged file",
        "need": "4 ranks share 3 images of a batch: start at most 3",
        "apart": "the ranks' masks are no longer the same",
        "graph": "graph captures the step of one process, got 4 ranks",
        "NaN": "the loss must be finite, got nan",
        "NaN of an owner": "step 1: scores must not be NaN, but some are on rank 2",
        "NaN of rows": "step 1: scores must not be NaN, but some are on rank 2",
    }.items():
        for rank, said in enumerate(rows):
            if (name.startswith("NaN of"), rank) == (True, 2):
                part = "step 1: scores became NaN"
            assert part in said[name][0], (name, rank, said[name])
            assert said[name][1] < 20, (name, rank, said[name])
    # rank 1 slept through a time-out.
    for rank in (0, 2):
        text, seconds = rows[rank]["silence"]
        assert f"rank {rank} of 4 lost the others" in text and "last resume file" in text and seconds < 1.4 * WAIT_S
    assert rows[1]["silence"][0] is None
    for rank, said in enumerate(rows):
        assert f"rank {rank} of 4 lost the others" in said["lost"][0] and said["lost"][1] < 20
    assert torch.load(done[1] / "lost.pt", weights_only=True)["step"] == 2, "whole, of the step before"


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_two_ranks_is_that_of_one(config, done, tmp_path):
    alone, two = run(config, tmp_path / "run"), json.loads((done[1] / "run" / "result.json").read_text())
    assert (alone["ranks"], two["ranks"]) == (1, 2)
    for name in ("zero_shot", "metrics"):
        assert two[name]["acc1"] == alone[name]["acc1"]
    assert alone["off"] > 0 and two["off"] == pytest.approx(alone["off"], abs=10)
    assert two["indices_sha256"] == alone["indices_sha256"] and two["base_sha256"] == alone["base_sha256"]
    assert (done[1] / "run" / "config.yaml").read_text() == (tmp_path / "run" / "config.yaml").read_text()
    for a, b in zip(rows(tmp_path / "run"), rows(done[1] / "run")):
        assert (a["step"], a["lr"], a["batch_acc1"]) == (b["step"], b["lr"], pytest.approx(b["batch_acc1"]))
        assert a["task"] == pytest.approx(b["task"], rel=1e-4)


KILL = """
import os, signal
if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from rmt.reduction import Reduction

    end, calls = Reduction.end, []

    def last(self, arrived):
        calls.append(end(self, arrived))
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    Reduction.end = last
"""


def test_torchrun_restarts_a_job_whose_rank_was_killed_and_it_ends_with_the_same_bits(config, done, tmp_path):
    """SIGKILL in the middle of a step, its gradients on their way; through the command line."""
    (tmp_path / "sitecustomize.py").write_text(KILL)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "rmt", "train", "--config", str(tmp_path / "config.yaml")]
    # Sharded, where the run that it is compared with is not.
    command += ["--out", str(tmp_path / "run"), "--timeout", "60", "--zero"]
    where = environment()
    where["PYTHONPATH"] = f"{tmp_path}:{where['PYTHONPATH']}"
    ended = subprocess.run(command, env=where, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = ended.stdout
    assert "Signal 9 (SIGKILL)" in ended.stderr + said or "exitcode: -9" in ended.stderr + said
    assert said.count("resume     from step") == 1 and said.count("\nzero-shot") == 2, "rank 0 alone prints"
    want, got = (torch.load(out / "last.pt", weights_only=True) for out in (done[1] / "run", tmp_path / "run"))
    assert all(torch.equal(want["scores"][key], got["scores"][key]) for key in want["scores"])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["zero"] is True
    assert rows(tmp_path / "run") == rows(done[1] / "run")
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".")][1:]


def test_what_ranks_cannot_share_is_refused_before_it_starts(config, monkeypatch, capsys, tmp_path):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    asked = ["--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    assert main(["b2n", *asked]) == 2 and "can share only rmt train: start rmt b2n" in capsys.readouterr().err
    assert main(["train", *asked, "--seeds", "1", "2"]) == 2 and "torchrun shares one run" in capsys.readouterr().err
    assert main(["train", *asked, "--zero", "--shard"]) == 2 and "are two layouts" in capsys.readouterr().err
    assert main(["train", *asked, "--timeout", "0"]) == 2 and "timeout must be a number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_shares_are_neighbours_that_cover_everything_once():
    for count in range(12):
        for size in range(1, 6):
            parts = [list(range(count))[World(rank, size).share(count)] for rank in range(size)]
            assert list(chain(*parts)) == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert World().share(7) == slice(0, 7)


def test_buckets_hold_every_mask_once_from_the_last_to_the_first():
    made = _buckets([100, 7, 40, 300], 4 * 150)
    assert made == [{3: 0}, {2: 0, 1: 48}, {0: 0}], "a place is a multiple of a cache line"
    assert [i for bucket in made for i in bucket] == [3, 2, 1, 0]


def test_scores_that_are_sent_away_leave_their_bits_and_cannot_be_taken_for_scores():
    layer = rmt.FusedMaskedLinear(40, 8)
    with torch.no_grad():
        layer.scores.mul_(torch.rand(8, 40, generator=torch.Generator().manual_seed(0)))
    mask, x = rmt.masks(layer)[0], torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    values, bits, y = layer.scores.detach().clone(), mask.bits.clone(), layer(x)
    parameter = layer.scores
    layer.send_away("")
    assert layer.scores is parameter and layer.scores.shape == (8, 40)
    assert layer.scores.untyped_storage().nbytes() == 4 and layer.scores.isnan().all()
    mask.refresh(force=True)
    layer.double().float()
    assert torch.equal(mask.bits, bits) and torch.equal(layer(x), y)
    with pytest.raises(RuntimeError, match="single memory location"):
        mask.set_bits(bits)
    layer.bring_back("", values)
    assert torch.equal(layer.scores, values) and torch.equal(mask.bits, bits)
    with torch.no_grad():
        layer.scores.fill_(0.0)
    assert not mask.bits.any(), "bits follow scores again"


def test_owners_of_buckets_have_about_as_much():
    assert _owners([5, 9, 4, 4], 2) == [1, 0, 1, 0]
    assert _owners([7], 3) == [0] and _owners([], 2) == []


class Watched(World):
    """Two ranks of which the other has the same gradients: a sum doubles, at once."""

    def start_sum_(self, tensor, owner=None):
        self.started = [*getattr(self, "started", []), tensor.numel()]
        tensor.mul_(2)
        return lambda: None


def test_a_bucket_starts_when_its_products_have_handed_over_all_that_they_did_in_the_first_pass():
    found = rmt.masks(world_tools.masked())
    sizes = [mask.scores.numel() for mask in found]
    world = Watched(0, 2)
    reduction = Reduction(world, found, bucket=4 * max(sizes))
    assert len(reduction.buckets) > 2
    last, first = len(found) - 1, 0

    def walk(counts):
        reduction.begin(0)
        for i in reversed(range(len(found))):
            for _ in range(counts.get(i, 1)):
                reduction.buffer(0, i).fill_(1.0)
                reduction.handed(i)
            yield i

    counts = {first: 2, last: 3}
    for _ in walk(counts):
        assert not hasattr(world, "started"), "how many there will be is not known yet"
    reduction.end([True] * len(found))
    assert len(world.started) == len(reduction.buckets) and sum(world.started) == sum(sizes)
    world.started = []
    seen = [len(world.started) for _ in walk(counts)]
    assert seen[-1] == len(reduction.buckets) and seen[0] < seen[len(seen) // 2] < seen[-1]
    reduction.end([True] * len(found))
    reduction.wait()
    assert all(torch.equal(reduction.buffer(0, i), torch.full_like(m.scores, 2.0)) for i, m in enumerate(found))
    with pytest.raises(RuntimeError, match="got a gradient after its sum over ranks had begun"):
        list(walk(counts | {last: 4}))


def test_alone_nothing_is_started(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: pytest.fail("one process"))
    with joined() as world:
        assert world.alone and world.first and world.sum([1.5]) == [1.5] and world.alike(3)
        assert world.from_first(lambda: 5) == world.together(lambda: 5) == 5
        world.agree(lambda: pytest.fail("there is no one to compare with"))
        world.need(0, "images")
    assert world.sent == 0


def test_a_rank_that_stays_away_and_a_device_by_number_are_refused_in_time(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match="rank 1 of 2 has not met the others at localhost:1 within 1 s"),
        joined("cpu", start=1),
    ):
        pass
    with pytest.raises(UserError, match="device must be auto, cpu or cuda under torchrun"), joined("cuda:1"):
        pass


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_start_again_in_an_old_store_do_not_take_what_the_dead_have_left(late):
    store = torch.distributed.HashStore()

    def start(rank):
        time.sleep(0.1 * (rank == late))
        return _meet(store, rank, 3, 20)

    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(start, range(3)))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match="some rank has not been started"):
        _meet(store, 0, 3, 0.1)


def test_the_hash_of_the_code_sees_one_changed_line(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    before = code_sha256([package])
    (package / "notes.txt").write_text("not code\n")
    assert code_sha256([package]) == before
    (package / "a.py").write_text("x = 2\n")
    assert code_sha256([package]) != before
