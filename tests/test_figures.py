"""Protects the pictures: every image and label is there, nothing overlaps or leaves the page, and the same
arrays give the same bytes."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from PIL import Image

from tdiff.figures import plots
from tdiff.tree.topology import Topology


def pictures(count: int, channels: int = 1, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).uniform(size=(count, channels, size, size))


def chain(leaves: int) -> Topology:
    """The most unbalanced tree: every split takes the last leaf."""
    tree = Topology.root_with_two_leaves("00-root")
    while len(tree.leaves) < leaves:
        tree = tree.split(tree.leaves[-1], "split")
    return tree


def balanced(leaves: int) -> Topology:
    tree = Topology.root_with_two_leaves("00-root")
    while len(tree.leaves) < leaves:
        tree = tree.split(min(tree.leaves, key=lambda node: tree[node].depth), "split")
    return tree


TREES = {
    "two leaves": balanced(2),
    "seven": balanced(7),
    "sixteen": balanced(16),
    "chain": chain(7),
    "pruned": chain(6).split(1, "split").prune(5),
    "one leaf": Topology.root_with_two_leaves("00-root").prune(2),
}


def draw(tree: Topology, title: str = "Digits") -> Figure:
    shares = {node: len(tree.leaves_below(node)) / len(tree.leaves) for node in tree.top_down}
    averages = {node: pictures(1)[0] for node in tree.top_down}
    return plots.tree_picture(tree, averages, {node: pictures(20) for node in tree.top_down}, shares, title)


def boxes(figure: Figure) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(left, bottom, right, top) in pixels of all images, and of all texts."""
    figure.canvas.draw()
    (axes,) = figure.axes
    texts = [text.get_window_extent().extents for text in axes.texts]
    return [image.get_window_extent().extents for image in axes.images], texts


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two boxes share more than a pixel's width and height."""
    return bool((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) > 1).all())


def assert_tidy(figure: Figure) -> None:
    images, texts = boxes(figure)
    width, height = figure.get_size_inches() * figure.dpi
    for box in images + texts:
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= width
        assert box[3] <= height
    for a, b in combinations(images + texts, 2):
        assert not overlap(a, b)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_tree_shows_every_node_and_nothing_overlaps(tree: Topology) -> None:
    figure = draw(tree)
    leaves, nodes = len(tree.leaves), len(tree.nodes)
    axes = figure.axes[0]
    assert len(axes.images) == nodes + 12 * leaves + 4 * (nodes - leaves)
    assert sum(isinstance(patch, PathPatch) for patch in axes.patches) == nodes - 1
    named = sorted((text for text in axes.texts if "leaf" in text.get_text()), key=lambda text: text.get_position()[0])
    share = plots.percent(1 / leaves)
    assert [text.get_text() for text in named] == [f"leaf {k} · {share}" for k in range(leaves)]  # left to right
    assert len(texts(figure)) == nodes + 1  # the headline
    assert_tidy(figure)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_branches_run_clear_of_images(tree: Topology) -> None:
    figure = draw(tree)
    images, _ = boxes(figure)
    axes = figure.axes[0]
    for patch in axes.patches:
        if isinstance(patch, PathPatch):
            for x, y in axes.transData.transform(_along(patch)):
                assert not any(b[0] < x < b[2] and b[1] < y < b[3] for b in images)


def _along(patch: PathPatch) -> np.ndarray:
    """Many points of a branch, curve and straight end."""
    curve = patch.get_path().to_polygons(closed_only=False)[0]
    steps = np.linspace(0, 1, 20)[:, None]
    return np.concatenate([a + steps * (b - a) for a, b in pairwise(curve)])


def test_tree_is_laid_out_as_told() -> None:
    tree = chain(4)
    axes = draw(tree).axes[0]
    large = max(np.ptp(image.get_extent()[:2]) for image in axes.images)
    faces = [image.get_extent() for image in axes.images if np.ptp(image.get_extent()[:2]) > 0.99 * large]
    centre = dict(zip(tree.top_down, [((f[0] + f[1]) / 2, f[3]) for f in faces], strict=True))
    across = [centre[leaf][0] for leaf in tree.leaves]
    assert np.diff(across) == pytest.approx(np.full(3, across[1] - across[0]))  # evenly spaced
    assert len({round(centre[leaf][1], 6) for leaf in tree.leaves}) == 1  # along the bottom
    for node in tree.inner:
        assert centre[node][0] == pytest.approx(np.mean([centre[child][0] for child in tree.children(node)]))


def test_branches_are_as_thick_as_their_share() -> None:
    tree = balanced(2)
    figure = plots.tree_picture(tree, {}, {}, {0: 1.0, 1: 0.9, 2: 0.1}, "")
    thick, thin = (p.get_linewidth() for p in figure.axes[0].patches if isinstance(p, PathPatch))
    assert thick > 3 * thin
    assert texts(figure) == ["100%", "leaf 0 · 90%", "leaf 1 · 10%"]
    assert len(figure.axes[0].images) == 0  # nodes without images leave a blank, not an error


