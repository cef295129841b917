import dataclasses

import numpy as np
import pytest
import tiny
import torch
from sklearn import metrics

from rmt import clip, evaluate
from rmt.config import MaskConfig, RunConfig, UserError, to_yaml
from rmt.evaluate import load_run, prepare, read_config, sampled
from rmt.measures import BINS, accuracy

CLASSES, IMAGES = 5, 300


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    tiny.splits(root / "data", train=6, test=3)
    return root, tiny.model_folder(root / "model")


def config(files, **more):
    root, model = files
    return RunConfig(**{"model": model, "data": str(root / "data"), "shots": 2, "device": "cpu"} | more)


def answers(seed=0):
    """Logits that are right more often than not, and labels; class 3 has no image, but is predicted sometimes."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([0, 1, 2, 4])[torch.randint(4, (IMAGES,), generator=generator)]
    z = 2 * torch.randn(IMAGES, CLASSES, generator=generator)
    z[torch.arange(IMAGES), label] += 2
    return z, label


def counted(z, label, batch=64):
    """`accuracy`, with images that are their own logits."""
    return accuracy(lambda x: x, zip(z.split(batch), label.split(batch)), z.shape[1], torch.device("cpu"))


def test_measures_agree_with_scikit_learn():
    z, label = answers()
    predicted, found = z.argmax(1), counted(z, label)
    assert (predicted == 3).sum() > 5 and not (label == 3).any()
    assert np.array_equal(found.confusion, metrics.confusion_matrix(label, predicted, labels=range(CLASSES)))
    assert found.n == IMAGES
    assert found.top1 == pytest.approx(100 * metrics.accuracy_score(label, predicted))
    recall = metrics.recall_score(label, predicted, labels=[0, 1, 2, 4], average=None)
    assert found.per_class[3] is None
    assert [p for p in found.per_class if p is not None] == pytest.approx(list(100 * recall))
    assert found.mean_per_class == pytest.approx(100 * recall.mean())
    # Dassl's Classification evaluator: labels=np.unique(y_true).
    f1 = metrics.f1_score(label, predicted, average="macro", labels=np.unique(label))
    assert found.macro_f1 == pytest.approx(100 * f1)
    assert found.metrics() == {
        "acc1": found.top1, "mean_per_class_recall": found.mean_per_class, "macro_f1": found.macro_f1, "ece": found.ece
    }  # fmt: skip


def test_measures_agree_with_their_definitions():
    z, label = answers(1)
    found, predicted = counted(z, label), z.argmax(1)
    f1 = []
    for c in set(label.tolist()):
        true_positive = sum(p == y == c for p, y in zip(predicted.tolist(), label.tolist()))
        precision, recall = true_positive / (predicted == c).sum().item(), true_positive / (label == c).sum().item()
        f1.append(2 * precision * recall / (precision + recall) if true_positive else 0.0)
    assert found.macro_f1 == pytest.approx(100 * sum(f1) / len(f1))
    # Guo et al. (2017), equation 3, as a loop over the bins.
    confidence, error = z.double().softmax(1).max(1).values.numpy(), 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            right = (predicted == label).numpy()[inside]
            error += inside.sum() / IMAGES * abs(right.mean() - confidence[inside].mean())
    assert found.ece == pytest.approx(100 * error) and found.ece > 1
    assert found.bins[:, 0].sum() == IMAGES and len(found.bins) == BINS == 15


def test_calibration_by_hand():
    """Confidence 0.9 and right half of the time: off by 0.4."""
    z = torch.tensor([[0.9, 0.1]] * 4).log()
    assert counted(z, torch.tensor([0, 0, 1, 1])).ece == pytest.approx(40, abs=1e-4)
    sure = torch.tensor([[1000.0, 0.0]])
    assert counted(sure, torch.tensor([0])).ece == 0 and counted(sure, torch.tensor([1])).ece == 100


def test_the_cut_into_batches_changes_nothing():
    z, label = answers()
    first, second = counted(z, label, 7), counted(z, label, 300)
    assert torch.equal(first.confusion, second.confusion) and first.ece == pytest.approx(second.ece)


def test_no_image_and_logits_that_are_not_finite_are_refused():
    z, label = answers()
    with pytest.raises(UserError, match="at least one image, got none"):
        accuracy(lambda x: x, [], 5, torch.device("cpu"))
    z[-1, 0] = float("nan")
    with pytest.raises(UserError, match="logits must be finite"):
        counted(z, label)


def test_the_text_says_what_was_counted():
    assert str(counted(torch.eye(2), torch.tensor([0, 0]))) == "50.00 % (1 of 2; mean per class 50.00 %)"


def test_a_setup_measures_the_model_with_and_without_its_masks(files):
    setup = prepare(config(files))
    plain = clip.load(*files[1:], None, None, torch.device("cpu"))
    text = clip.text_features(plain, setup.split.classnames, "a photo of a {}.")
    hits = 0
    with torch.no_grad():
        for item in setup.split.test:
            image = plain.preprocess(evaluate_image(item.path))[None]
            hits += int(clip.logits(plain.model, image, text).argmax() == item.label)
    assert setup.test().top1 == setup.test(frozen=True).top1 == pytest.approx(100 * hits / len(setup.split.test))
    assert setup.test(part="train").n == 24 and setup.device.type == "cpu"
    with torch.no_grad():
        for mask in setup.masks:
            mask.scores.uniform_(0, 1e-2, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(setup.test().bins, setup.test(frozen=True).bins)
    assert setup.test(frozen=True).top1 == pytest.approx(100 * hits / len(setup.split.test))


def evaluate_image(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_a_resolved_config_and_the_template_in_force(files):
    setup = prepare(config(files))
    assert setup.config.mask == MaskConfig(("attention", "conv")) and setup.config.train.lr == 8e-5
    assert setup.template == "a photo of a {}."
    assert prepare(config(files, template="a toy {}.")).template == "a toy {}."
    split = dataclasses.replace(setup.split, template="{} texture.")
    assert prepare(config(files), split).template == "{} texture."


def test_on_other_classes_the_text_is_made_anew(files):
    setup = prepare(config(files))
    half = evaluate.subset(setup.split, "new")
    other = setup.on(half, setup.template)
    want = clip.text_features(setup.clip, half.classnames, setup.template)
    assert torch.equal(other.text.features(grad=False), want) and other.test().confusion.shape == (2, 2)
    assert setup.test().confusion.shape == (4, 4)


def test_the_sample_is_drawn_over_all_classes_before_the_half_is_taken(files):
    whole = sampled(config(files, seed=3))
    for half, labels in (("base", (0, 1)), ("new", (2, 3))):
        got = sampled(config(files, seed=3, classes=half))
        want = [item.path for item in whole.train if item.label in labels]
        assert [item.path for item in got.train] == want and len(want) == 4
        assert {item.label for item in got.train} == {0, 1}
    assert len(sampled(config(files, shots="all")).train) == 24


def test_what_chooses_sees_no_test_image(files):
    seen = []

    def choose(loaded, split, text, resolved):
        seen.append((len(split.train), split.test, tuple(text.shape), resolved.mask.targets))

    setup = prepare(config(files), sampled(config(files)), choose)
    assert seen == [(8, [], (4, 32), ("attention", "conv"))] and len(setup.split.test) == 12


def test_a_task_comes_back_with_its_bits(files, tmp_path):
    setup = prepare(config(files))
    with torch.no_grad():
        for mask in setup.masks:
            mask.scores.uniform_(0, 1e-2, generator=torch.Generator().manual_seed(1))
    setup.model.save_pretrained(tmp_path / "task", setup.split.classnames, setup.template, setup.config)
    (tmp_path / "config.yaml").write_text(to_yaml(config(files)))
    found, task = evaluate.read_run(tmp_path)
    assert found == config(files)
    again = load_run(found, task)
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(setup.masks, again.masks))
    assert torch.equal(again.test().confusion, setup.test().confusion)
    # On images in a plain folder, which has no template of its own, the one that the masks were tuned with.
    toy = dataclasses.replace(task, template="a toy {}.")
    assert load_run(found, toy).template == "a toy {}." and again.template == "a photo of a {}."
    assert load_run(dataclasses.replace(found, template="{}"), toy).template == "{}"
    with pytest.raises(UserError, match=r"must have the task's 4 classes; the two differ in"):
        load_run(dataclasses.replace(found, classes="base"), task)
    other = evaluate.subset(setup.split, "base")
    assert load_run(found, task, other).test().confusion.shape == (2, 2)
    changed = dataclasses.replace(found, model=tiny.model_folder(tmp_path / "other", seed=9))
    with pytest.raises(UserError, match="another"):
        load_run(changed, task)
    load_run(changed, task, allow_base_mismatch=True)


def test_a_run_folder_that_is_none_or_is_damaged_is_named(tmp_path):
    with pytest.raises(UserError, match=r"expected a run folder with config.yaml and task/, got '.*' without it"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml: .*must be YAML"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"config\.yaml: "):
        read_config(tmp_path)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="device must be auto, cpu or a device of this machine, got 'gpu'"):
        clip.pick_device("gpu")
