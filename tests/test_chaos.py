"""Promises 1, 2 and 6 under attack: whatever is killed, whenever, the run ends as if nothing had been.

Protects the final weights, metrics, samples and numbers of a run of the demo's size on 2 workers, of which a seeded
monkey kills processes: workers, their controller, Ray's daemons, the command itself, all at once. And of one whose disk
is full, and of one whose object storage is away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from chaos import differences, summary, train
from servers import rclone

pytestmark = pytest.mark.slow

SETTINGS = [
    # Data, networks and batches are the demo's; fewer epochs, leaves and samples.
    "workers=2",
    "tree.max_leaves=4",
    "tree.epochs.initial=8",
    "tree.epochs.split=12",
    "tree.epochs.final=4",
    "tree.checkpoint_images=3000",
    "diffusion.images=20480",
    "diffusion.checkpoint_images=2560",
    "samples.draws=300",
    "samples.per_leaf=20",
    "samples.steps=10",
    "samples.batch=50",
    "samples.reconstructions=100",
    "evaluation.likelihood_images=100",
    "evaluation.likelihood_samples=20",
    "evaluation.classifier.images=12800",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The runs folder of the run that nothing happened to, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    _, seconds = train(SETTINGS, folder, deadline=1500)
    return folder / "runs", seconds


@pytest.mark.timeout(2400)
def test_ten_kills_change_nothing(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    runs, usual = undisturbed
    monkey, seconds = train(SETTINGS, tmp_path, deadline=1500, seed=0, kills=10, pause=(3.0, 12.0))
    told = summary(monkey, seconds, usual)
    print(json.dumps(told))
    assert told["kills"] == 10
    assert len(told["by_kind"]) >= 3, "too few kinds of kills to say much"
    assert differences(tmp_path / "runs" / "run", runs / "run") == []


@dataclass
class Training:
    """The same run's training in another place, with the same data."""

    undisturbed: Path
    runs: str
    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> subprocess.Popen[bytes]:
        where = [
            f"runs={self.runs}",
            f"data.url={self.undisturbed}/data/digits",
            f"tracking=sqlite:///{self.home}/m.db",
        ]
        with self.log.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tdiff.train", *SETTINGS, "name=run", *where, "--until", "diffusion"],
                cwd=self.home,
                env=os.environ | self.environment,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> Path:
        return self.home / "log"

    def ends_with(self, running: subprocess.Popen[bytes], code: int) -> str:
        """What it said."""
        assert running.wait(timeout=400) == code, self.log.read_text()[-2000:]
        return self.log.read_text()


def assert_same(ours: Path, undisturbed: Path) -> None:
    for part in ("tree", "diffusion"):
        assert differences(ours / "run" / part, undisturbed / "run" / part) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=False)


@pytest.mark.timeout(1200)
def test_a_full_disk_is_said_and_room_is_all_it_takes(
    undisturbed: tuple[Path, float], small_disk: Path, tmp_path: Path
) -> None:
    training = Training(undisturbed[0], str(small_disk), tmp_path)
    said = training.ends_with(training.start(), 2)
    (sentence,) = [line for line in said.splitlines() if line.startswith("tdiff: ")]
    assert "No space left on device" in sentence
    subprocess.run(["mount", "-o", "remount,size=1g", small_disk], check=True)
    training.ends_with(training.start(), 0)
    assert_same(small_disk, undisturbed[0])


@pytest.mark.timeout(1200)
def test_object_storage_may_go_and_come_back(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    """All of the run lies there; it is away for 20 s while the tree grows, and again while the U-Net trains."""
    with rclone(tmp_path) as server:
        server.make_bucket("bucket")
        runs = tmp_path / "data" / "bucket" / "runs"
        training = Training(undisturbed[0], "s3://bucket/runs", tmp_path, server.environment())
        running = training.start()
        for sign in ("tree/00-root/metrics/*", "diffusion/checkpoints/*/COMPLETE"):
            deadline = time.monotonic() + 300
            while not list((runs / "run").glob(sign)) and time.monotonic() < deadline:
                assert running.poll() is None, training.log.read_text()[-2000:]
                time.sleep(0.05)
            server.stop()
            time.sleep(20)
            server.start()
        training.ends_with(running, 0)
    for left in runs.rglob(".rclone_temp_put_*"):  # the server's own, of what it was writing when it was killed
        left.unlink()
    for folder in sorted((place for place in runs.rglob("*") if place.is_dir()), reverse=True):
        if not list(folder.iterdir()):  # a store of objects has no folders
            folder.rmdir()
    assert_same(runs, undisturbed[0])
