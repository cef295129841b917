"""The report's pictures: matplotlib figures as `data:` URIs, on no background, in colours that suit light and dark."""

import base64
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

import rmt_kernels as rk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, PALETTE = "#808080", ("#3a7ebf", "#d9822b", "#4a9e6b", "#a05fb0")
STYLE = {
    "font.size": 9, "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.titlecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9, "axes.titlelocation": "left", "legend.frameon": False, "svg.hashsalt": "rmt",
    "text.parse_math": False,  # a class may be called "$5 note"; log axes need a formatter of their own
}  # fmt: skip
# For pictures that bring their own white ground: full contrast on a dark page and on paper.
PAPER = {key: "#5b6570" for key, value in STYLE.items() if value == GREY} | {
    "text.color": "#1c2733", "axes.titlecolor": "#1c2733", "axes.edgecolor": "#9aa3ab", "savefig.facecolor": "white",
}  # fmt: skip
# Cells along a mask's longer side: 96 are still told apart at the printed size.
CELLS = 96


def draw(paint: Callable[["Figure"], None], width: float, height: float, kind: str = "svg", paper: bool = False) -> str:
    """The URI of what `paint` draws on a figure of this size in inches. Letters become paths: no font is needed.

    paper: on a white ground of its own, in ink; otherwise on none, in colours that suit light and dark.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE | PAPER if paper else STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure)
        file = BytesIO()
        dated = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, format=kind, transparent=not paper, dpi=160, metadata=dated)
    mime = {"svg": "image/svg+xml", "png": "image/png"}[kind]
    return f"data:{mime};base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """Both losses, accuracy on the batch, percent off and flips over the steps, of one run or of several.

    runs: name -> rows of metrics.jsonl.
    """
    panels = {
        "task loss": "task", "general loss": "general", "accuracy on the batch, %": "batch_acc1",
        "weights off, %": "percent_off", "flips since the row before": "flips",
    }  # fmt: skip

    def paint(figure: "Figure") -> None:
        for axes, (title, key) in zip(figure.subplots(1, len(panels)), panels.items()):
            for (name, rows), colour in zip(runs.items(), PALETTE):
                axes.plot([r["step"] for r in rows], [r[key] for r in rows], color=colour, lw=1.4, label=name)
            axes.set(title=title, xlabel="step")
            axes.grid(color=GREY, alpha=0.2, lw=0.5)
        if len(runs) > 1:
            axes.legend(fontsize=8)

    return draw(paint, 12, 2.5)


def layers(per_layer: Sequence[tuple[str, int, int]]) -> str:
    """A bar of percent off for every mask: (key, off, total)."""
    shares = [100 * off / total for _, off, total in per_layer]

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.barh([short(key) for key, *_ in per_layer], shares, color=PALETTE[0], height=0.65)
        axes.bar_label(axes.containers[0], fmt="%.1f", padding=3, fontsize=8, color=GREY)
        axes.invert_yaxis()
        axes.set(xlabel="weights off, %")

    return draw(paint, 6, 0.7 + 0.24 * len(per_layer))


def masks(bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Every mask as a picture. bits: key -> (N, ceil(K / 32)) int32; shapes: key -> (N, K)."""
    shares = {key: off_share(rk.unpack_bits(bits[key].cpu(), shapes[key][1]).numpy()) for key in bits}
    top = max(float(np.max(share)) for share in shares.values()) or 1.0
    columns = min(6, len(shares))
    rows = -(-len(shares) // columns)

    def paint(figure: "Figure") -> None:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, (key, share) in zip(grid, shares.items()):
            # On from white, off to dark blue: the picture brings its own ground and needs none of the page.
            shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
            axes.set_title(f"{short(key)}\n{shapes[key][0]} x {shapes[key][1]}", fontsize=7)
        bar = figure.colorbar(shown, ax=figure.axes, shrink=0.7, pad=0.01, format=lambda v, _: f"{100 * v:.0f} %")
        bar.outline.set_visible(False)
        bar.set_label("off")

    return draw(paint, 12, 2.1 * rows, "png")


def off_share(on: np.ndarray) -> np.ndarray:
    """(N, K) bool -> share of weights that are off in each of at most CELLS x CELLS cells, all weights counted once."""
    n, k = on.shape
    size = -(-max(n, k) // CELLS)
    off = np.pad(~on, ((0, -n % size), (0, -k % size))).reshape(-(-n // size), size, -(-k // size), size).sum((1, 3))
    real = np.pad(np.ones_like(on), ((0, -n % size), (0, -k % size))).reshape(-(-n // size), size, -(-k // size), size)
    return off / real.sum((1, 3))


def confusion(counts: Sequence[Sequence[int]], classnames: Sequence[str]) -> str:
    """Rows: true class; columns: predicted; the shade is the share of the row."""
    table = np.asarray(counts)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    few = len(table) <= 20

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.spines[:].set_visible(False)
        axes.set(xlabel="predicted", ylabel="true")
        axes.tick_params(length=0)
        if few:
            axes.set_xticks(range(len(table)), classnames, rotation=45, ha="right")
            axes.set_yticks(range(len(table)), classnames)
            for (i, j), count in np.ndenumerate(table):
                colour = "white" if share[i, j] > 0.5 else "#1c2733"
                axes.text(j, i, count or "", ha="center", va="center", fontsize=7, color=colour)

    side = min(9, 1.6 + 0.36 * len(table))
    return draw(paint, side, side)


def overlap(names: Sequence[str], jaccard: Sequence[Sequence], lift: Sequence[Sequence]) -> str:
    """Two (T, T) tables as shades with their numbers: shades of one hue, told apart in print and by anyone's eyes."""
    import matplotlib

    # The page may be dark: the diagonal and what has no number bring a ground of their own.
    shades = matplotlib.colormaps["Blues"].with_extremes(bad="#e6e9ec")
    panels = {"off in both / off in any": (jaccard, "{:.2f}"), "off in both / so many by chance": (lift, "{:.1f}")}

    def paint(figure: "Figure") -> None:
        for axes, (title, (table, form)) in zip(figure.subplots(1, 2), panels.items()):
            shown = np.array([[np.nan if value is None else value for value in row] for row in table], dtype=float)
            np.fill_diagonal(shown, np.nan)
            # Lifts are ratios: their logarithm is what looks even.
            shade = np.log1p(shown) if table is lift else shown
            top = np.nanmax(shade) if np.isfinite(shade).any() else 1.0
            axes.imshow(shade, cmap=shades, vmin=0, vmax=top or 1.0)
            axes.spines[:].set_visible(False)
            axes.set(title=title)
            axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
            axes.set_yticks(range(len(names)), names)
            axes.tick_params(length=0)
            for (i, j), value in np.ndenumerate(shown):
                if np.isfinite(value):
                    colour = "white" if shade[i, j] > 0.55 * top else "#1c2733"
                    axes.text(j, i, form.format(value), ha="center", va="center", fontsize=8, color=colour)

    side = min(9, 2.0 + 0.5 * len(names))
    return draw(paint, 2.1 * side, side)


def examples(images: Sequence[np.ndarray], titles: Sequence[str], right: Sequence[bool]) -> str:
    """A row of pictures, (H, W, 3) uint8 each, with what was predicted; wrong ones in orange."""
    columns = min(10, len(images))
    rows = -(-len(images) // columns)

    def paint(figure: "Figure") -> None:
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid:
            axes.axis("off")
        for axes, image, title, good in zip(grid, images, titles, right):
            axes.imshow(image)
            axes.set_title(title, fontsize=7, color=GREY if good else PALETTE[1])

    return draw(paint, 12, 1.65 * rows, "png")


def short(key: str) -> str:
    """A mask's name without what all of them share."""
    for long, brief in (("visual.", ""), ("transformer.resblocks.", "block "), (".attn.", " "), ("_weight", "")):
        key = key.replace(long, brief)
    return key.removesuffix(".weight")
