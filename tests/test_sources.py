"""Protects what is packed: the original files of every data set are read pixel for pixel, folders of images as the
documentation says, and a file that is missing, damaged, swapped or hostile ends in one sentence that names it.

Nothing is downloaded: the files are made here, in the original formats, but few.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from tdiff import storage
from tdiff.config import Data
from tdiff.data import known
from tdiff.data.folder import folder_of_images
from tdiff.data.known import NAMES, open_known, size_of_known
from tdiff.data.sources import DamagedError, Files, Samples, Source, opened
from tdiff.data.tars import existing_tars
from tdiff.errors import ConfigError, DataError
from tdiff.packing import open_source

RNG = np.random.default_rng(0)


def pixels_of(samples: Samples) -> np.ndarray:
    return np.stack([samples.image(i) for i in range(len(samples))])


def sentence(call: Callable[[], object]) -> str:
    """The message of the problem, which must be one line."""
    with pytest.raises((ConfigError, DataError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels_of(samples: Samples) -> list[int]:
    assert samples.labels is not None
    assert samples.labels.dtype == np.int64
    return samples.labels.tolist()


# --- names -------------------------------------------------------------------------------------------


def test_the_config_knows_the_same_names():
    assert get_args(Data.model_fields["name"].annotation) == NAMES
    assert set(NAMES) == {"digits", "mnist", "fashion-mnist", "cifar10", "celeba", "cubicc"}


def test_sizes_are_known_without_any_file(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "DEBIAN", Path("/nowhere"))
    sizes = {name: size_of_known(name) for name in NAMES if name != "cubicc"}
    assert sizes == {
        "digits": (1500, (1, 8, 8)),
        "mnist": (60_000, (1, 28, 28)),
        "fashion-mnist": (60_000, (1, 28, 28)),
        "cifar10": (50_000, (3, 32, 32)),
        "celeba": (162_770, (3, 64, 64)),
    }
    digits = open_known("digits")
    assert (len(digits.splits["train"]), digits.shape) == sizes["digits"]
    assert "cubicc has no download" in sentence(lambda: size_of_known("cubicc"))


def test_a_source_folder_must_be_there_and_have_an_effect(tmp_path: Path):
    assert "no effect for digits" in sentence(lambda: open_known("digits", str(tmp_path)))
    assert "is no local folder" in sentence(lambda: open_known("mnist", str(tmp_path / "nowhere")))
    assert "is no local folder" in sentence(lambda: open_known("mnist", "s3://bucket/mnist"))


def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A real download through a proxy that refuses it."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("mnist", "cifar10", "celeba"):
        message = sentence(lambda name=name: open_known(name))
        assert message.startswith(f"{name} could not be downloaded to {tmp_path}/tdiff (")
        assert "--source-dir" in message
    assert "cubicc has no download" in sentence(lambda: open_known("cubicc"))


# --- IDX ---------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> tuple[Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A folder of IDX files, half of them packed, and what is in them."""
    arrays = {}
    for part, count in (("train", 7), ("t10k", 3)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = RNG.integers(0, 10, count, dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        arrays[part] = images, labels
    return tmp_path, arrays


def test_idx_files_are_read_pixel_for_pixel(mnist):
    folder, arrays = mnist
    source = open_known("mnist", str(folder))
    assert (source.name, source.shape, source.classes) == ("mnist", (1, 28, 28), tuple("0123456789"))
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[part]
        np.testing.assert_array_equal(pixels_of(source.splits[split]), images[:, None])
        assert labels_of(source.splits[split]) == labels.tolist()
    assert size_of_known("mnist", str(folder)) == (7, (1, 28, 28))
    fashion = open_known("fashion-mnist", str(folder))
    assert fashion.classes is not None
    assert fashion.classes[:2] == ("T-shirt/top", "Trouser")


def test_idx_files_may_lie_where_torchvision_puts_them_under_either_name(mnist, tmp_path: Path):
    folder, arrays = mnist
    raw = tmp_path / "elsewhere" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in folder.glob("*-ubyte*"):
        file.rename(raw / file.name.replace("-idx", ".idx"))
    np.testing.assert_array_equal(
        pixels_of(open_known("mnist", str(tmp_path / "elsewhere")).splits["test"]), arrays["t10k"][0][:, None]
    )


@pytest.mark.skipif(not known.DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_is_found_by_itself():
    assert size_of_known("fashion-mnist") == (60_000, (1, 28, 28))
    source = open_known("fashion-mnist")
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 60_000, "test": 10_000}
    assert np.bincount(labels_of(source.splits["train"])).tolist() == [6000] * 10


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = file.read_bytes()
        packed = file.suffix == ".gz"
        content = change(gzip.decompress(content) if packed else content)
        file.write_bytes(gzip.compress(content) if packed else content)

    return damage


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "part"),
    [
        (IMAGES, rewritten(lambda content: content[:-1]), "cut short"),
        (IMAGES, rewritten(lambda content: content[:100]), "cut short"),
        (IMAGES, rewritten(lambda content: content + b"\0"), "longer"),
        (IMAGES, rewritten(lambda content: content[:7]), "cut short"),
        (IMAGES, rewritten(lambda content: content[:3]), "no IDX file"),
        (IMAGES, rewritten(lambda content: b""), "no IDX file"),
        (IMAGES, lambda file: file.write_bytes(file.read_bytes()[:-20]), "damaged"),
        (IMAGES, lambda file: file.write_bytes(b"hello, this is no gzip"), "damaged"),
        (
            IMAGES,
            lambda file: file.write_bytes(file.read_bytes()[:12] + b"\xff" * 30 + file.read_bytes()[42:]),
            "damage",
        ),
        (IMAGES, rewritten(lambda content: idx(np.zeros((7, 27, 28), np.uint8))), "28x28"),
        (LABELS, rewritten(lambda content: content[:-1]), "cut short"),
        (LABELS, rewritten(lambda content: content + b"\0"), "longer"),
        (LABELS, rewritten(lambda content: idx(np.full(7, 10, np.uint8))), "outside 0 to 9"),
        (LABELS, rewritten(lambda content: idx(np.zeros(6, np.uint8))), "6 labels for 7 images"),
        (LABELS, lambda file: file.unlink(), LABELS),
        (IMAGES, lambda file: file.unlink(), "train-images-idx3-ubyte"),
    ],
)
def test_a_damaged_idx_file_is_named(mnist, name: str, damage: Callable[[Path], Any], part: str):
    folder, _ = mnist
    damage(folder / name)
    message = sentence(lambda: open_known("mnist", str(folder)))
    assert part in message
    assert name.removesuffix(".gz") in message


