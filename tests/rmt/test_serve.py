"""`rmt serve` over a fake bank, in this process: routes, statuses, batching, admission, limits, metrics."""

import asyncio
import base64
import logging
import re

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra rmt[serve]")
pytest.importorskip("httpx", reason="needs httpx, of rmt[test]")

from serve_tools import CLASSES, FakeBank, classify, client, png, run, until

from rmt.serve.images import Limits, decode

RED, BLUE = png((200, 40, 40)), png((10, 20, 240))


def expected(bank, image: bytes, task: str) -> tuple[str, float]:
    found = bank.expected(bank.preprocess(decode(image, Limits())), task)
    names = bank.base if task == "__base__" else bank.classes[task]
    return names[int(found.argmax())], float(found.max())


def encoded(*images: bytes, **more) -> dict:
    return {"images": [base64.b64encode(image).decode() for image in images], **more}


def test_a_form_and_json_get_every_image_and_task_answered_with_the_top_classes():
    async def main():
        bank = FakeBank()
        decoded, prepare = [], bank.preprocess
        bank.preprocess = lambda image: decoded.append(image) or prepare(image)
        async with client(bank) as http:
            form = await classify(http, RED, BLUE, tasks=["colours", "pets"], top_k=5)
            assert form.status_code == 200 and len(decoded) == 2, "an image is decoded once for all its tasks"
            body = encoded(RED, BLUE, tasks=["colours", "pets"], top_k=5)
            assert (await http.post("/v1/classify", json=body)).json() == form.json()
        for image, found in zip((RED, BLUE), form.json()["images"], strict=True):
            assert [answer["task"] for answer in found["answers"]] == ["colours", "pets"]
            for answer in found["answers"]:
                name, p = expected(bank, image, answer["task"])
                assert answer["class"] == name == answer["top"][0]["class"]
                assert answer["probability"] == pytest.approx(p) == answer["top"][0]["probability"]
                values = [one["probability"] for one in answer["top"]]
                assert values == sorted(values, reverse=True) and len(values) == min(5, len(CLASSES[answer["task"]]))

    run(main())


def test_all_tasks_are_asked_where_none_is_named_and_base_where_it_has_classes():
    async def main():
        async with client() as http:
            answers = (await classify(http)).json()["images"][0]["answers"]
            assert [a["task"] for a in answers] == list(CLASSES) and all(len(a["top"]) == 1 for a in answers)
            assert (await classify(http, tasks=["__base__"])).status_code == 404
            assert (await http.get("/v1/tasks")).json()["base"] is False
        async with client(base=("left", "right")) as http:
            bank = http.service.bank
            (answer,) = (await classify(http, RED, tasks=["__base__"])).json()["images"][0]["answers"]
            assert answer["class"] == expected(bank, RED, "__base__")[0]
            assert (await http.get("/v1/tasks")).json()["base"] is True

    run(main())


BROKEN_FORM = {"content": b"--x\r\nnonsense", "headers": {"content-type": "multipart/form-data"}}


@pytest.mark.parametrize(
    ("status", "error", "request_"),
    [
        (404, "unknown_task", {"json": encoded(RED, tasks=["pets", "nobody"])}),
        (422, "invalid", {"json": encoded(RED, tasks=[])}),
        (422, "invalid", {"json": encoded(RED, top_k=0)}),
        (422, "invalid", {"json": encoded(RED, top_k=6)}),
        (422, "invalid", {"json": encoded(RED, top_k="1")}),
        (422, "invalid", {"json": encoded(RED, other=1)}),
        (422, "invalid", {"json": encoded()}),
        (422, "invalid", {"json": encoded(*[RED] * 17)}),
        (422, "invalid", {"content": b'{"images": [', "headers": {"content-type": "application/json"}}),
        (422, "invalid", {"content": b'{"images": ["\xff"]}', "headers": {"content-type": "application/json"}}),
        (422, "base64", {"json": {"images": ["what?"]}}),
        (422, "empty", {"files": [("images", ("a.png", b""))]}),
        (415, "image_format", {"files": [("images", ("a.png", b"nothing that is an image"))]}),
        (422, "image_damaged", {"files": [("images", ("a.png", RED[:60]))]}),
        (422, "invalid", {"files": [("image", ("a.png", RED))]}),
        (422, "invalid", {"files": [("images", (None, "text"))]}),
        (422, "invalid", {"files": [("images", ("a.png", RED)), ("tasks", ("b.png", RED))]}),
        (422, "invalid", {"files": [("images", ("a.png", RED))], "data": {"top_k": "many"}}),
        (422, "invalid", {"files": [("images", ("a.png", RED))], "data": {"top_k": ["1", "2"]}}),
        (415, "content_type", {"content": RED, "headers": {"content-type": "image/png"}}),
        (415, "content_type", {"content": RED}),
        (400, "http", BROKEN_FORM),
        (422, "too_many_rows", {"json": encoded(*[RED] * 4, tasks=["pets", "colours", "signs"])}),
    ],
)
def test_what_is_wrong_with_a_request_is_said_and_costs_no_forward(status, error, request_):
    async def main():
        async with client(queue=10) as http:
            response = await http.post("/v1/classify", **request_)
            assert (response.status_code, response.json()["error"]) == (status, error), response.text
            assert response.json()["detail"] and http.service.depth == 0 and not http.service.bank.calls
            assert (await classify(http)).status_code == 200

    run(main())


