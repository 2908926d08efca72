"""Protects the decisions of growing: whose images a leaf holds, which leaf is split, which leaves are pruned.

They decide the whole tree from a matrix of routing probabilities, so every rule of METHOD.md (stage 1,
"Growing") stands here with a matrix small enough to check by eye, and with its threshold hit exactly.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdiff.tree import growth
from tdiff.tree.growth import effective_leaves, leaf_reach, leaf_to_split, leaves_to_prune, members, node_reach
from tdiff.tree.topology import Topology

TWO = Topology.root_with_two_leaves("init")
THREE = TWO.split(1, "a")  # 0 -> 1, 2;  1 -> 3, 4: leaves 3, 4, 2
FOUR = THREE.split(2, "b")  # 2 -> 5, 6: leaves 3, 4, 5, 6


def sent(topology: Topology, leaves: list[int], sure: float = 1.0) -> np.ndarray:
    """Routing that sends image m to the leaf id `leaves[m]` with probability `sure` at every decision."""
    left = np.full((len(leaves), len(topology.deciding)), 0.5)
    for m, leaf in enumerate(leaves):
        path = topology.path(leaf)
        for node, child in itertools.pairwise(path):
            if node in topology.deciding:
                p = sure if topology[child].side == "left" else 1 - sure
                left[m, topology.deciding.index(node)] = p
    return left


def test_all_images_are_decided_on_in_chunks_as_at_once(monkeypatch: pytest.MonkeyPatch):
    """Members, masses, the leaf to split and those to prune: chunks of three images, the last one short."""
    left = np.random.default_rng(0).random((50, 3)).astype(np.float32)
    left[:, 0] *= 0.1  # so that a leaf is to be pruned
    reach = leaf_reach(FOUR, left)
    whole = {node: p.sum() for node, p in node_reach(FOUR, left).items()}
    asked = [leaf_to_split(FOUR, left, 9, 6, 2), leaves_to_prune(FOUR, left)]
    assert None not in asked
    assert asked[1] != []
    monkeypatch.setattr(growth, "CHUNK", 3)
    assert [leaf_to_split(FOUR, left, 9, 6, 2), leaves_to_prune(FOUR, left)] == asked
    assert growth.node_mass(FOUR, left) == pytest.approx(whole)
    for leaf in range(4):
        assert growth.leaf_members(FOUR, left, leaf).tolist() == members(reach, leaf).tolist()
    assert growth.leaf_members(TWO, np.zeros((0, 1)), 0).tolist() == []


# --- reach -------------------------------------------------------------------------------------


def test_reach_is_the_product_of_the_decisions():
    left = np.array([[0.9, 0.25], [0.4, 1.0]])  # at nodes 0 and 1
    reach = node_reach(THREE, left)
    np.testing.assert_allclose(reach[0], [1, 1])
    np.testing.assert_allclose(reach[1], [0.9, 0.4])
    np.testing.assert_allclose(reach[3], [0.9 * 0.25, 0.4])
    np.testing.assert_allclose(reach[4], [0.9 * 0.75, 0.0])
    np.testing.assert_allclose(leaf_reach(THREE, left), np.stack([reach[3], reach[4], reach[2]], 1))


def test_a_node_with_one_child_passes_everything_on():
    pruned = THREE.prune(3)  # 1 -> 4 only
    reach = node_reach(pruned, np.array([[0.3]]))
    assert reach[4] == reach[1] == pytest.approx(0.3)
    assert leaf_reach(TWO.prune(1), np.zeros((5, 0))).tolist() == [[1.0]] * 5


def test_reach_of_half_precision_routing_still_sums_to_one():
    left = np.random.default_rng(0).random((1000, 3)).astype(np.float16)
    np.testing.assert_allclose(leaf_reach(FOUR, left).sum(1), 1, atol=1e-15)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=12), st.integers(0, 2**31))
def test_reach_of_any_tree_agrees_with_walking_each_path(steps, seed):
    tree = TWO
    for is_split, choice in steps:
        leaf = tree.leaves[choice % len(tree.leaves)]
        tree = tree.split(leaf, "x") if is_split else tree.prune(leaf) if len(tree.leaves) > 1 else tree
    left = np.random.default_rng(seed).random((4, len(tree.deciding)))
    column = {node: k for k, node in enumerate(tree.deciding)}
    reach = leaf_reach(tree, left)
    for k, leaf in enumerate(tree.leaves):
        expected = np.ones(4)
        path = tree.path(leaf)
        for node, child in itertools.pairwise(path):
            if node in column:
                p = left[:, column[node]]
                expected = expected * (p if tree.children(node)[0] == child else 1 - p)
        np.testing.assert_allclose(reach[:, k], expected, rtol=1e-12)
    np.testing.assert_allclose(reach.sum(1), 1, rtol=1e-12)


# --- effective leaves and members --------------------------------------------------------------


def test_a_leaf_is_effective_from_one_percent_of_the_mass_on():
    reach = np.zeros((1000, 3))
    reach[:, 0] = 1
    assert effective_leaves(reach) == 1
    reach[:10, 0], reach[:10, 1] = 0, 1  # exactly 1%
    assert effective_leaves(reach) == 2
    reach[10:19, 0], reach[10:19, 2] = 0, 1  # 0.9%
    assert effective_leaves(reach) == 2


def test_effective_leaves_count_mass_not_argmax():
    reach = np.tile([0.98, 0.02], (100, 1))  # never the argmax, yet 2% of the mass
    assert effective_leaves(reach) == 2


def test_members_need_a_fair_share_of_reach():
    reach = np.array([[0.6, 0.25, 0.15, 0.0], [0.24, 0.26, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.5, 0.5]])
    assert effective_leaves(reach) == 4  # the bar is 1/4
    assert members(reach, 0).tolist() == [0, 2]
    assert members(reach, 1).tolist() == [0, 1, 2], "an image may be a member of several leaves"
    assert members(reach, 2).tolist() == [1, 2, 3]


def test_the_bar_for_members_is_never_above_one_half():
    reach = np.tile([0.6, 0.4, 0.0], (10, 1))
    assert members(reach, 0).tolist() == list(range(10))
    assert members(reach, 1).tolist() == []
    alone = np.array([[0.995, 0.005]] * 9 + [[0.5, 0.5]])
    alone[9] = [0.96, 0.04]
    assert effective_leaves(alone) == 1, "so 1 / effective leaves would be 1"
    assert len(members(alone, 0)) == 10


def test_leaves_without_mass_do_not_lower_the_bar():
    reach = np.tile([0.4, 0.6, 0.0, 0.0], (10, 1))
    assert members(reach, 0).size == 0, "two effective leaves of four: the bar is 1/2, not 1/4"


# --- which leaf to split -----------------------------------------------------------------------


def test_the_leaf_with_most_members_is_split():
    left = sent(FOUR, [3] * 30 + [4] * 20 + [5] * 40 + [6] * 10)
    assert leaf_to_split(FOUR, left, max_leaves=10, max_depth=6, batch=5) == 5


def test_the_choice_is_by_members_not_by_mass():
    # Leaf 2 holds more mass (58.5 of 100), but only 45 images reach it with one half; leaf 1 is reached by 55.
    left = np.array([[0.55]] * 55 + [[0.25]] * 45)
    assert leaf_reach(TWO, left).sum(0).argmax() == 1
    assert leaf_to_split(TWO, left, max_leaves=10, max_depth=6, batch=5) == 1


def test_a_leaf_at_the_maximum_depth_is_passed_over():
    left = sent(THREE, [3] * 50 + [4] * 30 + [2] * 20)
    assert leaf_to_split(THREE, left, 10, 3, 5) == 3
    assert leaf_to_split(THREE, left, 10, 2, 5) == 2, "3 and 4 are at depth 2 already"
    assert leaf_to_split(THREE, left, 10, 1, 5) is None


def test_a_leaf_needs_one_full_batch_of_members():
    left = sent(TWO, [1] * 60 + [2] * 40)
    assert leaf_to_split(TWO, left, 10, 6, 60) == 1
    assert leaf_to_split(TWO, left, 10, 6, 61) is None


def test_the_smaller_leaf_is_split_when_only_it_may_be():
    left = sent(THREE, [3] * 50 + [4] * 20 + [2] * 30)
    assert leaf_to_split(THREE, left, 10, 2, 30) == 2
    assert leaf_to_split(THREE, left, 10, 2, 31) is None


def test_growing_stops_at_the_wanted_number_of_effective_leaves():
    left = sent(FOUR, [3] * 30 + [4] * 20 + [5] * 40 + [6] * 10)
    assert leaf_to_split(FOUR, left, max_leaves=5, max_depth=6, batch=5) == 5
    assert leaf_to_split(FOUR, left, max_leaves=4, max_depth=6, batch=5) is None


def test_empty_leaves_do_not_count_towards_the_wanted_number():
    left = sent(FOUR, [3] * 60 + [5] * 40)  # four leaves, two effective
    assert leaf_to_split(FOUR, left, max_leaves=3, max_depth=6, batch=5) == 3


def test_equal_leaves_are_taken_left_to_right():
    left = sent(FOUR, [6] * 25 + [5] * 25 + [4] * 25 + [3] * 25)
    assert leaf_to_split(FOUR, left, 10, 6, 5) == 3


# --- which leaves to prune ---------------------------------------------------------------------


def test_nothing_is_pruned_while_every_leaf_has_one_percent_of_the_images():
    left = sent(FOUR, [3] * 1 + [4] * 33 + [5] * 33 + [6] * 33)
    assert leaves_to_prune(FOUR, left) == []


def test_the_smallest_goes_first_and_the_rest_is_recounted():
    left = sent(FOUR, [3] * 4 + [4] * 490 + [5] * 2 + [6] * 504, sure=0.99)
    assert leaves_to_prune(FOUR, left) == [5, 3]


def test_a_leaf_is_judged_by_argmax_not_by_mass():
    left = np.full((100, 1), 0.4)  # leaf 1 holds 40% of the mass and is nobody's argmax
    assert leaves_to_prune(TWO, left) == [1]


def test_the_sibling_inherits_and_is_saved_by_it():
    # Of 1000 images 6 go to leaf 5 and 7 to leaf 6: both below 1%, but 13 together.
    left = sent(FOUR, [3] * 500 + [4] * 487 + [5] * 6 + [6] * 7, sure=0.9)
    assert leaves_to_prune(FOUR, left) == [5]


def test_inherited_mass_changes_the_argmax():
    # Each image: root 0.5 / 0.5 to the sides, and on the left 0.55 to leaf 3, on the right all to leaf 5.
    left = np.tile([0.5, 0.55, 1.0], (100, 1))
    # 3 and 4 and 6 are nobody's argmax (0.275, 0.225, 0.0 against 0.5). 3 goes first (ties: leftmost), 4 then
    # has 0.5 and ties with 5: argmax takes the left one, so 5 is the empty one, and its whole side goes.
    pruned = leaves_to_prune(FOUR, left)
    assert pruned == [3, 5, 6]


def test_a_whole_empty_side_goes_with_its_inner_node():
    left = sent(FOUR, [3] * 60 + [4] * 40)
    order = leaves_to_prune(FOUR, left)
    assert sorted(order) == [5, 6]
    tree = FOUR
    for leaf in order:
        tree = tree.prune(leaf)
    assert [n.id for n in tree.nodes] == [0, 1, 3, 4]
    assert tree.deciding == (1,)


def test_columns_stay_with_their_nodes_when_an_earlier_node_stops_deciding():
    # Pruning 2 takes the root's column away; what is left must be read as node 1's decisions, not node 0's.
    left = np.column_stack([np.full(100, 0.999), np.r_[np.full(60, 0.9), np.full(40, 0.1)]])
    assert leaves_to_prune(THREE, left) == [2]


def test_the_last_leaf_is_never_removed():
    one = TWO.prune(1)
    assert leaves_to_prune(one, np.zeros((10, 0))) == []
    assert leaves_to_prune(TWO, np.ones((10, 1))) == [2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=9), st.integers(0, 2**31), st.floats(0.05, 5))
def test_after_pruning_every_leaf_has_its_share_and_nothing_more_is_pruned(splits, seed, spread):
    tree = TWO
    for choice in splits:
        tree = tree.split(tree.leaves[choice % len(tree.leaves)], "x")
    left = np.random.default_rng(seed).beta(spread, spread, (200, len(tree.deciding)))
    column = {node: k for k, node in enumerate(tree.deciding)}
    for leaf in leaves_to_prune(tree, left):
        tree = tree.prune(leaf)
    left = left[:, [column[node] for node in tree.deciding]]
    counts = np.bincount(leaf_reach(tree, left).argmax(1), minlength=len(tree.leaves))
    assert len(tree.leaves) >= 1
    assert (counts >= 2).all()
    assert leaves_to_prune(tree, left) == []