def test_swapped_idx_files_are_named(mnist):
    folder, _ = mnist
    images, labels = folder / IMAGES, folder / LABELS
    content = gzip.decompress(images.read_bytes())
    images.write_bytes(gzip.compress(labels.read_bytes()))
    labels.write_bytes(content)
    message = sentence(lambda: open_known("mnist", str(folder)))
    assert IMAGES in message
    assert "is a file of labels" in message


# --- CIFAR-10 ----------------------------------------------------------------------------------------

CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def python_2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """A batch as Python 2 and numpy of its day wrote it: protocol 2, byte strings for all texts."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(content)) + content  # BINSTRING

    rows, columns = data.shape
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
        b"(K\x01" + b"J" + struct.pack("<i", rows) + b"J" + struct.pack("<i", columns) + b"\x86"
        b"cnumpy\ndtype\n("
        + text(b"u1")
        + b"K\x00K\x01tR(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89" + text(data.tobytes()) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(b"x") + b"u."


@pytest.fixture(params=["python 2", "python 3"])
def cifar(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, tuple[np.ndarray, list[int]]]]:
    """A folder of batches, and what is in them."""
    arrays = {}
    for k, name in enumerate(["test_batch", *(f"data_batch_{k}" for k in range(1, 6))]):
        data = RNG.integers(0, 256, (k + 2, 3072), dtype=np.uint8)
        labels = RNG.integers(0, 10, k + 2).tolist()
        content = {"data": data, "labels": labels, "batch_label": name}
        old = request.param == "python 2"
        (tmp_path / name).write_bytes(python_2_pickle(data, labels) if old else pickle.dumps(content, protocol=2))
        arrays[name] = data, labels
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR_NAMES}, protocol=2))
    return tmp_path, arrays


def test_cifar_batches_are_read_pixel_for_pixel(cifar, tmp_path: Path):
    folder, arrays = cifar
    source = open_known("cifar10", str(folder))
    assert (source.name, source.shape, source.classes) == ("cifar10", (3, 32, 32), tuple(CIFAR_NAMES))
    train = [arrays[f"data_batch_{k}"] for k in range(1, 6)]
    np.testing.assert_array_equal(
        pixels_of(source.splits["train"]), np.concatenate([data.reshape(-1, 3, 32, 32) for data, _ in train])
    )
    assert labels_of(source.splits["train"]) == [label for _, labels in train for label in labels]
    np.testing.assert_array_equal(pixels_of(source.splits["test"]), arrays["test_batch"][0].reshape(-1, 3, 32, 32))
    assert size_of_known("cifar10", str(folder)) == (3 + 4 + 5 + 6 + 7, (3, 32, 32))
    below = tmp_path / "outer" / "cifar-10-batches-py"
    below.mkdir(parents=True)
    for file in folder.iterdir():
        if file.is_file():
            file.rename(below / file.name)
    assert len(open_known("cifar10", str(below.parent)).splits["test"]) == 2


class Command:
    """Unpickling this runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def batch(**changes: Any) -> bytes:
    content = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], **changes}
    return pickle.dumps({key: value for key, value in content.items() if value is not None}, protocol=2)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_pickle_that_asks_for_code_is_refused(cifar, tmp_path: Path, name: str):
    folder, _ = cifar
    mark = tmp_path / "executed"
    payload = pickle.dumps({"data": Command(f"touch {mark}"), "labels": [0]}, protocol=2)
    pickle.loads(payload)
    assert mark.exists()  # it does work
    mark.unlink()
    (folder / name).write_bytes(payload)
    message = sentence(lambda: open_known("cifar10", str(folder)))
    assert not mark.exists()
    assert str(folder / name) in message
    assert "system" in message
    assert "refused" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80",
        batch()[:-100],
        batch()[:40],
        pickle.dumps([1, 2], protocol=2),
        batch(data=None),
        batch(labels=None),
        batch(data=np.zeros((2, 3071), np.uint8)),
        batch(data=np.zeros((2, 3072), np.float32)),
        batch(data=np.zeros((3, 3072), np.uint8)),
        batch(data="no array"),
        batch(labels=[0, 10]),
        batch(labels=[0, -1]),
        batch(labels=[0, "1"]),
        b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.",  # an array as large as memory
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
    ],
)
def test_a_damaged_batch_is_named(tmp_path: Path, content: bytes):
    for name in ("test_batch", *(f"data_batch_{k}" for k in range(1, 6))):
        (tmp_path / name).write_bytes(batch())
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR_NAMES}, protocol=2))
    open_known("cifar10", str(tmp_path))
    (tmp_path / "data_batch_2").write_bytes(content)
    assert str(tmp_path / "data_batch_2") in sentence(lambda: open_known("cifar10", str(tmp_path)))


