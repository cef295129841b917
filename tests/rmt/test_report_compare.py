import base64
import re
import statistics
import warnings

import numpy as np
import pytest
import report_tools as tools
from test_compare import task
from test_report import ELSEWHERE, images

from rmt import compare_figures, figures, table_figures
from rmt.cli import main
from rmt.config import UserError
from rmt.report_cells import Missing
from rmt.report_compare import report
from rmt.report_data import find
from rmt.report_means import Point, average, costs, per_panel, point, ranked, seeds

FEW = ("zeroshot", "tip_f", "lora", "ramt", "tip_f+ramt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two data sets, three numbers of shots, two seeds; in one of them LoRA has failed once."""
    top = tmp_path_factory.mktemp("compare")
    tools.compare(top / "a" / "pets", "pets", FEW, seeds=(1, 2))
    tools.compare(top / "dtd", "dtd", FEW, seeds=(1, 2), zero=44.0, lost=[("lora", 16, 2)], images=False)
    return top


@pytest.fixture(scope="module")
def page(two, tmp_path_factory):
    """The text of the page about both."""
    return report([two], tmp_path_factory.mktemp("page") / "r.html", "rmt report X").read_text()


def acc1(dataset, method, shots, seed, zero=60.0):
    return tools.cell(dataset, method, shots, seed, zero)["metrics"]["acc1"]


def test_cells_are_found_below_a_folder_and_means_are_those_of_the_files(two):
    found = find([two])
    assert len(found.cells) == 2 * 5 * 3 * 2 - 1 and {c.panel for c in found.cells} == {"pets", "dtd"}
    assert found.missing == [Missing("dtd", "lora", 16, 2, "RuntimeError: no memory")]
    curves = per_panel(seeds(found.cells))
    values = [acc1("pets", "ramt", 4, seed) for seed in (1, 2)]
    got = curves["pets"]["ramt"][4]
    assert got.n == 2 and got.mean == pytest.approx(sum(values) / 2)
    assert got.sd == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert curves["dtd"]["lora"][16] == Point(acc1("dtd", "lora", 16, 1, 44.0), None, 1)
    assert point([3.0]) == Point(3.0, None, 1)


def test_the_average_is_of_data_sets_and_seeds_that_have_every_method(two):
    cells = find([two]).cells
    mean, used = average(seeds(cells))
    assert used == {1: ["dtd", "pets"], 4: ["dtd", "pets"], 16: ["dtd", "pets"]}
    by_seed = [(acc1("pets", "ramt", 1, s) + acc1("dtd", "ramt", 1, s, 44.0)) / 2 for s in (1, 2)]
    assert mean["ramt"][1].mean == pytest.approx(statistics.fmean(by_seed))
    assert mean["ramt"][1].sd == pytest.approx(statistics.stdev(by_seed)) and mean["ramt"][1].n == 2
    # Seed 2 of LoRA is missing at 16: no method's average at 16 has it.
    assert mean["ramt"][16].n == mean["lora"][16].n == 1 and mean["zeroshot"][16] == Point(52.0, None, 1)
    without = [c for c in cells if (c.panel, c.method, c.shots) != ("dtd", "lora", 16)]
    assert list(average(seeds(without))[1]) == [1, 4]
    assert average(seeds([c for c in cells if c.panel == "pets"])) == ({}, {})
    assert ranked({"a": {1: Point(5.0, None, 1)}, "b": {1: Point(7.0, None, 1)}}) == ["b", "a"]


def test_recipes_that_were_cut_short_are_named(page):
    part = page[page.index("<h2>Recipes") : page.index("<h2>What is missing")]
    assert "Fewer than their authors take: LoRA, R-AMT, " in part and "<td>50</td>" in part and "<td>200</td>" in part
    assert "hand-written source" in part and "a note of R-AMT" in part


def test_costs_without_a_number_stay_without(two):
    cells = [c for c in find([two]).cells if c.panel == "pets" and c.shots == 16]
    assert costs(c for c in cells if c.method == "zeroshot")["peak_bytes"] is None
    assert costs(c for c in cells if c.method == "lora")["stored_bytes"] == 4 * 184_320


def test_the_page_has_every_section_and_needs_nothing_else(page):
    heads = re.findall("<h2>(.*?)</h2>", page)
    assert heads == [
        "Average over data sets", "The average in numbers", "Accuracy against shots", "Accuracy against cost", "dtd",
        "pets", "Where weights are off", "Overlap of task masks: R-AMT", "Worst classes of dtd",
        "Worst classes of pets", "Recipes", "What is missing",
    ]  # fmt: skip
    pets = page[page.index("<h2>pets</h2>") : page.index("<h2>Where")]
    values = {m: statistics.fmean(acc1("pets", m, 16, s) for s in (1, 2)) for m in FEW}
    order = sorted(values, key=values.get, reverse=True)
    best = re.search(rf"<b>{values[order[0]]:.2f} ± [\d.]+</b>", pets)
    second = re.search(rf"<td>{values[order[1]]:.2f} ± [\d.]+ †</td>", pets)
    assert best and second and best.start() < second.start()
    titles = [tools.cell("pets", m, 1, 1)["title"] for m in order]
    assert re.findall(r"<tr>\s*<td>(.*?)</td>", pets) == titles, "best first"
    for text in ("737 kB", "2 seeds", "(1)", "RuntimeError: no memory", "rmt report X", "abc123", "2.11.0", "b" * 64,
                 "the files of the masks are not beside", "2026-01-01T00:00:00+00:00 to 2026-01-02"):  # fmt: skip
        assert text in page, text
    assert not ELSEWHERE.search(page) and len(page) < 1e6
    for kind, data in images(page):
        assert b"<script" not in data and data.startswith({"svg+xml": b"<?xml", "jpeg": b"\xff\xd8"}[kind])


def test_names_are_escaped_and_examples_are_small_or_said_to_be_gone(page):
    assert "<b>bird" not in page and "<i>cow" not in page and "&lt;b&gt;bird&lt;/b&gt;, seen as &lt;i&gt;cow" in page
    thumbs = [data for kind, data in images(page) if kind == "jpeg"]
    assert len(thumbs) == 12 and max(map(len, thumbs)) < 10_000
    gone = page[page.index("Worst classes of dtd") : page.index("Worst classes of pets")]
    assert "No example is shown" in gone and "<img" not in gone


def test_tasks_beside_the_results_are_overlaid(tmp_path):
    for dataset, off in (("a", range(100)), ("b", range(60, 300))):
        out = tools.compare(tmp_path / dataset, dataset, ("zeroshot", "ramt"), (16,), (1,), images=False)
        task(out / "ramt" / "shots16-seed1" / "task", off).path.rename(
            out / "ramt" / "shots16-seed1" / "task" / "mask.safetensors"
        )
    page = report([tmp_path], tmp_path / "r.html").read_text()
    overlap = page[page.index("Overlap of task masks: R-AMT") : page.index("Worst classes of a")]
    assert "Not drawn" not in overlap and len(images(overlap)) == 1


def test_every_protocol_comes_to_one_page(tmp_path):
    tools.base_to_new(tmp_path / "b2n")
    tools.grid(tmp_path / "deep" / "er" / "grid")
    tools.ablation(tmp_path / "abl")
    page = report([tmp_path], tmp_path / "r.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Base to new", "Masks on grid", "Ablation: gdr"]
    for text in ("81.25 ± 0.50", "78.27", "seed4: boom", "76.00 ± 0.50", "70.30 ± 0.50", "2.70"):
        assert text in page, text
    assert len(images(page)) == 3


def test_a_bundle_is_the_same_as_its_folder_and_both_are_counted_once(two, tmp_path):
    cells = [tools.cell("pets", m, k, s) for m in FEW for k in (1, 4, 16) for s in (1, 2)]
    bundle = tools.write(tmp_path / "b.json", {"kind": "compare_bundle", "cells": cells, "command": "rmt compare all"})
    found, both = find([bundle]), find([bundle, two / "a"])
    assert per_panel(seeds(found.cells)) == per_panel(seeds(both.cells)) and len(both.cells) == len(cells)
    assert all(cell.folder for cell in both.cells), "the one with examples beside it"


def test_the_command_takes_a_bundle_and_the_page_is_the_same_every_time(tmp_path):
    cells = [tools.cell("pets", m, 16, 1) for m in ("zeroshot", "ramt")]
    bundle = tools.write(tmp_path / "b.json", {"kind": "compare_bundle", "cells": cells, "command": "rmt compare all"})
    pages = []
    for _ in range(2):
        assert main(["report", str(bundle), "-o", str(tmp_path / "c.html")]) == 0
        pages.append((tmp_path / "c.html").read_bytes())
    assert pages[0] == pages[1] and b"rmt compare all" in pages[0]


def test_what_cannot_stand_side_by_side_is_refused(tmp_path):
    one = tools.cell("pets", "ramt", 1, 1)

    def bundle(*cells):
        return tools.write(tmp_path / "b.json", {"kind": "compare_bundle", "cells": cells})

    with pytest.raises(UserError, match="ramt on pets, 1 shots, seed 1 is there twice with other numbers"):
        find([bundle(one, one | {"metrics": {"acc1": 1.0}})])
    with pytest.raises(UserError, match="lora and ramt on pets, 1 shots, seed 1 saw other training images"):
        find([bundle(tools.cell("pets", "lora", 1, 1), one | {"indices_sha256": "x"})])
    other = tools.cell("pets", "lora", 1, 1) | {"base_sha256": "c" * 64, "model": "RN50"}
    assert {c.panel for c in find([bundle(one, other)]).cells} == {"pets (ViT-B-16 bbbbbb)", "pets (RN50 cccccc)"}
    # A table that asks for what one of the models has is no gap.
    assert not find([bundle(one, one)]).missing


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metrics": {}}, "a cell has no accuracy"),
        ({"seed": None}, "seed of a cell is None"),
        ({"kind": "x"}, "kind 'x'"),
    ],
)
def test_damaged_cells_are_named(tmp_path, change, words):
    path = tools.write(tmp_path / "ramt" / "shots1-seed1" / "result.json", tools.cell("pets", "ramt", 1, 1) | change)
    with pytest.raises(UserError, match=words) as caught:
        report([tmp_path], tmp_path / "r.html")
    assert str(path) in str(caught.value) and not (tmp_path / "r.html").exists()


