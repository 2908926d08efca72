"""What every stage of a run is expected to take: steps, seconds, bytes, memory. Leaves are taken to be halved.

Legend: M images, S slots, W workers, L leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tdiff.config import Config
from tdiff.data.stream import AHEAD
from tdiff.diffusion.condition import CLUSTERS
from tdiff.diffusion.process import make_process
from tdiff.diffusion.samplers import ALWAYS, network_evaluations, time_grid
from tdiff.estimates import (
    GB,
    block_bytes,
    bytes_per_rank,
    bytes_per_step,
    checkpoint_bytes,
    decision_bytes,
    frozen_bytes,
    transient_bytes,
)
from tdiff.launch import workers_for
from tdiff.planning.given import Data, Machines, Phase
from tdiff.planning.speeds import Costs, Speeds
from tdiff.work.diffusing import steps_of, tracks_of
from tdiff.work.growing import DECISION_BLOCK, FROZEN_IN_MEMORY

JOB_SECONDS = 10.0
"""Of a Ray Train job beside its steps (BENCHMARKS.md: 8 to 10 on two workers; never measured on a large cluster)."""

MANIFEST_BYTES, MANIFEST_SECONDS = 720, 10e-6
"""Of a shard's entry in a process that has read the manifest, and of reading it (benchmarks/scale.py)."""

LISTED, LISTING = 1000, 0.15
"""Objects in an answer of S3 to a listing, and seconds that it takes (the latter assumed)."""

METRICS_EVERY = 10
"""Steps between lines of metrics (`tdiff.engine.Task.log_every`)."""


@dataclass(frozen=True)
class Row:
    """A stage, or a part of one: of all its phases together.

    parameters: that train; flops: of an image, forward and backward; images: that pass, repeats counted; workers: W;
    seconds: in all; computing: of a step, without network; sent: bytes of a worker in a step; read: bytes a second from
    storage, over all workers, where no cache holds them; requests: GETs a second; points: of metrics in all.
    """

    name: str
    parameters: int
    flops: float
    images: int
    steps: int
    workers: int
    seconds: float
    computing: float = 0.0
    sent: int = 0
    read: float = 0.0
    requests: float = 0.0
    checkpoint: int = 0
    points: int = 0

    @property
    def rate(self) -> float:
        """Images a second over all workers."""
        return self.images / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes on a worker while a step runs. states: weights, gradients, moments, masters, EMAs; transient: buckets,
    gathered weights; activations: what a pass leaves for its backward pass.
    """

    stage: str
    zero: int
    states: int
    transient: int
    activations: int

    @property
    def total(self) -> int:
        return self.states + self.transient + self.activations


@dataclass
class Plan:
    """The whole of it. host: bytes in a node's memory, by what they are."""

    machines: Machines
    data: Data
    rows: list[Row]
    memory: list[Memory]
    host: dict[str, int]

    @property
    def hours(self) -> float:
        return sum(row.seconds for row in self.rows) / 3600

    @property
    def cost(self) -> float:
        """Dollars: all machines are paid for all the time."""
        return self.hours * self.machines.workers * self.machines.price


def plan_of(config: Config, data: Data, machines: Machines, speeds: Speeds, costs: Costs, phases: list[Phase]) -> Plan:
    """The whole plan of a run."""
    taken = config.tree.run is not None  # a finished tree, which is not grown anew
    rows = [
        *([] if taken else _tree_rows(config, data, machines, speeds, costs, phases)),
        _diffusion_row(config, data, machines, speeds, costs),
        _samples_row(config, data, machines, speeds, costs),
        _evaluation_row(config, data, machines, speeds, costs),
    ]
    memory, host = _memory(config, data, machines, costs), _host(config, data, machines, costs, phases)
    return Plan(machines, data, rows, memory, host)


def sending_seconds(machines: Machines, workers: int, sent: int) -> float:
    """Seconds that a step sends: nothing is counted where all workers are on one node."""
    return sent / (machines.network * GB) if workers > machines.per_node else 0.0


def _opening(data: Data, workers: int) -> float:
    """Seconds of a job beside its steps: it starts, and every worker lists the shards and reads the manifest, twice."""
    return JOB_SECONDS + 2 * data.shards * (MANIFEST_SECONDS + LISTING / LISTED)


