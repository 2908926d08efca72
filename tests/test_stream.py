"""Protects the reader: what comes out of a data set's shards is exactly what the order asks for, whatever the workers,
the cache and the point of resuming; a byte that is not what the manifest says is an error that names the shard; and a
set that is larger than the cache streams in the memory of a few shards.
"""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from making import CLASSES, DataSet, make_set, picture, png_of, shard_name, shard_of, tar_of, write_set

from tdiff import storage
from tdiff.data.decode import Images
from tdiff.data.order import Order
from tdiff.data.stream import AHEAD, Batches, Reader, check_shards, read_split
from tdiff.errors import DataError

PHASE = "00-root"
PLENTY = 10**9


def reader_of(made: DataSet, cache: Path | None = None, limit: int = PLENTY, bad: int = 0) -> Reader:
    return Reader(made.url, made.manifest, "train", cache, limit, bad)


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """97 images in shards of many sizes; not to be changed."""
    return make_set(tmp_path_factory.mktemp("noise"), [20, 1, 33, 2, 7, 1, 30, 3])


@pytest.fixture
def small(tmp_path: Path) -> DataSet:
    return make_set(tmp_path / "set", [4, 3, 5])


def refused(act: Callable[[], object], *parts: str) -> str:
    """The message of a DataError of one line that holds all `parts`."""
    with pytest.raises(DataError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def readings(made: DataSet, **settings: int) -> list[Callable[[], object]]:
    """Every way to ask for all images."""

    def batches() -> None:
        reader = reader_of(made, **settings)
        order = Order(reader.counts(), 4, 2, 0, PHASE, 100)
        stream = Batches(reader, order, 100 * order.steps_per_epoch)
        for step in range(100 * order.steps_per_epoch):
            for slot in (0, 1):
                stream(step, slot)

    return [
        lambda: reader_of(made, **settings).all(),
        lambda: reader_of(made, **settings).gather(np.arange(len(made.images))),
        lambda: list(reader_of(made, **settings).blocks(0, len(made.images), 2)),
        batches,
    ]


# --- gather ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 96), max_size=60))
@settings(deadline=None, max_examples=40)
def test_ids_are_gathered_in_any_order_and_again(noise: DataSet, ids: list[int]):
    wanted = np.array(ids, np.int64)
    reader = reader_of(noise)
    for _ in range(2):
        found = reader.gather(wanted)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, noise.images[wanted])


def test_a_whole_split_comes_in_the_manifests_order_with_its_labels(noise: DataSet, tmp_path: Path):
    for reader in (reader_of(noise), reader_of(noise, tmp_path), reader_of(noise, tmp_path)):
        assert len(reader) == 97
        found = reader.all()
        np.testing.assert_array_equal(found.images, noise.images)
        assert found.labels is not None
        assert noise.labels is not None
        np.testing.assert_array_equal(found.labels, noise.labels)
    np.testing.assert_array_equal(read_split(noise.url, noise.manifest, "train").images, noise.images)


def test_a_set_without_labels_has_none(tmp_path: Path):
    made = make_set(tmp_path / "set", [3, 2], (3, 4, 4), labelled=False)
    for _ in range(2):
        found = reader_of(made, tmp_path / "cache").all()
        assert found.labels is None
        np.testing.assert_array_equal(found.images, made.images)


def test_labels_in_some_shards_only_are_refused(tmp_path: Path):
    images = np.zeros((2, 1, 5, 5), np.uint8)
    manifest = write_set(tmp_path, [shard_of(images, [1, 2]), shard_of(images, None, 2)], [2, 2], (1, 5, 5))
    made = DataSet(tmp_path, manifest, images, None)
    refused(lambda: reader_of(made).all(), "some shards of train have labels and some have none")


def test_what_is_gathered_is_the_callers_own(noise: DataSet, tmp_path: Path):
    for reader in (reader_of(noise), reader_of(noise, tmp_path), reader_of(noise, tmp_path)):
        for _ in range(2):
            found = reader.gather(np.arange(97))
            np.testing.assert_array_equal(found, noise.images)
            found[:] = 0


