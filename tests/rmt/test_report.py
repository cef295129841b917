import base64
import json
import re

import numpy as np
import pytest
import tiny
import torch
from test_compare import task

import rmt_kernels as rk
from rmt import figures
from rmt.cli import main
from rmt.compare_tasks import diff
from rmt.config import RunConfig, TrainConfig, UserError
from rmt.report import Figure, Section, Table, report_run, report_tasks, write_report
from rmt.run import run

ELSEWHERE = re.compile(r'(?:src|href|action|srcset)="(?!data:)|url\(|@import|<script|<link|<iframe')


def images(page):
    """(kind, decoded bytes) of every figure of the page."""
    found = re.findall(r'<img src="data:image/([a-z+]+);base64,([^"]+)"', page)
    return [(kind, base64.b64decode(data)) for kind, data in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run."""
    root = tmp_path_factory.mktemp("report")
    config = RunConfig(
        model=tiny.model_folder(root / "model"), data=str(tiny.splits(root / "data")), shots=4,
        train=TrainConfig(lr=2e-3, steps=6, batch=8, log_every=2),
    )  # fmt: skip
    run(config, root / "run")
    return root / "run"


def test_a_runs_page_has_its_numbers_and_figures_and_needs_nothing_else(folder, tmp_path):
    page = report_run(folder, tmp_path / "new" / "report.html", "rmt report RUN").read_text()
    result = json.loads((folder / "result.json").read_text())
    for value in (result["metrics"]["acc1"], result["zero_shot"]["acc1"], result["percent_off"]):
        assert f"{value:.2f}" in page
    for text in (result["bits_sha256"], result["base_sha256"], result["environment"]["torch"], "rmt report RUN"):
        assert text in page
    kinds = [kind for kind, _ in images(page)]
    assert kinds == ["svg+xml", "png", "svg+xml", "svg+xml"], "curves, masks, layers, confusion"
    assert all(data.startswith(b"\x89PNG") if kind == "png" else b"<svg" in data for kind, data in images(page))
    assert not ELSEWHERE.search(page) and page.count("<img") == 4
    for _, data in images(page):
        assert b"<script" not in data and not re.search(rb'href="(?!#|data:)', data)


def test_the_page_is_the_same_every_time(folder, tmp_path):
    first, again = (report_run(folder, tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == again


def test_every_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    section = Section(evil, evil, Table((evil,), [(evil,)]), [Figure("data:image/png;base64,AA==", evil + '"')])
    page = write_report(tmp_path / "r.html", evil, evil, [section], {evil: evil}).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 11


def test_off_share_counts_every_weight_once():
    on = np.random.default_rng(0).random((200, 130)) < 0.7
    share = figures.off_share(on)
    assert share.shape == (67, 44)  # cells of 3 x 3 weights
    assert np.isclose(share[0, 0], 1 - on[:3, :3].mean()) and np.isclose(share[-1, -1], 1 - on[198:, 129:].mean())
    assert np.array_equal(figures.off_share(on[:50, :90]), ~on[:50, :90])


def test_masks_of_any_number_and_shape_can_be_drawn():
    shapes = {f"visual.transformer.resblocks.{i}.attn.in_proj_weight": (3 + i, 40) for i in range(7)}
    bits = {key: rk.pack_bits(torch.ones(shape, dtype=torch.bool)) for key, shape in shapes.items()}
    assert figures.masks(bits, shapes).startswith("data:image/png;base64,")
    assert figures.short("visual.transformer.resblocks.3.attn.in_proj_weight") == "block 3 in_proj"
    assert figures.short("visual.conv1.weight") == "conv1"


def test_a_run_that_is_not_finished_or_is_damaged_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"a report needs a finished run, but .*result.json is missing"):
        report_run(tmp_path, tmp_path / "r.html")
    (tmp_path / "result.json").write_text((folder / "result.json").read_text()[:50])
    with pytest.raises(UserError, match=r"result.json is damaged"):
        report_run(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def inked(svg):
    """How many shapes are drawn: a blank figure has its two grounds and no more."""
    return len(re.findall(rb"<(?:path|image|use)", svg))


def test_several_tasks_are_one_page_with_their_overlap(folder, tmp_path):
    others = [task(tmp_path / name, off) for name, off in (("cats", range(100)), ("dogs", range(60, 300)))]
    task(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="must be of one base model"):
        report_tasks([folder, tmp_path / "other"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    page = report_tasks([t.path.parent for t in others], tmp_path / "r.html", "rmt report A B").read_text()
    (kind, svg), *rest = images(page)
    assert kind == "svg+xml" and not rest and inked(svg) > 20
    # Letters become paths: numbers are looked for where they are text, in the tables.
    assert f"{40 / 300:.3f}" in page and f"{40 * 12288 / 24000:.2f}" in page and "Layer by layer" in page
    assert others[0].bits_sha256 in page and "rmt report A B" in page and "one-sided" in page
    assert not ELSEWHERE.search(page)
    three = [*others, task(tmp_path / "birds", range(250, 400))]
    page = report_tasks([t.path.parent for t in three], tmp_path / "r.html").read_text()
    assert "Layer by layer" not in page and inked(images(page)[0][1]) > inked(svg)
    assert page.count("<td>birds</td>") == 2 and f"{diff(*three[1:])[-1]['log10_p']:.1f}" in page


def test_runs_bring_their_own_sections_and_a_task_alone_its_masks(folder, tmp_path):
    page = report_tasks([folder, folder / "task"], tmp_path / "r.html").read_text()
    kinds = [kind for kind, _ in images(page)]
    assert kinds == ["svg+xml", "svg+xml", "png", "svg+xml", "svg+xml"], "overlap, then the run's own"
    accuracy = json.loads((folder / "result.json").read_text())["metrics"]["acc1"]
    assert f"<td>{accuracy:.2f}</td>" in page and "run (1): confusion matrix" in page and "<td>run (2)</td>" in page
    assert [kind for kind, _ in images(report_tasks([folder / "task"], tmp_path / "t.html").read_text())] == ["png"]
    one = report_tasks([folder], tmp_path / "one.html", "x").read_bytes()
    assert one == report_run(folder, tmp_path / "two.html", "x").read_bytes()


def test_the_overlap_is_drawn_in_shades_of_one_hue_with_its_numbers():
    pixels = {}
    for name, lift in (("high", 30.0), ("low", 0.0)):
        table = [[None, lift, 1.0], [lift, None, None], [1.0, None, None]]
        jaccard = [[1.0, 0.5, 0.0], [0.5, 1.0, None], [0.0, None, 1.0]]
        pixels[name] = base64.b64decode(figures.overlap(["a", "b", "<c>"], jaccard, table).partition(",")[2])
        assert inked(pixels[name]) > 20 and b"<c>" not in pixels[name]
    assert pixels["high"] != pixels["low"]


def test_the_command_takes_several(folder, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert main(["report", str(folder), str(folder / "task"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out and "rmt report " in out.read_text()
    assert main(["report", str(folder), str(tmp_path / "none"), "--out", str(tmp_path / "no.html")]) == 2
    assert not (tmp_path / "no.html").exists()


def test_dollars_in_a_name_are_letters():
    """Matplotlib would read what stands between two of them as a formula, and most names are no valid one."""
    names = ["$5_$10 note", "from $1 to $2"]
    assert figures.confusion([[1, 2], [3, 4]], names).startswith("data:")
    table = [[1, 0.5], [0.5, 1]]
    assert figures.overlap(["run$a_$1", "b"], table, table).startswith("data:")
