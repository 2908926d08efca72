"""From a finished run to its numbers: clusters against labels, samples against real images.

Sample quality is measured in the features of a small classifier trained on the run's own labelled training
images: its numbers are called `classifier_…` everywhere, never FID.

Legend: M images, L leaves, I image channels, H image size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tdiff.data.decode import Images
from tdiff.evaluation.classifier import Classifier, class_histograms, confidence, mean_entropy, train_classifier
from tdiff.evaluation.clustering import accuracy, ari, leaf_purity, nmi, scores
from tdiff.evaluation.controls import kmeans, ward
from tdiff.evaluation.frechet import Moments, frechet_distance
from tdiff.seeds import permutation, seed_of
from tdiff.tree.growth import effective_leaves, leaf_reach
from tdiff.tree.topology import Topology
from tdiff.work.growing import Decisions
from tdiff.work.reading import as_images
from tdiff.work.sampling import Samples

KMEANS_VALUES = 50_000_000
"""Pixel values that k-means is fitted to at most: 0.4 GB, 63,775 images of 28x28."""

WARD_IMAGES = 10_000
"""Images that Ward is fitted to at most: its memory grows with their square (0.8 GB for so many)."""


def clustering(
    topology: Topology, routing: dict[str, NDArray[np.float32]], splits: dict[str, Images], seed: int
) -> dict[str, dict[str, float]]:
    """The tree's scores on every labelled split, beside k-means' and Ward's on the same images of the test split.

    k-means is fitted to the training pixels and applied to the test images; Ward, which cannot be applied to new
    images, is fitted to the test images and training images beside them. Each takes as many, drawn by the seed, as
    memory allows (KMEANS_VALUES, WARD_IMAGES). Both get the number of classes, which the tree is not told.
    """
    out: dict[str, dict[str, float]] = {}
    for split, images in splits.items():
        if images.labels is not None:
            reach = leaf_reach(topology, routing[split])
            out[f"tree_{split}"] = scores(topology, reach.argmax(1), images.labels)
    train, test = splits["train"], splits.get("test")
    if test is not None and test.labels is not None:
        classes = len(np.unique(test.labels))
        of_train = permutation(len(train), "controls", seed)
        pixels = train.images[of_train[: KMEANS_VALUES // train.images[0].size]] / 255
        _, clusters = kmeans(pixels, test.images / 255, classes, seed_of("kmeans", seed) % 2**31)
        out["kmeans_test"] = _flat_scores(test.labels, clusters) | {"fitted_to": len(pixels)}
        of_test = permutation(len(test), "controls", seed)[:WARD_IMAGES]  # images may be sorted by class
        beside, held_out = pixels[: WARD_IMAGES - len(of_test)], test.images[of_test] / 255
        clusters = ward(np.concatenate([beside, held_out]), classes)[len(beside) :]
        out["ward_test"] = _flat_scores(test.labels[of_test], clusters) | {"fitted_to": len(beside) + len(held_out)}
    return out


def progress(topology: Topology, decisions: dict[str, Decisions]) -> dict[str, float]:
    """A phase's numbers for its summary: every leaf's share of the training images (by node id), effective leaves, and
    ACC and NMI of the splits whose images have labels.
    """
    reach = leaf_reach(topology, decisions["train"].left)
    shares = zip(topology.leaves, reach.mean(0), strict=True)
    out: dict[str, float] = {f"train_share/{leaf}": float(share) for leaf, share in shares}
    out["train_effective_leaves"] = effective_leaves(reach)
    for split, (left, labels) in decisions.items():
        if labels is not None:
            clusters = leaf_reach(topology, left).argmax(1)
            out |= {f"acc_{split}": accuracy(labels, clusters), f"nmi_{split}": nmi(labels, clusters)}
    return out


def _flat_scores(labels: NDArray[np.int64], clusters: NDArray[np.int64]) -> dict[str, float]:
    return {
        "acc": accuracy(labels, clusters),
        "nmi": nmi(labels, clusters),
        "ari": ari(labels, clusters),
        "leaf_purity": leaf_purity(labels, clusters),
    }


def sample_quality(splits: dict[str, Images], samples: Samples, leaves: int, seed: int) -> dict[str, Any]:
    """Fréchet distance to the training images, confidence and class entropy per leaf of samples from the prior, and
    the classes [L, C] that the classifier sees in every leaf.

    The reference are the training images themselves, as many as there are samples, in manifest order. For
    scale, the same distance is given for the test images (real ones that no model has seen).
    """
    train, test = splits["train"], splits.get("test")
    if train.labels is None or len(np.unique(train.labels)) < 2:
        return {}
    model = train_classifier(train.images, train.labels, seed_of("classifier", seed) % 2**31)
    count = min(len(train), len(samples.images))
    reference = _moments(model, train.images[:count])
    leaf = samples.leaf
    out: dict[str, Any] = {"samples": len(samples.images), "reference": f"train, {count} images"}
    if test is not None and test.labels is not None and len(test) > 1:
        predicted = _logits(model, test.images).argmax(1).numpy()
        out["classifier_test_accuracy"] = float((predicted == test.labels).mean())
        out["real_test"] = {
            "images": len(test),
            "classifier_frechet": frechet_distance(_moments(model, test.images), reference),
        }
    for name, images in (("treevae", samples.treevae), ("treediffusion", samples.images)):
        logits = _logits(model, images)
        histograms = class_histograms(logits.argmax(1).numpy(), leaf, logits.shape[1], leaves)
        out[name] = {
            "classifier_frechet": frechet_distance(_moments(model, images), reference),
            "classifier_confidence": confidence(logits),
            "classifier_entropy": mean_entropy(histograms),
            "classifier_histograms": histograms.tolist(),
        }
    return out


def _moments(model: Classifier, images: NDArray[np.uint8]) -> Moments:
    with torch.no_grad():
        return Moments.of(model.features(as_images(images)))


def _logits(model: Classifier, images: NDArray[np.uint8]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(as_images(images))
    return logits
