"""How the phases read images: a split of the data by a run's config, and pixels as numbers; and where they compute.

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


def device() -> torch.device:
    """Where this process computes: its GPU, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16(on: torch.device | None = None) -> bool:
    """Whether a device (default: where this process computes) has bf16 in hardware; a GPU may also only emulate it."""
    if (on or device()).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported()


def as_images(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, I, H, H] -> float in [0, 1]."""
    return torch.from_numpy(pixels).float() / 255