def test_other_damage_is_named(tmp_path):
    file = tmp_path / "x.json"
    for content, words in (
        ({"kind": "compare_bundle"}, "cells must be a list"),
        ({"kind": "ablation", "rows": [{"label": "a"}]}, "needs label and acc1.mean"),
        ({"kind": "compare_table", "missing": [{"method": "a"}]}, "list of missing cells"),
        ({"rows": [{"shots": 1, "zero_shot": {}, "seeds": []}]}, "a grid's row lacks"),
        ({"rows": {"tuned": {"base": {}}}, "seeds": {}}, "a base-to-new row lacks"),
    ):
        with pytest.raises(UserError, match=words):
            report([tools.write(file, content)], tmp_path / "r.html")
    file.write_text("[1]")
    with pytest.raises(UserError, match="expected an object, got list"):
        find([file])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"a report needs a finished run, but .*result.json is missing, and no folder"):
        find([tmp_path / "empty"])


def test_an_unfinished_cell_is_missing_but_a_fit_that_only_others_use_is_not(tmp_path):
    out = tools.compare(tmp_path, "pets", ("zeroshot", "tip_f+ramt"), (1,), (1, 2), images=False)
    (out / "lora" / "shots1-seed1").mkdir(parents=True)
    tools.write(out / "ramt" / "shots1-seed1" / "fit.json", {})
    (out / "tip_f+ramt" / "shots1-seed2" / "result.json").unlink()
    missing = {one[:4]: one.why for one in find([tmp_path]).missing}
    assert set(missing) == {("pets", "lora", 1, 1), ("pets", "tip_f+ramt", 1, 2)}
    assert "not finished" in missing["pets", "lora", 1, 1] and "not finished" in missing["pets", "tip_f+ramt", 1, 2]


