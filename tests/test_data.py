"""Protects the images on their way in: what is packed is read back, the same input gives the same bytes, every image
comes at most once an epoch whatever the slots, and damage is an error that names shard and key, never a silent gap.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdiff.data.images import decoded, png_bytes
from tdiff.data.order import Order
from tdiff.data.shards import Manifest, Shard, pack, read_manifest
from tdiff.data.sources import SOURCES, Source, Split, digits
from tdiff.data.stream import read_split
from tdiff.errors import DataError


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
    assert SOURCES["digits"] is digits


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


SHARD = "train/shard-000001.tar"


def reading(folder: Path) -> str:
    """The message about reading `train`, which must be a DataError."""
    with pytest.raises(DataError) as caught:
        read_split(str(folder), read_manifest(str(folder)), "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def flipped(content: bytes) -> bytes:
    return content[:700] + bytes([content[700] ^ 1]) + content[701:]


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda content: content[:1024],  # a tar reader takes this for the end
        lambda content: content[:-512],
        lambda content: content + b"\0" * 512,
        lambda content: b"",
        lambda content: b"\0" * len(content),
    ],
    ids=["flipped", "cut at a member", "cut at the end", "longer", "empty", "zeros"],
)
def test_a_damaged_shard_is_named(packed: Path, damage: Callable[[bytes], bytes]):
    file = packed / SHARD
    file.write_bytes(damage(file.read_bytes()))
    message = reading(packed)
    assert SHARD in message
    assert "damaged" in message
    assert str(packed) in message


def test_a_missing_shard_is_named(packed: Path):
    (packed / SHARD).unlink()
    assert SHARD in reading(packed)
    assert "missing" in reading(packed)


def test_swapped_shards_are_noticed(packed: Path):
    one, two = packed / "train/shard-000000.tar", packed / "test/shard-000000.tar"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert "train/shard-000000.tar" in reading(packed)


def tar_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def sealed(folder: Path, content: bytes, samples: int) -> Path:
    """Makes `content` the only shard of `train`, with a manifest that agrees."""
    import hashlib

    (folder / SHARD).write_bytes(content)
    shard = Shard(SHARD, samples, len(content), hashlib.sha256(content).hexdigest())
    manifest = Manifest("noise", (1, 5, 5), None, {"train": (shard,)})
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def png(mode: str = "L", size: tuple[int, int] = (5, 5), kind: str = "png") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("members", "samples"),
    [
        ({"a.png": png(), "b.png": png()}, 1),  # one more than promised
        ({"a.png": png()}, 2),  # one fewer
        ({"a.png": png(), "a.cls": b"1", "b.png": png()}, 2),  # labels for some
    ],
)
def test_a_shard_with_another_number_of_samples_is_named(packed: Path, members: dict[str, bytes], samples: int):
    message = reading(sealed(packed, tar_of(members), samples))
    assert SHARD in message
    assert f"manifest.json says {samples}" in message


@pytest.mark.parametrize(
    "sample",
    [
        {"png": png(size=(6, 5))},
        {"png": png(size=(5, 4))},
        {"png": png("RGB")},
        {"png": png("RGBA")},
        {"png": png("I;16")},
        {"png": png("1")},
        {"png": png("P")},
        {"png": png(kind="jpeg")},  # only PNG is decoded, whatever the member is called
        {"png": png()[:40]},
        {"png": png()[:-20]},
        {"png": b""},
        {"png": b"\x80\x04."},
        {"jpg": png()},
        {"png": png(), "cls": b"one"},
        {"png": png(), "cls": b""},
    ],
)
def test_a_wrong_sample_is_named_with_its_key(packed: Path, sample: dict[str, bytes]):
    members = {"good.png": png(), **{f"bad-7.{kind}": content for kind, content in sample.items()}}
    if "cls" in sample:
        members = {"good.cls": b"0", **members}
    message = reading(sealed(packed, tar_of(members), 2))
    assert SHARD in message
    assert "key bad-7" in message


def twice(name: str, content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for _ in range(2):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.mark.parametrize("content", [b"hello" * 300, b"\0" * 1024, twice("a.png", png())])
def test_a_shard_that_is_no_tar_of_samples_is_named(packed: Path, content: bytes):
    for samples in (0, 1):
        assert SHARD in reading(sealed(packed, content, samples))


def test_an_image_larger_than_memory_is_named(packed: Path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = png()[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + png()[33:]
    assert "key a" in reading(sealed(packed, tar_of({"a.png": bomb}), 1))


class Trap:
    """Unpickling this makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def test_nothing_is_unpickled(packed: Path):
    mark = packed / "executed"
    bomb = pickle.dumps(Trap(mark))
    pickle.loads(bomb)
    assert mark.exists()  # it does work
    mark.unlink()
    members = {"a.png": png(), "a.cls": b"1"} | {f"a.{kind}": bomb for kind in ("pyd", "pickle", "pkl", "pth", "json")}
    sealed(packed, tar_of(members), 1)
    assert len(read_split(str(packed), read_manifest(str(packed)), "train")) == 1
    for kind in ("png", "cls"):
        reading(sealed(packed, tar_of({"a.png": png(), "a.cls": b"1"} | {f"a.{kind}": bomb}), 1))
    assert not mark.exists()


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
    for entries in ({"samples": 5}, {"bytes": 17}):
        pack(source(), str(packed), 4)
        (packed / "manifest.json").write_text(text_of(packed, with_shard(**entries)))
        assert "shard-000000" in reading(packed)


