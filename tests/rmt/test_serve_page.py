"""The page at / in headless Chromium: what a person does, and what it then shows."""

import contextlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra rmt[serve]")
pytest.importorskip("uvicorn", reason="needs the extra rmt[serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of rmt[test]")

import numpy as np
from PIL import Image
from serve_tools import CLASSES, FakeBank, png

CHROMIUM = Path(os.environ.get("RMT_CHROMIUM", "/usr/bin/chromium"))
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def address():
    """Of a server over the fake bank, in a thread."""
    import uvicorn

    from rmt.serve.app import create_app
    from rmt.serve.service import Options, Service

    server = uvicorn.Server(uvicorn.Config(create_app(Service(FakeBank(), Options())), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.is_file():
        pytest.skip(f"needs Chromium, and there is none at {CHROMIUM} (RMT_CHROMIUM names another)")
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield found
        found.close()


def until(done, seconds=20):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"


@contextlib.contextmanager
def opened(browser, address, **options):
    """A page; what its console says is an error, or what it loads from elsewhere, fails the test."""
    page = browser.new_page(**options)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#tasks tr")
    yield page, said
    page.close()
    assert said == []
    assert all(url.startswith((address, "blob:", "data:")) for url in asked), asked


def shades(page, path) -> int:
    """How many colours a screenshot has."""
    page.screenshot(path=path, full_page=True)
    return len(np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_image_is_answered_by_every_task(browser, address, scheme, tmp_path):
    with opened(browser, address, color_scheme=scheme, viewport={"width": 1000, "height": 800}) as (page, _):
        assert page.locator("#tasks tr").count() == len(CLASSES) and "3 tasks" in page.locator("#count").inner_text()
        page.set_input_files("#file", {"name": "red.png", "mimeType": "image/png", "buffer": png(size=(300, 200))})
        page.wait_for_selector(".card")
        assert page.locator(".card h2").all_inner_texts() == list(CLASSES)
        for i, names in enumerate(CLASSES.values()):
            card = page.locator(".card").nth(i)
            assert card.locator("li").count() == min(5, len(names))
            assert card.locator(".first b").inner_text() == card.locator("li span").first.inner_text() in names
            widths = [bar.bounding_box()["width"] for bar in card.locator("li rect").all()]
            assert widths == sorted(widths, reverse=True) and widths[0] > 20
        assert "3 tasks answered" in page.locator("#state").inner_text()
        assert page.locator("#preview").is_visible() and not page.locator("#error").is_visible()
        assert shades(page, os.environ.get("RMT_SCREENSHOT", str(tmp_path)) + f"/{scheme}.png") > 30
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 23)"
        assert dark == (scheme == "dark")


def test_an_error_shows_its_reason_and_a_better_image_clears_it(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"no image at all"})
    page.wait_for_selector("#error:visible")
    assert "JPEG, PNG" in page.locator("#error").inner_text() and page.locator(".card").count() == 0
    page.set_input_files("#file", {"name": "b.png", "mimeType": "image/png", "buffer": png()})
    page.wait_for_selector(".card")
    assert not page.locator("#error").is_visible()
    page.close()


def test_it_works_by_keyboard_and_by_dropping_and_on_a_phone(browser, address, tmp_path):
    with opened(browser, address, viewport={"width": 360, "height": 700}) as (page, _):
        # From the start: Playwright tells Chromium to hand over file choosers without waiting for its answer.
        choosers = []
        page.on("filechooser", lambda chooser: choosers.append(chooser))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        page.keyboard.press("Enter")
        until(lambda: choosers or page.wait_for_timeout(50))
        choosers[0].set_files({"name": "red.png", "mimeType": "image/png", "buffer": png()})
        page.wait_for_selector(".card")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is wider than the phone"
        page.evaluate("document.getElementById('answers').replaceChildren()")
        page.evaluate(
            """async () => {
                const canvas = Object.assign(document.createElement("canvas"), {width: 20, height: 20});
                const blob = await new Promise(done => canvas.toBlob(done));
                const data = new DataTransfer();
                data.items.add(new File([blob], "drawn.png", {type: "image/png"}));
                document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
            }"""
        )
        page.wait_for_selector(".card")
        assert page.locator("#preview").get_attribute("alt") == "The image: drawn.png"
        shades(page, os.environ.get("RMT_SCREENSHOT", str(tmp_path)) + "/phone.png")


def test_the_policy_lets_nothing_else_in(browser, address):
    page = browser.new_page()
    response = page.goto(address)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    ran = page.evaluate(
        """() => { const s = document.createElement("script"); s.textContent = "window.hacked = 1";
                   document.body.append(s); return window.hacked === 1; }"""
    )
    assert not ran
    page.close()
