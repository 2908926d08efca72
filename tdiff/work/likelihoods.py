"""How probable a split's images are under a run's TreeVAE: a block of images a task, as a Ray actor computes it.

A block's numbers depend on (tree, images, seed, the block's place) alone, so any number of workers give the same.

Legend: M images, K samples, L leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tdiff.data.shards import read_manifest
from tdiff.data.stream import Reader
from tdiff.seeds import generator
from tdiff.tree.likelihood import bits_per_dimension, dequantised, log_likelihood
from tdiff.tree.model import TreeVAE
from tdiff.work.growing import load_tree
from tdiff.work.reading import as_images, device

BLOCK = 50
"""Images per task: fixed, as their noise is drawn together."""

ROWS_PER_PASS = 500
"""Images times samples that pass the tree at once."""

Arrays = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class LikelihoodJob:
    """The log-likelihood of the first `images` images of a split by K = `samples` samples each, and the ELBO of all
    its images, by one sample beyond those.
    """

    tree_url: str
    data_url: str
    split: str
    images: int
    samples: int
    seed: int
    max_bad_samples: int = 0

    def blocks(self) -> list[tuple[int, int, int]]:
        """(first image, last + 1, samples) of every task."""
        total = read_manifest(self.data_url).samples(self.split)
        sampled = min(self.images, total)
        parts = [(0, sampled, self.samples), (sampled, total, 1)]
        return [(k, min(k + BLOCK, last), samples) for first, last, samples in parts for k in range(first, last, BLOCK)]


@lru_cache(maxsize=1)
def _opened(job: LikelihoodJob) -> tuple[TreeVAE, Reader]:
    """The model and the images, loaded once per worker."""
    manifest = read_manifest(job.data_url)
    reader = Reader(job.data_url, manifest, job.split, max_bad_samples=job.max_bad_samples)
    return load_tree(job.tree_url).eval().requires_grad_(False).to(device()), reader


def likelihood_block(job: LikelihoodJob, first: int, last: int, samples: int) -> Arrays:
    """log_p (NaN with one sample, which is no estimate), effective, elbo, all [B], and leaf_elbo, log_reach [B, L].

    In nats, of densities where the likelihood is Gaussian: then of dequantised images.
    """
    model, reader = _opened(job)
    rng = generator("likelihood", job.seed, first, device=device())
    x = as_images(reader.gather(np.arange(first, last))).to(device())
    if model.spec.likelihood == "gaussian":
        x = dequantised(x, rng)
    per_pass = max(1, ROWS_PER_PASS // len(x))
    found = log_likelihood(model, x, samples=samples, rng=rng, samples_per_pass=per_pass)._asdict()
    del found["leaf_log_p"]
    if samples == 1:
        found["log_p"] = torch.full_like(found["log_p"], torch.nan)
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def joined(blocks: Sequence[Arrays]) -> Arrays:
    """The arrays of all blocks, given in their order, for the whole split."""
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def summary(job: LikelihoodJob, found: Arrays, dimensions: int, density: bool) -> dict[str, Any]:
    """The split's numbers, in nats: means, each with its standard error over images.

    dimensions: values in an image; density: whether the likelihood is one, then bits per dimension stand beside.
    leaf_elbo: mean ELBO of the images whose most probable leaf it is, NaN becomes None where there are none.
    """
    log_p = found["log_p"][~np.isnan(found["log_p"])]
    leaf = found["log_reach"].argmax(1)
    leaves = [found["elbo"][leaf == k] for k in range(found["log_reach"].shape[1])]
    out: dict[str, Any] = {
        "split": job.split,
        "elbo": float(found["elbo"].mean()),
        "elbo_images": len(leaf),
        "elbo_standard_error": _standard_error(found["elbo"]),
        "log_likelihood": float(log_p.mean()) if len(log_p) else None,
        "log_likelihood_images": len(log_p),
        "log_likelihood_samples": job.samples,
        "log_likelihood_standard_error": _standard_error(log_p),
        "effective_samples": float(found["effective"][: len(log_p)].mean()) if len(log_p) else None,
        "leaf_elbo": [float(elbo.mean()) if len(elbo) else None for elbo in leaves],
    }
    if density:
        for name in ("elbo", "log_likelihood"):
            nats = torch.tensor(out[name] if out[name] is not None else torch.nan)
            out[f"{name}_bits_per_dimension"] = float(bits_per_dimension(nats, dimensions))
    return out


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
