"""What the tests of data share: images, tars and whole data sets, made byte by byte and not by the code under test."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdiff.data.shards import Manifest, Shard

CLASSES = ("a", "b", "c")


def picture(mode: str = "L", size: tuple[int, int] = (5, 5), kind: str = "png") -> bytes:
    """A black image as a file; size: width, height."""
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


def png_of(image: NDArray[np.uint8]) -> bytes:
    """uint8 [I, H, W] -> PNG."""
    out = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(out, "png", compress_level=1)
    return out.getvalue()


def tar_of(members: Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def shard_of(images: NDArray[np.uint8], labels: Sequence[int] | None = None, first: int = 0) -> bytes:
    """A tar of samples key-0, key-1, … (counted from `first`)."""
    members = []
    for i, image in enumerate(images):
        if labels is not None:
            members.append((f"key-{first + i}.cls", str(labels[i]).encode()))
        members.append((f"key-{first + i}.png", png_of(image)))
    return tar_of(members)


@dataclass(frozen=True)
class DataSet:
    """A data set in a folder, and what it holds. images: uint8 [M, I, H, W]; labels: [M] or None."""

    folder: Path
    manifest: Manifest
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None

    @property
    def url(self) -> str:
        return str(self.folder)

    def shard(self, k: int) -> Path:
        return self.folder / shard_name(k)


def shard_name(k: int) -> str:
    return f"train/shard-{k:06d}.tar"


def write_set(folder: Path, contents: Sequence[bytes], counts: Sequence[int], shape: tuple[int, int, int]) -> Manifest:
    """Writes tars and a manifest that agrees with them; counts: the samples that it promises."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    shards = []
    for k, (content, count) in enumerate(zip(contents, counts, strict=True)):
        (folder / shard_name(k)).write_bytes(content)
        shards.append(Shard(shard_name(k), count, len(content), hashlib.sha256(content).hexdigest()))
    manifest = Manifest("noise", shape, CLASSES, {"train": tuple(shards)})
    (folder / "manifest.json").write_text(manifest.to_json())
    return manifest


def make_set(
    folder: Path, counts: Sequence[int], shape: tuple[int, int, int] = (1, 5, 5), labelled: bool = True, seed: int = 0
) -> DataSet:
    """A data set of noise, `counts` images in each shard."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (sum(counts), *shape), dtype=np.uint8)
    labels = rng.integers(0, len(CLASSES), sum(counts)) if labelled else None
    firsts = [sum(counts[:k]) for k in range(len(counts))]
    contents = [
        shard_of(images[first : first + n], None if labels is None else labels[first : first + n].tolist(), first)
        for first, n in zip(firsts, counts, strict=True)
    ]
    return DataSet(folder, write_set(folder, contents, counts, shape), images, labels)
