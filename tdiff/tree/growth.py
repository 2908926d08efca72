"""The decisions of growing: which leaf to split, whose images it holds, which leaves to prune.

Pure functions of the topology and of the posterior's routing probabilities for every training image,
so that the same numbers always give the same tree. Sums run in float64.

Legend: M images, R nodes with routers, L leaves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tdiff.tree.topology import Topology

EFFECTIVE_SHARE = 0.01
"""A leaf counts (is "effective") when it holds at least this share of the total reach probability."""

CHUNK = 2**20
"""Images whose reach is computed at once: memory must not grow with their number by hundreds of bytes for each."""


def chunks(left: NDArray[np.floating]) -> Iterator[tuple[int, NDArray[np.floating]]]:
    """The rows of `left` in stretches of CHUNK, each with the number of its first."""
    return ((first, left[first : first + CHUNK]) for first in range(0, len(left), CHUNK))


def node_mass(topology: Topology, left: NDArray[np.floating]) -> dict[int, float]:
    """How many images every node holds: its reach over all of them, added up."""
    mass = dict.fromkeys(topology.top_down, 0.0)
    for _, part in chunks(left):
        for node, p in node_reach(topology, part).items():
            mass[node] += float(p.sum())
    return mass


def node_reach(topology: Topology, left: NDArray[np.floating]) -> dict[int, NDArray[np.float64]]:
    """Reach probability [M] of every node, from the probabilities of going left [M, R] at `topology.deciding`."""
    column = {node: left[:, k].astype(np.float64) for k, node in enumerate(topology.deciding)}
    reach = {0: np.ones(len(left))}
    for node in topology.top_down:
        for child, side in zip(topology.children(node), ("left", "right"), strict=True):
            if child is not None:
                p = column.get(node)
                reach[child] = reach[node] * (1.0 if p is None else p if side == "left" else 1 - p)
    return reach


def leaf_reach(topology: Topology, left: NDArray[np.floating]) -> NDArray[np.float64]:
    """Reach probability of every leaf, [M, L], leaves left to right; rows sum to 1."""
    reach = node_reach(topology, left)
    return np.stack([reach[leaf] for leaf in topology.leaves], 1)


def effective_leaves(reach: NDArray[np.float64]) -> int:
    """How many leaves hold at least 1% of the total reach probability in `reach` [M, L]."""
    return int((reach.sum(0) >= EFFECTIVE_SHARE * len(reach)).sum())


def members(reach: NDArray[np.float64], leaf: int) -> NDArray[np.int64]:
    """Rows of `reach` [M, L] that belong to leaf index `leaf`: reach >= min(1 / effective leaves, 0.5)."""
    return np.flatnonzero(reach[:, leaf] >= _least(effective_leaves(reach)))


def leaf_members(topology: Topology, left: NDArray[np.floating], leaf: int) -> NDArray[np.int64]:
    """`members` of a leaf index from [M, R], in chunks."""
    least = _least(_effective(topology, left))
    parts = (first + np.flatnonzero(leaf_reach(topology, part)[:, leaf] >= least) for first, part in chunks(left))
    return np.concatenate([np.empty(0, np.int64), *parts])


def _least(effective: int) -> float:
    """Reach from which on an image is a leaf's member."""
    return min(1 / max(effective, 1), 0.5)


def _effective(topology: Topology, left: NDArray[np.floating]) -> int:
    """`effective_leaves` from [M, R], in chunks."""
    mass = sum((leaf_reach(topology, part).sum(0) for _, part in chunks(left)), np.zeros(len(topology.leaves)))
    return int((mass >= EFFECTIVE_SHARE * len(left)).sum())


def leaf_to_split(
    topology: Topology, left: NDArray[np.floating], max_leaves: int, max_depth: int, batch: int
) -> int | None:
    """Id of the leaf to split next: most members, above the maximum depth, at least one batch of them.

    None if the tree has its `max_leaves` effective leaves, or no leaf can be split.
    """
    effective = _effective(topology, left)
    if effective >= max_leaves:
        return None
    counts = [(leaf_reach(topology, part) >= _least(effective)).sum(0) for _, part in chunks(left)]
    sizes = [int(size) for size in np.sum(counts, 0)] if counts else [0] * len(topology.leaves)
    can = [k for k, leaf in enumerate(topology.leaves) if topology[leaf].depth < max_depth and sizes[k] >= batch]
    return topology.leaves[max(can, key=lambda k: sizes[k])] if can else None


def leaves_to_prune(topology: Topology, left: NDArray[np.floating]) -> list[int]:
    """Leaf ids in the order they are to be removed.

    While some leaf is the argmax of less than 1% of the images, the smallest such leaf goes; what reached
    it goes to its sibling's side from then on.
    """
    order: list[int] = []
    while len(topology.leaves) > 1:
        column = {node: k for k, node in enumerate(topology.deciding)}
        counts = np.zeros(len(topology.leaves), np.int64)
        for _, part in chunks(left):
            counts += np.bincount(leaf_reach(topology, part).argmax(1), minlength=len(counts))
        smallest = int(counts.argmin())
        if counts[smallest] >= EFFECTIVE_SHARE * len(left):
            break
        order.append(topology.leaves[smallest])
        topology = topology.prune(topology.leaves[smallest])
        left = left[:, [column[node] for node in topology.deciding]]
    return order
