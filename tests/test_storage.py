"""Protects what everything else builds on: a file is read whole or not at all, and a folder counts once it is marked.

Local folders and two real S3 servers; what stores do when they break is in test_s3.py.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from servers import Server

from tdiff import storage
from tdiff.errors import ConfigError, DataError


@pytest.fixture(params=["local", "moto", "rclone"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "deep" / "folder")
    request.getfixturevalue("no_aws")
    server: Server = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://tests/{uuid.uuid4().hex}/folder"


def test_bytes_and_text_come_back(folder: str):
    file = storage.join(folder, "a", "b.bin")
    for content in (b"", b"\x00\xff" * 1000, b"new"):
        storage.write_bytes(file, content)
        assert storage.read_bytes(file) == content
    storage.write_text(file, "grün — 木\n")
    assert storage.read_text(file) == "grün — 木\n"


def test_a_missing_file_is_a_file_not_found_error(folder: str):
    assert not storage.exists(storage.join(folder, "nothing"))
    with pytest.raises(FileNotFoundError, match=r"nothing"):
        storage.read_bytes(storage.join(folder, "nothing"))
    with pytest.raises(DataError, match="is missing"):
        storage.read_tensors(storage.join(folder, "nothing"))


def test_objects_and_tensors_come_back_and_damaged_ones_are_refused(folder: str):
    file = storage.join(folder, "file")
    storage.write_text(file, '{"a": [1, null]}')
    assert storage.read_json(file) == {"a": [1, None]}
    storage.write_bytes(file, save({"w": torch.arange(5.0)}))
    assert storage.read_tensors(file)["w"].tolist() == [0, 1, 2, 3, 4]
    for damaged in ("[]", "{", ""):
        storage.write_text(file, damaged)
        with pytest.raises(DataError, match="is damaged"):
            storage.read_json(file)
        with pytest.raises(DataError, match="is damaged"):
            storage.read_tensors(file)


def test_a_listing_is_sorted_and_empty_where_there_is_no_folder(folder: str):
    assert storage.listing(folder) == []
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "10", "9"):
        storage.write_text(storage.join(folder, name), name)
    assert storage.listing(folder) == ["10", "9", "a.txt", "b.txt", "sub"]
    assert storage.listing(storage.join(folder, "sub")) == ["c.txt", "deep"]
    assert storage.listing(storage.join(folder, "a.txt")) == []


def test_every_file_below_a_folder_with_its_size_and_version(folder: str):
    assert storage.versions(folder) == {}
    for name, size in (("b", 3), ("a/c", 0), ("a/.hidden", 5), ("a/d/e f+ü%20?*[1]", 7), ("a-b", 1)):
        storage.write_bytes(storage.join(folder, name), bytes(size))
    names = ["a-b", "a/.hidden", "a/c", "a/d/e f+ü%20?*[1]", "b"]
    first = storage.versions(folder)
    assert list(first) == names
    assert [size for size, _ in first.values()] == [1, 5, 0, 7, 3]
    assert storage.versions(folder + "/") == first
    below = storage.versions(storage.join(folder, "a"))
    assert {name: size for name, (size, _) in below.items()} == {".hidden": 5, "c": 0, "d/e f+ü%20?*[1]": 7}
    assert storage.versions(storage.join(folder, "b")) == {}
    assert storage.versions(folder) == first
    storage.write_bytes(storage.join(folder, "b"), b"xyz")
    changed = storage.versions(folder)
    assert {name for name in names if changed[name] != first[name]} == {"b"}
    odd = storage.join(folder, names[3])
    assert storage.read_bytes(odd) == bytes(7)
    storage.remove(odd)
    assert not storage.exists(odd)
    assert "a/d" not in " ".join(storage.versions(folder))


def test_local_links_count_as_what_they_point_to(tmp_path: Path):
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "file").write_bytes(b"1234")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "folder").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "file").symlink_to(tmp_path / "real" / "deep" / "file")
    (tmp_path / "set" / "round").symlink_to(tmp_path / "set")
    found = storage.versions(str(tmp_path / "set"))
    assert {name: size for name, (size, _) in found.items()} == {"file": 4, "folder/deep/file": 4}
    storage.remove(str(tmp_path / "set" / "folder"))
    assert (tmp_path / "real" / "deep" / "file").exists()


def test_a_neighbour_whose_name_begins_alike_is_another_folder(folder: str):
    for name in ("run/a", "run-2/b", "run2/c"):
        storage.write_text(storage.join(folder, name), name)
    run = storage.join(folder, "run")
    assert storage.listing(run) == ["a"]
    assert {name: size for name, (size, _) in storage.versions(run).items()} == {"a": 5}
    assert not storage.exists(storage.join(folder, "ru"))
    storage.remove(run)
    assert storage.listing(folder) == ["run-2", "run2"]


def test_remove_takes_files_folders_and_nothing(folder: str):
    for name in ("a.txt", "sub/c.txt", "sub/deep/d.txt"):
        storage.write_text(storage.join(folder, name), name)
    storage.remove(storage.join(folder, "a.txt"))
    assert storage.listing(folder) == ["sub"]
    storage.remove(storage.join(folder, "sub"))
    assert not storage.exists(storage.join(folder, "sub", "deep", "d.txt"))
    storage.remove(storage.join(folder, "sub"))
    storage.remove(storage.join(folder, "never", "was"))


def test_a_folder_is_finished_when_it_is_marked_and_not_before(folder: str):
    assert not storage.finished(folder)
    storage.write_text(storage.join(folder, "model.safetensors"), "…")
    assert not storage.finished(folder)
    storage.finish(folder)
    assert storage.finished(folder)
    assert storage.COMPLETE in storage.listing(folder)
    storage.remove(folder)
    assert not storage.finished(folder)


def test_paths():
    assert storage.join("runs", "a", "b") == "runs/a/b"
    assert storage.join("s3://bucket/runs", "a") == "s3://bucket/runs/a"
    assert storage.absolute("runs") == str(Path.cwd() / "runs")
    assert storage.absolute("s3://bucket//x") == "s3://bucket//x"
    assert storage.absolute("~/runs") == str(Path.home() / "runs")
    assert storage.absolute("file:///a/b") == "/a/b"
    assert storage.is_local("/a/b")
    assert not storage.is_local("s3://bucket/b")
    for url in ("gs://bucket/b", "http://host/b", "s3:///b", "s3://"):
        with pytest.raises(ConfigError, match="local folder or s3://BUCKET"):
            storage.exists(url)


# --- atomicity ---------------------------------------------------------------------------------------


def test_a_reader_sees_the_old_file_or_the_new_one(folder: str):
    file = storage.join(folder, "file")
    contents = {bytes([k]) * 400_000 for k in range(2)}
    storage.write_bytes(file, min(contents))
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(storage.read_bytes(file))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for content in contents:
            storage.write_bytes(file, content)
    stop.set()
    reader.join()
    assert len(seen) > 1
    assert set(seen) <= contents
    assert storage.listing(folder) == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        storage.write_bytes(str(tmp_path / "taken"), b"new")
    with pytest.raises(TypeError):
        storage.write_bytes(str(tmp_path / "file"), "not bytes")  # type: ignore[arg-type]
    assert storage.listing(str(tmp_path)) == ["taken"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path):
    file = tmp_path / "file"
    code = (
        "import sys; from tdiff import storage\n"
        "for k in range(10**9): storage.write_bytes(sys.argv[1], bytes([k % 256]) * 3_000_000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(file)])
    deadline = time.monotonic() + 30
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    content = file.read_bytes()
    assert len(content) == 3_000_000
    assert len(set(content)) == 1
    # What the killed one was about is never taken for a file of that name, nor stands in the way.
    storage.write_bytes(str(file), b"next")
    assert storage.read_bytes(str(file)) == b"next"
    assert all(name == "file" or name.endswith(".partial") for name in storage.listing(str(tmp_path)))


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path):
    file = str(tmp_path / "file")
    writers = [threading.Thread(target=storage.write_bytes, args=(file, bytes([k]) * 100_000)) for k in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert storage.read_bytes(file) in {bytes([k]) * 100_000 for k in range(8)}
    assert storage.listing(str(tmp_path)) == ["file"]
