"""Protects promise 6 for resume checkpoints: only what is there with all its files counts, whoever else works there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdiff import storage
from tdiff.checkpoints import Checkpoints, Kept, folder_of

FILES = {"progress.json": 2, "weights-00000.safetensors": 5, "weights-00001.safetensors": 5}


def write(folder: Path, step: int, attempt: str = "0" * 8) -> str:
    """What the workers wrote of a checkpoint, without its marker."""
    url = str(folder / folder_of(step, attempt))
    for name, size in FILES.items():
        storage.write_bytes(storage.join(url, name), b"x" * size)
    return url


def test_what_another_attempt_tidied_away_is_never_whole(tmp_path: Path) -> None:
    """A worker that is thought dead, or a second driver's in object storage, seals after the other has tidied."""
    ours = Checkpoints(str(tmp_path))
    emptied, halved = (write(tmp_path, step, "a" * 8) for step in (3, 4))
    ours.tidy()
    storage.write_bytes(storage.join(halved, "weights-00001.safetensors"), b"x" * 5)  # the last that it wrote
    for url in (emptied, halved):
        Checkpoints(str(tmp_path)).seal(url, FILES)
    kept = write(tmp_path, 2)
    ours.seal(kept, FILES)
    assert ours.all() == [Kept(2, kept)]
    ours.tidy()
    assert [entry.name for entry in tmp_path.iterdir()] == [folder_of(2, "0" * 8)]


def test_an_old_one_that_cannot_be_removed_takes_nothing_from_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = Checkpoints(str(tmp_path))
    urls = [write(tmp_path, step) for step in (1, 2, 3)]
    for url in urls[:2]:
        ours.seal(url, FILES)

    def refuse(url: str) -> None:
        raise OSError(5, "Input/output error", url)

    monkeypatch.setattr(storage, "remove", refuse)
    ours.seal(urls[2], FILES)
    assert "is too old and cannot be removed now" in caplog.text
    assert [kept.step for kept in ours.all()] == [1, 2, 3]
