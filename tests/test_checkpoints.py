"""Protects promise 6 for resume checkpoints: only what is there with all its files counts, whoever else works there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tdiff import storage
from tdiff.checkpoints import CheckpointGone, Checkpoints, Kept, folder_of, read_track, tensors_file
from tdiff.errors import Problem

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
    assert "too old cannot be removed now" in caplog.text
    assert [kept.step for kept in ours.all()] == [1, 2, 3]


def test_a_damaged_marker_counts_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither does it keep others from counting, nor a new one from being made."""
    ours = Checkpoints(str(tmp_path))
    urls = [write(tmp_path, step) for step in (1, 2, 3)]
    ours.seal(urls[0], FILES)
    Path(urls[1], storage.COMPLETE).write_bytes(b"\0" * 10)
    ours.seal(urls[2], FILES)
    assert [kept.step for kept in ours.all()] == [1, 3]
    assert "is damaged" in caplog.text


@pytest.mark.parametrize("gone", ["weights-00001.safetensors", storage.COMPLETE])
def test_one_that_goes_while_it_is_read_is_no_half_of_one(tmp_path: Path, gone: str) -> None:
    """Another attempt may remove it, as too old, between choosing and reading it."""
    url = str(tmp_path / folder_of(1, "0" * 8))
    listed = {}
    for rank in (0, 1):
        name, content = tensors_file("weights", rank, {f"{4 * rank}:a": torch.full((4,), float(rank))})
        storage.write_bytes(storage.join(url, name), content)
        listed[name] = len(content)
    Checkpoints(str(tmp_path)).seal(url, listed)
    assert read_track(url, "weights")["a"].tolist() == [0.0] * 4 + [1.0] * 4
    storage.remove(storage.join(url, gone))
    with pytest.raises(CheckpointGone, match="was removed while it was read"):
        read_track(url, "weights")
    assert not issubclass(CheckpointGone, ValueError | Problem), "a training would not begin again"
