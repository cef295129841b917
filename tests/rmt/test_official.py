import collections
import io

import numpy as np
import pytest
import tiny
import torch

import rmt_kernels as rk
from rmt.config import MaskConfig, UserError
from rmt.masking import apply_masks, count_off
from rmt.official import from_official, official_key, read_official, to_official, write_official

BLOCK = "transformer.resblocks.{}."
VIT = ["conv1.mask_real"] + [
    BLOCK.format(i) + part
    for i in range(2)
    for part in ("attn.mask_real", "attn.out_proj.mask_real", "mlp.c_fc.mask_real", "mlp.c_proj.mask_real")
]


def masked(seed=None, targets=("attention", "mlp", "conv"), **vision):
    found = apply_masks(tiny.model(**vision), MaskConfig(targets=targets))
    generator = torch.Generator().manual_seed(seed or 0)
    for mask in found if seed is not None else ():
        mask.set_bits(rk.pack_bits(torch.rand(mask.weight.shape, generator=generator) > 0.1))
    return found


def official_bytes(scores, threshold=5e-3):
    """The published save_model, bit by bit as strings: slow, and nothing in common with ours."""
    text = "".join(str(int(value > threshold)) for value in scores.flatten().tolist())
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


def official_file(path, found, names, **changes):
    """A checkpoint as the published code writes it, with Adam's moments inside."""
    state = collections.OrderedDict((name, official_bytes(mask.scores)) for name, mask in zip(names, found))
    parameters = [torch.nn.Parameter(mask.scores.detach().clone()) for mask in found]
    optimizer = torch.optim.Adam(parameters, lr=8e-5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    checkpoint = {
        "state_dict": state, "epoch": 30, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "val_result": None,
    }  # fmt: skip
    torch.save(checkpoint | changes, path)
    return path


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 32), (9, 20), (64, 192), (5, 771)])
def test_official_bytes_are_numpys_packbits(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.3
    flat, words = torch.from_numpy(np.packbits(mask.numpy())), rk.pack_bits(mask)
    assert official_bytes(mask, 0.5) == bytes(flat.tolist())
    assert torch.equal(from_official(flat, shape[1], shape[0]), words)
    assert torch.equal(from_official(bytes(flat.tolist()), shape[1], shape[0]), words)
    assert torch.equal(to_official(words, shape[1]), flat)
    with pytest.raises(UserError, match=f"must come as {len(flat)} bytes, got {len(flat) + 1}"):
        from_official(torch.cat([flat, flat[:1]]), shape[1], shape[0])


def test_refuses_bits_beyond_the_mask():
    with pytest.raises(UserError, match=r"3 x 5 must end in bits of 0, got \[1\]"):
        from_official(b"\xff\xff", 5, 3)


def test_reads_what_the_official_code_writes(tmp_path):
    theirs, ours = masked(1), masked()
    assert read_official(official_file(tmp_path / "model.pth.tar-30", theirs, VIT), ours) == 30
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(theirs, ours)) and count_off(ours)[0] > 1000


def test_writes_what_the_official_code_reads(tmp_path):
    found = masked(2)
    write_official(tmp_path / "model.pth.tar-10", found, epoch=10)
    read = torch.load(tmp_path / "model.pth.tar-10", weights_only=True)
    assert sorted(read) == ["epoch", "optimizer", "scheduler", "state_dict", "val_result"] and read["epoch"] == 10
    assert list(read["state_dict"]) == VIT
    for mask, data in zip(found, read["state_dict"].values()):
        assert type(data) is bytes and data == official_bytes(mask.scores)
        bits = "".join(f"{byte:08b}" for byte in data)[: mask.weight.numel()]
        assert [int(bit) for bit in bits] == (mask.scores > 5e-3).flatten().int().tolist()


def test_round_trip(tmp_path):
    found, fresh = masked(3, ("attention", "conv")), masked(None, ("attention", "conv"))
    write_official(tmp_path / "a", found, epoch=7)
    assert read_official(tmp_path / "a", fresh) == 7
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(found, fresh))


