"""The reader: shards, checked and decoded, as arrays.

A shard is read whole and compared with the manifest's size and checksum before a single member is
decoded. Decoders are named explicitly (PNG, integer label); nothing here can unpickle.

Legend: M images, I channels, H image size.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from tdiff import storage
from tdiff.data.images import decoded
from tdiff.data.shards import Manifest, Shard
from tdiff.errors import DataError


@dataclass(frozen=True)
class Images:
    """A decoded split in manifest order. images: uint8 [M, I, H, H]; labels: int64 [M] or None."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images)


def read_shard(url: str, shard: Shard, shape: tuple[int, int, int]) -> Images:
    """The images of one shard. Raises DataError naming shard and key."""
    try:
        content = storage.read_bytes(storage.join(url, shard.name))
    except FileNotFoundError as error:
        raise DataError(f"{url}: shard {shard.name} is missing, though manifest.json lists it") from error
    if len(content) != shard.bytes or hashlib.sha256(content).hexdigest() != shard.sha256:
        raise DataError(
            f"{url}: shard {shard.name} is damaged ({len(content)} bytes, manifest.json says {shard.bytes} "
            f"with SHA-256 {shard.sha256[:12]}…): copy or pack it again"
        )
    files = tar_file_expander([{"url": shard.name, "stream": io.BytesIO(content)}])
    try:
        samples = list(group_by_keys(files))
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"{url}: shard {shard.name} is not a tar of samples ({error.args[0]})") from error
    images, labels = [], []
    for sample in samples:
        try:
            images.append(decoded(sample["png"], shape))
            if "cls" in sample:
                labels.append(int(sample["cls"]))
        except (KeyError, ValueError, OSError) as error:
            raise DataError(f"{url}: shard {shard.name}, key {sample.get('__key__')}: {error}") from error
    if not images or len(images) != shard.samples or len(labels) not in (0, len(images)):
        raise DataError(
            f"{url}: shard {shard.name} holds {len(images)} images and {len(labels)} labels, "
            f"manifest.json says {shard.samples}"
        )
    return Images(np.stack(images), np.array(labels, np.int64) if labels else None)


def read_split(url: str, manifest: Manifest, split: str) -> Images:
    """All images of a split, decoded, in manifest order."""
    parts = [read_shard(url, shard, manifest.shape) for shard in manifest.splits[split]]
    labels = [part.labels for part in parts if part.labels is not None]
    if labels and len(labels) != len(parts):
        raise DataError(f"{url}: some shards of {split} have labels and some have none")
    return Images(np.concatenate([part.images for part in parts]), np.concatenate(labels) if labels else None)
