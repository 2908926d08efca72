"""Drawing samples, one output shard a task, as a Ray actor runs it.

A sample depends on (run, seed, its index, the shard's batch shape) alone: every shard is drawn as one batch of
fixed size from a generator seeded by (seed, shard), a surplus at the end is cut off, and the file is written whole.
So shards can be made by any number of workers, in any order, and again.

    SAMPLES/shard-000000.tar   members KEY.png (the sample), KEY.treevae.png (the TreeVAE's own image for the same
                               latents), KEY.json (index, draw, leaf, path, reach, seed; of a control also the label
                               that the denoiser is told, while leaf is the TreeVAE's)

Legend: B batch, L leaves, I image channels, H image size.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor

from tdiff import storage
from tdiff.data.decode import samples_of
from tdiff.data.images import decoded, png_bytes
from tdiff.data.shards import Shard, read_manifest
from tdiff.data.stream import Reader
from tdiff.diffusion.condition import CONTROLS, Denoiser, DenoiserSpec
from tdiff.diffusion.process import Process, Time, make_process
from tdiff.diffusion.samplers import (
    ALWAYS,
    Grid,
    Sampler,
    Start,
    guided,
    network_evaluations,
    noise_from,
    run_sampler,
    time_grid,
)
from tdiff.errors import DataError
from tdiff.hardware import device
from tdiff.seeds import generator
from tdiff.tree.encoding import ImageArray, as_floats
from tdiff.tree.model import Path, TreeVAE, Visit
from tdiff.work.diffusing import leaf_reconstruction
from tdiff.work.growing import load_tree
from tdiff.work.labels import read_labels
from tdiff.work.reading import as_images
from tdiff.work.snapshots import rebuild

Mode = Literal["sample", "sample-all-leaves", "reconstruct", "reconstruct-all-leaves"]
Model = Literal["treediffusion", "treevae"]
MODELS: tuple[Model, ...] = ("treediffusion", "treevae")
MODES: tuple[Mode, ...] = ("sample", "sample-all-leaves", "reconstruct", "reconstruct-all-leaves")


@dataclass(frozen=True)
class SampleJob:
    """What to draw: everything that the shards' contents depend on, and where they go.

    model: treevae draws with the tree alone: its own images, of the most probable leaf where none is forced, and what
    says how to denoise has no effect.
    num: root draws (or test images to reconstruct); with all leaves, each gives L images.
    leaf: index of the leaf to force, or None to draw it from the tree. node: id of the node below which leaves are
    drawn; where test images are reconstructed, their own path ends there, and the prior goes on. leaves: how many there
    are to draw. start: what denoising starts from. eta: of ddim alone, 0 to 1. guidance: its weight; guidance_interval:
    noise levels in which it is active. ema: width of the average whose weights draw, None: that of ema.safetensors.
    """

    url: str
    tree_url: str
    diffusion_url: str
    data_url: str
    mode: Mode
    num: int
    seed: int
    batch: int
    steps: int
    sampler: Sampler
    grid: Grid
    bf16: bool
    leaves: int
    model: Model = "treediffusion"
    leaf: int | None = None
    node: int | None = None
    start: Start = "noise"
    eta: float = 0.0
    guidance: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    ema: float | None = None
    max_bad_samples: int = 0

    @property
    def images_per_draw(self) -> int:
        return self.leaves if self.mode.endswith("all-leaves") else 1

    @property
    def draws_per_shard(self) -> int:
        return max(1, self.batch // self.images_per_draw)

    @property
    def shards(self) -> int:
        return -(-self.num // self.draws_per_shard)

    def shard_url(self, shard: int) -> str:
        return storage.join(self.url, f"shard-{shard:06d}.tar")


@dataclass(frozen=True)
class Samples:
    """Samples. images, treevae: uint8 [M, I, H, H]; entries: what their KEY.json says."""

    images: NDArray[np.uint8]
    treevae: NDArray[np.uint8]
    entries: list[dict[str, object]]

    @property
    def leaf(self) -> NDArray[np.int64]:
        """[M] index of every sample's leaf."""
        return np.array([int(str(entry["leaf"])) for entry in self.entries], np.int64)


def _in_order(parts: Sequence[Samples]) -> Samples:
    """All samples by their index."""
    entries = [entry for part in parts for entry in part.entries]
    order = sorted(range(len(entries)), key=lambda k: int(str(entries[k]["index"])))
    images, treevae = (np.concatenate(arrays) for arrays in zip(*((p.images, p.treevae) for p in parts), strict=True))
    return Samples(images[order], treevae[order], [entries[k] for k in order])


def open_tree(url: str) -> TreeVAE:
    """The TreeVAE of a phase's folder, frozen, where this process computes."""
    return load_tree(url).eval().requires_grad_(False).to(device())


