"""Protects the step from a finished run to its numbers and pictures: which numbers there are, that they can be trusted
to tell good from bad, and that data without labels gives fewer of them instead of a failure.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from tdiff.data.sources import digits
from tdiff.data.stream import Images
from tdiff.figures.plots import save
from tdiff.results import table
from tdiff.tree.topology import Topology
from tdiff.work import drawing, scoring
from tdiff.work.sampling import Samples

THREE = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")  # leaves 3, 4, 2
FLAT = {"acc", "nmi", "ari", "leaf_purity"}
TREE = FLAT | {"dendrogram_purity"}


def three_digits(count: int, split: str) -> Images:
    """Images of 0, 1 and 2, `count` in all."""
    found = digits().splits[split]
    assert found.labels is not None
    ids = np.flatnonzero(found.labels < 3)[:count]
    return Images(found.images[ids], found.labels[ids])


def routed(leaves: np.ndarray, sure: float = 0.99) -> np.ndarray:
    """Routing [M, 2] of images into the leaf indices of THREE."""
    left = np.full((len(leaves), 2), 0.5, np.float32)
    for row, leaf in enumerate(leaves):
        for node, child in itertools.pairwise(THREE.path(THREE.leaves[leaf])):
            left[row, THREE.deciding.index(node)] = sure if THREE[child].side == "left" else 1 - sure
    return left


def sampled(images: np.ndarray, own: np.ndarray, leaves: np.ndarray) -> Samples:
    entries: list[dict[str, object]] = [
        {"index": k, "draw": k // 3, "leaf": int(leaf), "path": [0], "reach": 0.5, "seed": 0}
        for k, leaf in enumerate(leaves)
    ]
    return Samples(images, own, entries)


@pytest.fixture(scope="module")
def splits() -> dict[str, Images]:
    return {"train": three_digits(240, "train"), "test": three_digits(60, "test")}


def unlabelled(splits: dict[str, Images]) -> dict[str, Images]:
    return {split: Images(images.images, None) for split, images in splits.items()}


# --- clustering --------------------------------------------------------------------------------------


def test_a_tree_that_finds_the_classes_scores_full_marks(splits: dict[str, Images]):
    routing = {split: routed(images.labels) for split, images in splits.items()}
    found = scoring.clustering(THREE, routing, splits, seed=0)
    assert set(found) == {"tree_train", "tree_test", "kmeans_test", "ward_test"}
    for name in ("tree_train", "tree_test"):
        assert set(found[name]) == TREE
        assert found[name] == pytest.approx(dict.fromkeys(TREE, 1.0))
    assert found["ward_test"].pop("fitted_to") == 300
    assert found["kmeans_test"].pop("fitted_to") == 240
    for name in ("kmeans_test", "ward_test"):
        assert set(found[name]) == FLAT
        assert all(0.7 < found[name][key] <= 1 for key in FLAT)  # three digits are easy


@pytest.mark.parametrize("most", [100, 40])  # of 240 training and 60 test images
def test_ward_is_fitted_to_no_more_than_memory_allows(
    splits: dict[str, Images], most: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scoring, "WARD_IMAGES", most)
    routing = {split: routed(images.labels) for split, images in splits.items()}
    found = scoring.clustering(THREE, routing, splits, seed=0)["ward_test"]
    assert found["fitted_to"] == most
    assert found["acc"] > 0.7


def test_a_tree_that_guesses_scores_little(splits: dict[str, Images]):
    rng = np.random.default_rng(0)
    routing = {split: routed(rng.integers(0, 3, len(images))) for split, images in splits.items()}
    found = scoring.clustering(THREE, routing, splits, seed=0)
    assert found["tree_train"]["nmi"] < 0.1
    assert found["tree_train"]["acc"] < 0.5


def test_clustering_is_the_same_again(splits: dict[str, Images]):
    routing = {split: routed(images.labels) for split, images in splits.items()}
    again = [scoring.clustering(THREE, routing, splits, seed=3) for _ in range(2)]
    assert again[0] == again[1]


def test_only_labelled_splits_are_scored(splits: dict[str, Images]):
    routing = {split: routed(images.labels) for split, images in splits.items()}
    assert scoring.clustering(THREE, routing, unlabelled(splits), 0) == {}
    some = {"train": splits["train"], "test": unlabelled(splits)["test"]}
    assert set(scoring.clustering(THREE, routing, some, 0)) == {"tree_train"}
    assert set(scoring.clustering(THREE, routing, {"train": splits["train"]}, 0)) == {"tree_train"}


# --- samples -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quality(splits: dict[str, Images]) -> dict[str, dict[str, float]]:
    """Of perfect samples, real images in leaves that are their classes, and of a TreeVAE that makes noise."""
    train = splits["train"]
    noise = np.random.default_rng(0).integers(0, 256, train.images.shape, dtype=np.uint8)
    return scoring.sample_quality(splits, sampled(train.images, noise, train.labels), 3, seed=0)


def test_sample_quality_has_these_numbers(quality: dict[str, dict[str, float]], splits: dict[str, Images]):
    keys = {"classifier_frechet", "classifier_confidence", "classifier_entropy"}
    assert set(quality) == {
        "samples",
        "reference",
        "classifier_test_accuracy",
        "real_test",
        "treevae",
        "treediffusion",
    }
    assert set(quality["treevae"]) == set(quality["treediffusion"]) == keys | {"classifier_histograms"}
    assert quality["samples"] == len(splits["train"])
    assert str(len(splits["train"])) in str(quality["reference"])
    numbers = [
        value
        for model in ("treevae", "treediffusion", "real_test")
        for key, value in quality[model].items()
        if key not in ("images", "classifier_histograms")
    ]
    assert all(isinstance(value, float) and np.isfinite(value) for value in numbers)


def test_sample_quality_tells_images_from_noise(quality: dict[str, dict[str, float]]):
    real, noise, test = quality["treediffusion"], quality["treevae"], quality["real_test"]
    assert quality["classifier_test_accuracy"] > 0.9
    assert real["classifier_frechet"] == pytest.approx(0, abs=1e-3)  # the reference itself
    assert 0 < test["classifier_frechet"] < 0.5 * noise["classifier_frechet"]
    assert real["classifier_confidence"] > 0.9
    assert real["classifier_entropy"] < 0.2  # every leaf holds one class
    histograms = np.array(real["classifier_histograms"])
    assert histograms.sum() == 240
    assert np.trace(histograms) > 0.9 * 240


def test_mixed_leaves_are_less_specific(quality: dict[str, dict[str, float]], splits: dict[str, Images]):
    train = splits["train"]
    mixed = sampled(train.images, train.images, np.arange(len(train)) % 3)
    found = scoring.sample_quality(splits, mixed, 3, seed=0)["treediffusion"]
    assert found["classifier_entropy"] > 0.8 * np.log(3)
    assert found["classifier_frechet"] == pytest.approx(0, abs=1e-3)  # the images are as good


def test_without_training_labels_there_are_no_numbers(splits: dict[str, Images]):
    train = splits["train"]
    samples = sampled(train.images, train.images, train.labels)
    assert scoring.sample_quality(unlabelled(splits), samples, 3, 0) == {}
    some = {"train": unlabelled(splits)["train"], "test": splits["test"]}
    assert scoring.sample_quality(some, samples, 3, 0) == {}


@pytest.mark.parametrize("labels", ["both", "none", "train only", "no test split"])
def test_the_table_shows_what_there_is(splits: dict[str, Images], labels: str):
    chosen = {
        "both": splits,
        "none": unlabelled(splits),
        "train only": {**splits, "test": unlabelled(splits)["test"]},
        "no test split": {"train": splits["train"]},
    }[labels]
    train = splits["train"]
    routing = {split: routed(images.labels) for split, images in splits.items()}
    numbers = {
        "leaves": 3,
        "clustering": scoring.clustering(THREE, routing, chosen, 0),
        "likelihood": {
            "split": "test",
            **{f"elbo{end}": value for end, value in (("", -25.5), ("_images", 60), ("_standard_error", 0.5))},
            "log_likelihood": None,
            "log_likelihood_samples": 10,
        },
        "samples": scoring.sample_quality(chosen, sampled(train.images, train.images, train.labels), 3, 0)
        if labels == "none"
        else {},
        "seconds": {"00-root": 1.0, "diffusion": 2.5},
    }
    tables = table(numbers)
    assert tables[0][0] == "3 leaves"
    for title, rows in tables:
        assert title
        assert len({len(row) for row in rows}) == 1
        assert all(isinstance(cell, str) for row in rows for cell in row)
    titles = {row[0] for row in tables[0][1]}
    assert ("TreeVAE, held-out images" in titles) == (labels == "both")
    assert ("TreeVAE, training images" in titles) == (labels != "none")
    assert tables[-1][1][-1] == ("all", "3.5")


def test_the_table_of_samples(quality: dict[str, dict[str, float]]):
    numbers = {"leaves": 3, "clustering": {}, "samples": quality, "seconds": {}}
    title, rows = table(numbers)[1]
    assert "classifier" in title
    assert "FID" not in title  # it is none
    assert [row[0] for row in rows] == ["samples", "TreeDiffusion", "TreeVAE", "60 real held-out images, for scale"]
    assert rows[3][2:] == ("", "")


# --- pictures ----------------------------------------------------------------------------------------


def picture(figure: Figure) -> bytes:
    assert isinstance(figure, Figure)
    content = save(figure)
    assert content.startswith(b"\x89PNG")
    return content


def test_every_picture_of_a_tiny_run(splits: dict[str, Images]):
    train = three_digits(30, "train")
    left, images = routed(train.labels), train.images
    leaf = [sampled(images[:4], images[:4], np.full(4, k)) for k in range(3)]
    prior = sampled(images, images[::-1], train.labels)
    draws = sampled(images[:6], images[6:12], np.arange(6) % 3)
    metrics = [{"step": k, "images": 10 * k, "loss": 1 / k} for k in (1, 2, 3)]
    picture(drawing.tree(THREE, left, train))
    picture(drawing.leaves(THREE, left, leaf))
    picture(drawing.root_draw(THREE, draws, 1))
    picture(drawing.side_by_side(train, prior))
    picture(drawing.growing_losses({"00-root": metrics, "01-split-1": metrics[:1], "02-prune": []}))
    picture(drawing.diffusion_losses(metrics))


def test_pictures_of_the_smallest_tree_with_an_empty_leaf():
    two = Topology.root_with_two_leaves("00-root")
    train = three_digits(3, "train")
    left = np.zeros((3, 1), np.float32)  # nobody goes left
    one = sampled(train.images[:1], train.images[:1], np.zeros(1, int))
    picture(drawing.tree(two, left, Images(train.images, None)))
    picture(drawing.leaves(two, left, [one, one]))
    pruned = two.prune(1)
    picture(drawing.tree(pruned, np.zeros((3, 0), np.float32), train))
    picture(drawing.leaves(pruned, np.zeros((3, 0), np.float32), [one]))


def test_pictures_of_colour():
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    leaves = np.arange(12) % 3
    picture(drawing.tree(THREE, routed(leaves), Images(images, None)))
    picture(drawing.side_by_side(Images(images, None), sampled(images, images, leaves)))


def test_leaves_are_named_by_their_place():
    assert drawing.leaf_names(THREE) == ["leaf 0", "leaf 1", "leaf 2"]
