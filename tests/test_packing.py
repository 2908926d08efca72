"""Protects packing: a data set is whole or is none, a packing that was killed goes on without doing anything twice and
ends with the same bytes, and whatever stands in its way (a full disk, other files, damage) is one sentence.

Processes are really killed, the disk is really full, the object store is a real server.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from making import tar_of
from moto.server import ThreadedMotoServer
from PIL import Image

from tdiff import config as configs
from tdiff import launch, packing, storage
from tdiff.data.shards import Manifest, default_shard_samples, read_manifest
from tdiff.data.sources import Source, Split
from tdiff.data.stream import Reader
from tdiff.errors import ConfigError, DataError
from tdiff.opening import open_data
from tdiff.packing import open_source, pack
from tdiff.plan import size_of_data


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def sentence(call: Callable[[], object]) -> str:
    """The message of the problem, which must be one line."""
    with pytest.raises((ConfigError, DataError)) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m tdiff.pack` in a process of its own."""
    line = [sys.executable, "-m", "tdiff.pack", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=110, **options)


def refused(*arguments: Any) -> str:
    """What the command says when it refuses: one sentence, exit code 2."""
    done = command(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("tdiff: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def noise(train: int = 10, test: int = 4) -> Source:
    rng = np.random.default_rng(0)
    splits = {
        split: Split(rng.integers(0, 256, (count, 1, 5, 5), dtype=np.uint8), rng.integers(0, 3, count))
        for split, count in (("train", train), ("test", test))
    }
    return Source("noise", splits, ("a", "b", "c"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 40 pictures, 16x16, in two classes."""
    rng = np.random.default_rng(0)
    for k in range(40):
        file = tmp_path / "pictures" / ("cat" if k % 2 else "dog") / f"{k:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


def by_index(url: Path | str, manifest: Manifest, split: str) -> np.ndarray:
    return Reader(str(url), manifest, split).all().images


# --- what is written ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "samples"),
    [((1, 8, 8), 5000), ((1, 28, 28), 5000), ((3, 32, 32), 5000), ((3, 64, 64), 1350), ((3, 512, 512), 50)],
)
def test_shards_have_a_sensible_size(shape: tuple[int, int, int], samples: int):
    assert default_shard_samples(shape) == samples


def test_a_folder_is_packed_and_read_back(pictures: Path, tmp_path: Path):
    source = open_source(str(pictures))
    assert isinstance(source, Source)
    manifest = pack(source, str(tmp_path / "out"), 7)
    assert read_manifest(str(tmp_path / "out")) == manifest
    assert manifest.classes == ("cat", "dog")
    assert [shard.samples for shard in manifest.splits["train"]] == [7, 7, 7, 7, 7, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "test", "train"]
    for split, samples in source.splits.items():
        images = Reader(str(tmp_path / "out"), manifest, split).all()
        np.testing.assert_array_equal(images.images, [samples.image(i) for i in range(len(samples))])
        np.testing.assert_array_equal(images.labels, samples.labels)
    import tarfile

    with tarfile.open(tmp_path / "out" / "train" / "shard-000001.tar") as tar:
        assert all(member.mtime == 0 for member in tar.getmembers())
        about = json.load(tar.extractfile("train-000000008.json"))  # type: ignore[arg-type]
    train = source.splits["train"]
    assert about == {"source": "pictures", "index": 8, "file": train.file(8)}
    assert len({*train.labels[:18]}) == 2  # not sorted by class


def test_workers_write_the_same_bytes(pictures: Path, tmp_path: Path):
    source = open_source(str(pictures))
    pack(source, str(tmp_path / "one"), 7, workers=1)
    try:
        pack(source, str(tmp_path / "two"), 7, workers=2)
    finally:
        launch.disconnect()
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_large_sources_go_to_workers_unless_told(monkeypatch: pytest.MonkeyPatch, pictures: Path):
    plan = packing.plan_of(open_source(str(pictures)))
    assert packing._workers(plan, None) == 1
    monkeypatch.setattr(packing, "BYTES_FOR_WORKERS", plan.file_bytes)
    assert packing._workers(plan, None) == launch.default_workers(None)
    assert packing._workers(plan, 1) == 1
    assert packing._workers(packing.plan_of(noise()), None) == 1  # in memory


def test_memory_does_not_grow_with_the_source(tmp_path: Path):
    """8 times the images take no more memory: 400 pictures of 1 MB each would be 400 MB."""
    code = (
        "import resource, sys; from tdiff.packing import open_source, pack\n"
        "pack(open_source(sys.argv[1], mode='rgb'), sys.argv[2], 10)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    used = {}
    for count in (25, 200):
        folder = tmp_path / str(count)
        folder.mkdir()
        for k in range(count):
            Image.new("RGB", (600, 600), (k, 0, 0)).save(folder / f"{k}.png")
        line = [sys.executable, "-c", code, str(folder), str(tmp_path / f"out-{count}")]
        used[count] = int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert used[200] < used[25] + 60, used  # 200 are 216 MB of pixels


# --- killed, and started again -----------------------------------------------------------------------


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("packing/*/*.json"))


def killed_in_the_middle(line: list[str], dest: Path, at_least: int = 2) -> None:
    """Starts packing, and kills it with all its processes' parent once some shards are finished."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 90
        while len(entries(dest)) < at_least:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_and_started_again_equals_straight_through(tmp_path: Path, workers: str):
    source = tmp_path / "source"
    rng = np.random.default_rng(0)
    for k in range(60):
        (source / str(k % 3)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(source / str(k % 3) / f"{k}.png", compress_level=1)
    options = ["--shard-samples", "2", "--workers", workers]
    dest, straight = tmp_path / "dest", tmp_path / "straight"
    line = [sys.executable, "-m", "tdiff.pack", str(source), str(dest), *options]
    killed_in_the_middle(line, dest)
    assert not (dest / "manifest.json").exists()
    time.sleep(1.5)  # Ray's workers notice that their driver is gone
    (dest / "train" / f"shard-000009.tar.{'0' * 32}.partial").write_bytes(b"left by the killed one")
    before = {str(file.relative_to(dest)): file.stat().st_mtime_ns for file in entries(dest)}
    finished = [name.removeprefix("packing/").removesuffix(".json") for name in before]
    tars = {name: (dest / name).stat() for name in finished}
    assert 2 <= len(finished) < 30
    done = command(str(source), str(dest), *options)
    assert done.returncode == 0, done.stderr
    assert f"{len(finished)} of 30 shards are there already" in done.stdout
    for name, stat in tars.items():
        now = (dest / name).stat()
        assert (now.st_mtime_ns, now.st_ino) == (stat.st_mtime_ns, stat.st_ino), f"{name} was packed twice"
    assert command(str(source), str(straight), "--shard-samples", "2", "--workers", "1").returncode == 0
    assert files(dest) == files(straight)
    assert "is a finished data set" in refused(source, dest, *options)


def stopped_after(plan_shards: int) -> Callable[[int, int, int], None]:
    def progress(done: int, total: int, images: int) -> None:
        if done == plan_shards:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("shards", range(6))
def test_stopped_after_any_shard_it_goes_on(tmp_path: Path, shards: int):
    pack(noise(), str(tmp_path / "straight"), 3)
    with pytest.raises(KeyboardInterrupt):
        pack(noise(), str(tmp_path / "dest"), 3, progress=stopped_after(shards))
    assert not (tmp_path / "dest" / "manifest.json").exists()
    told: list[tuple[int, int, int]] = []
    pack(noise(), str(tmp_path / "dest"), 3, progress=lambda *told_now: told.append(told_now))
    assert told[0] == (shards, 6, 0)
    assert told[-1][:2] == (6, 6)
    assert files(tmp_path / "dest") == files(tmp_path / "straight")


@pytest.mark.parametrize("removed", range(3))
def test_stopped_while_tidying_up_it_tidies_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int):
    """train's entries, test's, then the plan."""
    pack(noise(), str(tmp_path / "straight"), 3)
    left, remove = [removed], storage.remove

    def stopping(url: str) -> None:
        if (tmp_path / "dest" / "manifest.json").exists():
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
        remove(url)

    monkeypatch.setattr(storage, "remove", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack(noise(), str(tmp_path / "dest"), 3)
    assert files(tmp_path / "dest") != files(tmp_path / "straight")
    monkeypatch.undo()
    pack(noise(), str(tmp_path / "dest"), 3)
    assert files(tmp_path / "dest") == files(tmp_path / "straight")


def test_a_shard_that_is_gone_is_packed_again(tmp_path: Path):
    pack(noise(), str(tmp_path / "straight"), 3)
    with pytest.raises(KeyboardInterrupt):
        pack(noise(), str(tmp_path / "dest"), 3, progress=stopped_after(3))
    (tmp_path / "dest" / "train" / "shard-000001.tar").unlink()
    (tmp_path / "dest" / "train" / "shard-000002.tar").write_bytes(b"short")
    pack(noise(), str(tmp_path / "dest"), 3)
    assert files(tmp_path / "dest") == files(tmp_path / "straight")


def test_a_plan_cut_short_is_begun_again(tmp_path: Path):
    (tmp_path / "dest" / "packing").mkdir(parents=True)
    (tmp_path / "dest" / "packing" / f"plan.json.{'0' * 32}.partial").write_text("{")
    pack(noise(), str(tmp_path / "dest"), 3)
    pack(noise(), str(tmp_path / "straight"), 3)
    assert files(tmp_path / "dest") == files(tmp_path / "straight")


# --- what DEST may be --------------------------------------------------------------------------------


def test_another_plan_is_refused(tmp_path: Path):
    dest = str(tmp_path / "dest")
    with pytest.raises(KeyboardInterrupt):
        pack(noise(), dest, 3, progress=stopped_after(2))
    before = files(tmp_path / "dest")
    other = noise()
    other.splits["train"].image(9)[0, 0, 0] ^= 1
    for source, samples in ((noise(), 4), (other, 3), (noise(train=9), 3), (Source("x", noise().splits, None), 3)):
        message = sentence(lambda source=source, samples=samples: pack(source, dest, samples))
        assert "the beginning of another packing" in message
        assert dest in message
    assert files(tmp_path / "dest") == before
    pack(noise(), dest, 3)


def test_changed_files_are_another_plan(pictures: Path, tmp_path: Path):
    dest = str(tmp_path / "dest")
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(str(pictures)), dest, 7, progress=stopped_after(2))
    Image.new("RGB", (16, 16)).save(pictures / "cat" / "001.png")
    assert "changed files" in sentence(lambda: pack(open_source(str(pictures)), dest, 7))


def test_other_files_and_finished_data_sets_are_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").touch()
    assert "holds other files, such as thesis.tex" in sentence(lambda: pack(noise(), str(tmp_path / "a"), 3))
    assert files(tmp_path / "a") == {"thesis.tex": b""}
    (tmp_path / "b" / "train").mkdir(parents=True)
    (tmp_path / "b" / "train" / "shard-000000.tar").touch()
    assert "holds other files, such as train" in sentence(lambda: pack(noise(), str(tmp_path / "b"), 3))
    pack(noise(), str(tmp_path / "c"), 3)
    assert "is a finished data set" in sentence(lambda: pack(noise(), str(tmp_path / "c"), 3))


def test_two_at_once(tmp_path: Path):
    dest = str(tmp_path / "dest")
    code = (
        "import sys, time; from tdiff import packing\n"
        "with packing._only_packer(sys.argv[1], False): print('held', flush=True); time.sleep(2)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, dest], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert "is being packed by another process" in sentence(lambda: pack(noise(), dest, 3))
    manifest = pack(noise(), dest, 3, wait=True)
    assert holder.wait() == 0
    holder.stdout.close()
    assert pack(noise(), dest, 3, wait=True) == manifest  # as if another had packed it meanwhile


# --- damage ------------------------------------------------------------------------------------------


def test_damaged_images_are_named_or_left_out(pictures: Path, tmp_path: Path):
    broken = sorted(pictures.rglob("*.png"))[3:6]
    for file in broken:
        file.write_bytes(file.read_bytes()[:50])
    message = sentence(lambda: pack(open_source(str(pictures)), str(tmp_path / "a"), 7))
    assert any(str(file) in message for file in broken)
    assert "--max-bad-samples" in message
    for _ in range(2):  # the second time it is known at once
        message = sentence(lambda: pack(open_source(str(pictures)), str(tmp_path / "a"), 7, max_bad=2))
        assert "--max-bad-samples, which is 2 (3 damaged images found so far)" in message
    assert not (tmp_path / "a" / "manifest.json").exists()
    # The same folder again, with a larger limit, and in one go on two workers: the same bytes.
    said: list[str] = []
    manifest = pack(open_source(str(pictures)), str(tmp_path / "a"), 7, max_bad=3, say=said.append)
    try:
        pack(open_source(str(pictures)), str(tmp_path / "b"), 7, max_bad=3, workers=2)
    finally:
        launch.disconnect()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sum(manifest.samples(split) for split in manifest.splits) == 37
    for file in broken:
        assert sum(str(file) in text for text in said if text.startswith("left out")) == 1
    for split in manifest.splits:
        assert len(by_index(tmp_path / "a", manifest, split)) == manifest.samples(split)


def test_a_shard_of_which_nothing_is_left(pictures: Path, tmp_path: Path):
    source = open_source(str(pictures))
    assert isinstance(source, Source)
    train = source.splits["train"]
    for i in (2, 3):
        (pictures / str(train.file(i))).write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(str(pictures)), str(tmp_path / "a"), 2, max_bad=2, progress=stopped_after(3))
    manifest = pack(open_source(str(pictures)), str(tmp_path / "a"), 2, max_bad=2)
    names = [shard.name for shard in manifest.splits["train"]]
    assert names[:2] == ["train/shard-000000.tar", "train/shard-000002.tar"]
    assert sorted(f"train/{file.name}" for file in (tmp_path / "a" / "train").iterdir()) == names
    assert by_index(tmp_path / "a", manifest, "train").shape == (34, 3, 16, 16)


# --- a full disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    mount = shutil.which("mount")
    done = subprocess.run(line, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip() if done else 'no mount'}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_one_sentence_and_can_be_mended(small_disk: Path, tmp_path: Path, workers: str):
    source = tmp_path / "source"
    rng = np.random.default_rng(0)
    source.mkdir()
    for k in range(40):
        Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(source / f"{k}.png")
    dest, options = small_disk / "dest", ["--shard-samples", "4", "--workers", workers]
    message = refused(source, dest, *options)
    assert f"{dest}/train/shard-" in message
    assert "cannot be written: No space left on device; make room there" in message
    assert not (dest / "manifest.json").exists()
    assert len(entries(dest)) > 0
    assert not [file for file in files(dest) if file.endswith(".partial")]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    done = command(str(source), str(dest), *options)
    assert done.returncode == 0, done.stderr
    assert "shards are there already" in done.stdout
    pack(open_source(str(source)), str(tmp_path / "straight"), 4)
    assert files(dest) == files(tmp_path / "straight")


# --- an object store ---------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket of a real S3 server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="images")
    yield "s3://images"
    server.stop()


def test_from_and_to_an_object_store(bucket: str, pictures: Path, tmp_path: Path):
    for name, content in files(pictures).items():
        storage.write_bytes(f"{bucket}/pictures/{name}", content)
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(f"{bucket}/pictures"), f"{bucket}/packed", 7, progress=stopped_after(3))
    manifest = pack(open_source(f"{bucket}/pictures"), f"{bucket}/packed", 7)
    local = pack(open_source(str(pictures)), str(tmp_path / "local"), 7)
    assert manifest.to_json() == local.to_json()
    assert {name: storage.read_bytes(f"{bucket}/packed/{name}") for name in storage.versions(f"{bucket}/packed")} == (
        files(tmp_path / "local")
    )
    assert "is a finished data set" in sentence(lambda: pack(noise(), f"{bucket}/packed", 7))
    # And the shards there, as an existing WebDataset, back to the disk.
    storage.remove(f"{bucket}/packed/manifest.json")
    again = pack(open_source(f"{bucket}/packed"), str(tmp_path / "copy"))
    assert [shard.sha256 for shard in again.splits["train"]] == [shard.sha256 for shard in local.splits["train"]]


# --- an existing WebDataset --------------------------------------------------------------------------


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> Path:
    """A WebDataset without a manifest."""
    pack(open_source(str(pictures)), str(tmp_path / "shards"), 7)
    (tmp_path / "shards" / "manifest.json").unlink()
    return tmp_path / "shards"


def test_an_existing_web_dataset_gets_a_manifest(shards: Path):
    before = files(shards)
    manifest = pack(open_source(str(shards)), str(shards))
    assert {name: content for name, content in files(shards).items() if name != "manifest.json"} == before
    assert manifest.classes == ("0", "1")
    assert manifest.shape == (3, 16, 16)
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 36, "test": 4}
    assert by_index(shards, read_manifest(str(shards)), "train").shape == (36, 3, 16, 16)
    assert "has its manifest.json already" in sentence(lambda: pack(open_source(str(shards)), str(shards)))


def test_an_existing_web_dataset_is_copied(shards: Path, tmp_path: Path):
    manifest = pack(open_source(str(shards)), str(tmp_path / "copy"))
    copied = files(tmp_path / "copy")
    copied.pop("manifest.json")
    assert copied == files(shards)
    assert manifest.name == "shards"
    with pytest.raises(KeyboardInterrupt):
        pack(open_source(str(shards)), str(shards), progress=stopped_after(2))
    pack(open_source(str(shards)), str(shards))
    assert (shards / "manifest.json").read_bytes() == (tmp_path / "copy" / "manifest.json").read_bytes()


def test_shards_in_one_folder_are_for_training(shards: Path, tmp_path: Path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (shards / "train").iterdir():
        shutil.copy(file, flat)
    manifest = pack(open_source(str(flat)), str(flat))
    assert [shard.name for shard in manifest.splits["train"]] == [f"shard-{k:06d}.tar" for k in range(6)]
    assert set(manifest.splits) == {"train"}


def png(size: int = 16, mode: str = "RGB") -> bytes:
    import io

    out = io.BytesIO()
    Image.new(mode, (size, size)).save(out, "png")
    return out.getvalue()


GOOD = ("good.png", png())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (tar_of([GOOD, ("bad.png", png(17))]), "key bad"),
        (tar_of([GOOD, ("bad.png", png(mode="L"))]), "key bad"),
        (tar_of([GOOD, ("bad.png", png()[:50])]), "key bad"),
        (tar_of([GOOD, ("bad.txt", b"x")]), "key bad"),
        (tar_of([("bad.png", png(17))]), "key bad"),
        (tar_of([GOOD, ("x.png", png()), GOOD]), "key good"),
        (tar_of([("bad.png", png()), ("bad.cls", b"-1")]), "key bad"),
        (tar_of([("bad.png", png()), ("bad.cls", b"cat")]), "key bad"),
        (tar_of([("bad.png", png()), ("bad.cls", b"99999999999")]), "key bad"),
        (tar_of([GOOD, ("a.png", png()), ("a.cls", b"1")]), "have none"),
        (tar_of([GOOD]), "has no labels, though others have"),
        (tar_of([]), "holds no image"),
        (b"", "not a tar"),
        (b"hello" * 1000, "not a tar"),
        (tar_of([GOOD, ("b.png", png())])[:1500], "cut short"),  # in a header
        (tar_of([GOOD, ("b.png", png())])[:1560], "train/shard-000003.tar"),  # in an image
        (tar_of([GOOD, ("b.png", png())])[:1024], "cut short"),  # between two samples
        (tar_of([GOOD]) + tar_of([("b.png", png())]), "goes on behind its end"),
    ],
)
def test_a_wrong_shard_is_named(shards: Path, tmp_path: Path, content: bytes, part: str):
    (shards / "train" / "shard-000003.tar").write_bytes(content)
    message = sentence(lambda: pack(open_source(str(shards)), str(tmp_path / "copy")))
    assert "train/shard-000003.tar" in message
    assert part in message
    assert not (tmp_path / "copy" / "manifest.json").exists()
    if part == "key bad":
        assert "--size" in message


# --- the command -------------------------------------------------------------------------------------


def test_the_command_says_what_it_made(pictures: Path, tmp_path: Path):
    (pictures / "notes.txt").touch()
    done = command(str(pictures), str(tmp_path / "out"), "--size", "8", "--mode", "grey", "--no-labels")
    assert done.returncode == 2
    assert "--mode rgb" in done.stderr
    shutil.rmtree(tmp_path / "out")
    done = command(str(pictures), str(tmp_path / "out"), "--size", "8", "--test-share", "0.25", "--shard-samples", "10")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(str(tmp_path / "out"))
    assert manifest.shape == (3, 8, 8)
    assert "1 other files skipped, such as notes.txt" in done.stdout
    assert "pictures, 8x8x3, 2 classes" in done.stdout
    assert re.search(r"train +30 +3 ", done.stdout)
    assert re.search(r"test +10 +1 ", done.stdout)
    assert f"digest {manifest.digest}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["digits", "D", "--size", "8"], "--size has no effect for digits"),
        (["digits", "D", "--mode", "grey"], "--mode has no effect for digits"),
        (["digits", "D", "--no-labels"], "--no-labels has no effect for digits"),
        (["digits", "D", "--test-share", "0.5"], "--test-share has no effect for digits"),
        (["digits", "D", "--max-bad-samples", "5"], "--max-bad-samples has no effect for digits"),
        (["digits", "D", "--source-dir", "."], "has no effect for digits"),
        (["P", "D", "--source-dir", "."], "--source-dir has no effect for a folder"),
        (["P", "D", "--size", "0"], "--size=0"),
        (["P", "D", "--shard-samples", "0"], "--shard-samples=0"),
        (["P", "D", "--max-bad-samples", "-1"], "--max-bad-samples=-1"),
        (["P", "D", "--test-share", "1"], "--test-share=1.0"),
        (["P", "D", "--workers", "1000"], "workers=1000 is more than this machine's"),
        (["mnits", "D"], "mnits is no folder"),
        (["cubicc", "D"], "cubicc has no download"),
        (["S", "D", "--size", "8"], "taken as it is"),
        (["S", "D", "--shard-samples", "8"], "--shard-samples has no effect"),
    ],
)
def test_what_the_command_refuses(
    pictures: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    part: str,
):
    from tdiff import pack as pack_command

    places = {"P": str(pictures), "S": str(shards), "D": str(tmp_path / "dest")}
    monkeypatch.setattr("sys.argv", ["tdiff.pack", *(places.get(part, part) for part in arguments)])
    assert part in sentence(pack_command.main)
    assert not (tmp_path / "dest" / "manifest.json").exists()


