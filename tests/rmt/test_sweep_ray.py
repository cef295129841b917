"""rmt sweep on a real Ray cluster of three nodes, each with an address of its own; one is killed in the middle."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import yaml

import rmt.sweep.ray as engine
from rmt.config import UserError
from rmt.sweep.drive import Engine, sweep
from rmt.sweep.identity import code_sha256

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

LIMIT = 100


def test_a_sweep_survives_a_lost_node_and_reads_the_backbone_once(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'rmt[ray]'")
    from ray_cluster import cluster, wait_for_nodes

    data = tiny.splits(tmp_path / "data", train=4, test=3)
    train = {"lr": 2e-3, "steps": 150, "batch": 8, "log_every": 1, "save_every": 0}
    base = {"model": tiny.model_folder(tmp_path / "model"), "data": str(data), "device": "cpu", "train": train}
    spec = tmp_path / "sweep.yaml"
    # One run has a mistake of its user's in it: it fails alone, and is not tried again.
    settings = {"template": ["a photo of a {}.", "a {}."], "mask.modules": [[], ["visual.no.such"]]}
    spec.write_text(yaml.safe_dump({"base": base, "shots": [2], "seeds": [1, 2, 3], "settings": settings}))
    put = engine._put_all

    def put_and_remove(*args):
        """From here on whoever reads the backbone or an image from a disk fails."""
        found = put(*args)
        (tmp_path / "model" / "open_clip_model.safetensors").unlink()
        for path in data.rglob("*.png"):
            path.write_bytes(b"")
        return found

    monkeypatch.setattr(engine, "_put_all", put_and_remove)
    with cluster(3) as nodes:
        ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
        try:
            wait_for_nodes(ray, 3)
            killed: list[str] = []
            thread = threading.Thread(target=_kill_one, args=(nodes, tmp_path, killed))
            thread.start()
            rows = sweep(spec, tmp_path / "out", Engine("ray", retries=2))
            thread.join()
        finally:
            ray.shutdown()
    table = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(table) == len({row["id"] for row in table}) == 12 and {row["id"] for row in rows} == {
        row["id"] for row in table
    }  # fmt: skip
    wrong = [row for row in rows if row["settings"]["mask.modules"]]
    assert all(row["status"] == "failed" and "visual.no.such" in row["why"] for row in wrong) and len(wrong) == 6
    good = [row for row in rows if not row["settings"]["mask.modules"]]
    assert [row["status"] for row in good] == ["done"] * 6, good
    lost, where = killed
    (retried,) = [row for row in rows if row["run"] == lost]
    assert retried["attempt"] == 2 and f"({where})" not in retried["host"]
    assert "resume     from step" in (tmp_path / "out" / "runs" / lost / "log.txt").read_text()
    assert len({row["host"] for row in rows}) >= 2, "runs are spread over nodes"


def test_runs_on_one_device_map_one_backbone(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'rmt[ray]'")
    data, model = tiny.splits(tmp_path / "data", train=4, test=3), tiny.model_folder(tmp_path / "model")
    base = {"model": model, "data": str(data), "device": "cpu", "train": {"lr": 2e-3, "steps": 4, "batch": 8}}
    spec = tmp_path / "sweep.yaml"
    spec.write_text(yaml.safe_dump({"base": base, "shots": [2], "seeds": [1, 2]}))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray leaves a token in the home folder
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        rows = sweep(spec, tmp_path / "held", Engine("ray", hold=True))
    finally:
        ray.shutdown()
    alone = sweep(spec, tmp_path / "alone", Engine("local", workers=1))
    assert [row["status"] for row in rows] == ["done"] * 2
    for mine, theirs in zip(rows, alone):
        assert mine["acc1"] == theirs["acc1"]
        log = (tmp_path / "held" / "runs" / mine["run"] / "log.txt").read_text()
        assert "backbone   mapped from its holder's memory" in log


def _kill_one(nodes, folder: Path, killed: list[str]) -> None:
    """The node of the first run that is seen at work, after its first step."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        for path in folder.glob("out/runs/*/last.pt"):
            state = json.loads((path.parent / "state.json").read_text())
            at = [n for n, address in enumerate(nodes.addresses) if f"({address})" in state["host"]]
            if state["status"] == "running" and at:
                nodes.kill(at[0])
                killed += [path.parent.name, nodes.addresses[at[0]]]
                return
        time.sleep(0.02)


def look(**changed):
    found = {"time": time.time(), "code": code_sha256(), "lost": [], "out": True} | changed
    return SimpleNamespace(get=lambda ref: found, exceptions=SimpleNamespace(RayError=ZeroDivisionError))


def test_what_a_node_lacks_is_said_with_its_name(tmp_path):
    def ask(**changed):
        engine._need_node(look(**changed), "n7 (10.0.0.7)", None, time.time(), tmp_path)

    ask()
    for changed, message in (
        ({"lost": ["/data/pets"]}, r"node n7 \(10.0.0.7\) has no data or model at /data/pets: mount it there"),
        ({"code": "0"}, r"node n7 \(10.0.0.7\) has other code"),
        ({"out": False}, r"node n7 \(10.0.0.7\) does not see .*: --out must be a folder that all nodes share"),
        ({"time": time.time() + 300}, r"clock of node n7 \(10.0.0.7\) is off by (299|300) s"),
        ({"time": time.time() - 300}, r"clock of node n7 \(10.0.0.7\) is off by 300 s"),
    ):
        with pytest.raises(UserError, match=message):
            ask(**changed)
    token = tmp_path / "token"
    token.touch()
    found = engine._look([str(tmp_path), str(tmp_path / "none")], str(token))
    assert found["lost"] == [str(tmp_path / "none")] and found["out"] and abs(found["time"] - time.time()) < 60


def test_how_many_runs_fit():
    nodes = [{"Resources": {"CPU": 4.0, "GPU": 2.0}}, {"Resources": {"CPU": 1.0}}, {"Resources": {}}]
    assert (
        engine._slots(nodes, 1, 0) == 5 and engine._slots(nodes, 0.5, 0.25) == 8 and engine._slots(nodes, 0.3, 0) == 16
    )
    alive = [node | {"Alive": True, "NodeManagerHostname": "h", "NodeManagerAddress": "a"} for node in nodes]
    ray = SimpleNamespace(nodes=lambda: alive)
    assert engine._fitting(ray, 1, 0.5) == alive[:1]
    with pytest.raises(
        UserError, match=r"no node of the cluster has 8 CPU and 0 GPU for a run, they have h \(a\): 4 CPU"
    ):
        engine._fitting(ray, 8, 0)


def test_gpus_are_never_taken_or_left_in_silence():
    nodes, run = [{"Resources": {"CPU": 4.0, "GPU": 2.0}}], SimpleNamespace(config=SimpleNamespace(device="auto"))
    with pytest.raises(UserError, match="the cluster has GPUs: --gpus must say"):
        engine._need_choice(nodes, [SimpleNamespace(run=run)], 0)
    engine._need_choice(nodes, [SimpleNamespace(run=run)], 0.25)
    run.config.device = "cpu"
    engine._need_choice(nodes, [SimpleNamespace(run=run)], 0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "there is no Ray cluster at 127.0.0.1:1: .*refused"),
        ("ray://head:10001", "address must be HOST:PORT of a Ray cluster's head, got 'ray://head:10001'"),
        ("head", "address must be HOST:PORT"),
    ],
)
def test_an_address_without_a_cluster(address, message):
    with pytest.raises(UserError, match=message):
        engine._need_reachable(address)


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray: pip install 'rmt\[ray\]'"):
        next(engine.outcomes([], Path(os.curdir), address=None, workers=None, retries=0, cpus=1, gpus=0))
