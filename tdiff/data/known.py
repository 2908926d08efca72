"""The data sets that go by a name: where their files are, or where they are downloaded from."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tdiff.data.images import Shape
from tdiff.data.originals import READERS
from tdiff.data.sources import Source, digits
from tdiff.errors import ConfigError, DataError

NAMES = ("digits", *READERS)

# What torchvision calls them, and the folder below its root in which it leaves their files.
DOWNLOADS = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "celeba": ("CelebA", "celeba"),
}

PUBLISHED: dict[str, tuple[int, Shape]] = {
    "digits": (1500, (1, 8, 8)),
    "mnist": (60_000, (1, 28, 28)),
    "fashion-mnist": (60_000, (1, 28, 28)),
    "cifar10": (50_000, (3, 32, 32)),
    "celeba": (162_770, (3, 64, 64)),
}
"""Training images and their shape."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has its files."""


def open_known(name: str, source_dir: str | None = None) -> Source:
    """A data set by its name, from the original files in `source_dir`; None: downloaded first, if need be.

    Raises ConfigError, or DataError naming a file that is missing or damaged.
    """
    folder = _given(name, source_dir)
    if name == "digits":
        return digits()
    return READERS[name][0](folder or _downloaded(name))


def size_of_known(name: str, source_dir: str | None = None) -> tuple[int, Shape]:
    """Training images and their shape (I, H, H), without decoding the data set or downloading it."""
    folder = _given(name, source_dir)
    if folder is not None:
        return READERS[name][1](folder)
    if name not in PUBLISHED:
        raise _no_download(name)
    return PUBLISHED[name]


def _given(name: str, source_dir: str | None) -> Path | None:
    """The folder that holds the files, if one is known."""
    if source_dir is None:
        return DEBIAN if name == "fashion-mnist" and DEBIAN.is_dir() else None
    if name == "digits":
        raise ConfigError(f"a source folder ({source_dir}) has no effect for digits, which come with scikit-learn.")
    folder = Path(source_dir).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"the source folder {source_dir} is no local folder: name the one that holds {name}'s files.")
    return folder


def _no_download(name: str) -> ConfigError:
    return ConfigError(f"{name} has no download: name the folder that holds its files with --source-dir.")


def _downloaded(name: str) -> Path:
    """Downloads a data set, unless that is done, by torchvision, with its progress bar; returns the files' folder.

    It is kept in tdiff's folder of the user's cache ($XDG_CACHE_HOME, ~/.cache).
    """
    if name not in DOWNLOADS:
        raise _no_download(name)
    from torchvision import datasets

    kind, below = DOWNLOADS[name]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdiff"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # or a server that says nothing would be waited for without end
    try:
        getattr(datasets, kind)(str(root), download=True)
    except Exception as error:  # of the network, the disk, a missing gdown, a checksum
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(
            f"{name} could not be downloaded to {root} ({reason}): copy its files here by other means and name their "
            "folder with --source-dir (data.source_dir=… in training)"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return root / below
