"""`rmt serve`: tasks loaded and removed while it serves, and what may not be loaded."""

import asyncio
import json
import os
import shutil
import sys
import threading
import types

import pytest

pytest.importorskip("fastapi", reason="needs the extra rmt[serve]")
pytest.importorskip("httpx", reason="needs httpx, of rmt[test]")

import tiny
from serve_tools import CLASSES, FakeBank, classify, client, run, until

import rmt

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of task folders `cars` (2 classes) and `run`, a run's; beside it `outside`."""
    folder = tmp_path_factory.mktemp("serve")
    model = rmt.get_mask_model(tiny.model())
    model.save_pretrained(folder / "tasks" / "cars", ("old car", "new_car"), "a photo of a {}.")
    for target in ("tasks/run/task", "outside/cars"):
        shutil.copytree(folder / "tasks" / "cars", folder / target)
    (folder / "tasks" / "empty").mkdir()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "all")
    return tmp_path / "all"


def test_tasks_are_listed_loaded_replaced_and_removed(folder):
    async def main():
        async with client(roots=(folder / "tasks",)) as http:
            before = (await http.get("/v1/tasks")).json()
            assert [task["name"] for task in before["tasks"]] == list(CLASSES) and "secret" not in str(before)
            made = await http.post("/v1/tasks", json={"path": "cars"})
            assert made.status_code == 201 and made.json()["classnames"] == ["old car", "new_car"]
            (answer,) = (await classify(http, tasks=["cars"])).json()["images"][0]["answers"]
            assert answer["class"] in ("old car", "new_car")
            again = await http.post("/v1/tasks", json={"path": "cars"})
            assert (again.status_code, again.json()["error"]) == (409, "duplicate_task")
            other = await http.post("/v1/tasks", json={"path": "cars", "name": "my cars"})
            assert other.status_code == 201 and other.json()["name"] == "my cars"
            named = await http.post("/v1/tasks", json={"path": str(folder / "tasks" / "run")})
            assert named.status_code == 201 and named.json()["name"] == "run", "a run folder stands for its task"
            replaced = await http.post("/v1/tasks", json={"path": "cars", "name": "pets", "replace": True})
            assert replaced.status_code == 201
            answers = (await classify(http, tasks=["pets"])).json()["images"][0]["answers"]
            assert answers[0]["class"] in ("old car", "new_car"), "with the classes of the task that is there now"
            gone = await http.delete("/v1/tasks/my%20cars")
            assert gone.status_code == 204 and gone.content == b""
            assert (await http.delete("/v1/tasks/my%20cars")).status_code == 404
            assert (await classify(http, tasks=["my cars"])).status_code == 404
            names = [task["name"] for task in (await http.get("/v1/tasks")).json()["tasks"]]
            assert sorted(names) == ["cars", "colours", "pets", "run", "signs"]

    run(main())


@pytest.mark.parametrize(
    "path", ["../outside/cars", "OUTSIDE/outside/cars", "/etc", "cars/../../outside/cars", "link", "run/../inner",
             "filed", "a\0b", "x" * 900],
)  # fmt: skip
def test_nothing_outside_of_the_folders_given_at_start_is_read(folder, path):
    (folder / "tasks" / "link").symlink_to(folder / "outside" / "cars")
    (folder / "tasks" / "inner").mkdir()
    (folder / "tasks" / "inner" / "task").symlink_to(folder / "outside" / "cars")
    (folder / "tasks" / "filed").mkdir()
    (folder / "tasks" / "filed" / "mask.safetensors").symlink_to(folder / "outside" / "cars" / "mask.safetensors")

    async def main():
        async with client(roots=(folder / "tasks",)) as http:
            response = await http.post("/v1/tasks", json={"path": path.replace("OUTSIDE", str(folder))})
            assert (response.status_code, response.json()["error"]) == (403, "outside")
            assert http.service.bank.tasks == tuple(CLASSES)

    run(main())


