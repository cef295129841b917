"""The task bank: mixed batches against each task alone, names, other backbones, memory, swaps, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_masking import MODELS, ordinary_path, randomised  # noqa: F401, a fixture

import rmt
import rmt_kernels as rk
from rmt import clip
from rmt.bank_swap import bank_modules
from rmt.checkpoint import load_task
from rmt.config import TARGETS, MaskConfig, UserError
from rmt.masked import masks

NAMES, TEMPLATE = ("red ball", "green_leaf", "blue sky"), "a photo of a {}."
CONFIGS = {"attention": MaskConfig(), "mlp": MaskConfig(targets=("mlp",)), "all": MaskConfig(targets=TARGETS)}
BASE = "__base__"
MIXED = ["attention", BASE, "all", "attention", "mlp", "all", "attention"]


def tokenizer():
    return open_clip.tokenizer.SimpleTokenizer(context_length=16)


def tuned(config: MaskConfig, make=tiny.model, seed: int = 1) -> rmt.MaskModel:
    model = rmt.get_mask_model(make(), config)
    randomised(model.masks, seed)
    return model


# ruff: noqa: F811, a fixture's name is its argument's


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task folders of three configurations, and the masked models that they were made of."""
    root, models = tmp_path_factory.mktemp("tasks"), {}
    for i, (name, config) in enumerate(CONFIGS.items()):
        models[name] = tuned(config, seed=i)
        models[name].save_pretrained(root / name, NAMES[i:], TEMPLATE)
    return root, models


@pytest.fixture
def bank(files):
    bank = rmt.TaskBank(tiny.model(), tokenizer=tokenizer())
    for name in CONFIGS:
        bank.load(files[0] / name)
    return bank


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).norm() < 1e-5 * want.norm())


def test_every_image_of_a_mixed_batch_meets_its_own_task(bank, files):
    models, x = files[1] | {BASE: tiny.model()}, images(len(MIXED))
    got = bank.encode_image(x, MIXED)
    assert not got.requires_grad
    for i, name in enumerate(MIXED):
        want = models[name].encode_image(x[i : i + 1])[0]
        assert near(got[i], want), name
        others = [models[other].encode_image(x[i : i + 1])[0] for other in models if other != name]
        assert not any(near(got[i], other) for other in others), "another task's answer would pass as well"


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_answers_as_its_tasks_do_alone(kind, tmp_path):
    towers = {"custom-text": ("image", "text"), "vit": ("image", "text")}.get(kind, ("image",))
    models = [tuned(MaskConfig(targets=TARGETS, towers=towers), MODELS[kind], seed) for seed in (1, 2)]
    bank = rmt.TaskBank(MODELS[kind](), tokenizer=tokenizer())
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i), NAMES, TEMPLATE)
        bank.load(tmp_path / str(i))
    x, names = images(5), ["1", "0", BASE, "0", "1"]
    got = bank.encode_image(x, names)
    for i, name in enumerate(names):
        model = MODELS[kind]() if name == BASE else models[int(name)]
        assert near(got[i : i + 1], model.encode_image(x[i : i + 1]))
    text = F.normalize(models[1].encode_text(tokenizer()(clip.prompts(NAMES, TEMPLATE))), dim=-1)
    want = clip.logits(models[1].model, x, text.detach()).softmax(-1)
    assert all(torch.allclose(p, w, atol=1e-5) for p, w in zip(bank.probabilities(x, ["1"] * 5), want.detach()))
    plain = bank.merge_and_unload("0")
    assert not bank_modules(plain) and {type(m) for m in plain.modules()} == {type(m) for m in MODELS[kind]().modules()}
    merged = models[0].merge_and_unload().state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in plain.state_dict().items())
    assert near(bank.encode_image(x, names), got), "the bank is as it was"


def test_towers_with_the_batch_second(files):
    def second():
        model = tiny.model()
        for module in model.visual.modules():
            if hasattr(module, "batch_first"):
                module.batch_first = False
        return model

    bank = rmt.TaskBank(second())
    for name in CONFIGS:
        bank.load(files[0] / name)
    x = images(len(MIXED))
    models = files[1] | {BASE: tiny.model()}
    want = torch.stack([models[name].encode_image(x[i : i + 1])[0] for i, name in enumerate(MIXED)])
    assert near(bank.encode_image(x, MIXED), want)


