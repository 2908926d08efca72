"""The shape of a tree of clusters: which nodes there are, and how they hang together.

Pure data: no tensors, no files. Node ids are given in order of creation (root 0; its children 1 and
2; each split adds the next two) and never reused or renumbered, so that `nodes.ID` names the same
network in every phase of a run. A tree is never changed: `split` and `prune` return a new one.

Legend: L leaves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Literal

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Node:
    """One node. `phase` made it; `samples` is the reach mass of the training set in it (None: not measured)."""

    id: int
    parent: int | None
    side: Side | None
    depth: int
    phase: str
    samples: float | None = None


@dataclass(frozen=True)
class Topology:
    """A binary tree whose inner nodes have one child (after pruning) or two.

    nodes: ordered by id, which orders parents before children. next_id: the id the next split takes.
    """

    nodes: tuple[Node, ...]
    next_id: int

    @staticmethod
    def root_with_two_leaves(phase: str) -> Topology:
        """The tree every run starts from."""
        return Topology((Node(0, None, None, 0, phase),), 1).split(0, phase)

    @cached_property
    def _by_id(self) -> dict[int, Node]:
        return {node.id: node for node in self.nodes}

    @cached_property
    def _children(self) -> dict[int, tuple[int | None, int | None]]:
        found: dict[int, list[int | None]] = {node.id: [None, None] for node in self.nodes}
        for node in self.nodes:
            if node.parent is not None:
                found[node.parent][0 if node.side == "left" else 1] = node.id
        return {node: (left, right) for node, (left, right) in found.items()}

    def __contains__(self, node: int) -> bool:
        return node in self._by_id

    def __getitem__(self, node: int) -> Node:
        return self._by_id[node]

    def children(self, node: int) -> tuple[int | None, int | None]:
        """(left, right) of a node; None where there is no child."""
        return self._children[node]

    def is_leaf(self, node: int) -> bool:
        return self._children[node] == (None, None)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Leaf ids from left to right: position in this tuple is the leaf's index."""
        return tuple(self._leaves_below(0))

    def _leaves_below(self, node: int) -> Iterator[int]:
        if self.is_leaf(node):
            yield node
        for child in self.children(node):
            if child is not None:
                yield from self._leaves_below(child)

    def leaves_below(self, node: int) -> tuple[int, ...]:
        """Leaves of the subtree at `node`, left to right (the node itself if it is a leaf)."""
        return tuple(self._leaves_below(node))

    @cached_property
    def inner(self) -> tuple[int, ...]:
        """Ids of the nodes that are not leaves, in order of id."""
        return tuple(node.id for node in self.nodes if not self.is_leaf(node.id))

    @cached_property
    def deciding(self) -> tuple[int, ...]:
        """Ids of the nodes with two children: those that have routers."""
        return tuple(node for node in self.inner if None not in self.children(node))

    @cached_property
    def choosing(self) -> tuple[int, ...]:
        """The same breadth first."""
        return tuple(node for node in self.top_down if node in self.deciding)

    def path(self, node: int) -> tuple[int, ...]:
        """Ids from the root to `node`, both included."""
        parent = self[node].parent
        return (node,) if parent is None else (*self.path(parent), node)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Ids of every depth from the root down, left before right."""
        levels: list[tuple[int, ...]] = [(0,)]
        while below := tuple(child for node in levels[-1] for child in self.children(node) if child is not None):
            levels.append(below)
        return tuple(levels)

    @cached_property
    def top_down(self) -> tuple[int, ...]:
        """All ids breadth first, left before right: parents before children."""
        return tuple(node for level in self.levels for node in level)

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return max(node.depth for node in self.nodes)

    def split(self, leaf: int, phase: str) -> Topology:
        """The tree with two new leaves below `leaf`. Raises ValueError if `leaf` is none."""
        if leaf not in self or not self.is_leaf(leaf):
            raise ValueError(f"node {leaf} is not a leaf of this tree; its leaves are {list(self.leaves)}")
        depth = self[leaf].depth + 1
        new = (Node(self.next_id, leaf, "left", depth, phase), Node(self.next_id + 1, leaf, "right", depth, phase))
        return Topology(self.nodes + new, self.next_id + 2)

    def prune(self, leaf: int) -> Topology:
        """The tree without `leaf` and without every inner node that this leaves childless.

        Raises ValueError if `leaf` is no leaf, or the last one.
        """
        if leaf not in self or not self.is_leaf(leaf):
            raise ValueError(f"node {leaf} is not a leaf of this tree; its leaves are {list(self.leaves)}")
        if len(self.leaves) == 1:
            raise ValueError(f"leaf {leaf} is the last one: a tree keeps at least one leaf")
        gone, node = {leaf}, self[leaf].parent
        while node is not None and all(child in gone for child in self.children(node) if child is not None):
            gone.add(node)
            node = self[node].parent
        return Topology(tuple(n for n in self.nodes if n.id not in gone), self.next_id)

    def with_samples(self, samples: dict[int, float]) -> Topology:
        """The same tree with the reach mass of each node noted."""
        return replace(self, nodes=tuple(replace(n, samples=samples.get(n.id, n.samples)) for n in self.nodes))

    def to_json(self) -> str:
        nodes = ",\n    ".join(json.dumps(asdict(node)) for node in self.nodes)
        return f'{{\n  "next_id": {self.next_id},\n  "nodes": [\n    {nodes}\n  ]\n}}\n'

    @staticmethod
    def from_json(text: str) -> Topology:
        """Reads `to_json`'s text. Raises ValueError if it does not describe a tree."""
        try:
            raw = json.loads(text)
            topology = Topology(tuple(Node(**node) for node in raw["nodes"]), int(raw["next_id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a tree.json: {error}") from error
        last, depths = -1, dict[int, int]()
        taken: set[tuple[int, str]] = set()
        for node in topology.nodes:
            if type(node.id) is not int or type(node.parent) not in (int, type(None)) or node.id <= last:
                raise ValueError(f"not a tree.json: ids must be whole numbers in ascending order, not {node.id!r}")
            last = node.id
            root = node.id == 0
            place = (node.parent if node.parent is not None else -1, str(node.side))
            if (
                place in taken
                or node.id >= topology.next_id
                or root != (node.parent is None)
                or root != (node.side is None)
                or (not root and (node.parent not in depths or node.side not in ("left", "right")))
                or node.depth != (0 if root else depths[place[0]] + 1)
            ):
                raise ValueError(f"not a tree.json: node {node.id} does not hang in the tree")
            depths[node.id] = node.depth
            taken.add(place)
        if not depths:
            raise ValueError("not a tree.json: it has no nodes")
        return topology
