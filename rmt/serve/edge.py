"""Around every request: how long a body may be, however it is sent; a stopping server's 503; what is counted."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from .refusals import Refused

if TYPE_CHECKING:
    from .service import Service

Message = MutableMapping[str, Any]
Receive, Send = Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]
CLASSIFY = "/v1/classify"
ALWAYS = ("/healthz", "/metrics")


class Edge:
    """ASGI middleware, the outermost.

    Args:
        reply: (Refused, close the connection) -> an ASGI response.
    """

    def __init__(self, app: Callable, service: "Service", reply: Callable[[Refused, bool], Callable]) -> None:
        self.app, self.service, self.reply = app, service, reply

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, status, start = self.service, 500, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refused = service.stopping and scope["path"] not in ALWAYS
        counted = not refused and scope["path"] not in ALWAYS
        service.in_flight += counted
        try:
            if refused:
                stopping = Refused(503, "stopping", "the server is stopping", retry_after=1)
                await self.reply(stopping, True)(scope, receive, watched)
            elif (length := _length(scope)) is not None and length > service.options.max_body:
                await self.reply(self._too_long(length), True)(scope, receive, watched)
            else:
                await self.app(scope, self._limited(receive), watched)
        finally:
            service.in_flight -= counted
            route = getattr(scope.get("route"), "path", scope["path"] if scope["path"] == CLASSIFY else "other")
            # A method is whatever a client writes: a label must not be.
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
            service.metrics.requests.add(method, route, str(status))
            if route == CLASSIFY:
                service.metrics.request.add(time.perf_counter() - start)

    def _limited(self, receive: Receive) -> Receive:
        got = 0

        async def limited() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            # What comes in chunks declares no length.
            if got > self.service.options.max_body:
                # FastAPI makes a 400 of whatever else is raised while it reads.
                raise HTTPException(413, str(self._too_long(got)), {"Connection": "close"})
            return message

        return limited

    def _too_long(self, length: int) -> Refused:
        self.service.metrics.rejected.add("body_bytes")
        limit = self.service.options.max_body
        return Refused(413, "body_bytes", f"a request must have at most {limit} bytes, got {length} or more")


def _length(scope: Message) -> int | None:
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(values[0]) if values and values[0].isdigit() else None
