"""A data set as WebDataset shards with a manifest.

    DEST/train/shard-000000.tar …   members KEY.png (lossless), KEY.cls, KEY.json
    DEST/test/shard-000000.tar …
    DEST/manifest.json              written last: a folder without it is not a data set

The manifest lists every shard with its samples, bytes and SHA-256, so that a damaged byte is an error
and never a silently shorter epoch. Its digest names the data set in runs and reports.

Legend: M images, I channels, H image size.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import webdataset as wds

from tdiff import storage
from tdiff.data.images import Pixels, Shape, png_bytes
from tdiff.data.sources import DamagedError, Samples
from tdiff.errors import DataError


@dataclass(frozen=True)
class Shard:
    """One tar file: its name below DEST, how many samples, how many bytes, and their SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What DEST holds. shape: (channels, height, width) of every image; classes: names, or None without labels."""

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...] | None
    splits: dict[str, tuple[Shard, ...]]

    def samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.splits[split])

    @property
    def digest(self) -> str:
        """SHA-256 over the contents of all shards and what they mean."""
        shards = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        text = json.dumps([self.name, self.shape, self.classes, shards], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> str:
        totals = {split: self.samples(split) for split in self.splits}
        return json.dumps({**asdict(self), "totals": totals, "digest": self.digest}, indent=1) + "\n"


def read_manifest(url: str) -> Manifest:
    """Reads DEST/manifest.json. Raises DataError if there is none, or it does not match itself."""
    file = storage.join(url, "manifest.json")
    try:
        raw: dict[str, Any] = json.loads(storage.read_text(file))
        splits = {split: tuple(Shard(**shard) for shard in shards) for split, shards in raw["splits"].items()}
        classes = None if raw["classes"] is None else tuple(raw["classes"])
        channels, height, width = raw["shape"]
        manifest = Manifest(raw["name"], (channels, height, width), classes, splits)
        check_manifest(manifest)
        if raw.get("totals") != {split: manifest.samples(split) for split in splits}:
            raise ValueError("its totals are not the sums of its entries")
    except FileNotFoundError as error:
        raise DataError(f"{url} is not a data set: it holds no manifest.json; make one with tdiff.pack") from error
    except IsADirectoryError as error:
        raise DataError(f"{file} is a folder; pack the data set again") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); pack the data set again") from error
    if manifest.digest != raw.get("digest"):
        raise DataError(f"{file} is damaged: its digest does not match its entries; pack the data set again")
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raises TypeError or ValueError if a manifest says what cannot be."""
    if not isinstance(manifest.name, str) or not manifest.name:
        raise TypeError("the name must be a text")
    if any(type(number) is not int or number < 1 for number in manifest.shape):
        raise TypeError("the shape must be three whole numbers")
    if manifest.classes is not None and not all(isinstance(name, str) for name in manifest.classes):
        raise TypeError("classes must be texts")
    for split, shards in manifest.splits.items():
        seen: dict[str, str] = {}
        for shard in shards:
            if type(shard.samples) is not int or type(shard.bytes) is not int or shard.samples < 1 or shard.bytes < 1:
                raise TypeError("samples and bytes must be whole numbers, 1 or more")
            if not isinstance(shard.name, str) or not isinstance(shard.sha256, str):
                raise TypeError("a shard's name and sha256 must be texts")
            # Shards are read from this place, and decoded ones are kept at the same place within the cache.
            if shard.name.startswith("/") or ".." in shard.name.split("/"):
                raise ValueError(f"the shard {shard.name} leads out of the folder")
            if (other := seen.setdefault(shard.sha256, shard.name)) != shard.name:
                raise ValueError(f"{split} has the same images twice, in {other} and {shard.name}")


def default_shard_samples(shape: Shape) -> int:
    """Images per shard where nobody chose: about 16 MiB of pixels, in whole fifties, but 50 to 5,000.

    So a shard is read in one go, decoded ones fit into memory by the dozen, and there are enough of them to mix:
    5,000 images of 28x28x1 and 32x32x3, 1,350 of 64x64x3, 50 of 512x512x3.
    """
    return max(50, min(5000, 2**24 // math.prod(shape) // 50 * 50))


def shard_bytes(part: Samples, split: str, first: int, source: str) -> tuple[bytes, list[str]]:
    """A part of a split, which begins at its image `first`, as a tar; and a message about each damaged image left out.

    An image's key is its place in the split, whatever is left out before it. Same input, same bytes. Raises DataError
    for an image that does not fit.
    """

    def image(i: int) -> Pixels | DamagedError:
        try:
            return part.image(i)
        except DamagedError as error:
            return error

    bad: list[str] = []
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, encoder=False, mtime=0) as writer, ThreadPoolExecutor(part.threads) as pool:
        images = pool.map(image, range(len(part))) if part.threads > 1 else map(image, range(len(part)))
        for i, pixels in enumerate(images):
            if isinstance(pixels, DamagedError):
                bad.append(str(pixels))
                continue
            sample: dict[str, str | bytes] = {"__key__": f"{split}-{first + i:09d}", "png": png_bytes(pixels)}
            if part.labels is not None:
                sample["cls"] = str(part.labels[i]).encode()
            about = {"source": source, "index": first + i}
            file = part.file(i)
            sample["json"] = json.dumps(about if file is None else {**about, "file": file}).encode()
            writer.write(sample)
    return buffer.getvalue(), bad
