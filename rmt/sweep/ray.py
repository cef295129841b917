"""Sweeps on a Ray cluster: a task a run, spread over the nodes, backbone and images through the object store.

The driver reads each model and data set once and puts them into the store; a node fetches them once, and its processes
see one copy of the arrays (`rmt.sweep.share`). OUT, models and data must be where all nodes see them: the nodes are
asked before the first run starts. Several runs go onto one GPU with a fraction of it: each process then has its own
copy of the backbone there, or all map one that a holder keeps (`rmt.sweep.holder`).
"""

import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import UserError
from ..files import write_whole
from .holder import holders, mapper
from .identity import code_sha256
from .jobs import Job
from .lock import SKEW
from .share import Files, Model, handed, model_key, pack_files, pack_model
from .work import execute

# Seconds: that a node may take to answer, that a cluster may be without any node that fits, between two looks at it.
ANSWER, EMPTY, LOOK = 120.0, 60.0, 5.0
CONNECT = 5.0
# Share of the smallest node's store that models and data may take.
STORE_SHARE = 0.5
SEEN_FILE = ".seen-by-all-nodes"


def outcomes(
    jobs: Sequence[Job], out: Path, *, address: str | None, workers: int | None, retries: int, cpus: float, gpus: float,
    hold: bool = False,
) -> Iterator[dict[str, Any] | int]:  # fmt: skip
    """Runs the jobs. Yields a row for each that ended and, in between, how many are running at most.

    A run whose process or node was lost is started again, at most `retries` times, and goes on from its resume file.

    Args:
        address: of the cluster; None: RAY_ADDRESS, a cluster that runs on this machine, or a new one here.
        workers: most runs at once; None: as many as fit. cpus, gpus: that a run takes; parts of 1 are allowed.
        hold: whether runs on one device share one copy of the backbone in its memory.

    Raises: UserError where there is no such cluster, no node that fits, or a node lacks what runs need, named.
    """
    ray, own = _connected(address)
    try:
        nodes = _fitting(ray, cpus, gpus)
        _need_choice(nodes, jobs, gpus)
        _need_nodes(ray, nodes, jobs, out)
        models, files = _put_all(ray, nodes, jobs)
        made = holders(ray, nodes) if hold else {}
        yield from _run(ray, jobs, models, files, made, workers=workers, retries=retries, cpus=cpus, gpus=gpus)
    finally:
        if own:
            ray.shutdown()


def _connected(address: str | None) -> tuple[Any, bool]:
    """Ray, and whether the connection is ours to end."""
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'rmt[ray]'") from error
    if ray.is_initialized():
        return ray, False
    _need_reachable(address or os.environ.get("RAY_ADDRESS") or "auto")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(f"there is no Ray cluster at {address or 'the usual place'}: {error}") from error
    return ray, True


def _need_reachable(address: str) -> None:
    """Raises UserError where nothing listens: Ray itself would look for minutes."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UserError(f"address must be HOST:PORT of a Ray cluster's head, got {address!r}")
    try:
        socket.create_connection((host, int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"there is no Ray cluster at {address}: {error}") from error


def _fitting(ray, cpus: float, gpus: float) -> list[dict]:
    """Nodes that are alive and large enough for one run."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [n for n in alive if n["Resources"].get("CPU", 0) >= cpus and n["Resources"].get("GPU", 0) >= gpus]
    if not nodes:
        have = "; ".join(f"{_name(n)}: {n['Resources'].get('CPU', 0):g} CPU, {n['Resources'].get('GPU', 0):g} GPU"
                         for n in alive)  # fmt: skip
        raise UserError(
            f"no node of the cluster has {cpus:g} CPU and {gpus:g} GPU for a run, they have {have or 'none'}"
        )
    return nodes


def _need_choice(nodes: Sequence[dict], jobs: Sequence[Job], gpus: float) -> None:
    """Raises UserError where GPUs are there, nobody said how much of one a run takes, and runs would take any."""
    if (
        gpus == 0
        and any(n["Resources"].get("GPU", 0) for n in nodes)
        and any(job.run.config.device != "cpu" for job in jobs)
    ):
        raise UserError("the cluster has GPUs: --gpus must say what a run takes, such as 1 or 0.25, or device be cpu")


