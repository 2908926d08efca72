"""Protects a run in object storage from a second driver: one holder at a time, a killed one's place is free soon.

A real S3 server and real processes; the times are shorter than in use.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tdiff import lease, storage
from tdiff.errors import ConfigError
from tdiff.lease import Lease, leased
from tdiff.opening import only_driver
from tdiff.runs import Run

HOLD = (
    "import sys, time; from tdiff import lease; lease.RENEWAL = 0.2\n"
    "with lease.leased(sys.argv[1], lambda: sys.exit('held')): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEWAL", 0.2)
    monkeypatch.setattr(lease, "LAPSE", 2.0)
    monkeypatch.setattr(lease, "SETTLING", 0.2)


@pytest.fixture
def holder(s3: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease of the folder s3 is in."""
    with subprocess.Popen([sys.executable, "-c", HOLD, s3], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


ANOTHERS = b"held by another process 1 0a sign 1\n"


class Held(Exception):
    pass


def refuse() -> None:
    raise Held


def file(url: str) -> str:
    return storage.join(url, lease.FILE)


def test_a_second_driver_is_kept_off_a_run_in_object_storage(s3: str, holder: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"is being worked on by another process: wait for it"), only_driver(Run(s3)):
        pass
    assert time.monotonic() - began < 2.0, "a living holder is known by its next sign"
    assert holder.poll() is None


def test_the_place_of_a_killed_driver_is_free_after_a_while(s3: str, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with only_driver(Run(s3)):
        assert 2.0 <= time.monotonic() - began < 10
    assert not storage.exists(file(s3))


def test_who_is_told_to_wait_comes_next(s3: str, holder: subprocess.Popen[str]) -> None:
    told: list[float] = []

    def wait() -> None:
        told.append(time.monotonic())
        holder.kill()

    with leased(s3, wait):
        assert len(told) == 1


def test_what_is_given_back_is_free_at_once(s3: str) -> None:
    for _ in range(2):
        began = time.monotonic()
        with leased(s3, refuse):
            first = storage.read_bytes(file(s3))
            time.sleep(0.6)
            assert storage.read_bytes(file(s3)) != first, "it gives signs of life"
        assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("content", [b"", b"\xff\x00 not a word"])
def test_a_garbled_lease_is_taken_over(s3: str, content: bytes) -> None:
    storage.write_bytes(file(s3), content)
    with leased(s3, refuse):
        assert storage.read_bytes(file(s3)) != content


def test_of_two_that_come_at_once_one_has_it(s3: str) -> None:
    came, barrier = [], threading.Barrier(2)

    def come() -> None:
        one = Lease(s3)
        barrier.wait()
        try:
            one.take(refuse)
        except Held:
            return
        came.append(one)

    threads = [threading.Thread(target=come) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == 1
    came[0].give_back()


def test_who_loses_it_stops_and_leaves_it_to_the_other(s3: str) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with leased(s3, refuse):
            storage.write_bytes(file(s3), ANOTHERS)
            deadline = time.monotonic() + 10
            while not told and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]
    assert storage.read_bytes(file(s3)) == ANOTHERS


@pytest.mark.parametrize("content", [None, b"", ANOTHERS[:20]])
def test_a_store_that_loses_a_sign_takes_nothing_from_its_holder(s3: str, content: bytes | None) -> None:
    with leased(s3, refuse):
        if content is None:
            storage.remove(file(s3))
        else:
            storage.write_bytes(file(s3), content)
        deadline = time.monotonic() + 10
        while not (storage.exists(file(s3)) and lease.SIGN.fullmatch(storage.read_bytes(file(s3)))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not storage.exists(file(s3))
