"""Protects the clustering scores: closed forms on tables small enough to count by hand, and dendrogram purity
against the definition, pair by pair."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdiff.evaluation import clustering, controls
from tdiff.evaluation.nearest import nearest_training_images
from tdiff.tree.topology import Topology


def random_tree(rng: np.random.Generator, leaves: int, pruned: int = 0) -> Topology:
    tree = Topology.root_with_two_leaves("00-root")
    while len(tree.leaves) < leaves + pruned:
        tree = tree.split(int(rng.choice(tree.leaves)), "split")
    for _ in range(pruned):
        tree = tree.prune(int(rng.choice(tree.leaves)))
    return tree


def purity_by_pairs(tree: Topology, leaf_index: np.ndarray, labels: np.ndarray) -> float:
    """The definition: over every pair of one class, the class's share among all images below the pair's LCA."""
    found = []
    for i, j in combinations(range(len(labels)), 2):
        if labels[i] == labels[j]:
            paths = tree.path(tree.leaves[leaf_index[i]]), tree.path(tree.leaves[leaf_index[j]])
            meeting = [a for a, b in zip(*paths, strict=False) if a == b][-1]
            below = [tree.leaves.index(leaf) for leaf in tree.leaves_below(meeting)]
            found.append(np.mean(labels[np.isin(leaf_index, below)] == labels[i]))
    return float(np.mean(found))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), leaves=st.integers(2, 9), pruned=st.integers(0, 3), classes=st.integers(1, 6))
def test_dendrogram_purity_is_its_definition(seed: int, leaves: int, pruned: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, leaves, pruned)
    labels = rng.integers(0, classes, 30)  # 30 images of at most 6 classes: some pair there is
    leaf_index = rng.integers(0, leaves, 30)
    exact = clustering.dendrogram_purity(tree, leaf_index, labels)
    assert exact == pytest.approx(purity_by_pairs(tree, leaf_index, labels), rel=1e-12)


def test_dendrogram_purity_rewards_the_right_hierarchy() -> None:
    tree = Topology.root_with_two_leaves("00-root").split(1, "01-split-1").split(2, "02-split-2")  # ((0 1) (2 3))
    labels = np.repeat([0, 0, 1, 1], 50)
    assert clustering.dendrogram_purity(tree, np.repeat([0, 1, 2, 3], 50), labels) == 1
    assert clustering.dendrogram_purity(tree, np.repeat([0, 2, 1, 3], 50), labels) < 0.8
    assert clustering.leaf_purity(labels, np.repeat([0, 2, 1, 3], 50)) == 1  # which leaf purity cannot see


def test_dendrogram_purity_of_one_leaf_is_the_class_share_of_a_pair() -> None:
    tree = Topology.root_with_two_leaves("00-root")
    # 3 pairs of class 0 at purity 3/5, 1 pair of class 1 at 2/5
    assert clustering.dendrogram_purity(tree, np.zeros(5), [0, 0, 0, 1, 1]) == pytest.approx((3 * 0.6 + 0.4) / 4)


def test_dendrogram_purity_stays_exact_for_a_million_images() -> None:
    tree = random_tree(np.random.default_rng(0), 200)
    labels = np.arange(1_000_000) % 200
    assert clustering.dendrogram_purity(tree, labels, labels) == 1


def test_accuracy_matches_one_to_one() -> None:
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    clusters = [7, 7, 3, 3, 3, 3, 5, 5, 5, 9]  # 7 -> 0, 3 -> 1, 5 -> 2, and 9 is left without a class
    assert clustering.accuracy(labels, clusters) == 0.8
    assert clustering.leaf_purity(labels, clusters) == 0.9
    # Cluster 0 holds 5 of class 0 and 4 of class 1, cluster 1 holds 4 of class 0: greed gets 5, the best matching 8.
    assert clustering.accuracy([0] * 5 + [1] * 4 + [0] * 4, [0] * 9 + [1] * 4) == pytest.approx(8 / 13)


def test_flat_scores_do_not_depend_on_the_names_of_clusters() -> None:
    rng = np.random.default_rng(1)
    labels, clusters = rng.integers(0, 4, 200), rng.integers(0, 5, 200)
    renamed = np.array([30, 4, 11, 2, 8])[clusters]
    for score in (clustering.accuracy, clustering.nmi, clustering.ari, clustering.leaf_purity):
        assert score(labels, renamed) == pytest.approx(score(labels, clusters), abs=1e-12)
        assert score(labels, labels + 3) == pytest.approx(1)


def test_nmi_is_arithmetic() -> None:
    labels, clusters = [0, 0, 1, 1], [0, 0, 0, 0]
    assert clustering.nmi(labels, clusters) == 0
    # Four clusters of one image: information log 2, entropies log 2 and log 4, their mean 1.5 log 2.
    assert clustering.nmi(labels, [0, 1, 2, 3]) == pytest.approx(2 / 3)


def test_scores_gathers_all() -> None:
    tree = Topology.root_with_two_leaves("00-root")
    found = clustering.scores(tree, [0, 0, 1, 1], [5, 5, 8, 8])
    assert found == pytest.approx({"acc": 1, "nmi": 1, "ari": 1, "dendrogram_purity": 1, "leaf_purity": 1})


@pytest.mark.parametrize(
    ("leaf_index", "labels", "message"),
    [
        ([0, 2], [0, 0], "the tree has 2 leaves"),
        ([0, 1], [0, 1], "two images of one class"),
        ([0, 1, 1], [0, 1], "one length"),
        ([], [], "above 0"),
    ],
)
def test_bad_input_gives_one_clear_sentence(leaf_index: list[int], labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustering.scores(Topology.root_with_two_leaves("00-root"), leaf_index, labels)


def blobs(rng: np.random.Generator, each: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [3 * each, 1, 4, 4] around three far centres, and which one."""
    labels = np.repeat([0, 1, 2], each)
    centres = np.eye(3, 16) * 10
    return (centres[labels] + 0.1 * rng.normal(size=(3 * each, 16))).reshape(-1, 1, 4, 4), labels


def test_controls_find_what_is_plain_to_see() -> None:
    rng = np.random.default_rng(2)
    (train, y), (test, y_test) = blobs(rng, 20), blobs(rng, 5)
    clusters, predicted = controls.kmeans(train, test, 3, seed=0)
    assert clustering.accuracy(y, clusters) == clustering.accuracy(y_test, predicted) == 1
    assert clustering.accuracy(np.concatenate([y, y_test]), np.concatenate([clusters, predicted])) == 1  # same names
    assert clustering.accuracy(y, controls.ward(train, 3)) == 1
    again, _ = controls.kmeans(train, test, 3, seed=0)
    assert (again == clusters).all()


def test_nearest_training_image_by_brute_force_and_zero_for_a_copy() -> None:
    rng = np.random.default_rng(3)
    train, samples = rng.uniform(size=(50, 1, 4, 4)), rng.uniform(size=(9, 1, 4, 4))
    samples[4] = train[31]
    index, distance = nearest_training_images(samples, train, block=7)
    table = np.linalg.norm(samples.reshape(9, 1, 16) - train.reshape(1, 50, 16), axis=2)
    assert (index == table.argmin(1)).all()
    assert distance == pytest.approx(table.min(1))
    assert (index[4], distance[4]) == (31, 0.0)
