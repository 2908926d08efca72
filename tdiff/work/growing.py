"""One phase of growing the tree, as every worker of its Ray job runs it.

A phase reads the folder of the phase before it and writes its own: `model.safetensors` and `tree.json` are
all that it hands on; `routing.safetensors` keeps the posterior's routing probabilities of every image, from
which the driver decides what comes next (`tdiff.tree.growth`).

Legend: B batch, M images, R nodes with routers, L leaves, F numbers of an image's frozen features.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any, Literal, NamedTuple

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
from tdiff.errors import ConfigError
from tdiff.hardware import device
from tdiff.runs import CHECKPOINTS
from tdiff.seeds import seed_of
from tdiff.tree.contrastive import decision_loss, feature_loss
from tdiff.tree.growth import EFFECTIVE_SHARE, leaf_members, node_mass
from tdiff.tree.losses import Elbo, Frozen, frozen_features, split_elbo, tree_elbo
from tdiff.tree.model import TreeVAE, evaluating, norms, pick
from tdiff.tree.topology import Topology
from tdiff.work.reading import as_images, open_split

DECISION_BLOCK = 512
"""Images per forward pass where decisions are computed: fixed, so that the same weights give the same numbers."""

GATHERED = 2**22
"""Images whose decisions a GPU holds at a time while the workers put them together."""

LABELS = ".labels"
"""Ends the name of a split's labels in routing.safetensors."""

FROZEN_IN_MEMORY = 4_000_000_000
"""Bytes of frozen features that the workers of a node keep in memory together; more lie in files on its disk."""

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
    """The TreeVAE of a phase's folder. Raises DataError if it is damaged."""
    file = storage.join(url, "tree.json")
    return storage.read_module(storage.join(url, "model.safetensors"), lambda: storage.read_as(file, TreeVAE.from_json))


def load_topology(url: str) -> Topology:
    return storage.read_as(storage.join(url, "tree.json"), Topology.from_json)


class Decisions(NamedTuple):
    """Where the end of a phase sends every image of a split, and what the images are, where that is known."""

    left: NDArray[np.float32]
    """[M, R] posterior probabilities of going left."""
    labels: NDArray[np.int64] | None
    """[M], None unless every image has one. Nothing that trains reads them."""


def decisions_bytes(decisions: dict[str, Decisions]) -> bytes:
    """routing.safetensors, the inverse of `load_decisions`."""
    arrays: dict[str, NDArray[Any]] = {split: found.left for split, found in decisions.items()}
    arrays |= {split + LABELS: found.labels for split, found in decisions.items() if found.labels is not None}
    content: bytes = save_arrays(arrays)
    return content


def load_decisions(url: str) -> dict[str, Decisions]:
    """routing.safetensors of a phase's folder, by split."""
    found = {name: t.numpy() for name, t in storage.read_tensors(storage.join(url, "routing.safetensors")).items()}
    splits = sorted(name for name in found if not name.endswith(LABELS))  # safetensors has them in any order
    return {split: Decisions(found[split], found.get(split + LABELS)) for split in splits}


def load_routing(url: str, split: str) -> NDArray[np.float32]:
    """Posterior probabilities of going left, [M, R], of every image of a split, as the phase's end left them."""
    return load_decisions(url)[split].left


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
        leaves = model.topology.leaves
        reach = pick(walk.reach, [model.topology.top_down.index(leaf) for leaf in leaves])
        loss, told = _weighed(tree_elbo(model, walk, images), self.alpha(step), self.contrastive, terms)
        shares = _shares(leaves, reach)
        effective = (torch.stack([*shares.values()]) >= EFFECTIVE_SHARE).sum().to(loss.dtype)
        return loss, {**told, **shares, "effective_leaves": effective}


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
        if "frozen" in batch:
            frozen = unpacked(batch["frozen"], model, self.node)
        else:
            with torch.no_grad():
                frozen = frozen_features(model, self.node, images)
        q_logit = model.posterior_logit(self.node, frozen.feature)
        terms = {}
        if self.contrastive:
            terms["contrastive_decisions"] = decision_loss(q_logit.sigmoid()[:, None], frozen.reach[:, None])
        elbo = split_elbo(model, self.node, frozen, images, rng, q_logit)
        loss, told = _weighed(elbo, self.alpha(step), self.contrastive, terms)
        left, right = model.topology.children(self.node)
        assert left is not None
        assert right is not None
        sides = torch.stack([q_logit.sigmoid(), (-q_logit).sigmoid()])
        return loss, told | _shares((left, right), frozen.reach * sides)


