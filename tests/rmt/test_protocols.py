import dataclasses
import json
import statistics

import numpy as np
import pytest
import tiny
import torch

from rmt import clip, protocols
from rmt.config import RunConfig, TrainConfig, UserError
from rmt.data import few_shot, read
from rmt.data.imagenet import wnids
from rmt.evaluate import load_run, read_run
from rmt.protocols import base_to_new, check_protocol, cross_domain, grid, harmonic, spread

QUICK = TrainConfig(lr=3e-3, steps=4, batch=8, l2=0.0)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data", train=4, test=6)
    model = tiny.model_folder(root / "model")
    return RunConfig(model, data=str(root / "data"), shots=2, device="cpu", train=QUICK)


def coop(root, folder, split_file, test=5):
    """A data set in CoOp's layout: `folder`/images and its split file, two classes with names of their own."""
    names = {"red ball": "crimson_sphere", "blue sky": "azure"}
    tiny.images(root / folder / "images", test, seed=5)
    rows = [[f"{old}/{i:03}.png", n, new] for n, (old, new) in enumerate(names.items()) for i in range(test)]
    (root / folder / split_file).write_text(json.dumps({"train": rows, "val": rows, "test": rows}))
    return root


def no_run(*args):
    pytest.fail("what is finished must be read back")


def test_spread_and_harmonic_mean_agree_with_other_libraries():
    values = [61.0, 64.5, 70.25]
    assert spread(values) == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
    assert spread([3.0]) == {"mean": 3.0, "sd": None}
    assert harmonic(69.34, 74.22) == pytest.approx(statistics.harmonic_mean([69.34, 74.22]))
    # CLIP ViT-B/16 over 11 data sets, as MaPLe's README has it.
    assert round(harmonic(69.34, 74.22), 2) == 71.70 and harmonic(0.0, 0.0) == 0.0


def test_only_coops_protocol_is_known():
    check_protocol("coop")
    with pytest.raises(UserError, match=r"protocol must be coop .* got 'tip': .* least of all on the test split"):
        check_protocol("tip")


def test_a_grid_makes_one_table_of_all_runs_and_reads_it_back(config, tmp_path, capsys, monkeypatch):
    table = grid(config, tmp_path, [1, 2], [1, 2, 3])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "table.json").read_text()) == table and table["failed"] == {}
    assert [row["shots"] for row in table["rows"]] == [1, 2]
    for row in table["rows"]:
        results = [json.loads((tmp_path / f"shots{row['shots']}/seed{s}/result.json").read_text()) for s in (1, 2, 3)]
        assert len({r["indices_sha256"] for r in results}) == 3
        for name in ("acc1", "mean_per_class_recall", "macro_f1"):
            values = [r["metrics"][name] for r in results]
            assert row[name] == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
        assert row["zero_shot"]["sd"] == 0 and row["seeds"] == [1, 2, 3]
        shown = next(line for line in printed.splitlines() if line.split()[:2] == [str(row["shots"]), "3"])
        assert f"{row['acc1']['mean']:.2f} ± {row['acc1']['sd']:.2f}" in shown
    monkeypatch.setattr("rmt.run.prepare", no_run)
    assert grid(config, tmp_path, [1, 2], [1, 2, 3]) == table


def test_a_cell_that_fails_leaves_the_others_alone(config, tmp_path, monkeypatch, capsys):
    real = protocols.run

    def run(cell, folder, known):
        if cell.seed == 2:
            raise OSError(28, "No space left on device", str(folder))
        return real(cell, folder, known)

    monkeypatch.setattr(protocols, "run", run)
    table = grid(config, tmp_path, [1], [1, 2, 3])
    assert table["rows"][0]["seeds"] == [1, 3]
    assert list(table["failed"]) == [str(tmp_path / "shots1" / "seed2")]
    assert "No space left on device" in table["failed"][str(tmp_path / "shots1" / "seed2")]
    assert "failed     [Errno 28] No space left" in capsys.readouterr().out
    monkeypatch.setattr(protocols, "run", real)
    assert grid(config, tmp_path, [1], [1, 2, 3])["rows"][0]["seeds"] == [1, 2, 3]


def test_a_bad_cell_is_found_before_the_first_runs(config, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "run", no_run)
    with pytest.raises(UserError, match="shots must be an integer of at least 1, or all, got 0"):
        grid(config, tmp_path, [1, 0], [1])


def test_base_to_new_is_coops_protocol(config, tmp_path, capsys, monkeypatch):
    table = base_to_new(config, tmp_path, [1, 2])
    printed = capsys.readouterr().out
    whole = read(config)
    pairs = {name: [] for name in ("tuned", "zero_shot")}
    for seed in (1, 2):
        folder = tmp_path / f"seed{seed}"
        result, new = (json.loads((folder / name).read_text()) for name in ("result.json", "new.json"))
        # The sample of all classes, of which the base half is kept.
        train, _ = few_shot(whole.train, whole.val, 2, seed)
        kept = [item.path for item in train if item.classname in whole.classnames[:2]]
        assert json.loads((folder / "fewshot.json").read_text())["train"] == kept
        assert result["classnames"] == list(whole.classnames[:2])
        assert new["metrics"]["acc1"] == pytest.approx(by_hand(folder, whole.classnames[2:], masked=True))
        assert new["zero_shot"]["acc1"] == pytest.approx(by_hand(folder, whole.classnames[2:], masked=False))
        assert new["n"] == 12 and new["classes"] == 2
        pairs["tuned"].append((result["metrics"]["acc1"], new["metrics"]["acc1"]))
        pairs["zero_shot"].append((result["zero_shot"]["acc1"], new["zero_shot"]["acc1"]))
    for name, row in table["rows"].items():
        base, new = np.array(pairs[name]).T
        assert row["base"]["mean"] == pytest.approx(base.mean()) and row["new"]["mean"] == pytest.approx(new.mean())
        assert row["harmonic_of_means"] == pytest.approx(
            statistics.harmonic_mean([base.mean().item(), new.mean().item()])
        )
        each = [statistics.harmonic_mean(pair) for pair in pairs[name]]
        assert row["harmonic"] == pytest.approx({"mean": np.mean(each), "sd": np.std(each, ddof=1)})
        assert f"{row['harmonic_of_means']:.2f}" in printed
    assert json.loads((tmp_path / "table.json").read_text()) == json.loads(json.dumps(table))
    monkeypatch.setattr(protocols, "load_run", no_run)
    monkeypatch.setattr("rmt.run.prepare", no_run)
    assert json.loads(json.dumps(base_to_new(config, tmp_path, [1, 2]))) == json.loads(json.dumps(table))