def _name(node: dict) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _slots(nodes: Sequence[dict], cpus: float, gpus: float) -> int:
    """Runs that fit at once."""
    asked = [(name, amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0]
    return sum(min((math.floor(n["Resources"].get(name, 0) / amount + 1e-9) for name, amount in asked), default=1)
               for n in nodes)  # fmt: skip


def _look(places: Sequence[str], token: str) -> dict[str, Any]:
    """What a node has: run on it."""
    return {"time": time.time(), "code": code_sha256(), "lost": [p for p in places if not os.path.exists(p)],
            "out": os.path.isfile(token)}  # fmt: skip


def _need_nodes(ray, nodes: Sequence[dict], jobs: Sequence[Job], out: Path) -> None:
    """Asks every node for data, model, code, clock and OUT. Raises UserError that names it."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    places = {run.config.data or run.config.root for run in (job.run for job in jobs)}
    places |= {job.run.config.model.partition(":")[2] for job in jobs if job.run.config.model.startswith("local-dir:")}
    token = out.absolute() / SEEN_FILE
    look, began = ray.remote(num_cpus=0, max_retries=0)(_look), time.time()
    write_whole(token, b"")
    try:
        asked = {
            look.options(scheduling_strategy=On(n["NodeID"], soft=False)).remote(sorted(places), str(token)): n
            for n in nodes
        }  # fmt: skip
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER)
        if late:
            raise UserError(
                f"node {_name(asked[late[0]])} has not answered for {ANSWER:.0f} s: leave it out, or see its log"
            )
        for ref in ready:
            _need_node(ray, _name(asked[ref]), ref, began, out)
    finally:
        token.unlink(missing_ok=True)


def _need_node(ray, name: str, ref, began: float, out: Path) -> None:
    try:
        found = ray.get(ref)
    except ray.exceptions.RayError as error:
        why = str(error).strip().splitlines()[-1]
        raise UserError(f"node {name} cannot run rmt: install the same version there ({why})") from error
    off = max(began - found["time"], found["time"] - time.time())
    if off > SKEW:
        raise UserError(f"the clock of node {name} is off by {off:,.0f} s, and {SKEW:.0f} s are allowed: set it")
    if found["lost"]:
        raise UserError(
            f"node {name} has no data or model at {found['lost'][0]}: mount it there, or leave the node out"
        )
    if found["code"] != code_sha256():
        raise UserError(
            f"node {name} has other code than this process (rmt, torch, open_clip, numpy): install the same"
        )
    if not found["out"]:
        raise UserError(f"node {name} does not see {out.absolute()}: --out must be a folder that all nodes share")


def _put_all(ray, nodes: Sequence[dict], jobs: Sequence[Job]) -> tuple[dict, dict]:
    """Object references of models and data sets, by what runs ask for; those that the store cannot hold are missing."""
    room = STORE_SHARE * min(n["Resources"].get("object_store_memory", 0) for n in nodes)
    models: dict[tuple, Any] = {}
    files: dict[tuple, Any] = {}
    for run in (job.run for job in jobs):
        for kept, key, pack in ((models, model_key(run.config), pack_model), (files, data_key(run.config), pack_files)):
            if key in kept:
                continue
            packed: Model | Files | None = pack(run.config)
            kept[key] = None
            if packed is not None and packed.size <= room:
                room -= packed.size
                kept[key] = ray.put(packed)
            else:
                print(f"not shared {key[0]}: larger than the object store's share, so each run reads it from its node")
    return models, files


def data_key(config) -> tuple[str, ...]:
    """Of a run's data set."""
    return (config.data,) if config.root is None else (config.root, config.dataset)


def _task(folder: str, models: list[Any], files: Files | None, made: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """models: a reference or None, in a list: by itself Ray would put the model in the reference's place."""
    import ray

    (model,) = models
    held = {"held": mapper(made, model)} if made and model is not None else {}
    with handed(None if model is None else ray.get(model), files, **held):
        return execute(folder, f"{socket.gethostname()} ({ray.util.get_node_ip_address()})")


def _run(
    ray, jobs: Sequence[Job], models: dict, files: dict, made: dict, *, workers: int | None, retries: int, cpus: float,
    gpus: float,
) -> Iterator[dict[str, Any] | int]:  # fmt: skip
    # retry_exceptions stays off: what a run raises it would raise again. A lost process or node is what is retried.
    task = ray.remote(
        num_cpus=cpus, num_gpus=gpus, max_retries=retries, retry_exceptions=False, scheduling_strategy="SPREAD"
    )(_task)
    waiting, pending = list(reversed(jobs)), {}
    looked = full = time.monotonic()
    slots = _slots(_fitting(ray, cpus, gpus), cpus, gpus)
    while waiting or pending:
        while waiting and len(pending) < (workers or len(jobs)):
            job = waiting.pop()
            model, data = models[model_key(job.run.config)], files[data_key(job.run.config)]
            pending[task.remote(str(job.folder.absolute()), [model], data, made)] = job
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
        for ref in ready:
            yield _row(ray, ref, pending.pop(ref), retries)
        yield min(len(pending), slots)
        if time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            alive = [n for n in ray.nodes() if n["Alive"]]
            slots = _slots(alive, cpus, gpus)
            full = looked if slots else full
            if looked - full > EMPTY:
                raise UserError(f"no node that fits a run has been alive for {EMPTY:.0f} s; what is finished is kept")


def _row(ray, ref, job: Job, retries: int) -> dict[str, Any]:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return job.failed_row(f"a fault of rmt's: {str(error).strip().splitlines()[-1]}")
    except ray.exceptions.RayError as error:
        what = str(error).strip().splitlines()[0]
        return job.failed_row(f"its process or node was lost {retries + 1} times: {type(error).__name__}: {what}")
