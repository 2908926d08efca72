"""One phase of growing the tree, as every worker of its Ray job runs it.

A phase reads the folder of the phase before it and writes its own: `model.safetensors` and `tree.json` are
all that it hands on; `routing.safetensors` keeps the posterior's routing probabilities of every image, from
which the driver decides what comes next (`tdiff.tree.growth`).

Legend: B batch, M images, R nodes with routers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tdiff import engine, storage
from tdiff.config import Config
from tdiff.data.order import Order
from tdiff.data.shards import Manifest
from tdiff.data.stream import Batches, Reader
from tdiff.engine import Batch, Task, Worker
from tdiff.seeds import seed_of
from tdiff.tree.growth import effective_leaves, leaf_reach, members, node_reach
from tdiff.tree.losses import Elbo, Frozen, frozen_features, split_elbo, tree_elbo
from tdiff.tree.model import TreeVAE, evaluating, norms
from tdiff.tree.topology import Topology
from tdiff.work.reading import as_images, open_split

DECISION_BLOCK = 512
"""Images per forward pass where decisions are computed: fixed, so that the same weights give the same numbers."""

Kind = Literal["root", "split", "refit", "finetune"]


@dataclass(frozen=True)
class GrowingPhase:
    """What a worker needs to know of its phase. previous: folder of the phase before; leaf: the node to split."""

    name: str
    kind: Kind
    url: str
    previous: str | None
    leaf: int | None
    data_url: str
    config: Config


def save_tree(url: str, model: TreeVAE) -> None:
    """Writes tree.json and model.safetensors into a phase's folder."""
    storage.write_bytes(storage.join(url, "model.safetensors"), save_tensors(dict(model.state_dict())))
    storage.write_text(storage.join(url, "tree.json"), model.to_json())


def load_tree(url: str) -> TreeVAE:
    """The TreeVAE of a phase's folder."""
    model = TreeVAE.from_json(storage.read_text(storage.join(url, "tree.json")))
    model.load_state_dict(storage.read_tensors(storage.join(url, "model.safetensors")))
    return model


def load_topology(url: str) -> Topology:
    return Topology.from_json(storage.read_text(storage.join(url, "tree.json")))


def load_routing(url: str, split: str) -> NDArray[np.float32]:
    """Posterior probabilities of going left, [M, R], of every image of a split, as the phase's end left them."""
    routing: NDArray[np.float32] = storage.read_tensors(storage.join(url, "routing.safetensors"))[split].numpy()
    return routing


class TreeObjective(nn.Module):
    """The whole tree's negative ELBO, with alpha annealed from epoch to epoch."""

    def __init__(self, model: TreeVAE, alpha: Annealing):
        super().__init__()
        self.model = model
        self.alpha = alpha

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        visits = self.model.walk(batch["images"], rng)
        return _weighed(tree_elbo(self.model, visits, batch["images"]), self.alpha(step))


class SplitObjective(nn.Module):
    """What the two new leaves add to it, on features of the frozen rest."""

    def __init__(self, model: TreeVAE, node: int, new: list[nn.Module], alpha: Annealing):
        super().__init__()
        self.model = model
        self.node = node
        self.new = new
        self.alpha = alpha

    def train(self, mode: bool = True) -> SplitObjective:
        """The frozen part stays in evaluation mode whoever asks for training mode (DeepSpeed does)."""
        self.model.eval()
        for module in self.new:
            module.train(mode)
        return self

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        frozen = Frozen(*(batch[name] for name in Frozen._fields))
        return _weighed(split_elbo(self.model, self.node, frozen, batch["images"], rng), self.alpha(step))


@dataclass(frozen=True)
class Annealing:
    """alpha at a step: `start`, plus `rise` every epoch, up to 1."""

    order: Order
    start: float
    rise: float

    def __call__(self, step: int) -> float:
        return min(1.0, self.start + self.rise * self.order.epoch(step))