def test_leaf_grids_wrap_and_name_every_leaf() -> None:
    titles = [f"leaf {k} · 14%" for k in range(7)]
    stacks = [pictures(9 if k else 4, channels=3) for k in range(7)]
    figure = plots.leaf_grids(stacks, titles)
    assert len(figure.axes[0].images) == 6 * 9 + 4
    assert texts(figure) == titles
    left = [text.get_position()[0] for text in figure.axes[0].texts]
    assert left[:3] == left[4:]  # four above three
    assert_tidy(figure)
    with pytest.raises(ValueError, match="one title for every block"):
        plots.leaf_grids(stacks, titles[:2])


def test_leaf_grids_carry_histograms() -> None:
    counts = [[3, 0, 1], [0, 5, 0]]
    figure = plots.leaf_grids([pictures(4)] * 2, ["a", "b"], counts, ["cat", "dog", "owl"], title="What leaves draw")
    found = [patch for patch in figure.axes[0].patches if patch.get_facecolor()[:3] == _rgb(plots.ACCENT)]
    assert len(found) == 2  # the tallest bar of each leaf
    assert texts(figure).count("cat") == 2
    assert_tidy(figure)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))


def test_root_draw_puts_leaf_under_leaf() -> None:
    rows = [("TreeVAE", pictures(20)), ("TreeDiffusion", pictures(20))]
    probabilities = np.full(20, 0.05)
    figure = plots.root_draw(rows, [f"leaf {k}" for k in range(20)], probabilities, "One root draw")
    assert len(figure.axes[0].images) == 40
    assert texts(figure).count("5%") == 20
    assert texts(figure).count("TreeDiffusion") == 2  # 20 leaves take two blocks of ten
    lefts = [image.get_extent()[0] for image in figure.axes[0].images]
    assert lefts[:10] == pytest.approx(lefts[10:20])
    assert_tidy(figure)
    with pytest.raises(ValueError, match="each of the 20 leaves"):
        plots.root_draw(rows, [f"leaf {k}" for k in range(20)], probabilities[:3])


def test_sample_rows_stand_side_by_side() -> None:
    blocks = [(name, pictures(18)) for name in ("Real", "TreeVAE", "TreeDiffusion")]
    figure = plots.sample_rows(blocks, columns=6)
    assert len(figure.axes[0].images) == 54
    assert texts(figure) == ["Real", "TreeVAE", "TreeDiffusion"]
    assert len({text.get_position()[1] for text in figure.axes[0].texts}) == 1
    assert_tidy(figure)


def test_grid_keeps_every_pixel() -> None:
    images = pictures(5, size=16)
    page = plots.grid(images, columns=3, gap=2)
    assert (page.mode, page.size) == ("L", (3 * 48 + 2 * 2, 2 * 48 + 2))  # 16 px enlarged three times
    second = np.asarray(page)[:48:3, 50:98:3]
    assert (second == (images[1, 0] * 255).round()).all()
    assert (np.asarray(page)[50:, 100:] == 255).all()  # the empty place is white
    assert plots.grid(pictures(2, channels=3, size=64), columns=8).mode == "RGB"
    assert plots.grid(pictures(2, channels=3, size=64), columns=8).size == (130, 64)


def test_curves_draw_and_name_every_series() -> None:
    steps = range(500)
    series = {
        "loss": [(128.0 * s, 100 / (1 + s)) for s in steps],
        "kl": [(128.0 * s, 1.0) for s in steps][:3],
        "kl root": [(0.0, 1.01), (64000.0, 1.02), (65000.0, float("nan"))],
        "nothing": [],
    }
    figure = plots.curves(series, "Losses")
    axes = figure.axes[0]
    assert texts(figure) == ["loss", "kl", "kl root"]
    assert len(axes.lines) == 5  # the long one twice: pale values and their mean
    figure.canvas.draw()
    names = [text.get_window_extent().extents for text in axes.texts]
    assert not any(overlap(a, b) for a, b in combinations(names, 2))
    assert all(box[2] <= figure.get_size_inches()[0] * figure.dpi for box in names)


def test_save_is_png_and_the_same_bytes_twice() -> None:
    data = plots.save(draw(balanced(3)))
    assert data == plots.save(draw(balanced(3)))
    page = Image.open(io.BytesIO(data))
    assert page.format == "PNG"
    assert page.size == tuple((draw(balanced(3)).get_size_inches() * plots.DPI).astype(int))
    extremes = np.asarray(page.convert("L"))
    assert extremes.min() < 40  # ink
    assert (extremes == 255).mean() > 0.3  # on white


@pytest.mark.parametrize(("share", "text"), [(1, "100%"), (0.124, "12%"), (0.01, "1%"), (0.004, "0.4%"), (0, "0%")])
def test_percent(share: float, text: str) -> None:
    assert plots.percent(share) == text


def test_images_are_shown_as_they_are() -> None:
    grey = plots.rgb(np.array([[[0.0, 2.0], [0.5, -1.0]]]))
    assert grey.tolist() == [[[0, 0, 0], [1, 1, 1]], [[0.5, 0.5, 0.5], [0, 0, 0]]]  # 1 is white, the rest clipped
    colour = pictures(1, channels=3)[0]
    assert (plots.rgb(colour) == colour.transpose(1, 2, 0)).all()
    with pytest.raises(ValueError, match=r"not \[2, 8, 8\]"):
        plots.rgb(np.zeros((2, 8, 8)))


def test_no_pyplot() -> None:
    code = "import sys, tdiff.figures.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