# --- invariant answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_invariant_answers_do_not_depend_on_the_batch(files, threads, dtype):
    bank = rmt.TaskBank(tiny.model(), tokenizer=tokenizer(), invariant=True)
    for name in CONFIGS:
        bank.load(files[0] / name)
    bank.set_classes(NAMES, TEMPLATE)
    bank.to(dtype)
    x, before = images(40), torch.get_num_threads()
    names = [[*CONFIGS, BASE][i % 4] for i in range(40)]
    try:
        torch.set_num_threads(1)
        alone = torch.cat([bank.encode_image(x[i : i + 1], names[i : i + 1]) for i in range(40)])
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        for size in (1, 2, 3, 7, 16, 40):
            chosen = torch.randperm(40, generator=generator)[:size]
            got = bank.encode_image(x[chosen], [names[i] for i in chosen])
            assert torch.equal(got, alone[chosen]), size
            one = [names[chosen[0]]] * size
            assert torch.equal(bank.encode_image(x[chosen], one)[0], alone[chosen[0]])
            answers = bank.probabilities(x[chosen], one)
            assert torch.equal(answers[0], bank.probabilities(x[chosen[:1]], one[:1])[0])
    finally:
        torch.set_num_threads(before)
    if dtype == torch.bfloat16:
        return
    models = files[1] | {BASE: tiny.model()}
    assert near(alone[1:2], models[names[1]].encode_image(x[1:2]))
    plain = bank.merge_and_unload(BASE).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in tiny.model().state_dict().items())


def test_what_cannot_be_invariant_is_refused():
    with pytest.raises(UserError, match=r"ViT image tower.*ModifiedResNet"):
        rmt.TaskBank(MODELS["resnet"](), invariant=True)
    with pytest.raises(UserError, match="choose one"):
        rmt.TaskBank(tiny.model(), invariant=True, kept=True)


# --- the active task --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_the_active_task_and_the_zero_shot_model(files, kept, ordinary_path):
    bank, x = rmt.TaskBank(tiny.model(), kept=kept), images(4)
    zero_shot = tiny.model().encode_image(x)
    assert near(bank.encode_image(x), zero_shot)
    for name in CONFIGS:
        bank.load(files[0] / name)
    for name in ("attention", "mlp", "all", BASE, "attention", None):
        bank.set_adapter(name)
        assert bank.active == (None if name == BASE else name)
        want = files[1][name].encode_image(x) if name in CONFIGS else zero_shot
        assert near(bank.encode_image(x), want)
        assert near(bank.model.encode_image(x), want), "the model without the bank's plan has the active task too"
        with bank.disable_adapter():
            assert torch.equal(bank.encode_image(x), zero_shot)
    assert torch.equal(bank.encode_image(x), zero_shot)


def test_kept_weights_are_the_merged_models_bit_for_bit(files, ordinary_path):
    """Through swaps both ways, each from whatever was there."""
    bank, x = rmt.TaskBank(tiny.model(), kept=True), images(4)
    for name in CONFIGS:
        bank.load(files[0] / name)
    for name in ("all", "attention", "all", "mlp", None, "all"):
        bank.set_adapter(name)
        for module in bank_modules(bank.model):
            for prefix, key in module.keys.items():
                mine = {m.key: m for m in masks(files[1][name].model)} if name else {}
                want = mine[key].dense if key in mine else module._weight(prefix)
                assert torch.equal(module._dense[prefix], want)
    got = bank.encode_image(x)
    assert torch.equal(got, files[1]["all"].encode_image(x))


def test_a_task_that_brings_new_layers_leaves_the_active_one_as_it_was(files):
    bank, x = rmt.TaskBank(tiny.model(), kept=True), images(3)
    bank.load(files[0] / "attention")
    bank.set_adapter("attention")
    bank.load(files[0] / "mlp")
    assert near(bank.encode_image(x), files[1]["attention"].encode_image(x))
    bank.set_adapter("mlp")
    assert near(bank.encode_image(x), files[1]["mlp"].encode_image(x))


def test_a_swap_rewrites_buffers_where_they_are_and_compiles_nothing(bank, files):
    compiled, x = [], images(2)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def state():
        return [t.data_ptr() for m in bank_modules(bank.model) for t in (*m.buffers(False), *m.parameters(False))]

    visual = torch.compile(bank.model.visual, backend=backend, fullgraph=True)
    before = state()
    for name in ("attention", "all", None, "mlp", "attention"):
        bank.set_adapter(name)
        with torch.no_grad():
            got = visual(x)
        want = files[1][name].encode_image(x) if name else tiny.model().encode_image(x)
        assert near(got, want), name
    assert len(compiled) == 1 and state() == before