def test_a_missing_batch_is_named(cifar):
    folder, _ = cifar
    for name in ("data_batch_4", "batches.meta"):
        (folder / name).unlink()
        assert f"holds no {name}" in sentence(lambda: open_known("cifar10", str(folder)))


# --- CelebA ------------------------------------------------------------------------------------------


def gradient() -> np.ndarray:
    """[218, 178, 3]: red grows to the right, green downwards."""
    rows, columns = np.mgrid[:218, :178]
    return np.stack([columns, rows, (rows + columns) % 256], -1).astype(np.uint8)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    faces = tmp_path / "img_align_celeba"
    faces.mkdir()
    for k in range(1, 7):
        Image.fromarray(np.roll(gradient(), k, 0)).save(faces / f"{k:06d}.jpg", "png")  # lossless, for the comparison
    splits = [0, 0, 1, 2, 0, 2]
    text = "".join(f"{k:06d}.jpg {split}\n" for k, split in enumerate(splits, start=1))
    (tmp_path / "list_eval_partition.txt").write_text(text)
    return tmp_path


def test_celeba_is_cropped_and_split_as_the_method_says(celeba: Path):
    source = open_known("celeba", str(celeba))
    assert (source.name, source.shape, source.classes) == ("celeba", (3, 64, 64), None)
    files = {split: [samples.file(i) for i in range(len(samples))] for split, samples in source.splits.items()}
    assert files == {"train": ["000001.jpg", "000002.jpg", "000005.jpg"], "test": ["000004.jpg", "000006.jpg"]}
    assert all(samples.labels is None for samples in source.splits.values())
    for name, image in zip(files["train"], pixels_of(source.splits["train"]), strict=True):
        original = np.roll(gradient(), int(name[:6]), 0)
        square = original[40 : 40 + 148, 15 : 15 + 148]
        expected = Image.fromarray(np.ascontiguousarray(square)).resize((64, 64), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image, np.asarray(expected).transpose(2, 0, 1))
    # Means over the pixels that fall on each output pixel, whatever the filter: it is antialiased and not shifted.
    red = source.splits["train"].image(0)[0, 32, 2:-2].astype(float)
    np.testing.assert_allclose(red, 15 + (np.arange(2, 62) + 0.5) * 148 / 64 - 0.5, atol=1)
    assert size_of_known("celeba", str(celeba)) == (3, (3, 64, 64))


