"""A run's pictures: the learned tree, generated images leaf by leaf, one root draw through every leaf, the losses.

Legend: M images, P of them that are pictured, L leaves, I image channels, H image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tdiff.figures import plots
from tdiff.seeds import permutation
from tdiff.tree.growth import leaf_reach, members, node_reach
from tdiff.tree.topology import Topology
from tdiff.work.sampling import Samples

FIGURES = ("tree.png", "leaves.png", "root-draw.png", "samples.png", "losses-tree.png", "losses-diffusion.png")
"""The pictures in the order in which they are looked at."""

SIDE_BY_SIDE = 60
"""Images of a kind that stand beside those of another."""

Ids = NDArray[np.int64]
Metrics = dict[str, list[dict[str, Any]]]
Series = dict[str, list[tuple[float, float]]]


PICTURED = 20_000
"""Training images that pictures are made of at most: 16 MB of 28x28."""


@dataclass(frozen=True)
class Pictured:
    """The training images that pictures are made of: all, or of many some of every leaf.

    ids: [P], ascending; images: uint8 [P, I, H, H]; weights: [P], how many images of its leaf each stands for.
    """

    ids: NDArray[np.int64]
    images: NDArray[np.uint8]
    weights: NDArray[np.float64]

    @staticmethod
    def of(images: NDArray[np.uint8]) -> Pictured:
        """All of some images."""
        return Pictured(np.arange(len(images)), images, np.ones(len(images)))


def pictured(topology: Topology, left: NDArray[np.float32], gather: Callable[[Ids], NDArray[np.uint8]]) -> Pictured:
    """What to make pictures of, by the routing of all training images; gather: ids -> uint8 [P, I, H, H]."""
    leaf = leaf_reach(topology, left).argmax(1)
    most = len(leaf) if len(leaf) <= PICTURED else max(1, PICTURED // len(topology.leaves))
    chosen, weights = [], []
    for k in range(len(topology.leaves)):
        members = np.flatnonzero(leaf == k)
        few = members[permutation(len(members), "pictured", k)[:most]]
        chosen.append(few)
        weights.append(np.full(len(few), len(members) / max(len(few), 1)))
    ids = np.concatenate(chosen)
    order = np.argsort(ids)
    return Pictured(ids[order], gather(ids[order]), np.concatenate(weights)[order])


def leaf_names(topology: Topology) -> list[str]:
    return [f"leaf {k}" for k in range(len(topology.leaves))]


def tree(topology: Topology, left: NDArray[np.float32], shown: Pictured) -> Figure:
    """The learned tree with, at every node, the average of its images (weighted by reach) and real examples.

    left: routing of all training images. Examples are those most certain to come there, evenly spaced over a leaf's
    members so that its breadth shows.
    """
    reach = node_reach(topology, left)
    images = shown.images.astype(np.float64) / 255
    averages, examples = {}, {}
    for node, every in reach.items():
        p = every[shown.ids]
        weights = p * shown.weights
        averages[node] = np.tensordot(weights, images, 1) / max(weights.sum(), 1e-12)
        ids = members(np.stack([p, 1 - p], 1), 0)
        if not len(ids):
            ids = np.argsort(-p)[:1]
        examples[node] = images[ids[np.linspace(0, len(ids) - 1, min(12, len(ids))).astype(int)]]
    shares = {node: float(p.mean()) for node, p in reach.items()}
    title = f"{len(topology.leaves)} clusters found in {len(left):,} unlabelled images"
    return plots.tree_picture(topology, averages, examples, shares, title)


def leaves(
    topology: Topology,
    left: NDArray[np.float32],
    samples: list[Samples],
    predicted: NDArray[np.int64] | None = None,
    class_names: Sequence[str] = (),
    model: str = "TreeDiffusion",
    count: int = 25,
) -> Figure:
    """Per leaf a grid of generated images, with the leaf's share of the real ones, over the classes [L, C] that a
    classifier sees in its samples. model: what the diffusion model is called.
    """
    shares = leaf_reach(topology, left).mean(0)
    titles = [f"{name} · {plots.percent(share)}" for name, share in zip(leaf_names(topology), shares, strict=True)]
    images = [one.images[:count] / 255 for one in samples]
    return plots.leaf_grids(images, titles, predicted, class_names or None, title=f"{model}, leaf by leaf")


def root_draw(topology: Topology, samples: Samples, draw: int, model: str = "TreeDiffusion") -> Figure:
    """One draw of the root's latent through every leaf: the TreeVAE's images above the diffusion model's."""
    rows = [k for k, entry in enumerate(samples.entries) if entry["draw"] == draw]
    probabilities = [float(str(samples.entries[k]["reach"])) for k in rows]
    blocks = [("TreeVAE", samples.treevae[rows] / 255), (model, samples.images[rows] / 255)]
    return plots.root_draw(blocks, leaf_names(topology), probabilities, "One root draw through every leaf")


def side_by_side(real: NDArray[np.uint8], samples: Samples, model: str = "TreeDiffusion") -> Figure:
    """Real images, the TreeVAE's samples and the diffusion model's for the same latents."""
    blocks = [
        ("real", real[:SIDE_BY_SIDE] / 255),
        ("TreeVAE", samples.treevae[:SIDE_BY_SIDE] / 255),
        (model, samples.images[:SIDE_BY_SIDE] / 255),
    ]
    return plots.sample_rows(blocks, columns=10)


def growing_losses(metrics: Metrics) -> Figure:
    """The loss of the tree's phases one after the other (name -> metric lines), a colour for each kind of phase."""
    return plots.curves(growing_series(metrics), "Growing the tree")


def growing_series(metrics: Metrics) -> Series:
    """Kind of phase -> (images seen before and in it, loss) of all phases of that kind, a gap between two."""
    series: Series = {}
    before = 0.0
    for phase, lines in metrics.items():
        if lines:
            points = series.setdefault(phase.split("-")[1], [])
            points += [(before + float(line["images"]), float(line["loss"])) for line in lines]
            before += float(lines[-1]["images"])
            points.append((before, float("nan")))  # a gap: the next phase of this kind starts elsewhere
    return series


def diffusion_losses(lines: list[dict[str, Any]]) -> Figure:
    """The denoising loss over the images seen, in training and on held-out images."""
    return plots.curves(diffusion_series(lines), "Training the diffusion model")


def diffusion_series(lines: list[dict[str, Any]]) -> Series:
    keys = {"training": "loss", "validation": "validation/loss"}
    found = {
        name: [(float(line["images"]), float(line[key])) for line in lines if key in line] for name, key in keys.items()
    }
    return {name: points for name, points in found.items() if points}
