"""What distributing costs: images/s of Ray workers against the sampler called in one process, and the driver's memory.

    .venv/bin/python benchmarks/generate.py [--seconds 10] [--shards 4]

A denoiser of the demo's shape with random weights draws shards whose batch is chosen so that one takes about
`--seconds`: called directly, by one worker, by two. Steady figures leave out the workers' start, up to as many shards
as there are workers. `between` is the share of its time that a worker spends between two shards, waiting for the next:
what distributing costs, told apart from whatever else the machine does. Then the TreeVAE alone draws N and 8 N images,
for the driver's memory. Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors

from tdiff import config, launch, results, storage
from tdiff.diffusion.condition import Denoiser
from tdiff.tree.model import TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import denoiser_spec
from tdiff.work.growing import save_tree
from tdiff.work.sampling import SampleJob, draw_shard

FEWEST = 16
"""Images in the shard that is timed first."""


def made(folder: Path) -> SampleJob:
    """A job of one small shard, for models with random weights in a folder."""
    chosen = config.load()
    tree = TreeVAE(chosen.tree_spec(1, 8), Topology.root_with_two_leaves("00-root"))
    save_tree(str(folder / "tree"), tree)
    spec = denoiser_spec(chosen, tree)
    weights = {name: tensor.contiguous() for name, tensor in Denoiser(spec).state_dict().items()}
    storage.write_bytes(str(folder / "diffusion" / "ema.safetensors"), save_tensors(weights))
    storage.write_text(str(folder / "diffusion" / "unet.json"), spec.to_json())
    places = {f"{name}_url": str(folder / name) for name in ("tree", "diffusion", "data")}
    drawn = chosen.samples
    how = {"steps": drawn.steps, "sampler": drawn.sampler, "grid": drawn.grid, "bf16": False}
    return SampleJob("", **places, **how, mode="sample", num=FEWEST, seed=0, batch=FEWEST, leaves=2)


def rates(finished: list[float], started: float, batch: int, workers: int) -> tuple[float, float]:
    """Images/s of all shards from the call on, and of those after each worker's first."""
    steady = (len(finished) - workers) * batch / (finished[-1] - finished[workers - 1])
    return len(finished) * batch / (finished[-1] - started), steady


def direct(job: SampleJob) -> list[float]:
    """When each shard was finished, drawn one after the other in this process."""
    finished = []
    for shard in range(job.shards):
        draw_shard(job, shard)
        finished.append(time.monotonic())
    return finished


def timed(job: SampleJob, shard: int) -> tuple[int, float, float]:
    """Draws a shard as an actor does. Which process did it, from when to when."""
    began = time.time()
    draw_shard(job, shard)
    return os.getpid(), began, time.time()


def by_workers(job: SampleJob, workers: int) -> tuple[list[float], float]:
    """When each shard was finished, drawn by actors, and the share of their time between two shards."""
    finished, spans = list[float](), dict[int, list[tuple[float, float]]]()
    tasks = [(job, shard) for shard in range(job.shards)]
    for _, (process, began, ended) in launch.map_on_actors(timed, tasks, workers):
        finished.append(time.monotonic())
        spans.setdefault(process, []).append((began, ended))
    waited = sum(later[0] - span[1] for found in spans.values() for span, later in itertools.pairwise(found))
    return finished, waited / sum(found[-1][1] - found[0][0] for found in spans.values())


def peak_mib() -> float:
    """Most memory that this process has held so far, MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, help="what a shard should take")
    parser.add_argument("--shards", type=int, default=4, help="shards a worker")
    parser.add_argument("--images", type=int, default=5000, help="N of the memory's part")
    arguments = parser.parse_args()
    if arguments.shards < 2:
        parser.error("--shards: 2 or more, as the first of each worker holds its start")
    torch.set_num_threads(1)  # as a worker
    count = itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        first = made(Path(folder))

        def job(**changes: object) -> SampleJob:
            return dataclasses.replace(first, url=str(Path(folder, f"samples-{next(count)}")), **changes)

        direct(job())  # loads the models
        started = time.monotonic()
        direct(job())
        batch = max(FEWEST, round(FEWEST * arguments.seconds / (time.monotonic() - started)))
        rows, between = {}, {}
        called = job(num=arguments.shards * batch, batch=batch)
        started = time.monotonic()
        finished = direct(called)
        rows["direct"] = rates(finished, started, batch, 1)
        shard_seconds = (finished[-1] - started) / arguments.shards
        launch.connect(1)
        for workers in (1, 2):
            asked = job(num=workers * arguments.shards * batch, batch=batch)
            started = time.monotonic()
            finished, between[workers] = by_workers(asked, workers)
            rows[f"workers_{workers}"] = rates(finished, started, batch, workers)
        peaks = []
        for images in (arguments.images, 8 * arguments.images):
            results.draw({"images": job(num=images, batch=500, model="treevae")}, 1)
            peaks.append(peak_mib())
        launch.disconnect()
    print(f"batch {batch}, {shard_seconds:.1f} s a shard\n{'':<12}{'images/s':>10}{'steady':>10}")
    for name, (whole, steady) in rows.items():
        print(f"{name:<12}{whole:>10.1f}{steady:>10.1f}")
    print("between two shards:", ", ".join(f"{share:.2%} of {workers}" for workers, share in between.items()))
    print(f"driver's peak: {peaks[0]:.0f} MiB after {arguments.images} images, {peaks[1]:.0f} after 8 times as many")
    result = {
        "benchmark": "generate",
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "batch": batch,
        "seconds_per_shard": round(shard_seconds, 2),
        **{f"images_per_second_{name}": [round(rate, 2) for rate in found] for name, found in rows.items()},
        "steady_1_over_direct": round(rows["workers_1"][1] / rows["direct"][1], 3),
        "steady_2_over_1": round(rows["workers_2"][1] / rows["workers_1"][1], 3),
        "between_shards": {str(workers): round(share, 5) for workers, share in between.items()},
        "images": arguments.images,
        "driver_peak_mib": [round(peak, 1) for peak in peaks],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
