"""More pictures of the report: accuracy against cost, percent off over depth and module, base to new, ablations."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .compare_figures import INK, REST, SOFT, WIDTH, looks, ticks
from .figures import draw
from .report_means import ZERO, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Offsets in points at which a name is tried, nearest first.
_AROUND = [
    (x * step, y * step) for step in (7, 12, 20, 30, 42, 56, 72)
    for x, y in ((1, 0), (-1, 0), (0, 1.1), (0, -1.1), (1, 0.9), (1, -0.9), (-1, 0.9), (-1, -0.9))
]  # fmt: skip
_VIT = re.compile(r"(?:visual\.)?transformer\.resblocks\.(\d+)\.(?:attn\.|mlp\.)?(\w+?)(?:_weight|\.weight)")
_RESNET = re.compile(r"(?:visual\.)?(layer\d+\.\d+|attnpool)\.(\w+?)(?:\.\d+)?\.weight")
_STEM = re.compile(r"(?:visual\.)?(\w+)\.weight")
# From so many methods on their names need the room that a far lower zero-shot would take.
CROWDED = 9
MODULES = ("in_proj", "out_proj", "c_fc", "c_proj", "conv1", "conv2", "conv3", "downsample",
           "q_proj", "k_proj", "v_proj")  # fmt: skip


def cost(
    accuracies: Mapping[str, Point], panels: Mapping[str, Mapping[str, float | None]], titles: Mapping[str, str]
) -> str:
    """Accuracy against each of several costs, by name -> method -> cost. Costs of 0 stand left of the axis' start, a
    zero-shot that is far below many methods on the lower edge, with its number."""
    shown, bottom = looks(list(accuracies)), bottom_of(accuracies)
    titles = {m: f"{titles[m]}, {p.mean:.1f}" if p.mean < bottom else titles[m] for m, p in accuracies.items()}

    def paint(figure: "Figure") -> None:
        panes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        places: list[dict[str, tuple[float, float]]] = [{} for _ in panels]
        for axes, spots, (label, given) in zip(panes, places, panels.items()):
            # Zero-shot trains nothing: the microseconds that its fit takes would stretch the axis by decades.
            known = {m: 0.0 if m == ZERO else float(given[m]) for m in accuracies if given.get(m) is not None}
            paid = [value for value in known.values() if value > 0]
            least, most = (min(paid), max(paid)) if paid else (1.0, 10.0)
            spread = max(np.log10(most / least), 0.5)
            edge = 10 ** (np.log10(least) - 0.16 * spread)
            axes.set_xscale("log")
            axes.set(
                xlabel=label, xlim=(10 ** (np.log10(edge) - 0.08 * spread), 10 ** (np.log10(most) + 0.22 * spread))
            )
            axes.grid(color="#e3e7ea", lw=0.6)
            if len(paid) < len(known):
                axes.axvline(10 ** (np.log10(edge) + 0.08 * spread), color="#c3c9ce", lw=0.8, ls=(0, (2, 2)))
                axes.annotate("0", (edge, 0), (0, -4), ("data", "axes fraction"), "offset points", ha="center",
                              va="top", fontsize=9, color=SOFT, annotation_clip=False)  # fmt: skip
            # The axis has no zero: its ticks begin where something was paid.
            axes.xaxis.set_major_locator(_decades(least, most))
            axes.xaxis.set_major_formatter(lambda value, place: f"{value:,.10g}")
            axes.xaxis.set_minor_formatter(lambda value, place: "")
            for method, value in sorted(known.items(), key=lambda item: shown[item[0]].strong):
                look = shown[method]
                spots[method] = value if value > 0 else edge, max(accuracies[method].mean, bottom)
                size, face = (7, look.colour) if look.strong else (4.5, "white")
                axes.plot(*([c] for c in spots[method]), marker=look.marker, ms=size + 3 * (look.marker == "*"),
                          color=look.colour, mfc=face, ls="none", zorder=3)  # fmt: skip
        panes[0].set_ylabel("top-1 on the test images, %")
        figure.draw_without_rendering()
        for axes, spots in zip(panes, places):
            _names(axes, spots, titles, shown)

    return draw(paint, WIDTH, 5.2, paper=True)


def bottom_of(accuracies: Mapping[str, Point]) -> float:
    """The lowest accuracy that is drawn where it is: that of the lowest method, zero-shot left out if it is far below
    and there are many."""
    every = [p.mean for p in accuracies.values()]
    others = [p.mean for m, p in accuracies.items() if m != ZERO] or every
    room = max(every) - min(others)
    near = len(every) < CROWDED or min(every) >= min(others) - room
    return min(every) if near else min(others) - 0.1 * room


def _decades(least: float, most: float):
    from matplotlib.ticker import FixedLocator

    powers = range(int(np.ceil(np.log10(least) - 1e-9)), int(np.floor(np.log10(most) + 1e-9)) + 1)
    round_ones = [m * 10.0**p for p in range(powers.start - 1, powers.stop + 1) for m in (1, 2, 5)]
    near = [value for value in round_ones if least * 0.999 <= value <= most * 1.001]
    return FixedLocator([10.0**p for p in powers] if len(powers) > 1 else near or [least])


def _names(axes: "Axes", spots: Mapping[str, tuple[float, float]], titles: Mapping, shown: Mapping) -> None:
    """Names beside the dots, each where it covers no dot, no other name and not the frame, as near as can be."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    centres = axes.transData.transform(list(spots.values())).tolist()
    dots = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    frame, taken = axes.get_window_extent(), []
    for method in sorted(spots, key=lambda m: (not shown[m].strong, -spots[m][1])):
        strong = shown[method].strong
        label = axes.annotate(
            titles[method], spots[method], (0, 0), textcoords="offset points", zorder=4,
            fontsize=7.5 if strong else 6.5, color=INK if strong else SOFT, weight="bold" if strong else "normal",
            arrowprops={"arrowstyle": "-", "color": REST, "lw": 0.4, "shrinkA": 0, "shrinkB": 2},
        )  # fmt: skip
        label.set_in_layout(False)
        tried = []
        for dx, dy in _AROUND:
            _move(label, dx, dy)
            label.get_window_extent()  # an Annotation's own call moves it; its box would include the arrow
            box = Text.get_window_extent(label)
            covered = sum(box.overlaps(other) for other in (*taken, *dots))
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            tried.append((covered + 3 * (not inside), len(tried), dx, dy, box))
            if not tried[-1][0]:
                break
        *_, dx, dy, box = min(tried, key=lambda one: one[:2])
        _move(label, dx, dy)
        taken.append(box)


