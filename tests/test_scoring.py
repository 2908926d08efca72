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
from tdiff.work.drawing import Pictured, pictured
from tdiff.work.growing import Decisions
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


def clustered(
    splits: dict[str, Images], leaves: dict[str, np.ndarray] | None = None, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Scores of images that went to these leaves, or to those that are their labels."""
    sent = leaves or {split: images.labels for split, images in splits.items()}
    decisions = {split: Decisions(routed(sent[split]), images.labels) for split, images in splits.items()}
    gather = {split: images.images.__getitem__ for split, images in splits.items()}
    return scoring.clustering(THREE, decisions, gather, seed)


# --- clustering --------------------------------------------------------------------------------------


def test_a_tree_that_finds_the_classes_scores_full_marks(splits: dict[str, Images]):
    found = clustered(splits)
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
    found = clustered(splits)["ward_test"]
    assert found["fitted_to"] == most
    assert found["acc"] > 0.7


def test_a_tree_that_guesses_scores_little(splits: dict[str, Images]):
    rng = np.random.default_rng(0)
    found = clustered(splits, {split: rng.integers(0, 3, len(images)) for split, images in splits.items()})
    assert found["tree_train"]["nmi"] < 0.1
    assert found["tree_train"]["acc"] < 0.5


def test_clustering_is_the_same_again(splits: dict[str, Images]):
    again = [clustered(splits, seed=3) for _ in range(2)]
    assert again[0] == again[1]


def test_only_labelled_splits_are_scored(splits: dict[str, Images]):
    leaves = {split: images.labels for split, images in splits.items()}
    assert clustered(unlabelled(splits), leaves) == {}
    some = {"train": splits["train"], "test": unlabelled(splits)["test"]}
    assert set(clustered(some, leaves)) == {"tree_train"}
    assert set(clustered({"train": splits["train"]})) == {"tree_train"}


# --- tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["both", "none", "train only", "no test split"])
def test_the_table_shows_what_there_is(splits: dict[str, Images], labels: str):
    chosen = {
        "both": splits,
        "none": unlabelled(splits),
        "train only": {**splits, "test": unlabelled(splits)["test"]},
        "no test split": {"train": splits["train"]},
    }[labels]
    numbers = {
        "leaves": 3,
        "clustering": clustered(chosen, {split: images.labels for split, images in splits.items()}),
        "likelihood": {
            "split": "test",
            **{f"elbo{end}": value for end, value in (("", -25.5), ("_images", 60), ("_standard_error", 0.5))},
            "log_likelihood": None,
            "log_likelihood_samples": 10,
        },
        "samples": {},
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


JUDGED = {
    "reference": {"split": "train", "images": 1500},
    "draws": 1200,
    "reconstructions": 297,
    "classifier": {"network": "small", "test_accuracy": 0.951, "digest": "ab" * 32},
    "inception": {"digest": "cd" * 32},
    "treevae": {"classifier_frechet_gen": 44.25, "fid_gen": 40.0, "classifier_entropy": 0.5},
    "treediffusion": {"classifier_frechet_gen": 6.5, "classifier_frechet_gen_error": 0.25, "fid_gen": 5.0},
    "real": {"split": "test", "images": 297, "classifier_frechet_gen": 1.5, "fid_gen": 0.5},
}


def test_the_tables_of_samples():
    numbers = {"leaves": 3, "clustering": {}, "samples": JUDGED, "seconds": {}}
    (_, _), (title, rows), (fid_title, fid_rows), _ = table(numbers)
    for fact in ("1,200", "1,500 train", "297 reconstructions", "classifier", "small", "95.1%", "not FID"):
        assert fact in title
    assert rows[1][:2] == ("TreeDiffusion", "6.500 ± 0.250")
    assert rows[2][:2] == ("TreeVAE", "44.250")
    assert rows[3][:2] == ("297 real held-out images, for scale", "1.500")
    assert fid_title.startswith("FID of 1,200 draws")
    assert "cdcdcdcd" in fid_title
    assert [row[1] for row in fid_rows[1:]] == ["5.000", "40.000", "0.500"]
    for _, shown in table(numbers):
        assert len({len(row) for row in shown}) == 1


@pytest.mark.parametrize(
    ("condition", "name"),
    [("recon", "TreeVAE + Diffusion"), ("none", "Diffusion alone"), ("leaf+latent", "Diffusion, leaf+latent")],
)
def test_a_model_is_called_by_what_it_is_told(condition: str, name: str):
    near = {"images": 5, "samples": {"median": 1.0, "least": 0.5}}
    numbers = {"leaves": 3, "clustering": {}, "samples": JUDGED, "nearest": near, "seconds": {}}
    tables = table(numbers | {"condition": condition})
    assert [rows[1][0] for _, rows in tables[1:4]] == [name] * 3
    assert not any("TreeDiffusion" in cell for _, rows in tables for row in rows for cell in row)


def test_without_judges_there_is_no_table_of_samples():
    assert len(table({"leaves": 3, "clustering": {}, "samples": {}, "seconds": {}})) == 2


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
    picture(drawing.tree(THREE, left, Pictured.of(images)))
    picture(drawing.leaves(THREE, left, leaf))
    picture(drawing.leaves(THREE, left, leaf, np.arange(9).reshape(3, 3), ("a", "b", "c")))
    picture(drawing.root_draw(THREE, draws, 1))
    picture(drawing.side_by_side(images, prior))
    picture(drawing.growing_losses({"00-root": metrics, "01-split-1": metrics[:1], "02-prune": []}))
    picture(drawing.diffusion_losses(metrics))


def test_pictures_of_the_smallest_tree_with_an_empty_leaf():
    two = Topology.root_with_two_leaves("00-root")
    train = three_digits(3, "train")
    left = np.zeros((3, 1), np.float32)  # nobody goes left
    one = sampled(train.images[:1], train.images[:1], np.zeros(1, int))
    picture(drawing.tree(two, left, Pictured.of(train.images)))
    picture(drawing.leaves(two, left, [one, one]))
    pruned = two.prune(1)
    picture(drawing.tree(pruned, np.zeros((3, 0), np.float32), Pictured.of(train.images)))
    picture(drawing.leaves(pruned, np.zeros((3, 0), np.float32), [one]))


def test_pictures_of_colour():
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    leaves = np.arange(12) % 3
    picture(drawing.tree(THREE, routed(leaves), Pictured.of(images)))
    picture(drawing.side_by_side(images, sampled(images, images, leaves)))


def test_leaves_are_named_by_their_place():
    assert drawing.leaf_names(THREE) == ["leaf 0", "leaf 1", "leaf 2"]


def test_of_many_images_some_of_every_leaf_are_pictured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "PICTURED", 30)
    leaves = np.array([0] * 100 + [1] * 6 + [2] * 50)
    images = np.random.default_rng(0).integers(0, 256, (156, 1, 8, 8), dtype=np.uint8)
    shown = pictured(THREE, routed(leaves), images.__getitem__)
    assert np.bincount(leaves[shown.ids]).tolist() == [10, 6, 10]
    assert (np.diff(shown.ids) > 0).all()
    assert (shown.images == images[shown.ids]).all()
    for leaf, count in enumerate((100, 6, 50)):  # together they stand for all
        assert shown.weights[leaves[shown.ids] == leaf].sum() == pytest.approx(count)
    picture(drawing.tree(THREE, routed(leaves), shown))


def test_few_images_are_all_pictured():
    images = np.zeros((12, 1, 8, 8), np.uint8)
    shown = pictured(THREE, routed(np.arange(12) % 3), images.__getitem__)
    assert shown.ids.tolist() == list(range(12))
    assert (shown.weights == 1).all()
