"""The nearest training image of every sample: what lies on top of one has been learnt by heart.

Legend: M training images, K samples, P pixels. Images may come in any shape [.., ...].
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


def nearest_training_images(samples: Floats, train: Floats, block: int = 1024) -> tuple[Integers, Floats]:
    """Index [K] of each sample's nearest training image, and the Euclidean distance [K] over pixels."""
    queries, references = (np.asarray(images, np.float64).reshape(len(images), -1) for images in (samples, train))
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