# --- png ---------------------------------------------------------------------------------------------


@given(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_png_is_lossless(channels: int, height: int, width: int, seed: int):
    image = np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(png_bytes(image), (channels, height, width)), image)
    np.testing.assert_array_equal(decoded(png_bytes(image)), image)


# --- order -------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(0, 100)).map(
    lambda drawn: (drawn[0], drawn[0] * drawn[1], drawn[0] * drawn[1] + drawn[2])
)  # slots, batch, count


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """All positions of an epoch in the order of use, [steps, batch]."""
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    return np.array([np.concatenate([order.positions(t, s) for s in range(order.slots)]) for t in steps])


@given(shapes, st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_each_image_comes_at_most_once_an_epoch_and_less_than_a_batch_is_left_out(shape, seed: int, epoch: int):
    slots, batch, count = shape
    order = Order(count, batch, slots, seed, "00-root")
    seen = epoch_of(order, epoch).ravel()
    assert len(set(seen.tolist())) == len(seen)
    assert seen.min() >= 0
    assert seen.max() < count
    assert 0 <= count - len(seen) < batch


@given(st.integers(1, 4), st.integers(0, 30), st.integers(0, 20))
@settings(deadline=None, max_examples=40)
def test_slots_are_parts_of_the_same_batch_however_many(parts: int, extra: int, step: int):
    batch = 12 * parts
    one = Order(batch + extra, batch, 1, 0, "00-root").positions(step, 0)
    for slots in (2, 3, 4, 6, 12):
        order = Order(batch + extra, batch, slots, 0, "00-root")
        pieces = [order.positions(step, slot) for slot in range(slots)]
        assert {len(piece) for piece in pieces} == {batch // slots}
        np.testing.assert_array_equal(np.concatenate(pieces), one)


def test_epochs_seeds_and_phases_have_orders_of_their_own():
    def order(seed: int = 0, phase: str = "00-root") -> Order:
        return Order(100, 30, 2, seed, phase)

    orders = [
        epoch_of(order(), 0),
        epoch_of(order(), 1),
        epoch_of(order(seed=1), 0),
        epoch_of(order(phase="01-split-1"), 0),
        epoch_of(order(phase="02-split-1"), 0),
    ]
    assert len({tuple(found.ravel().tolist()) for found in orders}) == len(orders)


def test_what_is_left_out_is_others_the_next_time():
    order = Order(100, 30, 2, 0, "00-root")
    left_out = [frozenset(range(100)) - set(epoch_of(order, epoch).ravel().tolist()) for epoch in range(8)]
    assert all(len(ids) == 10 for ids in left_out)
    assert len(set(left_out)) == 8
    assert not frozenset.intersection(*left_out)


@given(shapes, st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=8), st.randoms())
@settings(deadline=None, max_examples=40)
def test_the_order_has_no_memory(shape, asked: list[tuple[int, int]], random):
    slots, batch, count = shape
    order = Order(count, batch, slots, 0, "00-root")
    asked = [(step, slot % slots) for step, slot in asked]
    before = {at: order.positions(*at) for at in asked}
    for positions in before.values():
        positions.copy()[:] = -1
    random.shuffle(asked)
    for at in asked:
        np.testing.assert_array_equal(Order(count, batch, slots, 0, "00-root").positions(*at), before[at])


def test_what_a_caller_does_to_positions_changes_no_later_ones():
    order = Order(20, 10, 2, 0, "00-root")
    first = order.positions(0, 0)
    kept = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(order.positions(0, 0), kept)


def test_the_order_is_the_same_on_every_machine():
    """Recorded: an order that changes would silently change every run that is resumed."""
    assert Order(10, 4, 2, 0, "00-root").positions(0, 0).tolist() == [4, 5]
    assert Order(10, 4, 2, 7, "03-split-4").positions(5, 1).tolist() == [7, 0]


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="3 images are fewer than one batch of 4"):
        Order(3, 4, 2, 0, "00-root")
    assert Order(4, 4, 2, 0, "00-root").steps_per_epoch == 1