def _shares(leaves: Sequence[int], reach: Tensor) -> dict[str, Tensor]:
    """Metrics of reach [L, B] at the leaves that train: the share of the batch that each holds. In a split that is a
    batch of one leaf's images.
    """
    return {f"share/{leaf}": share for leaf, share in zip(leaves, reach.detach().mean(1).unbind(), strict=True)}


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
    model.to(device())

    split = phase.kind == "split"
    task = _split_task(phase, model, train, worker) if split else _whole_tree_task(phase, model, train)
    outcome = engine.train(task, worker)

    patience = config.recovery.first_step_seconds
    decisions = {"train": decisions_of(model, train, worker, patience)}
    if "test" in manifest.splits:
        decisions["test"] = decisions_of(model, open_split(config, phase.data_url, "test"), worker, patience)
    if worker.rank == 0:
        _finish(phase, model, decisions, outcome, worker.world)


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
        checkpoints_url=storage.join(phase.url, CHECKPOINTS),
        checkpoint_images=tree.checkpoint_images,
        recovery=phase.config.recovery,
        rolls_back=phase.config.on_nonfinite == "rollback",
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

    def __call__(self, step: int, ids: NDArray[np.int64], pixels: NDArray[np.uint8]) -> Tensor:
        """ids [B] in the data set, their pixels [B, I, H, H] -> [B or 2B, I, H, H] in [0, 1]."""
        images, config = as_images(pixels).to(device()), self.phase.config
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
    views = Views(phase, order)

    def batch(step: int, slot: int) -> Batch:
        return {"images": views(step, order.positions(step, slot), images(step, slot))}

    return _task(phase, order, epochs, objective, batch, model)


def _split_task(phase: GrowingPhase, model: TreeVAE, train: Reader, worker: Worker) -> Task:
    tree = phase.config.tree
    assert phase.leaf is not None
    assert phase.previous is not None
    leaf = model.topology.leaves.index(phase.leaf)
    ids = leaf_members(model.topology, load_routing(phase.previous, "train"), leaf)
    order = _order(phase, train.counts(ids))
    still = tree.augmentation == "none"
    patience = phase.config.recovery.first_step_seconds
    frozen = frozen_of(model, phase.leaf, train, ids, worker, patience) if still else None
    new = model.split(phase.leaf, phase.name)
    model.train_only(new)
    annealing = Annealing(order, tree.kl_start, tree.kl_step)
    objective = SplitObjective(model, phase.leaf, new, annealing, tree.contrastive)
    images = Batches(train, order, tree.epochs.split * order.steps_per_epoch, ids)
    views = Views(phase, order)

    def batch(step: int, slot: int) -> Batch:
        rows = order.positions(step, slot)
        known = {} if frozen is None else {"frozen": frozen[rows]}
        return {"images": views(step, ids[rows], images(step, slot)), **known}

    return _task(phase, order, tree.epochs.split, objective, batch, model)


def frozen_of(
    model: TreeVAE, leaf: int, train: Reader, ids: NDArray[np.int64], worker: Worker, patience: float
) -> Tensor:
    """What the frozen part of the tree says of a leaf's members, [M, F] for `unpacked`: in fixed blocks of which each
    worker computes every world-th, and all keep all of them, in memory or on disk (`FROZEN_IN_MEMORY`).

    patience: seconds after which a worker without a further block hangs.
    """
    store: Tensor | None = None
    with evaluating(model):
        for first in range(0, len(ids), DECISION_BLOCK * worker.world):
            worker.expects(patience)
            last = min(first + DECISION_BLOCK * worker.world, len(ids))
            own = slice(
                min(first + DECISION_BLOCK * worker.rank, last), min(first + DECISION_BLOCK * (worker.rank + 1), last)
            )
            rows = packed(frozen_features(model, leaf, as_images(train.gather(ids[own])).to(device())))
            if store is None:
                store = _storage(len(ids), rows.shape[1])
            if worker.world > 1:
                found = rows.new_zeros(last - first, rows.shape[1])
                found[own.start - first : own.stop - first] = rows
                dist.all_reduce(found)  # every row is one worker's numbers plus zeros, so the sum is exact
                rows = found
            store[first:last] = rows.cpu()
    assert store is not None
    return store


