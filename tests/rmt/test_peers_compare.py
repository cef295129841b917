"""rmt compare: one sample for all, cells that can be stopped and read back, and what is missing, with the reason."""

import dataclasses
import json
import time
from dataclasses import replace

import pytest
import tiny
import torch

from rmt import UserError
from rmt.cli import main
from rmt.config import MaskConfig, RunConfig, SelectConfig, TrainConfig
from rmt.peers import cells, compare, footing, masks, names, parts
from rmt.peers.compare import Options
from rmt.run import run

TRAIN = TrainConfig(batch=8, log_every=10, lr=1e-3, steps=10)
LIMITS = Options(views=2, max_steps=10, max_feature_steps=10)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model, data = tiny.model_folder(folder / "model", context=32), tiny.splits(folder / "data")
    tiny.images(folder / "data" / "val", 4, seed=3)
    tiny.splits(folder / "without")
    return RunConfig(model, data=str(data), shots=4, device="cpu", train=TRAIN), folder


@pytest.fixture(scope="module")
def done(place):
    """A comparison of everything that needs no optional package, and its folder."""
    config, folder = place
    methods = [*names.METHODS, "coop+ramt", "tip+ramt", "lora+ramt", "tip_f+coop+ramt"]
    return compare.compare(config, folder / "out", methods, [4], [1], LIMITS), folder / "out"


def result(out, name, cell="shots4-seed1"):
    return json.loads((out / name / cell / "result.json").read_text())


def test_every_method_is_measured_on_one_sample(done):
    table, out = done
    assert table["missing"] == []
    assert [row["method"] for row in table["rows"]][: len(names.METHODS)] == list(names.METHODS)
    found = [result(out, row["method"]) for row in table["rows"]]
    assert len({r["indices_sha256"] for r in found}) == len({r["base_sha256"] for r in found}) == 1
    for r in found:
        assert sum(map(sum, r["confusion"])) == 24 and r["images_per_second"] > 0
        assert (r["stored_bytes"] == 0) == (r["method"] == "zeroshot")
        assert r["sources"].keys() == set(r["parts"]) and all(r["sources"].values())
        assert r["peak_bytes"] is None or r["peak_bytes"] >= 0


def test_the_half_of_the_classes_and_a_selection_are_those_of_rmt_train(place, tmp_path):
    """--classes and --criterion mean what they mean there."""
    config, _ = place
    select = SelectConfig(criterion="snip", budget=0.5, batches=2)
    config = dataclasses.replace(config, classes="base", select=select)
    ordinary = run(config, tmp_path / "run")
    compare.compare(config, tmp_path / "out", ["ramt", "zeroshot"], [4], [1], LIMITS)
    mine, zero = (result(tmp_path / "out", name) for name in ("ramt", "zeroshot"))
    assert mine["bits_sha256"] == ordinary["bits_sha256"] and mine["trained_parameters"] == ordinary["scored"]
    assert mine["classnames"] == ordinary["classnames"] == ["blue sky", "green_leaf"]
    assert zero["metrics"]["acc1"] == ordinary["zero_shot"]["acc1"]


def test_what_starts_from_another_fit_needs_its_memory(done):
    peaks = [result(done[1], name)["peak_bytes"] for name in ("full_ft", "wise_ft")]
    assert None in peaks or peaks[1] >= peaks[0]


def test_stored_bytes_are_those_of_the_files(done):
    _, out = done
    files = [*out.glob("tip/*/tip.safetensors"), *out.glob("ramt/*/task/mask.safetensors")]
    assert len(files) == 2
    assert result(out, "tip")["stored_bytes"] == files[0].stat().st_size
    assert result(out, "ramt")["stored_bytes"] == result(out, "ramt")["task_bytes"] == files[1].stat().st_size
    both = [*out.glob("tip+ramt/*/tip.safetensors"), files[1]]
    assert result(out, "tip+ramt")["stored_bytes"] == sum(path.stat().st_size for path in both)


