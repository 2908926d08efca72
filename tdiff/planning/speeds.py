"""What the networks of a run cost, and how fast workers are: measured, or assumed as a share of a data sheet's peak.

Costs are counted by PyTorch on the stages' own objectives (`tdiff.work.counting`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tdiff import storage
from tdiff.config import Config
from tdiff.errors import ConfigError
from tdiff.estimates import TREE_SHARE, Kind, pass_seconds
from tdiff.launch import workers_for
from tdiff.planning.given import Data, Machines, Phase, asked_for, data_of, schedule
from tdiff.runs import Run
from tdiff.tracking import read_metrics
from tdiff.work import counting
from tdiff.work.counting import NOTHING, Cost
from tdiff.work.growing import load_topology


@dataclass(frozen=True)
class Costs:
    """What PyTorch counted of a config's networks. few, all: of the tree with two and with all leaves; shallow, deep:
    of splitting a leaf of the least and of the greatest depth.
    """

    few: counting.TreeCosts
    all: counting.TreeCosts
    shallow: counting.SplitCosts
    deep: counting.SplitCosts
    deepest: int
    leaves: int
    denoiser: counting.DenoiserCosts
    classifier: tuple[Cost, Cost]
    inception: Cost

    def whole(self, leaves: int) -> Cost:
        """A step of the whole network: its nodes and leaves are many of the same."""
        return self.few.whole.towards(self.all.whole, (leaves - 2) / max(self.leaves - 2, 1))

    def parameters_of(self, phase: Phase) -> int:
        """How many train: of the whole tree as many more for every leaf."""
        if phase.kind == "split":
            return self.deep.parameters
        share = (phase.leaves - 2) / max(self.leaves - 2, 1)
        return round(self.few.parameters + share * (self.all.parameters - self.few.parameters))

    def split(self, depth: int) -> tuple[Cost, Cost]:
        """A step of a split, and the frozen features of an image: a node more on the path for every depth."""
        share = (depth - 1) / max(self.deepest - 1, 1)
        return self.shallow.step.towards(self.deep.step, share), self.shallow.frozen.towards(self.deep.frozen, share)

    def step_of(self, phase: Phase, config: Config) -> Cost:
        """A training step's cost, a row: of an augmented view the frozen part is computed anew."""
        if phase.kind != "split":
            return self.whole(phase.leaves)
        step, frozen = self.split(phase.depth)
        return step if config.tree.augmentation == "none" else step + frozen


