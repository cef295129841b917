"""Pictures of `rmt compare`: accuracy over shots, against cost, and where masks are off. On white, for print too.

Methods with masks have a colour, a marker and a line style each (Okabe and Ito's colours); zero-shot is black and
dashed; all others are small and grey, with their names beside them.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .figures import draw
from .peers.names import MASKS, METHODS
from .report_cells import Shots
from .report_means import ZERO, Curves, Point, all_shots, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, REST = "#1c2733", "#5b6570", "#8a939c"
WIDTH = 9.8
# Inches of the wide panel for the names of its lines, and for its axis.
NAMES, AXIS = 1.95, 0.55


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line: object
    strong: bool


_STRONG = (
    ("#0072B2", "o", "-"), ("#D55E00", "s", (0, (5, 1.2))), ("#009E73", "^", (0, (3, 1, 1, 1))),
    ("#CC79A7", "D", (0, (1, 1))), ("#E69F00", "v", (0, (7, 1, 1, 1))), ("#56B4E9", "P", (0, (2, 2))),
)  # fmt: skip


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A look for each method; the same method has the same one wherever the same methods are shown."""
    masked = sorted((m for m in methods if set(m.split("+")) & set(MASKS)), key=rank)
    # R-AMT and AMT first, then what stands on R-AMT.
    found = {m: Look(*_STRONG[i], True) for i, m in enumerate(masked[: len(_STRONG)])}
    rest = Look(REST, "o", "-", False)
    return {m: Look(INK, "*", (0, (4, 3)), True) if m == ZERO else found.get(m, rest) for m in methods}


def rank(method: str) -> tuple:
    """Order of importance on the page: masks alone, R-AMT before the others, then what is combined with masks."""
    parts, order = method.split("+"), [*METHODS]
    places = [order.index(part) if part in order else len(order) for part in parts]
    return not set(parts) & set(MASKS), parts[-1] != "ramt" and len(parts) > 1, len(parts), places


def floor(curves: Curves, shown: Mapping[str, Look], shots: Sequence[Shots]) -> tuple[float, float]:
    """The range of accuracies that a panel shows: all of what is strong; of the rest what is not far below."""
    every = [(m, p) for m, points in curves.items() for k, p in points.items() if k in shots]
    strong = [p.mean - (p.sd or 0) for m, p in every if shown[m].strong] or [p.mean - (p.sd or 0) for _, p in every]
    top = max(p.mean + (p.sd or 0) for _, p in every)
    low = min(strong)
    room = max(top - low, 1.0)
    least = min(p.mean - (p.sd or 0) for _, p in every)
    bottom = max(least, low - 0.35 * room)
    return max(-0.5, bottom - 0.06 * room), min(100.5, top + 0.06 * room)


def ranking(curves: Curves, titles: Mapping[str, str]) -> str:
    """A panel for each number of shots: methods from best to worst at the largest, mean and deviation of each.

    A dot at the left edge with a number is a method far below the others.
    """
    shots, order, shown = all_shots(curves), ranked(curves), looks(list(curves))

    def paint(figure: "Figure") -> None:
        panels = figure.subplots(1, len(shots), sharey=True, squeeze=False)[0]
        for axes, k in zip(panels, shots):
            left, right = floor(curves, shown, [k])
            if k in curves.get(ZERO, ()):
                axes.axvline(curves[ZERO][k].mean, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
            for y, method in enumerate(order):
                if k in curves[method]:
                    _dot(axes, curves[method][k], y, shown[method], left, right)
            axes.set(title=shots_text(k), xlim=(left, right), ylim=(len(order) - 0.4, -0.6))
            axes.set_yticks(range(len(order)), [titles[m] for m in order])
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color="#d5dade", lw=0.6)
            axes.grid(axis="y", color="#eceff1", lw=0.6)
            axes.set_axisbelow(True)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_major_locator(ticks(4))
        for method, label in zip(order, panels[0].get_yticklabels()):
            label.set(color=INK if shown[method].strong else SOFT, weight="bold" if shown[method].strong else "normal")
        figure.supxlabel("top-1 on the test images, %", fontsize=9, color=SOFT)

    return draw(paint, WIDTH, 1.0 + 0.235 * len(order), paper=True)


def _dot(axes: "Axes", point: Point, y: float, look: Look, left: float, right: float) -> None:
    size = 6.5 if look.strong else 4.5
    if look.marker == "*":
        size = 9
    if point.mean < left:
        axes.plot([left], [y], marker="<", ms=5, color=look.colour, clip_on=False, ls="none")
        axes.text(left + 0.05 * (right - left), y, f"{point.mean:.1f}", va="center", fontsize=7, color=SOFT)
        return
    if point.sd is not None:
        axes.plot(
            [point.mean - point.sd, point.mean + point.sd], [y, y], color=look.colour, lw=1.6 if look.strong else 1
        )
    face = look.colour if look.strong else "white"
    axes.plot([point.mean], [y], marker=look.marker, ms=size, color=look.colour, mfc=face, ls="none", zorder=3)