# --- names and files --------------------------------------------------------------------------------------------------


def test_unknown_names_and_wrong_counts_are_refused(bank):
    x = images(2)
    for call in (
        lambda: bank.encode_image(x, ["attention", "nobody"]),
        lambda: bank.classify(x, ["nobody"] * 2),
        lambda: bank.set_adapter("nobody"),
        lambda: bank.remove("nobody"),
        lambda: bank.info("nobody"),
        lambda: bank.merge_and_unload("nobody"),
    ):
        with pytest.raises(UserError, match="no task 'nobody': the bank has attention, mlp, all"):
            call()
    with pytest.raises(UserError, match="one name for each of 2 images"):
        bank.encode_image(x, ["attention"])
    with pytest.raises(UserError, match="one name for each of 2 images"):
        bank.encode_image(x, "attention")
    for bad in (x[0], x.int(), "image"):
        with pytest.raises(UserError, match=r"\(B, 3, H, W\)"):
            bank.encode_image(bad, ["attention"])
    assert bank.active is None and bank.tasks == tuple(CONFIGS)


def test_a_name_is_taken_once_unless_it_is_replaced_on_purpose(bank, files, ordinary_path):
    x = images(2)
    with pytest.raises(UserError, match=r"'mlp' already: replace=True"):
        bank.load(files[0] / "all", "mlp")
    assert near(bank.encode_image(x, ["mlp"] * 2), files[1]["mlp"].encode_image(x))
    bank.set_adapter("mlp")
    bank.load(files[0] / "all", "mlp", replace=True)
    for got in (bank.encode_image(x, ["mlp"] * 2), bank.encode_image(x), bank.model.encode_image(x)):
        assert near(got, files[1]["all"].encode_image(x))
    bank.remove("mlp")
    assert bank.active is None and bank.tasks == ("attention", "all")
    assert torch.equal(bank.encode_image(x), tiny.model().encode_image(x))


@pytest.mark.parametrize("name", ["", " ", BASE, "a/b", "a\\b", "..", "a\nb", "x" * 201, 3], ids=repr)
def test_names_that_cannot_be_a_task(bank, files, name):
    with pytest.raises(UserError, match="a task's name must"):
        bank.load(files[0] / "all", name)


def test_a_task_of_another_backbone_is_refused_and_changes_nothing(files, ordinary_path):
    x = images(2)
    other = rmt.TaskBank(tiny.model(seed=1))
    with pytest.raises(UserError, match=r"for another backbone: expected base weights with sha256 \w+, got \w+"):
        other.load(files[0] / "all")
    small = rmt.TaskBank(tiny.model(layers=1))
    with pytest.raises(UserError, match=r"has no weight visual.transformer.resblocks.1"):
        small.load(files[0] / "all")
    wide = rmt.TaskBank(tiny.model(width=96))
    with pytest.raises(UserError, match=r"visual.conv1.weight is \(96, 192\) here, and \(64, 192\) there"):
        wide.load(files[0] / "all")
    for bank, seed, options in ((other, 1, {}), (small, 0, {"layers": 1}), (wide, 0, {"width": 96})):
        assert bank.tasks == () and not bank_modules(bank.model)
        assert near(bank.encode_image(x), tiny.model(seed, **options).encode_image(x))
    other.load(files[0] / "all", allow_base_mismatch=True)
    assert other.tasks == ("all",)
    with pytest.raises(UserError, match="a bank takes a plain model"):
        rmt.TaskBank(tuned(MaskConfig()).model)


def test_classes(bank, files):
    x = images(4)
    answers = bank.classify(x, ["attention", "mlp", "attention", "all"])
    for i, (answer, name) in enumerate(zip(answers, ["attention", "mlp", "attention", "all"])):
        names = bank.info(name)["classnames"]
        text = clip.Text.make(clip.Clip(tiny.model(), None, tokenizer()), names, TEMPLATE).zero_shot
        want = clip.logits(files[1][name].model, x[i : i + 1], text).softmax(-1)[0]
        assert answer.task == name and answer.class_name == names[want.argmax()]
        assert answer.probability == pytest.approx(want.max().item(), abs=1e-5)
    bank.set_adapter("mlp")
    assert bank.classify(x) == bank.classify(x, ["mlp"] * 4)
    with pytest.raises(UserError, match="'__base__' has no class names"):
        bank.classify(x, [BASE] * 4)
    bank.set_classes(NAMES, TEMPLATE)
    with bank.disable_adapter():
        assert [a.task for a in bank.classify(x)] == [BASE] * 4
    deaf = rmt.TaskBank(tiny.model())
    deaf.load(files[0] / "all")
    with pytest.raises(UserError, match="no text features, nor the bank a tokenizer"):
        deaf.classify(x, ["all"] * 4)
    with pytest.raises(UserError, match="classes need names"):
        deaf.set_classes(NAMES, TEMPLATE)


