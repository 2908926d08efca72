"""How a tree's clusters stand against labels, and against those of plain methods.

Legend: M images, I image channels, H image size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tdiff.evaluation.clustering import accuracy, ari, leaf_purity, nmi, scores
from tdiff.evaluation.controls import KMEANS_VALUES, kmeans, ward
from tdiff.seeds import permutation, seed_of
from tdiff.tree.growth import EFFECTIVE_SHARE, chunks, leaf_reach, node_mass
from tdiff.tree.topology import Topology
from tdiff.work.growing import Decisions

Gather = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
"""ids -> images [M, I, H, H]."""

WARD_IMAGES = 10_000
"""Images that Ward is fitted to at most: its memory grows with their square (0.8 GB for so many)."""


def clustering(
    topology: Topology, decisions: Mapping[str, Decisions], gather: Mapping[str, Gather], seed: int
) -> dict[str, dict[str, float]]:
    """The tree's scores on every labelled split, beside k-means' and Ward's on images of the test split.

    gather: by split, ids -> its images. k-means is fitted to the training pixels and applied to the test images; Ward,
    which cannot be applied to new images, is fitted to the test images and training images beside them. Each takes as
    many, drawn by the seed, as memory allows (KMEANS_VALUES, WARD_IMAGES). Both get the number of classes, which the
    tree is not told.
    """
    out: dict[str, dict[str, float]] = {}
    for split, (left, labels) in decisions.items():
        if labels is not None:
            out[f"tree_{split}"] = scores(topology, leaf_reach(topology, left).argmax(1), labels)
    labels = decisions["test"].labels if "test" in decisions else None
    if labels is not None:
        classes = len(np.unique(labels))
        # Drawn at random, for images may be sorted by class.
        of_train = permutation(len(decisions["train"].left), "controls", seed)
        of_test = permutation(len(labels), "controls", seed)
        first = gather["test"](of_test[:1])
        most = KMEANS_VALUES // first.size
        pixels = gather["train"](of_train[:most]) / 255
        held_out = gather["test"](of_test[:most]) / 255
        _, clusters = kmeans(pixels, held_out, classes, seed_of("kmeans", seed) % 2**31)
        out["kmeans_test"] = _flat_scores(labels[of_test[:most]], clusters) | {"fitted_to": len(pixels)}
        held_out = held_out[:WARD_IMAGES]
        beside = pixels[: WARD_IMAGES - len(held_out)]
        clusters = ward(np.concatenate([beside, held_out]), classes)[len(beside) :]
        fitted = len(beside) + len(held_out)
        out["ward_test"] = _flat_scores(labels[of_test[: len(held_out)]], clusters) | {"fitted_to": fitted}
    return out


def progress(topology: Topology, decisions: dict[str, Decisions]) -> dict[str, float]:
    """A phase's numbers for its summary: every leaf's share of the training images (by node id), effective leaves, and
    ACC and NMI of the splits whose images have labels.
    """
    mass, images = node_mass(topology, decisions["train"].left), len(decisions["train"].left)
    out = {f"train_share/{leaf}": mass[leaf] / images for leaf in topology.leaves}
    out["train_effective_leaves"] = sum(mass[leaf] >= EFFECTIVE_SHARE * images for leaf in topology.leaves)
    for split, (left, labels) in decisions.items():
        if labels is not None:
            clusters = np.concatenate([leaf_reach(topology, part).argmax(1) for _, part in chunks(left)])
            out |= {f"acc_{split}": accuracy(labels, clusters), f"nmi_{split}": nmi(labels, clusters)}
    return out


def _flat_scores(labels: NDArray[np.int64], clusters: NDArray[np.int64]) -> dict[str, float]:
    return {
        "acc": accuracy(labels, clusters),
        "nmi": nmi(labels, clusters),
        "ari": ari(labels, clusters),
        "leaf_purity": leaf_purity(labels, clusters),
    }
