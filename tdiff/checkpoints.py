"""Resume checkpoints of a phase: each worker writes files of its own; the marker, written last, lists them all.

    URL/000000640-5f0c93aa/  weights-00000.safetensors  exp_avg-00000.safetensors  …  progress.json  COMPLETE
        rollbacks.json       how often training went back after a number that was not finite, and from where

A safetensors file holds what one worker had of a track: weights, buffers, Adam's moments, or an EMA. Under "START:NAME"
stand the numbers of the parameter NAME from number START on, so any number of workers can go on from what any other
number left. There is no pickle.

Files are written in the background, one checkpoint at a time. An older checkpoint is removed only when a newer one is
whole, the last ones when the phase is complete (`tdiff.runs.drop_checkpoints`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from tdiff import storage
from tdiff.errors import DataError

log = logging.getLogger(__name__)

FOLDER = re.compile(r"(\d{9})-[0-9a-f]{8}")
PROGRESS = "progress.json"
ROLLBACKS = "rollbacks.json"


class CheckpointGone(RuntimeError):
    """A checkpoint that was whole when it was chosen is being removed: whoever begins again finds a newer one."""


class Kept(NamedTuple):
    """A checkpoint that is whole."""

    step: int
    url: str


class Rollback(NamedTuple):
    """Once, training went back."""

    step: int
    """Where a number was not finite."""
    back_to: int
    """The step of the checkpoint that training then went on from; 0: the phase's start."""


def folder_of(step: int, attempt: str) -> str:
    """A folder that no other attempt (8 hexadecimal digits) shares: workers thought dead may still write their own."""
    return f"{step:09d}-{attempt}"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder, local or s3://. at_least: how many of the newest are kept."""

    url: str
    at_least: int = 2

    def all(self) -> list[Kept]:
        """Those that are whole, oldest first."""
        names = [name for name in storage.listing(self.url) if FOLDER.fullmatch(name)]
        found = [Kept(int(name.partition("-")[0]), storage.join(self.url, name)) for name in names]
        return sorted(kept for kept in found if _whole(kept.url))

    def newest(self) -> Kept | None:
        return max(self.all(), default=None)

    def tidy(self) -> None:
        """Removes what a killed attempt left unfinished."""
        whole = {kept.url for kept in self.all()}
        for name in storage.listing(self.url):
            if FOLDER.fullmatch(name) and (url := storage.join(self.url, name)) not in whole:
                try:
                    storage.remove(url)
                except OSError as error:  # a worker that is thought dead may still write there: the next time, then
                    log.warning("%s is left over and cannot be removed now: %s", url, error)

    def seal(self, url: str, files: Mapping[str, int]) -> None:
        """Marks a checkpoint as whole, whose workers wrote these files (name -> bytes), and removes those that are too
        old by now.

        What is listed is what was written, not what is there: another attempt's `tidy` may have removed some of it.
        """
        storage.write_text(storage.join(url, storage.COMPLETE), json.dumps(files))
        try:
            for old in self.all()[: -self.at_least]:
                storage.remove(storage.join(old.url, storage.COMPLETE))  # first, or half of it would look whole
                storage.remove(old.url)
        except OSError as error:  # the new one is whole all the same
            log.warning("checkpoints that are too old cannot be removed now: %s", error)

    def rollbacks(self) -> list[Rollback]:
        """In the order of their time."""
        try:
            return [Rollback(**entry) for entry in storage.read_json(storage.join(self.url, ROLLBACKS))["rollbacks"]]
        except FileNotFoundError:
            return []

    def add_rollback(self, rollback: Rollback) -> None:
        entries = [entry._asdict() for entry in (*self.rollbacks(), rollback)]
        storage.write_text(storage.join(self.url, ROLLBACKS), json.dumps({"rollbacks": entries}) + "\n")


def _whole(url: str) -> bool:
    try:
        listed = storage.read_json(storage.join(url, storage.COMPLETE))
    except FileNotFoundError:
        return False
    except DataError as error:
        log.warning("%s, so it does not count", error)
        return False
    there = storage.versions(url)
    return all(name in there and there[name][0] == size for name, size in listed.items())


