"""Training the diffusion model of a finished tree, as every worker of its Ray job runs it.

Reads the tree's folder and the shards, and a control's labels (`tdiff.work.labels`); writes `ema.safetensors` and
`unet.json`, all else that sampling needs, and snapshots of two EMAs from which any other width can be had
(`tdiff.work.snapshots`).

Legend: B batch, L leaves, I image channels, H image size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tdiff import engine, storage
from tdiff.config import Config, Diffusion
from tdiff.data.order import Order
from tdiff.data.shards import read_manifest
from tdiff.data.stream import Batches
from tdiff.diffusion.condition import CLUSTERS, CONTROLS, KNOWN_CONDITIONS, Denoiser, DenoiserSpec
from tdiff.diffusion.ema import TRACKS, Decay, Ema, constant_decay, gamma_from_width, power_decay, snapshot_steps
from tdiff.diffusion.process import make_process
from tdiff.engine import Batch, Task, Worker
from tdiff.errors import ConfigError
from tdiff.runs import CHECKPOINTS
from tdiff.seeds import permutation, seed_of
from tdiff.tree.model import Path as TreePath
from tdiff.tree.model import TreeVAE, Visit
from tdiff.work.growing import load_tree
from tdiff.work.labels import Labels, read_labels
from tdiff.work.reading import as_images, open_split
from tdiff.work.snapshots import Snapshots

PHASE = "diffusion"

BINS = 10
"""Parts of the times to train at, for which the validation loss is told apart."""

PREFIX = "denoiser."
"""What the names of the denoiser's tensors begin with in the objective that is trained."""


@dataclass(frozen=True)
class DiffusionPhase:
    """What a worker needs to know. url: the phase's folder; tree_url: the finished tree's; deepspeed: what the file
    says that the config names.
    """

    url: str
    tree_url: str
    data_url: str
    config: Config
    bf16: bool
    deepspeed: dict[str, Any] = field(default_factory=dict)


def deepspeed_settings(section: Diffusion) -> dict[str, Any]:
    """What the file `diffusion.deepspeed` says, {} without one. Raises ConfigError if it is no such file."""
    if section.deepspeed is None:
        return {}
    named = f"diffusion.deepspeed={section.deepspeed}"
    try:
        settings = json.loads(Path(section.deepspeed).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{named} cannot be read ({error}): name a JSON file.") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{named} holds a {type(settings).__name__}, not settings.")
    try:
        engine.check_deepspeed(settings, section.zero)
    except ValueError as error:
        raise ConfigError(f"{named}: {error}.") from error
    return settings


def denoiser_spec(config: Config, tree: TreeVAE) -> DenoiserSpec:
    """The denoiser's shape for a tree, by the config's section `diffusion`."""
    section, spec = config.diffusion, tree.spec
    told = KNOWN_CONDITIONS[section.condition]
    return DenoiserSpec(
        unet=config.unet_spec(spec.channels, spec.image_size),
        condition=section.condition,
        node_encoding=section.node_encoding,
        nodes=CLUSTERS.get(section.condition, len(tree.topology.nodes)),
        latent_size=spec.latent_channels * spec.size**2,
        null=section.condition_dropout > 0 and (told.embeds or told.recon),
        objective=section.objective,
        timesteps=section.timesteps,
    )


def leaf_reconstruction(tree: TreeVAE, visits: Mapping[int, Visit], leaf: Tensor) -> Tensor:
    """The reconstruction of each sample's own leaf (indices [B]), [B, I, H, H] in [0, 1].

    Every leaf decodes its own samples alone, which is the same in evaluation mode.
    """
    size = tree.spec.image_size
    images = torch.empty(len(leaf), tree.spec.channels, size, size, device=leaf.device)
    for index, node in enumerate(tree.topology.leaves):
        rows = (leaf == index).nonzero().squeeze(1)
        if len(rows):
            images[rows] = tree.image(node, visits[node].z[rows])
    return images


