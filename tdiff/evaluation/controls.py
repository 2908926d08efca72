"""What a run is held against: clusterings of raw pixels, and the nearest training image of every sample.

If k-means on pixels clusters as well as the tree, the tree has learnt nothing; if the samples lie on top
of training images, the diffusion model has only learnt them by heart.

Legend: M training images, K test images or samples, P pixels. Images may come in any shape [.., ...].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import AgglomerativeClustering, KMeans

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def kmeans(train: ArrayLike, test: ArrayLike, clusters: int, seed: int) -> tuple[Integers, Integers]:
    """Clusters of train [M, P] and of test [K, P]: the best of ten starts on train, test by the nearest centre."""
    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(_flat(train))
    return np.asarray(fitted.labels_, dtype=np.int64), np.asarray(fitted.predict(_flat(test)), dtype=np.int64)


def ward(images: ArrayLike, clusters: int) -> Integers:
    """Clusters of images [M, P] by Ward's agglomeration.

    It cannot predict: an image it was not fitted on has no cluster. So it is fitted on everything, test
    images included, which favours it over the tree. Memory grows with M².
    """
    return np.asarray(AgglomerativeClustering(clusters, linkage="ward").fit_predict(_flat(images)), dtype=np.int64)


def nearest_training_images(samples: ArrayLike, train: ArrayLike, block: int = 1024) -> tuple[Integers, Floats]:
    """Index [K] of each sample's nearest training image, and the Euclidean distance [K] over pixels."""
    queries, references = _flat(samples), _flat(train)
    if not len(references) or queries.shape[1:] != references.shape[1:]:
        raise ValueError(f"samples have {queries.shape[1:]} pixels, the training images are {references.shape}")
    best = np.zeros(len(queries), dtype=np.int64)
    least = np.full(len(queries), np.inf)
    for start in range(0, len(references), block):
        part = references[start : start + block]
        # |q - r|² less |q|², which does not change which r is nearest
        distance = (part**2).sum(1) - 2 * queries @ part.T  # [K, block]
        candidate = distance.argmin(1)
        value = distance[np.arange(len(queries)), candidate]
        closer = value < least
        best[closer], least[closer] = candidate[closer] + start, value[closer]
    # Once more for the winners alone, without the cancellation that makes a copy's distance not quite 0.
    return best, np.sqrt(((queries - references[best]) ** 2).sum(1))


def _flat(images: ArrayLike) -> Floats:
    """[K, ...] -> [K, P]."""
    array = np.asarray(images, dtype=np.float64)
    return array.reshape(len(array), -1)
