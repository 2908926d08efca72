"""Protects the images on their way in: what is packed is read back, the same input gives the same bytes, and a manifest
that is damaged, or promises what is not there, is an error that names it. What is in the shards: test_decode.py,
test_stream.py.
"""

from __future__ import annotations

import dataclasses
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdiff.data.images import decoded, png_bytes
from tdiff.data.shards import read_manifest
from tdiff.data.sources import Source, Split, digits
from tdiff.data.stream import read_split
from tdiff.errors import DataError
from tdiff.packing import pack


def source(channels: int = 1, labelled: bool = True, train: int = 7, test: int = 3, size: int = 5) -> Source:
    rng = np.random.default_rng(channels)

    def split(count: int) -> Split:
        images = rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8)
        return Split(images, rng.integers(0, 3, count) if labelled else None)

    return Source("noise", {"train": split(train), "test": split(test)}, ("a", "b", "c") if labelled else None)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# --- digits ------------------------------------------------------------------------------------------


def test_digits_are_split_as_the_method_says():
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0)).tolist()
    found = digits()
    assert set(found.splits) == {"train", "test"}
    assert found.classes == tuple("0123456789")
    for name, ids in (("train", order[:1500]), ("test", order[1500:])):
        split = found.splits[name]
        assert split.images.shape == (len(ids), 1, 8, 8)
        assert split.images.dtype == np.uint8
        np.testing.assert_array_equal(split.images[:, 0], np.rint(raw.images[ids] * 255 / 16))
        np.testing.assert_array_equal(split.labels, raw.target[ids])
    assert found.splits["train"].images.max() == 255