def test_no_images_are_no_answers(bank):
    assert bank.encode_image(images(0), []).shape == (0, 32) and bank.classify(images(0), []) == []


def test_a_task_costs_its_bits_and_its_text_features(bank, files):
    def held():
        return sum(t.numel() * t.element_size() for t in (*bank.model.parameters(), *bank.model.buffers()))

    before, now = held(), bank.memory()["tasks"]
    bank.load(files[0] / "all", "again")
    task = load_task(files[0] / "all")
    size = sum(words.numel() * 4 for words in task.bits.values())
    assert bank.memory()["tasks"] - now == size + 4 * 32 * len(task.classnames) == bank.info("again")["bytes"]
    assert held() == before
    memory = bank.memory()
    plain = sum(p.numel() * p.element_size() for p in tiny.model().parameters())
    plain += sum(b.numel() * b.element_size() for b in tiny.model().buffers())
    assert memory["backbone"] == plain and memory["kept"] == 0
    assert bank.info("again")["off"] == sum(task.off(key) for key in task.bits)


def test_masks_with_nothing_off_cost_nothing(tmp_path, ordinary_path):
    model = rmt.get_mask_model(tiny.model(), MaskConfig())
    model.save_pretrained(tmp_path / "idle")
    bank, x = rmt.TaskBank(tiny.model()), images(2)
    bank.load(tmp_path / "idle")
    assert bank.memory()["tasks"] == 0
    assert torch.equal(bank.encode_image(x, ["idle"] * 2), tiny.model().encode_image(x))


def test_autocast(bank, files):
    x = images(len(MIXED))
    with torch.autocast("cpu", torch.bfloat16):
        got = bank.encode_image(x, MIXED)
    want = bank.encode_image(x, MIXED)
    assert (got.float() - want).norm() < 0.05 * want.norm()


def test_a_moved_bank_takes_its_tasks_along(bank, files):
    x = images(3)
    want = bank.encode_image(x, ["all", BASE, "mlp"])
    got = bank.double().encode_image(x.double(), ["all", BASE, "mlp"])
    assert near(got, want.double())


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_never_mix_tasks(files):
    """Calls of eight threads, each with tasks of its own, while another adds, replaces, removes and swaps."""
    bank = rmt.TaskBank(tiny.model(), tokenizer=tokenizer(), invariant=True)
    for name in CONFIGS:
        bank.load(files[0] / name)
    x, kinds, stop = images(6), [*CONFIGS, BASE], threading.Event()
    want = {name: bank.encode_image(x, [name] * 6) for name in kinds}

    def call(seed: int) -> int:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            names = [kinds[i] for i in torch.randint(4, (6,), generator=generator)]
            got = bank.encode_image(x, names)
            assert all(torch.equal(got[i], want[name][i]) for i, name in enumerate(names))
            with bank.disable_adapter():
                assert torch.equal(bank.encode_image(x), want[BASE])
        return 1

    def churn() -> int:
        rounds = 0
        while not stop.is_set():
            bank.load(files[0] / "mlp", "extra", replace=True)
            bank.set_adapter([*CONFIGS, "extra", None][rounds % 5])
            bank.load(files[0] / "all", "all", replace=True)
            bank.remove("extra")
            rounds += 1
        return rounds

    with ThreadPoolExecutor(9) as pool:
        churned = pool.submit(churn)
        calls = [pool.submit(call, seed) for seed in range(8)]
        try:
            assert sum(c.result() for c in calls) == 8
        finally:
            stop.set()
        assert churned.result() > 0