def _storage(rows: int, columns: int) -> Tensor:
    """Room for float32 [rows, columns], in memory or, where that is too much of it, in a file that nobody else sees.

    Raises ConfigError if the disk has no room for it.
    """
    size = rows * columns * 4
    if size <= FROZEN_IN_MEMORY // int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        return torch.empty(rows, columns)
    with NamedTemporaryFile(prefix="tdiff-frozen-") as file:  # its disk space is free again when the tensor is gone
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # or a full disk would kill this process in the middle
        except OSError as error:
            raise ConfigError(
                f"TMPDIR={gettempdir()} has no room for {size / 1e9:.1f} GB of frozen features ({error.strerror}): "
                "set it to a folder that has."
            ) from error
        return torch.from_file(file.name, shared=True, size=rows * columns).view(rows, columns)


def packed(frozen: Frozen) -> Tensor:
    """All fields side by side, [B, F]."""
    return torch.cat([field.reshape(len(field), math.prod(field.shape[1:])) for field in frozen], 1)


def unpacked(rows: Tensor, model: TreeVAE, leaf: int) -> Frozen:
    """The inverse of `packed` for the frozen features of a leaf."""
    spec, path = model.spec, len(model.topology.path(leaf))
    feature = (spec.feature_channels, spec.size, spec.size)
    moments = (path, spec.latent_channels, spec.size, spec.size)
    shapes = ((), feature, feature, moments, moments)
    parts = rows.split([math.prod(shape) for shape in shapes], 1)
    return Frozen(*(part.reshape(len(rows), *shape) for part, shape in zip(parts, shapes, strict=True)))


def decisions_of(model: TreeVAE, split: Reader, worker: Worker, patience: float) -> Decisions:
    """Decisions on all images in manifest order: in fixed blocks, each worker a stretch of them.

    patience: seconds after which a worker without a further block hangs.
    """
    blocks = -(-len(split) // DECISION_BLOCK)
    left = torch.zeros(len(split), len(model.topology.deciding))
    labels = torch.zeros(len(split), dtype=torch.int64)  # counted from 1; 0: there is none
    with evaluating(model):
        shares = [min(blocks * k // worker.world * DECISION_BLOCK, len(split)) for k in range(worker.world + 1)]
        first, last = shares[worker.rank : worker.rank + 2]
        for place, found in split.blocks(first, last, DECISION_BLOCK):
            worker.expects(patience)  # of all images together nobody knows how long they take
            left[place] = model.routing(as_images(found.images).to(device())).cpu()
            if found.labels is not None:
                labels[place] = torch.from_numpy(found.labels + 1)
    if worker.world > 1:
        for part in (*left.split(GATHERED), *labels.split(GATHERED)):
            summed = part.to(device())
            dist.all_reduce(summed)  # every row is one worker's number plus zeros, so the sum is exact
            part.copy_(summed)
    return Decisions(left.numpy(), labels.numpy() - 1 if bool((labels > 0).all()) else None)


def _finish(
    phase: GrowingPhase,
    model: TreeVAE,
    decisions: dict[str, Decisions],
    outcome: engine.Outcome,
    workers: int,
) -> None:
    """Rank 0 writes what the phase hands on, and its summary."""
    topology = model.topology
    model.topology = topology.with_samples(node_mass(topology, decisions["train"].left))
    storage.write_bytes(storage.join(phase.url, "routing.safetensors"), decisions_bytes(decisions))
    save_tree(phase.url, model)
    summary: dict[str, Any] = {
        "leaves": len(topology.leaves),
        "workers": workers,
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
