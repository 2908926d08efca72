"""Protects a user's machine from files that somebody made to harm it: a shard, a run's folder, a config, an original.

Whatever they hold, nothing of them is executed, nothing is written where they say, memory and time stay bounded, and
one sentence names the file. Every trap is first shown to work where it is opened by what it was made for.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from finished import finished_run
from PIL import Image
from safetensors.torch import load, save

import tdiff
from tdiff import config as configs
from tdiff import storage
from tdiff.data.decode import shard_images
from tdiff.data.known import open_known
from tdiff.data.shards import read_manifest
from tdiff.data.tars import checked_tar
from tdiff.errors import ConfigError, DataError, Problem
from tdiff.evaluation.inception import read_weights
from tdiff.runs import Run, existing

MOST_MEMORY = 1_500 * 2**20
"""Bytes of address space that a trap may cost beyond what the process has: what would fill a machine fails within."""


class Trap:
    """Unpickling it runs a command."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """The file that appears if a trap is sprung; it must not."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does not work"
    mark.unlink()
    yield mark
    assert not mark.exists(), "a file was executed"


@pytest.fixture
def bounded() -> Iterator[None]:
    """Little memory, and not more than seconds."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, before[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < 60


def told(call: Callable[[], object], kind: type[Problem] = Problem) -> str:
    """The one sentence in which a call ends."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def png(size: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((size, size), np.uint8)).save(out, "png")
    return out.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header says another size, and whose data unpacks to a thousand times its own."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(50_000_000), 9)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tar_of(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


# --- shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "npy", "cbor", "ten", "json", "png.pyd"])
def test_a_member_that_others_would_unpickle_is_not_read(mark: Path, suffix: str) -> None:
    trap = pickle.dumps(Trap(mark))
    content = tar_of(("a.png", png()), (f"a.{suffix}", trap), ("b.png", png()), (f"b.{suffix}", trap))
    assert len(shard_images(content, "here")) == 2
    assert "no image" in told(lambda: shard_images(tar_of((f"a.{suffix}", trap)), "here"), DataError)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "cls"])
def test_a_pickle_by_the_name_of_what_is_read_is_named(mark: Path, suffix: str) -> None:
    image = [] if suffix != "cls" else [("a.png", png())]
    content = tar_of(*image, (f"a.{suffix}", pickle.dumps(Trap(mark))))
    assert told(lambda: shard_images(content, "here"), DataError).startswith("here, key a: ")


def test_members_named_to_lead_elsewhere_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    names = ("../outside.png", f"{tmp_path}/absolute.png", "a/../../outside2.png", "~/home.png", "C:\\x.png")
    found = shard_images(tar_of(*((name, png()) for name in names)), "here")
    assert len(found) == len(names)  # keys are names and no paths
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["inside"]
    (tmp_path / "x.tar").write_bytes(tar_of(*((name, png()) for name in names)))
    assert checked_tar(str(tmp_path), "x.tar", (1, 8, 8))[1] == len(names)
    assert {path.name for path in tmp_path.rglob("*")} == {"inside", "x.tar"}


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_are_passed_over(tmp_path: Path, kind: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.type, entry.linkname, entry.devmajor, entry.devminor = kind, "/etc/passwd", 1, 5
        tar.addfile(entry)
        good = tarfile.TarInfo("b.png")
        good.size = len(png())
        tar.addfile(good, io.BytesIO(png()))
    assert len(shard_images(out.getvalue(), "here")) == 1
    assert list(tmp_path.iterdir()) == []
    alone = out.getvalue()[:512] + bytes(1024)
    assert "holds no image" in told(lambda: shard_images(alone, "here"), DataError)


@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 8)])
def test_an_image_that_would_fill_the_memory_is_named(bounded: None, size: tuple[int, int]) -> None:
    content = tar_of(("good.png", png()), ("bomb.png", png_that_claims(*size)))
    assert told(lambda: shard_images(content, "here", (1, 8, 8)), DataError).startswith("here, key bomb: ")
    first = tar_of(("bomb.png", png_that_claims(*size)))
    assert told(lambda: shard_images(first, "here"), DataError).startswith("here, key bomb: ")