def test_a_link_to_the_folder_itself_is_fine(folder):
    os.symlink(folder / "tasks", folder / "current")

    async def main():
        async with client(roots=(folder / "current",)) as http:
            assert (await http.post("/v1/tasks", json={"path": str(folder / "current" / "cars")})).status_code == 201

    run(main())


@pytest.mark.parametrize(
    ("status", "error", "body"),
    [
        (404, "no_such_task", {"path": "nothing"}),
        (404, "no_such_task", {"path": "empty"}),
        (422, "invalid_task", {"path": "damaged"}),
        (422, "invalid", {"path": "cars", "name": "__base__"}),
        (422, "invalid", {"path": "cars", "name": "a/b"}),
        (422, "invalid", {"path": "cars", "hub": "user/cars"}),
        (422, "invalid", {}),
        (422, "invalid", {"path": "cars", "replace": "yes"}),
        (422, "invalid", {"path": "cars", "\ud800": 1}),
        (403, "hub_not_allowed", {"hub": "user/cars"}),
        (422, "invalid", {"hub": "../outside"}),
        (422, "invalid", {"hub": "/etc/passwd"}),
    ],
)
def test_what_cannot_be_loaded_is_said_and_changes_nothing(folder, status, error, body):
    shutil.copytree(folder / "tasks" / "cars", folder / "tasks" / "damaged")
    mask = folder / "tasks" / "damaged" / "mask.safetensors"
    mask.write_bytes(mask.read_bytes()[:-100])

    async def main():
        async with client(roots=(folder / "tasks",)) as http:
            response = await http.post("/v1/tasks", content=json.dumps(body), headers=JSON)
            assert (response.status_code, response.json()["error"]) == (status, error), response.text
            assert http.service.bank.tasks == tuple(CLASSES) and len(http.service.infos()) == 3

    run(main())


def test_a_hub_id_is_never_a_path_of_this_machine(folder, monkeypatch):
    asked = []
    hub = types.ModuleType("rmt.hub")
    hub.resolve = lambda name: asked.append(name) or folder / "outside" / "cars"
    monkeypatch.setitem(sys.modules, "rmt.hub", hub)
    monkeypatch.setattr(rmt, "hub", hub, raising=False)
    monkeypatch.chdir(folder)

    async def main():
        async with client(roots=(folder / "tasks",), allow_hub=True) as http:
            response = await http.post("/v1/tasks", json={"hub": "outside/cars@v1"})
            assert (response.status_code, response.json()["name"]) == (201, "cars")
            assert asked == ["hf-hub:outside/cars@v1"], "a folder outside/cars is there"

    run(main())


def test_what_the_bank_refuses_is_its_reason(folder):
    class Strict(FakeBank):
        def add(self, *args, **options):
            raise rmt.UserError("it is for another backbone")

    async def main():
        async with client(Strict(), roots=(folder / "tasks",)) as http:
            response = await http.post("/v1/tasks", json={"path": "cars"})
            assert (response.status_code, response.json()["error"]) == (422, "invalid_task")
            assert "another backbone" in response.json()["detail"] and (await classify(http)).status_code == 200

    run(main())


def test_a_read_only_server_changes_nothing(folder):
    async def main():
        async with client(roots=(folder / "tasks",), read_only=True) as http:
            assert (await http.post("/v1/tasks", json={"path": "cars"})).status_code == 403
            assert (await http.delete("/v1/tasks/pets")).status_code == 403
            assert http.service.bank.tasks == tuple(CLASSES)

    run(main())


