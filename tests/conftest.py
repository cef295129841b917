"""Poisons fresh memory, so that a kernel that leaves one element unwritten fails; marks GPU tests."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fills what torch.empty and Tensor.new_empty return: NaN in floats, 0x5A bytes in integers."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            out = make(*args, **kwargs)
            if out.device.type == "meta" or type(out) is not torch.Tensor or out.numel() == 0:
                return out
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool or out.is_complex() else out.fill_(0x5A)

        return wrapper

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes seconds on a quiet core; leave out with -m 'not slow'")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
