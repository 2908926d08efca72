"""Local folders and s3:// as one. The only module that knows the difference.

A file is written whole or not at all, and a folder counts as finished when its COMPLETE marker,
written last, is there.
"""

from __future__ import annotations

import json
import os
import posixpath
import uuid
from typing import Any

import fsspec
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from tdiff.errors import DataError

COMPLETE = "COMPLETE"


def _fs(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, path = fsspec.url_to_fs(url)
    return fs, path


def join(url: str, *parts: str) -> str:
    """`url/part/…`, for local paths and s3:// alike."""
    return posixpath.join(url, *parts)


def is_local(url: str) -> bool:
    return "://" not in url


def absolute(url: str) -> str:
    """Local paths made absolute, so that every process means the same folder; URLs as they are."""
    url = url.removeprefix("file://")
    # Not by pathlib, which would swallow one slash of s3://.
    return os.path.abspath(os.path.expanduser(url)) if is_local(url) else url  # noqa: PTH100, PTH111


def exists(url: str) -> bool:
    fs, path = _fs(url)
    return bool(fs.exists(path))


def read_bytes(url: str) -> bytes:
    """Raises FileNotFoundError if there is no such file."""
    fs, path = _fs(url)
    data: bytes = fs.cat_file(path)
    return data


def read_text(url: str) -> str:
    return read_bytes(url).decode()


def read_json(url: str) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError if there is none, DataError if it is damaged."""
    try:
        value = json.loads(read_bytes(url))
    except ValueError as error:
        raise DataError(f"{url} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{url} is damaged: it holds no JSON object")
    return value


def read_tensors(url: str) -> dict[str, Tensor]:
    """A safetensors file. Raises DataError if it is missing or damaged."""
    try:
        return load(read_bytes(url))
    except FileNotFoundError as error:
        raise DataError(f"{url} is missing") from error
    except SafetensorError as error:
        raise DataError(f"{url} is damaged: {error}") from error


def write_bytes(url: str, data: bytes) -> None:
    """Writes a file whole or not at all: a reader sees the old bytes or the new ones, never a part.

    S3 puts are atomic by themselves; locally a temporary file is flushed to disk and renamed.
    """
    fs, path = _fs(url)
    if not is_local(url):
        fs.pipe_file(path, data)
        return
    fs.makedirs(posixpath.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        with open(temporary, "wb") as file:  # noqa: PTH123
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
        folder = os.open(posixpath.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut could forget the new name, but not one that was given later
        finally:
            os.close(folder)
    finally:
        if os.path.exists(temporary):  # noqa: PTH110
            os.unlink(temporary)  # noqa: PTH108


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode())


def listing(url: str) -> list[str]:
    """Names in a folder, sorted; empty if there is no such folder."""
    fs, path = _fs(url)
    fs.invalidate_cache(path)
    if not fs.isdir(path):
        return []
    return sorted(posixpath.basename(name.rstrip("/")) for name in fs.ls(path, detail=False))


def remove(url: str) -> None:
    """Removes a file or a folder with all it holds; nothing happens if it is not there."""
    fs, path = _fs(url)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def finish(url: str) -> None:
    """Marks a folder as complete."""
    write_text(join(url, COMPLETE), "")


def finished(url: str) -> bool:
    """Whether a folder was marked as complete."""
    return exists(join(url, COMPLETE))
