"""Protects what a training on Ray survives: workers, controllers and steps that hang, and a wish to stop.

Real Ray Train jobs of a function that takes steps of nothing and keeps a checkpoint of each: every start of one takes
its workers seconds, so most of them are slow tests.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from tdiff import launch, storage
from tdiff.checkpoints import Checkpoints, folder_of
from tdiff.config import Recovery
from tdiff.errors import Stopped, WorkersLostError
from tdiff.launch import Crew, TrainWorker, sizes


@pytest.mark.parametrize(
    ("slots", "crew", "expected"),
    [
        (4, Crew(2, 2), [2]),
        (4, Crew(3, 3), [2]),  # the most that share the slots, though fewer than asked for
        (4, Crew(1, 4), [1, 2, 4]),
        (12, Crew(2, 7), [2, 3, 4, 6]),
        (12, Crew(5, 5), [4]),
        (1, Crew(2, 8), [1]),
        (7, Crew(2, 5), [1]),
    ],
)
def test_sizes_share_the_slots(slots: int, crew: Crew, expected: list[int]) -> None:
    assert sizes(slots, crew) == expected


def test_a_crew_is_what_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cpus = len(os.sched_getaffinity(0))
    assert launch.crew_of((1, 10_000)) == (1, cpus)
    assert launch.crew_of(None) == (min(2, cpus), min(2, cpus))
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    assert launch.crew_of((1, 10_000)) == (1, 10_000)
    assert launch.crew_of(7) == (7, 7)


def test_workers_that_find_no_room_are_waited_for_and_may_be_fewer_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train is replaced: a node that dies while workers start takes minutes here."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import ControllerError

    room, tried = [2, 1, 1], []

    class Trainer:
        def __init__(self, *_: Any, scaling_config: Any, run_config: Any, **__: Any):
            self.workers = scaling_config.num_workers
            failures = run_config.failure_config
            assert failures.controller_failure_limit == failures.max_preemption_failures == failures.max_failures == 0

        def fit(self) -> None:
            tried.append(self.workers)
            if len(tried) < 3:
                raise ControllerError(WorkerGroupStartupTimeoutError(self.workers))

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    monkeypatch.setattr(launch, "gpus", lambda: 0)
    monkeypatch.setattr(launch, "_reserved", set)
    monkeypatch.setattr(launch, "_room", lambda: 2)
    monkeypatch.setattr(launch, "_free", lambda: room[min(len(tried), 2)])
    monkeypatch.setattr(launch, "SETTLING", 0.1)
    monkeypatch.setattr(launch, "HEARTBEAT", 0.02)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    launch.fit(take_steps, Steps(str(tmp_path)), Crew(1, 2), 2, str(tmp_path), Recovery(retries=0), said.append)
    assert tried == [2, 1, 1]
    assert said == [f"there is no room for {workers} workers yet: still waiting" for workers in (2, 1)]


@pytest.mark.parametrize(("free", "grows"), [(1, False), (2, True)])
def test_only_what_nobody_else_uses_is_room_to_grow(monkeypatch: pytest.MonkeyPatch, free: int, grows: bool) -> None:
    """From 2 workers to 4, on a cluster of many that others share."""
    wishes: list[str] = []
    monkeypatch.setattr(launch, "HEARTBEAT", 0.02)
    monkeypatch.setattr(launch, "GROWTH", 0.02)
    monkeypatch.setattr(launch, "_room", lambda: 100)
    monkeypatch.setattr(launch, "_free", lambda: free)
    monkeypatch.setattr(launch, "_put", wishes.append)
    with launch._Watching("key", [2, 6], lambda: None):
        time.sleep(0.5)
    assert wishes == ["key"] * grows


def test_what_the_autoscaler_was_asked_for_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(launch, "_with_gpus", False)
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(launch, "gpus", lambda: 1)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    with launch._asked_for([2]):
        assert asked == []  # as many as there must be: they ask for themselves
    with launch._asked_for([1, 2]):
        assert asked == [[{"GPU": 1}] * 2]
    assert asked[1:] == [[]]


def test_a_cluster_that_lost_its_gpus_has_them_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its workers would go on on CPUs, for weeks, without a word."""
    there = 2
    monkeypatch.setattr(launch, "_with_gpus", False)
    monkeypatch.setattr(launch, "gpus", lambda: there)
    assert launch.at_once(4) == 2
    there = 0
    assert launch.uses_gpus()
    assert launch.at_once(4) == 1
    launch.disconnect()
    assert not launch.uses_gpus()


