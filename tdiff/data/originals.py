"""The data sets of the papers, read from the files in which their authors publish them.

Every reader takes the local folder that holds the files, and raises DataError naming the file that is missing or is
not what it should be. Every `…_size` says how many training images there are without decoding one.

Legend: M images, I channels, H image size.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tdiff import storage
from tdiff.data.images import Pixels, Shape
from tdiff.data.sources import Files, Samples, Source, Split, converted, digest_of_listing
from tdiff.errors import DataError
from tdiff.seeds import permutation

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def found(folder: Path, *names: str, inside: tuple[str, ...] = ()) -> Path:
    """The first of the names that is there, in the folder or in one of those `inside` it. Raises DataError."""
    for place in (folder, *(folder / name for name in inside)):
        for name in names:
            if (place / name).exists():
                return place / name
    raise DataError(f"{folder} holds no {names[0]}: name the folder that does with --source-dir")


def _check_labels(labels: NDArray[np.int64], images: int, classes: int, file: Path) -> None:
    if labels.shape != (images,):
        raise DataError(f"{file} holds {labels.size} labels for {images} images: these files do not belong together")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{file} is damaged: it holds labels outside 0 to {classes - 1}")


# --- MNIST, Fashion-MNIST ----------------------------------------------------------------------------

IDX_IMAGES, IDX_LABELS = 0x803, 0x801
MOST_IDX = 2**30
"""Bytes of an IDX file, unpacked; MNIST's largest has 47 million."""


