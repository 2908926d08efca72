"""Images -> clusters: where a trained TreeVAE sends images, as users hold them.

Legend: M images, B images at a time, L leaves, P nodes on the longest path, I image channels, H image size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdiff.errors import ConfigError
from tdiff.tree.growth import leaf_reach
from tdiff.tree.model import TreeSpec, TreeVAE, evaluating
from tdiff.tree.topology import Topology

BLOCK = 512
"""Images at a time. As many as when a run routes its own images: so the same ones come to the same numbers."""

ImageArray = NDArray[Any] | Tensor
"""Images by numpy or torch: uint8, or floats in [0, 1]."""


class Encoded(NamedTuple):
    """Where images come to in the tree."""

    reach: NDArray[np.float64]
    """[M, L] posterior probability of every leaf, left to right; rows sum to 1."""
    leaf: NDArray[np.int64]
    """[M] index of the most probable leaf: the cluster."""
    path: NDArray[np.int64]
    """[M, P] ids of the nodes from the root to that leaf; -1 beyond it."""


def encode(model: TreeVAE, images: ImageArray) -> Encoded:
    """The clusters of `images`, in whatever of the layouts of `arranged`.

    Computes where the model lies, `BLOCK` images at a time. Raises ConfigError for images that the model cannot take.
    """
    images = arranged(images, model.spec)
    device = next(model.parameters()).device
    left = np.zeros((len(images), len(model.topology.deciding)), np.float32)
    with evaluating(model):
        for first in range(0, len(images), BLOCK):
            block = as_floats(images[first : first + BLOCK]).to(device)
            left[first : first + BLOCK] = model.routing(block).cpu().numpy()
    reach = leaf_reach(model.topology, left)
    leaf = reach.argmax(1)
    return Encoded(reach, leaf, _paths(model.topology)[leaf])


def _paths(topology: Topology) -> NDArray[np.int64]:
    """[L, P] ids from the root to every leaf, -1 beyond it."""
    paths = np.full((len(topology.leaves), topology.depth + 1), -1, np.int64)
    for row, leaf in zip(paths, topology.leaves, strict=True):
        path = topology.path(leaf)
        row[: len(path)] = path
    return paths


def arranged(images: ImageArray, spec: TreeSpec) -> ImageArray:
    """The same images as [M, I, H, H], not copied.

    Taken are [M, I, H, H]; [M, H, H] where images are grey; [M, H, H, I] where that cannot be the first. Raises
    ConfigError for another shape, or numbers that are neither uint8 nor floats.
    """
    channels, size = spec.channels, spec.image_size
    if not isinstance(images, np.ndarray | Tensor):
        raise ConfigError(f"images are a {type(images).__name__}: take an array of numpy or torch.")
    kind = str(images.dtype).removeprefix("torch.")
    if kind not in ("uint8", "bfloat16", "float16", "float32", "float64"):
        raise ConfigError(f"images are {kind}: take uint8, or floats in [0, 1].")
    shape = tuple(images.shape[1:])
    if shape == (channels, size, size):
        return images
    if channels == 1 and shape == (size, size):
        return images[:, None]
    if shape == (size, size, channels):
        return np.moveaxis(images, 3, 1) if isinstance(images, np.ndarray) else images.movedim(3, 1)
    raise ConfigError(
        f"images have the shape {list(images.shape)}: this tree takes [M, {channels}, {size}, {size}], "
        "images first, then channels, height and width."
    )


def as_floats(images: ImageArray) -> Tensor:
    """uint8 or floats in [0, 1], [B, I, H, H] -> float32 in [0, 1]. Raises ConfigError for floats beyond that."""
    x = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images.detach()
    if x.dtype == torch.uint8:
        return x.float() / 255
    x = x.float()
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        raise ConfigError(
            f"images hold values from {float(x.min()):g} to {float(x.max()):g}: take uint8, or floats in [0, 1]."
        )
    return x