@dataclass(frozen=True)
class Steps:
    """What the workers do: steps of 0.2 s each, until `count` are done, a checkpoint after every one by worker 0."""

    url: str
    count: int = 10
    mishap: str = ""
    """dies: worker 0 is killed before its first step is kept; hangs: takes no step 3, once; prepares: for minutes;
    arrives: a worker is killed as it is given its function, once.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        arrived = Path(self.url, "arrived")
        here = Path("/proc/self/cmdline").read_text()
        if self.mishap == "arrives" and here.startswith("ray::RayTrainWorker") and not arrived.exists():
            arrived.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def take_steps(job: Steps, worker: TrainWorker) -> None:
    checkpoints = Checkpoints(job.url)
    newest = checkpoints.newest()
    Path(job.url, f"started-{time.time_ns()}-{worker.rank}-of-{worker.world}").write_text(str(os.getpid()))
    for step in range(newest.step if newest else 0, job.count):
        worker.expects(3.0 if job.mishap == "hangs" else 60.0)
        if job.mishap == "dies" and worker.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if job.mishap == "prepares":
            worker.expects(600.0)
            time.sleep(600)
        hung = Path(job.url, "hung")
        if job.mishap == "hangs" and step == 3 and worker.rank == 0 and not hung.exists():
            hung.touch()
            time.sleep(600)
        time.sleep(0.2)
        if worker.rank == 0:
            url = storage.join(job.url, folder_of(step + 1, "00000000"))
            storage.write_text(storage.join(url, "step"), str(step))
            checkpoints.seal(url, {"step": len(str(step))})
        if worker.told_to_stop():
            raise Stopped(f"after step {step + 1}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # workers find this module
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path])))
        launch.connect(1)
    yield
    launch.disconnect()


Fit = Callable[..., list[str]]


@pytest.fixture
def fit(cluster: None, tmp_path: Path) -> Fit:
    def fit(count: int = 10, mishap: str = "", least: int = 1, most: int = 1, retries: int = 3) -> list[str]:
        """What was said."""
        said: list[str] = []
        job, recovery = Steps(str(tmp_path), count, mishap), Recovery(retries=retries)
        launch.fit(take_steps, job, Crew(least, most), 2, str(tmp_path), recovery, said.append)
        return said

    return fit


def starts(folder: Path) -> list[str]:
    return sorted(file.name.split("-", 2)[2] for file in folder.glob("started-*"))


def assert_room_is_free() -> None:
    """Soon all CPUs are: nothing of a training lives on in the cluster."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)


def in_background(action: Callable[[], None], when: Callable[[], bool]) -> threading.Thread:
    def wait() -> None:
        while not when():
            time.sleep(0.05)
        action()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_workers_that_die_without_progress_are_given_up(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(WorkersLostError, match="workers failed 2 times in a row after step 0"):
        fit(mishap="dies", retries=1)
    assert starts(tmp_path) == ["0-of-1"] * 2


@pytest.mark.slow
def test_a_worker_that_dies_as_it_is_given_its_function_leaves_its_room(fit: Fit, tmp_path: Path) -> None:
    (said,) = fit(mishap="arrives", most=2)
    assert "going on from step 0, try 1 of 3" in said
    assert starts(tmp_path)[-2:] == ["0-of-2", "1-of-2"]
    assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}
    assert_room_is_free()


@pytest.mark.slow
def test_a_worker_that_hangs_ends_and_is_replaced(fit: Fit, tmp_path: Path) -> None:
    began = time.monotonic()
    (said,) = fit(mishap="hangs")
    assert "going on from step 3, try 1 of 3" in said
    assert time.monotonic() - began < 90
    assert starts(tmp_path) == ["0-of-1"] * 2
    assert Checkpoints(str(tmp_path)).newest() == (10, str(tmp_path / folder_of(10, "00000000")))


@pytest.mark.slow
def test_a_controller_that_dies_is_replaced(fit: Fit, tmp_path: Path) -> None:
    def kill() -> None:
        children = psutil.Process().children(recursive=True)
        controllers = [p for p in children if "TrainController" in " ".join(p.cmdline())]
        controllers[-1].kill()

    in_background(kill, lambda: bool(list(tmp_path.glob("000000002-*"))))
    (said,) = fit(count=40)
    assert "going on from step" in said
    assert starts(tmp_path) == ["0-of-1"] * 2


@pytest.mark.slow
def test_sigterm_lets_the_step_be_finished(fit: Fit, tmp_path: Path) -> None:
    in_background(lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: bool(list(tmp_path.glob("000000002-*"))))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="the same command goes on"):
        fit(count=1000)
    assert signal.getsignal(signal.SIGTERM) == before
    newest = Checkpoints(str(tmp_path)).newest()
    assert newest is not None
    assert 2 <= newest.step < 100


@pytest.mark.slow
def test_control_c_ends_it_at_once(fit: Fit, tmp_path: Path) -> None:
    in_background(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: bool(list(tmp_path.glob("000000002-*"))))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(count=1000)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_room_is_free()


@pytest.mark.slow
def test_actors_that_find_no_room_yet_come_when_others_are_idle(cluster: None) -> None:
    """More are wanted than the cluster has room for, and each has a task of its own already."""
    wanted = 2 * int(ray.cluster_resources()["CPU"])
    found = launch.map_on_actors(abs, [(-k,) for k in range(wanted)], wanted)
    assert dict(found) == {k: k for k in range(wanted)}


@pytest.mark.slow
def test_sigterm_does_not_wait_for_workers_that_have_no_step_to_lose(fit: Fit, tmp_path: Path) -> None:
    told: list[float] = []

    def stop() -> None:
        told.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    in_background(stop, lambda: bool(starts(tmp_path)))
    with pytest.raises(Stopped, match="the same command goes on"):
        fit(mishap="prepares")
    assert time.monotonic() - told[0] < 10
    assert_room_is_free()


@pytest.mark.slow
def test_more_workers_are_taken_on_when_there_is_room(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, free, all_there = 1, launch._free, launch._room()
    monkeypatch.setattr(launch, "_room", lambda: room)
    monkeypatch.setattr(launch, "_free", lambda: free() - all_there + room)
    monkeypatch.setattr(launch, "GROWTH", 1.0)

    def grow() -> None:
        nonlocal room
        room = 2

    in_background(grow, lambda: bool(list(tmp_path.glob("000000002-*"))))
    (said,) = fit(count=60, most=2)
    assert said.startswith("there is room for more workers; going on from step")
    assert starts(tmp_path) == ["0-of-1", "0-of-2", "1-of-2"]
