"""Weak scaling of both stages on one machine: what a second worker brings, and where the rest goes.

    .venv/bin/python benchmarks/scaling.py --home FOLDER [--repeats 3] [--threads 1] [CONFIG] [a.b=c …]

Every worker has the same work at every width: one slot of the config's batch divided by its slots. Each round trains
the root phase of the tree, and the U-Net, as

    worker, pair        runs of one and of two workers: through the command line, each on a Ray cluster of its own,
    process, processes  the same steps in one plain process, and in two at once that know nothing of each other,

and takes images per second of the steps, from the first to the last, without the time of checkpoints. Of medians:

    efficiency      pair / (2 worker)
    contention      1 - processes / (2 process): caches and memory that two share; no software changes it
    coordination    the rest of what is lost: gradients, statistics, waiting for each other, Ray's own processes
    all_reduce      the part of a pair's step that gloo takes to add up as many float32 numbers as there are gradients

Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open

from tdiff import config
from tdiff.runs import Run
from tdiff.work.diffusing import DiffusionPhase, diffuse
from tdiff.work.growing import GrowingPhase, grow

PHASES = {"tree": "tree/00-root", "diffusion": "diffusion"}


class Bench:
    """Runs of one config in a folder."""

    def __init__(self, arguments: argparse.Namespace):
        self.home: Path = arguments.home.absolute()
        self.home.mkdir(parents=True, exist_ok=True)
        path = arguments.config
        config_file = [str(Path(path).absolute())] if path else []
        self.file, self.given = path, [*arguments.settings, "tree.max_leaves=2"]
        self.base = [*config_file, *self.given]
        chosen = config.load(path, arguments.settings)
        self.share = {
            "tree": chosen.tree.batch // chosen.tree.slots,
            "diffusion": chosen.diffusion.batch // chosen.diffusion.slots,
        }
        """Images of a slot, which is what each worker has of every step."""
        self.threads = str(arguments.threads)

    def start(self, name: str, workers: int, until: str, settings: Sequence[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tdiff.train", *self.base, f"workers={workers}", f"name={name}", *settings]
        with (self.home / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [*command, "--until", until, "--fresh"],
                cwd=self.home,
                env=os.environ | {"OMP_NUM_THREADS": self.threads},
                stdout=log,
                stderr=log,
            )

    def end(self, name: str, running: subprocess.Popen[bytes]) -> Path:
        """The run's folder."""
        if running.wait():
            sys.exit((self.home / f"{name}.log").read_text()[-3000:])
        return self.home / "runs" / name

    def settings(self, stage: str, workers: int) -> list[str]:
        return [f"{stage}.batch={workers * self.share[stage]}", f"{stage}.slots={workers}"]

    def of_workers(self, stage: str, workers: int) -> float:
        """Images per second of a run."""
        taken = [f"tree.run={self.home}/runs/tree"] if stage == "diffusion" else []
        until, name = "00-root" if stage == "tree" else "diffusion", f"{stage}-{workers}"
        running = self.start(name, workers, until, [*self.settings(stage, workers), *taken])
        return images_per_second(self.end(name, running) / PHASES[stage])

    def of_processes(self, stage: str, count: int) -> float:
        """Images per second of so many processes together, each with one worker's work."""
        record = json.loads((self.home / "runs" / "tree" / "run.json").read_text())
        chosen = config.load(self.file, [*self.given, *self.settings(stage, 1)])
        tree_url = Run(str(self.home / "runs" / "tree")).grown_tree
        with tempfile.TemporaryDirectory(dir=self.home) as folder:
            urls = [f"{folder}/{k}" for k in range(count)]
            phases: list[Any] = [
                GrowingPhase("00-root", "root", url, None, None, record["data_url"], chosen)
                if stage == "tree"
                else DiffusionPhase(url, tree_url, record["data_url"], chosen, record["bf16"])
                for url in urls
            ]
            mp.spawn(_steps, (phases, int(self.threads)), nprocs=count)
            return sum(images_per_second(Path(url)) for url in urls)


class Alone:
    """The one worker of a process."""

    rank, world = 0, 1

    def told_to_stop(self) -> bool:
        return False

    def expects(self, seconds: float) -> None: ...


def _steps(rank: int, phases: list[Any], threads: int) -> None:
    torch.set_num_threads(threads)
    phase = phases[rank]
    (grow if isinstance(phase, GrowingPhase) else diffuse)(phase, Alone())


def images_per_second(phase: Path) -> float:
    summary = json.loads((phase / "summary.json").read_text())
    parts = sorted((phase / "metrics").glob("*.jsonl"))
    images = json.loads(parts[-1].read_text().splitlines()[-1])["images"]
    seconds = summary["seconds"]
    return float(images / (seconds["train"] - seconds["checkpoint"]))


def parameters(file: Path) -> int:
    with safe_open(file, "pt") as tensors:
        return sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())  # noqa: SIM118


def _reduce(rank: int, numbers: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    flat = torch.ones(numbers)
    times = []
    for _ in range(12):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(flat)
        times.append(time.perf_counter() - began)
    if rank == 0:
        Path(folder, "seconds").write_text(str(statistics.median(times[2:])))
    dist.destroy_process_group()


def seconds_of_all_reduce(numbers: int) -> float:
    """Of two processes here, median of ten."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_reduce, (numbers, folder), nprocs=2)
        return float(Path(folder, "seconds").read_text())


def of_stage(bench: Bench, stage: str, repeats: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {"worker": [], "pair": [], "process": [], "processes": []}
    for k in range(repeats):
        found["worker"].append(bench.of_workers(stage, 1))
        found["pair"].append(bench.of_workers(stage, 2))
        found["process"].append(bench.of_processes(stage, 1))
        found["processes"].append(bench.of_processes(stage, 2))
        print(f"{stage} {k + 1} of {repeats}:", {name: round(rates[-1]) for name, rates in found.items()}, flush=True)
    worker, pair, process, processes = (statistics.median(rates) for rates in found.values())
    weights = {"tree": "model.safetensors", "diffusion": "ema.safetensors"}[stage]
    numbers = parameters(bench.home / "runs" / f"{stage}-2" / PHASES[stage] / weights)
    step = 2 * bench.share[stage] / pair
    efficiency, contention = pair / (2 * worker), 1 - processes / (2 * process)
    return {
        "images_of_a_worker": bench.share[stage],
        "million_parameters": round(numbers / 1e6, 2),
        "images_per_second": {name: round(statistics.median(rates), 1) for name, rates in found.items()},
        "milliseconds_a_step": round(1000 * step, 1),
        "efficiency": round(efficiency, 3),
        "contention": round(contention, 3),
        "coordination": round(1 - efficiency - contention, 3),
        "all_reduce": round(seconds_of_all_reduce(numbers) / step, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file; default: the demo's settings")
    parser.add_argument("settings", nargs="*", help="a.b=c, as for tdiff.train")
    parser.add_argument("--home", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    arguments = parser.parse_args()
    if arguments.config and "=" in arguments.config:
        arguments.config, arguments.settings = None, [arguments.config, *arguments.settings]
    bench = Bench(arguments)
    bench.end("tree", bench.start("tree", 1, "tree", []))
    result = {
        "benchmark": "scaling",
        "cpus": os.cpu_count(),
        "threads": arguments.threads,
        "config": arguments.config or "digits",
        **{stage: of_stage(bench, stage, arguments.repeats) for stage in PHASES},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