def _open_idx(folder: Path, part: str, kind: str) -> tuple[Path, gzip.GzipFile | io.BufferedReader]:
    """An IDX file, unpacked as it is read."""
    names = tuple(f"{part}-{kind.replace('-', dash)}-ubyte" for dash in "-.")  # both spellings are about
    inside = ("raw", "MNIST/raw", "FashionMNIST/raw")
    file = found(folder, *names, *(f"{name}.gz" for name in names), inside=inside)
    return file, gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def _idx(folder: Path, part: str, kind: str, magic: int, only_header: bool = False) -> tuple[Path, Pixels, list[int]]:
    """File, data and dimensions of an IDX file. Raises DataError if it is another kind, cut short or too long."""
    path, file = _open_idx(folder, part, kind)
    count = magic & 0xFF
    try:
        with file:
            start = file.read(4 + 4 * count)
            header = np.frombuffer(start[: len(start) // 4 * 4], ">u4").tolist()
            other = header[0] if header else 0
            if other != magic:
                what = {IDX_IMAGES: "a file of images", IDX_LABELS: "a file of labels"}.get(other, "no IDX file")
                raise DataError(f"{path} is {what}, but should be {kind} (magic 0x{other:08x}, not 0x{magic:08x})")
            if len(header) != 1 + count:
                raise DataError(f"{path} is cut short within its header: copy or download it again")
            size = math.prod(header[1:])
            if size > MOST_IDX:
                raise DataError(f"{path} is damaged: it says that it holds {size} bytes, more than {MOST_IDX}")
            data = b"" if only_header else file.read(size + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({error}): copy or download it again") from error
    if not only_header and len(data) != size:
        problem = "cut short" if len(data) < size else "longer than it says"
        raise DataError(f"{path} is {problem} ({size} bytes expected behind its header): copy or download it again")
    return path, np.frombuffer(data, np.uint8), header[1:]


def idx_source(name: str, folder: Path) -> Source:
    """MNIST or Fashion-MNIST, 60,000 + 10,000 images 28x28x1, from its four IDX files, plain or .gz, in their order."""
    splits: dict[str, Samples] = {}
    for split, part in (("train", "train"), ("test", "t10k")):
        path, pixels, (count, height, width) = _idx(folder, part, "images-idx3", IDX_IMAGES)
        if (height, width) != (28, 28):
            raise DataError(f"{path} holds images of {height}x{width}, but those of {name} are 28x28")
        path, labels, _ = _idx(folder, part, "labels-idx1", IDX_LABELS)
        _check_labels(labels.astype(np.int64), count, 10, path)
        splits[split] = Split(pixels.reshape(count, 1, height, width), labels.astype(np.int64))
    return Source(name, splits, FASHION_CLASSES if name == "fashion-mnist" else tuple("0123456789"))


def idx_size(folder: Path) -> tuple[int, Shape]:
    """Training images and their shape, from a header of 16 bytes."""
    _, _, (count, height, width) = _idx(folder, "train", "images-idx3", IDX_IMAGES, only_header=True)
    return count, (1, height, width)


# --- CIFAR-10 ----------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of numbers, texts, lists, dicts and numpy arrays; calls nothing else, whatever a file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        admitted: dict[tuple[str, str], Any] = {
            ("numpy", "dtype"): np.dtype,
            ("numpy", "ndarray"): "ndarray",  # only named, as the argument of _reconstruct
            ("numpy.core.multiarray", "_reconstruct"): _empty_array,
            ("numpy._core.multiarray", "_reconstruct"): _empty_array,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of arrays needs")
        return admitted[module, name]


def _empty_array(*_: Any) -> NDArray[Any]:
    return np.empty(0, np.uint8)  # its shape and contents come with the state


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes in the older protocols


def _unpickled(file: Path) -> dict[str, Any]:
    """A batch's dict. Raises DataError if the file is damaged or asks for code."""
    try:
        content = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever it stumbles on
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} is refused: it is no pickle of arrays ({reason})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} is damaged: it holds a {type(content).__name__}, not a dict")
    return content


def _cifar_batch(file: Path, classes: int) -> Split:
    content = _unpickled(file)
    pixels, labels = content.get("data"), content.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        found_there = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise DataError(f"{file} is damaged: its data is {found_there}, not uint8 (M, 3072)")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{file} is damaged: its labels are no list of whole numbers")
    numbers = np.array(labels, np.int64)
    _check_labels(numbers, len(pixels), classes, file)
    return Split(pixels.reshape(-1, 3, 32, 32), numbers)


def cifar10(folder: Path) -> Source:
    """CIFAR-10, 50,000 + 10,000 images 32x32x3, from its six python batches and batches.meta, in their order."""
    meta = found(folder, "batches.meta", inside=("cifar-10-batches-py",))
    names = _unpickled(meta).get("label_names")
    if not isinstance(names, list) or len(names) != 10 or not all(isinstance(name, str) for name in names):
        raise DataError(f"{meta} is damaged: its label_names are no list of 10 names")
    batches = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
    splits: dict[str, Samples] = {}
    for split, files in batches.items():
        parts = [_cifar_batch(found(meta.parent, file), len(names)) for file in files]
        labels = np.concatenate([part.labels for part in parts if part.labels is not None])
        splits[split] = Split(np.concatenate([part.images for part in parts]), labels)
    return Source("cifar10", splits, tuple(names))


def cifar10_size(folder: Path) -> tuple[int, Shape]:
    """Training images and their shape; their pixels are stored as they are, so nothing is decoded."""
    source = cifar10(folder)
    return len(source.splits["train"]), source.shape


# --- CelebA ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CelebACrop:
    """The 148x148 pixels at left 15, top 40 of an aligned face, resized to 64x64 by Pillow's bilinear filter,
    which antialiases.
    """

    original: tuple[int, int] = (178, 218)
    box: tuple[int, int, int, int] = (15, 40, 15 + 148, 40 + 148)
    size: int = 64

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Raises ValueError, the end of a sentence about the picture's file."""
        if picture.size != self.original:
            raise ValueError(f"is {picture.width}x{picture.height}, but aligned faces of CelebA are 178x218")
        return converted(picture, "RGB").crop(self.box).resize((self.size, self.size), Image.Resampling.BILINEAR)


def _partition(folder: Path) -> tuple[Path, dict[str, list[str]]]:
    """Where the faces are, and their files' names by split; the validation images are left out. Raises DataError."""
    file = found(folder, "list_eval_partition.txt", inside=("celeba",))
    names: dict[str, list[str]] = {"0": [], "1": [], "2": []}
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or fields[1] not in names or Path(fields[0]).name != fields[0]:
            raise DataError(f"{file} is damaged: line {number} is {line[:60]!r}, not FILE and 0, 1 or 2")
        names[fields[1]].append(fields[0])
    if not names["0"] or not names["2"]:
        raise DataError(f"{file} is damaged: it names no images for training, or none for testing")
    return found(file.parent, "img_align_celeba"), {"train": names["0"], "test": names["2"]}


def celeba(folder: Path) -> Source:
    """CelebA, 162,770 + 19,962 faces 64x64x3 without labels, from img_align_celeba/ and list_eval_partition.txt."""
    faces, names = _partition(folder)
    versions = storage.versions(str(faces))
    splits: dict[str, Samples] = {}
    for split, files in names.items():
        missing = [name for name in files if name not in versions]
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise DataError(
                f"{faces / missing[0]}{more} missing, though list_eval_partition.txt names it: copy it again"
            )
        size = sum(versions[name][0] for name in files)
        listed = digest_of_listing(files, versions)
        splits[split] = Files(str(faces), files, None, (3, 64, 64), CelebACrop(), size, listed)
    return Source("celeba", splits, None)


def celeba_size(folder: Path) -> tuple[int, Shape]:
    """Training images, as the list of splits says, and their shape."""
    return len(_partition(folder)[1]["train"]), (3, 64, 64)


# --- CUBICC ------------------------------------------------------------------------------------------


def _tensor(file: Path) -> torch.Tensor:
    """A tensor file, read without executing anything. Raises DataError."""
    try:
        value = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged file raises whatever it stumbles on
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{file} is refused: it is no file of a tensor ({reason})") from error
    if not isinstance(value, torch.Tensor):
        raise DataError(f"{file} is damaged: it holds a {type(value).__name__}, not a tensor")
    return value


def _indices(file: Path, count: int | None = None) -> NDArray[np.int64]:
    """Indices into `count` images (None: not compared). Raises DataError."""
    try:
        ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{file} is refused: it is no file of indices ({' '.join(str(error).split())[:120]})"
        ) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise DataError(f"{file} is damaged: it holds no list of whole numbers")
    if count is not None and not 0 <= ids.min() <= ids.max() < count:
        raise DataError(f"{file} is damaged: it names images outside 0 to {count - 1}")
    return ids.astype(np.int64)