# --- training packs by itself ------------------------------------------------------------------------


def test_training_packs_a_data_set_by_its_name(tmp_path: Path):
    import gzip
    import struct

    def idx(array: np.ndarray) -> bytes:
        return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()

    rng = np.random.default_rng(0)
    folder = tmp_path / "files"
    folder.mkdir()
    for part, count in (("train", 300), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(rng.integers(0, 10, count, dtype=np.uint8)))
    settings = [f"runs={tmp_path / 'runs'}", "data.name=fashion-mnist", f"data.source_dir={folder}"]
    assert "diffusion.attention" in sentence(lambda: open_data(configs.load(None, settings)))
    assert not (tmp_path / "runs").exists()  # what cannot be trained on is not packed first
    config = configs.load(None, [*settings, "diffusion.attention=[]"])
    assert size_of_data(config) == (300, (1, 28, 28))
    assert not (tmp_path / "runs").exists()
    url, manifest = open_data(config)
    assert url == str(tmp_path / "runs" / "data" / "fashion-mnist")
    assert (manifest.name, manifest.shape) == ("fashion-mnist", (1, 28, 28))
    assert open_data(config) == (url, manifest)
    assert size_of_data(config) == (300, (1, 28, 28))
    (folder / "train-labels-idx1-ubyte").unlink()
    assert open_data(config) == (url, manifest)


def test_a_packed_set_is_copied_with_its_name_and_classes(tmp_path: Path):
    labels = np.arange(30) % 3
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 8, 8), dtype=np.uint8)
    source = Source("birds", {"train": Split(images, labels), "test": Split(images[:5], labels[:5])}, ("a", "b", "c"))
    first = pack(source, str(tmp_path / "one"), 10)
    copied = pack(open_source(str(tmp_path / "one")), str(tmp_path / "two"))
    assert copied == first
    shard = tmp_path / "one" / first.splits["train"][1].name
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    message = sentence(lambda: pack(open_source(str(tmp_path / "one")), str(tmp_path / "three")))
    assert first.splits["train"][1].name in message
    assert not (tmp_path / "three" / "manifest.json").exists()


def test_the_same_shard_twice_is_refused(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 8, 8), dtype=np.uint8)
    pack(Source("x", {"train": Split(images, None)}, None), str(tmp_path / "one"), 10)
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("a.tar", "b.tar"):
        shutil.copy(tmp_path / "one" / "train" / "shard-000000.tar", shards / name)
    message = sentence(lambda: pack(open_source(str(shards)), str(shards)))
    assert "the same images twice, in a.tar and b.tar" in message