def over_shots(panels: Mapping[str, Curves], titles: Mapping[str, str]) -> str:
    """Small multiples, accuracy against shots; the first, twice as wide, has the names at the ends of its lines.

    Bands are a sample deviation over the seeds; with one seed there is none.
    """
    every = [m for curves in panels.values() for m in curves]
    shown = looks(list(dict.fromkeys(every)))
    columns = min(3, len(panels) + 1)
    rows = -(-(len(panels) + 1) // columns)

    def paint(figure: "Figure") -> None:
        grid = figure.add_gridspec(rows, columns, height_ratios=[3.3, *[2.3] * (rows - 1)])
        for place, (name, curves) in enumerate(panels.items()):
            spot = grid[0, :2] if place == 0 else grid[divmod(place + 1, columns)]
            axes = figure.add_subplot(spot)
            shots = all_shots(curves)
            _lines(axes, curves, shown, shots)
            axes.set_title(name, color=INK, weight="bold" if place == 0 else "normal")
            axes.set_xticks(range(len(shots)), [str(k) for k in shots])
            low, high = floor(curves, shown, shots)
            last = len(shots) - 1
            # The names stand inside the wide panel, so that they take no room from the columns below.
            inch = (last + 0.24) / (WIDTH * min(2 / columns, 1) - NAMES - AXIS)
            right = last + (NAMES * inch if place == 0 else 0.12)
            axes.set(ylim=(low, high), xlim=(-0.12, right))
            axes.yaxis.set_major_locator(ticks(5))
            lines = [tick for tick in axes.get_yticks() if low <= tick <= high]
            axes.hlines(lines, -0.12, last + 0.12, color="#e3e7ea", lw=0.6, zorder=0)
            axes.spines["bottom"].set_bounds(-0.12, last + 0.12)
            if place == 0:
                _ends(axes, curves, shown, shots, titles, inch)
            if place == 0 or place + 1 >= len(panels) + 1 - columns:
                axes.set_xlabel("images a class", x=(last / 2 + 0.12) / (right + 0.12))
        figure.supylabel("top-1 on the test images, %", fontsize=9, color=SOFT)

    return draw(paint, WIDTH, 3.4 + 2.3 * (rows - 1), paper=True)


def _lines(axes: "Axes", curves: Curves, shown: Mapping[str, Look], shots: Sequence[Shots]) -> None:
    for method, points in sorted(curves.items(), key=lambda item: shown[item[0]].strong):
        look, x = shown[method], [i for i, k in enumerate(shots) if k in points]
        there = [points[shots[i]] for i in x]
        means = [p.mean for p in there]
        banded = [(i, p) for i, p in zip(x, there) if p.sd is not None]
        if look.strong and len(banded) == len(there):
            low, high = ([p.mean + sign * p.sd for p in there] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=look.colour, alpha=0.14, lw=0)
        marker = None if method == ZERO and len(x) > 1 else look.marker
        style = {"ms": 5, "lw": 1.7} if look.strong else {"ms": 2.6, "lw": 0.8, "alpha": 0.75}
        axes.plot(x, means, color=look.colour, marker=marker, ls=look.line, **style)


def _ends(
    axes: "Axes", curves: Curves, shown: Mapping[str, Look], shots: Sequence[Shots], titles: Mapping[str, str],
    inch: float,
) -> None:  # fmt: skip
    """Names at the right ends of the lines, moved apart where lines meet, with a thin line to the end.

    inch: along the axis, in the data's units.
    """
    low, high = axes.get_ylim()
    last = len(shots) - 1
    ends = {m: points[shots[-1]].mean for m, points in curves.items() if shots[-1] in points}
    ends = sorted(((y, m) for m, y in ends.items() if y >= low), reverse=True)
    gap = (high - low) / 19.5
    places = spaced([y for y, _ in ends], gap, low, high)
    for (y, method), at in zip(ends, places):
        look = shown[method]
        axes.plot([last + x * inch for x in (0.06, 0.26, 0.32)], [y, at, at], color=look.colour, lw=0.6, clip_on=False)
        axes.annotate(
            titles[method], (last + 0.4 * inch, at), va="center", fontsize=8 if look.strong else 7,
            annotation_clip=False, in_layout=False,
            color=INK if look.strong else SOFT, weight="bold" if look.strong else "normal",
        )  # fmt: skip
        if look.strong:
            axes.plot([last + 0.32 * inch], [at], marker=look.marker, ms=4, color=look.colour, clip_on=False)


def spaced(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Falling values moved as little as it takes for neighbours to be `gap` apart and all to be in the range."""
    groups: list[tuple[float, int]] = []  # centre and number of those that touch
    for value in values:
        groups.append((min(value, high), 1))
        while len(groups) > 1:
            (above, n), (below, m) = groups[-2:]
            if above - (n - 1) * gap / 2 - gap >= below + (m - 1) * gap / 2 - 1e-9:
                break
            groups[-2:] = [((above * n + below * m) / (n + m), n + m)]
    placed = [centre + (n - 1) * gap / 2 - i * gap for centre, n in groups for i in range(n)]
    if placed:
        move = min(0.0, high - placed[0]) or max(0.0, low - placed[-1])
        placed = [value + move for value in placed]
    return placed


def shots_text(k: Shots) -> str:
    """As a heading."""
    return "all images" if k == "all" else f"{k} shot{'s' if k != 1 else ''}"


def ticks(count: int):
    """A locator of about so many round numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, steps=[1, 2, 5, 10])
