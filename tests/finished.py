"""A run as training leaves it, made without training: random weights, a little noise as data, all in one folder."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from tdiff import config as configs
from tdiff import storage
from tdiff.data.shards import read_manifest
from tdiff.data.sources import Source, Split
from tdiff.diffusion.condition import CONTROLS, Denoiser
from tdiff.diffusion.ema import TRACKS
from tdiff.packing import pack
from tdiff.runs import Run
from tdiff.tree.model import TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import denoiser_spec
from tdiff.work.growing import decisions_bytes, decisions_of, save_tree
from tdiff.work.labels import write_labels
from tdiff.work.reading import as_images, open_split
from tdiff.work.snapshots import Snapshots

TOPOLOGY = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")  # leaves 3, 4, 2
TEST_IMAGES = 23
SETTINGS = [
    "precision=fp32",
    "tree.features=3",
    "tree.max_leaves=3",
    "tree.latent_channels=2",
    "tree.feature_channels=8",
    "diffusion.width=8",
    "diffusion.heads=1",
    "diffusion.timesteps=20",
    "diffusion.condition=recon+path",
    "diffusion.condition_dropout=0.1",
    "samples.steps=4",
    "samples.batch=6",
    "samples.per_leaf=5",
]


M = TypeVar("M", bound=nn.Module)


class Alone:
    """The one worker."""

    rank, world = 0, 1

    def expects(self, seconds: float) -> None: ...


def finished_run(folder: Path, denoiser: bool = True, channels: int = 1, settings: tuple[str, ...] = ()) -> Run:
    """RUN with a tree of three leaves and, unless it has come no further, a denoiser, for images of 8x8."""
    torch.manual_seed(1)
    colour = ["tree.likelihood=gaussian"] if channels > 1 else []
    config = configs.load(None, [*SETTINGS, *colour, *settings, f"runs={folder}", "name=made"])
    run, data = Run(str(folder / "made")), str(folder / "data")
    shape = (TEST_IMAGES, channels, 8, 8)
    images = [np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed in (0, 1)]
    pack(Source("noise", {"train": Split(images[0], None), "test": Split(images[1], None)}, None), data, 10)
    record = {"id": "made", "digest": "", "config": config.model_dump(mode="json"), "bf16": False}
    record |= {"data_url": data, "data_digest": read_manifest(data).digest}
    storage.write_text(run.at("run.json"), json.dumps(record))
    tree = _shaken(TreeVAE(config.tree_spec(channels, 8), TOPOLOGY), 0.3).eval()
    with torch.no_grad():  # routers that decide, for half of the images each way
        logits = tree.routing(as_images(images[0])).logit()
        for k, node in enumerate(TOPOLOGY.deciding):
            (router,) = tree.networks([node], "posterior_router")
            router.layers[-1].bias -= logits[:, k].median()
            for parameter in (router.layers[-1].weight, router.layers[-1].bias):
                parameter *= 3 / logits[:, k].std()
    url = run.at("tree", "00-finetune")
    save_tree(url, tree)
    decisions = {
        split: decisions_of(tree, open_split(config, data, split), Alone(), 60.0) for split in ("train", "test")
    }
    storage.write_bytes(storage.join(url, "routing.safetensors"), decisions_bytes(decisions))
    _finish(url)
    if denoiser:
        spec, url = denoiser_spec(config, tree), run.at("diffusion")
        if spec.condition in CONTROLS:
            write_labels(url, config, data, run.grown_tree)
        kept = Snapshots(storage.join(url, "ema"), [10, 20], "")
        kept.start(0)
        for step, width in itertools.product([10, 20], TRACKS):
            kept.write(step, str(width), _weights(Denoiser(spec)))
        storage.write_bytes(storage.join(url, "ema.safetensors"), save_tensors(_weights(Denoiser(spec))))
        storage.write_text(storage.join(url, "unet.json"), spec.to_json())
        _finish(url)
    return run


def _finish(url: str) -> None:
    storage.write_text(storage.join(url, "summary.json"), json.dumps({"wall_seconds": 1.0}))
    storage.finish(url)


def _shaken(module: M, by: float) -> M:
    """Weights away from the first ones: leaves that differ, an output that is not 0."""
    for parameter in module.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return module


def _weights(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in _shaken(denoiser, 0.1).state_dict().items()}