def test_what_costs_is_counted_whether_reused_or_not(done, place, tmp_path):
    _, out = done
    alone, _ = compare.compare(place[0], tmp_path, ["tip+ramt"], [4], [1], LIMITS), None
    assert alone["missing"] == [] and not (tmp_path / "ramt" / "shots4-seed1" / "result.json").exists()
    mine, other = result(tmp_path, "tip+ramt"), result(out, "tip+ramt")
    assert "the ramt run" in other["reused"]
    for r, folder in ((mine, tmp_path), (other, out)):
        fits = [json.loads((folder / name / "shots4-seed1" / "fit.json").read_text()) for name in ("ramt", "tip+ramt")]
        shared = fits[0]["shared_seconds"] | fits[1]["shared_seconds"]
        assert r["training_seconds"] == pytest.approx(sum(fit["own_seconds"] for fit in fits) + sum(shared.values()))
        assert fits[1]["training_seconds"] > fits[1]["own_seconds"]
    # What ran before does not matter for what comes out.
    assert mine["confusion"] == other["confusion"] and mine["bits_sha256"] == other["bits_sha256"]


def test_a_mask_method_is_the_ordinary_run(done, place, tmp_path):
    """The same bits as rmt train gives, and rmt eval measures its folder."""
    config, _ = place
    ordinary = run(dataclasses.replace(config, preset="amt"), tmp_path / "run")
    mine = result(done[1], "amt")
    assert mine["bits_sha256"] == ordinary["bits_sha256"] and mine["confusion"] == ordinary["confusion"]
    assert mine["percent_off"] == ordinary["percent_off"] > 0
    from rmt.run_commands import evaluate_run

    assert evaluate_run(str(done[1] / "amt" / "shots4-seed1"))["acc1"] == mine["metrics"]["acc1"]


def test_finished_cells_are_read_back(done, place, capsys, monkeypatch):
    config, folder = place
    monkeypatch.setattr(cells.Sample, "_fit", lambda *a: pytest.fail("fitted again"))
    monkeypatch.setattr(cells.Sample, "_measured", lambda *a: pytest.fail("measured again"))
    again = compare.compare(config, folder / "out", ["coop", "tip+ramt"], [4], [1], LIMITS)
    assert [row["method"] for row in again["rows"]] == ["coop", "tip+ramt"]
    assert again["rows"][1]["acc1"]["mean"] == result(folder / "out", "tip+ramt")["metrics"]["acc1"]


def test_a_fit_that_was_not_measured_yet_is_not_fitted_again(place, tmp_path, monkeypatch):
    config, _ = place
    names_ = ["ln", "coop"]
    first = compare.compare(config, tmp_path, names_, [4], [1], LIMITS)
    before = [result(tmp_path, name) for name in names_]
    for name in names_:
        (tmp_path / name / "shots4-seed1" / "result.json").unlink()
    monkeypatch.setattr(cells.Sample, "_fit", lambda *a: pytest.fail("fitted again"))
    again = compare.compare(config, tmp_path, names_, [4], [1], LIMITS)
    after = [result(tmp_path, name) for name in names_]
    for name in ("confusion", "training_seconds", "stored_bytes"):
        assert [r[name] for r in before] == [r[name] for r in after]
    assert [row["acc1"] for row in first["rows"]] == [row["acc1"] for row in again["rows"]]


def test_another_comparison_is_refused(done, place):
    config, folder = place
    with pytest.raises(UserError, match=r"compare\.yaml differs"):
        compare.compare(config, folder / "out", ["coop"], [4], [1], Options(views=3))


def test_without_validation_images_the_others_go_on(place, capsys):
    """Through the command line: what is missing, why, what helps, and exit status 1."""
    config, folder = place
    argv = ["compare", "--model", config.model, "--data", str(folder / "without"), "--shots", "2", "4", "--seeds", "1",
            "--methods", "zeroshot,linear_probe", "tip", "bitfit", "--max-steps", "4", "--rates", "bitfit=1e-2",
            "--batch", "8", "--out", str(folder / "gaps"), "--views", "2"]  # fmt: skip
    assert main(argv) == 1
    table = json.loads((folder / "gaps" / "compare.json").read_text())
    assert [(row["method"], row["shots"]) for row in table["rows"]] == [
        ("zeroshot", 2), ("bitfit", 2), ("zeroshot", 4), ("bitfit", 4)
    ]  # fmt: skip
    assert {(row["method"], row["shots"]) for row in table["missing"]} == {
        (name, k) for name in ("linear_probe", "tip") for k in (2, 4)
    }
    assert all("put some into a val folder" in row["why"] for row in table["missing"])
    assert result(folder / "gaps", "bitfit", "shots2-seed1")["chosen"]["bitfit"]["lr"] == 1e-2
    said = capsys.readouterr().out
    assert "missing    tip, shots 4, seed 1" in said


