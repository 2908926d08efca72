"""A finished run in a notebook or another program: its tree, the clusters of images, new images. Without Ray.

    import tdiff

    run = tdiff.load("runs/demo")                    # local or s3://
    run.tree.leaves                                  # the Topology
    reach, leaf, path = run.encode(images)           # uint8 or floats in [0, 1], numpy or torch
    run.sample(16, leaf=3, sampler="dpm-solver++", steps=20).images
    run.reconstruct(images, node=4).images           # their own path down to node 4, the prior below

Computes on this process's GPU, if it has one. What it draws is what `python -m tdiff.generate` draws with the same
options and batch.

Legend: M images, L leaves, P nodes on the longest path, I image channels, H image size.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

from tdiff.diffusion.condition import Denoiser
from tdiff.diffusion.samplers import Grid, Sampler, Start
from tdiff.errors import ConfigError
from tdiff.hardware import one_thread
from tdiff.runs import Run, existing
from tdiff.tree.encoding import Encoded, ImageArray, arranged, encode
from tdiff.tree.topology import Topology
from tdiff.work.jobs import sample_job
from tdiff.work.sampling import Model, Samples, draw_here, open_denoiser, open_tree


class Options(TypedDict, total=False):
    """What can be said about drawing; what is not said is the run's own setting.

    model: "treevae" draws with the tree alone, and so without a diffusion model. sampler, eta (of ddim), grid, start,
    steps (times of the grid), guidance (its weight) with guidance_interval (noise levels): how to denoise. ema: width
    of the average whose weights draw. batch: images drawn at a time, on which a sample depends.
    """

    seed: int | None
    model: Model | None
    sampler: Sampler | None
    eta: float | None
    steps: int | None
    grid: Grid | None
    start: Start | None
    guidance: float | None
    guidance_interval: tuple[float, float] | None
    ema: float | None
    batch: int | None


def load(url: str) -> LoadedRun:
    """The run in a folder, local or s3://, with a finished tree. Raises ConfigError, DataError or StorageError."""
    return LoadedRun(existing(url))


class LoadedRun:
    """A run whose tree is in memory; its denoiser comes there when it is first needed."""

    def __init__(self, run: Run):
        """Raises ConfigError if the run has no finished tree yet."""
        self.run = run
        self._model = open_tree(run.grown_tree)
        self._denoiser: tuple[float | None, Denoiser] | None = None

    def __repr__(self) -> str:
        return f"<run {self.run.name}: {len(self.tree.leaves)} leaves, {self.run.url}>"

    @property
    def tree(self) -> Topology:
        """The tree: its nodes, leaves and paths."""
        return self._model.topology

    def encode(self, images: ImageArray) -> Encoded:
        """The clusters of images: reach [M, L] of every leaf, the most probable leaf [M], the path [M, P] to it.

        images: uint8, or floats in [0, 1], [M, I, H, H]; grey ones also as [M, H, H], and [M, H, H, I] where that
        cannot be [M, I, H, H]. Any number: they pass in blocks. Raises ConfigError for others.
        """
        return encode(self._model, images)

    def sample(
        self,
        n: int,
        *,
        leaf: int | None = None,
        node: int | None = None,
        all_leaves: bool = False,
        **options: Unpack[Options],
    ) -> Samples:
        """`n` draws from the prior: images and treevae (the TreeVAE's own for the same latents), uint8 [n, I, H, H],
        leaf [n], and entries, which tell each one's path, reach and seed.

        leaf: index of the leaf to draw; node: id of the node to draw below; default: by the tree's probabilities.
        all_leaves: every draw through every leaf (below `node`), which gives as many images of it. options: `Options`.

        On the CPU in one thread, as every worker draws: the same images on any machine. Raises ConfigError.
        """
        mode = "sample-all-leaves" if all_leaves else "sample"
        return self._drawn(None, mode=mode, num=n, leaf=leaf, node=node, **options)

    def reconstruct(
        self,
        images: ImageArray,
        *,
        leaf: int | None = None,
        node: int | None = None,
        all_leaves: bool = False,
        **options: Unpack[Options],
    ) -> Samples:
        """The run's own images of `images` (as `encode` takes them), in their order; what comes back is as of `sample`.

        leaf: index of the leaf that all are led to; node: id of the node where their own path ends and the prior goes
        on; default: by their own path. Raises ConfigError.
        """
        given = arranged(images, self._model.spec)
        if not len(given):
            raise ConfigError("images are none: give one or more to reconstruct.")
        mode = "reconstruct-all-leaves" if all_leaves else "reconstruct"
        return self._drawn(given, mode=mode, num=len(given), leaf=leaf, node=node, **options)

    def _drawn(self, given: ImageArray | None, **settings: Any) -> Samples:
        job = sample_job(self.run, "", of_test_images=given is None, **settings)
        denoiser = None
        if job.model == "treediffusion":
            if self._denoiser is None or self._denoiser[0] != job.ema:
                self._denoiser = job.ema, open_denoiser(job.diffusion_url, job.ema)
            denoiser = self._denoiser[1]
        with one_thread():
            return draw_here(job, self._model, denoiser, given)
