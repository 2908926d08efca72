"""Protects the cache of decoded shards: what it gives back is what was kept or nothing, whoever shares it, dies in it,
damages it or fills the disk; it never takes more room than it may, and never touches what is not its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import make_set, shard_name

from tdiff.data.cache import FORGOTTEN, Cache, Tensors, default_root
from tdiff.data.stream import Reader
from tdiff.errors import ConfigError

PLENTY = 10**9
EMPTY = 400
"""More than what a kept shard needs beside its pixels."""


def tensors(seed: int = 0, count: int = 20, labelled: bool = True) -> Tensors:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 5, 4), dtype=torch.uint8, generator=rng)
    return {"images": images} | ({"labels": torch.arange(count) + seed} if labelled else {})


def same(found: Tensors | None, kept: Tensors) -> bool:
    return (
        found is not None
        and found.keys() == kept.keys()
        and all(found[name].dtype == kept[name].dtype and torch.equal(found[name], kept[name]) for name in kept)
    )


def below(root: Path) -> list[Path]:
    """Everything that takes room: all files but the lock."""
    return [file for file in root.rglob("*") if file.is_file() and file.name != ".lock"]


def taken(root: Path) -> int:
    total = 0
    for file in below(root):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def only_file(root: Path) -> Path:
    (file,) = below(root)
    return file


# --- what is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [True, False])
def test_what_is_kept_comes_back_in_this_process_and_another(tmp_path: Path, labelled: bool):
    kept = tensors(labelled=labelled)
    cache = Cache(tmp_path / "root", "set", PLENTY)
    assert cache.read("shard") is None
    assert cache.write("shard", kept)
    assert same(cache.read("shard"), kept)
    again = Cache(tmp_path / "root", "set", PLENTY)
    assert same(again.read("shard"), kept)
    assert again.read("other") is None
    assert Cache(tmp_path / "root", "other", PLENTY).read("shard") is None
    assert again.write("shard", tensors(1))  # the newest counts
    assert same(cache.read("shard"), tensors(1))
    assert len(below(tmp_path / "root")) == 1


def test_what_is_kept_is_mapped_and_another_ones_changes_do_not_show(tmp_path: Path):
    cache = Cache(tmp_path, "set", PLENTY)
    cache.write("shard", tensors())
    found = cache.read("shard")
    assert found is not None
    file = only_file(tmp_path)
    assert str(file) in Path("/proc/self/maps").read_text()
    found["images"].zero_()
    assert same(cache.read("shard"), tensors())
    other = Cache(tmp_path, "set", PLENTY)
    found = cache.read("shard")
    other.write("shard", tensors(1))
    assert same(found, tensors())
    only_file(tmp_path).unlink()
    assert same(found, tensors())
    assert other.read("shard") is None


def test_mapped_images_outlive_the_file_that_another_process_removes(tmp_path: Path):
    cache = Cache(tmp_path / "root", "set", PLENTY)
    cache.write("shard", tensors())
    found = cache.read("shard")
    subprocess.run(["rm", "-r", str(tmp_path / "root")], check=True)
    assert same(found, tensors())
    assert cache.read("shard") is None
    assert not cache.write("shard", tensors())  # told, and no error


def test_the_default_folder_is_this_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = default_root()
    assert root.parent == tmp_path
    assert str(os.getuid()) in root.name
    Cache(root, "set", PLENTY)
    assert root.stat().st_mode & 0o777 == 0o700


# --- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 300, -1])
def test_a_truncated_file_is_made_anew(tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture):
    cache = Cache(tmp_path, "set", PLENTY)
    cache.write("shard", tensors())
    file = only_file(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    with caplog.at_level(logging.WARNING):
        assert cache.read("shard") is None
    assert "damaged" in caplog.text
    assert not below(tmp_path)
    assert cache.write("shard", tensors())
    assert same(cache.read("shard"), tensors())


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_byte_that_changes_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    root = tmp_path_factory.mktemp("cache")
    cache = Cache(root, "set", PLENTY)
    kept = tensors(count=3)
    cache.write("shard", kept)
    content = bytearray(only_file(root).read_bytes())
    header = content.index(b"}", content.rindex(b"data_offsets"))
    at = data.draw(st.one_of(st.integers(0, header), st.integers(0, len(content) - 1)))
    content[at] = data.draw(st.sampled_from([content[at] ^ 1, content[at] ^ 128, 0, ord("F"), ord("I"), ord("1")]))
    only_file(root).write_bytes(content)
    found = cache.read("shard")
    assert same(found, kept) or (found is None and not below(root))


def test_labels_of_another_type_are_not_taken_for_these(tmp_path: Path):
    """Their bytes are the same, so no checksum of bytes tells."""
    cache = Cache(tmp_path, "set", PLENTY)
    cache.write("shard", tensors())
    file = only_file(tmp_path)
    for old, new in ((b'"I64"', b'"F64"'), (b"[20,3,5,4]", b"[20,3,4,5]")):
        content = file.read_bytes()
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new))
        assert cache.read("shard") is None
        cache.write("shard", tensors())


def test_a_reader_makes_a_damaged_shard_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    made = make_set(tmp_path / "set", [4, 3], (3, 4, 4))
    root = tmp_path / "cache"

    def warnings() -> int:
        caplog.clear()
        np.testing.assert_array_equal(Reader(made.url, made.manifest, "train", root, PLENTY).all().images, made.images)
        return len(caplog.records)

    assert warnings() == 0
    for damage in (lambda content: content[:-1] + b"\xaa", lambda content: content[: len(content) // 2]):
        for file in below(root):
            file.write_bytes(damage(file.read_bytes()))
        assert warnings() == 2
        assert warnings() == 0
        assert len(below(root)) == 2


# --- room --------------------------------------------------------------------------------------------


def test_the_limit_holds_to_the_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    Cache(tmp_path / "measure", "set", PLENTY).write("shard", tensors())
    size = taken(tmp_path / "measure")
    assert size < sum(tensor.nbytes for tensor in tensors().values()) + EMPTY
    for room, fits in ((size - 1, 0), (size, 1), (2 * size - 1, 1), (3 * size, 3)):
        root = tmp_path / str(room)
        caplog.clear()
        cache = Cache(root, "set", room)
        with caplog.at_level(logging.WARNING):
            assert [cache.write(f"shard-{k}", tensors(k)) for k in range(4)] == [k < fits for k in range(4)]
        assert taken(root) == fits * size
        assert [record.message.count("is full") for record in caplog.records] == [1]  # told once
        for k in range(fits):
            assert same(cache.read(f"shard-{k}"), tensors(k))


def test_all_sets_together_are_within_the_limit(tmp_path: Path):
    for k in range(5):
        Cache(tmp_path, f"set-{k}", 10_000).write("shard", tensors(count=50))
        Cache(tmp_path, f"set-{k}", 10_000).write("more", tensors(count=50))
    assert 6_000 < taken(tmp_path) <= 10_000


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_forgotten_sets_make_room_the_oldest_first_and_no_more_than_needed(tmp_path: Path):
    folders = {}
    for name, age in (("older", 3 * FORGOTTEN), ("oldest", 4 * FORGOTTEN), ("old", 2 * FORGOTTEN), ("new", 600)):
        cache = Cache(tmp_path, name, PLENTY)
        cache.write("shard", tensors(count=100))
        folders[name] = cache.folder
        aged(cache.folder, age)
    one = taken(tmp_path) // 4
    cache = Cache(tmp_path, "now", 4 * one)

    def there() -> set[str]:
        return {name for name, folder in folders.items() if folder.exists()}

    assert cache.write("a", tensors(count=10))  # the oldest goes
    assert there() == {"older", "old", "new"}
    assert cache.write("b", tensors(count=10))  # fits beside the rest
    assert there() == {"older", "old", "new"}
    assert cache.write("c", tensors(count=100))
    assert there() == {"old", "new"}
    assert cache.write("d", tensors(count=100))
    assert there() == {"new"}
    aged(cache.folder, 9 * FORGOTTEN)  # one's own is not dropped, nor what was opened lately
    assert not cache.write("e", tensors(count=200))
    assert there() == {"new"}
    assert same(cache.read("d"), tensors(count=100))


def test_opening_a_set_again_keeps_it(tmp_path: Path):
    kept = Cache(tmp_path, "kept", PLENTY)
    kept.write("shard", tensors(count=100))
    aged(kept.folder, 2 * FORGOTTEN)
    Cache(tmp_path, "kept", PLENTY)
    assert not Cache(tmp_path, "new", taken(tmp_path)).write("shard", tensors())
    assert same(kept.read("shard"), tensors(count=100))


def test_a_folder_that_holds_other_things_keeps_them(tmp_path: Path):
    """Someone may well name a folder that they have filled with other things."""
    for name in ("photos", "models", "0123456789abcdef0123456789abcdef"):
        (tmp_path / name).mkdir()
        for file in ("a.safetensors", "b.png", "c.part"):
            (tmp_path / name / file).write_bytes(b"\0" * 5000)
            aged(tmp_path / name / file, 9 * FORGOTTEN)
        aged(tmp_path / name, 9 * FORGOTTEN)
    before = set(below(tmp_path))
    cache = Cache(tmp_path, "set", 4000)
    assert cache.write("a", tensors())  # nor do they count
    assert not cache.write("b", tensors(count=100))
    assert before < set(below(tmp_path))


def test_parts_that_were_left_behind_are_removed_after_an_hour(tmp_path: Path):
    for name in ("set", "other"):
        cache = Cache(tmp_path, name, 20_000)
        for k, age in enumerate((0, FORGOTTEN - 60, FORGOTTEN + 60)):
            part = cache.folder / f"shard-{k}.{'0' * 32}.part"
            part.write_bytes(b"\0" * 4000)
            aged(part, age)
    cache = Cache(tmp_path, "set", 20_000)
    assert cache.write("shard", tensors())
    parts = [file for file in below(tmp_path) if file.name.endswith(".part")]
    assert sorted(file.name[:7] for file in parts) == ["shard-0", "shard-0", "shard-1", "shard-1"]
    assert all(cache.read(f"shard-{k}") is None for k in range(3))
    assert not cache.write("more", tensors(count=80))  # parts count, since someone may be writing them


# --- several processes -------------------------------------------------------------------------------

START = """
import sys, time, hashlib, json, os
from pathlib import Path
import torch
torch.set_num_threads(1)
from tdiff.data.cache import Cache
from tdiff.data.shards import read_manifest
from tdiff.data.stream import Reader
print("ready", flush=True)
sys.stdin.readline()
"""


def together(script: str, arguments: list[list[str]]) -> list[subprocess.Popen[str]]:
    """Processes that run a script each, begun at the same moment."""
    found = []
    for given_here in arguments:
        command = [sys.executable, "-c", START + script, *given_here]
        found.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in found:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in found:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return found


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output


def test_two_processes_that_read_at_once_share_one_copy(tmp_path: Path):
    made = make_set(tmp_path / "set", [40] * 12, (3, 8, 8))
    script = """