def test_a_png_with_more_data_than_it_says_is_cut(bounded: None) -> None:
    assert shard_images(tar_of(("a.png", png_that_claims(8, 8))), "here", (1, 8, 8)).images.shape == (1, 1, 8, 8)


@pytest.mark.parametrize("packed", ["gz", "bz2", "xz"])
def test_a_packed_tar_is_not_unpacked(bounded: None, packed: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{packed}") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.size = 50_000_000
        tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    assert "is not a tar of samples" in told(lambda: shard_images(out.getvalue(), "here"), DataError)


def test_a_manifest_that_is_a_pickle_or_leads_elsewhere_is_refused(tmp_path: Path, mark: Path) -> None:
    run = finished_run(tmp_path, denoiser=False)
    url = run.record()["data_url"]
    file = Path(url, "manifest.json")
    good = file.read_text()
    file.write_bytes(pickle.dumps(Trap(mark)))
    assert "is damaged" in told(lambda: read_manifest(url), DataError)
    file.write_text("[" * 100_000)
    assert "is damaged" in told(lambda: read_manifest(url), DataError)
    raw = json.loads(good)
    for name in ("../../../etc/passwd", "train/../../x.tar", "/etc/passwd"):
        raw["splits"]["train"][0]["name"] = name
        file.write_text(json.dumps(raw))
        assert f"manifest.json is damaged (the shard {name} leads out" in told(lambda: read_manifest(url), DataError)


# --- originals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [60_000, 2**31])
def test_a_gzip_that_would_fill_the_memory_is_named(tmp_path: Path, bounded: None, count: int) -> None:
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", 9) as file:
        file.write(struct.pack(">IIII", 0x803, count, 28, 28))
        for _ in range(30):  # 300 MB in 300 kB
            file.write(bytes(10_000_000))
    sentence = told(lambda: open_known("mnist", str(tmp_path)), DataError)
    assert "train-images-idx3-ubyte.gz" in sentence


# --- a run's folder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory.mktemp("made"))


def use(run: Run) -> None:
    """All that a run's own files are read for: its tree, its denoiser, a sample."""
    found = tdiff.load(run.url)
    found.sample(2, steps=2)


@contextlib.contextmanager
def spoiled(file: Path, content: bytes) -> Iterator[None]:
    """Puts other bytes in a file's place for a while."""
    old = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(old)


RUN_FILES = [
    "run.json",
    "tree/00-finetune/tree.json",
    "tree/00-finetune/model.safetensors",
    "diffusion/unet.json",
    "diffusion/ema.safetensors",
]


def torch_file(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def huge_header(length: int) -> bytes:
    return struct.pack("<Q", length) + b'{"a":' + bytes(100)


@pytest.mark.parametrize("name", RUN_FILES)
@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "nested", "empty", "huge header", "endless header"])
def test_a_crafted_file_of_a_run_is_named(made: Run, mark: Path, name: str, kind: str) -> None:
    content = {
        "pickle": pickle.dumps(Trap(mark)),
        "torch": torch_file(Trap(mark)),
        "text": b"\xff\xfe\x00 no text",
        "nested": b"[" * 100_000,
        "empty": b"",
        "huge header": huge_header(2**40),
        "endless header": huge_header(2**64 - 1),
    }[kind]
    with spoiled(Path(made.url, name), content):
        sentence = told(lambda: use(made))
    assert name.rpartition("/")[2] in sentence


def test_the_run_itself_is_in_order(made: Run) -> None:
    use(made)


@pytest.mark.parametrize("name", [name for name in RUN_FILES if name.endswith(".safetensors")])
def test_tensors_of_another_model_are_named(made: Run, name: str) -> None:
    file = Path(made.url, name)
    tensors = load(file.read_bytes())
    first = sorted(tensors)[0]
    for other in (
        {first: tensors[first]},
        {**tensors, first: torch.zeros(3, 3, 3)},
        {**tensors, "more": torch.ones(1)},
    ):
        with spoiled(file, save(other)):
            sentence = told(lambda: use(made), DataError)
        assert name in sentence


