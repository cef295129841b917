"""Routes. `create_app(service)` is an ASGI application; its OpenAPI document names every answer."""

import asyncio
import base64
import binascii
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from . import page
from .edge import CLASSIFY, Edge
from .metrics import CONTENT_TYPE
from .refusals import Refused
from .schemas import (
    MAX_IMAGES,
    MAX_TASKS,
    REQUEST_BODY,
    ClassifyRequest,
    ClassifyResponse,
    Error,
    Health,
    LoadRequest,
    TaskInfo,
    TaskList,
)  # fmt: skip
from .service import Service

log = logging.getLogger("rmt.serve")
_MEANING = {
    400: "The request is no HTTP request of this kind, or its form cannot be read.",
    403: "The server may not do that.",
    404: "There is no such task.",
    409: "A task of that name is loaded.",
    410: "A task was removed while the request waited.",
    413: "Too many bytes, or too many pixels.",
    415: "Not a content type, or not an image format, that is taken.",
    422: "A field or an image is not what it must be; `detail` says what was expected and what came.",
    429: "Too much is under way: try again after Retry-After seconds.",
    500: "A fault of the server's; `id` stands in its log.",
    503: "The server is stopping.",
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {s: {"model": Error, "description": _MEANING[s]} for s in statuses}
    if 429 in found:
        seconds = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
        found[429]["headers"] = {"Retry-After": seconds}
    return found


def reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: what came from a client may hold what UTF-8 cannot."""
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


def refuse(error: Refused, close: bool = False) -> Response:
    """The answer that an error is. close: end the connection, of whose request the body was not read."""
    return reply(error.body, error.status, error.headers | ({"Connection": "close"} if close else {}))


def create_app(service: Service) -> FastAPI:
    """The application over a service that the application starts and closes with its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="rmt serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Many tasks over one CLIP model: a mask each, mixed in one batch.",
    )  # fmt: skip
    app.add_middleware(Edge, service=service, reply=refuse)
    _handle_errors(app)
    _add_tasks(app, service)
    _add_state(app, service)

    @app.post(
        CLASSIFY, openapi_extra={"requestBody": REQUEST_BODY}, summary="Classify images by one task or many",
        responses={200: {"model": ClassifyResponse}} | _errors(400, 404, 410, 413, 415, 422, 429, 500, 503),
    )  # fmt: skip
    async def classify(request: Request) -> Response:
        try:
            with service.ticket() as ticket:
                images, tasks, top_k = await _read(request)
                found = await service.classify(ticket, images, tasks, top_k)
        except Refused as error:
            service.metrics.rejected.add(error.reason)
            raise
        return reply({"images": [{"answers": answers} for answers in found]})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page.HTML, media_type="text/html; charset=utf-8", headers=page.HEADERS)

    return app


def _add_tasks(app: FastAPI, service: Service) -> None:
    @app.get("/v1/tasks", summary="The loaded tasks", responses={200: {"model": TaskList}} | _errors(503))
    async def tasks() -> Response:
        return reply({"tasks": service.infos(), "base": service.base})

    @app.post(
        "/v1/tasks", status_code=201, summary="Load a task",
        responses={201: {"model": TaskInfo}} | _errors(400, 403, 404, 409, 413, 415, 422, 500, 503),
    )  # fmt: skip
    async def load(wanted: LoadRequest) -> Response:
        return reply(await service.load(wanted.path, wanted.hub, wanted.name, wanted.replace), 201)

    @app.delete(
        "/v1/tasks/{name}", status_code=204, summary="Remove a task", response_class=Response,
        responses=_errors(403, 404, 422, 500, 503),
    )  # fmt: skip
    async def remove(name: str) -> Response:
        await service.remove(name)
        return Response(status_code=204)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get(
        "/healthz", summary="Whether it takes requests",
        responses={200: {"model": Health}, 503: {"model": Health, "description": _MEANING[503]}},
    )  # fmt: skip
    async def health() -> Response:
        status = "stopping" if service.stopping else "ok"
        return reply({"status": status, "tasks": len(service.bank.tasks)}, 503 if service.stopping else 200)

    text = {"description": "Prometheus' text format.", "content": {CONTENT_TYPE: {"schema": {"type": "string"}}}}

    @app.get("/metrics", summary="Counters and histograms", response_class=Response, responses={200: text})
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refuse(error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        reason = {404: "not_found", 405: "method", 413: "body_bytes"}.get(error.status_code, "http")
        return reply({"error": reason, "detail": str(error.detail)}, error.status_code, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def disconnected(request: Request, error: ClientDisconnect) -> Response:
        # No one reads it; the status is what the metrics count.
        return refuse(Refused(499, "disconnected", "the client went away before its request was whole"))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        # A body of another content type is not read as JSON, and then is no object.
        return refuse(Refused(422, "invalid", _told(error)))

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        known = uuid.uuid4().hex[:12]
        log.error("%s %s failed, id %s", request.method, request.url.path, known)
        return refuse(Refused(500, "failed", "the server failed", id=known))


def _told(error: RequestValidationError | ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{where}: {first['msg']}" if where else str(first["msg"])


async def _read(request: Request) -> tuple[list[Callable[[], bytes]], list[str] | None, int]:
    """(what gives the bytes of each image, task names, top_k) of a form or of JSON. Raises Refused, HTTPException."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request)
    if kind != "application/json":
        expected = "multipart/form-data or application/json"
        raise Refused(415, "content_type", f"the content type must be {expected}, got {kind or 'none'!r}")
    try:
        body = ClassifyRequest.model_validate_json(await request.body())
    except ValidationError as error:
        raise Refused(422, "invalid", _told(error)) from error
    return [partial(_from_base64, text) for text in body.images], body.tasks, body.top_k


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(422, "base64", f"an image must be base64: {error}") from error


async def _form(request: Request) -> tuple[list[Callable[[], bytes]], list[str] | None, int]:
    # Raises HTTPException 400 where it cannot be read.
    async with request.form(max_files=MAX_IMAGES, max_fields=MAX_TASKS + 1) as form:
        if odd := set(form) - {"images", "tasks", "top_k"}:
            raise Refused(422, "invalid", f"a form's fields must be images, tasks and top_k, got {sorted(odd)[0]!r}")
        files, names = form.getlist("images"), form.getlist("tasks")
        if not files or not all(isinstance(file, UploadFile) for file in files):
            raise Refused(422, "invalid", "images must be one file or several, got none or a field without a file name")
        if any(isinstance(name, UploadFile) for name in names):
            raise Refused(422, "invalid", "tasks must be fields, got a file")
        top = form.getlist("top_k")
        checked = {"images": ["-"], "tasks": names or None, "top_k": _whole(top[0]) if len(top) == 1 else top or 1}
        try:
            body = ClassifyRequest.model_validate(checked)
        except ValidationError as error:
            raise Refused(422, "invalid", _told(error)) from error
        return [partial(bytes, await file.read()) for file in files], body.tasks, body.top_k


def _whole(text: Any) -> Any:
    """A field's text as a number, where it is one."""
    return int(text) if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 4 else text