def by_hand(folder, classnames, masked):
    """Accuracy on the test images of `classnames` among these alone, one image at a time."""
    config, task = read_run(folder)
    setup = load_run(config, task)
    text = clip.text_features(setup.clip, classnames, "a photo of a {}.")
    hits = []
    for item in read(dataclasses.replace(config, classes="all")).test:
        if item.classname in classnames:
            image = setup.clip.preprocess(tiny_image(item.path))[None]
            compute = clip.logits if masked else clip.frozen_logits
            with torch.no_grad():
                answer = compute(setup.clip.model, image, text).argmax().item()
            hits.append(classnames[answer] == item.classname)
    return 100 * sum(hits) / len(hits)


def tiny_image(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_base_to_new_takes_both_halves_itself(config, tmp_path):
    with pytest.raises(UserError, match="classes must be all, got 'base'"):
        base_to_new(dataclasses.replace(config, classes="base"), tmp_path, [1])


def test_new_is_measured_again_for_other_masks(config, tmp_path):
    base_to_new(config, tmp_path, [1])
    path = tmp_path / "seed1" / "new.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"bits_sha256": "of another run", "metrics": {"acc1": -1.0}}))
    assert base_to_new(config, tmp_path, [1])["rows"]["tuned"]["new"]["mean"] == good["metrics"]["acc1"]


def test_a_task_is_measured_on_other_data_sets_among_their_own_classes(config, tmp_path, monkeypatch, capsys):
    root, run = tmp_path / "root", tmp_path / "run"
    coop(root, "dtd", "split_zhou_DescribableTextures.json")
    protocols.run(config, run)
    table = cross_domain(run, ["dtd", "eurosat"], root)
    printed = capsys.readouterr().out
    row = table["rows"]["dtd"]
    assert row["n"] == 10 and row["classes"] == 2 and "eurosat" in next(iter(table["failed"]))
    other = dataclasses.replace(config, data=None, root=str(root), dataset="dtd")
    setup = load_run(*read_run(run), read(other))
    text = clip.text_features(setup.clip, ("crimson_sphere", "azure"), "{} texture.")
    with torch.no_grad():
        images = torch.stack([setup.clip.preprocess(tiny_image(item.path)) for item in setup.split.test])
        label = torch.tensor([item.label for item in setup.split.test])
        for compute, name in ((clip.logits, "metrics"), (clip.frozen_logits, "zero_shot")):
            hits = (compute(setup.clip.model, images, text).argmax(-1) == label).double().mean()
            assert row[name]["acc1"] == pytest.approx(100 * hits.item())
    assert row["metrics"]["ece"] != row["zero_shot"]["ece"]
    assert any(line.split()[:3] == ["dtd", "2", "10"] for line in printed.splitlines())
    assert table["source"]["dataset"] == "data"
    monkeypatch.setattr(protocols, "load_run", no_run)
    assert cross_domain(run, ["dtd"], root)["rows"] == {"dtd": row}


def test_imagenet_a_is_told_apart_among_its_own_200_classes(config, tmp_path):
    """An image of each class, and the class names by another way: timm's list of ids and open_clip's of names."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    place = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    mine = wnids("_a")
    tiny.images(tmp_path / "one", 1)
    for n, wnid in enumerate(mine):
        folder = tmp_path / "root" / "imagenet-adversarial" / "imagenet-a" / wnid
        folder.mkdir(parents=True)
        colour = sorted(tiny.COLOURS)[n % 4]
        (folder / "x.png").write_bytes((tmp_path / "one" / colour / "000.png").read_bytes())
    protocols.run(config, tmp_path / "run")
    row = cross_domain(tmp_path / "run", ["imagenet_a"], tmp_path / "root")["rows"]["imagenet_a"]
    assert row["classes"] == row["n"] == len(mine) == 200
    setup = load_run(*read_run(tmp_path / "run"))
    text = clip.text_features(setup.clip, [IMAGENET_CLASSNAMES[place[w]] for w in mine], "a photo of a {}.")
    with torch.no_grad():
        paths = [tmp_path / "one" / colour / "000.png" for colour in sorted(tiny.COLOURS)]
        images = torch.stack([setup.clip.preprocess(tiny_image(path)) for path in paths])
        answers = clip.logits(setup.clip.model, images, text).argmax(-1)
    hits = sum(answers[n % 4].item() == n for n in range(200))
    assert hits > 0 and row["metrics"]["acc1"] == pytest.approx(hits / 2)