def test_of_several_images_the_bad_one_is_named():
    async def main():
        async with client() as http:
            response = await classify(http, RED, b"nonsense", BLUE)
            assert response.status_code == 415 and "image 2 of 3" in response.json()["detail"]

    run(main())


def test_rows_of_many_requests_and_tasks_share_one_forward_up_to_the_limit():
    async def main():
        async with client(max_batch=6, max_wait_ms=0, queue=100) as http:
            bank = http.service.bank
            bank.gate.clear()
            first = asyncio.create_task(classify(http, RED, tasks=["pets"]))
            await until(bank.entered.is_set)
            wanted = [(RED, "signs"), (BLUE, "pets"), (RED, "colours"), (BLUE, "signs")] * 2
            rest = [asyncio.create_task(classify(http, image, tasks=[task])) for image, task in wanted]
            await until(lambda: http.service.batcher._waiting == 8)
            bank.gate.set()
            assert (await first).status_code == 200
            for (image, task), response in zip(wanted, await asyncio.gather(*rest)):
                (answer,) = response.json()["images"][0]["answers"]
                name, p = expected(bank, image, task)
                assert answer["class"] == name and answer["probability"] == pytest.approx(p)
            assert [len(call) for call in bank.calls] == [1, 6, 2]
            assert len(set(bank.calls[1])) > 1 and list(bank.calls[1]) == sorted(bank.calls[1]), "grouped by task"

    run(main())


def test_a_row_waits_for_others_only_so_long():
    async def main():
        async with client(max_wait_ms=400, max_batch=8) as http:
            both = await asyncio.gather(classify(http, tasks=["pets"]), classify(http, tasks=["signs"]))
            assert [r.status_code for r in both] == [200, 200]
            assert http.service.bank.calls == [("pets", "signs")], "neither was sent alone"
        async with client(max_wait_ms=60_000, max_batch=2) as http:
            await asyncio.wait_for(asyncio.gather(*[classify(http, tasks=["pets"]) for _ in range(2)]), 10)
            assert http.service.bank.calls == [("pets", "pets")], "a full batch waits for nothing"

    run(main())


def test_one_request_may_take_several_forwards():
    async def main():
        async with client(max_batch=2) as http:
            response = await classify(http, RED, BLUE, tasks=["pets", "signs", "colours"])
            assert [len(call) for call in http.service.bank.calls] == [2, 2, 2]
            for image, found in zip((RED, BLUE), response.json()["images"]):
                for answer in found["answers"]:
                    assert answer["class"] == expected(http.service.bank, image, answer["task"])[0]

    run(main())


def test_a_full_queue_refuses_before_it_decodes_and_says_when_to_come_back():
    async def main():
        async with client(queue=4, max_batch=1) as http:
            service, bank = http.service, http.service.bank
            bank.gate.clear()
            waiting = [asyncio.create_task(classify(http, tasks=["pets"])) for _ in range(3)]
            await until(lambda: service.depth == 3)
            two = await classify(http, tasks=["pets", "signs"])
            assert two.status_code == 429 and int(two.headers["retry-after"]) >= 1
            assert service.depth == 3, "what was refused holds no place"
            waiting.append(asyncio.create_task(classify(http, tasks=["pets"])))
            await until(lambda: service.depth == 4)
            service.batcher.rows_per_s = 0.3
            refused = await classify(http, b"is not even looked at", tasks=["pets"])
            assert (refused.status_code, refused.json()["error"]) == (429, "busy")
            assert refused.headers["retry-after"] == "14", "4 rows at 0.3 rows a second"
            bank.gate.set()
            assert [r.status_code for r in await asyncio.gather(*waiting)] == [200] * 4
            assert service.depth == 0 and (await classify(http)).status_code == 200
            assert service.batcher.rows_per_s > 0.3, "measured"

    run(main())