def counted(config: Config, data: Data, phases: list[Phase], bf16: bool) -> Costs:
    """Counts the networks that a run will train."""
    tree, diffusion, classifier = config.tree, config.diffusion, config.evaluation.classifier
    leaves = max(phase.leaves for phase in phases)
    deepest = max((phase.depth for phase in phases), default=0) or 1
    rows = tree.batch // tree.slots
    few = counting.tree_costs(config, data.shape, counting.grown(2), rows)
    everything = few if leaves == 2 else counting.tree_costs(config, data.shape, counting.grown(leaves), rows)
    splits = any(phase.kind == "split" for phase in phases)
    none = counting.SplitCosts(NOTHING, NOTHING, 0, 0)
    shallow = counting.split_costs(config, data.shape, 1, rows) if splits else none
    deep = counting.split_costs(config, data.shape, deepest, rows) if deepest > 1 else shallow
    path = math.ceil(math.log2(leaves)) + 1
    denoiser = counting.denoiser_costs(config, data.shape, leaves, path, diffusion.batch // diffusion.slots, bf16)
    judged = (NOTHING, NOTHING)
    if data.classes:
        part = classifier.batch // classifier.slots
        judged = counting.classifier_costs(classifier.network, data.shape, data.classes, part)
    inception = counting.inception_cost() if "inception" in config.evaluation.features else NOTHING
    return Costs(few, everything, shallow, deep, deepest, leaves, denoiser, judged, inception)


@dataclass(frozen=True)
class Speed:
    """What one worker does. rate: FLOP/s; kernel: seconds to launch one (0: within the rate); source: whence it is."""

    rate: float
    kernel: float
    source: str

    def seconds(self, cost: Cost, images: float, kind: Kind) -> float:
        """Of a pass over so many images."""
        return pass_seconds(cost.flops * images, cost.kernels, self.rate, self.kernel, kind.together)


Speeds = Mapping[str, Speed]
"""tree, split, diffusion, samples, evaluation -> what a worker does there."""

STAGES = ("tree", "split", "diffusion", "samples", "evaluation")


def assumed(machines: Machines, bf16: bool) -> dict[str, Speed]:
    """What machines of a kind are taken to do where nothing was measured on them."""
    kind = machines.kind
    if kind.efficiency is None:
        told = "measured on one core of the machine of BENCHMARKS.md"
        fp32, other = kind.fp32, kind.bf16 if bf16 else kind.fp32
        tree = fp32 * TREE_SHARE
    else:
        told = f"ASSUMED: {kind.efficiency:g} of the data sheet's peak, never measured"
        fp32 = tree = kind.fp32 * kind.efficiency
        other = (kind.bf16 if bf16 else kind.fp32) * kind.efficiency
    rates = {"tree": tree, "split": tree, "diffusion": other, "samples": other, "evaluation": fp32}
    return {stage: Speed(rate * 1e12, kind.kernel, told) for stage, rate in rates.items()}


def measured(found: Mapping[str, float], costs: Costs) -> dict[str, Speed]:
    """Speeds from images a second and worker: tree (a step with all leaves), split (of the deepest leaf), diffusion (a
    step), samples (one evaluation of the network).
    """
    flops = {
        "tree": costs.all.whole.flops,
        "split": costs.deep.step.flops,
        "diffusion": costs.denoiser.step.flops + costs.all.visit.flops,
        "samples": costs.denoiser.evaluation.flops,
    }
    return {
        stage: Speed(rate * flops[stage], 0.0, f"measured, {rate:g} images/s a worker") for stage, rate in found.items()
    }


def speeds_of(run: Run) -> dict[str, Speed]:
    """Speeds from a run's finished phases: FLOPs of what each trained on over the seconds that its workers took
    together, without those for data, validation, snapshots and checkpoints (of a phase that was resumed only its last
    start is known: it seems too fast). Raises ConfigError if no phase is finished.
    """
    config, manifest = run.config(), run.manifest()
    data, wanted = data_of(manifest), asked_for(config)
    flops, seconds = dict.fromkeys(("tree", "split", "diffusion"), 0.0), dict.fromkeys(STAGES, 0.0)
    crews: dict[str, set[int]] = {stage: set() for stage in flops}  # the numbers of workers that trained a stage

    def add(stage: str, url: str, computed: float, slots: int) -> None:
        summary = storage.read_json(storage.join(url, "summary.json"))
        workers = int(summary.get("workers", workers_for(slots, wanted)))  # older runs do not say it
        flops[stage] += computed
        seconds[stage] += workers * _training_seconds(summary["seconds"])
        crews[stage].add(workers)

    names = run.tree_phases()
    phases = schedule(config, data.images)
    costs = counted(config, data, phases, run.record()["bf16"])
    for name in names:
        url = run.at("tree", name)
        kind: str = name.split("-")[1]
        if kind == "prune" or not (images := _trained(url)):
            continue
        topology = load_topology(url)
        depth = topology[int(name.split("-")[2])].depth if kind == "split" else 0
        phase = Phase(kind, len(topology.leaves), depth, 0, 0, 0)  # type: ignore[arg-type]
        rows = images * config.tree.batch / config.tree.images_per_step
        stage = "split" if kind == "split" else "tree"
        add(stage, url, costs.step_of(phase, config).flops * rows, config.tree.slots)
    if storage.finished(run.at("diffusion")) and (images := _trained(run.at("diffusion"))):
        of_image = costs.denoiser.step.flops + costs.all.visit.flops
        add("diffusion", run.at("diffusion"), of_image * images, config.diffusion.slots)
    found = {stage: flops[stage] / seconds[stage] for stage in flops if seconds[stage]}
    if not found:
        raise ConfigError(f"RUN {run.url} has no finished phase to measure by: name another one, or leave --from out.")
    on = {
        stage: "1 worker" if crew == {1} else f"{' and '.join(map(str, sorted(crew)))} workers"
        for stage, crew in crews.items()
    }
    return {stage: Speed(rate, 0.0, f"measured in RUN {run.url} on {on[stage]}") for stage, rate in found.items()}


def _training_seconds(taken: Mapping[str, float]) -> float:
    return float(taken["train"] - sum(taken.get(key, 0.0) for key in ("data", "validation", "snapshots", "checkpoint")))


def _trained(url: str) -> int:
    """Images that a phase trained on; 0 where its metrics are not there."""
    lines = read_metrics(storage.join(url, "metrics"))
    return int(lines[-1]["images"]) if lines else 0
