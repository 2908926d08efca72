"""Images before they are packed: splits held in memory or in files, and what reads one image of them.

A split can be cut like a list. A part of it is small and can be pickled, whatever the size of the whole: it is what
packs one shard, in this process or on a worker.

Legend: M images, I channels, H image size.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from tdiff import storage
from tdiff.data.images import FORMATS, Pixels, Shape
from tdiff.data.images import SUFFIXES as SHARD_SUFFIXES
from tdiff.errors import DataError

Labels = NDArray[np.int64] | None

SUFFIXES = (*SHARD_SUFFIXES, "bmp", "tif", "tiff")
"""Files that are taken for images; what they hold is told by their first bytes, not by these."""


class DamagedError(DataError):
    """An image file that cannot be decoded: what --max-bad-samples allows to leave out."""


class Samples(Protocol):
    """Images of a split, in order, with their labels (None: there are none)."""

    @property
    def labels(self) -> Labels: ...

    @property
    def shape(self) -> Shape:
        """(I, H, H) of every image."""

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that must be read for them; 0 where the images are held in memory."""

    @property
    def threads(self) -> int:
        """How many images are best read at a time."""

    def __len__(self) -> int: ...

    def part(self, first: int, end: int) -> Samples:
        """Those with first <= index < end."""

    def image(self, i: int) -> Pixels:
        """uint8 [I, H, H]. Raises DamagedError, or DataError if the file holds an image that does not fit."""

    def file(self, i: int) -> str | None:
        """Where the image comes from, below the source; None where it has no file of its own."""

    def fingerprint(self) -> str:
        """A digest that changes with the images, their labels, their order and their preparation."""


@dataclass(frozen=True)
class Split:
    """Images in memory. images: uint8 [M, I, H, H]; labels: int64 [M], or None where there are none."""

    images: Pixels
    labels: Labels

    file_bytes = 0
    threads = 1

    @property
    def shape(self) -> Shape:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def part(self, first: int, end: int) -> Split:
        return Split(self.images[first:end], None if self.labels is None else self.labels[first:end])

    def image(self, i: int) -> Pixels:
        image: Pixels = self.images[i]
        return image

    def file(self, i: int) -> None:
        return None

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.images.shape).encode())
        for first in range(0, len(self), 1000):  # in pieces: the array may be a view that is not contiguous
            digest.update(self.images[first : first + 1000].tobytes())
        return _with_labels(digest.hexdigest(), self.labels)


@dataclass(frozen=True)
class Files:
    """Images in files: `names` below `root`, local or s3://. prepare: a decoded picture -> one of the set's shape.

    listed: a digest over what the listing said about the files (bytes, version).
    """

    root: str
    names: Sequence[str]
    labels: Labels
    shape: Shape
    prepare: Callable[[Image.Image], Image.Image]
    file_bytes: int
    listed: str

    @property
    def threads(self) -> int:
        return 1 if storage.is_local(self.root) else 16  # an object store answers late, but to many at a time

    def __len__(self) -> int:
        return len(self.names)

    def part(self, first: int, end: int) -> Files:
        labels = None if self.labels is None else self.labels[first:end]
        return replace(self, names=self.names[first:end], labels=labels)

    def image(self, i: int) -> Pixels:
        where = storage.join(self.root, self.names[i])
        try:
            content = storage.read_bytes(where)
        except FileNotFoundError as error:
            raise DataError(f"{where} is missing, though it was there a moment ago") from error
        picture = opened(content, where)
        try:
            pixels = np.asarray(self.prepare(picture))
        except ValueError as error:
            raise DataError(f"{where} {error}") from error
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)

    def file(self, i: int) -> str:
        return self.names[i]

    def fingerprint(self) -> str:
        return _with_labels(f"{self.listed} {self.shape} {self.prepare!r}", self.labels)


@dataclass(frozen=True)
class Source:
    """A data set before packing: its splits, and its classes' names (None without labels).

    notes: what should be said aloud about how it was read.
    """

    name: str
    splits: dict[str, Samples]
    classes: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        return self.splits["train"].shape


def _with_labels(text: str, labels: Labels) -> str:
    digest = hashlib.sha256(text.encode())
    digest.update(b"none" if labels is None else np.ascontiguousarray(labels, np.int64).tobytes())
    return digest.hexdigest()


def digest_of_listing(names: Sequence[str], versions: dict[str, tuple[int, str]]) -> str:
    """SHA-256 over names, sizes and versions (of `storage.versions`), in this order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name}\0{versions[name]}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def opened(content: bytes, where: str) -> Image.Image:
    """The picture in a file's bytes, decoded, turned upright if its EXIF data says how; its mode as it is.

    Raises DamagedError where it cannot be decoded, DataError where it has more than 8 bits a channel or several frames.
    """
    try:
        picture: Image.Image = Image.open(io.BytesIO(content), formats=(*FORMATS, "BMP", "TIFF"))
        # Pillow takes 16-bit colour for 8-bit: only the decoder's argument tells.
        deep = picture.mode[0] in "IF" or any(";16" in str(tile) for tile in getattr(picture, "tile", ()))
        frames = (
            1 if getattr(picture, "format", None) == "MPO" else getattr(picture, "n_frames", 1)
        )  # MPO: a camera's JPEG with previews
        if not deep and frames == 1:
            picture = ImageOps.exif_transpose(picture)
            picture.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble on
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "it is empty" if not content else "no image begins there" if unknown else " ".join(str(error).split())
        raise DamagedError(f"{where} is damaged ({reason})") from error
    if deep:
        raise DataError(f"{where} has more than 8 bits a channel ({picture.mode}): convert it to 8 bits")
    if frames != 1:
        raise DataError(f"{where} holds {frames} pictures: save one of them as a file of its own")
    return picture


def in_colour(picture: Image.Image) -> bool:
    """Whether a picture is stored in colour; a palette counts as such, whatever its colours are."""
    return picture.mode not in ("1", "L", "LA", "La")


def converted(picture: Image.Image, mode: str) -> Image.Image:
    """To L or RGB; transparency is dropped. Raises ValueError for a colour picture where grey is wanted."""
    if mode == "L" and in_colour(picture):
        raise ValueError(f"is in colour ({picture.mode}), but the set is grey: take --mode rgb")
    if picture.mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # Pillow warns where a palette with transparency becomes RGB at once
    return picture.convert(mode)


def digits() -> Source:
    """The 1,797 handwritten digits, 8x8x1, that scikit-learn ships: 1,500 to train on, 297 held out.

    Held out are the last 297 of torch.randperm(1797) seeded with 0. Intensities 0..16 become 0..255.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).numpy()
    parts = {"train": order[:-297], "test": order[-297:]}
    splits: dict[str, Samples] = {name: Split(images[ids], labels[ids].astype(np.int64)) for name, ids in parts.items()}
    return Source("digits", splits, tuple(str(i) for i in range(10)))