def test_a_failing_forward_fails_its_own_requests_alone_and_the_worker_lives_on(caplog):
    async def main():
        async with client(max_wait_ms=0) as http:
            bank = http.service.bank

            def broken(x, names, out):
                raise RuntimeError("cosmic ray")

            bank.broken = broken
            with caplog.at_level(logging.ERROR, "rmt.serve"):
                failed = await classify(http)
            assert failed.status_code == 500 and "cosmic" not in failed.text
            assert failed.json()["id"] in caplog.text and "cosmic ray" in caplog.text
            bank.broken = None
            assert (await classify(http)).status_code == 200

    run(main())


def test_numbers_that_are_not_finite_stay_with_their_row():
    async def main():
        async with client(max_wait_ms=500, max_batch=2) as http:
            bank = http.service.bank
            bank.broken = lambda x, names, out: [
                torch.full_like(p, float("nan")) if name == "pets" else p for name, p in zip(names, out)
            ]
            bad, good = await asyncio.gather(classify(http, tasks=["pets"]), classify(http, tasks=["signs"]))
            assert len(bank.calls) == 1 and (bad.status_code, good.status_code) == (500, 200)
            assert "finite" in bad.json()["detail"] and bad.json()["id"]

    run(main())


def test_a_client_that_went_away_is_not_computed():
    async def main():
        async with client(max_batch=1) as http:
            service, bank = http.service, http.service.bank
            bank.gate.clear()
            first = asyncio.create_task(classify(http, tasks=["pets"]))
            await until(bank.entered.is_set)
            gone = asyncio.create_task(classify(http, tasks=["signs"]))
            await until(lambda: service.batcher._waiting == 1)
            gone.cancel()
            await until(lambda: service.depth == 1)
            last = asyncio.create_task(classify(http, tasks=["colours"]))
            await until(lambda: service.batcher._waiting == 2)
            bank.gate.set()
            assert (await first).status_code == (await last).status_code == 200
            assert bank.calls == [("pets",), ("colours",)] and service.batcher._waiting == 0

    run(main())


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/tasks"])
def test_a_body_is_limited_whether_or_not_it_says_how_long_it_is(path):
    async def main():
        async with client(limits=Limits(max_bytes=1000)) as http:
            limit, sent = http.service.options.max_body, 0
            # Told by its length: nothing of it is read.
            response = await http.post(path, content=b"x" * (limit + 1), headers={"content-type": "application/json"})
            assert (response.status_code, response.json()["error"]) == (413, "body_bytes")

            async def chunks():
                nonlocal sent
                for _ in range(1000):
                    sent += 10_000
                    yield b"y" * 10_000

            # httpx sends all chunks whatever is answered: what matters is the answer.
            response = await http.post(path, content=chunks(), headers={"content-type": "application/json"})
            assert (response.status_code, response.json()["error"]) == (413, "body_bytes")
            assert response.headers["connection"] == "close" and str(limit) in response.json()["detail"]
            response = await http.post(path, content=b"x" * limit, headers={"content-type": "application/json"})
            assert response.status_code == 422, "at the limit it is read"

    run(main())


def test_an_image_is_limited_in_bytes_and_pixels():
    async def main():
        async with client(limits=Limits(max_bytes=2000, max_pixels=40 * 36)) as http:
            assert (await classify(http, RED)).status_code == 200
            many = await classify(http, png(size=(40, 37)))
            assert (many.status_code, many.json()["error"]) == (413, "image_pixels") and "40 x 37" in many.json()[
                "detail"
            ]
            big = await classify(http, RED + b"\0" * 2000)
            assert (big.status_code, big.json()["error"]) == (413, "image_bytes")

    run(main())