def _as_uint8(file: Path, images: torch.Tensor, ids: NDArray[np.int64]) -> Pixels:
    """Some images, uint8 or float in [0, 1], as uint8 [M, 3, 64, 64]. Raises DataError."""
    out = np.empty((len(ids), 3, 64, 64), np.uint8)
    for first in range(0, len(ids), 500):  # in pieces: the file is mapped, and may be larger than memory
        piece = images[torch.from_numpy(ids[first : first + 500])]
        if images.dtype != torch.uint8:
            if not bool(((piece >= 0) & (piece <= 1)).all()):  # not a number: neither
                raise DataError(f"{file} holds values outside 0 to 1: save its images as uint8, or as floats in [0, 1]")
            piece = (piece.float() * 255).round().to(torch.uint8)
        out[first : first + 500] = piece.numpy()
    return out


def cubicc(folder: Path) -> Source:
    """CUBICC, birds of 8 classes, 64x64x3, from images.pt, labels.pt and {train,validation,test}_split.npy.

    test is the test and the validation split. The training images are in a seeded random order, so that shards are
    not sorted by class.
    """
    file = found(folder, "images.pt")
    images = _tensor(file)
    if images.shape[1:] != (3, 64, 64) or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise DataError(f"{file} holds {images.dtype} {tuple(images.shape)}, not uint8 or floats [M, 3, 64, 64]")
    label_file = found(folder, "labels.pt")
    labels = _tensor(label_file)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
        raise DataError(f"{label_file} is damaged: its labels are {labels.dtype}, not whole numbers")
    numbers = labels.numpy().astype(np.int64)
    _check_labels(numbers, len(images), 8, label_file)
    train, validation, test = (
        _indices(found(folder, f"{split}_split.npy"), len(images)) for split in ("train", "validation", "test")
    )
    every = np.concatenate([train, validation, test])
    if len(np.unique(every)) != len(every):
        raise DataError(f"{folder} holds splits that share images: train, validation and test must be apart")
    train = train[permutation(len(train), "pack", "cubicc")]
    parts = {"train": train, "test": np.concatenate([test, validation])}
    splits: dict[str, Samples] = {
        name: Split(_as_uint8(file, images, ids), numbers[ids]) for name, ids in parts.items()
    }
    return Source("cubicc", splits, tuple(str(k) for k in range(8)))


def cubicc_size(folder: Path) -> tuple[int, Shape]:
    """Training images and their shape."""
    return len(_indices(found(folder, "train_split.npy"))), (3, 64, 64)


READERS: dict[str, tuple[Callable[[Path], Source], Callable[[Path], tuple[int, Shape]]]] = {
    "mnist": (lambda folder: idx_source("mnist", folder), idx_size),
    "fashion-mnist": (lambda folder: idx_source("fashion-mnist", folder), idx_size),
    "cifar10": (cifar10, cifar10_size),
    "celeba": (celeba, celeba_size),
    "cubicc": (cubicc, cubicc_size),
}
