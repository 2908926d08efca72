"""What of a plan will not fit, one sentence each: what is short, by how much, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tdiff.config import Config
from tdiff.estimates import GB, frozen_bytes, needed_bandwidth
from tdiff.launch import workers_for
from tdiff.planning.expected import LISTED, LISTING, Plan, sending_seconds
from tdiff.planning.given import Phase
from tdiff.planning.speeds import Costs
from tdiff.tree.growth import EFFECTIVE_SHARE
from tdiff.work.growing import FROZEN_IN_MEMORY

USABLE = 0.92
"""Share of a GPU's memory by its data sheet that a step's tensors can fill: the rest is CUDA's context, buffers of NCCL
and cuDNN, and gaps between blocks that PyTorch's allocator cannot close. Assumed, never measured here.
"""

DECODING = 69e-6 / 28**2
"""Seconds a pixel of unpacking and decoding on one core: 69 us for 28x28 (BENCHMARKS.md), a thumb for larger ones."""


def _gb(size: float) -> str:
    return f"{size / GB:,.1f} GB"


def misfits(config: Config, plan: Plan, costs: Costs, phases: list[Phase]) -> Iterator[str]:
    """All that is known of before anything runs."""
    yield from _memory_warnings(config, plan)
    if config.tree.run is None:
        yield from _idle("tree", config.tree.slots, plan.machines.workers)
        yield from _growing_warnings(config, plan, costs, phases)
    yield from _idle("diffusion", config.diffusion.slots, plan.machines.workers)
    yield from _running_warnings(config, plan, costs)


def _idle(stage: str, slots: int, workers: int) -> Iterator[str]:
    busy = workers_for(slots, workers)
    if busy < workers:
        yield (
            f"{stage}: {busy} of {workers} workers have work, as {stage}.slots={slots} parts of a batch are shared "
            "evenly: the others are paid for and idle"
        )


def _growing_warnings(config: Config, plan: Plan, costs: Costs, phases: list[Phase]) -> Iterator[str]:
    machines, tree = plan.machines, config.tree
    total, node = sum(plan.host.values()), machines.memory * GB
    if total > node:
        worst = max(plan.host, key=lambda name: plan.host[name])
        yield (
            f"a node needs {_gb(total)} of memory and has {_gb(node)}, most of it for {worst}: take fewer workers "
            "a node (--per-node), larger nodes, or fewer images for the tree"
        )
    largest = max((phase.images for phase in phases if phase.kind == "split"), default=0)
    if tree.augmentation == "none":
        here = min(workers_for(tree.slots, machines.workers), machines.per_node)
        size = frozen_bytes(largest, costs.deep.frozen_numbers)
        if here * size > FROZEN_IN_MEMORY:
            yield (
                f"the frozen features of the largest leaf take {_gb(size)} of disk below TMPDIR for each of {here} "
                "workers of a node: see that it has them, or set tree.augmentation, with which they are not kept"
            )
    part = tree.batch // tree.slots
    if part < 32:
        yield f"tree.batch={tree.batch} gives each of {tree.slots} slots {part} rows: batch norm wants 32 or more"
    most = round(1 / EFFECTIVE_SHARE)
    if tree.max_leaves > most:
        yield (
            f"tree.max_leaves={tree.max_leaves} is never reached: a leaf counts from {EFFECTIVE_SHARE:.0%} of the "
            f"images on, so {most} is the most, and pruning removes smaller ones"
        )


def _memory_warnings(config: Config, plan: Plan) -> Iterator[str]:
    zero, name, kind = config.diffusion.zero, plan.machines.name, plan.machines.kind
    room = kind.memory * GB * (USABLE if kind.together else 1)
    has = _gb(room) + (f" of its {_gb(kind.memory * GB)} for it" if kind.together else "")
    for held in plan.memory:
        if held.total <= room or (held.stage == "diffusion" and held.zero != zero):
            continue
        needs = f"{held.stage}: a step takes {_gb(held.total)} and {name} has {has}"
        if held.stage != "diffusion":
            yield f"{needs}: take more tree.slots or a smaller tree.batch, so that fewer rows pass at once"
            continue
        fits = [other.zero for other in plan.memory if other.stage == "diffusion" and other.total <= room]
        remedies = [
            *(f"diffusion.zero={zero}" for zero in fits[:1]),
            "more diffusion.slots",
            "diffusion.recompute=true",
        ]
        yield f"{needs}: take {', or '.join(remedies)}"


def _running_warnings(config: Config, plan: Plan, costs: Costs) -> Iterator[str]:
    machines, data = plan.machines, plan.data
    decoded = data.images * math.prod(data.shape)
    cached = decoded <= config.data.cache_gb * GB
    for row in plan.rows:
        if row.workers > machines.per_node and row.sent and row.computing:
            needed = needed_bandwidth(row.sent, row.computing)
            if needed > machines.network:
                share = sending_seconds(machines, row.workers, row.sent) / row.computing
                yield (
                    f"{row.name}: {row.sent / 1e6:,.0f} MB a step of {row.computing * 1e3:,.0f} ms want {needed:,.1f} "
                    f"GB/s for each worker and there are {machines.network:g}: the network adds {share:.0%}; take "
                    "larger parts of a batch, or fewer workers"
                )
        if cached:
            continue
        nodes = -(-row.workers // machines.per_node)
        if row.read > nodes * machines.storage * GB:
            yield (
                f"{row.name}: reads {row.read / GB:,.1f} GB/s where no cache holds the images, and storage gives "
                f"{nodes * machines.storage:,.1f} to {nodes} nodes: expect "
                f"{row.read / (nodes * machines.storage * GB):,.1f} times its hours, or take a "
                "data.cache_gb that holds them"
            )
        decoding = row.read / data.image_bytes * DECODING * math.prod(data.shape[1:])
        if decoding > nodes * machines.cores:
            yield (
                f"{row.name}: decoding takes about {decoding:,.0f} cores and {nodes} nodes have "
                f"{nodes * machines.cores}: take data.cache_gb that holds the images, or more cores a node"
            )
    if not cached:
        yield (
            f"all {_gb(decoded)} of decoded images do not fit into data.cache_gb={config.data.cache_gb:g} of a node: "
            "what does not fit is read and decoded anew in every epoch"
        )
    listing = 2 * data.shards / LISTED * LISTING
    if listing > 60:
        yield (
            f"{data.shards:,} shards take every worker about {listing:,.0f} s to list, in each phase: pack larger ones "
            "(--shard-samples)"
        )
    part = config.tree.batch // config.tree.slots
    step = costs.all.whole
    kind = machines.kind
    if (
        kind.together
        and kind.efficiency
        and step.kernels * kind.kernel > 2 * step.flops * part / (kind.fp32 * 1e12 * kind.efficiency)
    ):
        yield (
            f"tree: launching {step.kernels:,.0f} kernels takes longer than what {part} rows compute: larger parts of "
            "a batch (tree.batch) cost almost nothing, more workers gain nothing"
        )
