"""What a tree's clusters are held against: clusterings of raw pixels. If k-means does as well, nothing is learnt.

Legend: M training images, K test images, P pixels. Images may come in any shape [.., ...].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

KMEANS_VALUES = 50_000_000
"""Pixel values that k-means is fitted to at most: 0.4 GB, 63,775 images of 28x28."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def kmeans(train: ArrayLike, test: ArrayLike, clusters: int, seed: int) -> tuple[Integers, Integers]:
    """Clusters of train [M, P] and of test [K, P]: the best of ten starts on train, test by the nearest centre."""
    from sklearn.cluster import KMeans  # a second of imports, which sampling does without

    fitted = KMeans(clusters, n_init=10, random_state=seed).fit(_flat(train))
    return np.asarray(fitted.labels_, dtype=np.int64), np.asarray(fitted.predict(_flat(test)), dtype=np.int64)


def kmeans_centres(images: NDArray[np.float32], clusters: int, seed: int, starts: int) -> NDArray[np.float32]:
    """Centres [clusters, P] of images [M, P]: the best of so many starts."""
    from sklearn.cluster import KMeans

    fitted = KMeans(clusters, n_init=starts, random_state=seed).fit(images.reshape(len(images), -1))
    return np.asarray(fitted.cluster_centers_, dtype=np.float32)


def ward(images: ArrayLike, clusters: int) -> Integers:
    """Clusters of images [M, P] by Ward's agglomeration.

    It cannot predict: an image it was not fitted on has no cluster. So it is fitted on everything, test
    images included, which favours it over the tree. Memory grows with M².
    """
    from sklearn.cluster import AgglomerativeClustering

    return np.asarray(AgglomerativeClustering(clusters, linkage="ward").fit_predict(_flat(images)), dtype=np.int64)


def _flat(images: ArrayLike) -> Floats:
    """[K, ...] -> [K, P]."""
    array = np.asarray(images, dtype=np.float64)
    return array.reshape(len(array), -1)