def test_names_at_the_ends_of_lines_are_apart_and_in_order():
    values = [9.0, 8.9, 8.8, 5.0, 1.0, 0.9]
    placed = compare_figures.spaced(values, 1.0, 0.0, 10.0)
    assert min(-np.diff(placed)) >= 1.0 - 1e-9 and placed[3] == 5.0
    assert placed[1] == pytest.approx(8.9) and placed[-1] >= 0
    assert compare_figures.spaced([], 1.0, 0.0, 1.0) == []
    high = compare_figures.spaced([10.0, 10.0, 10.0], 1.0, 0.0, 10.0)
    assert high == pytest.approx([10.0, 9.0, 8.0])


def test_methods_with_masks_are_told_apart_without_colour():
    shown = compare_figures.looks(["lora+ramt", "amt", "zeroshot", "lora", "ramt", "tip"])
    strong = [look for look in shown.values() if look.strong]
    assert len(strong) == 4 and not shown["lora"].strong and not shown["tip"].strong
    assert len({look.marker for look in strong}) == len({str(look.line) for look in strong}) == 4
    assert shown["ramt"].colour == "#0072B2"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("visual.conv1.weight", ("stem", "conv1")),
        ("visual.transformer.resblocks.11.attn.in_proj_weight", ("11", "in_proj")),
        ("visual.transformer.resblocks.0.attn.out_proj.weight", ("0", "out_proj")),
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", ("0", "c_fc")),
        ("visual.layer3.5.conv2.weight", ("layer3.5", "conv2")),
        ("visual.layer3.0.downsample.0.weight", ("layer3.0", "downsample")),
        ("visual.attnpool.c_proj.weight", ("attnpool", "c_proj")),
        ("visual.trunk.what", ("visual.trunk.what", "other")),
    ],
)
def test_places_of_masks(key, expected):
    assert table_figures.place(key) == expected