def _move(label, dx: float, dy: float) -> None:
    label.set_position((dx, dy))
    label.set(
        ha="left" if dx > 0 else "right" if dx < 0 else "center",
        va="bottom" if dy > 0 else "top" if dy < 0 else "center",
    )


def place(key: str) -> tuple[str, str]:
    """(depth, module) of a mask: `visual.transformer.resblocks.3.attn.in_proj_weight` -> ("3", "in_proj")."""
    if match := _VIT.fullmatch(key):
        return match[1], match[2]
    if match := _RESNET.fullmatch(key):
        return match[1], match[2]
    if match := _STEM.fullmatch(key):
        return "stem", match[1]
    return key, "other"


def depth(panels: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """A heat map for each panel, depth downwards, modules across. panels: title -> (key of the mask, percent off)."""
    tables = {title: {place(key): value for key, value in layers} for title, layers in panels.items()}
    rows = list(dict.fromkeys(row for table in tables.values() for row, _ in table))
    rows.sort(key=_deep)
    seen = list(dict.fromkeys(column for table in tables.values() for _, column in table))
    names = sorted(seen, key=lambda name: (MODULES.index(name) if name in MODULES else len(MODULES), name))
    top = max((value for table in tables.values() for value in table.values()), default=0.0) or 1.0
    # Inches of a panel: room for its cells, and for its title, which would run into the next one's.
    longest = max(len(line) for title in panels for line in title.split("\n"))
    each = max(1.4, 0.36 * len(names), 0.075 * longest)
    columns = max(1, min(len(panels), int((WIDTH - 1.6) / each)))
    lines = -(-len(panels) // columns)

    def paint(figure: "Figure") -> None:
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid[len(tables) :]:
            axes.axis("off")
        for i, (axes, (title, table)) in enumerate(zip(grid, tables.items())):
            shares = np.array([[table.get((row, name), np.nan) for name in names] for row in rows])
            shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
            axes.set_title(title, fontsize=8, color=INK)
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7)
            axes.set_yticks(range(len(rows)), rows if i % columns == 0 else [""] * len(rows), fontsize=7)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            for (y, x), value in np.ndenumerate(shares):
                if np.isfinite(value):
                    colour = "white" if value > 0.6 * top else INK
                    axes.text(x, y, f"{value:.0f}" if top >= 10 else f"{value:.1f}", ha="center", va="center",
                              fontsize=6.5, color=colour)  # fmt: skip
        bar = figure.colorbar(shown, ax=list(grid), shrink=0.6, pad=0.01, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("weights off, %")
        figure.supylabel("block", fontsize=8, color=SOFT)

    # Narrower ones would be enlarged: report.py's pages show no figure at less than 34rem.
    width = min(WIDTH, max(5.7, 1.6 + columns * each))
    titles = max(title.count("\n") for title in panels)
    return draw(paint, width, (0.65 + 0.13 * titles + 0.17 * len(rows)) * lines + 0.2, paper=True)


def _deep(row: str) -> tuple:
    group = 0 if row == "stem" else 2 if row == "attnpool" else 1
    return group, [int(number) for number in re.findall(r"\d+", row)], row


def halves(tables: Mapping[str, Mapping[str, Mapping[str, Point]]]) -> str:
    """Base, new and harmonic mean: zero-shot to tuned. tables: name -> "zero_shot" | "tuned" -> column -> Point."""
    names = list(tables)

    def paint(figure: "Figure") -> None:
        panes = figure.subplots(1, 3, sharey=True)
        for axes, column in zip(panes, ("base", "new", "harmonic mean")):
            for y, name in enumerate(names):
                before, after = tables[name]["zero_shot"][column], tables[name]["tuned"][column]
                arrow = {"arrowstyle": "-|>", "color": REST, "lw": 1, "shrinkA": 4, "shrinkB": 5}
                axes.annotate("", (after.mean, y), (before.mean, y), arrowprops=arrow)
                for point, look in ((before, looks([ZERO])[ZERO]), (after, looks(["ramt"])["ramt"])):
                    _bar(axes, point, y, look.colour, look.marker, 9 if look.marker == "*" else 7)
            axes.set(title=column, ylim=(len(names) - 0.4, -0.6), xlabel="top-1, %")
            axes.margins(x=0.12)
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#e3e7ea", lw=0.6)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(ticks(4))

    return draw(paint, WIDTH, 1.1 + 0.36 * len(names), paper=True)


def ablation(labels: Sequence[str], columns: Mapping[str, Sequence[Point | None]]) -> str:
    """A row for each variant in the order given, a panel for each number."""

    def paint(figure: "Figure") -> None:
        panes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for axes, (title, points) in zip(panes, columns.items()):
            for y, point in enumerate(points):
                if point is not None:
                    _bar(axes, point, y, "#0072B2", "o", 6)
                    axes.annotate(f"{point.mean:.2f}", (point.mean, y), (0, 6), textcoords="offset points",
                                  ha="center", fontsize=7, color=SOFT)  # fmt: skip
            axes.set(xlabel=title, ylim=(len(labels) - 0.4, -0.7))
            axes.margins(x=0.15)
            axes.set_yticks(range(len(labels)), labels)
            axes.tick_params(axis="y", length=0)
            axes.grid(color="#e9ecef", lw=0.6)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(ticks(4))

    return draw(paint, WIDTH, 0.8 + 0.34 * len(labels), paper=True)


def _bar(axes: "Axes", point: Point, y: float, colour: str, marker: str, size: float) -> None:
    if point.sd is not None:
        axes.plot([point.mean - point.sd, point.mean + point.sd], [y, y], color=colour, lw=1.6)
    axes.plot([point.mean], [y], marker=marker, ms=size, color=colour, ls="none", zorder=3)