def open_denoiser(diffusion_url: str, ema: float | None) -> Denoiser:
    """The denoiser with the average's weights of a width (None: those of ema.safetensors), frozen, there too."""
    spec = load_spec(diffusion_url)
    if ema is None:
        denoiser = storage.read_module(storage.join(diffusion_url, "ema.safetensors"), lambda: Denoiser(spec))
    else:
        denoiser = Denoiser(spec)
        denoiser.load_state_dict(rebuild(diffusion_url, ema))
    return denoiser.eval().requires_grad_(False).to(device())


# Loaded once per worker.
_tree = lru_cache(maxsize=1)(open_tree)
_denoiser = lru_cache(maxsize=1)(open_denoiser)


def load_spec(diffusion_url: str) -> DenoiserSpec:
    """Its shape. Raises DataError if unet.json is damaged."""
    return storage.read_as(storage.join(diffusion_url, "unet.json"), DenoiserSpec.from_json)


@lru_cache(maxsize=1)
def _test_images(data_url: str, max_bad_samples: int) -> Reader:
    return Reader(data_url, read_manifest(data_url), "test", max_bad_samples=max_bad_samples)


def draw_shard(job: SampleJob, shard: int) -> Shard:
    """Draws one shard and writes it, unless an earlier attempt has: returns its entry for the manifest."""
    url = job.shard_url(shard)
    if storage.exists(url):  # written whole or not at all
        content = storage.read_bytes(url)
    else:
        content = _tar(job, shard)
        storage.write_bytes(url, content)
    samples = min(job.num - shard * job.draws_per_shard, job.draws_per_shard) * job.images_per_draw
    return Shard(url.rpartition("/")[2], samples, len(content), hashlib.sha256(content).hexdigest())


def _tar(job: SampleJob, shard: int) -> bytes:
    denoiser = _denoiser(job.diffusion_url, job.ema) if job.model == "treediffusion" else None
    found = _drawn(job, shard, _tree(job.tree_url), denoiser)
    buffer = io.BytesIO()
    with wds.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for entry, image, own in zip(found.entries, found.images, found.treevae, strict=True):
            writer.write(
                {
                    "__key__": f"{entry['index']:09d}",
                    "png": png_bytes(image),
                    "treevae.png": png_bytes(own),
                    "json": json.dumps(entry).encode(),
                }
            )
    return buffer.getvalue()


def draw_here(job: SampleJob, tree: TreeVAE, denoiser: Denoiser | None, given: ImageArray | None = None) -> Samples:
    """All samples of a job, drawn shard by shard in this process; nothing is written.

    denoiser: None where the job's model is treevae. given: [M, I, H, H], what is reconstructed instead of test images.
    """
    return _in_order([_drawn(job, shard, tree, denoiser, given) for shard in range(job.shards)])


@torch.no_grad()
def _drawn(
    job: SampleJob, shard: int, tree: TreeVAE, denoiser: Denoiser | None, given: ImageArray | None = None
) -> Samples:
    """The samples of one shard, in the order of their file."""
    here = device()
    rng = generator("sample", job.seed, shard, device=here)
    first = shard * job.draws_per_shard
    images = _to_reconstruct(job, first, given).to(here) if job.mode.startswith("reconstruct") else None
    visits: Mapping[int, Visit]
    visits = tree.descend(job.draws_per_shard, rng) if images is None else tree.walk(images, rng)
    if job.node is not None:
        visits = tree.redrawn_below(job.node, visits, rng)
    noise = torch.randn(job.draws_per_shard, *_image_shape(tree), generator=rng, device=here)

    labels = label = None
    if denoiser is not None and denoiser.spec.condition in CONTROLS:
        labels = read_labels(job.diffusion_url)
        # By a generator of its own: the latents and the noise are those of the other conditions.
        own_rng = generator("label", job.seed, shard, device=here)
        label = labels.drawn(len(noise), own_rng) if images is None else labels.of(images, own_rng)

    entries: list[dict[str, object]] = []
    samples, plain = [], []
    kept = min(job.num - first, job.draws_per_shard)
    node = 0 if job.node is None else job.node
    each: Sequence[int | None] = [job.leaf]
    if job.mode.endswith("all-leaves"):
        each = [tree.topology.leaves.index(leaf) for leaf in tree.topology.leaves_below(node)]
    state = rng.get_state()
    for place, leaf in enumerate(each):
        rng.set_state(state)  # what a sampler adds on its way is the same for every leaf
        chosen = None if leaf is None else torch.full((job.draws_per_shard,), leaf, device=here)
        path = tree.path(visits, rng, chosen, within=node, likeliest=denoiser is None)
        own = leaf_reconstruction(tree, visits, path.leaf)
        plain.append(_pixels(own)[:kept])
        if denoiser is None:
            samples.append(plain[-1])
        else:
            told = path
            if labels is not None and label is not None:
                if leaf is not None or job.node is not None:
                    label = path.leaf  # leaves are asked for
                told = labels.path(label)
            samples.append(_pixels((_denoised(job, denoiser, noise, told, own, rng) + 1) / 2)[:kept])
        for row, draw in enumerate(range(first, first + kept)):
            entry = _entry(job, tree, path, draw, row, draw * len(each) + place)
            entries.append(entry if label is None else entry | {"label": int(label[row])})
    return Samples(np.concatenate(samples), np.concatenate(plain), entries)


