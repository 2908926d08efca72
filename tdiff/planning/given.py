"""What is planned for: data, machines, and the phases that grow a tree on them.

Legend: M images, S slots, W workers, L leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from tdiff.config import Config
from tdiff.data.shards import Manifest, default_shard_samples
from tdiff.estimates import Kind
from tdiff.tree.growth import EFFECTIVE_SHARE
from tdiff.work.counting import Shape
from tdiff.work.growing import Kind as PhaseKind

DEFAULT_WORKERS = 2
"""Of a config that says nothing of them, where there are so many (`tdiff.launch.crew_of`)."""

PNG_SHARE = 0.7
"""Bytes of a PNG over those of its pixels, for photographs; assumed where no manifest says it."""


@dataclass(frozen=True)
class Machines:
    """Where it is to run. workers: at most, one for each GPU (or core); per_node: of them on a node.

    memory: of a node in GB; cores: of a node; network: GB/s of a worker to other nodes; storage: GB/s that object
    storage gives a node; price: dollars an hour for each.
    """

    name: str
    kind: Kind
    workers: int
    per_node: int
    memory: float
    cores: int
    network: float
    storage: float
    price: float

    @property
    def nodes(self) -> int:
        return -(-self.workers // self.per_node)


@dataclass(frozen=True)
class Data:
    """images: for training; held_out: others; shape: (I, H, H); image_bytes: of one in a shard; shards: how many;
    classes: 0 where there are no labels.
    """

    images: int
    held_out: int
    shape: Shape
    image_bytes: float
    shards: int
    classes: int

    @staticmethod
    def of_size(images: int, held_out: int, shape: Shape, classes: int, shard_samples: int | None = None) -> Data:
        """Where there is no manifest yet: PNGs of photographs, shards as they are packed."""
        size = math.prod(shape) * PNG_SHARE + 2048  # a tar pads each of a sample's three members
        return Data(
            images, held_out, shape, size, -(-images // (shard_samples or default_shard_samples(shape))), classes
        )


def data_of(manifest: Manifest) -> Data:
    """What a plan needs to know of packed data."""
    shards = manifest.splits["train"]
    held_out = manifest.samples("test") if "test" in manifest.splits else 0
    images = manifest.samples("train")
    size = sum(shard.bytes for shard in shards) / images
    return Data(images, held_out, manifest.shape, size, len(shards), len(manifest.classes or ()))


def asked_for(config: Config) -> int:
    """How many workers a config wants at most, whatever this machine has."""
    return max(config.workers) if isinstance(config.workers, tuple) else config.workers or DEFAULT_WORKERS


# --- the tree's phases -------------------------------------------------------------------------------


class Phase(NamedTuple):
    """leaves: of the tree that trains; depth: of the leaf that is split, 0 else; images: that it trains on."""

    kind: PhaseKind
    leaves: int
    depth: int
    images: int
    epochs: int
    steps: int


def schedule(config: Config, images: int) -> list[Phase]:
    """The tree's phases as `tdiff.pipeline.next_tree_phase` has them, if every split sends half of the images each way.

    Pruning trains nothing and is left out.
    """
    tree, epochs = config.tree, config.tree.epochs

    def phase(kind: PhaseKind, of_epochs: int, depth: int = 0, count: int = images) -> Phase:
        return Phase(kind, len(sizes), depth, count, of_epochs, of_epochs * (count // tree.images_per_step))

    sizes = [(images - images // 2, 1), (images // 2, 1)]  # of each leaf: its images, its depth
    done = [phase("root", epochs.initial)]
    splits = 0
    while sum(size >= EFFECTIVE_SHARE * images for size, _ in sizes) < tree.max_leaves:
        can = [leaf for leaf in sizes if leaf[1] < tree.features - 1 and leaf[0] >= tree.images_per_step]
        if not can:
            break
        if done[-1].kind == "split" and splits % tree.refit_every == 0 and epochs.refit:
            done.append(phase("refit", epochs.refit))
        size, depth = max(can, key=lambda leaf: leaf[0])
        place = sizes.index((size, depth))
        sizes[place : place + 1] = [(size - size // 2, depth + 1), (size // 2, depth + 1)]
        done.append(phase("split", epochs.split, depth, size))
        splits += 1
    return [*done, phase("finetune", epochs.final)]