def test_resnet_names(tmp_path):
    vision = {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "image_size": 64}
    found = masked(4, ("attention", "conv"), **vision)
    write_official(tmp_path / "a", found)
    names = set(torch.load(tmp_path / "a", weights_only=True)["state_dict"])
    assert {"conv3.mask_real", "layer1.0.conv2.mask_real", "layer4.0.downsample.0.mask_real"} <= names
    assert {f"attnpool.{part}_proj.mask_real" for part in "kqvc"} <= names and len(names) == len(found) == 23
    fresh = masked(None, ("attention", "conv"), **vision)
    read_official(tmp_path / "a", fresh)
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(found, fresh))


@pytest.mark.parametrize(
    "key",
    ["transformer.resblocks.0.attn.in_proj_weight", "visual.trunk.blocks.0.attn.weight", "visual.conv1.bias", "weight"],
)
def test_keys_without_an_official_name(key):
    assert official_key(key) is None


def test_writes_no_masks_that_it_has_no_name_for(tmp_path):
    found = apply_masks(tiny.model(), MaskConfig(towers=("image", "text"), targets=("attention",)))
    with pytest.raises(UserError, match=r"no name for \['transformer.resblocks.0.attn.in_proj_weight'"):
        write_official(tmp_path / "a", found)
    assert not list(tmp_path.iterdir())


def test_refuses_other_masks_and_lists_them(tmp_path):
    path = official_file(tmp_path / "a", masked(1), [*VIT[:-1], "ln_post.mask_real"])
    found = masked()
    with pytest.raises(UserError, match=rf"it lacks \['{VIT[-1]}'\], and has besides \['ln_post.mask_real'\]"):
        read_official(path, found)
    with pytest.raises(UserError, match=r"besides \['transformer.resblocks.0.mlp.c_fc.mask_real'"):
        read_official(official_file(path, masked(1), VIT), masked(None, ("attention", "conv")))


def test_refuses_other_sizes_and_sets_nothing(tmp_path):
    found = masked(width=96)
    with pytest.raises(UserError, match=r"a: conv1.mask_real: a mask of 96 x 192 must come as 2304 bytes, got 1536"):
        read_official(official_file(tmp_path / "a", masked(1), VIT), found)
    state = {name: official_bytes(mask.scores) for name, mask in zip(VIT, masked(1))}
    last = masked()
    with pytest.raises(UserError, match=r"c_proj\.mask_real must be bytes, got list"):
        read_official(official_file(tmp_path / "a", masked(1), VIT, state_dict=state | {VIT[-1]: [1]}), last)
    assert count_off(found)[0] == count_off(last)[0] == 0


def test_bytes_may_be_a_tensor(tmp_path):
    theirs, ours = masked(1), masked()
    state = {
        name: torch.tensor(list(official_bytes(mask.scores)), dtype=torch.uint8) for name, mask in zip(VIT, theirs)
    }
    read_official(official_file(tmp_path / "a", theirs, VIT, state_dict=state), ours)
    assert all(torch.equal(a.bits, b.bits) for a, b in zip(theirs, ours))


@pytest.mark.parametrize("changes", [{"state_dict": 3}, {"epoch": None}])
def test_refuses_a_foreign_checkpoint(tmp_path, changes):
    path = official_file(tmp_path / "a", masked(1), VIT, **changes)
    with pytest.raises(UserError, match="is no official checkpoint"):
        read_official(path, masked())


@pytest.mark.parametrize("keep", [0, 10, 2000, -40])
def test_refuses_a_damaged_checkpoint(tmp_path, keep):
    path = official_file(tmp_path / "a", masked(1), VIT)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="a is no official checkpoint, or is damaged"):
        read_official(path, masked())


def test_refuses_what_would_run_code_and_a_missing_file(tmp_path):
    buffer = io.BytesIO()
    torch.save({"state_dict": {}, "epoch": 1, "bad": print}, buffer)
    (tmp_path / "a").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="is no official checkpoint, or is damaged"):
        read_official(tmp_path / "a", masked())
    with pytest.raises(UserError, match=r"expected an official checkpoint .* at .*no, got none"):
        read_official(tmp_path / "no", masked())


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_official(path, masked(1))
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_official(path, masked(2))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