def _to_reconstruct(job: SampleJob, first: int, given: ImageArray | None) -> Tensor:
    """A shard's images [B, I, H, H] from the one numbered `first`, of the test images if none are given."""
    test = _test_images(job.data_url, job.max_bad_samples) if given is None else None
    count = job.num if test is None else len(test)
    rows = np.arange(first, first + job.draws_per_shard) % count  # the surplus is cut off
    if test is not None:
        return as_images(test.gather(rows))
    assert given is not None
    return as_floats(given[rows])


def _entry(job: SampleJob, tree: TreeVAE, path: Path, draw: int, row: int, index: int) -> dict[str, object]:
    """What a sample's KEY.json says."""
    chosen = int(path.leaf[row])
    return {
        "index": index,
        "draw": draw,
        "leaf": chosen,
        "path": list(tree.topology.path(tree.topology.leaves[chosen])),
        "reach": round(float(path.reach[row, chosen]), 6),
        "seed": job.seed,
    }


def _image_shape(tree: TreeVAE) -> tuple[int, int, int]:
    return tree.spec.channels, tree.spec.image_size, tree.spec.image_size


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """[B, I, H, H] in [0, 1] -> uint8."""
    pixels: NDArray[np.uint8] = (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return pixels


def _process_and_grid(job: SampleJob, spec: DenoiserSpec) -> tuple[Process, list[Time]]:
    """The denoiser's process and the falling times of the job's grid."""
    process = make_process(spec.objective, spec.timesteps)
    return process, time_grid(process, job.grid, job.steps)


def evaluations(job: SampleJob) -> int:
    """How often the denoiser is asked about each sample of a job."""
    if job.model == "treevae":
        return 0
    spec = load_spec(job.diffusion_url)
    return network_evaluations(
        job.sampler, *_process_and_grid(job, spec), job.guidance, job.guidance_interval or ALWAYS
    )


def _denoised(
    job: SampleJob, denoiser: Denoiser, noise: Tensor, path: Path, own: Tensor, rng: torch.Generator
) -> Tensor:
    """Samples [B, I, H, H] in [-1, 1] from `noise`, told path and reconstruction."""
    process, grid = _process_and_grid(job, denoiser.spec)
    nobody_told = torch.ones(len(noise), dtype=torch.bool, device=noise.device)

    def network(x_t: Tensor, t: Tensor, drop: Tensor | None = None) -> Tensor:
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=job.bf16):
            output: Tensor = denoiser(x_t, t, path, own, drop)
        return output

    told = process.predictor(network)
    untold = process.predictor(partial(network, drop=nobody_told))
    predict = guided(told, untold, job.guidance, process, job.guidance_interval or ALWAYS)
    x = noise if job.start == "noise" else process.q_sample(2 * own - 1, process.times(grid[0], noise), noise)
    return run_sampler(job.sampler, predict, x, process, grid, noise_from(rng), job.eta)


def read_samples(url: str, most: int | None = None) -> Samples:
    """The samples of a finished folder, in order of index: all, or the first `most` of them, for which no more shards
    are read than they take. Raises DataError if it is damaged.
    """
    manifest = storage.read_json(storage.join(url, "manifest.json"))
    promised = sum(shard["samples"] for shard in manifest["shards"])
    if promised != manifest["samples"]:
        raise DataError(f"{url} has shards of {promised} samples and a manifest of {manifest['samples']}: delete it")
    wanted = promised if most is None else min(most, promised)
    parts, count = list[Samples](), 0
    for shard in manifest["shards"]:  # a shard's indices come before those of the next
        if count >= wanted:
            break
        parts.append(read_shard(url, Shard(**shard)))
        count += shard["samples"]
    found = _in_order(parts)
    return Samples(found.images[:wanted], found.treevae[:wanted], found.entries[:wanted])


def read_shard(url: str, shard: Shard) -> Samples:
    """The samples of a shard in the folder `url`, in their order. Raises DataError if it is damaged."""
    content, where = storage.read_bytes(storage.join(url, shard.name)), f"{url}: {shard.name}"
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise DataError(f"{where} is damaged: delete the folder and draw it again")
    samples = samples_of(content, where)
    if len(samples) != shard.samples:
        raise DataError(f"{where} holds {len(samples)} samples, its manifest says {shard.samples}: delete the folder")
    return Samples(
        np.stack([decoded(sample["png"]) for sample in samples]),
        np.stack([decoded(sample["treevae.png"]) for sample in samples]),
        [json.loads(sample["json"]) for sample in samples],
    )