def test_a_heat_map_of_vit_and_of_resnet_is_drawn_in_their_order():
    rows = ["layer10.0", "attnpool", "stem", "layer2.10", "layer2.9"]
    assert sorted(rows, key=table_figures._deep) == ["stem", "layer2.9", "layer2.10", "layer10.0", "attnpool"]
    uris = [
        table_figures.depth({"a": [("visual.conv1.weight", value), ("visual.layer1.0.conv1.weight", 2.0)]})
        for value in (0.0, 1.0)
    ]
    assert uris[0] != uris[1] and b"<svg" in base64.b64decode(uris[0].partition(",")[2])


def drawn(monkeypatch, module, *args):
    """The matplotlib figure of module.function(*args), laid out; a layout that fails is an error."""
    import matplotlib
    from matplotlib.figure import Figure

    found = []

    def draw(paint, width, height, **_):
        with matplotlib.rc_context(figures.STYLE | figures.PAPER), warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(Figure(figsize=(width, height), layout="constrained"))
            paint(found[0])
            found[0].draw_without_rendering()

    monkeypatch.setattr(table_figures, "draw", draw)
    module(*args)
    return found[0]


def test_titles_of_heat_maps_have_room_beside_one_another(monkeypatch):
    layers = [(f"visual.transformer.resblocks.{i}.attn.in_proj_weight", 5.0) for i in range(12)]
    titles = [f"a data set of number {i}\nR-AMT, spread start\n16 shots: 4.{i} %" for i in range(12)]
    figure = drawn(monkeypatch, table_figures.depth, dict.fromkeys(titles, layers))
    shown = [axes for axes in figure.axes if axes.get_title(loc="left")]
    boxes = [axes._left_title.get_window_extent() for axes in shown]
    assert len(boxes) == 12
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_ticks_of_costs_are_plain_numbers(monkeypatch):
    points, titles = {m: Point(v, 0.0, 3) for m, v in (("a", 50.0), ("b", 60.0))}, {"a": "A", "b": "B"}
    figure = drawn(monkeypatch, table_figures.cost, points, {"bytes": {"a": 9e3, "b": 2.2e7}}, titles)
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert {"10,000", "1,000,000"} <= set(ticks) and not [text for text in ticks if set(text) & set("$\\")]


@pytest.mark.parametrize("count, low", [(12, True), (3, False)])
def test_a_far_lower_zero_shot_takes_no_room_from_many_names(monkeypatch, count, low):
    """Among many methods it stands on the lower edge with its number; among few, where it is."""
    points = {f"m{i}": Point(60.0 + i, 0.0, 3) for i in range(count)} | {"zeroshot": Point(21.4, 0.0, 1)}
    paid = {m: 0.0 if m == "zeroshot" else 1e3 * 1.3**i for i, m in enumerate(points)}
    figure = drawn(monkeypatch, table_figures.cost, points, {"bytes": paid}, {m: m for m in points})
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.texts]
    assert ("zeroshot, 21.4" in names, "zeroshot" in names) == (low, not low)
    assert (axes.get_ylim()[0] > 50) == low
    star = next(line for line in axes.lines if line.get_marker() == "*")
    assert (star.get_ydata()[0] > 50) == low and axes.get_ylim()[0] < star.get_ydata()[0]
