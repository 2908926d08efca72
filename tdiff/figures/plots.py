"""The pictures of a run: the learned tree, samples of every leaf, one root draw, samples side by side, losses.

Every function takes arrays and returns a Figure, which `save` turns into PNG bytes: the same arrays give the
same bytes. Images are float [.., I, H, H] in [0, 1], grey (1 is white, as in the data) or RGB. Nothing here
touches pyplot, so any thread may draw.

A picture is laid out on a `Sheet`, whose unit is the inch and whose y grows downwards, like reading.

Legend: L leaves, K images, I channels, H image size, C classes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Outline
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from tdiff.tree.topology import Topology

DPI = 150
INK, MUTED, RULE, BAND, ACCENT = "#1b2430", "#66717f", "#d5dbe2", "#d3dfe6", "#14748c"
COLOURS = ("#14748c", "#d9722e", "#6a5a9e", "#4f8f46", "#b8405e", "#8c6d2f", "#3f6fb5", "#7a7f87")
MARGIN = 0.35


class Sheet:
    """A white page of `width` x `height` inches, origin at the top left, on which everything is placed by hand."""

    def __init__(self, width: float, height: float):
        self.figure = _figure(width, height)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.size = width, height
        self._limits()

    def _limits(self) -> None:
        self.axes.set_xlim(0, self.size[0])
        self.axes.set_ylim(self.size[1], 0)

    def image(self, left: float, top: float, size: float, image: ArrayLike) -> None:
        """One image, `size` inches wide, with a hairline that holds light images off the page."""
        pixels = rgb(image)
        height = size * pixels.shape[0] / pixels.shape[1]
        self.axes.imshow(pixels, extent=(left, left + size, top + height, top), aspect="auto", zorder=2)
        self._limits()
        self.box(left, top, size, height, edgecolor=RULE, facecolor="none", linewidth=0.5, zorder=3)

    def images(self, left: float, top: float, width: float, images: ArrayLike, columns: int, gap: float) -> float:
        """Images [K, I, H, H] in rows, `columns` filling `width`; returns the y below them."""
        stack = np.asarray(images)
        step = (width + gap) / columns
        for k, image in enumerate(stack):
            self.image(left + k % columns * step, top + k // columns * step, step - gap, image)
        return top + math.ceil(len(stack) / columns) * step - gap

    def box(self, left: float, top: float, width: float, height: float, **style: Any) -> None:
        """A rectangle."""
        self.axes.add_patch(Rectangle((left, top), width, height, **style))

    def text(self, x: float, y: float, text: str, size: float = 8, colour: str = INK, **style: Any) -> None:
        """Text centred on (x, y), unless `style` aligns it otherwise."""
        style = {"ha": "center", "va": "center", "zorder": 4, **style}
        self.axes.text(x, y, text, fontsize=size, color=colour, fontfamily="DejaVu Sans", **style)

    def title(self, text: str, left: float = MARGIN) -> None:
        """The headline, at the top left."""
        self.text(left, MARGIN, text, 12, fontweight="bold", ha="left", va="top")

    def branch(self, start: tuple[float, float], bend: float, end: tuple[float, float], points: float) -> None:
        """A soft S from `start` down to the height `bend`, then straight down to `end`."""
        (x0, y0), (x1, y1) = start, end
        middle = (y0 + bend) / 2
        path = Outline(
            [(x0, y0), (x0, middle), (x1, middle), (x1, bend), (x1, y1)],
            [Outline.MOVETO, Outline.CURVE4, Outline.CURVE4, Outline.CURVE4, Outline.LINETO],
        )
        style: dict[str, Any] = {"capstyle": "butt", "joinstyle": "round"}
        self.axes.add_patch(PathPatch(path, facecolor="none", edgecolor=BAND, linewidth=points, zorder=1, **style))


# --- the tree ------------------------------------------------------------------------------------


def tree_picture(
    topology: Topology,
    averages: Mapping[int, ArrayLike],
    examples: Mapping[int, ArrayLike],
    shares: Mapping[int, float],
    title: str,
) -> Figure:
    """The learned tree from the root down, leaves along the bottom, a branch as thick as its share of the samples.

    By node id: `averages` [I, H, H] is drawn large, `examples` [K, I, H, H] as a strip below it (inner nodes:
    the first 4; leaves: the first 12, in rows), `shares` in [0, 1] beside it. A node may lack images.
    """
    leaves = topology.leaves
    slot = max(60 / len(leaves), 0.3) if len(leaves) > 48 else min(1.8, max(1.3, 9 / len(leaves)))
    font = min(1.0, slot / 1.25)  # of a forest's text, which must fit its slots
    face, strip = 0.52 * slot, 0.86 * slot
    gap, line = 0.025 * font, 0.25 * font
    small = (strip - 3 * gap) / 4

    top = MARGIN + (0.4 if title else 0.0)
    inner = face + line + small
    levels = max((topology[node].depth for node in topology.inner), default=-1) + 1
    # The band between two rows is where branches bend.
    band = 0.5 * min(slot, 1.3)
    longest = max((len(np.asarray(examples[leaf])[:12]) for leaf in leaves if leaf in examples), default=0)
    floor = top + levels * (inner + band)
    bottom = floor + face + line + math.ceil(longest / 4) * (small + gap)
    width = max(len(leaves) * slot + 2 * MARGIN, 0.12 * len(title) + 2 * MARGIN)
    sheet = Sheet(width, bottom + MARGIN)
    if title:
        sheet.title(title)

    x = leaf_columns(topology)
    indent = (width - len(leaves) * slot) / 2
    across = {node: indent + (column + 0.5) * slot for node, column in x.items()}
    row = {n.id: floor if topology.is_leaf(n.id) else top + n.depth * (inner + band) for n in topology.nodes}
    names = {leaf: f"leaf {k}" for k, leaf in enumerate(leaves)}

    for node in topology.top_down:
        centre, y, share = across[node], row[node], shares.get(node, 0.0)
        parent = topology[node].parent
        if parent is not None:
            start = row[parent] + inner + 0.05
            bend = row[parent] + inner + band - 0.05
            sheet.branch((across[parent], start), bend, (centre, y - 0.05), (1 + 13 * share) * font)
        if node in averages:
            sheet.image(centre - face / 2, y, face, averages[node])
        else:
            sheet.box(centre - face / 2, y, face, face, facecolor="#eef1f4", edgecolor=RULE, linewidth=0.5, zorder=2)
        label = y + face + line / 2
        pictures = np.asarray(examples[node]) if node in examples else np.empty(0)
        if node in names:
            sheet.text(centre, label, f"{names[node]} · {percent(share)}", 8 * font, fontweight="bold")
            pictures = pictures[:12]
        else:
            sheet.text(centre, label, percent(share), 8 * font, MUTED)
            pictures = pictures[:4]
        if len(pictures):
            columns = min(4, len(pictures))
            wide = columns * (small + gap) - gap
            sheet.images(centre - wide / 2, y + face + line, wide, pictures, columns, gap)
    return sheet.figure


def leaf_columns(topology: Topology) -> dict[int, float]:
    """Where every node stands across: leaves at 0, 1, 2 …, inner nodes in the middle of their children."""
    x = {leaf: float(k) for k, leaf in enumerate(topology.leaves)}
    for node in reversed(topology.top_down):
        if node not in x:
            places = [x[child] for child in topology.children(node) if child is not None]
            x[node] = sum(places) / len(places)
    return x


# --- samples -------------------------------------------------------------------------------------


def leaf_grids(
    images_by_leaf: Sequence[ArrayLike],
    titles: Sequence[str],
    histograms: ArrayLike | None = None,
    class_names: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """A square grid of samples for every leaf, leaf beside leaf, wrapped into rows; titles as 'leaf 3 · 12%'.

    With `histograms` [L, C], the classes that a classifier saw in each leaf stand below its grid.
    """
    counts = None if histograms is None else np.asarray(histograms, dtype=np.float64)
    most = max((len(np.asarray(images)) for images in images_by_leaf), default=1)
    across = max(1, math.ceil(math.sqrt(most)))
    per_row = math.ceil(len(images_by_leaf) / math.ceil(len(images_by_leaf) / 5))  # rows of even length
    return _panels(images_by_leaf, titles, across, per_row, _tile(across), title, counts, class_names)


def sample_rows(blocks: Sequence[tuple[str, ArrayLike]], columns: int = 6, title: str = "") -> Figure:
    """Labelled blocks of samples [K, I, H, H] side by side, such as real, TreeVAE and TreeDiffusion."""
    return _panels([b[1] for b in blocks], [b[0] for b in blocks], columns, min(3, len(blocks)), 0.48, title)


def _tile(across: int) -> float:
    """Width of one sample where a panel is to be about 2 inches wide, whatever it holds."""
    return min(0.7, max(0.2, 2.0 / across))


def _panels(
    blocks: Sequence[ArrayLike],
    titles: Sequence[str],
    across: int,
    per_row: int,
    tile: float,
    title: str,
    counts: NDArray[np.float64] | None = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Titled grids of images, `across` to a line and `per_row` to a row, with bars of `counts` below each."""
    if len(blocks) != len(titles) or not blocks:
        raise ValueError(f"needs one title for every block of images, and at least one: {len(blocks)}, {len(titles)}")
    stacks = [np.asarray(images) for images in blocks]
    gap, between, head = 0.03, 0.3, 0.26
    panel = across * (tile + gap) - gap
    rows = [list(range(k, min(k + per_row, len(stacks)))) for k in range(0, len(stacks), per_row)]
    lines = [math.ceil(max(len(stacks[k]) for k in row) / across) for row in rows]
    bars = 0.75 if counts is not None else 0.0
    heights = [head + n * (tile + gap) + bars for n in lines]
    top = MARGIN + (0.45 if title else 0.0)
    wide = min(per_row, len(stacks)) * (panel + between) - between + 2 * MARGIN
    sheet = Sheet(max(wide, 0.12 * len(title) + 2 * MARGIN), top + sum(heights) + between * (len(rows) - 1) + MARGIN)
    if title:
        sheet.title(title)
    for row, tall, count in zip(rows, heights, lines, strict=True):
        for column, k in enumerate(row):
            left = MARGIN + column * (panel + between)
            sheet.text(left, top, titles[k], 9, fontweight="bold", ha="left", va="top")
            sheet.images(left, top + head, panel, stacks[k], across, gap)
            if counts is not None:
                _bars(sheet, left, top + head + count * (tile + gap) + 0.1, panel, counts[k], class_names)
        top += tall + between
    return sheet.figure