def test_masks_that_fail_take_only_their_own_with_them(place, tmp_path, monkeypatch):
    from rmt.peers.masks import RAMT

    def broken(self, footing, state):
        raise UserError("no masks today")

    monkeypatch.setattr(RAMT, "fit", broken)
    table = compare.compare(place[0], tmp_path, ["ramt", "tip+ramt", "ln"], [4], [1], LIMITS)
    assert [row["method"] for row in table["rows"]] == ["ln"]
    assert {row["method"]: row["why"] for row in table["missing"]} == {
        "ramt": "no masks today", "tip+ramt": "no masks today"
    }  # fmt: skip


@pytest.mark.parametrize("options,why", [
    ({"views": 0}, "views must be at least 1"),
    ({"max_steps": 0}, "max_steps must be at least 1"),
    ({"rates": {"lora": -1.0}}, "above 0"),
    ({"rates": {"tip+ramt": 1.0}}, "of one method"),
    ({"rates": {"lara": 1.0}}, "did you mean lora"),
])  # fmt: skip
def test_bad_options(options, why):
    with pytest.raises(UserError, match=why):
        Options(**options)


def test_frees_what_nobody_asks_for(place, tmp_path):
    config, _ = place
    shared = compare.Shared.load(config)
    from rmt.evaluate import sampled
    from rmt.peers.footing import Footing

    args = (config, shared.loaded, sampled(config), shared.text, shared.template, shared.shelf, shared.cache)
    footing = Footing(*args, **vars(LIMITS))
    sample = cells.Sample(footing, tmp_path, "data", "", LIMITS, "")
    ramt, tip = names.parse("ramt"), names.parse("tip+ramt")
    sample.result(ramt)
    sample.forget([tip])
    assert ("ramt",) in sample._states and (("ramt",), "test") in shared.shelf._kept
    sample.result(tip)
    sample.forget([])
    assert set(sample._states) == {()} and (("ramt",), "test") not in shared.shelf._kept


