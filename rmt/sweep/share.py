"""A backbone and the bytes of a data set as plain arrays, which processes of a node share without a copy.

What is shared: every parameter and buffer of the model, in the precision that a run loads it in (fp32), and the encoded
image files. Each process builds its own modules around the arrays, which it must not write: runs keep W frozen, and
what `rmt compare` trains of a model is a copy. Decoding stays each run's own, since crops are.
"""

import contextlib
import dataclasses
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .. import clip
from ..config import RunConfig
from ..data import images, read

Held = Callable[[torch.device], Mapping[str, Tensor] | None]
# Bytes of one data set's files; a larger one is read by each run, from its node's disk.
DATA_LIMIT = 2 << 30


@dataclasses.dataclass(frozen=True)
class Model:
    """key: what `rmt.clip.load` is asked for. skeleton: the pickled Clip without numbers; arrays: those, by name."""

    key: tuple[str, str | None, int | None]
    skeleton: bytes
    arrays: dict[str, np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(array.nbytes for array in self.arrays.values())


@dataclasses.dataclass(frozen=True)
class Files:
    """Bytes of files, one after the other in `blob`: the file of `paths[i]` ends before `ends[i]`."""

    paths: list[str]
    ends: np.ndarray
    blob: np.ndarray

    @property
    def size(self) -> int:
        """Bytes."""
        return self.blob.nbytes


def model_key(config: RunConfig) -> tuple[str, str | None, int | None]:
    """Of the model that a run loads."""
    return config.model, config.pretrained, config.image_size


def pack_model(config: RunConfig) -> Model:
    """Reads a run's model. Raises UserError where open_clip cannot load it."""
    loaded = clip.load(*model_key(config), torch.device("cpu"))
    arrays = {name: tensor.detach().numpy() for name, tensor in named_tensors(loaded.model)}
    # On meta, tensors are pickled without their numbers; the arrays keep those.
    loaded.model.to("meta")
    return Model(model_key(config), pickle.dumps(loaded), arrays)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, also the buffers that no state dict holds, by each of its names."""
    both = (model.named_parameters, model.named_buffers)
    return [pair for named in both for pair in named(remove_duplicate=False)]


def unpack_model(packed: Model, device: torch.device, held: Mapping[str, Tensor] | None = None) -> clip.Clip:
    """A new Clip around the arrays: on the CPU it shares their memory, on another device it is a copy.

    held: tensors of these names that are on the device already, to be used in place of the arrays.
    """
    loaded = pickle.loads(packed.skeleton)
    for name, old in named_tensors(loaded.model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the array must not be written: nothing here does
            tensor = torch.from_numpy(packed.arrays[name]).to(device) if held is None else held[name]
        owner, _, leaf = name.rpartition(".")
        module = loaded.model.get_submodule(owner)
        if isinstance(old, nn.Parameter):
            module._parameters[leaf] = nn.Parameter(tensor, old.requires_grad)
        else:
            module._buffers[leaf] = tensor
    return loaded


def pack_files(config: RunConfig) -> Files | None:
    """Reads a data set's image files; None where they take more than DATA_LIMIT bytes."""
    split = read(config)
    paths = list(dict.fromkeys(item.path for part in (split.train, split.val, split.test) for item in part))
    parts, total = [], 0
    for path in paths:
        parts.append(images.read_bytes(path))
        total += len(parts[-1])
        if total > DATA_LIMIT:
            return None
    ends = np.cumsum([len(part) for part in parts])
    return Files(paths, ends, np.frombuffer(b"".join(parts), np.uint8))


@contextlib.contextmanager
def handed(model: Model | None, files: Files | None, held: Held = lambda device: None) -> Iterator[None]:
    """Inside, this process's runs take the model and the files from here in place of a disk.

    held: device -> the model's tensors that are there already, or None.
    """
    if model is not None:
        clip.HANDED[model.key] = lambda device: unpack_model(model, device, held(device))
    if files is not None:
        starts = [0, *files.ends.tolist()]
        view = memoryview(files.blob)
        images.HANDED.update((path, view[a:b]) for path, a, b in zip(files.paths, starts, starts[1:]))
    try:
        yield
    finally:
        clip.HANDED.clear()
        images.HANDED.clear()
