"""One copy of a backbone in a device's memory, which the processes of all runs on that device map.

Runs differ in scores and bits alone: W is frozen, and one copy serves all. A holder, an actor of the sweep's driver for
each GPU of the cluster, puts it there and keeps it; a run's process gets handles of it (torch.multiprocessing: CUDA
IPC, or on a CPU files in shared memory) and builds its modules around the same numbers. Scores, moments, masked weights
and activations are each run's own. Where its holder is lost, or a node came later, a run takes a copy of its own, and
its log says so. Tests have it on a CPU; no GPU has confirmed it yet.
"""

import pickle
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from .share import Model, named_tensors, unpack_model

# Ray hides all GPUs from an actor that takes none of them, unless this says not to.
SEEING = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"


def handles_of(tensors: Mapping[str, Tensor]) -> bytes:
    """What another process of this machine maps the tensors' memory by, while this one keeps them."""
    import torch.multiprocessing as mp  # which teaches ForkingPickler tensors

    mp.set_sharing_strategy("file_system")  # a file can be opened by who is no child of this process
    return bytes(ForkingPickler.dumps(dict(tensors)))


def mapped(handles: bytes) -> dict[str, Tensor]:
    """The tensors of `handles_of`, in the same memory. Must not be written."""
    import torch.multiprocessing  # noqa: F401  as above

    return pickle.loads(handles)


class Holder:
    """Keeps models in the memory of one device."""

    def __init__(self) -> None:
        self._kept: dict[tuple, dict[str, Tensor]] = {}

    def handles(self, packed: Model, device: str) -> bytes:
        """Of all parameters and buffers, by name; the first call puts them there. device: cuda or cpu."""
        key = (*packed.key, device)
        if key not in self._kept:
            self._kept[key] = dict(named_tensors(unpack_model(packed, torch.device(device)).model))
        return handles_of({name: tensor.detach() for name, tensor in self._kept[key].items()})


def holders(ray, nodes: Sequence[dict]) -> dict[tuple[str, str], Any]:
    """An actor for each GPU of each node, and one for a node without: (node, GPU's number or nothing) -> actor."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    made, actor = {}, ray.remote(num_cpus=0, num_gpus=0)(Holder)
    for node in nodes:
        there = int(node["Resources"].get("GPU", 0))
        for gpu in map(str, range(there)) if there else [""]:
            seen = {"env_vars": {"CUDA_VISIBLE_DEVICES": gpu, SEEING: "0"}} if gpu else {}
            where = On(node["NodeID"], soft=False)
            made[node["NodeID"], gpu] = actor.options(scheduling_strategy=where, runtime_env=seen).remote()
    return made


def mapper(made: Mapping[tuple[str, str], Any], model: Any) -> Callable[[torch.device], dict[str, Tensor] | None]:
    """In a run's process: device -> the tensors that its holder has there; None, with a line, where it has not.

    model: the object reference of a Model.
    """
    import ray

    place = ray.get_runtime_context().get_node_id(), str(next(iter(ray.get_gpu_ids()), ""))

    def tensors(device: torch.device) -> dict[str, Tensor] | None:
        try:
            found = mapped(ray.get(made[place].handles.remote(model, device.type)))
        except (KeyError, RuntimeError, ray.exceptions.RayError) as error:
            print(f"backbone   a copy of this run's own: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            return None
        print(f"backbone   mapped from its holder's memory, {sum(t.nbytes for t in found.values()):,} bytes")
        return found

    return tensors