# --- round trip --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shard_samples", [1, 3, 7, 100])
def test_what_is_packed_is_read_back(tmp_path: Path, channels: int, labelled: bool, shard_samples: int):
    original = source(channels, labelled)
    written = pack(original, str(tmp_path), shard_samples)
    manifest = read_manifest(str(tmp_path))
    assert manifest == written
    assert manifest.shape == (channels, 5, 5)
    assert manifest.classes == original.classes
    for name, split in original.splits.items():
        assert manifest.samples(name) == len(split.images)
        assert len(manifest.splits[name]) == -(-len(split.images) // shard_samples)
        images = read_split(str(tmp_path), manifest, name)
        np.testing.assert_array_equal(images.images, split.images)
        assert images.images.dtype == np.uint8
        assert len(images) == len(split.images)
        if split.labels is None:
            assert images.labels is None
        else:
            np.testing.assert_array_equal(images.labels, split.labels)
            assert images.labels.dtype == np.int64


def test_packing_twice_gives_the_same_bytes(tmp_path: Path):
    pack(source(), str(tmp_path / "one"), 3)
    pack(source(), str(tmp_path / "two"), 3)
    one = files(tmp_path / "one")
    assert one == files(tmp_path / "two")
    assert list(one) == [
        "manifest.json",
        "test/shard-000000.tar",
        *(f"train/shard-00000{k}.tar" for k in range(3)),
    ]


def test_the_manifest_says_what_is_there(tmp_path: Path):
    manifest = pack(source(), str(tmp_path), 3)
    raw = json.loads((tmp_path / "manifest.json").read_text())
    assert raw["totals"] == {"train": 7, "test": 3}
    assert raw["digest"] == manifest.digest
    assert raw["shape"] == [1, 5, 5]
    for shards in manifest.splits.values():
        for shard in shards:
            assert (tmp_path / shard.name).stat().st_size == shard.bytes
    assert [shard.samples for shard in manifest.splits["train"]] == [3, 3, 1]


def test_members_are_what_webdataset_readers_expect(tmp_path: Path):
    pack(source(), str(tmp_path), 100)
    with tarfile.open(tmp_path / "train" / "shard-000000.tar") as tar:
        names = tar.getnames()
        assert all(member.mtime == 0 for member in tar.getmembers())
        meta = json.load(tar.extractfile("train-000000002.json"))  # type: ignore[arg-type]
    assert names == [f"train-{k:09d}.{kind}" for k in range(7) for kind in ("cls", "json", "png")]
    assert meta == {"source": "noise", "index": 2}


def test_the_digest_names_contents_and_their_meaning(tmp_path: Path):
    original = source()
    manifest = pack(original, str(tmp_path / "a"), 3)
    other = source()
    other.splits["train"].images[0, 0, 0, 0] ^= 1
    digests = {
        manifest.digest,
        pack(other, str(tmp_path / "b"), 3).digest,
        dataclasses.replace(manifest, name="other").digest,
        dataclasses.replace(manifest, classes=("x", "y", "z")).digest,
        dataclasses.replace(manifest, splits={"train": manifest.splits["train"]}).digest,
    }
    assert len(digests) == 5


# --- damage ------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(source(), str(tmp_path), 4)
    return tmp_path


def reading(folder: Path) -> str:
    """The message about reading `train`, which must be a DataError."""
    with pytest.raises(DataError) as caught:
        read_split(str(folder), read_manifest(str(folder)), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_of(folder: Path, change: Callable[[dict], object]) -> str:
    raw = json.loads((folder / "manifest.json").read_text())
    return json.dumps(change(raw))


def without(key: str) -> Callable[[dict], object]:
    return lambda raw: {name: value for name, value in raw.items() if name != key}


def with_shard(**entries: object) -> Callable[[dict], object]:
    def change(raw: dict) -> object:
        raw["splits"]["train"][0].update(entries)
        return raw

    return change


@pytest.mark.parametrize(
    "change",
    [
        *(without(key) for key in ("name", "shape", "classes", "splits", "digest")),
        with_shard(sha256="0" * 64),
        with_shard(extra=1),
        with_shard(samples="4"),
        lambda raw: {**raw, "splits": []},
        lambda raw: [],
        lambda raw: 3,
        lambda raw: {**raw, "shape": [1, 5]},
        lambda raw: {**raw, "name": "other"},
        lambda raw: {**raw, "classes": None},
        lambda raw: {**raw, "splits": {"train": raw["splits"]["train"]}},
    ],
)
def test_a_damaged_manifest_is_named(packed: Path, change: Callable[[dict], object]):
    (packed / "manifest.json").write_text(text_of(packed, change))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(str(packed))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_not_json_is_named(packed: Path, content: bytes):
    (packed / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(str(packed))


def test_a_folder_without_a_manifest_is_no_data_set(packed: Path):
    (packed / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not a data set"):
        read_manifest(str(packed))
    with pytest.raises(DataError, match="is not a data set"):
        read_manifest(str(packed / "nowhere"))


def test_a_manifest_that_promises_other_numbers_does_not_pass(packed: Path):
    original = (packed / "manifest.json").read_text()
    for entries, words in (({"samples": 5}, "its totals"), ({"bytes": 17}, "shard-000000")):
        (packed / "manifest.json").write_text(original)
        (packed / "manifest.json").write_text(text_of(packed, with_shard(**entries)))
        assert words in reading(packed)


@pytest.mark.parametrize(
    "entries", [{"samples": 0}, {"samples": -1}, {"bytes": 0}, {"sha256": None}, {"name": 3}, {"samples": True}]
)
def test_a_manifest_that_says_what_cannot_be_is_refused(packed: Path, entries: dict[str, object]):
    raw = with_shard(**entries)(json.loads((packed / "manifest.json").read_text()))
    assert isinstance(raw, dict)
    raw["totals"] = {split: sum(shard["samples"] for shard in of) for split, of in raw["splits"].items()}
    (packed / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(str(packed))


def test_a_shard_that_is_listed_twice_is_refused(packed: Path):
    raw = json.loads((packed / "manifest.json").read_text())
    first = raw["splits"]["train"][0]
    raw["splits"]["train"].append({**first, "name": "train/copy.tar"})
    raw["totals"]["train"] += first["samples"]
    (packed / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="the same images twice"):
        read_manifest(str(packed))


def test_a_manifest_nested_without_end_or_a_folder_is_named(packed: Path):
    (packed / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(str(packed))
    (packed / "manifest.json").unlink()
    (packed / "manifest.json").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        read_manifest(str(packed))


# --- png ---------------------------------------------------------------------------------------------


@given(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_png_is_lossless(channels: int, height: int, width: int, seed: int):
    image = np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(png_bytes(image), (channels, height, width)), image)
    np.testing.assert_array_equal(decoded(png_bytes(image)), image)
