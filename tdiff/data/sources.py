"""Where images come from before they are packed: one function per data set.

Legend: M images, I channels, H image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class Split:
    """images: uint8 [M, I, H, H]; labels: int64 [M], or None where there are none."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Source:
    """A data set before packing: its splits, and its classes' names (None without labels)."""

    name: str
    splits: dict[str, Split]
    classes: tuple[str, ...] | None


def digits() -> Source:
    """The 1,797 handwritten digits, 8x8x1, that scikit-learn ships: 1,500 to train on, 297 held out.

    Held out are the last 297 of torch.randperm(1797) seeded with 0. Intensities 0..16 become 0..255.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    parts = {"train": order[:-297], "test": order[-297:]}
    splits = {name: Split(images[ids], labels[ids].astype(np.int64)) for name, ids in parts.items()}
    return Source("digits", splits, tuple(str(i) for i in range(10)))


SOURCES = {"digits": digits}
