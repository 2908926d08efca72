"""Protects the cluster-specificity measure: the networks' shapes, what they are shown, and entropies by hand.

That the classifier is good enough to judge with is `test_classifying.py`'s.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdiff.evaluation.classifier import (
    Classifier,
    ClassifierSpec,
    ResNet50,
    class_histograms,
    flip,
    mean_entropy,
    shift,
)

torch.set_num_threads(1)


def test_features_feed_the_logits() -> None:
    model = Classifier(1, 8, 10).eval()
    x = torch.rand(5, 1, 8, 8)
    assert model.features(x).shape == (5, 64)
    torch.testing.assert_close(model.head(model.features(x)), model(x))


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 64), (1, 5)])
def test_every_image_size_fits(channels: int, size: int) -> None:
    model = Classifier(channels, size, classes=8).eval()
    assert model(torch.rand(2, channels, size, size)).shape == (2, 8)
    with pytest.raises(ValueError, match="takes images of"):
        model(torch.rand(2, channels, size + 1, size))


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 72)])
def test_a_resnet50_has_the_stem_that_the_size_asks_for(channels: int, size: int) -> None:
    model = ResNet50(channels, size, classes=8).eval()
    x, maps = torch.rand(2, channels, size, size), []
    model.body.layer1.register_forward_hook(lambda module, inputs, output: maps.append(output.shape))  # type: ignore
    features = model.features(x)
    assert features.shape == (2, 2048)
    assert maps[0] == (2, 256, size, size) if size <= 64 else (2, 256, size / 4, size / 4)
    torch.testing.assert_close(model.head(features), model(x))
    with pytest.raises(ValueError, match="takes images of"):
        model(torch.rand(2, channels, size + 1, size))
    assert 23.5e6 < sum(p.numel() for p in model.parameters()) < 23.6e6  # torchvision's 25.6e6 less 992 classes


@pytest.mark.parametrize("network", ["small", "resnet50"])
def test_a_spec_builds_the_same_shapes_again(network: str) -> None:
    spec = ClassifierSpec(network, 3, 16, 5)
    assert ClassifierSpec.from_json(spec.to_json()) == spec
    one, other = spec.build(), ClassifierSpec.from_json(spec.to_json()[:-1] + ', "test_accuracy": 0.5}').build()
    other.load_state_dict(one.state_dict())
    assert type(one).__name__ == {"small": "Classifier", "resnet50": "ResNet50"}[network]
    with pytest.raises(ValueError, match="choose one of small, resnet50"):
        ClassifierSpec("vgg", 3, 16, 5)
    for text in ("{}", "[]", "no JSON", spec.to_json().replace(network, "vgg")):
        with pytest.raises(ValueError, match=r"not a classifier\.json"):
            ClassifierSpec.from_json(text)


def test_flip_mirrors_about_half_of_the_images_left_to_right() -> None:
    images = torch.rand(400, 3, 4, 5)
    found = flip(images, torch.Generator().manual_seed(0))
    mirrored = (found == images.flip(3)).flatten(1).all(1)
    as_before = (found == images).flatten(1).all(1)
    assert (mirrored ^ as_before).all()
    assert 150 < int(mirrored.sum()) < 250


def test_shift_moves_by_at_most_a_pixel() -> None:
    image = torch.zeros(200, 2, 7, 7)
    image[:, 0, 3, 3], image[:, 1, 3, 3] = 1, 2
    moved = shift(image, torch.Generator().manual_seed(0))
    assert torch.equal(moved[:, 1], 2 * moved[:, 0])  # channels move together
    assert (moved[:, 0].sum((1, 2)) == 1).all()
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in (2, 3, 4) for x in (2, 3, 4)}


def test_histograms_and_their_entropy_by_hand() -> None:
    table = class_histograms([0, 0, 1, 2, 2, 1], [0, 0, 0, 1, 1, 3], classes=3, leaves=4)
    assert table.tolist() == [[2, 1, 0], [0, 0, 2], [0, 0, 0], [0, 1, 0]]
    of_first = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    assert mean_entropy(table) == pytest.approx(of_first / 3)  # the empty leaf does not count
    assert mean_entropy(np.full((5, 8), 10)) == pytest.approx(np.log(8))
    assert mean_entropy(np.eye(4)) == 0


def test_small_leaves_do_not_count() -> None:
    table = np.array([[980, 0], [5, 5], [5, 4]])  # the second holds exactly 1%, the third less, of 999
    assert mean_entropy(table) == pytest.approx(np.log(2) / 2)
    # As many samples of every leaf: the leaves' own shares decide.
    even = np.array([[1000, 0], [500, 500]])
    assert mean_entropy(even, shares=[0.995, 0.005]) == 0
    assert mean_entropy(even, shares=[0.99, 0.01]) == pytest.approx(np.log(2) / 2)
    with pytest.raises(ValueError, match="lower minimum_share"):
        mean_entropy(np.ones((500, 2)))


def test_bad_input_gives_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match=r"prediction lies outside 0\.\.1"):
        class_histograms([2], [0], classes=2, leaves=1)
    with pytest.raises(ValueError, match=r"leaf index lies outside 0\.\.0"):
        class_histograms([1], [1], classes=2, leaves=1)
    with pytest.raises(ValueError, match="differ in length"):
        class_histograms([1, 0], [0], classes=2, leaves=1)
