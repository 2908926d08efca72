"""A folder of images, local or s3://, as a source.

    FOLDER/a.png …                      images without labels
    FOLDER/cat/a.png FOLDER/dog/b.png   labels from the first level of sub-folders
    FOLDER/{train,test}/…               the same, split already; val, valid and validation count as test

Legend: I channels, H image size.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from tdiff import storage
from tdiff.data.sources import SUFFIXES, DamagedError, Files, Samples, Source, converted, digest_of_listing
from tdiff.data.sources import in_colour as is_in_colour
from tdiff.data.sources import opened as opened_picture
from tdiff.errors import DataError
from tdiff.seeds import permutation

SPLITS = {"train": "train"} | dict.fromkeys(("test", "val", "valid", "validation"), "test")
"""Folders at the top that are splits."""

TEST_SHARE = 0.1

Versions = dict[str, tuple[int, str]]


@dataclass(frozen=True)
class CentreSquare:
    """Cuts the largest square out of a picture's middle and resizes it, by Pillow's Lanczos filter, which antialiases.

    mode: L or RGB; size: pixels of the side; resize: whether other sizes are resized, or else refused.
    """

    mode: str
    size: int
    resize: bool

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Raises ValueError, the end of a sentence about the picture's file."""
        size = (self.size, self.size)
        picture = converted(picture, self.mode)
        if picture.size == size:
            return picture
        if not self.resize:
            width, height = picture.size
            raise ValueError(f"is {width}x{height}, others are {self.size}x{self.size}: take --size {self.size}")
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side)).resize(size, Image.Resampling.LANCZOS)


def images_below(url: str, versions: Versions) -> tuple[list[str], tuple[str, ...]]:
    """The image files among those listed, sorted, and what should be said about the others.

    Raises DataError if there are no images.
    """
    images, hidden, others = [], [], []
    for name in sorted(versions):
        if any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
            hidden.append(name)
        elif name.lower().rpartition(".")[2] in SUFFIXES:
            images.append(name)
        else:
            others.append(name)
    if not images:
        raise DataError(f"SOURCE {url} holds no images ({', '.join(SUFFIXES)}): name a folder that does")
    counts = ((hidden, "hidden"), (others, "other"))
    notes = [f"{len(names)} {kind} files skipped, such as {names[0]}" for names, kind in counts if names]
    return images, tuple(notes)


def split_of(url: str, images: list[str], test_share: float | None) -> tuple[dict[str, list[str]], bool]:
    """The files of each split, and whether folders say so; else a seeded permutation draws the test images.

    The training images are in a seeded random order, so that shards are not sorted by class. Raises DataError.
    """
    tops = {name.partition("/")[0] if "/" in name else "" for name in images}
    given = "train" in tops and all(top in SPLITS for top in tops)
    if given and len(tops) > 1:
        if test_share is not None:
            raise DataError(f"--test-share has no effect: SOURCE {url} has folders for its splits, so leave it out")
        found: dict[str, list[str]] = {"train": [], "test": []}
        for name in images:
            found[SPLITS[name.partition("/")[0]]].append(name)
        order = permutation(len(found["train"]), "pack", "folder")
        return {**found, "train": [found["train"][i] for i in order]}, True
    if "train" in tops and tops & (set(SPLITS) - {"train"}):
        stray = next(name for name in images if name.partition("/")[0] not in SPLITS)
        raise DataError(f"SOURCE {url} has folders for its splits, but {stray} lies outside: move it into one of them")
    share = TEST_SHARE if test_share is None else test_share
    order = permutation(len(images), "pack", "folder")
    # At least one image on either side, as far as there are any.
    count = min(max(round(share * len(images)), 1), len(images) - 1) if share else 0
    found = {"train": [images[i] for i in order[count:]], "test": [images[i] for i in sorted(order[:count])]}
    return {split: names for split, names in found.items() if names}, given


def class_of(name: str, split_folders: bool) -> str | None:
    """The first sub-folder, below the split's where there are such; None for a file that lies in none."""
    parts = name.split("/")[1 if split_folders else 0 :]
    return parts[0] if len(parts) > 1 else None


def first_picture(url: str, names: Sequence[str]) -> tuple[str, Image.Image]:
    """The first file that is not damaged, and its picture. Raises DataError if all are."""
    problem: DamagedError | None = None
    for name in names:
        where = storage.join(url, name)
        try:
            return where, opened_picture(storage.read_bytes(where), where)
        except DamagedError as error:
            problem = problem or error
    assert problem is not None
    raise DataError(f"all {len(names)} images are damaged, the first: {problem}") from problem


def folder_of_images(
    url: str,
    versions: Versions,
    size: int | None = None,
    mode: Literal["grey", "rgb"] | None = None,
    labels: bool = True,
    test_share: float | None = None,
) -> Source:
    """A folder whose files `versions` lists (`storage.versions`). size: side of the square, in pixels, to which images
    are cut and resized, smaller ones too (None: they all have one size); mode: None for that of the first image;
    test_share: share of the images held out where folders do not say which (None: a tenth).

    Raises DataError, naming the file, here only for what the listing and the first image tell.
    """
    images, notes = images_below(url, versions)
    splits, split_folders = split_of(url, images, test_share)
    where, picture = first_picture(url, images)
    width, height = picture.size
    if size is None and width != height:
        raise DataError(f"{where} is {width}x{height}, no square: take --size N")
    side = size or height
    pillow_mode = {None: "RGB" if is_in_colour(picture) else "L", "grey": "L", "rgb": "RGB"}[mode]
    prepare = CentreSquare(pillow_mode, side, size is not None)

    named = {name: class_of(name, split_folders) for name in images}
    classes = sorted({top for top in named.values() if top is not None})
    labelled = labels and len(classes) > 1 and None not in named.values()
    number = {name: k for k, name in enumerate(classes)}
    if labelled:
        notes += (f"labels from {len(classes)} sub-folders: {', '.join(classes[:5])}{', …' * (len(classes) > 5)}",)

    found: dict[str, Samples] = {}
    for split, names in splits.items():
        found[split] = Files(
            root=url,
            names=names,
            labels=np.array([number[named[name] or ""] for name in names], np.int64) if labelled else None,
            shape=(3 if pillow_mode == "RGB" else 1, side, side),
            prepare=prepare,
            file_bytes=sum(versions[name][0] for name in names),
            listed=digest_of_listing(names, versions),
        )
    return Source(set_name(url), found, tuple(classes) if labelled else None, notes)


def set_name(url: str) -> str:
    """A folder's own name as a data set's: of letters, digits and . _ + = - only, as runs are named after it."""
    return re.sub(r"[^\w.+=-]+", "-", posixpath.basename(url.rstrip("/"))).strip("-.") or "images"
