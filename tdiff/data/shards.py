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
from dataclasses import asdict, dataclass
from typing import Any

import webdataset as wds

from tdiff import storage
from tdiff.data.images import png_bytes
from tdiff.data.sources import Source
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
        if any(type(shard.samples) is not int for shards in splits.values() for shard in shards):
            raise TypeError("samples must be whole numbers")
        classes = None if raw["classes"] is None else tuple(raw["classes"])
        channels, height, width = raw["shape"]
        manifest = Manifest(raw["name"], (channels, height, width), classes, splits)
    except FileNotFoundError as error:
        raise DataError(f"{url} is not a data set: it holds no manifest.json; make one with tdiff.pack") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file} is damaged ({error}); pack the data set again") from error
    if manifest.digest != raw.get("digest"):
        raise DataError(f"{file} is damaged: its digest does not match its entries; pack the data set again")
    return manifest


def pack(source: Source, url: str, shard_samples: int) -> Manifest:
    """Writes a source as shards of `shard_samples` images to DEST `url`, local or s3://. Same input, same bytes."""
    splits: dict[str, tuple[Shard, ...]] = {}
    for split, data in source.splits.items():
        shards = []
        for number, first in enumerate(range(0, len(data.images), shard_samples)):
            buffer = io.BytesIO()
            ids = range(first, min(first + shard_samples, len(data.images)))
            with wds.TarWriter(buffer, encoder=False, mtime=0) as writer:
                for i in ids:
                    sample = {"__key__": f"{split}-{i:09d}", "png": png_bytes(data.images[i])}
                    if data.labels is not None:
                        sample["cls"] = str(data.labels[i]).encode()
                    sample["json"] = json.dumps({"source": source.name, "index": i}).encode()
                    writer.write(sample)
            content = buffer.getvalue()
            name = f"{split}/shard-{number:06d}.tar"
            storage.write_bytes(storage.join(url, name), content)
            shards.append(Shard(name, len(ids), len(content), hashlib.sha256(content).hexdigest()))
        splits[split] = tuple(shards)
    channels, height, width = source.splits["train"].images.shape[1:]
    manifest = Manifest(source.name, (channels, height, width), source.classes, splits)
    storage.write_text(storage.join(url, "manifest.json"), manifest.to_json())
    return manifest
