"""Protects generation's promises against a real Ray: shards are the same to the byte whatever the workers, and whoever
is killed. A job survives the SIGKILL of its actors; of its driver, too, after which only missing shards are drawn.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from finished import finished_run

import tdiff
from tdiff import launch, results
from tdiff.runs import Run
from tdiff.work.jobs import sample_job
from tdiff.work.sampling import SampleJob, draw_shard, read_samples

pytestmark = pytest.mark.slow

SHARDS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory.mktemp("runs"), settings=("samples.batch=20", "diffusion.timesteps=200"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of four CPUs, however many this machine has."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
    yield
    launch.disconnect()


def slow_job(run: Run, name: str) -> SampleJob:
    """Shards of which each takes long enough to be killed in."""
    return sample_job(run, name, num=20 * SHARDS - 7, steps=120, sampler="ddpm")


@pytest.fixture(scope="module")
def expected(run: Run) -> dict[str, bytes]:
    """All files of the job as this process makes them."""
    job = slow_job(run, "expected")
    results._complete(job, [draw_shard(job, shard) for shard in range(job.shards)])
    return files(job)


def files(job: SampleJob) -> dict[str, bytes]:
    """The files of a job's folder, without what says which command drew it."""
    return {file.name: file.read_bytes() for file in Path(job.url).iterdir() if file.name != "job.json"}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_same_bytes_whatever_the_workers(cluster: None, run: Run, expected: dict[str, bytes], workers: int):
    job = slow_job(run, f"workers-{workers}")
    assert results.draw({"job": job}, workers) == 20 * SHARDS - 7
    assert files(job) == expected
    assert len(expected) == SHARDS + 3  # and manifest.json, grid.png, COMPLETE


def test_a_notebook_draws_the_same(run: Run, expected: dict[str, bytes]):
    job = slow_job(run, "expected")
    here = tdiff.load(run.url).sample(job.num, steps=job.steps, sampler=job.sampler)
    there = read_samples(job.url)
    assert here.entries == there.entries
    assert here.images.tobytes() == there.images.tobytes()
    assert here.treevae.tobytes() == there.treevae.tobytes()


def actors() -> list[psutil.Process]:
    """Ray's actors below this process that draw."""
    below = psutil.Process().children(recursive=True)
    return [process for process in below if any("Caller" in word for word in process.cmdline())]


def test_actors_killed_in_the_middle_of_a_job(cluster: None, run: Run, expected: dict[str, bytes]):
    """Two work; after the second shard both die, one of them within another shard."""
    job, killed, told = slow_job(run, "killed"), list[int](), list[int]()

    def progress(done: int, total: int) -> None:
        told.append(done)
        if done == 2:
            for process in actors():
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    results.draw({"job": job}, 2, progress)
    assert len(killed) == 2
    assert told == list(range(1, SHARDS + 1)), "a shard was lost, or came twice"
    assert files(job) == expected
    assert [entry["index"] for entry in read_samples(job.url).entries] == list(range(job.num))


def test_a_driver_killed_and_started_again(run: Run, expected: dict[str, bytes]):
    job = slow_job(run, "resumed")
    options = {"num": job.num, "steps": job.steps, "sampler": job.sampler, "out": "resumed", "workers": 1}
    command = [sys.executable, "-m", "tdiff.generate", run.url, *(f"--{key}={value}" for key, value in options.items())]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as driver:
        deadline = time.monotonic() + 240
        while not Path(job.shard_url(1)).exists():
            assert driver.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(driver.pid, signal.SIGKILL)
    assert not Path(job.url, "COMPLETE").exists()
    written = settled(job)
    assert 2 <= len(written) < SHARDS
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = re.findall(r"shard (\d+)/\d+  ([\d.]+) images/s  (\d+) s left", done.stdout)
    assert [int(shard) for shard, *_ in told] == list(range(len(written) + 1, SHARDS + 1)), "of its own shards alone"
    seconds = float(re.search(r"grid.png; ([\d.]+) s", done.stdout)[1])
    assert float(told[-1][1]) >= 20 * (SHARDS - len(written)) / seconds / 1.5, "not the rate of what it drew"
    assert float(told[-1][1]) <= 20 * (SHARDS - len(written)) / seconds * 1.5, "not the rate of what it drew"
    assert {name: at for name, at in times(job).items() if name in written} == written, "a shard was drawn again"
    assert files(job) == expected
    assert dataclasses.replace(job, url="") == dataclasses.replace(slow_job(run, "expected"), url="")


def times(job: SampleJob) -> dict[str, int]:
    """When the shards of a folder were written."""
    return {file.name: file.stat().st_mtime_ns for file in Path(job.url).glob("*.tar")}


def settled(job: SampleJob) -> dict[str, int]:
    """`times`, once an actor that outlived its driver for a moment has gone, too."""
    before, deadline = None, time.monotonic() + 60
    while before != (now := times(job)) and time.monotonic() < deadline:
        before = now
        time.sleep(3)
    return now
