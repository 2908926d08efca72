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
from tdiff.data.augment import RECIPES, augment, uniforms
from tdiff.data.order import Order
from tdiff.data.stream import Batches, Reader
from tdiff.engine import Batch, Task, Worker
from tdiff.seeds import seed_of
from tdiff.tree.contrastive import decision_loss, feature_loss
from tdiff.tree.growth import effective_leaves, leaf_reach, members, node_reach
from tdiff.tree.losses import Elbo, Frozen, frozen_features, split_elbo, tree_elbo
from tdiff.tree.model import TreeVAE, evaluating, norms, pick
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
    """The whole tree's negative ELBO, with alpha annealed from epoch to epoch, and the contrastive terms, if any."""

    def __init__(self, model: TreeVAE, alpha: Annealing, contrastive: float, reach_threshold: float):
        super().__init__()
        self.model = model
        self.alpha = alpha
        self.contrastive = contrastive
        self.reach_threshold = reach_threshold

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, model = batch["images"], self.model
        features = model.features(images)
        walk = model.walk(images, rng, self.reach_threshold, features)
        terms = {}
        if self.contrastive:
            assert model.projections is not None
            tree = model.topology
            reach = pick(walk.reach, [tree.top_down.index(node) for node in tree.choosing])
            terms["contrastive_decisions"] = decision_loss(walk.q_logits.T.sigmoid(), reach.T)
            terms["contrastive_features"] = feature_loss(model.projections(features))
        return _weighed(tree_elbo(model, walk, images), self.alpha(step), self.contrastive, terms)


class SplitObjective(nn.Module):
    """What the two new leaves add to it, on features of the frozen rest: those of the batch, or computed from its
    images where those are new each time (augmented views). Of the contrastive terms only that of the new router.
    """

    def __init__(self, model: TreeVAE, node: int, new: list[nn.Module], alpha: Annealing, contrastive: float):
        super().__init__()
        self.model = model
        self.node = node
        self.new = new
        self.alpha = alpha
        self.contrastive = contrastive

    def train(self, mode: bool = True) -> SplitObjective:
        """The frozen part stays in evaluation mode whoever asks for training mode (DeepSpeed does)."""
        self.model.eval()
        for module in self.new:
            module.train(mode)
        return self

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, model = batch["images"], self.model
        if "reach" in batch:
            frozen = Frozen(*(batch[name] for name in Frozen._fields))
        else:
            with torch.no_grad():
                frozen = frozen_features(model, self.node, images)
        q_logit = model.posterior_logit(self.node, frozen.feature)
        terms = {}
        if self.contrastive:
            terms["contrastive_decisions"] = decision_loss(q_logit.sigmoid()[:, None], frozen.reach[:, None])
        elbo = split_elbo(model, self.node, frozen, images, rng, q_logit)
        return _weighed(elbo, self.alpha(step), self.contrastive, terms)


@dataclass(frozen=True)
class Annealing:
    """alpha at a step: `start`, plus `rise` every epoch, up to 1."""

    order: Order
    start: float
    rise: float

    def __call__(self, step: int) -> float:
        return min(1.0, self.start + self.rise * self.order.epoch(step))