def test_celeba_may_lie_where_torchvision_puts_it(celeba: Path, tmp_path: Path):
    (tmp_path / "root" / "celeba").mkdir(parents=True)
    for name in ("img_align_celeba", "list_eval_partition.txt"):
        (celeba / name).rename(tmp_path / "root" / "celeba" / name)
    assert len(open_known("celeba", str(tmp_path / "root")).splits["train"]) == 3


def test_a_face_that_is_missing_or_of_another_size_is_named(celeba: Path):
    file = celeba / "img_align_celeba" / "000005.jpg"
    Image.new("RGB", (178, 217)).save(file)
    message = sentence(lambda: pixels_of(open_known("celeba", str(celeba)).splits["train"]))
    assert str(file) in message
    assert "178x217" in message
    file.unlink()
    message = sentence(lambda: open_known("celeba", str(celeba)))
    assert str(file) in message
    assert "missing" in message


@pytest.mark.parametrize(
    "text",
    ["", "000001.jpg 0\n", "000001.jpg 0\n000002.jpg 3\n", "000001.jpg\n", "../../x.jpg 0\n", "a b c\n", "\x00\n"],
)
def test_a_damaged_list_of_splits_is_named(celeba: Path, text: str):
    (celeba / "list_eval_partition.txt").write_text(text)
    assert "list_eval_partition.txt is damaged" in sentence(lambda: open_known("celeba", str(celeba)))


