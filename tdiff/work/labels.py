"""The labels that the controls tell in the tree's place: does its path help more than any other labels would?

    RUN/diffusion/labels.safetensors   shares, places and, of k-means, centres, as in `Labels`

Written before training begins, a function of data, tree and seed; sampling needs it beside the denoiser.

Legend: B batch, K labels, M training images, I image channels, H image size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from tdiff import storage
from tdiff.config import Config
from tdiff.data.stream import Reader
from tdiff.diffusion.condition import CLUSTERS, label_path
from tdiff.evaluation.controls import KMEANS_VALUES, kmeans_centres
from tdiff.hardware import device, one_thread
from tdiff.seeds import permutation, seed_of
from tdiff.tree.growth import leaf_reach
from tdiff.tree.model import Path
from tdiff.work.growing import DECISION_BLOCK, load_routing, load_topology
from tdiff.work.reading import as_images, open_split

FILE = "labels.safetensors"

CENTRES_TRIED = 100
"""Clusters times starts of k-means: ten starts of ten, one of a hundred, which take about as long."""


@dataclass(frozen=True)
class Labels:
    """Clusters of k-means on pixels, or leaves.

    shares: float32 [K], of the training images; places: int64 [K], what f_node is told of each label: a cluster's own
    index, a leaf's breadth-first position in the tree; centres: float32 [K, I H H], over pixels in [0, 1], of clusters.
    """

    shares: Tensor
    places: Tensor
    centres: Tensor | None = None

    def drawn(self, count: int, rng: torch.Generator) -> Tensor:
        """So many labels by their shares, [B]."""
        return torch.multinomial(self.shares, count, replacement=True, generator=rng)

    def of(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """What images [B, I, H, H] in [0, 1] are told, [B]: the cluster of the nearest centre, or a leaf drawn by the
        shares, whatever the image is.
        """
        if self.centres is None:
            return self.drawn(len(images), rng)
        return nearest_centre(images, self.centres)

    def path(self, label: Tensor) -> Path:
        """Labels [B] as the denoiser is told them."""
        return label_path(self.places[label])


def nearest_centre(images: Tensor, centres: Tensor) -> Tensor:
    """Index [B] of the nearest of the centres [K, I H H] to each of the images [B, I, H, H]."""
    return torch.cdist(images.flatten(1), centres).argmin(1)


def check(config: Config, images: int, shape: tuple[int, int, int]) -> None:
    """Raises ValueError, one sentence, where there are more clusters than images [I, H, H] to fit them to."""
    condition = config.diffusion.condition
    clusters, fitted = CLUSTERS.get(condition, 0), min(images, KMEANS_VALUES // math.prod(shape))
    if fitted < clusters:
        raise ValueError(
            f"diffusion.condition={condition} is fitted to {fitted} images, the most that it takes of this data, and "
            f"needs {clusters}: take another condition, or data of more or smaller images"
        )


def clusters_of(train: Reader, clusters: int, seed: int) -> Labels:
    """k-means on pixels, fitted to as many training images, drawn by the seed, as memory allows (KMEANS_VALUES)."""
    fitted_to = permutation(len(train), "controls", seed)[: KMEANS_VALUES // math.prod(train.manifest.shape)]
    pixels, starts = as_images(train.gather(fitted_to)).numpy(), CENTRES_TRIED // clusters
    centres = torch.from_numpy(kmeans_centres(pixels, clusters, seed_of("kmeans", seed) % 2**31, starts))
    counts = torch.zeros(clusters)
    for _, found in train.blocks(0, len(train), DECISION_BLOCK):
        counts += torch.bincount(nearest_centre(as_images(found.images), centres), minlength=clusters)
    return Labels(counts / len(train), torch.arange(clusters), centres)


def leaves_of(tree_url: str) -> Labels:
    """The most probable leaves of the training images."""
    topology = load_topology(tree_url)
    leaf = leaf_reach(topology, load_routing(tree_url, "train")).argmax(1)
    counts = np.bincount(leaf, minlength=len(topology.leaves))
    positions = [topology.top_down.index(node) for node in topology.leaves]
    return Labels(torch.from_numpy(counts / len(leaf)).float(), torch.tensor(positions))


def write_labels(url: str, config: Config, data_url: str, tree_url: str) -> None:
    """Writes the labels of a control into the diffusion model's folder, unless they are there.

    It takes minutes at most, in this process. Raises DataError.
    """
    file = storage.join(url, FILE)
    if storage.exists(file):
        return
    with one_thread():
        if clusters := CLUSTERS.get(config.diffusion.condition):
            labels = clusters_of(open_split(config, data_url, "train"), clusters, config.seed)
        else:
            labels = leaves_of(tree_url)
    tensors = {name: tensor for name, tensor in vars(labels).items() if tensor is not None}
    storage.write_bytes(file, save_tensors(tensors))


def read_labels(url: str) -> Labels:
    """The labels in a diffusion model's folder, where this process computes. Raises DataError."""
    tensors = storage.read_tensors(storage.join(url, FILE))
    return Labels(**{name: tensor.to(device()) for name, tensor in tensors.items()})
