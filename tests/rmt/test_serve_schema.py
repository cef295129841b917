"""The OpenAPI document: complete, and true of the server, as schemathesis finds it."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra rmt[serve]")
schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis, of rmt[test]")

from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks
from serve_tools import FakeBank

from rmt.serve.app import create_app
from rmt.serve.images import Limits
from rmt.serve.service import Options, Service

SERVICE = Service(FakeBank(), Options(limits=Limits(max_bytes=4000)), ("left", "right"))
SERVICE.bank.base = ("left", "right")
APP = create_app(SERVICE)


async def without_lifespan(scope, receive, send):
    """schemathesis may start and stop an application for every request: this one is started once, below."""
    if scope["type"] != "lifespan":
        await APP(scope, receive, send)
        return
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})


@pytest.fixture(scope="module", autouse=True)
def started():
    SERVICE.start()
    yield
    SERVICE.close()


SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", without_lifespan)
# What is valid by the document may still be no image, and no task that is there: 4xx with a reason, each declared.
CHECKS = [
    checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_schema_conformance, checks.response_headers_conformance, checks.negative_data_rejection,
    checks.unsupported_method, checks.missing_required_header,
]  # fmt: skip


@SCHEMA.parametrize()
@settings(
    max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_every_answer_is_as_the_document_says(case):
    case.call_and_validate(checks=CHECKS)
