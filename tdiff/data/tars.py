"""A WebDataset that is there already: its shards are checked, image by image, and taken as they are.

FOLDER/x.tar …                  training images
FOLDER/{train,test}/x.tar …     the same, split; val, valid and validation count as test
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field

from tdiff import storage
from tdiff.data.decode import shard_images
from tdiff.data.folder import SPLITS, Versions, set_name
from tdiff.data.images import Shape
from tdiff.data.shards import Manifest, read_manifest
from tdiff.data.sources import SUFFIXES, digest_of_listing
from tdiff.data.stream import check_shards
from tdiff.errors import DataError

MOST_CLASSES = 1_000_000
"""Beyond this a label is taken for a mistake."""


@dataclass(frozen=True)
class Tars:
    """Shards below `url`, by split, in the order of their names. file_bytes: of all; listed: a digest of the list.

    classes, sha256 (by shard): what the manifest says that is there already, if one is.
    """

    name: str
    url: str
    splits: dict[str, list[str]]
    shape: Shape
    file_bytes: int
    listed: str
    classes: tuple[str, ...] | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


def tars_below(url: str, versions: Versions) -> dict[str, list[str]]:
    """The shards among the files listed, by split; none if it is no WebDataset. Raises DataError if it is unclear."""
    found: dict[str, list[str]] = {"train": [], "test": []}
    inside = [name for name in sorted(versions) if not name.startswith((".", "packing/"))]
    tops: set[str] = set()
    for name in inside:
        top, _, file = name.rpartition("/")
        if file.endswith(".tar") and (not top or top in SPLITS):
            found[SPLITS[top] if top else "train"].append(name)
            tops.add(top)
    if not tops:
        return {}
    if "" in tops and len(tops) > 1:
        raise DataError(f"SOURCE {url} holds .tar files beside its split folders: move them into one of these")
    stray = [name for name in inside if name.lower().rpartition(".")[2] in SUFFIXES]
    if stray:
        raise DataError(f"SOURCE {url} holds .tar files and also images, such as {stray[0]}: name a folder of one kind")
    if not found["train"]:
        raise DataError(f"SOURCE {url} holds .tar files for testing, but none in {url}/train: name the folder above")
    return {split: names for split, names in found.items() if names}


def existing_tars(url: str, versions: Versions) -> Tars | None:
    """The WebDataset whose files `versions` lists; None if it is none. Its first shard says its images' shape."""
    if "manifest.json" in versions and "packing/plan.json" not in versions:
        return _packed_before(url, read_manifest(url))
    splits = tars_below(url, versions)
    if not splits:
        return None
    shape = _images(storage.read_bytes(storage.join(url, splits["train"][0])), f"{url}, shard {splits['train'][0]}")[2]
    names = [name for split in sorted(splits) for name in splits[split]]
    size = sum(versions[name][0] for name in names)
    return Tars(set_name(url), url, splits, shape, size, digest_of_listing(names, versions))


def _packed_before(url: str, manifest: Manifest) -> Tars:
    """A data set that has its manifest: copied, it keeps its name and its classes."""
    shards = [shard for split in manifest.splits for shard in manifest.splits[split]]
    for split in manifest.splits:
        check_shards(url, manifest, split)
    splits = {split: [shard.name for shard in of] for split, of in manifest.splits.items()}
    size, listed = sum(shard.bytes for shard in shards), manifest.digest
    sums = {shard.name: shard.sha256 for shard in shards}
    return Tars(manifest.name, url, splits, manifest.shape, size, listed, manifest.classes, sums)


def checked_tar(url: str, name: str, shape: Shape) -> tuple[bytes, int, int | None]:
    """A shard's bytes, its samples, and its highest label (None: it has none).

    Raises DataError, naming shard and key, if anything in it is not an image of the shape with an optional label.
    """
    where = f"{url}, shard {name}"
    content = storage.read_bytes(storage.join(url, name))
    samples, highest, _ = _images(content, where, shape)
    return content, samples, highest


def _images(content: bytes, where: str, shape: Shape | None = None) -> tuple[int, int | None, Shape]:
    """How many samples a shard's bytes hold, the highest label, the shape. Raises DataError."""
    try:
        images = shard_images(content, where, shape, MOST_CLASSES)
        _check_end(content, where)
    except DataError as error:
        raise DataError(f"{error}; to mend or resize images, pack them from a folder of files, with --size") from error
    channels, height, width = images.images.shape[1:]
    return len(images), None if images.labels is None else int(images.labels.max()), (channels, height, width)


def _check_end(content: bytes, where: str) -> None:
    """Raises DataError if the tar has no end mark, as if it were cut between two samples, or goes on behind it."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        tar.getmembers()
        rest = content[tar.offset :]
    if len(rest) < 512:
        raise DataError(f"{where} is cut short: it has no end mark")
    if rest.strip(b"\0"):
        raise DataError(f"{where} goes on behind its end mark, as tars do that were joined: split it")
