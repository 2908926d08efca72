"""How probable a split's images are under a run's TreeVAE: a block of images a task, as a Ray actor computes it.

A block's numbers depend on (tree, images, seed, the block's number) alone, so any number of workers give the same.

Legend: B images of a block, L leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tdiff.config import Config
from tdiff.data.shards import read_manifest
from tdiff.data.stream import Reader
from tdiff.errors import NonFiniteError
from tdiff.hardware import device
from tdiff.seeds import generator, permutation
from tdiff.tree.likelihood import bits_per_dimension, dequantised, log_likelihood
from tdiff.tree.model import TreeVAE
from tdiff.work.growing import load_tree
from tdiff.work.reading import as_images, open_split

BLOCK = 50
"""Images per task that have many samples each: fixed, as their noise is drawn together."""

BLOCK_OF_ONE = 500
"""Images per task that have one."""

ROWS_PER_PASS = 500
"""Images times samples that pass the tree at once."""

Arrays = dict[str, NDArray[np.float64]]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class LikelihoodJob:
    """What to measure: the log-likelihood of some images of a split (`evaluation.likelihood_images`, drawn by the run's
    seed), and the ELBO of all of them, by one sample where there is no more to do.
    """

    tree_url: str
    data_url: str
    split: str
    config: Config

    def blocks(self) -> list[tuple[int, Ids, int]]:
        """Every task: its number, its images (places in the manifest), samples for each. A split's images are often
        sorted by class, so those that have many samples are drawn.
        """
        total, wanted = read_manifest(self.data_url).samples(self.split), self.config.evaluation
        order = permutation(total, "likelihood", self.config.seed)
        sampled, others = np.sort(order[: wanted.likelihood_images]), np.sort(order[wanted.likelihood_images :])
        parts = [(sampled, BLOCK, wanted.likelihood_samples), (others, BLOCK_OF_ONE, 1)]
        cut = [(ids[k : k + size], samples) for ids, size, samples in parts for k in range(0, len(ids), size)]
        return [(number, ids, samples) for number, (ids, samples) in enumerate(cut)]


@lru_cache(maxsize=1)
def _opened(job: LikelihoodJob) -> tuple[TreeVAE, Reader]:
    """The model and the images, loaded once per worker."""
    model = load_tree(job.tree_url).eval().requires_grad_(False).to(device())
    return model, open_split(job.config, job.data_url, job.split)


def likelihood_block(job: LikelihoodJob, number: int, ids: Ids, samples: int) -> Arrays:
    """log_p (NaN with one sample, which is no estimate), effective, elbo, all [B], and leaf_elbo, log_reach [B, L].

    In nats, of densities where the likelihood is Gaussian: then of dequantised images. Raises NonFiniteError.
    """
    model, reader = _opened(job)
    rng = generator("likelihood", job.config.seed, number, device=device())
    x = as_images(reader.gather(ids)).to(device())
    if model.spec.likelihood == "gaussian":
        x = dequantised(x, rng)
    per_pass = max(1, ROWS_PER_PASS // len(x))
    found = log_likelihood(model, x, samples=samples, rng=rng, samples_per_pass=per_pass)._asdict()
    del found["leaf_log_p"]
    for name in ("log_p", "elbo"):
        if not found[name].isfinite().all():
            raise NonFiniteError(
                f"likelihood of {job.split} images: {name} not finite under the tree in {job.tree_url}"
            )
    if samples == 1:
        found["log_p"] = torch.full_like(found["log_p"], torch.nan)
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def joined(blocks: Sequence[tuple[int, Ids, int]], found: Sequence[Arrays]) -> Arrays:
    """The arrays of all blocks put together, in the manifest's order."""
    back = np.argsort(np.concatenate([ids for _, ids, _ in blocks]))
    return {name: np.concatenate([arrays[name] for arrays in found])[back] for name in found[0]}


def summary(job: LikelihoodJob, found: Arrays, dimensions: int, density: bool) -> dict[str, Any]:
    """The split's numbers, in nats: means, each with its standard error over images.

    dimensions: values in an image; density: whether the likelihood is one, then bits per dimension stand beside.
    leaf_elbo: mean ELBO of the images whose most probable leaf it is. None where there are no images.
    """
    sampled = ~np.isnan(found["log_p"])
    log_p = found["log_p"][sampled]
    leaf = found["log_reach"].argmax(1)
    leaves = [found["elbo"][leaf == k] for k in range(found["log_reach"].shape[1])]
    out: dict[str, Any] = {
        "split": job.split,
        "elbo": _mean(found["elbo"]),
        "elbo_images": len(leaf),
        "elbo_standard_error": _standard_error(found["elbo"]),
        "log_likelihood": _mean(log_p),
        "log_likelihood_images": len(log_p),
        "log_likelihood_samples": job.config.evaluation.likelihood_samples,
        "log_likelihood_standard_error": _standard_error(log_p),
        "effective_samples": _mean(found["effective"][sampled]),
        "leaf_elbo": [_mean(elbo) for elbo in leaves],
    }
    for name in ("elbo", "log_likelihood"):
        if density and out[name] is not None:
            nats = torch.tensor(out[name], dtype=torch.float64)
            out[f"{name}_bits_per_dimension"] = float(bits_per_dimension(nats, dimensions))
    return out


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _standard_error(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