def _weighed(elbo: Elbo, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    terms = {name: term.mean() for name, term in elbo._asdict().items()}
    return elbo.loss(alpha), {**terms, "alpha": terms["kl_root"].new_tensor(alpha)}


def grow(phase: GrowingPhase, worker: Worker) -> None:
    """Trains one phase and writes its folder."""
    config = phase.config
    train = open_split(config, phase.data_url, "train")
    manifest = train.manifest
    torch.manual_seed(seed_of("init", config.seed, phase.name))
    if phase.previous is None:
        channels, image_size, _ = manifest.shape
        spec = config.tree_spec(channels, image_size)
        model = TreeVAE(spec, Topology.root_with_two_leaves(phase.name))
    else:
        model = load_tree(phase.previous)

    task = (_split_task if phase.kind == "split" else _whole_tree_task)(phase, model, train)
    outcome = engine.train(task, worker)

    routing = {"train": routing_of(model, train, worker)}
    if "test" in manifest.splits:
        routing["test"] = routing_of(model, open_split(config, phase.data_url, "test"), worker)
    if worker.rank == 0:
        _finish(phase, model, routing, outcome)


def _task(
    phase: GrowingPhase,
    order: Order,
    epochs: int,
    objective: nn.Module,
    batch: Callable[[int, int], Batch],
    model: TreeVAE,
) -> Task:
    tree = phase.config.tree

    def learning_rate(step: int) -> float:
        return tree.learning_rate * 0.1 ** (order.epoch(step) // tree.decay_every)

    return Task(
        phase=phase.name,
        objective=objective,
        batch=batch,
        steps=epochs * order.steps_per_epoch,
        batch_size=order.batch,
        slots=order.slots,
        seed=phase.config.seed,
        learning_rate=learning_rate,
        weight_decay=tree.weight_decay,
        checkpoint_images=tree.checkpoint_images,
        norms=list(norms(model)),
        metrics_url=storage.join(phase.url, "metrics"),
    )


def _order(phase: GrowingPhase, counts: list[int]) -> Order:
    tree = phase.config.tree
    return Order(counts, tree.batch, tree.slots, phase.config.seed, phase.name, phase.config.data.block)


def _whole_tree_task(phase: GrowingPhase, model: TreeVAE, train: Reader) -> Task:
    tree = phase.config.tree
    epochs, rise = {
        "root": (tree.epochs.initial, tree.kl_step),
        "refit": (tree.epochs.refit, tree.kl_step),
        "finetune": (tree.epochs.final, max(0.01, 1 / max(tree.epochs.final - 1, 1))),
    }[phase.kind]
    order = _order(phase, train.counts())
    images = Batches(train, order, epochs * order.steps_per_epoch)
    objective = TreeObjective(model, Annealing(order, tree.kl_start, rise))
    model.train()

    def batch(step: int, slot: int) -> Batch:
        return {"images": as_images(images(step, slot))}

    return _task(phase, order, epochs, objective, batch, model)


def _split_task(phase: GrowingPhase, model: TreeVAE, train: Reader) -> Task:
    tree = phase.config.tree
    assert phase.leaf is not None
    assert phase.previous is not None
    reach = leaf_reach(model.topology, load_routing(phase.previous, "train"))
    ids = members(reach, model.topology.leaves.index(phase.leaf))
    images = train.gather(ids)
    starts = range(0, len(ids), DECISION_BLOCK)
    with evaluating(model):
        blocks = [frozen_features(model, phase.leaf, as_images(images[k : k + DECISION_BLOCK])) for k in starts]
    frozen = Frozen(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))
    new = model.split(phase.leaf, phase.name)
    model.train_only(new)
    order = _order(phase, train.counts(ids))
    objective = SplitObjective(model, phase.leaf, new, Annealing(order, tree.kl_start, tree.kl_step))

    def batch(step: int, slot: int) -> Batch:
        rows = order.positions(step, slot)
        return {"images": as_images(images[rows])} | {name: part[rows] for name, part in frozen._asdict().items()}

    return _task(phase, order, tree.epochs.split, objective, batch, model)


def routing_of(model: TreeVAE, split: Reader, worker: Worker) -> NDArray[np.float32]:
    """Routing probabilities [M, R] of all images in manifest order: in fixed blocks, each worker a stretch of them."""
    blocks = -(-len(split) // DECISION_BLOCK)
    device = next(model.parameters()).device
    routing = torch.zeros(len(split), len(model.topology.deciding), device=device)
    with evaluating(model):
        shares = [min(blocks * k // worker.world * DECISION_BLOCK, len(split)) for k in range(worker.world + 1)]
        first, last = shares[worker.rank : worker.rank + 2]
        for place, pixels in split.blocks(first, last, DECISION_BLOCK):
            routing[place] = model.routing(as_images(pixels).to(device))
    if worker.world > 1:
        dist.all_reduce(routing)  # every row is one worker's number plus zeros, so the sum is exact
    return routing.cpu().numpy()


def _finish(
    phase: GrowingPhase,
    model: TreeVAE,
    routing: dict[str, NDArray[np.float32]],
    outcome: engine.Outcome,
) -> None:
    """Rank 0 writes what the phase hands on, and its summary."""
    topology = model.topology
    mass = {node: float(p.sum()) for node, p in node_reach(topology, routing["train"]).items()}
    model.topology = topology.with_samples(mass)
    storage.write_bytes(storage.join(phase.url, "routing.safetensors"), save_arrays(routing))
    save_tree(phase.url, model)
    summary: dict[str, Any] = {
        "leaves": len(topology.leaves),
        "effective_leaves": effective_leaves(leaf_reach(topology, routing["train"])),
        "seconds": outcome.seconds,
        "first_step_at": outcome.first_step_at,
        "last_step_at": outcome.last_step_at,
    }
    storage.write_text(storage.join(phase.url, "summary.json"), json.dumps(summary, indent=1) + "\n")


def prune(previous: str, url: str, leaves: Iterable[int]) -> None:
    """The pruning phase, in the driver: removes leaves and hands the rest on unchanged."""
    model = load_tree(previous)
    for leaf in leaves:
        model.prune(leaf)
    save_tree(url, model)


def check(config: Config, manifest: Manifest) -> None:
    """Raises ValueError, one sentence, where growing on this data could not even begin."""
    samples, (channels, height, width) = manifest.samples("train"), manifest.shape
    tree = config.tree
    for name, batch in (("tree.batch", tree.batch), ("diffusion.batch", config.diffusion.batch)):
        if samples < batch:
            raise ValueError(f"{name}={batch} is more than the {samples} training images: take at most {samples}")
    if height != width:
        raise ValueError(f"the images of {manifest.name} are {height}x{width}: pack them as squares")
    if tree.size > height:
        raise ValueError(f"tree.size={tree.size} is more than the images' {height} pixels: take at most {height}")
    if channels > 1 and tree.likelihood == "bernoulli":
        raise ValueError(f"tree.likelihood=bernoulli is for grey images, {manifest.name} has colour: take gaussian")
    config.unet_spec(channels, height)