def test_rows_that_wait_for_a_removed_task_get_410_and_others_go_on():
    async def main():
        async with client(max_batch=4) as http:
            bank = http.service.bank
            bank.gate.clear()
            running = asyncio.create_task(classify(http, tasks=["signs"]))
            await until(bank.entered.is_set)
            removal = asyncio.create_task(http.delete("/v1/tasks/signs"))
            await until(lambda: http.service.batcher._calls)
            lost = [asyncio.create_task(classify(http, tasks=["pets", "signs"])) for _ in range(2)]
            kept = asyncio.create_task(classify(http, tasks=["pets"]))
            await until(lambda: http.service.batcher._waiting == 5)
            bank.gate.set()
            assert (await running).status_code == 200, "a forward that ran keeps its task"
            assert (await removal).status_code == 204 and (await kept).status_code == 200
            for response in await asyncio.gather(*lost):
                assert (response.status_code, response.json()["error"]) == (410, "task_gone")
            assert "signs" not in {name for call in bank.calls[1:] for name in call}
            assert http.service.depth == 0 and (await classify(http)).status_code == 200

    run(main())


def test_answers_stay_right_while_tasks_come_and_go(folder):
    async def main():
        async with client(roots=(folder / "tasks",), max_batch=4, max_wait_ms=1) as http:
            statuses, ended = [], False

            async def change():
                for _ in range(15):
                    assert (await http.post("/v1/tasks", json={"path": "cars"})).status_code == 201
                    body = {"path": "cars", "name": "pets", "replace": True}
                    assert (await http.post("/v1/tasks", json=body)).status_code == 201
                    assert (await http.delete("/v1/tasks/cars")).status_code == 204

            async def ask(task, allowed):
                while not ended:
                    # A 404 in this process waits for nothing: without a pause nothing else would run.
                    await asyncio.sleep(0.001)
                    response = await classify(http, tasks=[task])
                    statuses.append(response.status_code)
                    if response.status_code == 200:
                        assert response.json()["images"][0]["answers"][0]["class"] in allowed
                    else:
                        assert task == "cars" and response.status_code in (404, 410)

            cars = ("old car", "new_car")
            allowed = {"cars": cars, "pets": (*CLASSES["pets"], *cars), "signs": CLASSES["signs"]}
            askers = [asyncio.create_task(ask(*pair)) for pair in allowed.items() for _ in range(2)]
            await change()
            ended = True
            await asyncio.gather(*askers)
            assert statuses.count(200) > 20 and http.service.depth == 0

    run(main())


def test_a_task_that_is_being_loaded_is_not_asked_yet(folder):
    """All tasks are those with a description; the bank has one more for the moment that its bits are counted."""

    async def main():
        async with client(roots=(folder / "tasks",)) as http:
            bank, counted, info = http.service.bank, threading.Event(), http.service.bank.info

            def slow(name):
                assert name != "cars" or counted.wait(20)
                return info(name)

            bank.info = slow
            loading = asyncio.create_task(http.post("/v1/tasks", json={"path": "cars"}))
            await until(lambda: "cars" in bank.tasks)
            asked = asyncio.create_task(classify(http))
            await until(lambda: asked.done() or http.service.batcher._waiting)
            counted.set()
            response = await asked
            assert response.status_code == 200, response.text
            assert [a["task"] for a in response.json()["images"][0]["answers"]] == list(CLASSES)
            assert (await loading).status_code == 201

    run(main())


def test_a_load_whose_client_went_away_leaves_the_worker_alive(folder):
    async def main():
        async with client(roots=(folder / "tasks",)) as http:
            service, bank = http.service, http.service.bank
            entered, gate, info = threading.Event(), threading.Event(), bank.info

            def slow(name):
                entered.set()
                assert gate.wait(20)
                return info(name)

            bank.info = slow
            loading = asyncio.create_task(http.post("/v1/tasks", json={"path": "cars"}))
            await until(entered.is_set)
            # Running, and waiting in the queue.
            waiting = asyncio.create_task(http.delete("/v1/tasks/signs"))
            await until(lambda: service.batcher._calls)
            loading.cancel()
            waiting.cancel()
            await asyncio.sleep(0.05)
            gate.set()
            bank.info = info
            assert (await classify(http, tasks=["pets"])).status_code == 200
            assert "cars" in bank.tasks and "signs" in bank.tasks, "what runs ends, what waits is not begun"

    run(main())
