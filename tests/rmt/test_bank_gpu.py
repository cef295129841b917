"""The task bank on a GPU, by every backend: the CPU's answers, the same in any company, swaps that wait for nothing."""

import pytest
import tiny
import torch
from helpers import need_gpu
from test_masking import randomised

import rmt
import rmt_kernels as rk
from rmt.config import TARGETS, MaskConfig

pytestmark = pytest.mark.gpu

NAMES, TEMPLATE = ("red ball", "green_leaf"), "a photo of a {}."
MIXED = ["a", "__base__", "b", "a", "a", "b", "__base__"]


@pytest.fixture(params=["cuda", "triton", "reference"])
def backend(request):
    need_gpu()
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    with rk.use_backend(request.param):
        yield request.param
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks")
    for seed, name in enumerate("ab"):
        model = rmt.get_mask_model(tiny.model(), MaskConfig(targets=TARGETS))
        randomised(model.masks, seed)
        model.save_pretrained(root / name, NAMES, TEMPLATE)
    return root


def bank_of(folder, device, **options):
    bank = rmt.TaskBank(tiny.model(), **options)
    for name in "ab":
        bank.load(folder / name)
    return bank.to(device)


@pytest.mark.parametrize("invariant", [False, True])
def test_a_mixed_batch_is_answered_as_on_the_cpu(backend, folder, invariant):
    x = torch.randn(len(MIXED), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with rk.use_backend("reference"):
        want = bank_of(folder, "cpu").encode_image(x, MIXED)
    bank = bank_of(folder, "cuda", invariant=invariant)
    got = bank.encode_image(x.cuda(), MIXED)
    assert bool((got.cpu() - want).norm() < 1e-4 * want.norm())
    for i, name in enumerate(MIXED if invariant else ()):
        assert torch.equal(bank.encode_image(x[i : i + 1].cuda(), [name])[0], got[i])


@pytest.mark.parametrize("kept", [False, True])
def test_a_swap_waits_for_nothing_and_answers_as_its_task(backend, folder, kept):
    bank, x = bank_of(folder, "cuda", kept=kept), torch.randn(3, 3, 32, 32, device="cuda")
    with rk.use_backend("reference"):
        want = {name: bank_of(folder, "cuda").encode_image(x, [name] * 3) for name in "ab"}
    for name in "ab":  # what is made once is made now
        bank.set_adapter(name)
    for name in "abba":
        torch.cuda.set_sync_debug_mode("error")
        try:
            bank.set_adapter(name)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool((bank.encode_image(x) - want[name]).norm() < 1e-4 * want[name].norm())