def _weighed(
    elbo: Elbo, alpha: float, contrastive: float, pairs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms. pairs: the contrastive terms, each weighted by `contrastive`."""
    terms = {name: term.mean() for name, term in elbo._asdict().items()}
    loss = elbo.loss(alpha)
    for term in pairs.values():
        loss = loss + contrastive * term
    return loss, {**terms, **pairs, "alpha": terms["kl_root"].new_tensor(alpha)}


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
        norms=list(norms(objective)),
        metrics_url=storage.join(phase.url, "metrics"),
    )


def _order(phase: GrowingPhase, counts: list[int]) -> Order:
    tree = phase.config.tree
    return Order(counts, tree.images_per_step, tree.slots, phase.config.seed, phase.name, phase.config.data.block)


@dataclass(frozen=True)
class Views:
    """Images as they enter training: themselves, or two augmented views of each, all first views before all second."""

    phase: GrowingPhase
    order: Order
    model: TreeVAE

    def __call__(self, step: int, ids: NDArray[np.int64], pixels: NDArray[np.uint8]) -> Tensor:
        """ids [B] in the data set, their pixels [B, I, H, H] -> [B or 2B, I, H, H] in [0, 1]."""
        device = next(self.model.parameters()).device  # where the engine has put it by now
        images, config = as_images(pixels).to(device), self.phase.config
        recipe = RECIPES.get(config.tree.augmentation)
        if recipe is None:
            return images
        seed, epoch = config.seed, self.order.epoch(step)
        drawn = [uniforms(seed, self.phase.name, epoch, view, ids) for view in (0, 1)]
        return torch.cat([augment(images, recipe, u) for u in drawn])


def _whole_tree_task(phase: GrowingPhase, model: TreeVAE, train: Reader) -> Task:
    tree = phase.config.tree
    epochs, rise = {
        "root": (tree.epochs.initial, tree.kl_step),
        "refit": (tree.epochs.refit, tree.kl_step),
        "finetune": (tree.epochs.final, max(0.01, 1 / max(tree.epochs.final - 1, 1))),
    }[phase.kind]
    order = _order(phase, train.counts())
    images = Batches(train, order, epochs * order.steps_per_epoch)
    objective = TreeObjective(model, Annealing(order, tree.kl_start, rise), tree.contrastive, tree.reach_threshold)
    model.train()
    views = Views(phase, order, model)

    def batch(step: int, slot: int) -> Batch:
        return {"images": views(step, order.positions(step, slot), images(step, slot))}

    return _task(phase, order, epochs, objective, batch, model)


def _split_task(phase: GrowingPhase, model: TreeVAE, train: Reader) -> Task:
    tree = phase.config.tree
    assert phase.leaf is not None
    assert phase.previous is not None
    reach = leaf_reach(model.topology, load_routing(phase.previous, "train"))
    ids = members(reach, model.topology.leaves.index(phase.leaf))
    order = _order(phase, train.counts(ids))
    still = tree.augmentation == "none"
    frozen = _frozen_of(model, phase.leaf, train, ids) if still else None
    new = model.split(phase.leaf, phase.name)
    model.train_only(new)
    annealing = Annealing(order, tree.kl_start, tree.kl_step)
    objective = SplitObjective(model, phase.leaf, new, annealing, tree.contrastive)
    images = Batches(train, order, tree.epochs.split * order.steps_per_epoch, ids)
    views = Views(phase, order, model)

    def batch(step: int, slot: int) -> Batch:
        rows = order.positions(step, slot)
        parts = {} if frozen is None else {name: part[rows] for name, part in frozen._asdict().items()}
        return {"images": views(step, ids[rows], images(step, slot)), **parts}

    return _task(phase, order, tree.epochs.split, objective, batch, model)


def _frozen_of(model: TreeVAE, leaf: int, train: Reader, ids: NDArray[np.int64]) -> Frozen:
    """What the frozen part of the tree says of a leaf's members, in fixed blocks; kept in this worker's memory."""
    with evaluating(model):
        starts = range(0, len(ids), DECISION_BLOCK)
        blocks = [frozen_features(model, leaf, as_images(train.gather(ids[k : k + DECISION_BLOCK]))) for k in starts]
    return Frozen(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


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


def check(config: Config, name: str, images: int, shape: tuple[int, int, int]) -> None:
    """Raises ValueError, one sentence, where growing could not even begin on data of that name, of so many training
    images of the shape (I, H, W).
    """
    tree, (channels, height, width) = config.tree, shape
    for field, batch in (("tree.batch", tree.images_per_step), ("diffusion.batch", config.diffusion.batch)):
        if images < batch:
            raise ValueError(f"{field}={batch} is more than the {images} training images: take at most {images}")
    if height != width:
        raise ValueError(f"the images of {name} are {height}x{width}: pack them as squares")
    if tree.size > height:
        raise ValueError(f"tree.size={tree.size} is more than the images' {height} pixels: take at most {height}")
    if channels > 1 and tree.likelihood == "bernoulli":
        raise ValueError(f"tree.likelihood=bernoulli is for grey images, {name} has colour: take gaussian")
    config.unet_spec(channels, height)