@pytest.mark.parametrize(
    ("name", "key"), [("tree/00-finetune/tree.json", "latent_channels"), ("diffusion/unet.json", "width")]
)
def test_a_shape_that_would_fill_the_memory_is_named(made: Run, bounded: None, name: str, key: str) -> None:
    file = Path(made.url, name)
    raw = json.loads(file.read_text())
    section = raw["network"] if "network" in raw else raw["unet"]
    assert key in section
    section[key] = 2**20
    with spoiled(file, json.dumps(raw).encode()):
        sentence = told(lambda: use(made), DataError)
    assert "is damaged" in sentence


@pytest.mark.parametrize("kind", ["pickle", "torch", "huge header"])
def test_what_judges_samples_is_not_executed(tmp_path: Path, mark: Path, kind: str) -> None:
    content = {"pickle": pickle.dumps(Trap(mark)), "torch": torch_file(Trap(mark)), "huge header": huge_header(2**40)}
    (tmp_path / "classifier.safetensors").write_bytes(content[kind])
    told(lambda: storage.read_tensors(str(tmp_path / "classifier.safetensors")), DataError)
    with pytest.raises(ValueError, match="no file of tensors"):
        read_weights(content[kind])


def test_a_run_that_is_no_folder_of_text(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "run.json").write_bytes(pickle.dumps(Trap(mark)))
    assert "run.json is damaged" in told(lambda: existing(str(tmp_path)))


# --- configs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag",
    [
        '!!python/object/apply:os.system ["touch MARK"]',
        '!!python/object/new:os.system ["touch MARK"]',
        '!!python/object/apply:subprocess.check_output [["touch", "MARK"]]',
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_yaml_that_asks_for_python_is_refused(tmp_path: Path, mark: Path, tag: str) -> None:
    tag = tag.replace("MARK", str(mark))
    if "apply:os" in tag:
        yaml.unsafe_load(tag)
        assert mark.exists(), "the trap does not work"
        mark.unlink()
    file = tmp_path / "config.yaml"
    for text in (f"name: {tag}\n", f"{tag}\n", f"tree:\n  batch: {tag}\n", f"? {tag}\n: 1\n"):
        file.write_text(text)
        assert f"CONFIG {file} is not YAML" in told(lambda: configs.load(str(file)), ConfigError)
    assert told(lambda: configs.load(None, [f"name={tag}"]), ConfigError).startswith("name=")


def test_yaml_that_grows_without_end_is_refused(tmp_path: Path, bounded: None) -> None:
    """The billion laughs: each line ten times the one before."""
    lines = ["a0: &a0 [x, x]"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(lines) + "\nname: *a11\n")
    told(lambda: configs.load(str(file)), ConfigError)
    file.write_text("name: " + "[" * 50_000)
    told(lambda: configs.load(str(file)), ConfigError)
    told(lambda: configs.load(None, ["name=" + "[" * 50_000]), ConfigError)


def test_deepspeed_settings_that_are_a_pickle_are_refused(tmp_path: Path, mark: Path) -> None:
    from tdiff.work.diffusing import deepspeed_settings

    (tmp_path / "zero.json").write_bytes(pickle.dumps(Trap(mark)))
    config = configs.load(None, [f"diffusion.deepspeed={tmp_path}/zero.json"])
    assert "zero.json" in told(lambda: deepspeed_settings(config.diffusion), ConfigError)


# --- what a command says -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["config", "run.json", "tree/00-finetune/tree.json"])
def test_the_command_says_one_sentence(made: Run, tmp_path: Path, mark: Path, place: str) -> None:
    trap = pickle.dumps(Trap(mark))
    (tmp_path / "config.yaml").write_bytes(trap)
    spoil = contextlib.nullcontext() if place == "config" else spoiled(Path(made.url, place), trap)
    line = ["tdiff.train", str(tmp_path / "config.yaml")] if place == "config" else ["tdiff.report", made.url]
    with spoil:
        done = subprocess.run([sys.executable, "-m", *line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("tdiff: ")
    assert len(done.stderr.splitlines()) == 1
