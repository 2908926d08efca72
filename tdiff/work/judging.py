"""What an extractor sees in images, a task each on a Ray actor: images of the data, or of a shard of samples.

An extractor is a network whose features tell sets of images apart: InceptionV3, or a classifier trained on the
data set itself. Images come in fixed blocks, so that sums do not depend on who computes them.

Legend: B images of a task, K those whose features are kept, F features, C classes, I channels, H image size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdiff import storage
from tdiff.config import Config
from tdiff.data.shards import Shard
from tdiff.data.stream import Reader
from tdiff.evaluation.frechet import Moments
from tdiff.evaluation.inception import Inception
from tdiff.evaluation.nearest import nearest_training_images
from tdiff.hardware import device
from tdiff.work.classifying import load_classifier
from tdiff.work.reading import as_images, open_split
from tdiff.work.sampling import SampleJob, draw_shard, read_shard

ROWS = 50
"""Images that go through an extractor at once."""

Kind = Literal["classifier", "inception"]
DISTANCES: dict[Kind, str] = {"classifier": "classifier_frechet", "inception": "fid"}
"""What the Fréchet distance in a network's features is called: FID is the one in Inception's."""

KINDS = tuple(DISTANCES)
Member = Literal["png", "treevae.png"]


@dataclass(frozen=True)
class Extractor:
    """kind; url: where its weights lie; digest: SHA-256 of them, which names it in results and caches."""

    kind: Kind
    url: str
    digest: str

    @property
    def distance(self) -> str:
        """What the Fréchet distance in its features is called."""
        return DISTANCES[self.kind]


@dataclass(frozen=True)
class Seen:
    """What an extractor saw in images, in their order.

    moments: of all features; features: float32 [K, F], the first images'; prediction, confidence: [B], the class that a
    classifier takes each image for and its probability (empty with Inception); leaf: [B], the leaf that drew each
    sample (empty for real images).
    """

    moments: Moments
    features: NDArray[np.float32]
    prediction: NDArray[np.int64]
    confidence: NDArray[np.float64]
    leaf: NDArray[np.int64]


def see_split(
    extractor: Extractor, config: Config, data_url: str, split: str, ids: NDArray[np.int64], keep: int
) -> Seen:
    """The images `ids` of a split, the features of the first `keep` of them kept."""
    return _seen(extractor, _reader(config, data_url, split).gather(ids), keep)


def see_shard(extractor: Extractor, url: str, shard: Shard, member: Member, keep: int) -> Seen:
    """A finished shard of samples. Raises DataError if it is damaged."""
    found = read_shard(url, shard)
    leaves = np.array([int(str(entry["leaf"])) for entry in found.entries])
    return _seen(extractor, found.images if member == "png" else found.treevae, keep, leaves)


def draw_and_see(job: SampleJob, number: int, extractor: Extractor, keep: int) -> tuple[Shard, Seen]:
    """Draws a shard, and looks at it as it was written."""
    shard = draw_shard(job, number)
    return shard, see_shard(extractor, job.url, shard, "png", keep)


def nearest_of(
    config: Config, data_url: str, ids: NDArray[np.int64], queries: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each of the queries [K, I, H, H] the nearest among the training images `ids`: its id and its Euclidean
    distance over pixels in [0, 1], [K] each.
    """
    found, distance = nearest_training_images(queries / 255, _reader(config, data_url, "train").gather(ids) / 255)
    return ids[found], distance


@lru_cache(maxsize=2)
def _reader(config: Config, data_url: str, split: str) -> Reader:
    return open_split(config, data_url, split)


@lru_cache(maxsize=1)
def _network(extractor: Extractor) -> torch.nn.Module:
    """The extractor, loaded once per worker and frozen."""
    if extractor.kind == "inception":
        network: torch.nn.Module = Inception(storage.read_tensors(extractor.url))
    else:
        network = load_classifier(extractor.url)
    return network.eval().requires_grad_(False).to(device())


def _seen(extractor: Extractor, images: NDArray[np.uint8], keep: int, leaf: NDArray[np.int64] | None = None) -> Seen:
    """Of uint8 images [B, I, H, H]."""
    network, here = _network(extractor), device()
    features, logits = [], []
    with torch.no_grad():
        for first in range(0, len(images), ROWS):
            rows = images[first : first + ROWS]
            if extractor.kind == "inception":
                found = network(torch.from_numpy(rows).to(here))
            else:
                found = network.features(as_images(rows).to(here))  # type: ignore[operator]
                logits.append(network.head(found).cpu())  # type: ignore[operator]
            features.append(found.float().cpu())
    every = torch.cat(features)
    likely = _likeliest(logits)
    return Seen(
        Moments.of(every),
        every[:keep].numpy(),
        *likely,
        np.empty(0, np.int64) if leaf is None else leaf,
    )


def _likeliest(logits: list[Tensor]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The most probable class of each row and its probability."""
    if not logits:
        return np.empty(0, np.int64), np.empty(0)
    confidence, prediction = torch.cat(logits).double().softmax(1).max(1)
    return prediction.numpy(), confidence.numpy()