def test_joint_masks_take_the_steps_of_the_method(tmp_path, monkeypatch):
    """With the vectors standing still, masks and draws are those of rmt.step over the context's class vectors."""
    import peer_tools

    from rmt import clip
    from rmt.optim import MaskAdam
    from rmt.peers.coop import CoOp
    from rmt.peers.joint import Joint
    from rmt.peers.masks import RAMT
    from rmt.step import Step

    monkeypatch.setattr("rmt.peers.joint.dassl_rates", lambda lr, steps, epochs: [0.0] * steps)
    footing = dataclasses.replace(peer_tools.footing(tmp_path), folder=tmp_path / "joint")
    joint = Joint(RAMT(), CoOp())
    state = footing.start()
    fit = joint.fit(footing, state)
    got = joint.restore(footing, state, fit.stored)

    masks = RAMT()
    config, made, _ = masks.schedule(footing, masks.config(footing))
    setup = masks.setup(footing, state, config)
    context = CoOp().context(footing, setup.clip.model)

    class Prompted(clip.Text):
        masked = True  # student and teacher differ from the first step on

        def student(self):
            return context.text().detach()

    text = Prompted(setup.clip.model, footing.text.tokens, state.text)
    optimizer = MaskAdam(setup.masks, lr=made.rates[0])
    step = Step(setup.clip.model, text, optimizer, config.train, seed=config.seed)
    for n, rate in enumerate(made.rates):
        optimizer.set_lr(rate)
        step(*footing.batches()(n), n)
    stored = RAMT().restore(footing, state, {})
    setup.model.merge_and_unload()
    for (name, a), b in zip(stored.model.state_dict().items(), setup.clip.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert fit.facts["off"] > 0 and fit.trained == fit.stored["context"].numel() + fit.facts["masked"]
    torch.testing.assert_close(got.text, context.text().detach())


def test_joint_vectors_learn(place, tmp_path):
    import peer_tools

    from rmt.peers.coop import CoOp
    from rmt.peers.joint import Joint
    from rmt.peers.masks import AMT

    footing = dataclasses.replace(peer_tools.footing(tmp_path), folder=tmp_path / "joint")
    state, joint = footing.start(), Joint(AMT(), CoOp())
    fit = joint.fit(footing, state)
    start = CoOp().context(footing, state.model).vectors
    assert not torch.equal(fit.stored["context"], start) and fit.facts["off"] > 0
    got = joint.restore(footing, state, fit.stored)
    assert got.stack == ("coop+amt",) and not torch.allclose(got.text, state.text)


def fit(out, name):
    return json.loads((out / name / "shots4-seed1" / "fit.json").read_text())


def slowed(monkeypatch, module, name, seconds):
    plain = getattr(module, name)

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return plain(*args, **kwargs)

    monkeypatch.setattr(module, name, slow)


def test_what_another_fit_took_is_paid_once_in_any_order(place, tmp_path, monkeypatch):
    slowed(monkeypatch, parts, "train", 2)
    compare.compare(place[0], tmp_path, ["wise_ft", "full_ft"], [4], [1], LIMITS)
    full, wise = fit(tmp_path, "full_ft"), fit(tmp_path, "wise_ft")
    assert wise["own_seconds"] < 1 < 2 < full["own_seconds"]
    assert full["training_seconds"] <= wise["training_seconds"] < full["training_seconds"] + 1
    assert wise["shared_seconds"]["full_ft"] == full["own_seconds"]


def test_a_combination_pays_for_shared_features_once(place, tmp_path, monkeypatch):
    slowed(monkeypatch, footing, "encode", 0.3)
    compare.compare(place[0], tmp_path, ["coop+tip"], [4], [1], LIMITS)
    first, second, both = fit(tmp_path, "coop"), fit(tmp_path, "coop+tip"), result(tmp_path, "coop+tip")
    views = {f"augmented features, view {i}" for i in range(LIMITS.views)}
    assert views <= first["shared_seconds"].keys() & second["shared_seconds"].keys()
    once = sum((first["shared_seconds"] | second["shared_seconds"]).values())
    assert both["training_seconds"] == pytest.approx(first["own_seconds"] + second["own_seconds"] + once)
    assert both["training_seconds"] < first["training_seconds"] + second["training_seconds"] - 0.5


def test_seconds_of_a_call_that_was_killed_count(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(masks.MaskTuning, "stored", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare.compare(place[0], tmp_path, ["ramt"], [4], [1], LIMITS)
    state = torch.load(tmp_path / "ramt" / "shots4-seed1" / "last.pt", weights_only=True)
    compare.compare(place[0], tmp_path, ["ramt"], [4], [1], LIMITS)
    assert fit(tmp_path, "ramt")["own_seconds"] >= state["seconds"] > 0


def test_steps_of_the_authors_are_those_of_the_recipe(done):
    """Of which a length that was asked for, like a limit, is a part; a cache without training takes none away."""
    for name in ("ramt", "bitfit", "wise_ft", "coop+ramt", "tip+ramt", "coop+tip_f+ramt"):
        found = result(done[1], name)
        assert found["published_steps"] > found["steps"] > 0, name
    assert result(done[1], "tip+ramt")["published_steps"] == result(done[1], "ramt")["published_steps"]
    assert result(done[1], "zeroshot")["published_steps"] is result(done[1], "tip")["published_steps"] is None


def test_a_folder_takes_the_same_comparison_in_other_words_and_no_other(tmp_path):
    config = RunConfig("local-dir:m", data="d", shots=16, train=TrainConfig(strength=1.0))
    need = compare._need_same
    need([config], Options(max_steps=3), tmp_path)
    written = (tmp_path / "compare.yaml").read_bytes()
    for same in (
        config, replace(config, train=TrainConfig(strength=1, lr=8e-5)), replace(config, preset="ramt", seed=7),
        replace(config, mask=MaskConfig(targets=("attention", "conv"))),
    ):  # fmt: skip
        need([same, replace(same, shots=1)], Options(max_steps=3), tmp_path)
    for samples, options in (
        ([replace(config, train=TrainConfig(strength=0.5))], Options(max_steps=3)),
        # What 16 shots have by themselves, but 1 shot has not.
        ([replace(config, train=TrainConfig())], Options(max_steps=3)),
        ([replace(config, train=TrainConfig(strength=1.0, epochs=30))], Options(max_steps=3)),
        ([config], Options(max_steps=4)),
    ):
        with pytest.raises(UserError, match=r"compare\.yaml differs from what is asked for"):
            need(samples, options, tmp_path)
    assert (tmp_path / "compare.yaml").read_bytes() == written
    (tmp_path / "compare.yaml").write_text("[")
    with pytest.raises(UserError, match="differs from what is asked for"):
        need([config], Options(), tmp_path)
