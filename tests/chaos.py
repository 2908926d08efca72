"""A monkey that kills processes of a run, again and again: which, and when, follows from a seed.

    python tests/chaos.py --kills 100 --seed 1 --home /tmp/chaos configs/digits.yaml

trains a run undisturbed and another one under the monkey, and compares what they leave. The monkey plays the user too:
where the command itself is gone, it is started again, the same. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

MARK = "TDIFF_CHAOS"
"""An environment variable that all processes of a run inherit, and nobody else has."""

TARGETS = {
    "worker": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "actor": "ray::Caller",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
    "driver": "-m tdiff.train",
}
"""What can be killed -> what its command line holds. And "cluster": all of these at once."""


@dataclass
class Kill:
    """One kill. Seconds from it to the first word of it, and to the first new training step; None: neither came before
    the next kill or the end.
    """

    what: str
    at: float
    noticed: float | None = None
    on_again: float | None = None


@dataclass
class Monkey:
    """Runs `command` in `folder` to its end, killing `kills` times."""

    command: Sequence[str]
    folder: Path
    seed: int
    kills: int
    pause: tuple[float, float] = (3.0, 15.0)
    """Seconds between two kills, at least and at most: a moment in any part of the work."""
    done: list[Kill] = field(default_factory=list)
    starts: int = 0
    lines: list[str] = field(default_factory=list)

    def run(self, deadline: float) -> float:
        """Seconds that it took. deadline: seconds after which it is given up."""
        rng = random.Random(self.seed)
        mark = f"{os.getpid()}-{time.time_ns()}"
        began = time.monotonic()
        next_kill = began + rng.uniform(*self.pause)
        driver = self._start(mark)
        try:
            while True:
                now = time.monotonic()
                if now - began > deadline:
                    raise TimeoutError(
                        f"not at its end after {deadline:.0f} s; last lines:\n" + "\n".join(self.lines[-20:])
                    )
                code = driver.poll()
                if code == 0:
                    break
                if code is not None:
                    assert code < 0 or self.done, f"ended by itself with {code}:\n" + "\n".join(self.lines[-20:])
                    self._sweep(mark)
                    driver = self._start(mark)
                if len(self.done) < self.kills and now > next_kill:
                    self._kill(rng, mark, now)
                    next_kill = time.monotonic() + rng.uniform(*self.pause)
                time.sleep(0.05)
        finally:
            self._sweep(mark)
        return time.monotonic() - began

    def _start(self, mark: str) -> subprocess.Popen[str]:
        self.starts += 1
        driver = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        threading.Thread(target=self._listen, args=(driver,), daemon=True).start()
        return driver

    def _listen(self, driver: subprocess.Popen[str]) -> None:
        assert driver.stdout is not None
        for line in driver.stdout:
            self.lines.append(line.rstrip())
            last = self.done[-1] if self.done else None
            if last is not None:
                since = time.monotonic() - last.at
                if last.noticed is None and ("a worker failed" in line or "went on" in line):
                    last.noticed = since
                if last.on_again is None and "goes on from step" in line:
                    last.on_again = since

    def _kill(self, rng: random.Random, mark: str, now: float) -> None:
        alive = list(processes(mark))
        by_kind = {what: [p for p, line in alive if text in line] for what, text in TARGETS.items()}
        there = sorted(what for what, found in by_kind.items() if found)
        if not there:
            return
        # As in life: workers go most often.
        what = rng.choice([*there, *(["worker"] * 3 if by_kind["worker"] else []), "cluster"])
        victims = [p for p, _ in alive] if what == "cluster" else [rng.choice(by_kind[what])]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(signal.SIGKILL)
        self.done.append(Kill(what, now))
        self.lines.append(f"--- killed {what} ({len(self.done)} of {self.kills})")

    def _sweep(self, mark: str) -> None:
        """What a dead driver's cluster left behind: a machine that restarts has none of it."""
        for process, _ in list(processes(mark)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def processes(mark: str) -> Iterator[tuple[psutil.Process, str]]:
    """All processes of a run, with their command lines."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if process.environ().get(MARK) == mark:
                yield process, " ".join(process.cmdline())


def differences(ours: Path, theirs: Path) -> list[str]:
    """How two runs differ in what must not: weights, metrics but for times, samples, decisions, numbers."""
    found = []
    names = {str(f.relative_to(ours)) for f in ours.rglob("*")} ^ {
        str(f.relative_to(theirs)) for f in theirs.rglob("*")
    }
    found += [f"{name} is in one only" for name in sorted(names) if "metrics/" not in name and ".partial" not in name]
    for file in sorted(theirs.rglob("*")):
        name, other = str(file.relative_to(theirs)), ours / file.relative_to(theirs)
        if not other.is_file() or "metrics/" in name:
            continue
        if file.suffix == ".safetensors":
            a, b = load_file(other), load_file(file)
            if a.keys() != b.keys() or any(not bits(a[key]).equal(bits(b[key])) for key in a):
                found.append(f"{name} differs")
        elif file.suffix == ".tar" and other.read_bytes() != file.read_bytes():
            found.append(f"{name} differs")
    for folder in sorted({file.parent for file in theirs.rglob("metrics/*.jsonl")}):
        lines = [
            [line for part in sorted(where.glob("*.jsonl")) for line in part.read_text().splitlines()]
            for where in (folder, ours / folder.relative_to(theirs))
        ]
        if lines[0] != lines[1]:
            found.append(f"{folder.relative_to(theirs)} differ")
    if (theirs / "evaluation.json").exists():
        a, b = (json.loads((run / "evaluation.json").read_text()) for run in (ours, theirs))
        for numbers in (a, b):
            del numbers["seconds"], numbers["data"]["url"]
        if json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            found.append("evaluation.json differs")
    return found


def bits(tensor: Tensor) -> Tensor:
    """What tells apart all that differs, and nothing else: NaN, which stands for "not estimated", equals itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def summary(monkey: Monkey, seconds: float, undisturbed: float) -> dict[str, Any]:
    def middle(values: list[float]) -> float | None:
        return round(statistics.median(values), 1) if values else None

    by_kind: dict[str, Any] = {}
    for what in sorted({kill.what for kill in monkey.done}):
        of = [kill for kill in monkey.done if kill.what == what]
        by_kind[what] = {
            "kills": len(of),
            "seconds_to_notice": middle([k.noticed for k in of if k.noticed is not None]),
            "seconds_to_next_step": middle([k.on_again for k in of if k.on_again is not None]),
        }
    return {
        "kills": len(monkey.done),
        "starts_of_the_command": monkey.starts,
        "seconds": round(seconds, 1),
        "seconds_undisturbed": round(undisturbed, 1),
        "seconds_lost_per_kill": round((seconds - undisturbed) / max(1, len(monkey.done)), 1),
        "by_kind": by_kind,
    }


def train(
    settings: Sequence[str],
    folder: Path,
    deadline: float,
    seed: int = 0,
    kills: int = 0,
    pause: tuple[float, float] = (3.0, 15.0),
) -> tuple[Monkey, float]:
    """A run `runs/run` of these settings in a folder, under a monkey: it, and the seconds that the run took."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tdiff.train", *settings, "name=run", "recovery.retries=100"]
    monkey = Monkey(command, folder, seed, kills, pause)
    try:
        seconds = monkey.run(deadline)
    finally:
        (folder / "log").write_text("\n".join(monkey.lines) + "\n")
    return monkey, seconds


def compare(
    settings: Sequence[str],
    home: Path,
    seed: int,
    kills: int,
    deadline: float,
    pause: tuple[float, float] = (3.0, 15.0),
) -> tuple[dict[str, Any], list[str]]:
    """Trains undisturbed and then under the monkey: the latter's summary, and how the two runs differ."""
    _, undisturbed = train(settings, home / "undisturbed", deadline)
    monkey, seconds = train(settings, home / "chaos", deadline, seed, kills, pause)
    differ = differences(home / "chaos" / "runs" / "run", home / "undisturbed" / "runs" / "run")
    return summary(monkey, seconds, undisturbed), differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="of the run, as for tdiff.train")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, required=True, help="folder of the two runs")
    parser.add_argument(
        "--pause", type=float, nargs=2, default=(3.0, 15.0), metavar=("LEAST", "MOST"), help="seconds between two kills"
    )
    parser.add_argument("--hours", type=float, default=3.0, help="after which a run is given up")
    arguments = parser.parse_args()
    home = arguments.home.absolute()
    deadline, pause = 3600 * arguments.hours, tuple(arguments.pause)
    # The runs have folders of their own.
    settings = [str(Path(one).absolute()) if Path(one).is_file() else one for one in arguments.settings]
    told, differ = compare(settings, home, arguments.seed, arguments.kills, deadline, pause)
    for difference in differ:
        print(difference)
    print(json.dumps({"benchmark": "chaos", **told, "differences": len(differ)}))


if __name__ == "__main__":
    main()
