"""Ablations: what each varies, that a setting runs once, and what its table says."""

import dataclasses
import json

import numpy as np
import pytest
import tiny

from rmt import ablations, cli
from rmt.ablations import ABLATIONS, ablate, cells, chosen, difference, folders, settled
from rmt.config import CRITERIA, MaskConfig, RunConfig, SelectConfig, TrainConfig, UserError, from_yaml, resolve

PLAIN = RunConfig("local-dir:m", data="somewhere/pets")
TRAIN = TrainConfig(lr=2e-3, steps=6, batch=8, l2=0.0, strength=1.0, log_every=9, save_every=99)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data", train=4, test=6)
    return RunConfig(tiny.model_folder(root / "model"), data=str(root / "data"), shots=2, device="cpu", train=TRAIN)


def no_run(*args):
    pytest.fail("what is finished must be read back")


def changes(what, config=PLAIN):
    return {label: difference(settled(config), cell) for label, cell in cells(config, what).items()}


def test_every_ablation_varies_its_own_part_alone():
    strengths = {label: {"train.strength": float(label)} for label in ("0", "0.1", "0.5", "0.7", "1")}
    assert changes("strength") == strengths | {"0.3": {}}
    assert set(changes("threshold")) == {"0.001", "0.0025", "0.005", "0.0075", "0.009"}
    assert changes("threshold")["0.009"] == {"mask.threshold": 0.009} and changes("threshold")["0.005"] == {}
    assert changes("init") == {
        label: {} if label == "0.01" else {"mask.init": float(label)}
        for label in ("0.006", "0.0075", "0.01", "0.015", "0.02")
    }
    assert changes("targets") == {
        "attention+conv": {}, "attention": {"mask.targets": ("attention",)}, "mlp": {"mask.targets": ("mlp",)},
        "all": {"mask.targets": ("attention", "mlp", "conv")},
    }  # fmt: skip
    selection = changes("selection")
    assert list(selection) == ["none", *CRITERIA] and selection["none"] == {}
    assert selection["fisher"] == {"select.criterion": "fisher"}
    assert selection["influence"] == {"select.criterion": "influence", "select.unit": "module"}
    assert changes("budget")["0.03"] == {"select.criterion": "snip", "select.budget": 0.03}
    assert changes("budget")["0.1"] == {"select.criterion": "snip"} and changes("budget")["all"] == {}
    assert changes("l2") == {"with": {}, "without": {"train.l2": 0.0}}
    assert changes("dropout") == {
        "off": {"train.strength": 0.0}, "agreement": {}, "random": {"train.dropout": "random"},
        "sign": {"train.dropout": "sign"}, "kl": {"train.dropout": "kl"},
    }  # fmt: skip
    # The recipe's strength is 1 but at 16 shots; one that is given stays.
    assert changes("shots") == {
        label: {} if label == "16" else {"shots": int(label), "train.strength": 1.0}
        for label in ("1", "2", "4", "8", "16")
    }
    given = dataclasses.replace(PLAIN, train=TrainConfig(strength=0.5))
    assert changes("shots", given)["1"] == {"shots": 1} and changes("strength", given)["0.5"] == {}
    assert set(ABLATIONS) == {
        "strength", "threshold", "init", "spread", "targets", "selection", "budget", "l2", "dropout", "shots",
    }  # fmt: skip


def test_settled_is_the_same_run():
    """Resolved but for the epochs, which the schedule may stretch where the config names none."""
    for config in (PLAIN, dataclasses.replace(PLAIN, train=TrainConfig(epochs=7), preset="amt")):
        assert resolve(settled(config)) == resolve(config) and settled(config).train.epochs == config.train.epochs


def test_the_default_setting_is_always_a_row():
    config = dataclasses.replace(PLAIN, train=TrainConfig(strength=0.45))
    assert next(iter(cells(config, "strength"))) == "default" and changes("strength", config)["default"] == {}
    assert changes("budget", dataclasses.replace(PLAIN, select=SelectConfig("lamp", 0.2))) == {
        "default": {}, "0.01": {"select.budget": 0.01}, "0.03": {"select.budget": 0.03},
        "0.1": {"select.budget": 0.1}, "0.3": {"select.budget": 0.3}, "all": {"select.criterion": None},
    }  # fmt: skip


def test_a_setting_has_one_folder_whatever_is_asked_for():
    places = folders(PLAIN)
    assert places[settled(PLAIN)].as_posix() == "default"
    without = cells(PLAIN, "dropout")["off"]
    assert without == cells(PLAIN, "strength")["0"] and places[without].as_posix() == "strength/0"
    assert places[cells(PLAIN, "budget")["0.1"]].as_posix() == "selection/snip"
    assert len(set(places.values())) == len(places)


