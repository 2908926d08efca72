"""A run's pictures: the learned tree, generated images leaf by leaf, one root draw through every leaf, the losses.

Legend: M images, L leaves, I image channels, H image size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tdiff.data.decode import Images
from tdiff.figures import plots
from tdiff.tree.growth import leaf_reach, members, node_reach
from tdiff.tree.topology import Topology
from tdiff.work.sampling import Samples

FIGURES = ("tree.png", "leaves.png", "root-draw.png", "samples.png", "losses-tree.png", "losses-diffusion.png")
"""The pictures in the order in which they are looked at."""

Metrics = dict[str, list[dict[str, Any]]]
Series = dict[str, list[tuple[float, float]]]


def leaf_names(topology: Topology) -> list[str]:
    return [f"leaf {k}" for k in range(len(topology.leaves))]


def tree(topology: Topology, left: NDArray[np.float32], train: Images) -> Figure:
    """The learned tree with, at every node, the average of its images (weighted by reach) and real examples.

    Examples are those most certain to come there, evenly spaced over a leaf's members so that its breadth shows.
    """
    reach = node_reach(topology, left)
    images = train.images.astype(np.float64) / 255
    averages, examples = {}, {}
    for node, p in reach.items():
        averages[node] = np.tensordot(p, images, 1) / max(p.sum(), 1e-12)
        ids = members(np.stack([p, 1 - p], 1), 0)
        if not len(ids):
            ids = np.argsort(-p)[:1]
        examples[node] = images[ids[np.linspace(0, len(ids) - 1, min(12, len(ids))).astype(int)]]
    shares = {node: float(p.mean()) for node, p in reach.items()}
    title = f"{len(topology.leaves)} clusters found in {len(train):,} unlabelled images"
    return plots.tree_picture(topology, averages, examples, shares, title)


def leaves(topology: Topology, left: NDArray[np.float32], samples: list[Samples], count: int = 25) -> Figure:
    """Per leaf a grid of generated images, with the leaf's share of the real ones."""
    shares = leaf_reach(topology, left).mean(0)
    titles = [f"{name} · {plots.percent(share)}" for name, share in zip(leaf_names(topology), shares, strict=True)]
    return plots.leaf_grids([one.images[:count] / 255 for one in samples], titles, title="TreeDiffusion, leaf by leaf")


def root_draw(topology: Topology, samples: Samples, draw: int) -> Figure:
    """One draw of the root's latent through every leaf: the TreeVAE's images above TreeDiffusion's."""
    rows = [k for k, entry in enumerate(samples.entries) if entry["draw"] == draw]
    probabilities = [float(str(samples.entries[k]["reach"])) for k in rows]
    blocks = [("TreeVAE", samples.treevae[rows] / 255), ("TreeDiffusion", samples.images[rows] / 255)]
    return plots.root_draw(blocks, leaf_names(topology), probabilities, "One root draw through every leaf")


def side_by_side(train: Images, samples: Samples, count: int = 60) -> Figure:
    """Real images, the TreeVAE's samples and TreeDiffusion's for the same latents."""
    blocks = [
        ("real", train.images[:count] / 255),
        ("TreeVAE", samples.treevae[:count] / 255),
        ("TreeDiffusion", samples.images[:count] / 255),
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
