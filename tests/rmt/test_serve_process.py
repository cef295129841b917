"""`rmt serve` as a process, with real tasks over a tiny model: answers, signals, what it refuses to start with."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra rmt[serve]")
pytest.importorskip("uvicorn", reason="needs the extra rmt[serve]")

import tiny
import torch
from serve_tools import png

import rmt
from rmt import cli
from rmt.serve.images import Limits, decode

ROOT = Path(__file__).parents[2]
BODY = {"POST": {"Content-Type": "application/json"}}


def randomised(model, seed: int):
    torch.manual_seed(seed)
    for mask in model.masks:
        bits = torch.rand(mask.weight.shape) > 0.3
        mask.set_bits(rmt_bits(bits))
    return model


def rmt_bits(mask):
    import rmt_kernels as rk

    return rk.pack_bits(mask)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(name of a model, folder of three tasks of it)."""
    folder = tmp_path_factory.mktemp("serve_process")
    name = tiny.model_folder(folder / "model")
    for i, classes in enumerate((("cat", "dog"), ("red", "green", "blue"), ("stop", "go"))):
        model = randomised(rmt.get_mask_model(rmt.clip.load(name, None, None, torch.device("cpu")).model), i)
        model.save_pretrained(folder / "tasks" / f"task{i}", classes, "a photo of a {}.")
    return name, folder / "tasks"


@contextlib.contextmanager
def serving(name, *arguments):
    """The process and its port."""
    command = [
        sys.executable,
        "-m",
        "rmt.cli",
        "serve",
        *map(str, arguments),
        "--port",
        "0",
        "--model",
        name,
        "--device",
        "cpu",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if match := re.match(r"serving +http://127.0.0.1:(\d+)/", line):
                    break
            else:
                raise AssertionError("".join(lines))
            yield process, int(match[1])
        finally:
            process.kill()


def ask(port: int, method: str, path: str, body=None, timeout=60):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    connection.request(method, path, None if body is None else json.dumps(body), BODY.get(method, {}))
    response = connection.getresponse()
    found = response.read()
    connection.close()
    return response.status, json.loads(found) if found[:1] == b"{" else found


def image(seed: int = 0) -> bytes:
    return png((40 * seed % 256, 90, 200 - 10 * seed))


def body(data: bytes, **more) -> dict:
    import base64

    return {"images": [base64.b64encode(data).decode()], **more}


def test_answers_are_the_banks_own_and_a_stop_finishes_what_was_accepted(written):
    name, tasks = written
    bank = rmt.load(name, tasks=[tasks / f"task{i}" for i in range(3)], device="cpu")
    with serving(name, tasks, "--max-wait-ms", "6000", "--max-batch", "64") as (process, port):
        assert ask(port, "GET", "/healthz") == (200, {"status": "ok", "tasks": 3})
        found, threads = {}, []

        def one(seed):
            found[seed] = ask(port, "POST", "/v1/classify", body(image(seed), top_k=3))

        for seed in range(4):
            threads.append(threading.Thread(target=one, args=(seed,)))
            threads[-1].start()
        # All four wait for the batch to fill, which it does not: 12 rows of 64.
        for _ in range(2000):
            if "rmt_queue_rows 12" in ask(port, "GET", "/metrics")[1].decode():
                break
            time.sleep(0.005)
        else:
            raise AssertionError("the requests did not arrive")
        process.send_signal(signal.SIGTERM)
        for _ in range(2000):
            with contextlib.suppress(OSError):
                if ask(port, "GET", "/healthz")[0] == 503:
                    break
            time.sleep(0.005)
        else:
            raise AssertionError("it did not say that it stops")
        status, refused = ask(port, "POST", "/v1/classify", body(image()))
        assert (status, refused["error"]) == (503, "stopping")
        for thread in threads:
            thread.join()
        assert process.wait(60) == 0 and "all that was accepted is answered" in process.stdout.read()
    for seed, (status, answer) in found.items():
        assert status == 200
        x = bank.preprocess(decode(image(seed), Limits()))[None]
        for got in answer["images"][0]["answers"]:
            (expected,) = bank.classify(x, [got["task"]])
            assert got["class"] == expected.class_name
            assert got["probability"] == pytest.approx(expected.probability, rel=1e-4)
    with pytest.raises(ConnectionError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_an_idle_server_stops_at_once_on_ctrl_c_although_a_client_keeps_its_connection(written):
    name, tasks = written
    with serving(name, tasks / "task0", tasks / "task1", "--base-classes", "cat", "tree") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/classify", json.dumps(body(image(), tasks=["__base__"])), BODY["POST"])
        response = connection.getresponse()
        (answer,) = json.loads(response.read())["images"][0]["answers"]
        assert response.status == 200 and answer["class"] in ("cat", "tree")
        # A task removed and loaded again, of the folder it was started with.
        assert ask(port, "DELETE", "/v1/tasks/task0")[0] == 204
        assert ask(port, "POST", "/v1/tasks", {"path": str(tasks / "task0")})[0] == 201
        assert ask(port, "POST", "/v1/tasks", {"path": str(tasks / "task2")})[0] == 403
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and time.monotonic() - start < 15


def test_grace_ends_and_the_exit_status_says_so(written):
    name, tasks = written
    with serving(name, tasks, "--grace", "0.3") as (process, port):
        slow = socket.create_connection(("127.0.0.1", port))
        slow.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 1 and "before all was answered" in process.stdout.read()
        slow.close()


def test_what_it_cannot_start_with_is_one_line(written, tmp_path, capsys, monkeypatch):
    name, tasks = written

    def said(*arguments):
        assert cli.main(["serve", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "expected a task folder" in said(tmp_path)
    assert "got 'task0' twice" in said(tasks, copied(tasks / "task0", tmp_path / "task0"))
    assert "--max-batch must be at least 1, got 0" in said(tasks, "--max-batch", 0)
    assert "--max-pixels must be at most" in said(tasks, "--max-pixels", 10**9)
    assert "--port must be at most 65535" in said(tasks, "--port", 70000)
    assert "--model must be given" in said(tasks)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1 port {port}" in said(tasks, "--model", name, "--port", port)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert "pip install 'rmt[serve]'" in said(tasks)


def copied(source, target):
    import shutil

    return shutil.copytree(source, target)