SAMPLE = re.compile(r'([a-z_:][a-z0-9_:]*)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? ([0-9.e+-]+|\+Inf|NaN)')


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Strictly, as the format's description has it: {family: {sample with its labels: value}}."""
    assert text.endswith("\n")
    families, kinds, current = {}, {}, None
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            current = line.split(" ", 3)[2]
            assert current not in families, "one family, one block"
            families[current] = {}
        elif line.startswith("# TYPE "):
            _, _, name, kinds[current] = line.split(" ")
            assert name == current and kinds[current] in ("counter", "gauge", "histogram")
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            ends = ("_bucket", "_sum", "_count") if kinds[current] == "histogram" else ("",)
            assert name in [current + end for end in ends], line
            key = f"{name}{{{labels or ''}}}"
            assert key not in families[current], "a series occurs once"
            families[current][key] = float(value)
    for name, samples in families.items():
        if kinds[name] == "histogram":
            buckets = [value for key, value in samples.items() if key.startswith(f"{name}_bucket")]
            assert buckets == sorted(buckets) and buckets[-1] == samples[f"{name}_count{{}}"]
            assert f'{name}_bucket{{le="+Inf"}}' in samples
    return families


def test_metrics_are_valid_and_count_what_happened():
    async def main():
        async with client(max_wait_ms=300, max_batch=3, queue=50) as http:
            await asyncio.gather(classify(http, RED, tasks=["pets", "signs"]), classify(http, BLUE, tasks=["pets"]))
            await classify(http, b"nonsense")
            await http.get('/no"such')
            await http.request("BREW", "/v1/classify")
            await http.delete("/v1/tasks/signs")
            response = await http.get("/metrics")
            assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            found = parsed(response.text)
            requests = found["rmt_requests_total"]
            assert requests['rmt_requests_total{method="POST",route="/v1/classify",status="200"}'] == 2
            assert requests['rmt_requests_total{method="POST",route="/v1/classify",status="415"}'] == 1
            assert requests['rmt_requests_total{method="GET",route="other",status="404"}'] == 1
            assert requests['rmt_requests_total{method="other",route="/v1/classify",status="405"}'] == 1
            assert requests['rmt_requests_total{method="DELETE",route="/v1/tasks/{name}",status="204"}'] == 1
            assert found["rmt_rejected_total"] == {'rmt_rejected_total{reason="image_format"}': 1}
            assert found["rmt_images_total"] == {"rmt_images_total{}": 2}
            assert found["rmt_rows_total"] == {"rmt_rows_total{}": 3}
            assert found["rmt_batch_rows"]["rmt_batch_rows_sum{}"] == 3
            assert found["rmt_batch_rows"]["rmt_batch_rows_count{}"] == 1
            assert found["rmt_batch_tasks"]["rmt_batch_tasks_sum{}"] == 2
            assert found["rmt_queue_seconds"]["rmt_queue_seconds_count{}"] == 3
            assert found["rmt_forward_seconds"]["rmt_forward_seconds_count{}"] == 1
            assert found["rmt_request_seconds"]["rmt_request_seconds_count{}"] == 4
            assert found["rmt_queue_rows"] == {"rmt_queue_rows{}": 0} and found["rmt_tasks"] == {"rmt_tasks{}": 2}

    run(main())


def test_a_stopping_server_finishes_what_it_accepted_and_takes_nothing_new():
    async def main():
        async with client() as http:
            service, bank = http.service, http.service.bank
            assert (await http.get("/healthz")).json() == {"status": "ok", "tasks": 3}
            bank.gate.clear()
            accepted = asyncio.create_task(classify(http))
            await until(bank.entered.is_set)
            service.stopping = True
            for response in (await classify(http), await http.get("/v1/tasks"), await http.get("/")):
                assert (response.status_code, response.json()["error"]) == (503, "stopping")
                assert response.headers["connection"] == "close"
            health = await http.get("/healthz")
            assert (health.status_code, health.json()["status"]) == (503, "stopping")
            assert (await http.get("/metrics")).status_code == 200 and service.in_flight == 1
            bank.gate.set()
            assert (await accepted).status_code == 200 and service.in_flight == 0

    run(main())


def test_an_upload_that_breaks_off_is_no_fault_of_the_server(caplog):
    async def main():
        async with client() as http:
            body = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

            async def receive():
                return next(body)

            async def send(message):
                sent.append(message)

            sent = []
            scope = {
                "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
                "path": "/v1/classify", "raw_path": b"/v1/classify", "query_string": b"", "root_path": "",
                "headers": [(b"content-type", b"application/json")], "client": ("test", 1), "server": ("test", 80),
            }  # fmt: skip
            await http.app(scope, receive, send)
            assert [m["status"] for m in sent if "status" in m] == [499] and http.service.depth == 0
            text = (await http.get("/metrics")).text
            assert 'status="500"' not in text and 'status="499"' in text
        assert not [record for record in caplog.records if record.levelname == "ERROR"]

    run(main())