@given(st.lists(st.booleans(), min_size=97, max_size=97))
@settings(deadline=None, max_examples=20)
def test_ids_are_counted_by_shard(noise: DataSet, chosen: list[bool]):
    reader = reader_of(noise)
    sizes = [shard.samples for shard in reader.shards]
    assert reader.counts() == sizes
    ids = np.flatnonzero(chosen)
    assert reader.counts(ids) == np.bincount(np.repeat(np.arange(8), sizes)[ids], minlength=8).tolist()


def test_a_shard_that_is_wanted_again_soon_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = make_set(tmp_path, [2] * 6)
    read: list[int] = []

    def read_bytes(url: str) -> bytes:
        read.append(int(url[-10:-4]))
        return Path(url).read_bytes()

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    reader = reader_of(made)
    reader.gather(np.array([0, 7, 2, 1, 4, 6, 3, 0]))  # in any order, every shard once
    assert sorted(read) == [0, 1, 2, 3]
    for ids in ([0], [2], [4], [6], [0]):
        reader.gather(np.array(ids))
    assert len(read) == 4
    for ids in ([8], [10], [0]):  # 0 was used since 1 and 2 were
        reader.gather(np.array(ids))
    assert sorted(read) == [0, 1, 2, 3, 4, 5]


@pytest.mark.timeout(60)
def test_few_shards_are_read_ahead_of_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Or a gather from many shards would have all of them in memory."""
    made = make_set(tmp_path, [1] * 20)
    read: list[str] = []
    slow = threading.Event()

    def read_bytes(url: str) -> bytes:
        if url.endswith(shard_name(0)):
            slow.wait(30)
        else:
            read.append(url)
        return Path(url).read_bytes()

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    counted: list[int] = []
    thread = threading.Thread(target=lambda: counted.append(len(reader_of(made).gather(np.arange(20)))))
    thread.start()
    time.sleep(0.5)
    ahead = len(read)
    slow.set()
    thread.join()
    assert counted == [20]
    assert len(read) == 19
    assert ahead <= AHEAD


# --- blocks in the manifest's order ------------------------------------------------------------------


@given(st.integers(0, 97), st.integers(0, 97), st.integers(1, 120))
@settings(deadline=None, max_examples=40)
def test_blocks_are_a_stretch_of_the_split_each_with_its_place(noise: DataSet, one: int, other: int, size: int):
    """An empty stretch too: that of a worker for whom too few blocks were left."""
    first, last = sorted((one, other))
    out = np.zeros_like(noise.images)
    ends = [first]
    labels = np.zeros(len(noise.images), np.int64)
    for place, images in reader_of(noise).blocks(first, last, size):
        assert place.start == ends[-1]
        assert 0 < place.stop - place.start <= size
        ends.append(place.stop)
        out[place], labels[place] = images.images, images.labels
    assert ends[-1] == last
    assert len(ends) == 1 + -(-(last - first) // size)
    np.testing.assert_array_equal(out[first:last], noise.images[first:last])
    assert noise.labels is not None
    np.testing.assert_array_equal(labels[first:last], noise.labels[first:last])


def test_images_without_labels_are_taken_without(tmp_path: Path):
    made = make_set(tmp_path, [5, 4], labelled=False)
    taken = reader_of(made).take(np.array([7, 1]))
    assert taken.labels is None
    np.testing.assert_array_equal(taken.images, made.images[[7, 1]])


# --- batches -----------------------------------------------------------------------------------------


@given(st.data())
@settings(deadline=None, max_examples=25)
def test_batches_are_what_the_order_says_whatever_workers_cache_and_resuming(data: st.DataObject):
    counts = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=6), "counts")
    slots = data.draw(st.sampled_from([1, 2, 4]), "slots")
    part = data.draw(st.integers(1, 3), "part")
    block = data.draw(st.sampled_from([1, 3, 8, 100]), "block")
    subset = data.draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=sum(counts), max_size=sum(counts))))
    ids = None if subset is None else np.flatnonzero(subset)
    assume(slots * part <= (sum(counts) if ids is None else len(ids)))
    with tempfile.TemporaryDirectory() as folder:
        made = make_set(Path(folder) / "set", counts, seed=sum(counts))
        cache = data.draw(st.sampled_from([None, Path(folder) / "cache"]), "cache")
        limit = data.draw(st.sampled_from([1000, PLENTY]), "limit")

        def order_of(reader: Reader) -> Order:
            return Order(reader.counts(ids), slots * part, slots, 0, PHASE, block)

        whole = reader_of(made)
        order = order_of(whole)
        steps = data.draw(st.integers(1, 3), "epochs") * order.steps_per_epoch
        rows = [[order.positions(step, slot) for slot in range(slots)] for step in range(steps)]
        chosen = made.images if ids is None else made.images[ids]
        for workers in (1, 2, 4):
            if slots % workers:
                continue
            start = data.draw(st.integers(0, steps - 1), "start") if workers > 1 else 0
            for rank in range(workers):
                reader = reader_of(made, cache, limit)
                stream = Batches(reader, order_of(reader), steps, ids)
                for step in range(start, steps):
                    for slot in range(rank, slots, workers):
                        np.testing.assert_array_equal(stream(step, slot), chosen[rows[step][slot]])


def test_labels_come_with_the_images_they_belong_to(noise: DataSet):
    reader = reader_of(noise)
    order = Order(reader.counts(), 8, 2, 0, PHASE, 12)
    stream = Batches(reader, order, 24)
    assert noise.labels is not None
    for step in range(24):
        for slot in (0, 1):
            ids, found = order.positions(step, slot), stream.take(step, slot)
            np.testing.assert_array_equal(found.images, noise.images[ids])
            np.testing.assert_array_equal(found.labels, noise.labels[ids])  # type: ignore[arg-type]


def test_images_without_labels_have_none_in_batches(tmp_path: Path):
    made = make_set(tmp_path, [9], labelled=False)
    stream = Batches(reader_of(made), Order([9], 4, 2, 0, PHASE, 12), 2)
    assert stream.take(0, 0).labels is None
    assert len(stream(0, 1)) == 2


class Watched(Reader):
    """A reader that notes what is gathered, and what of that is still in memory."""

    def __init__(self, made: DataSet):
        super().__init__(made.url, made.manifest, "train")
        self.asked: list[list[int]] = []
        self.given: list[weakref.ref[np.ndarray]] = []

    def take(self, ids: np.ndarray) -> Images:
        self.asked.append(ids.tolist())
        found = super().take(ids)
        self.given.append(weakref.ref(found.images))
        return found

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.given)


def test_every_block_is_gathered_once_and_resuming_reads_one_block_back(noise: DataSet):
    def asked(start: int, steps: int) -> list[list[int]]:
        reader = Watched(noise)
        stream = Batches(reader, Order(reader.counts(), 8, 2, 0, PHASE, 12), steps)
        for step in range(start, steps):
            for slot in (0, 1):
                assert len(stream(step, slot)) == 4
                assert reader.alive() <= 4, "more than two blocks of each slot"
        return reader.asked

    order = Order([20, 1, 33, 2, 7, 1, 30, 3], 8, 2, 0, PHASE, 12)
    assert order.steps_per_epoch == 12
    blocks = {(k, s): order.block(order.block_of(3 * k), s).tolist() for k in range(8) for s in (0, 1)}
    assert sorted(asked(0, 24)) == sorted(blocks.values())
    assert sorted(asked(10, 22)) == sorted(block for (k, _), block in blocks.items() if k >= 3)
    assert sorted(asked(4, 6)) == sorted([blocks[1, 0], blocks[1, 1]])  # nothing beyond the last step


def test_steps_may_be_asked_again_and_in_any_order(noise: DataSet):
    reader = reader_of(noise)
    order = Order(reader.counts(), 6, 2, 0, PHASE, 9)
    stream = Batches(reader, order, 40)
    for step in (0, 0, 1, 30, 3, 31, 2, 39, 0):
        for slot in (1, 0):
            np.testing.assert_array_equal(stream(step, slot), noise.images[order.positions(step, slot)])


def test_the_next_block_is_gathered_while_this_one_is_used(small: DataSet):
    """The first block's end is never asked for, and yet the second comes."""
    reader = Watched(small)
    stream = Batches(reader, Order(reader.counts(), 2, 1, 0, PHASE, 4), 100)
    stream(0, 0)
    deadline = time.monotonic() + 20
    while len(reader.asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(reader.asked) == 2


# --- what the manifest says --------------------------------------------------------------------------


def test_listing_finds_what_is_missing_or_of_another_size(small: DataSet):
    versions = check_shards(small.url, small.manifest, "train")
    assert list(versions) == [shard_name(k) for k in range(3)]
    assert check_shards(small.url, small.manifest, "train") == versions
    content = small.shard(1).read_bytes()
    small.shard(1).unlink()
    refused(lambda: check_shards(small.url, small.manifest, "train"), small.url, shard_name(1), "missing")
    small.shard(1).write_bytes(content)
    changed = check_shards(small.url, small.manifest, "train")
    assert {name for name in versions if changed[name] != versions[name]} == {shard_name(1)}
    for length in (-512, None):
        small.shard(1).write_bytes((content + b"\0" * (length is None))[:length])
        refused(lambda: check_shards(small.url, small.manifest, "train"), small.url, shard_name(1), "is damaged (")


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped in an image": lambda content: content.replace(b"IDAT", b"IDAT\x00", 1)[: len(content)],
    "flipped in a header": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "flipped at the end": lambda content: content[:-1] + b"\1",
    "cut in a header": lambda content: content[:600],
    "cut between samples": lambda content: content[:2048],
    "cut at a block": lambda content: content[:-512],
    "cut in an image": lambda content: content[: content.index(b"IDAT")],
    "longer": lambda content: content + b"\0" * 512,
    "twice": lambda content: content.rstrip(b"\0") + content,
    "empty": lambda content: b"",
    "zeros": lambda content: b"\0" * len(content),
    "garbage": lambda content: np.random.default_rng(0).bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_shard_is_named_whatever_is_asked(small: DataSet, damage: Callable[[bytes], bytes]):
    small.shard(1).write_bytes(damage(small.shard(1).read_bytes()))
    for read in readings(small):
        refused(read, small.url, shard_name(1), "damaged", "pack it again")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_shard_that_is_damaged_after_it_was_listed_is_named(small: DataSet, damage: Callable[[bytes], bytes]):
    reader = reader_of(small, small.folder / "cache")
    small.shard(1).write_bytes(damage(small.shard(1).read_bytes()))
    for _ in range(2):  # and is not kept
        refused(lambda: reader.gather(np.array([5])), small.url, shard_name(1), "damaged")
    small.shard(2).unlink()
    refused(lambda: reader.gather(np.array([8])), small.url, shard_name(2), "missing")
    np.testing.assert_array_equal(reader.gather(np.arange(4)), small.images[:4])


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_no_byte_can_change_unnoticed(noise: DataSet, data: st.DataObject):
    with tempfile.TemporaryDirectory() as folder:
        made = make_set(Path(folder), [2, 1])
        content = bytearray(made.shard(0).read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
        made.shard(0).write_bytes(content)
        bad = data.draw(st.sampled_from([0, 0, 5]))
        reader = reader_of(made, bad=bad)
        if not bad:
            refused(lambda: reader.gather(np.array([1])), shard_name(0), "damaged")
            return
        try:
            found = reader.gather(np.arange(2))
        except DataError as error:
            message = str(error)
            refused(lambda: reader.gather(np.arange(2)), message)
        else:  # one image was damaged, told, and replaced
            assert len(reader.bad) == 1
            assert any(np.array_equal(found, made.images[[k, k]]) for k in (0, 1))


def test_a_damaged_byte_in_an_image_is_named_with_its_key(small: DataSet):
    content = small.shard(1).read_bytes()
    at = content.index(b"IDAT", content.index(b"key-5.png")) + 4
    small.shard(1).write_bytes(content[:at] + b"\xff\xff" + content[at + 2 :])
    message = refused(reader_of(small).all, shard_name(1), "damaged", "first at key key-5: ")
    assert message.count(shard_name(1)) == 1


def test_a_missing_shard_is_named(small: DataSet):
    small.shard(1).unlink()
    for read in readings(small):
        refused(read, small.url, shard_name(1), "missing")


def test_swapped_shards_are_noticed(tmp_path: Path):
    made = make_set(tmp_path, [3, 3, 2])
    one, two = made.shard(0).read_bytes(), made.shard(1).read_bytes()
    assert len(one) == len(two)
    made.shard(0).write_bytes(two)
    made.shard(1).write_bytes(one)
    for read in readings(made):
        refused(read, made.url, "train/shard-00000", "damaged")
    made.shard(1).write_bytes(two)
    refused(reader_of(made).all, shard_name(0), "damaged")


@pytest.mark.parametrize("promised", [2, 4, 0, 30])
@pytest.mark.parametrize("bad", [0, 3])
def test_one_sample_more_or_fewer_than_the_manifest_says_is_named(tmp_path: Path, promised: int, bad: int):
    """Though its checksum is right."""
    images = np.zeros((3, 1, 5, 5), np.uint8)
    manifest = write_set(tmp_path, [shard_of(images), shard_of(images)], [3, promised], (1, 5, 5))
    reader = Reader(str(tmp_path), manifest, "train", max_bad_samples=bad)
    message = f"holds 3 samples, manifest.json says {promised}"
    refused(reader.all, shard_name(1), message)
    if promised:
        refused(lambda: reader.gather(np.array([3])), shard_name(1), message)


def test_an_image_that_does_not_fit_the_manifest_is_named_with_its_key(tmp_path: Path):
    def message(*members: tuple[str, bytes], classes: tuple[str, ...] | None = CLASSES) -> str:
        manifest = write_set(
            tmp_path, [tar_of([("good.png", picture()), ("good.cls", b"0"), *members])], [2], (1, 5, 5)
        )
        manifest = replace(manifest, classes=classes)
        found = refused(Reader(str(tmp_path), manifest, "train").all, shard_name(0))
        assert "is damaged" not in found  # packing it again would not help
        return found

    assert "key bad: image is L 5x6, but should be (1, 5, 5)" in message(("bad.png", picture(size=(6, 5))))
    assert "key bad: image is RGB 5x5" in message(("bad.png", picture("RGB")))
    assert "key bad: label 3 is out of range (0 to 2)" in message(("bad.png", picture()), ("bad.cls", b"3"))
    assert "key bad: label -1" in message(("bad.png", picture()), ("bad.cls", b"-1"), classes=None)
    assert "key bad: no image" in message(("bad.cls", b"1"))
    assert "key good: two samples" in message(("bad.png", picture()), ("good.cls", b"1"))
    assert "some samples have labels" in message(("bad.png", picture()))


# --- the cache ---------------------------------------------------------------------------------------


def test_what_is_cached_is_not_read_again(small: DataSet, tmp_path: Path):
    """Garbage under an unchanged size, time and inode would be noticed by anyone who reads it."""
    cache = tmp_path / "cache"
    np.testing.assert_array_equal(reader_of(small, cache).all().images, small.images)
    for k in range(3):
        stat = small.shard(k).stat()
        with small.shard(k).open("r+b") as file:
            file.write(b"\xaa" * stat.st_size)
        os.utime(small.shard(k), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(reader_of(small).all, "damaged")
    for _ in range(2):
        reader = reader_of(small, cache)
        for _ in range(2):
            found = reader.all()
            np.testing.assert_array_equal(found.images, small.images)
            assert found.labels is not None
            np.testing.assert_array_equal(found.labels, small.labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_shard_that_is_replaced_after_it_was_cached_is_noticed(small: DataSet, tmp_path: Path, in_place: bool):
    cache = tmp_path / "cache"
    reader_of(small, cache).all()
    reader_of(small, cache).all()
    content = bytearray(small.shard(1).read_bytes())
    content[700] ^= 1
    if not in_place:
        small.shard(1).unlink()
    small.shard(1).write_bytes(content)
    refused(reader_of(small, cache).all, shard_name(1), "damaged")


def test_sets_of_the_same_bytes_with_another_meaning_do_not_share(small: DataSet, tmp_path: Path):
    cache = tmp_path / "cache"
    reader_of(small, cache).all()
    narrow = replace(small.manifest, classes=("a",))
    refused(Reader(small.url, narrow, "train", cache, PLENTY).all, "out of range")
    wide = replace(small.manifest, shape=(1, 5, 6))
    refused(Reader(small.url, wide, "train", cache, PLENTY).all, "should be (1, 5, 6)")


def test_a_cache_without_room_changes_no_image(noise: DataSet, tmp_path: Path):
    for limit in (0, 1, 1500, 4000):
        for _ in range(2):
            reader = reader_of(noise, tmp_path / str(limit), limit)
            for _ in range(2):
                np.testing.assert_array_equal(reader.all().images, noise.images)
        root = tmp_path / str(limit)
        assert sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) <= limit
        assert root.exists() == (limit > 0)


# --- damaged images that are allowed -----------------------------------------------------------------


def with_bad_images(folder: Path, bad: dict[int, set[int]], sealed: bool = True) -> DataSet:
    """Six shards of four images, more than a reader has at hand. bad: shard -> its damaged images; sealed: the manifest
    was made of them as they are."""
    made = make_set(folder, [4] * 6)
    contents = []
    for k in range(6):
        content = made.shard(k).read_bytes()
        for i in bad.get(k, set()):
            at = content.index(b"IDAT", content.index(f"key-{4 * k + i}.png".encode())) + 4
            content = content[:at] + b"\xff\xff" + content[at + 2 :]
        contents.append(content)
    if sealed:
        return replace(made, manifest=write_set(folder, contents, [4] * 6, (1, 5, 5)))
    for k, content in enumerate(contents):
        made.shard(k).write_bytes(content)
    return made


@pytest.mark.parametrize("sealed", [True, False], ids=["packed so", "damaged later"])
@pytest.mark.parametrize("cached", [True, False])
def test_damaged_images_within_the_limit_are_counted_told_once_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sealed: bool, cached: bool
):
    made = with_bad_images(tmp_path / "set", {0: {1}, 2: {3, 0}}, sealed)
    taken = np.array([0, 0, 2, 3, 4, 5, 6, 7, 9, 9, 10, 10, *range(12, 24)])
    for _ in range(2):  # a second reader tells it too
        caplog.clear()
        reader = reader_of(made, tmp_path / "cache" if cached else None, bad=3)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                found = reader.all()
                np.testing.assert_array_equal(found.images, made.images[taken])
                assert made.labels is not None
                np.testing.assert_array_equal(found.labels, made.labels[taken])  # type: ignore[arg-type]
                reader.gather(np.arange(24))
        assert len(reader.bad) == 3
        messages = [record.message for record in caplog.records]
        skipped = [message for message in messages if "skipped (" in message]
        assert sorted(message.split(", key ")[1].split(":")[0] for message in skipped) == ["key-1", "key-11", "key-8"]
        assert "skipped (3 of 3 allowed)" in skipped[-1]
        assert sum("SHA-256 differs" in message for message in messages) == (0 if sealed else 2), "once a shard"


@pytest.mark.parametrize("sealed", [True, False], ids=["packed so", "damaged later"])
def test_one_damaged_image_too_many_is_an_error_and_stays_one(tmp_path: Path, sealed: bool):
    made = with_bad_images(tmp_path / "set", {0: {1}, 1: {0, 1, 2}}, sealed)
    for read in readings(made, bad=3):
        refused(read, "key key-", "data.max_bad_samples, which is 3")
    reader = reader_of(made, tmp_path / "cache", bad=3)
    for _ in range(3):
        refused(reader.all, "data.max_bad_samples, which is 3")
        # Both shards: which of them is one too many depends on the threads.
        refused(lambda: reader.gather(np.arange(8)), "data.max_bad_samples, which is 3")
    refused(reader_of(made, bad=0).all, shard_name(0), "key key-1: ")
    assert len(reader_of(made, bad=4).all()) == 24


def test_a_limit_does_not_excuse_what_is_no_damaged_image(small: DataSet):
    content = small.shard(1).read_bytes()
    for damage in ("flipped in a header", "cut in an image", "longer", "zeros", "garbage", "flipped at the end"):
        small.shard(1).write_bytes(DAMAGE[damage](content))
        refused(lambda: reader_of(small, bad=100).all(), shard_name(1), "damaged")


def test_a_limit_does_not_excuse_a_shard_that_grew_though_an_image_in_it_is_damaged(tmp_path: Path):
    made = with_bad_images(tmp_path, {1: {0}})
    reader = reader_of(made, bad=100)
    made.shard(1).write_bytes(made.shard(1).read_bytes() + b"\0" * 512)
    refused(reader.all, shard_name(1), "is damaged (")


def test_a_shard_without_an_intact_image_is_an_error_whatever_the_limit(tmp_path: Path):
    made = with_bad_images(tmp_path, {1: {0, 1, 2, 3}})
    refused(lambda: reader_of(made, bad=100).all(), shard_name(1), "key key-")


# --- threads -----------------------------------------------------------------------------------------


def settled(before: set[threading.Thread]) -> bool:
    """Whether all threads that were started since have ended."""
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before:
        gc.collect()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.timeout(60)
def test_an_error_in_the_background_reaches_the_caller_and_leaves_no_thread(tmp_path: Path):
    made = make_set(tmp_path, [8] * 6)
    before = set(threading.enumerate())
    reader = reader_of(made)
    order = Order(reader.counts(), 8, 2, 0, PHASE, 4)
    stream = Batches(reader, order, 600)
    stream(0, 0)
    made.shard(3).write_bytes(b"\0" * made.shard(3).stat().st_size)

    def straight(stream: Batches) -> None:
        for step in range(600):
            for slot in (0, 1):
                stream(step, slot)

    for _ in range(3):  # it is told again, not only once
        refused(partial(straight, stream), shard_name(3), "damaged")
    del stream, reader
    assert settled(before)


@pytest.mark.timeout(60)
def test_no_thread_is_left_by_what_is_abandoned(noise: DataSet):
    before = set(threading.enumerate())
    reader = reader_of(noise)
    blocks = reader.blocks(0, 97, 10)
    next(blocks)
    blocks.close()
    stream = Batches(reader, Order(reader.counts(), 8, 2, 0, PHASE, 16), 100)
    stream(0, 0)
    del stream, reader, blocks
    assert settled(before)


def test_many_threads_may_gather_from_one_reader(noise: DataSet, tmp_path: Path):
    for cache in (None, tmp_path):
        reader = reader_of(noise, cache, 8000)
        wrong = []

        def gather(seed: int, reader: Reader = reader, wrong: list[int] = wrong) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(10):
                ids = rng.integers(0, 97, 20)
                if not np.array_equal(reader.gather(ids), noise.images[ids]):
                    wrong.append(seed)

        threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


# --- memory ------------------------------------------------------------------------------------------

PROBE = """
import sys
from pathlib import Path
from tdiff.data.order import Order
from tdiff.data.shards import read_manifest
from tdiff.data.stream import Batches, Reader

def megabytes():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024

url, cache, limit = sys.argv[1:]
reader = Reader(url, read_manifest(url), "train", Path(cache), int(limit))
order = Order(reader.counts(), 32, 2, 0, "00-root", 128)
batches = Batches(reader, order, 4 * order.steps_per_epoch)
print(megabytes())
for epoch in range(4):
    highest = 0
    for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch):
        for slot in (0, 1):
            batches(step, slot).sum()
        highest = max(highest, megabytes())
    print(highest)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("limit", [8 * 2**20, PLENTY], ids=["a tenth fits", "all fits"])
def test_a_set_ten_times_larger_than_the_cache_streams_in_flat_memory(tmp_path: Path, limit: int):
    """80 MiB of pixels. All in the cache they are no more memory, since they are mapped and not loaded."""
    side = 128
    png = [png_of(np.full((1, side, side), value, np.uint8)) for value in range(32)]
    contents = [tar_of((f"{k}-{i}.png", png[(k + i) % 32]) for i in range(64)) for k in range(80)]
    manifest = write_set(tmp_path / "set", contents, [64] * 80, (1, side, side))
    assert manifest.samples("train") * side**2 == 80 * 2**20
    command = [sys.executable, "-c", PROBE, str(tmp_path / "set"), str(tmp_path / "cache"), str(limit)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, first, *later = [float(line) for line in output.split()]
    assert len(later) == 3
    assert first - before < 40  # blocks of 2 MiB, shards of 1 MiB, and what malloc keeps
    assert max(later) - first < 16


def test_an_empty_image_is_one_however_often_it_is_read(tmp_path: Path):
    """Pillow's own text about it names an address in memory, another one each time."""
    made = make_set(tmp_path / "set", [4, 4])
    contents = [made.shard(0).read_bytes(), tar_of([("a.png", b""), ("b.png", png_of(made.images[5]))])]
    sealed = replace(made, manifest=write_set(tmp_path / "set", contents, [4, 2], (1, 5, 5)))
    reader = reader_of(sealed, bad=1)
    for _ in range(5):
        reader.gather(np.arange(6))
        reader._recent.clear()
    assert len(reader.bad) == 1
    assert "0x" not in next(iter(reader.bad))