def test_a_swap_waits_for_calls_that_use_the_kept_weights(files):
    bank, x = rmt.TaskBank(tiny.model(), kept=True), images(2)
    for name in CONFIGS:
        bank.load(files[0] / name)
    want = {}
    for name in CONFIGS:
        bank.set_adapter(name)
        want[name] = bank.encode_image(x)
    stop = threading.Event()

    def call() -> int:
        for _ in range(150):
            got = bank.encode_image(x)
            assert any(torch.equal(got, whole) for whole in want.values()), "an answer of two tasks at once"
        return 1

    def swap() -> None:
        while not stop.is_set():
            for name in CONFIGS:
                bank.set_adapter(name)

    with ThreadPoolExecutor(5) as pool:
        swapping = pool.submit(swap)
        calls = [pool.submit(call) for _ in range(4)]
        try:
            assert sum(c.result() for c in calls) == 4
        finally:
            stop.set()
        swapping.result()


def test_load_from_files(tmp_path, files):
    name = tiny.model_folder(tmp_path / "model")
    bank = rmt.load(name, tasks={"a": files[0] / "all", "b": files[0] / "mlp"}, device="cpu")
    assert bank.tasks == ("a", "b") and bank.preprocess is not None
    assert [a.task for a in bank.classify(images(2), ["b", "a"])] == ["b", "a"]
    assert rmt.load(name, tasks=[files[0] / "all"], device="cpu").tasks == ("all",)
    run = tmp_path / "run"
    run.mkdir()
    (run / "task").symlink_to(files[0] / "all")
    assert bank.load(run) == "run"
    assert rk.explain("grouped_masked_linear")[0]["last"]


def test_a_rounded_bank_answers_as_before_and_still_knows_its_backbone(files, tmp_path):
    x, names = images(6), ["all", BASE, "mlp", "all", "attention", "mlp"]
    bank = rmt.TaskBank(tiny.model(), tokenizer=tokenizer())
    bank.set_classes(NAMES, TEMPLATE)
    for name in CONFIGS:
        bank.load(files[0] / name)
    want, chances = bank.encode_image(x, names), bank.probabilities(x, names)
    assert bank.bfloat16() is bank and bank.logit_scale.dtype == torch.bfloat16
    got = bank.encode_image(x, names)
    assert got.dtype == torch.bfloat16 and (got.float() - want).norm() < 0.05 * want.norm()
    assert all(torch.allclose(p, c, atol=0.05) for p, c in zip(bank.probabilities(x, names), chances))
    bank.load(files[0] / "all", "later")
    assert torch.equal(bank.encode_image(x, ["later"] * 6), bank.encode_image(x, ["all"] * 6))
    other = rmt.TaskBank(tiny.model(seed=1)).bfloat16()
    with pytest.raises(UserError, match="for another backbone"):
        other.load(files[0] / "all")
    odd = MaskConfig(modules=("visual.transformer.resblocks.0.mlp.c_fc",))
    tuned(odd).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match="must be added before the bank's weights are rounded"):
        bank.load(tmp_path / "odd")
    assert "odd" not in bank.tasks


def test_stored_text_features_need_no_text_tower(files, tmp_path):
    text = clip.Text.make(clip.Clip(tiny.model(), None, tokenizer()), NAMES, TEMPLATE).zero_shot
    files[1]["all"].save_pretrained(tmp_path / "whole", NAMES, TEMPLATE, text_features=text)
    deaf, bank, x = rmt.TaskBank(tiny.model()), rmt.TaskBank(tiny.model(), tokenizer=tokenizer()), images(3)
    for each in (deaf, bank):
        each.load(tmp_path / "whole", "all")
    assert deaf.classify(x, ["all"] * 3) == bank.classify(x, ["all"] * 3)
    model = tiny.model()
    model.transformer = torch.nn.Identity()
    without = rmt.TaskBank(model)
    without.load(tmp_path / "whole", "all")
    assert without.classify(x, ["all"] * 3) == bank.classify(x, ["all"] * 3)


def test_lora_over_a_bank_and_no_merge_under_its_masks(files):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    bank, x = rmt.TaskBank(tiny.model()), images(2)
    bank.load(files[0] / "all")
    bank.set_adapter("all")
    want = bank.model.encode_image(x)
    wrapped = peft.get_peft_model(bank.model, peft.LoraConfig(target_modules=["c_fc"]))
    assert torch.equal(bank.encode_image(x), bank.encode_image(x, ["all"] * 2))
    assert near(bank.model.encode_image(x), want), "a fresh LoRA adds nothing"
    bank.model.encode_image(x).square().sum().backward()
    trained = {name: p.grad.norm() for name, p in wrapped.named_parameters() if p.grad is not None}
    assert len(trained) == 4 and all("lora" in name for name in trained) and sum(trained.values()) > 0
    with pytest.raises(ValueError, match="merge the mask first"):
        wrapped.merge_adapter()
