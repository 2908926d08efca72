"""How the phases read images: a split of the data by a run's config, and pixels as numbers.

Legend: B batch, I channels, H image size.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdiff.config import Config
from tdiff.data.cache import default_root
from tdiff.data.shards import read_manifest
from tdiff.data.stream import Reader


def open_split(config: Config, data_url: str, split: str) -> Reader:
    """The reader of a split, with this node's cache. Raises DataError or ConfigError."""
    data = config.data
    root = Path(data.cache) if data.cache else default_root()
    manifest = read_manifest(data_url)
    return Reader(data_url, manifest, split, root, int(data.cache_gb * 1e9), data.max_bad_samples)


def as_images(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, I, H, H] -> float in [0, 1]."""
    return torch.from_numpy(pixels).float() / 255