class DiffusionObjective(nn.Module):
    """The denoising loss, each image told its own path through the frozen tree, drawn anew every time; or its label,
    where a control's `labels` are given.

    In evaluation mode nobody is told the null condition, and sums and counts of the samples' losses come along, by time
    (BINS equal shares of the times to train at) and by leaf.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tree: TreeVAE,
        condition_dropout: float,
        min_snr: float | None = None,
        labels: Labels | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        # In a tuple, so that it is no part of what is trained, moved, partitioned or saved.
        self._tree = (tree.eval().requires_grad_(False),)
        self.process = make_process(denoiser.spec.objective, denoiser.spec.timesteps, min_snr)
        self.condition_dropout = condition_dropout
        self.labels = labels

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = batch["images"]
        tree = self._tree[0].to(images.device)  # nothing moves after the first time
        told = self.denoiser.spec.told
        path: TreePath | None = None
        recon = drop = None
        of_tree = self.labels is None and (told.embeds or told.recon)
        # The frozen tree speaks in full precision whatever the U-Net runs in.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if of_tree or not self.training:
                visits = tree.walk(images, rng)
                path = tree.path(visits, rng)
                if told.recon:
                    recon = leaf_reconstruction(tree, visits, path.leaf)
            given = path if self.labels is None else self.labels.path(self.labels.of(images, rng))
        if self.denoiser.spec.null and self.training:
            drop = torch.rand(len(images), generator=rng, device=images.device) < self.condition_dropout
        x0 = 2 * images - 1
        t = self.process.draw_times(len(x0), rng)
        noise = torch.randn(x0.shape, generator=rng, device=x0.device)

        def network(x_t: Tensor, t: Tensor) -> Tensor:
            output: Tensor = self.denoiser(x_t, t, given, recon, drop)
            return output

        loss = self.process.loss(network, x0, t, noise)
        if self.training or path is None:
            return loss.mean, {}
        bins = (self.process.share_below(t) * BINS).long().clamp_max(BINS - 1)
        leaves = len(tree.topology.leaves)
        return loss.mean, _sums("time", loss.per_sample, bins, BINS) | _sums("leaf", loss.per_sample, path.leaf, leaves)


def _sums(name: str, losses: Tensor, group: Tensor, groups: int) -> dict[str, Tensor]:
    """Sum and count of the losses [B] in every group, whose index [B] is given."""
    sums = losses.new_zeros(groups).index_add(0, group, losses)
    counts = losses.new_zeros(groups).index_add(0, group, torch.ones_like(losses))
    of_groups = enumerate(zip(sums.unbind(), counts.unbind(), strict=True))
    return {f"{name}-{k}/{what}": v for k, pair in of_groups for what, v in zip(("sum", "count"), pair, strict=True)}


def validation_metrics(means: dict[str, float]) -> dict[str, float]:
    """validation/loss, validation/time-K and validation/leaf-K, from the means of what the objective gives."""
    groups = [name.removesuffix("/count") for name, count in means.items() if name.endswith("/count") and count > 0]
    by_group = {name: means[f"{name}/sum"] / means[f"{name}/count"] for name in groups}
    return {f"validation/{name}": value for name, value in {"loss": means["loss"], **by_group}.items()}


def _validation(phase: DiffusionPhase, steps: int) -> engine.Validation | None:
    """Held-out images, or training images where there are no others; the same each of `diffusion.validations` times.

    A split's images are often sorted by class, so they are drawn by the run's seed.
    """
    section = phase.config.diffusion
    if not section.validations:
        return None
    splits = read_manifest(phase.data_url).splits
    reader = open_split(phase.config, phase.data_url, "test" if "test" in splits else "train")
    ids = permutation(len(reader), "validation", phase.config.seed)[: section.validation_images]
    images, count, part = reader.gather(ids), len(ids), section.batch // section.slots

    def batch(number: int, slot: int) -> Batch:
        first = (number * section.slots + slot) * part
        return {"images": as_images(images[np.arange(first, first + part) % count])}

    batches = max(1, count // section.batch)
    return engine.Validation(snapshot_steps(steps, section.validations), batches, batch, validation_metrics)


def tracks_of(section: Diffusion) -> tuple[str, dict[str, Decay]]:
    """The name of the EMA that is sampled, and the decays of all that training follows, by name.

    The sampled one is always among them, for following it is exact and rebuilding it would not be.
    """
    widths = set(TRACKS) if section.snapshot_count else set()
    if section.ema_decay is None:
        widths.add(section.ema)
    power = {str(width): power_decay(gamma_from_width(width)) for width in sorted(widths)}
    if section.ema_decay is None:
        return str(section.ema), power
    return "constant", power | {"constant": constant_decay(section.ema_decay)}


def steps_of(section: Diffusion, images: int) -> int:
    """How many steps the config asks for, on so many training images."""
    if section.epochs is not None:
        return section.epochs * (images // section.batch)
    return max(1, section.images // section.batch)


def diffuse(phase: DiffusionPhase, worker: Worker) -> None:
    """Trains the diffusion model and writes its folder."""
    config, section = phase.config, phase.config.diffusion
    train = open_split(config, phase.data_url, "train")
    tree = load_tree(phase.tree_url)
    torch.manual_seed(seed_of("init", config.seed, PHASE))
    denoiser = Denoiser(denoiser_spec(config, tree))
    denoiser.unet.recompute = section.recompute
    if section.compile:
        denoiser.unet.compile()  # in place: torch.compile would put its _orig_mod into the tensors' names
    labels = read_labels(phase.url) if section.condition in CONTROLS else None
    objective = DiffusionObjective(denoiser, tree, section.condition_dropout, section.min_snr, labels)
    order = Order(train.counts(), section.batch, section.slots, config.seed, PHASE, config.data.block)
    steps = steps_of(section, len(train))
    images = Batches(train, order, steps)
    warmup_steps = section.warmup_images / section.batch

    def batch(step: int, slot: int) -> Batch:
        return {"images": as_images(images(step, slot))}

    sampled, tracks = tracks_of(section)
    kept = snapshot_steps(steps, section.snapshot_count)

    outcome = engine.train(
        Task(
            phase=PHASE,
            objective=objective,
            batch=batch,
            steps=steps,
            batch_size=section.batch,
            slots=section.slots,
            seed=config.seed,
            learning_rate=lambda step: section.learning_rate * min(1.0, (step + 1) / max(warmup_steps, 1)),
            clip=section.clip,
            zero=section.zero,
            deepspeed=phase.deepspeed,
            autocast=phase.bf16,
            checkpoints_url=storage.join(phase.url, CHECKPOINTS),
            checkpoint_images=section.checkpoint_images,
            recovery=config.recovery,
            rolls_back=config.on_nonfinite == "rollback",
            average=lambda tensors: {name: Ema(tensors, decay) for name, decay in tracks.items()},
            snapshots=Snapshots(storage.join(phase.url, "ema"), kept, PREFIX) if kept else None,
            validation=_validation(phase, steps),
            metrics_url=storage.join(phase.url, "metrics"),
        ),
        worker,
    )
    if worker.rank == 0:
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in outcome.averages[sampled].items()}
        storage.write_bytes(storage.join(phase.url, "ema.safetensors"), save_tensors(weights))
        storage.write_text(storage.join(phase.url, "unet.json"), denoiser.spec.to_json() + "\n")
        summary = {
            "parameters": sum(p.numel() for p in denoiser.parameters()),
            "workers": worker.world,
            "seconds": outcome.seconds,
            "first_step_at": outcome.first_step_at,
            "last_step_at": outcome.last_step_at,
        }
        storage.write_text(storage.join(phase.url, "summary.json"), json.dumps(summary, indent=1) + "\n")