reader = Reader(sys.argv[1], read_manifest(sys.argv[1]), "train", Path(sys.argv[2]), 10**9)
for _ in range(3):
    found = reader.all()
    print(hashlib.sha256(found.images.tobytes() + found.labels.tobytes()).hexdigest())
print(sum(file in Path("/proc/self/maps").read_text() for file in map(str, Path(sys.argv[2]).rglob("*.safetensors"))))
"""
    root = tmp_path / "cache"
    labels = made.labels
    assert labels is not None
    right = hashlib.sha256(made.images.tobytes() + labels.tobytes()).hexdigest()
    for process in together(script, [[made.url, str(root)]] * 2):
        *images, mapped = finish(process).split()
        assert images == [right] * 3
        assert int(mapped) >= 8  # of what it decoded itself it may keep the last four as they were
    assert len(below(root)) == 12
    pixels = made.images.nbytes + labels.nbytes
    assert pixels < taken(root) < pixels + 12 * EMPTY


def test_four_processes_that_write_at_once_stay_within_the_limit(tmp_path: Path):
    """Asked again and again from outside; also the bytes on their way count."""
    limit = 30_000_000
    script = """
children = 0
while children < 4 and os.fork():
    children += 1
ranks = [children] if children < 4 else []
for rank in ranks:
    cache = Cache(Path(sys.argv[1]), f"set-{rank % 2}", 30_000_000)
    wrote, right = [], []
    for k in range(30):
        images = torch.full(([1, 900_000, 2_000_000][k % 3],), rank, dtype=torch.uint8)
        if cache.write(f"shard-{rank}-{k}", {"images": images}):
            wrote.append(k)
    for k in range(30):
        if (found := cache.read(f"shard-{rank}-{k}")) is not None and bool((found["images"] == rank).all()):
            right.append(k)
    os.write(1, json.dumps([wrote, right]).encode() + b"\\n")
    os._exit(0)