def _bars(
    sheet: Sheet, left: float, top: float, width: float, counts: NDArray[np.float64], names: Sequence[str] | None
) -> None:
    """A histogram of classes, 0.4 inches high over its names; the tallest bar is the leaf's own class."""
    height, step = 0.4, width / len(counts)
    peak = max(float(counts.max()), 1e-12)
    for c, count in enumerate(counts):
        tall = height * float(count) / peak
        colour = ACCENT if count == peak else "#9fb4bf"
        sheet.box(left + (c + 0.12) * step, top + height - tall, 0.76 * step, tall, facecolor=colour, linewidth=0)
        if len(counts) <= 12:
            name = str(c) if names is None else names[c]
            fits = max(1, int(step / 0.065))
            sheet.text(left + (c + 0.5) * step, top + height + 0.11, name[:fits], 6.5, MUTED)
    sheet.box(left, top + height, width, 0.008, facecolor=RULE, linewidth=0)


def root_draw(
    rows: Sequence[tuple[str, ArrayLike]],
    leaf_names: Sequence[str],
    probabilities: ArrayLike,
    title: str = "",
) -> Figure:
    """One draw at the root, seen through every leaf: a row of images [L, I, H, H] for each model, leaf under leaf.

    Below each column its probability, as a bar and in per cent. More than 16 leaves go on in a further block.
    """
    share = np.asarray(probabilities, dtype=np.float64)
    count = len(leaf_names)
    stacks = [(name, np.asarray(images)) for name, images in rows]
    if not count or len(share) != count or any(len(images) != count for _, images in stacks):
        found = [len(images) for _, images in stacks]
        raise ValueError(f"one image and one probability for each of the {count} leaves, not {found} and {len(share)}")
    blocks = math.ceil(count / 16)
    per_block = math.ceil(count / blocks)
    tile, gap, head, foot, between = 0.72, 0.06, 0.24, 0.42, 0.25
    label = 0.2 + 0.085 * max(len(name) for name, _ in stacks)
    block = head + len(stacks) * (tile + gap) + foot
    top = MARGIN + (0.4 if title else 0.0)
    wide = MARGIN + label + per_block * (tile + gap) - gap + MARGIN
    sheet = Sheet(max(wide, 0.12 * len(title) + 2 * MARGIN), top + blocks * (block + between) - between + MARGIN)
    if title:
        sheet.title(title)
    for start in range(0, count, per_block):
        for r, (name, images) in enumerate(stacks):
            y = top + head + r * (tile + gap)
            sheet.text(MARGIN, y + tile / 2, name, 9, fontweight="bold", ha="left")
            for k in range(start, min(start + per_block, count)):
                sheet.image(MARGIN + label + (k - start) * (tile + gap), y, tile, images[k])
        under = top + head + len(stacks) * (tile + gap)
        for k in range(start, min(start + per_block, count)):
            left = MARGIN + label + (k - start) * (tile + gap)
            sheet.text(left + tile / 2, top + head / 2 - 0.03, leaf_names[k], 8, MUTED)
            sheet.box(left, under + 0.04, tile, 0.06, facecolor="#eef1f4", linewidth=0)
            sheet.box(left, under + 0.04, tile * float(share[k]), 0.06, facecolor=ACCENT, linewidth=0)
            sheet.text(left + tile / 2, under + 0.26, percent(float(share[k])), 8)
        top += block + between
    return sheet.figure