# --- CUBICC ------------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.uint8, torch.float32])
def cubicc(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    pixels = RNG.integers(0, 256, (12, 3, 64, 64), dtype=np.uint8)
    labels = RNG.integers(0, 8, 12)
    images = torch.from_numpy(pixels)
    torch.save(images if request.param == torch.uint8 else images.float() / 255, tmp_path / "images.pt")
    torch.save(torch.from_numpy(labels), tmp_path / "labels.pt")
    for split, ids in (("train", [0, 2, 4, 6, 8, 10, 11]), ("validation", [1, 3]), ("test", [9, 5, 7])):
        np.save(tmp_path / f"{split}_split.npy", np.array(ids))
    return tmp_path, pixels, labels


def test_cubicc_is_split_as_the_method_says(cubicc):
    folder, pixels, labels = cubicc
    source = open_known("cubicc", str(folder))
    assert (source.shape, source.classes) == ((3, 64, 64), tuple("01234567"))
    test = [9, 5, 7, 1, 3]  # test, then validation
    np.testing.assert_array_equal(pixels_of(source.splits["test"]), pixels[test])
    assert labels_of(source.splits["test"]) == labels[test].tolist()
    train = pixels_of(source.splits["train"])
    order = [int(np.flatnonzero((pixels == image).all((1, 2, 3)))[0]) for image in train]
    assert sorted(order) == [0, 2, 4, 6, 8, 10, 11]
    assert order != sorted(order)
    assert labels_of(source.splits["train"]) == labels[order].tolist()
    assert size_of_known("cubicc", str(folder)) == (7, (3, 64, 64))


def test_cubicc_s_tensors_execute_nothing(cubicc, tmp_path: Path):
    folder, _, _ = cubicc
    mark = tmp_path / "executed"
    for name in ("images.pt", "labels.pt"):
        kept = (folder / name).read_bytes()
        torch.save({"a": Command(f"touch {mark}")}, folder / name)
        message = sentence(lambda: open_known("cubicc", str(folder)))
        assert str(folder / name) in message
        assert "refused" in message
        assert not mark.exists()
        (folder / name).write_bytes(kept)
    np.save(folder / "train_split.npy", np.array([Command(f"touch {mark}")]), allow_pickle=True)
    assert "train_split.npy" in sentence(lambda: open_known("cubicc", str(folder)))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("images.pt", lambda file: torch.save(torch.zeros(12, 3, 64, 63), file)),
        ("images.pt", lambda file: torch.save(torch.zeros(12, 3, 64, 64, dtype=torch.int64), file)),
        ("images.pt", lambda file: torch.save(torch.full((12, 3, 64, 64), 1.5), file)),
        ("images.pt", lambda file: torch.save(torch.full((12, 3, 64, 64), float("nan")), file)),
        ("images.pt", lambda file: torch.save([1], file)),
        ("images.pt", lambda file: file.write_bytes(file.read_bytes()[:1000])),
        ("images.pt", lambda file: file.write_bytes(b"")),
        ("images.pt", lambda file: file.unlink()),
        ("labels.pt", lambda file: torch.save(torch.zeros(11, dtype=torch.int64), file)),
        ("labels.pt", lambda file: torch.save(torch.full((12,), 8), file)),
        ("labels.pt", lambda file: torch.save(torch.zeros(12), file)),
        ("test_split.npy", lambda file: np.save(file, np.array([12]))),
        ("test_split.npy", lambda file: np.save(file, np.array([-1]))),
        ("test_split.npy", lambda file: np.save(file, np.array([0.5]))),
        ("test_split.npy", lambda file: np.save(file, np.array([], np.int64))),
        ("test_split.npy", lambda file: file.write_bytes(b"")),
        ("validation_split.npy", lambda file: file.unlink()),
        ("", lambda folder: np.save(folder / "test_split.npy", np.array([0, 5]))),  # 0 is a training image
    ],
)
def test_a_damaged_file_of_cubicc_is_named(cubicc, name: str, damage: Callable[[Path], Any]):
    folder, _, _ = cubicc
    damage(folder / name)
    assert (name or "splits that share images") in sentence(lambda: open_known("cubicc", str(folder)))


# --- a folder of images ------------------------------------------------------------------------------


def opened_folder(folder: Path, **options: Any) -> Source:
    return folder_of_images(str(folder), storage.versions(str(folder)), **options)