for _ in range(4):
    assert os.wait()[1] == 0
"""
    root = tmp_path / "cache"
    root.mkdir()
    (running,) = together(script, [[str(root)]])
    highest, looks = 0, 0
    while running.poll() is None:
        highest, looks = max(highest, taken(root)), looks + 1
    found = [json.loads(line) for line in finish(running).splitlines()]
    assert len(found) == 4
    assert sum(len(wrote) for wrote, _ in found) == len(below(root))
    for wrote, right in found:
        assert wrote == right
        assert len(wrote) < 30
    assert looks > 20
    assert 0.8 * limit < taken(root) <= limit
    assert highest <= limit
    assert not [file for file in below(root) if file.suffix != ".safetensors"]


def test_what_a_killed_process_leaves_is_never_read(tmp_path: Path):
    """kill -9 in the midst of writing, until it has hit the midst five times."""
    script = """
import random, signal
root = Path(sys.argv[1])
folder = Cache(root, "set", 10**10).folder
left = set()
for trial in range(200):
    child = os.fork()
    if child == 0:
        cache = Cache(root, "set", 10**10)
        for k in range(10**6):
            cache.write(f"shard-{k % 100}", {"images": torch.full((4_000_000,), k % 100, dtype=torch.uint8)})
    while not set(folder.glob("*.part")) - left:
        pass
    time.sleep(random.Random(trial).random() * 0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left = set(folder.glob("*.part"))
    if trial >= 10 and len(left) >= 5:
        break
"""
    (process,) = together(script, [[str(tmp_path)]])
    finish(process)
    cache = Cache(tmp_path, "set", PLENTY)
    kinds = {file.suffix for file in below(tmp_path)}
    assert kinds == {".safetensors", ".part"}
    complete = {file.stem for file in below(tmp_path) if file.suffix == ".safetensors"}
    for k in range(100):
        found = cache.read(f"shard-{k}")
        assert (found is not None) == (f"shard-{k}" in complete)
        if found is not None:
            assert found["images"].shape == (4_000_000,)
            assert bool((found["images"] == k).all())
    assert cache.write("another", tensors())  # nobody holds a lock for ever
    for file in below(tmp_path):
        aged(file, 2 * FORGOTTEN)
    cache.write("last", tensors())
    assert {file.suffix for file in below(tmp_path)} == {".safetensors"}


def test_only_one_at_a_time_counts_opens_or_writes(tmp_path: Path):
    """Whoever holds the lock, even with others, keeps them waiting."""
    cache = Cache(tmp_path, "set", PLENTY)
    for act in (lambda: Cache(tmp_path, "new", PLENTY), lambda: cache.write("shard", tensors())):
        with (tmp_path / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            thread = threading.Thread(target=act)
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
            assert not below(tmp_path)
        thread.join(20)
        assert not thread.is_alive()
    assert same(cache.read("shard"), tensors())


# --- a disk that fails -------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_told_and_costs_only_time(disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    made = make_set(tmp_path / "set", [30] * 6, (3, 64, 64))
    reader = Reader(made.url, made.manifest, "train", disk, PLENTY)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(reader.all().images, made.images)
    assert "cannot be written" in caplog.text
    assert "No space left" in caplog.text
    assert all(file.suffix == ".safetensors" for file in below(disk))
    np.testing.assert_array_equal(Reader(made.url, made.manifest, "train", disk, PLENTY).all().images, made.images)


def test_a_disk_that_may_no_longer_be_written_is_told_and_costs_only_time(disk: Path, caplog: pytest.LogCaptureFixture):
    cache = Cache(disk, "set", PLENTY)
    cache.write("good", tensors())
    cache.write("damaged", tensors())
    file = next(file for file in below(disk) if file.name.startswith("damaged"))
    file.write_bytes(file.read_bytes()[:-1])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with caplog.at_level(logging.WARNING):
        assert same(cache.read("good"), tensors())
        assert cache.read("damaged") is None
        for _ in range(2):
            assert not cache.write("damaged", tensors())
    assert caplog.text.count("cannot be written") == 1
    with pytest.raises(ConfigError, match=rf"data\.cache={disk} cannot be used .*: take another folder"):
        Cache(disk, "other", PLENTY)


def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(ConfigError) as caught:
            Cache(root, "set", PLENTY)
        message = str(caught.value)
        assert message.startswith(f"data.cache={root} cannot be used (")
        assert message.endswith("take another folder.")
        assert "\n" not in message


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path):
    root = tmp_path / "theirs"
    root.mkdir()
    os.chown(root, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        Cache(root, "set", PLENTY)
    assert not list(root.iterdir())
    made = make_set(tmp_path / "set", [2])
    with pytest.raises(ConfigError, match="belongs to another user"):
        Reader(made.url, made.manifest, "train", root, PLENTY)
    assert (tmp_path / "set" / shard_name(0)).exists()


def test_a_set_in_use_is_not_forgotten(tmp_path: Path):
    cache = Cache(tmp_path / "cache", "set", 10**6)
    long_ago = time.time() - 2 * FORGOTTEN
    os.utime(cache.folder, (long_ago, long_ago))
    cache.keep_alive()
    assert cache.folder.stat().st_mtime == pytest.approx(long_ago), "not at every call"
    cache._touched -= FORGOTTEN
    cache.keep_alive()
    assert cache.folder.stat().st_mtime > time.time() - 60
