"""What a run's report shows, gathered from its arrays: every node's images and numbers, root draws, samples, losses.

An image belongs to its most probable leaf, and with it to every node above. Typical is what lies near the leaf's
average image.

Legend: M images, P of them that are pictured, L leaves, C classes, I image channels, H image size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdiff.figures.contents import Chart, Mean, NodeContents, Pixels, RootDraw
from tdiff.tree.growth import leaf_reach
from tdiff.tree.topology import Topology
from tdiff.work import drawing
from tdiff.work.drawing import Pictured
from tdiff.work.growing import Decisions
from tdiff.work.sampling import Samples

NODE_BYTES = 6_000_000
"""Raw pixels of all nodes' images together, about, however many nodes there are and however large an image is."""

FEWEST, MOST = 4, 24
"""Images of a kind that a node shows, whatever that budget says."""

ORDERED = 2000
"""Members of a leaf, evenly spaced, that are put in order: enough to choose from, and soon done for any data set."""

ROOT_DRAWS = 8
BLOCK = 4096


def nodes(
    topology: Topology,
    decisions: Decisions,
    shown: Pictured,
    classes: int = 0,
    of_leaves: Sequence[Samples] | None = None,
    predicted: NDArray[np.int64] | None = None,
    elbo: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None,
) -> dict[int, NodeContents]:
    """What every node shows, by node id.

    decisions: on all training images. shown: those that may be pictured. classes: how many there are, where images
    have labels. of_leaves: samples of every leaf. predicted: classes [L, C] that a classifier sees in samples. elbo: of
    images [M], and their leaves.
    """
    reach = leaf_reach(topology, decisions.left)
    leaf = reach.argmax(1)
    weights = reach[shown.ids] * shown.weights[:, None]  # [P, L]
    sums, masses = _sums(weights, shown.images), np.maximum(weights.sum(0), 1e-12)
    leaves = range(len(topology.leaves))
    rows = [np.flatnonzero(leaf[shown.ids] == k) for k in leaves]  # of the images shown
    ordered = [_by_typicality(shown.images, rows[k], sums[k] / masses[k]) for k in leaves]
    labels = decisions.labels
    count = images_per_sheet(shown.images.shape[1:], len(topology.nodes))
    index = {node: k for k, node in enumerate(topology.leaves)}
    found = {}
    for node in topology.top_down:
        below = [index[one] for one in topology.leaves_below(node)]
        here = np.isin(leaf, below)
        # Of an inner node, its images in the leaves' order: as many of each leaf as it holds.
        breadth = ordered[below[0]] if topology.is_leaf(node) else np.concatenate([rows[k] for k in below])
        generated = _generated(of_leaves, below, count)
        found[node] = NodeContents(
            share=float(reach[:, below].sum() / max(len(reach), 1)),
            count=int(here.sum()),
            average=(sums[below].sum(0) / masses[below].sum()).round().clip(0, 255).astype(np.uint8),
            typical=shown.images[_of_each([ordered[k] for k in below], count)],
            spread=shown.images[_evenly(breadth, count)],
            treediffusion=generated and generated[0],
            treevae=generated and generated[1],
            classes=None if labels is None else np.bincount(labels[here], minlength=classes),
            predicted=None if predicted is None else predicted[below].sum(0),
            elbo=None if elbo is None else _mean(elbo[0][np.isin(elbo[1], below)]),
        )
    return found


def images_per_sheet(shape: Sequence[int], nodes: int) -> int:
    """How many images of a kind each of so many nodes shows: all of them within NODE_BYTES, whole rows of 8."""
    kinds = 4
    count = min(MOST, max(FEWEST, NODE_BYTES // (kinds * nodes * math.prod(shape))))
    return count if count < 8 else count // 8 * 8


def _sums(weights: NDArray[np.float64], images: Pixels) -> NDArray[np.float64]:
    """Sum of the images by weights [P, L], [L, I, H, H], a block of them at a time."""
    sums = np.zeros((weights.shape[1], *images.shape[1:]))
    for k in range(0, len(images), BLOCK):
        sums += np.tensordot(weights[k : k + BLOCK].T, images[k : k + BLOCK].astype(np.float64), 1)
    return sums


def _by_typicality(images: Pixels, ids: NDArray[np.int64], average: NDArray[np.float64]) -> NDArray[np.int64]:
    """The ids, of at most ORDERED evenly spaced ones, by the distance of their images to the average."""
    ids = _evenly(ids, ORDERED)
    axes = tuple(range(1, images.ndim))
    far = np.square(images[ids].astype(np.float32) - average.astype(np.float32)).sum(axes)
    return ids[np.argsort(far, kind="stable")]


def _evenly(ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` of the ids, first and last among them."""
    return ids if len(ids) <= count else ids[np.linspace(0, len(ids) - 1, count).astype(int)]


def _of_each(groups: Sequence[NDArray[np.int64]], count: int) -> NDArray[np.int64]:
    """The first ids of every group, `count` in all where there are so many, the groups' shares as equal as can be."""
    chosen = np.linspace(0, len(groups) - 1, min(len(groups), count)).astype(int)
    parts = [len(part) for part in np.array_split(np.arange(count), len(chosen))]
    return np.concatenate([groups[k][:part] for k, part in zip(chosen, parts, strict=True)])


def _generated(of_leaves: Sequence[Samples] | None, below: Sequence[int], count: int) -> tuple[Pixels, Pixels] | None:
    """The diffusion model's and the TreeVAE's images of these leaves, for the same latents."""
    if of_leaves is None:
        return None
    samples = [of_leaves[k] for k in below]
    starts = np.cumsum([0, *(len(one.images) for one in samples)])
    ids = _of_each([np.arange(a, b) for a, b in pairwise(starts)], count)
    return (
        np.concatenate([one.images for one in samples])[ids],
        np.concatenate([one.treevae for one in samples])[ids],
    )


def _mean(values: NDArray[np.float64]) -> Mean | None:
    if not len(values):
        return None
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return Mean(float(values.mean()), len(values), error)


# --- beside the tree ---------------------------------------------------------------------------------


def root_draws(samples: Samples) -> list[RootDraw]:
    """The first draws of the root, each through every leaf."""
    rows: dict[int, list[int]] = {}
    for k, entry in enumerate(samples.entries):
        rows.setdefault(int(str(entry["draw"])), []).append(k)
    return [
        RootDraw(
            np.array([float(str(samples.entries[k]["reach"])) for k in chosen]),
            samples.images[chosen],
            samples.treevae[chosen],
        )
        for chosen in list(rows.values())[:ROOT_DRAWS]
    ]


def side_by_side(real: Pixels, samples: Samples, model: str = "TreeDiffusion") -> list[tuple[str, Pixels]]:
    """Real images, the TreeVAE's samples and the diffusion model's for the same latents."""
    kinds = (("Real", real), ("TreeVAE", samples.treevae), (model, samples.images))
    return [(name, images[: drawing.SIDE_BY_SIDE]) for name, images in kinds]


def charts(tree: dict[str, list[dict[str, Any]]], diffusion: list[dict[str, Any]]) -> list[Chart]:
    """The losses of the tree's phases (name -> metric lines) and of the diffusion model, as far as there are any."""
    found = [
        Chart(
            "Growing the tree",
            "Negative ELBO over the images seen, phase after phase. A split counts only its own sub-tree, on the "
            "images of the leaf that it splits.",
            drawing.growing_series(tree),
        ),
        Chart(
            "Training the diffusion model",
            "Denoising loss over the images seen.",
            drawing.diffusion_series(diffusion),
        ),
    ]
    return [chart for chart in found if any(chart.series.values())]