def _tree_rows(
    config: Config, data: Data, machines: Machines, speeds: Speeds, costs: Costs, phases: list[Phase]
) -> Iterator[Row]:
    tree, kind = config.tree, machines.kind
    workers = workers_for(tree.slots, machines.workers)
    passes, part = tree.slots // workers, tree.batch // tree.slots
    views = tree.batch // tree.images_per_step
    starts = deciding = 0.0
    for name, kinds in (
        ("root", ("root",)),
        ("splits", ("split",)),
        ("refits", ("refit",)),
        ("finetune", ("finetune",)),
    ):
        mine = [phase for phase in phases if phase.kind in kinds]
        if not mine:
            continue
        seconds = computing_all = flops = 0.0
        images = points = steps = sent = 0
        parameters = read = requests = 0.0
        for phase in mine:
            cost = costs.step_of(phase, config)
            speed = speeds["split" if phase.kind == "split" else "tree"]
            count = costs.parameters_of(phase)
            sent = bytes_per_step(count, 0, workers, passes)
            computing = passes * speed.seconds(cost, part, kind)
            stepping = computing + sending_seconds(machines, workers, sent)
            seconds += phase.steps * stepping
            computing_all += phase.steps * computing
            steps += phase.steps
            images += phase.steps * tree.images_per_step
            flops += phase.steps * tree.images_per_step * cost.flops * views
            parameters = max(parameters, count)
            points += phase.steps // METRICS_EVERY * (8 + (2 if phase.kind == "split" else phase.leaves))
            # Whole shards are read, whatever share of their images is a leaf's.
            needed = tree.images_per_step / stepping * data.images / phase.images
            read = max(read, needed * data.image_bytes)
            requests = max(requests, needed * data.shards / data.images)
            starts += _opening(data, workers)
            passed = -(-data.images // workers)
            blocks = -(-passed // DECISION_BLOCK)
            deciding += blocks * speeds["tree"].seconds(costs.all.routing, DECISION_BLOCK, kind)
            if phase.kind == "split" and tree.augmentation == "none":
                each = speeds["split"].seconds(costs.split(phase.depth)[1], DECISION_BLOCK, kind)
                deciding += -(-phase.images // workers // DECISION_BLOCK) * each
        yield Row(
            name=f"tree: {len(mine)} {name}" if name in ("splits", "refits") else f"tree: {name}",
            parameters=int(parameters),
            flops=flops / images if images else 0.0,
            images=images,
            steps=steps,
            workers=workers,
            seconds=seconds,
            computing=computing_all / steps if steps else 0.0,
            sent=sent,
            read=read,
            requests=requests,
            checkpoint=checkpoint_bytes(int(parameters)),
            points=points,
        )
    yield Row("tree: decisions", 0, costs.all.routing.flops, data.images * len(phases), 0, workers, deciding)
    yield Row(f"tree: start and end of {len(phases)} jobs", 0, 0.0, 0, 0, workers, starts)


def _diffusion_row(config: Config, data: Data, machines: Machines, speeds: Speeds, costs: Costs) -> Row:
    section, kind = config.diffusion, machines.kind
    workers = workers_for(section.slots, machines.workers)
    passes, part = section.slots // workers, section.batch // section.slots
    steps = steps_of(section, data.images)
    count, emas = costs.denoiser.parameters, len(tracks_of(section)[1])
    sent = bytes_per_step(count, section.zero, workers, passes)
    computing = passes * (
        speeds["diffusion"].seconds(costs.denoiser.step, part, kind)
        + speeds["tree"].seconds(costs.all.visit, part, kind)
    )
    stepping = computing + sending_seconds(machines, workers, sent)
    checkpoint = checkpoint_bytes(count, emas)
    kept = max(0, (steps - 1) // max(1, section.checkpoint_images // section.batch))
    validating = section.validations * max(1, section.validation_images // section.batch) * stepping / 3
    uploading = kept * checkpoint / (min(machines.nodes, workers) * machines.storage * GB)
    read = section.batch / stepping
    return Row(
        name="diffusion",
        parameters=count,
        flops=costs.denoiser.step.flops + costs.all.visit.flops,
        images=steps * section.batch,
        steps=steps,
        workers=workers,
        seconds=steps * stepping + validating + uploading + _opening(data, workers),
        computing=computing,
        sent=sent,
        read=read * data.image_bytes,
        requests=read * data.shards / data.images,
        checkpoint=checkpoint,
        points=steps // METRICS_EVERY * 5,
    )


def drawn(config: Config, data: Data, leaves: int) -> int:
    """Images that the U-Net draws for a run's numbers and pictures (`tdiff.results.standard_jobs`)."""
    wanted = config.samples
    count = wanted.draws * wanted.blocks + min(wanted.reconstructions, data.held_out)
    if config.diffusion.condition in CLUSTERS:
        return count
    return count + leaves * (wanted.draws_all_leaves + wanted.per_leaf)


def evaluations(config: Config) -> int:
    """How often the network is asked about each sample: twice where guidance is active."""
    wanted = config.samples
    process = make_process(config.diffusion.objective, config.diffusion.timesteps)
    grid = time_grid(process, wanted.grid, wanted.steps)
    return network_evaluations(wanted.sampler, process, grid, wanted.guidance, wanted.guidance_interval or ALWAYS)


def _samples_row(config: Config, data: Data, machines: Machines, speeds: Speeds, costs: Costs) -> Row:
    times, count, batch = evaluations(config), drawn(config, data, costs.leaves), config.samples.batch
    workers = max(1, min(machines.workers, count // batch))
    once = speeds["samples"].seconds(costs.denoiser.evaluation, batch, machines.kind) / batch
    seconds = count / workers * times * once
    return Row(f"samples, {times} evaluations", 0, times * costs.denoiser.evaluation.flops, count, 0, workers, seconds)


def _evaluation_row(config: Config, data: Data, machines: Machines, speeds: Speeds, costs: Costs) -> Row:
    """Log-likelihoods, the classifier, and what networks see in samples and references; without what runs on one core
    of the driver (k-means, Ward, bootstrap, pictures).
    """
    wanted, kind, speed = config.evaluation, machines.kind, speeds["evaluation"]
    others = data.held_out or data.images
    samples = min(wanted.likelihood_images, others) * wanted.likelihood_samples + others
    likely = samples * speed.seconds(costs.all.whole, 500, kind) / 3 / 500
    reference = data.images if wanted.reference == "train" else data.held_out
    seen = 2 * drawn(config, data, costs.leaves) + min(reference, wanted.reference_images or reference) + data.held_out
    looking = sum(speed.seconds(cost, 500, kind) / 500 for cost in (costs.classifier[1], costs.inception)) * seen
    training = 0.0
    if data.classes and "classifier" in wanted.features:
        section = wanted.classifier
        part = section.batch // section.slots
        steps = max(1, section.images // section.batch)
        crew = workers_for(section.slots, machines.workers)
        training = steps * section.slots // crew * speed.seconds(costs.classifier[0], part, kind) + JOB_SECONDS
    seconds = (likely + looking) / machines.workers + training
    return Row("evaluation", 0, 0.0, samples + seen, 0, machines.workers, seconds)


# --- memory ------------------------------------------------------------------------------------------


def _memory(config: Config, data: Data, machines: Machines, costs: Costs) -> list[Memory]:
    tree, section = config.tree, config.diffusion
    held = [
        Memory(
            "tree",
            0,
            bytes_per_rank(costs.all.parameters, 0, 1),
            0,
            int(costs.all.whole.saved_bytes * (tree.batch // tree.slots)),
        )
    ]
    count, emas = costs.denoiser.parameters, len(tracks_of(section)[1])
    workers = workers_for(section.slots, machines.workers)
    frozen_tree = 4 * costs.all.parameters
    for zero in range(4):
        states = bytes_per_rank(count, zero, workers, emas) + frozen_tree
        activations = int(costs.denoiser.step.saved_bytes * (section.batch // section.slots))
        held.append(Memory("diffusion", zero, states, transient_bytes(count, zero), activations))
    return held


def _host(config: Config, data: Data, machines: Machines, costs: Costs, phases: list[Phase]) -> dict[str, int]:
    """Bytes in the memory of a node of tree workers, at the most; nothing where a finished tree is taken."""
    if config.tree.run is not None:
        return {}
    tree, pixels = config.tree, math.prod(data.shape)
    workers = workers_for(tree.slots, machines.workers)
    here = min(workers, machines.per_node)
    images = tree.images_per_step
    blocks = block_bytes(
        pixels, config.data.block, images // tree.slots, tree.slots // workers, max(1, data.images // images)
    )
    ahead = 2 * AHEAD * pixels * (data.images // data.shards)
    largest = max((phase.images for phase in phases if phase.kind == "split"), default=0)
    found = {
        "decoded blocks and shards": here * (blocks + ahead),
        "manifest and listing": here * 2 * data.shards * MANIFEST_BYTES,
        # Every worker's own, and what worker 0 writes.
        "decisions on all images": (here + 1) * decision_bytes(data.images, costs.leaves),
        "ids of the largest leaf": here * 8 * largest,
    }
    if tree.augmentation == "none":
        most = frozen_bytes(largest, costs.deep.frozen_numbers)
        found["frozen features of the largest leaf"] = here * most if most <= FROZEN_IN_MEMORY // here else 0
    return found