def grid(images: ArrayLike, columns: int, gap: int = 2, at_least: int = 48) -> Image.Image:
    """A plain grid of images [K, I, H, H]: grey or RGB, white between them, no text.

    Images smaller than `at_least` pixels are enlarged by a whole factor, pixels staying squares.
    """
    stack = np.asarray(images)
    if stack.ndim != 4 or not len(stack) or columns < 1:
        raise ValueError(f"a grid needs images [K, I, H, H] and a column or more, not {list(stack.shape)}, {columns}")
    grey = stack.shape[1] == 1
    factor = math.ceil(at_least / stack.shape[2])
    tiles = [np.kron(_bytes(rgb(image)), np.ones((factor, factor, 1), np.uint8)) for image in stack]
    height, width = tiles[0].shape[:2]
    columns = min(columns, len(tiles))
    lines = math.ceil(len(tiles) / columns)
    page = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for k, tile in enumerate(tiles):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        page[y : y + height, x : x + width] = tile
    return Image.fromarray(np.ascontiguousarray(page[:, :, 0]) if grey else page)


# --- numbers -------------------------------------------------------------------------------------


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str = "",
    xlabel: str = "images seen",
    ylabel: str = "loss",
    logarithmic: bool = False,
) -> Figure:
    """Lines of (step, value), each named at its end. Long noisy ones: the values pale, their running mean over them.

    Values that are not finite leave a gap.
    """
    figure = _figure(7.5, 4.0)
    names = 0.03 + 0.0125 * max((len(name) for name in series), default=0)  # room for them on the right
    axes = figure.add_axes((0.1, 0.15, max(0.4, 0.9 - names), 0.73 if title else 0.8))
    ends: list[tuple[float, str, str]] = []
    for k, (name, points) in enumerate(series.items()):
        colour = COLOURS[k % len(COLOURS)]
        line = np.array(points, dtype=np.float64).reshape(-1, 2)
        if len(line) > 200:
            axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.6, alpha=0.25)
            line = np.column_stack([line[:, 0], _running_mean(line[:, 1], len(line) // 50)])
        axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=1.8, solid_capstyle="round")
        finite = line[np.isfinite(line[:, 1])]
        if len(finite):
            ends.append((float(finite[-1, 1]), name, colour))
    if logarithmic:
        axes.set_yscale("log")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.6, alpha=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(colors=MUTED, labelsize=8, length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
    axes.set_xlabel(xlabel, fontsize=8, color=MUTED, labelpad=6)
    axes.set_ylabel(ylabel, fontsize=8, color=MUTED, labelpad=8)
    if title:
        figure.text(0.035, 0.955, title, fontsize=12, fontweight="bold", color=INK, ha="left", va="center")
    axes.autoscale_view()  # before anything is placed by the data's scale
    height = [float(axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1]) for y, _, _ in ends]
    for at, (_, name, colour) in zip(_apart(height, 0.06), ends, strict=True):
        axes.text(1.015, at, name, transform=axes.transAxes, fontsize=8.5, color=colour, va="center", fontweight="bold")
    return figure


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred mean over `width` values, fewer at the ends and at what is not finite: nothing is mixed across a gap."""
    kernel = np.ones(max(1, width))
    out = np.full(len(values), np.nan)
    finite = np.flatnonzero(np.isfinite(values))
    for run in np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1):
        if len(run):
            # "same" is as long as the longer of the two: the kernel must not be that one.
            window = kernel[: len(run)]
            out[run] = np.convolve(values[run], window, mode="same") / np.convolve(
                np.ones(len(run)), window, mode="same"
            )
    return out


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights moved as little as a few sweeps need, in their order, until none are nearer than `least`."""
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, dtype=np.float64)[order]
    for _ in range(200):
        for k in range(1, len(placed)):
            lack = least - (placed[k] - placed[k - 1])
            if lack > 0:
                placed[k] += lack / 2
                placed[k - 1] -= lack / 2
    result = np.empty_like(placed)
    result[order] = placed
    return [float(y) for y in result]


# --- ground --------------------------------------------------------------------------------------


def save(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as PNG. The same figure gives the same bytes: no date, no version inside."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def percent(share: float) -> str:
    """A share in [0, 1] as '12%', and as '0.4%' below 1%."""
    return f"{100 * share:.0f}%" if share >= 0.01 or share == 0 else f"{100 * share:.1f}%"


def rgb(image: ArrayLike) -> NDArray[np.float64]:
    """[I, H, H] in [0, 1], I 1 or 3 -> [H, H, 3], clipped."""
    array = np.asarray(image, dtype=np.float64)
    if array.ndim != 3 or array.shape[0] not in (1, 3):
        raise ValueError(f"an image must be [1, H, H] or [3, H, H], not {list(array.shape)}")
    return np.broadcast_to(array.transpose(1, 2, 0), (*array.shape[1:], 3)).clip(0, 1)


def _bytes(pixels: NDArray[np.float64]) -> NDArray[np.uint8]:
    return (pixels * 255).round().astype(np.uint8)


def _figure(width: float, height: float) -> Figure:
    """A white figure with its own Agg canvas."""
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure
