"""The page of `rmt report` in headless Chromium: figures are there and not blank, on a phone, in the dark, on paper."""

import os
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of rmt[test]")

import report_tools as tools

from rmt.report_compare import report

CHROMIUM = Path(os.environ.get("RMT_CHROMIUM", "/usr/bin/chromium"))
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync"]  # fmt: skip
# Number of colours and share of pixels that are not of the commonest, of every image, drawn over white.
COLOURS = """async () => Promise.all([...document.images].map(async image => {
    await image.decode();
    const [width, height] = [image.naturalWidth, image.naturalHeight];
    const context = Object.assign(document.createElement("canvas"), {width, height}).getContext("2d");
    context.fillStyle = "white"; context.fillRect(0, 0, width, height); context.drawImage(image, 0, 0);
    const counts = new Map(), pixels = new Uint32Array(context.getImageData(0, 0, width, height).data.buffer);
    for (const pixel of pixels) counts.set(pixel, (counts.get(pixel) || 0) + 1);
    return {width, colours: counts.size, ink: 1 - Math.max(...counts.values()) / pixels.length, alt: image.alt};
}))"""
GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a page with everything on it."""
    top = tmp_path_factory.mktemp("page")
    methods = ("zeroshot", "linear_probe", "lora", "ramt", "tip+ramt")
    tools.compare(top / "pets", "pets", methods, (1, 16), (1, 2))
    tools.compare(top / "dtd", "dtd", methods, (1, 16), (1, 2), zero=44.0, lost=[("lora", 16, 2)])
    tools.base_to_new(top / "b2n")
    tools.grid(top / "grid")
    tools.ablation(top / "ablation")
    return report([top], top / "report.html", "rmt report " + "a_long_path/" * 20).as_uri()


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.is_file():
        pytest.skip(f"needs Chromium, and there is none at {CHROMIUM} (RMT_CHROMIUM names another)")
    with playwright.sync_playwright() as tool:
        found = tool.chromium.launch(executable_path=str(CHROMIUM), args=ARGS)
        yield found
        found.close()


def opened(browser, address, **options):
    """A page, what it asked for and what its console said."""
    page = browser.new_page(**options)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(address)
    return page, asked, said


def test_every_figure_is_there_and_not_blank_and_nothing_is_loaded(browser, address):
    page, asked, said = opened(browser, address, viewport={"width": 1100, "height": 900})
    shown = page.evaluate(COLOURS)
    # Ranking, over shots, cost, heat maps, base to new, grid, ablation; three worst classes of four images, twice.
    assert len(shown) == 7 + 24
    for image in shown:
        assert image["width"] > 0 and image["alt"]
        assert image["colours"] >= 16 and image["ink"] > 0.004, image
    assert page.evaluate("document.documentElement.scrollWidth") <= 1100
    assert [url for url in asked if not url.startswith("data:")] == [address] and said == []
    page.close()


def test_a_blank_figure_would_be_seen(browser, tmp_path):
    from rmt.figures import draw

    blank = draw(lambda figure: None, 2, 1, paper=True)
    (tmp_path / "blank.html").write_text(f'<img src="{blank}" alt="x">')
    page, *_ = opened(browser, (tmp_path / "blank.html").as_uri())
    (shown,) = page.evaluate(COLOURS)
    assert shown["colours"] < 16 and shown["ink"] <= 0.004
    page.close()


@pytest.mark.parametrize("width", [320, 400])
def test_it_fits_a_phone(browser, address, width):
    page, *_ = opened(browser, address, viewport={"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= width, (
        "wide tables and figures scroll by themselves"
    )
    assert page.evaluate("[...document.querySelectorAll('.paper')].some(e => e.scrollWidth > e.clientWidth)")
    page.close()


def test_dark_on_a_dark_screen_and_light_on_paper(browser, address):
    page, *_ = opened(browser, address, color_scheme="dark", viewport={"width": 1000, "height": 800})
    assert page.evaluate(GROUND) == "rgb(20, 25, 30)"
    ground = "getComputedStyle(document.querySelector('.paper img')).backgroundColor"
    assert page.evaluate(ground) == "rgb(255, 255, 255)", "ink on white in the dark too"
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate(GROUND) == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    kept = "[...document.querySelectorAll('figure')].every(e => getComputedStyle(e).breakInside === 'avoid')"
    assert page.evaluate(kept)
    page.close()
