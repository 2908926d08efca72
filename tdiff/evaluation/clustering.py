"""How well the leaves of a tree agree with known classes: flat scores, and purity along the tree.

Labels, clusters and leaf indices are integer vectors [N], one entry per image; which integers does not
matter, only leaf indices are positions in `topology.leaves`.

Legend: N images, L leaves, C classes, U clusters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tdiff.tree.topology import Topology

Integers = NDArray[np.int64]


def accuracy(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Share of images whose class is the one matched to their cluster, under the best one-to-one matching.

    With more clusters than classes, the clusters left without a class count as wrong.
    """
    from scipy.optimize import linear_sum_assignment  # a fifth of a second, which most commands do without

    table = contingency(labels, clusters)  # [U, C]
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / table.sum())


def nmi(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Mutual information over the arithmetic mean of the two entropies."""
    from sklearn.metrics import normalized_mutual_info_score  # a second of imports, with pandas

    labels, clusters = _pair(labels, clusters)
    return float(normalized_mutual_info_score(labels, clusters, average_method="arithmetic"))


def ari(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Rand index adjusted for chance: 1 for equal partitions, around 0 for independent ones."""
    from sklearn.metrics import adjusted_rand_score

    labels, clusters = _pair(labels, clusters)
    return float(adjusted_rand_score(labels, clusters))


def leaf_purity(labels: ArrayLike, clusters: ArrayLike) -> float:
    """Share of images that belong to the most frequent class of their cluster."""
    table = contingency(labels, clusters)
    return float(table.max(1).sum() / table.sum())


def dendrogram_purity(topology: Topology, leaf_index: ArrayLike, labels: ArrayLike) -> float:
    """Mean, over all pairs of images of one class, of that class's share in the subtree where the two meet.

    Exact, in O(nodes * C): the pairs of class c that meet at a node are those among its n_c images,
    less those that met in a child already. Raises ValueError if no two images share a class.
    """
    leaves, labels = _pair(leaf_index, labels)
    if leaves.min() < 0 or leaves.max() >= len(topology.leaves):
        raise ValueError(
            f"leaf indices run from {leaves.min()} to {leaves.max()}, but the tree has {len(topology.leaves)} leaves"
        )
    classes, labels = np.unique(labels, return_inverse=True)
    table = np.zeros((len(topology.leaves), len(classes)), dtype=np.int64)  # [L, C]
    np.add.at(table, (leaves, labels), 1)
    counts = dict(zip(topology.leaves, table, strict=True))
    total = pairs = 0.0
    for node in reversed(topology.top_down):  # children before parents
        children = [child for child in topology.children(node) if child is not None]
        if children:
            counts[node] = np.sum([counts[child] for child in children], axis=0)  # [C]
        here = counts[node]
        meeting = _pairs(here) - sum((_pairs(counts[child]) for child in children), np.zeros(len(classes)))
        total += float((meeting * here).sum() / max(1, here.sum()))
        pairs += float(meeting.sum())
    if not pairs:
        raise ValueError("dendrogram purity needs two images of one class, and every image here has a class of its own")
    return total / pairs


def scores(topology: Topology, leaf_index: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """All of the above for a tree whose clusters are its leaves."""
    return {
        "acc": accuracy(labels, leaf_index),
        "nmi": nmi(labels, leaf_index),
        "ari": ari(labels, leaf_index),
        "dendrogram_purity": dendrogram_purity(topology, leaf_index, labels),
        "leaf_purity": leaf_purity(labels, leaf_index),
    }


def contingency(labels: ArrayLike, clusters: ArrayLike) -> Integers:
    """How many images of each class fell into each cluster, both in ascending order: [U, C]."""
    labels, clusters = _pair(labels, clusters)
    classes, column = np.unique(labels, return_inverse=True)
    groups, row = np.unique(clusters, return_inverse=True)
    table = np.zeros((len(groups), len(classes)), dtype=np.int64)
    np.add.at(table, (row, column), 1)
    return table


def _pairs(counts: Integers) -> NDArray[np.float64]:
    """Number of unordered pairs among each count; float64 is exact up to 9e15 of them."""
    n = counts.astype(np.float64)
    return n * (n - 1) / 2


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[Integers, Integers]:
    """Both as integer vectors, checked to speak of the same images."""
    a, b = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"labels and clusters must be vectors of one length above 0, not {a.shape} and {b.shape}")
    return a, b
