"""A Ray cluster of several nodes on one machine, each node a process of its own with an address of its own.

Nodes lie in network namespaces of their own behind a bridge, where this user may make them (root with `ip`); elsewhere
on 127.0.0.2, 127.0.0.3, ... The head takes no runs, so that any node can be lost.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
NET, BRIDGE = "10.213.77", "rmtbr"
# A node counts as lost after as many missed looks, of a second each. Ray's own numbers take half a minute.
HEALTH = '{"health_check_period_ms": 1000, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 4, '
HEALTH += '"health_check_initial_delay_ms": 2000}'
WAIT = 60.0


class Nodes:
    """address: of the cluster. addresses: of its nodes, without the head's. apart: whether these are namespaces."""

    def __init__(self, address: str, addresses: list[str], apart: bool, processes: list[subprocess.Popen]) -> None:
        self.address, self.addresses, self.apart, self._processes = address, addresses, apart, processes

    def kill(self, number: int) -> None:
        """SIGKILL to all processes of a node at once, as a power cut."""
        os.killpg(self._processes[number].pid, signal.SIGKILL)
        self._processes[number].wait()


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def _namespaces(count: int) -> list[str]:
    """Names of new network namespaces NET.11, NET.12, ... behind a bridge at NET.1; empty where that is not allowed."""
    if os.geteuid() != 0 or not shutil.which("ip") or not _ip("link", "add", BRIDGE, "type", "bridge"):
        return []
    made = [f"rmt-n{number}" for number in range(count)]
    good = _ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE) and _ip("link", "set", BRIDGE, "up")
    for number, name in enumerate(made):
        good = good and all([
            _ip("netns", "add", name), _ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"),
            _ip("link", "set", f"{name}a", "master", BRIDGE, "up"), _ip("link", "set", f"{name}b", "netns", name),
            _ip("-n", name, "addr", "add", f"{NET}.{11 + number}/24", "dev", f"{name}b"),
            _ip("-n", name, "link", "set", f"{name}b", "up"), _ip("-n", name, "link", "set", "lo", "up"),
        ])  # fmt: skip
    if not good:
        _remove(made)
        return []
    return made


def _remove(made: list[str]) -> None:
    for name in made:
        _ip("netns", "del", name)
        _ip("link", "del", f"{name}a")
    _ip("link", "del", BRIDGE)


def _start(words: list[str], log: Path, before: list[str]) -> subprocess.Popen:
    command = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
               "--object-store-memory=100000000", *words]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1"}
    # A token that some other Ray has left at home would be asked for on one side and not given on the other.
    environment["RAY_AUTH_MODE"] = "disabled"
    with open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


@contextlib.contextmanager
def cluster(count: int = 3, cpus: int = 1, port: int = 6399) -> Iterator[Nodes]:
    """Starts a head and `count` nodes of `cpus` cores each. All ends with the context. Raises TimeoutError."""
    made = _namespaces(count)
    host = f"{NET}.1" if made else "127.0.0.1"
    addresses = [f"{NET}.{11 + n}" if made else f"127.0.0.{n + 2}" for n in range(count)]
    folder = Path(tempfile.mkdtemp(prefix="rmt-ray-"))
    processes: list[subprocess.Popen] = []
    # gRPC would ask a proxy for addresses that only this machine knows.
    proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        head = ["--head", f"--port={port}", f"--node-ip-address={host}", "--num-cpus=0", "--include-dashboard=false",
                f"--system-config={HEALTH}", f"--temp-dir={folder / 'ray'}"]  # fmt: skip
        processes.append(_start(head, folder / "head.log", []))
        _wait_for(folder / "head.log", processes[0])
        for number, (own, name) in enumerate(zip(addresses, made or [""] * count)):
            words = [f"--address={host}:{port}", f"--node-ip-address={own}", f"--num-cpus={cpus}"]
            inside = ["ip", "netns", "exec", name] if name else []
            processes.append(_start(words, folder / f"node{number}.log", inside))
            # One after the other: nodes of one machine write one file of ports.
            _wait_for(folder / f"node{number}.log", processes[-1])
        yield Nodes(f"{host}:{port}", addresses, bool(made), processes[1:])
    finally:
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        _remove(made)
        os.environ.update(proxies)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(log: Path, node: subprocess.Popen) -> None:
    """Until a node says that it runs. Raises TimeoutError with its log."""
    until = time.monotonic() + WAIT
    while "Ray runtime started" not in log.read_text():
        if node.poll() is not None or time.monotonic() > until:
            raise TimeoutError(f"a node did not start in {WAIT:.0f} s: {log.read_text()[-2000:]}")
        time.sleep(0.2)


def wait_for_nodes(ray, count: int) -> None:
    """Until `count` nodes beside the head are alive. Raises TimeoutError."""
    until = time.monotonic() + WAIT
    while sum(node["Alive"] for node in ray.nodes()) < count + 1:
        if time.monotonic() > until:
            raise TimeoutError(f"{count} nodes were not up in {WAIT:.0f} s")
        time.sleep(0.2)