def draw(
    file: Path, size: tuple[int, int] = (6, 6), mode: str = "RGB", kind: str = "png", **options: Any
) -> np.ndarray:
    """Writes a picture of noise and returns its pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(file, kind, **options)
    return pixels


def test_a_plain_folder_is_read_pixel_for_pixel(tmp_path: Path):
    drawn = {f"{k:03d}.png": draw(tmp_path / f"{k:03d}.png") for k in range(20)}
    source = opened_folder(tmp_path)
    assert source.shape == (3, 6, 6)
    assert source.classes is None
    assert source.notes == ()
    train, test = source.splits["train"], source.splits["test"]
    assert (len(train), len(test)) == (18, 2)
    names = [train.file(i) for i in range(18)]
    assert sorted(names + [test.file(i) for i in range(2)]) == sorted(drawn)
    assert names != sorted(names)  # shards must not be sorted
    for samples in (train, test):
        for i in range(len(samples)):
            np.testing.assert_array_equal(samples.image(i).transpose(1, 2, 0), drawn[samples.file(i)])
    again = opened_folder(tmp_path)
    assert [again.splits["train"].file(i) for i in range(18)] == names
    assert again.splits["train"].fingerprint() == train.fingerprint()


def test_labels_come_from_the_first_sub_folders(tmp_path: Path):
    for name in ("dog/a.png", "cat/b.png", "cat/more/c.png", "eel/d.png"):
        draw(tmp_path / name)
    source = opened_folder(tmp_path, test_share=0)
    assert source.classes == ("cat", "dog", "eel")
    train = source.splits["train"]
    assert set(source.splits) == {"train"}
    found = {train.file(i): label for i, label in enumerate(labels_of(train))}
    assert found == {"dog/a.png": 1, "cat/b.png": 0, "cat/more/c.png": 0, "eel/d.png": 2}
    assert any("3 sub-folders: cat, dog, eel" in note for note in source.notes)
    assert opened_folder(tmp_path, labels=False).classes is None
    draw(tmp_path / "loose.png")
    assert opened_folder(tmp_path).classes is None


def test_one_sub_folder_is_no_class(tmp_path: Path):
    draw(tmp_path / "all" / "a.png")
    draw(tmp_path / "all" / "b.png")
    assert opened_folder(tmp_path).classes is None


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "validation"])
def test_folders_at_the_top_are_splits(tmp_path: Path, held_out: str):
    for name in ("train/cat/a.png", "train/dog/b.png", f"{held_out}/cat/c.png", f"{held_out}/dog/d.png"):
        draw(tmp_path / name)
    source = opened_folder(tmp_path)
    files = {split: sorted(samples.file(i) for i in range(2)) for split, samples in source.splits.items()}
    assert files == {
        "train": ["train/cat/a.png", "train/dog/b.png"],
        "test": [f"{held_out}/cat/c.png", f"{held_out}/dog/d.png"],
    }
    assert source.classes == ("cat", "dog")
    assert "--test-share has no effect" in sentence(lambda: opened_folder(tmp_path, test_share=0.5))
    for k in range(20):
        draw(tmp_path / "train" / "cat" / f"{k:02d}.png")
    train = opened_folder(tmp_path).splits["train"]
    assert labels_of(train) != sorted(labels_of(train))  # shards must not be sorted by class
    assert [train.file(i) for i in range(22)] != sorted(train.file(i) for i in range(22))
    draw(tmp_path / "extra" / "e.png")
    message = sentence(lambda: opened_folder(tmp_path))
    assert "extra/e.png" in message


def test_a_class_may_be_called_train(tmp_path: Path):
    for name in ("train/a.png", "plane/b.png", "car/c.png"):
        draw(tmp_path / name)
    assert opened_folder(tmp_path).classes == ("car", "plane", "train")


@pytest.mark.parametrize(("share", "held_out"), [(None, 3), (0.5, 15), (0, 0), (0.01, 1)])
def test_the_share_that_is_held_out(tmp_path: Path, share: float | None, held_out: int):
    for k in range(30):
        draw(tmp_path / f"{k}.png")
    source = opened_folder(tmp_path, test_share=share)
    assert len(source.splits["train"]) == 30 - held_out
    assert ("test" in source.splits) == (held_out > 0)


def test_other_files_are_skipped_aloud(tmp_path: Path):
    draw(tmp_path / "a.png")
    draw(tmp_path / ".hidden.png")
    draw(tmp_path / ".thumbs" / "b.png")
    (tmp_path / "notes.txt").write_text("x")
    source = opened_folder(tmp_path, test_share=0)
    assert len(source.splits["train"]) == 1
    assert source.notes == (
        "2 hidden files skipped, such as .hidden.png",
        "1 other files skipped, such as notes.txt",
    )


def test_size_cuts_the_middle_square_and_resizes(tmp_path: Path):
    wide = draw(tmp_path / "wide.png", (60, 40))
    tall = draw(tmp_path / "tall.png", (40, 60))
    small = draw(tmp_path / "small.png", (4, 4))
    source = opened_folder(tmp_path, size=8, test_share=0)
    assert source.shape == (3, 8, 8)
    found = {source.splits["train"].file(i): source.splits["train"].image(i) for i in range(3)}
    squares = {"wide.png": wide[:, 10:50], "tall.png": tall[10:50], "small.png": small}
    for name, square in squares.items():
        expected = Image.fromarray(np.ascontiguousarray(square)).resize((8, 8), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(found[name], np.asarray(expected).transpose(2, 0, 1))


def test_without_size_all_images_must_be_alike(tmp_path: Path):
    draw(tmp_path / "a.png", (6, 6))
    draw(tmp_path / "b.png", (7, 7))
    message = sentence(lambda: pixels_of(opened_folder(tmp_path, test_share=0).splits["train"]))
    assert str(tmp_path / "b.png") in message
    assert "--size 6" in message
    draw(tmp_path / "0.png", (6, 5))
    message = sentence(lambda: opened_folder(tmp_path))
    assert str(tmp_path / "0.png") in message
    assert "--size N" in message


@pytest.mark.parametrize("first", ["L", "1", "LA", "RGB", "P", "RGBA", "CMYK"])
def test_the_mode_is_that_of_the_first_image(tmp_path: Path, first: str):
    kind = "jpeg" if first == "CMYK" else "png"
    Image.new("RGB", (4, 4), (255, 0, 0)).convert(first).save(tmp_path / "a.png", kind)
    grey = first in ("L", "1", "LA")
    assert opened_folder(tmp_path).shape == (1 if grey else 3, 4, 4)
    assert opened_folder(tmp_path, mode="rgb").shape == (3, 4, 4)
    if not grey:
        message = sentence(lambda: opened_folder(tmp_path, mode="grey").splits["train"].image(0))
        assert str(tmp_path / "a.png") in message
        assert "--mode rgb" in message


def test_every_mode_becomes_rgb(tmp_path: Path):
    colour = (204, 102, 51)  # in Pillow's palette
    for mode in ("RGB", "P", "RGBA"):
        Image.new("RGB", (4, 4), colour).convert(mode).save(tmp_path / f"{mode}.png")
    transparent = Image.new("RGBA", (4, 4), (*colour, 0))
    transparent.save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    source = opened_folder(tmp_path, mode="rgb", test_share=0)
    train = source.splits["train"]
    for i in range(len(train)):
        expected = (77, 77, 77) if train.file(i) == "grey.png" else colour
        np.testing.assert_array_equal(train.image(i)[:, 0, 0], expected)
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = opened(Path(tmp_path / "cmyk.jpg").read_bytes(), "x").convert("RGB").getpixel((0, 0))
    assert red[0] > 240
    assert max(red[1:]) < 15


def test_a_colour_image_in_a_grey_set_is_named(tmp_path: Path):
    draw(tmp_path / "a.png", mode="L")
    draw(tmp_path / "b.png")
    message = sentence(lambda: pixels_of(opened_folder(tmp_path, test_share=0).splits["train"]))
    assert str(tmp_path / "b.png") in message
    assert "--mode rgb" in message


def test_cameras_that_were_held_upright(tmp_path: Path):
    pixels = draw(tmp_path / "plain.png", (6, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter to the right when shown
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "plain.png").unlink()
    image = opened_folder(tmp_path).splits["train"].image(0)
    np.testing.assert_array_equal(image.transpose(1, 2, 0), np.rot90(pixels, -1))


def png_16(colour: bool) -> bytes:
    """A 2x2 PNG of 16 bits a channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2 if colour else 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x12\x34" * (6 if colour else 2)) * 2)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff_16() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((2, 2), 1000, np.uint16)).save(out, "tiff")
    return out.getvalue()