def test_names(capsys):
    assert chosen(["shots", "l2", "shots"]) == ["shots", "l2"] and chosen(["l2", "all"]) == list(ABLATIONS)
    with pytest.raises(UserError, match=r"an ablation must be .* strength, .* got 'drop': did you mean drop"):
        chosen(["l2", "drop"])


def test_bad_settings_are_found_before_the_first_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "run", no_run)
    low = dataclasses.replace(config, mask=MaskConfig(init=6e-3))
    with pytest.raises(UserError, match=r"ablation threshold, 0\.0075: init must be a finite number above threshold"):
        ablate(low, tmp_path, ["l2", "threshold"], [1])
    weak = dataclasses.replace(config, preset="amt", train=TrainConfig())
    with pytest.raises(UserError, match="ablation dropout compares rules at one strength above 0, got 0"):
        ablate(weak, tmp_path, ["dropout"], [1])
    with pytest.raises(UserError, match="seed must be an integer from 0"):
        ablate(config, tmp_path, ["l2"], [1, -1])
    with pytest.raises(UserError, match="at least one seed, got none"):
        ablate(config, tmp_path, ["l2"], [])
    assert not list(tmp_path.iterdir())


def test_an_ablation_is_ordinary_runs_and_a_table(config, tmp_path, monkeypatch, capsys):
    measured, real = [], ablations.run
    test = ablations.run.__globals__["Setup"].test

    def count(self, *, frozen=False, **others):
        measured.append(frozen)
        return test(self, frozen=frozen, **others)

    monkeypatch.setattr(ablations.run.__globals__["Setup"], "test", count)
    tables = ablate(config, tmp_path, ["dropout", "strength"], [1, 2])
    printed = capsys.readouterr().out
    # Five rules, and four strengths that are no rule's already; one zero-shot measurement for all.
    assert measured.count(False) == 2 * 9 and measured.count(True) == 1
    for what, labels in {
        "dropout": ["off", "agreement", "random", "sign", "kl"], "strength": ["0", "0.1", "0.3", "0.5", "0.7", "1"],
    }.items():  # fmt: skip
        table = tables[what]
        assert json.loads((tmp_path / what / "table.json").read_text()) == json.loads(json.dumps(table))
        assert {k: table[k] for k in ("kind", "what", "dataset", "failed")} == {
            "kind": "ablation", "what": what, "dataset": "data", "failed": {},
        }  # fmt: skip
        assert [row["label"] for row in table["rows"]] == labels
        assert [row["label"] for row in table["rows"] if row["default"]] == ["agreement" if what == "dropout" else "1"]
        for row in table["rows"]:
            runs = [tmp_path / row["folder"] / f"seed{seed}" for seed in (1, 2)]
            results = [json.loads((run / "result.json").read_text()) for run in runs]
            for name, values in {
                "acc1": [r["metrics"]["acc1"] for r in results], "percent_off": [r["percent_off"] for r in results],
                "tuning_seconds": [r["tuning_seconds"] for r in results],
                "zero_shot": [r["zero_shot"]["acc1"] for r in results],
            }.items():  # fmt: skip
                assert row[name] == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
            default = [json.loads((tmp_path / f"default/seed{s}/result.json").read_text()) for s in (1, 2)]
            gains = [r["metrics"]["acc1"] - d["metrics"]["acc1"] for r, d in zip(results, default)]
            assert row["versus_default"] == pytest.approx({"mean": np.mean(gains), "sd": np.std(gains, ddof=1)})
            assert row["seeds"] == [1, 2] and row["steps"] == [6, 6] and row["schedule"] is None
            for run, seed in zip(runs, (1, 2)):
                mine = from_yaml((run / "config.yaml").read_text())
                assert mine.seed == seed
                assert difference(settled(config), dataclasses.replace(mine, seed=1)) == row["changes"]
    off, agreement, random, sign, kl = (row["bits_sha256"] for row in tables["dropout"]["rows"])
    assert (
        off == tables["strength"]["rows"][0]["bits_sha256"]
        and agreement == tables["strength"]["rows"][-1]["bits_sha256"]
    )
    assert len({tuple(bits) for bits in (off, agreement, random, sign, kl)}) == 5, "the rules must matter"
    assert "ablation   dropout: gradient dropout, none, and its rivals" in printed
    assert any(line.startswith("agreement * ") for line in printed.splitlines())
    # Again, and with one more ablation: nothing runs but what is new.
    monkeypatch.setattr(ablations, "run", lambda c, f, k: real(c, f, k) if "l2" in str(f) else read_back(f))
    again = ablate(config, tmp_path, ["strength", "l2"], [1, 2])
    assert again["strength"] == json.loads(json.dumps(tables["strength"]))
    assert [row["folder"] for row in again["l2"]["rows"]] == ["l2/with", "default"]
    ablated = dataclasses.replace(config, seed=7)
    assert ablate(ablated, tmp_path, ["strength"], [1, 2]) == {"strength": again["strength"]}
    with pytest.raises(UserError, match=r"another default .* differs in .*'shots': 4.*: give another --out"):
        ablate(dataclasses.replace(config, shots=4), tmp_path, ["strength"], [1])


