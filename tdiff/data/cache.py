"""Decoded shards on a node's disk: mapped into memory, shared by the workers of the node, bounded in size.

    ROOT/.lock
    ROOT/SET.decoded/SHARD.safetensors      images, labels; written whole or not at all

A shard is kept while there is room and then stays: training reads all shards in turn, and for that making room by
dropping the oldest would drop each one just before it is needed. Only data sets that nobody has opened for an hour make
room for others. A cache is allowed to fail: a damaged file is made anew, a full disk only costs time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tdiff.errors import ConfigError

log = logging.getLogger(__name__)

FORGOTTEN = 3600.0
"""Seconds since a data set was last opened after which it makes room for others, and since when a part was written."""

SET = ".decoded"
"""The end of a data set's folder: nothing else that lies in ROOT is counted, or removed to make room."""

Tensors = dict[str, Tensor]


def default_root() -> Path:
    """This user's cache folder in the node's folder of temporary files."""
    return Path(tempfile.gettempdir()) / f"tdiff-cache-{os.getuid()}"


class Cache:
    """The decoded shards of one data set. limit: bytes that all data sets below `root` may take."""

    def __init__(self, root: Path, name: str, limit: int):
        self.root = root
        self.folder = root / f"{name}{SET}"
        self.limit = limit
        self._full = False
        self._touched = time.monotonic()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.stat().st_uid != os.getuid():
                raise ConfigError(f"data.cache={root} belongs to another user: take a folder of your own.")
            with self._locked():  # nobody may find the folder forgotten while it is opened
                self.folder.mkdir(exist_ok=True)
                os.utime(self.folder)
        except OSError as error:
            raise ConfigError(f"data.cache={root} cannot be used ({error}): take another folder.") from error

    def keep_alive(self) -> None:
        """Says now and then that the data set is still in use."""
        if time.monotonic() - self._touched < FORGOTTEN / 10:
            return
        self._touched = time.monotonic()
        try:
            os.utime(self.folder)
        except OSError as error:
            log.warning("%s cannot be touched (%s): other data sets may take its place", self.folder, error)

    def read(self, shard: str) -> Tensors | None:
        """A shard's tensors, mapped from the file; None if it is not kept, or damaged."""
        file = self.folder / f"{shard}.safetensors"
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
                checksums = opened.metadata()
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s) and made anew", file, error)
            _remove(file)
            return None
        if checksums != _checksums(tensors):
            log.warning("%s is damaged (its checksum differs) and made anew", file)
            _remove(file)
            return None
        return tensors

    def write(self, shard: str, tensors: Tensors) -> bool:
        """Keeps a shard's tensors if there is room for them; whether it did."""
        if self._full:
            return False
        # Not save_file, which writes beside `part`, where it is not counted and a kill leaves it for ever.
        content = save(tensors, _checksums(tensors))
        part = self.folder / f"{shard}.{uuid.uuid4().hex}.part"
        try:
            with self._locked():
                if not self._room(len(content)):
                    self._full = True
                    log.warning("data.cache=%s is full: what does not fit is read anew every epoch", self.root)
                    return False
                with part.open("wb") as file:
                    file.truncate(len(content))  # counted from now on
            with part.open("r+b") as file:
                file.write(content)
            with self._locked():  # or it could be missed where it is counted
                part.replace(self.folder / f"{shard}.safetensors")
        except OSError as error:
            self._full = True
            log.warning("data.cache=%s cannot be written (%s): what is not there is read anew every epoch", part, error)
            return False
        finally:
            _remove(part)
        return True

    def _room(self, size: int) -> bool:
        """Whether `size` more bytes are within the limit, after dropping what is forgotten if need be."""
        now = time.time()
        sets = {folder: _size(folder, now) for folder in self.root.glob(f"*{SET}")}
        forgotten = [folder for folder in sets if now - folder.stat().st_mtime > FORGOTTEN and folder != self.folder]
        for folder in sorted(forgotten, key=lambda folder: folder.stat().st_mtime):
            if sum(sets.values()) + size <= self.limit:
                break
            shutil.rmtree(folder)  # whoever has a file of it mapped keeps that
            del sets[folder]
        return sum(sets.values()) + size <= self.limit

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _size(folder: Path, now: float) -> int:
    """Bytes in a folder; parts that their writer has left behind are removed."""
    total = 0
    for entry in os.scandir(folder):
        try:
            stat = entry.stat()
        except FileNotFoundError:  # just removed by another
            continue
        if entry.name.endswith(".part") and now - stat.st_mtime > FORGOTTEN:
            _remove(Path(entry.path))
        else:
            total += stat.st_size
    return total


def _remove(file: Path) -> None:
    """Removes a file; what cannot be removed stays."""
    with suppress(OSError):
        file.unlink()


def _checksums(tensors: Tensors) -> dict[str, str]:
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {zlib.crc32(tensor.view(torch.uint8).numpy().data)}"
        for name, tensor in tensors.items()
    }