@pytest.mark.parametrize("content", [png_16(True), png_16(False), tiff_16()])
def test_more_than_8_bits_are_refused(tmp_path: Path, content: bytes):
    Image.open(io.BytesIO(content)).load()
    (tmp_path / "deep.png").write_bytes(content)
    message = sentence(lambda: opened_folder(tmp_path))
    assert str(tmp_path / "deep.png") in message
    assert "8 bits" in message


def png_of(size: tuple[int, int] = (6, 6)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(out, "png")
    return out.getvalue()


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    plain = png_of()
    return plain[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + plain[33:]


DAMAGES = {
    "empty": b"",
    "text": b"this is no image",
    "cut": png_of()[:-40],
    "cut early": png_of()[:60],
    "flipped": png_of()[:80] + b"\xff" + png_of()[81:],
    "bomb": bomb(),
    "pickle": pickle.dumps([1]),
}


@pytest.mark.parametrize("content", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_image_is_named(tmp_path: Path, content: bytes):
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    train = opened_folder(tmp_path, test_share=0).splits["train"]
    bad = next(i for i in range(2) if train.file(i) == "b.png")
    train.image(1 - bad)
    with pytest.raises(DamagedError, match=r"b\.png is damaged") as caught:
        train.image(bad)
    assert "\n" not in str(caught.value)


def test_a_picture_book_is_refused(tmp_path: Path):
    frames = [Image.new("L", (4, 4), k) for k in range(3)]
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    message = sentence(lambda: opened_folder(tmp_path))
    assert "stack.tif" in message
    assert "3 pictures" in message


def test_an_empty_folder_is_one_sentence(tmp_path: Path):
    assert f"SOURCE {tmp_path} holds no images" in sentence(lambda: open_source(str(tmp_path)))
    (tmp_path / "notes.txt").touch()
    assert "holds no images" in sentence(lambda: open_source(str(tmp_path)))
    assert "is no folder" in sentence(lambda: open_source(str(tmp_path / "nowhere")))
    (tmp_path / "a.png").touch()
    assert "all 1 images are damaged" in sentence(lambda: open_source(str(tmp_path)))


def test_links_are_followed(tmp_path: Path):
    draw(tmp_path / "set" / "cat" / "a.png")
    draw(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    assert opened_folder(tmp_path / "set").classes == ("cat", "dog")
    (tmp_path / "set" / "dog").unlink()
    (tmp_path / "set" / "cat" / "linked.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    assert len(opened_folder(tmp_path / "set", test_share=0).splits["train"]) == 2


def test_names_may_be_anything(tmp_path: Path):
    folder = tmp_path / "my photos (1)"
    names = ["ein Bild.png", "画像.PNG", "a\nb.png", os.fsdecode(b"caf\xe9.png"), "x.tar.png"]
    for name in names:
        draw(folder / name)
    source = opened_folder(folder, test_share=0)
    assert source.name == "my-photos-1"
    train = source.splits["train"]
    assert {train.file(i) for i in range(len(train))} == set(names)
    pixels_of(train)
    train.fingerprint()


def test_a_part_is_small_whatever_the_whole(tmp_path: Path):
    for k in range(50):
        draw(tmp_path / f"{k}.png", (2, 2))
    train = opened_folder(tmp_path).splits["train"]
    assert isinstance(train, Files)
    assert len(pickle.dumps(train.part(0, 5))) < len(pickle.dumps(train)) - 100
    part = pickle.loads(pickle.dumps(train.part(5, 9)))
    np.testing.assert_array_equal(pixels_of(part), pixels_of(train)[5:9])


def test_the_fingerprint_changes_with_what_is_packed(tmp_path: Path):
    for name in ("cat/a.png", "dog/b.png", "dog/c.png"):
        draw(tmp_path / name)

    def fingerprint(**options: Any) -> str:
        return opened_folder(tmp_path, test_share=0, **options).splits["train"].fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    found = {before, fingerprint(labels=False), fingerprint(size=6), fingerprint(size=4), fingerprint(mode="grey")}
    draw(tmp_path / "cat" / "a.png", mode="L")
    found.add(fingerprint(mode="rgb"))
    draw(tmp_path / "dog" / "d.png")
    found.add(fingerprint(mode="rgb"))
    assert len(found) == 7


# --- an existing WebDataset --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["a.tar", "train/b.tar"], "beside its split folders"),
        (["a.tar", "b.png"], "b.png"),
        (["test/a.tar"], "none in"),
    ],
)
def test_a_folder_of_shards_must_be_clear(tmp_path: Path, names: list[str], part: str):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert part in sentence(lambda: existing_tars(str(tmp_path), storage.versions(str(tmp_path))))