def read_back(folder):
    assert (folder / "result.json").is_file(), "what is finished must be read back"
    return json.loads((folder / "result.json").read_text())


def test_the_schedules_word_is_kept(config, tmp_path, capsys):
    """From a threshold that is farther away no mask can flip in so few steps of 1e-3."""
    short = dataclasses.replace(config, train=dataclasses.replace(TRAIN, lr=1e-3, strength=1.0))
    rows = {row["label"]: row for row in ablate(short, tmp_path, ["threshold"], [1])["threshold"]["rows"]}
    assert rows["0.001"]["schedule"].startswith("no mask can flip in 6 steps: Adam can move a score by at most")
    assert rows["0.001"]["percent_off"]["mean"] == 0 and rows["0.009"]["schedule"] is None
    assert rows["0.009"]["percent_off"]["mean"] > 0
    assert "schedule   0.001: no mask can flip in 6 steps" in capsys.readouterr().out


def test_selection_fails_alone_and_goes_on(config, tmp_path, monkeypatch):
    real = ablations.run

    def run(cell, folder, known):
        if cell.select.criterion not in (None, "snip", "influence"):
            raise OSError(28, "No space left on device", str(folder))
        return real(cell, folder, known)

    monkeypatch.setattr(ablations, "run", run)
    table = ablate(config, tmp_path, ["selection"], [1])["selection"]
    assert [row["label"] for row in table["rows"]] == ["none", "snip", "influence"]
    failed = {tmp_path / "selection" / c / "seed1" for c in CRITERIA} - {tmp_path / "selection" / "snip" / "seed1"}
    failed -= {tmp_path / "selection" / "influence" / "seed1"}
    assert set(table["failed"]) == {str(path) for path in failed}
    assert all("No space left on device" in why for why in table["failed"].values())
    whole, few = (table["rows"][i]["percent_off"]["mean"] for i in (0, 1))
    assert 0 < few <= 10 < whole


def test_the_zero_shot_measurement_is_shared_where_it_is_the_same(config, tmp_path, monkeypatch):
    """Of one model, images, template, and the same masked modules: those round in ways of their own."""
    setup = ablations.run.__globals__["Setup"]
    test, measured = setup.test, []
    monkeypatch.setattr(setup, "test", lambda self, **o: measured.append(o.get("frozen")) or test(self, **o))
    known = {}
    ours = ablations.run(config, tmp_path / "1", known)
    assert ablations.run(dataclasses.replace(config, shots=1), tmp_path / "2", known)["zero_shot"] == ours["zero_shot"]
    assert measured.count(True) == 1
    for n, change in enumerate((
        {"template": "{}"}, {"classes": "base"}, {"image_size": 24}, {"mask": MaskConfig(targets=("mlp",))},
        {"select": SelectConfig("magnitude", 0.5)},
    )):  # fmt: skip
        ablations.run(dataclasses.replace(config, **change), tmp_path / f"other{n}", known)
        assert measured.count(True) == len(known) == 2 + n
    ablations.run(config, tmp_path / "alone")
    assert measured.count(True) == len(known) + 1


def test_the_command(config, tmp_path, capsys):
    flags = ["--model", config.model, "--data", config.data, "--shots", "2", "--device", "cpu", "--lr", "2e-3"]
    flags += ["--steps", "2", "--batch", "8", "--seeds", "1", "--out", str(tmp_path / "out")]
    assert cli.main(["ablate", "l2", *flags]) == 0
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "l2" / "table.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["with", "without"] and str(tmp_path / "out" / "l2") in printed
    assert cli.main(["ablate", "l3", *flags]) == 2
    assert "an ablation must be all or one of" in capsys.readouterr().err
    assert cli.main(["ablate", "l2", *flags, "--shots", "1", "2"]) == 2
    assert "ablate needs one number of shots" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        cli.main(["ablate", "--list"])
    listed = capsys.readouterr().out
    assert done.value.code == 0 and [line.split()[0] for line in listed.splitlines()] == list(ABLATIONS)


def test_the_command_says_what_failed(config, tmp_path, capsys):
    (tmp_path / "l2").mkdir()
    (tmp_path / "l2" / "without").write_text("in the way of a folder")
    flags = ["--model", config.model, "--data", config.data, "--shots", "2", "--device", "cpu", "--steps", "2"]
    assert cli.main(["ablate", "l2", *flags, "--batch", "8", "--seeds", "1", "--out", str(tmp_path)]) == 2
    assert "1 failed, the others are done" in capsys.readouterr().err
    assert [row["label"] for row in json.loads((tmp_path / "l2" / "table.json").read_text())["rows"]] == ["with"]
