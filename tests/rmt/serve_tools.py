"""A small bank with `rmt.TaskBank`'s interface, and the server's application over it, for the tests of `rmt serve`."""

import asyncio
import io
import threading
from contextlib import asynccontextmanager

import torch
from PIL import Image

from rmt import UserError
from rmt.serve.service import Options, Service

CLASSES = {
    "pets": ("cat", "dog", "bird"),
    "colours": ("red", "green", "blue", "grey", "black", "white"),
    "signs": ("stop", "go"),
}


class FakeBank:
    """Probabilities are a function of the image's mean and the task's name. calls: the names of every forward.

    gate: forwards wait for it. broken: called with (x, names) before each.
    """

    def __init__(self, classes=None):
        self.classes = dict(CLASSES if classes is None else classes)
        self.calls, self.gate, self.broken, self.base = [], threading.Event(), None, None
        self.gate.set()
        self.entered = threading.Event()

    @property
    def tasks(self):
        return tuple(self.classes)

    def info(self, name):
        if name not in self.classes:
            raise UserError(f"there is no task {name!r}")
        names = self.classes[name]
        return {"name": name, "classnames": names, "template": "a {}.", "bytes": 100, "off": 5, "weights": 200,
                "percent_off": 2.5, "path": "/secret/place"}  # fmt: skip

    def add(self, name, task, *, replace=False, allow_base_mismatch=False):
        assert replace or name not in self.classes
        self.classes[name] = tuple(task.classnames)

    def remove(self, name):
        del self.classes[name]

    def preprocess(self, image):
        assert image.mode == "RGB"
        pixels = torch.frombuffer(bytearray(image.resize((8, 8)).tobytes()), dtype=torch.uint8)
        return pixels.view(8, 8, 3).permute(2, 0, 1).float() / 255

    def probabilities(self, x, adapter_names):
        self.calls.append(tuple(adapter_names))
        self.entered.set()
        assert self.gate.wait(20)
        out = [self.expected(row, name) for row, name in zip(x, adapter_names)]
        if self.broken:
            out = self.broken(x, adapter_names, out)
        return out

    def expected(self, row, name):
        count = len(self.base if name == "__base__" else self.classes[name])
        return (row.mean() * 7 * torch.arange(1, count + 1) + len(name)).sin().softmax(-1)


def png(colour=(200, 40, 40), size=(40, 36), mode="RGB", kind="PNG", **options) -> bytes:
    """An image file of one colour."""
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, kind, **options)
    return data.getvalue()


@asynccontextmanager
async def client(bank=None, **options):
    """An httpx client of an application over the bank, in this process, started and closed. `client.service`."""
    import httpx

    from rmt.serve.app import create_app

    base = options.pop("base", None)
    bank = bank or FakeBank()
    if base:
        bank.base = base
    service = Service(bank, Options(**options), base)
    app = create_app(service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as found,
    ):
        found.service, found.app = service, app
        yield found


def run(main):
    """Runs a test's coroutine, for at most 30 seconds."""
    return asyncio.run(asyncio.wait_for(main, 30))


async def classify(http, *images, tasks=(), **fields):
    """A form with these images and tasks."""
    files = [("images", (f"{i}.png", image)) for i, image in enumerate(images or [png()])]
    return await http.post("/v1/classify", files=files, data={"tasks": list(tasks), **fields})


async def until(condition):
    """Waits for a condition that another thread or task makes true."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen within 10 seconds")
