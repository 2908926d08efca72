"""A shard's bytes -> images and labels, whoever packed it.

Decoders are named explicitly (image, whole number); nothing here can unpickle.

Legend: M images, I channels, H image size.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys

from tdiff.data.images import SUFFIXES, Pixels, Shape, decoded
from tdiff.errors import DataError

MOST_LABEL = 2**63 - 1


@dataclass(frozen=True)
class Images:
    """Decoded images. images: uint8 [M, I, H, H]; labels: int64 [M] or None."""

    images: Pixels
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return len(self.images)


def shard_images(
    content: bytes,
    where: str,
    shape: Shape | None = None,
    classes: int | None = None,
    damaged: list[str] | None = None,
) -> Images:
    """The images of a shard's bytes, in its order. shape: what every image must have (None: what the first one has);
    classes: labels must be below that (None: any that is not negative).

    Raises DataError naming `where` and the key of what is wrong; with a list `damaged`, images that are wrong are
    told there instead, and the place of each is taken by its neighbour.
    """
    found: list[Pixels | None] = []
    labels: list[int] = []
    for sample in samples_of(content, where):
        key = sample["__key__"]
        try:
            image = decoded(_image_member(sample), shape)
            label = _label(sample, classes)
        except (ValueError, OSError) as error:
            message = f"{where}, key {key}: {error}"
            if damaged is None:
                raise DataError(message) from error
            damaged.append(message)
            found.append(None)
            labels.append(-1)
            continue
        shape = shape or image.shape
        found.append(image)
        if label is not None:
            labels.append(label)
    good = [i for i, image in enumerate(found) if image is not None]
    if not good:
        raise DataError(damaged[0] if damaged else f"{where} holds no image")
    if len(labels) not in (len(found) - len(good), len(found)):
        raise DataError(f"{where}: some samples have labels and some have none")
    if len(good) < len(found):
        nearest = [min(good, key=lambda j: abs(j - i)) for i in range(len(found))]
        found = [found[j] for j in nearest]
        labels = [labels[j] for j in nearest] if len(labels) == len(found) else []
    kept = [image for image in found if image is not None]
    images = np.empty((len(kept), *kept[0].shape), np.uint8)  # or stack would keep Pillow's order, channels last
    return Images(np.stack(kept, out=images), np.array(labels, np.int64) if labels else None)


def samples_of(content: bytes, where: str) -> list[dict[str, Any]]:
    """The samples of a tar. Raises DataError if it is none, or if two samples have one key."""
    try:
        # Not WebDataset's own tar reader, which reads a stream in small pieces: this takes 3/4 of its time.
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            members = [
                {"fname": entry.name, "data": content[start:end], "__url__": where}
                for entry, start, end in _places(tar, len(content))
                if entry.isfile()
            ]
        samples = list(group_by_keys(iter(members)))
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(f"{where} is not a tar of samples ({error.args[0] if error.args else error})") from error
    keys = set()
    for sample in samples:
        if sample["__key__"] in keys:
            raise DataError(f"{where}, key {sample['__key__']}: two samples have this key")
        keys.add(sample["__key__"])
    return samples


def _places(tar: tarfile.TarFile, length: int) -> Iterator[tuple[tarfile.TarInfo, int, int]]:
    """A tar's entries and where their contents lie. Raises ValueError if that is not within the tar."""
    for entry in tar:
        end = entry.offset_data + entry.size
        # Of a negative size Python's older readers make an endless loop.
        if entry.size < 0 or (entry.isfile() and end > length):
            raise ValueError(f"{entry.name} ends beyond the file")
        yield entry, entry.offset_data, end


def _image_member(sample: dict[str, Any]) -> bytes:
    for suffix in SUFFIXES:
        if suffix in sample:
            content: bytes = sample[suffix]
            return content
    raise ValueError(f"no image: none of its members is one of {', '.join(SUFFIXES)}")


def _label(sample: dict[str, Any], classes: int | None) -> int | None:
    if "cls" not in sample:
        return None
    try:
        label = int(sample["cls"])
    except ValueError as error:
        raise ValueError(f"its label is {sample['cls'][:20]!r}, no whole number") from error
    highest = MOST_LABEL if classes is None else classes - 1
    if not 0 <= label <= highest:
        raise ValueError(f"label {label} is out of range (0 to {highest})")
    return label
