"""Protects the shape of the tree: ids that name the same network for a whole run, and the orders built on them.

Leaves left to right are the cluster indices, breadth first is the node index of the condition, ids are the
names of the checkpoint's tensors: a silent change in any of them misreads every model saved before. So the
worked examples here are written out by hand, and random growing and pruning is checked against a plain model.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdiff.tree.topology import Node, Topology


@pytest.fixture
def tree() -> Topology:
    """Four leaves, as deep as 3 on the left: 0 -> 1, 2;  1 -> 3, 4;  4 -> 5, 6."""
    return Topology.root_with_two_leaves("init").split(1, "split-1").split(4, "split-2")


def one_child_chain() -> Topology:
    """0 -> 1, 2;  1 -> 3 only;  3 -> 6 only: the left side is a chain of nodes with one child each."""
    tree = Topology.root_with_two_leaves("init").split(1, "a").split(3, "b")  # 1 -> 3, 4;  3 -> 5, 6
    return tree.prune(5).prune(4)


# --- splitting ---------------------------------------------------------------------------------


def test_every_run_starts_from_a_root_with_two_leaves():
    start = Topology.root_with_two_leaves("init")
    assert start.nodes == (
        Node(0, None, None, 0, "init"),
        Node(1, 0, "left", 1, "init"),
        Node(2, 0, "right", 1, "init"),
    )
    assert (start.next_id, start.leaves, start.inner, start.deciding, start.depth) == (3, (1, 2), (0,), (0,), 1)


def test_orders_of_an_unbalanced_tree(tree):
    assert tree.leaves == (3, 5, 6, 2), "left to right, not by id or by depth"
    assert tree.top_down == (0, 1, 2, 3, 4, 5, 6)
    assert tree.inner == tree.deciding == (0, 1, 4)
    assert tree.depth == 3
    assert tree.path(6) == (0, 1, 4, 6)
    assert tree.path(0) == (0,)
    assert tree.leaves_below(1) == (3, 5, 6)
    assert tree.leaves_below(2) == (2,)
    assert tree.leaves_below(0) == tree.leaves
    assert tree.children(4) == (5, 6)
    assert tree.children(2) == (None, None)
    assert [tree[i].phase for i in (0, 3, 6)] == ["init", "split-1", "split-2"]
    assert 6 in tree
    assert 7 not in tree


def test_breadth_first_order_is_not_the_order_of_ids():
    tree = Topology.root_with_two_leaves("init").split(2, "a").split(1, "b")  # 2 -> 3, 4;  1 -> 5, 6
    assert tree.top_down == (0, 1, 2, 5, 6, 3, 4)
    assert tree.leaves == (5, 6, 3, 4)
    assert tree.inner == (0, 1, 2), "inner nodes stay in the order of ids"


def test_splitting_leaves_the_old_tree_as_it_was(tree):
    before = tree.to_json()
    grown = tree.split(2, "more")
    assert tree.to_json() == before
    assert tree.leaves == (3, 5, 6, 2), "cached orders of the old tree must not follow the new one"
    assert grown.leaves == (3, 5, 6, 7, 8)
    assert grown.nodes[: len(tree.nodes)] == tree.nodes


@pytest.mark.parametrize("node", [0, 1, 4, 7, -1])
def test_only_a_leaf_can_be_split_or_pruned(tree, node):
    with pytest.raises(ValueError, match=rf"node {node} is not a leaf.*\[3, 5, 6, 2\]"):
        tree.split(node, "x")
    with pytest.raises(ValueError, match=rf"node {node} is not a leaf.*\[3, 5, 6, 2\]"):
        tree.prune(node)


# --- pruning -----------------------------------------------------------------------------------


def test_pruning_a_leaf_leaves_its_parent_with_one_child(tree):
    pruned = tree.prune(5)
    assert pruned.children(4) == (None, 6)
    assert not pruned.is_leaf(4)
    assert pruned.leaves == (3, 6, 2)
    assert pruned.inner == (0, 1, 4), "a node that passes samples through is still an inner node"
    assert pruned.deciding == (0, 1), "but decides nothing"
    assert pruned[6] == tree[6], "the sibling keeps its depth, side and parent"


def test_pruning_the_last_child_takes_the_childless_chain_with_it():
    chain = one_child_chain()
    assert chain.path(6) == (0, 1, 3, 6)
    assert chain.deciding == (0,)
    gone = chain.prune(6)
    assert [n.id for n in gone.nodes] == [0, 2]
    assert gone.leaves == (2,)
    assert gone.children(0) == (None, 2)


def test_the_cascade_stops_at_a_node_that_has_another_child(tree):
    both = tree.prune(5).prune(6)  # 4 goes with its last child; 1 still has 3
    assert [n.id for n in both.nodes] == [0, 1, 2, 3]
    assert both.children(1) == (3, None)


def test_the_last_leaf_stays():
    last = one_child_chain().prune(2)
    assert last.leaves == (6,)
    assert last.top_down == (0, 1, 3, 6)
    with pytest.raises(ValueError, match="leaf 6 is the last one"):
        last.prune(6)


def test_ids_are_never_reused(tree):
    pruned = tree.prune(6).prune(5)  # 4, 5, 6 gone: the largest id left is 3
    assert pruned.next_id == 7
    assert pruned.split(3, "again").children(3) == (7, 8)


def test_a_leaf_below_a_one_child_node_can_be_split():
    grown = one_child_chain().split(6, "more")
    assert grown.children(6) == (7, 8)
    assert grown[7].depth == 4
    assert grown.leaves == (7, 8, 2)
    assert grown.deciding == (0, 6)


# --- tree.json ---------------------------------------------------------------------------------


def test_samples_are_noted_without_touching_the_rest(tree):
    noted = tree.with_samples({3: 12.5, 2: 0.0})
    assert [n.samples for n in noted.nodes] == [None, None, 0.0, 12.5, None, None, None]
    again = noted.with_samples({3: 1.0})
    assert (again[3].samples, again[2].samples) == (1.0, 0.0), "nodes not measured this time keep their figure"
    assert noted.leaves == tree.leaves


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.prune(5), lambda t: t.with_samples({3: 0.1, 6: 1e9})])
def test_json_round_trip(tree, make):
    made = make(tree)
    read = Topology.from_json(made.to_json())
    assert read == made
    assert read.to_json() == made.to_json()
    assert read.leaves == made.leaves


def test_json_holds_one_plain_object_per_node(tree):
    raw = json.loads(tree.to_json())
    assert raw["next_id"] == 7
    assert raw["nodes"] == [asdict(node) for node in tree.nodes]


def spoiled(change) -> str:
    raw = json.loads(Topology.root_with_two_leaves("init").split(1, "a").to_json())
    change(raw)
    return json.dumps(raw)


MALFORMED = {
    "no json": "tree!",
    "empty text": "",
    "a list": "[1, 2]",
    "null": "null",
    "no nodes at all": '{"next_id": 1, "nodes": []}',
    "next_id missing": spoiled(lambda r: r.pop("next_id")),
    "nodes missing": spoiled(lambda r: r.pop("nodes")),
    "next_id already taken": spoiled(lambda r: r.update(next_id=4)),
    "a field too many": spoiled(lambda r: r["nodes"][1].update(colour="red")),
    "a field missing": spoiled(lambda r: r["nodes"][1].pop("phase")),
    "a node that is no object": spoiled(lambda r: r["nodes"].__setitem__(1, 7)),
    "parent does not exist": spoiled(lambda r: r["nodes"][3].update(parent=9)),
    "parent is the node itself": spoiled(lambda r: r["nodes"][3].update(parent=3)),
    "parent comes later": spoiled(lambda r: r["nodes"].insert(1, r["nodes"].pop(4))),
    "the same id twice": spoiled(lambda r: r["nodes"][4].update(id=3)),
    "the same side twice": spoiled(lambda r: r["nodes"][4].update(side="left")),
    "a third side": spoiled(lambda r: r["nodes"][4].update(side="middle")),
    "no side": spoiled(lambda r: r["nodes"][4].update(side=None)),
    "wrong depth": spoiled(lambda r: r["nodes"][4].update(depth=1)),
    "root not at depth 0": spoiled(lambda r: r["nodes"][0].update(depth=1)),
    "two roots": spoiled(lambda r: r["nodes"][2].update(parent=None, side=None, depth=0)),
    "no root": spoiled(lambda r: r["nodes"].pop(0)),
    "root has a parent": spoiled(lambda r: r["nodes"][0].update(parent=2)),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_json_is_refused(text):
    with pytest.raises(ValueError, match=r"not a tree\.json"):
        Topology.from_json(text)


FOUND = {
    "next_id no number": spoiled(lambda r: r.update(next_id="many")),
    "an id that is text": spoiled(lambda r: r["nodes"][4].update(id="4")),
    "an id that is a list": spoiled(lambda r: r["nodes"][4].update(id=[4])),
    "a negative id": spoiled(lambda r: r["nodes"][4].update(id=-4)),
    "a fractional id": spoiled(lambda r: r["nodes"][4].update(id=3.5)),
    "ids out of order": spoiled(lambda r: r["nodes"].insert(3, r["nodes"].pop(4))),
    "root on a side": spoiled(lambda r: r["nodes"][0].update(side="left")),
}


@pytest.mark.parametrize("text", FOUND.values(), ids=FOUND.keys())
def test_json_whose_ids_or_sides_break_the_promises_of_topology_is_refused(text):
    with pytest.raises(ValueError, match=r"not a tree\.json"):
        Topology.from_json(text)


# --- any sequence of splits and prunes ---------------------------------------------------------


@dataclass
class Plain:
    """A node of the reference: a mutable tree, written without looking at ids."""

    id: int
    parent: Plain | None
    depth: int
    left: Plain | None = None
    right: Plain | None = None

    def leaves(self) -> list[Plain]:
        children = [c for c in (self.left, self.right) if c]
        return [leaf for c in children for leaf in c.leaves()] if children else [self]

    def all(self) -> list[Plain]:
        return [self] + [n for c in (self.left, self.right) if c for n in c.all()]


def replay(steps: list[tuple[bool, int]]) -> tuple[Topology, Plain, int]:
    """The same splits and prunes on a Topology and on the reference; also the number of ids given out."""
    tree, root, ids = Topology((Node(0, None, None, 0, "init"),), 1), Plain(0, None, 0), 1
    for is_split, choice in steps:
        leaves = root.leaves()
        leaf = leaves[choice % len(leaves)]
        if is_split:
            tree = tree.split(leaf.id, "step")
            leaf.left, leaf.right = Plain(ids, leaf, leaf.depth + 1), Plain(ids + 1, leaf, leaf.depth + 1)
            ids += 2
        elif len(leaves) > 1:
            tree = tree.prune(leaf.id)
            node: Plain | None = leaf
            while node and not (node.left or node.right):
                parent = node.parent
                if parent and parent.left is node:
                    parent.left = None
                elif parent:
                    parent.right = None
                node = parent
    return tree, root, ids


STEPS = st.lists(st.tuples(st.sampled_from([True, True, False]), st.integers(0, 50)), max_size=25)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_any_sequence_of_splits_and_prunes_agrees_with_a_plain_tree(steps):
    tree, root, ids = replay(steps)
    nodes = {n.id: n for n in root.all()}
    assert tree.next_id == ids
    assert [n.id for n in tree.nodes] == sorted(nodes), "ordered by id, so that parents come before children"
    assert tree.leaves == tuple(n.id for n in root.leaves())
    assert tree.top_down == tuple(n.id for n in sorted(root.all(), key=lambda n: n.depth)), "breadth first"
    assert tree.depth == max(n.depth for n in nodes.values())
    for i, node in nodes.items():
        assert tree.children(i) == (node.left and node.left.id, node.right and node.right.id)
        assert tree[i].parent == (node.parent and node.parent.id)
        assert tree[i].depth == node.depth
        assert tree.leaves_below(i) == tuple(n.id for n in node.leaves())
        path = tree.path(i)
        assert (path[0], path[-1], len(path)) == (0, i, node.depth + 1)
        assert all(tree[b].parent == a for a, b in itertools.pairwise(path))
    assert set(tree.inner) == set(nodes) - set(tree.leaves)
    assert len(tree.deciding) == len(tree.leaves) - 1, "a binary tree has one decision fewer than leaves"
    assert Topology.from_json(tree.to_json()) == tree