def tensors_file(track: str, rank: int, parts: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """Name and content of what a worker keeps of a track: parts by "START:NAME", flat."""
    content: bytes = save_tensors({key: part.detach().cpu().contiguous() for key, part in parts.items()})
    return f"{track}-{rank:05d}.safetensors", content


def read_track(url: str, track: str) -> dict[str, Tensor]:
    """A track of all workers together: parameter's name -> all its numbers, flat, on the CPU.

    Raises DataError if some are missing, CheckpointGone if files are that its marker lists.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    for file in _listed(url):
        if re.fullmatch(rf"{re.escape(track)}-\d+\.safetensors", file):
            for key, part in storage.as_tensors(storage.join(url, file), _read(url, file)).items():
                start, _, name = key.partition(":")
                parts.setdefault(name, {})[int(start)] = part
    full = {}
    for name, found in parts.items():
        ordered = sorted(found.items())
        ends = [0, *(start + part.numel() for start, part in ordered)]
        if [start for start, _ in ordered] != ends[:-1]:
            raise DataError(f"{url} is damaged: {track} lacks numbers of {name}")
        full[name] = ordered[0][1] if len(ordered) == 1 else torch.cat([part for _, part in ordered])
    return full


def read_progress(url: str) -> dict[str, Any]:
    """What `PROGRESS` says. Raises CheckpointGone."""
    found: dict[str, Any] = json.loads(_read(url, PROGRESS))
    return found


def _listed(url: str) -> Mapping[str, int]:
    """The files of a checkpoint, name -> bytes, as its marker says."""
    listed: Mapping[str, int] = json.loads(_read(url, storage.COMPLETE))
    return listed


def _read(url: str, name: str) -> bytes:
    try:
        return storage.read_bytes(storage.join(url, name))
    except FileNotFoundError as error:
        raise CheckpointGone(f"the checkpoint {url} was removed while it was read") from error


class Writing:
    """One worker's part in writing checkpoints, in the background. `of` is the step of the one that is under way.

    A checkpoint that storage does not take is given up with a warning: the last one counts on.
    """

    def __init__(self, checkpoints: Checkpoints, first: bool):
        """first: whether this worker is the one that seals."""
        self.checkpoints = checkpoints
        self.first = first
        self.of: int | None = None
        self._url = ""
        self._listed: Mapping[str, int] = {}
        self._job: Future[None] | None = None
        self._sealing = False
        self._pool = ThreadPoolExecutor(1, "checkpoint")

    def begin(
        self, step: int, name: str, files: dict[str, bytes], listed: Mapping[str, int], before: Callable[[], None]
    ) -> None:
        """Starts to write this worker's files (name -> content) into the folder `name`; `files` is emptied meanwhile.

        listed: the files of all workers, name -> bytes. before: writes what must be there first. Nothing may be under
        way.
        """
        assert self.of is None
        self._listed = listed
        self.of, self._url, self._sealing = step, storage.join(self.checkpoints.url, name), False
        self._job = self._pool.submit(self._write, self._url, files, before)

    @staticmethod
    def _write(url: str, files: dict[str, bytes], before: Callable[[], None]) -> None:
        before()
        for name in list(files):
            storage.write_bytes(storage.join(url, name), files.pop(name))  # its memory is free again

    @property
    def busy(self) -> bool:
        return self._job is not None and not self._job.done()

    @property
    def failed(self) -> bool:
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def wait(self) -> None:
        """Until this worker's own part is done."""
        if self._job is not None:
            self._job.exception()

    def go_on(self, busy: bool, failed: bool) -> None:
        """Takes the next step, given whether anybody is still busy or has failed; called by all workers alike."""
        if self.of is None or busy:
            return
        if not failed and not self._sealing:
            self._sealing = True
            self._job = self._pool.submit(self.checkpoints.seal, self._url, self._listed) if self.first else None
            return
        if self._job is not None and (error := self._job.exception()) is not None:
            log.warning("the checkpoint of step %d could not be written, the last one counts on: %s", self.of, error)
        if failed and self.first:
            self._pool.submit(storage.remove, self._url)  # its space may be what is missing; else `tidy` does it
        self.of, self._job = None, None
