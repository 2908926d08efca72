"""Fréchet distance between two sets of images, from moments that any number of workers can share out.

FID is this distance over the 2048 features of InceptionV3; any other features [B, F] do as well.

    d² = |mu_a - mu_b|² + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))          (Dowson & Landau, 1982)

Legend: B batch, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64s = NDArray[np.float64]


@dataclass
class Moments:
    """Count, sum [F] and sum of outer products [F, F] of feature vectors, all a mean and a covariance need.

    In float64 and without division, so that the moments of parts add up to those of the whole.
    """

    n: int
    sum: Float64s
    outer: Float64s

    @staticmethod
    def empty(features: int) -> Moments:
        """The moments of no vectors."""
        return Moments(0, np.zeros(features), np.zeros((features, features)))

    @staticmethod
    def of(features: Tensor | NDArray[np.floating]) -> Moments:
        """The moments of vectors [B, F]."""
        moments = Moments.empty(features.shape[-1])
        moments.update(features)
        return moments

    def update(self, features: Tensor | NDArray[np.floating]) -> None:
        """Takes in vectors [B, F]. Raises ValueError if one of them is not finite."""
        batch = torch.as_tensor(features).detach().double()
        if batch.ndim != 2 or batch.shape[1] != len(self.sum):
            raise ValueError(f"features must be [B, {len(self.sum)}], not {list(batch.shape)}")
        if not torch.isfinite(batch).all():
            raise ValueError("features hold a value that is not finite: were the images in range?")
        self.n += len(batch)
        self.sum += batch.sum(0).cpu().numpy()
        self.outer += (batch.T @ batch).cpu().numpy()

    def __add__(self, other: Moments) -> Moments:
        if self.sum.shape != other.sum.shape:
            raise ValueError(f"cannot add moments of {len(self.sum)} and of {len(other.sum)} features")
        return Moments(self.n + other.n, self.sum + other.sum, self.outer + other.outer)

    def arrays(self) -> dict[str, Float64s]:
        """What a file keeps of them, the inverse of `from_arrays`."""
        return {"n": np.array([self.n], np.float64), "sum": self.sum, "outer": self.outer}

    @staticmethod
    def from_arrays(arrays: Mapping[str, Float64s]) -> Moments:
        return Moments(int(arrays["n"][0]), arrays["sum"], arrays["outer"])

    @property
    def mean(self) -> Float64s:
        """[F]."""
        if self.n < 1:
            raise ValueError("a mean needs one feature vector, and there are none")
        return self.sum / self.n

    @property
    def covariance(self) -> Float64s:
        """[F, F], unbiased (divided by n - 1), as numpy's and torch-fidelity's."""
        if self.n < 2:
            raise ValueError(f"a covariance needs two feature vectors, not {self.n}")
        return (self.outer - np.outer(self.sum, self.sum) / self.n) / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance of two Gaussians with these moments: FID as it is usually reported.

    S_a S_b has the eigenvalues of the symmetric R^T S_b R with R R^T = S_a. Two symmetric decompositions
    stay real and stable where fewer images than features leave both covariances singular.
    """
    cov_a, cov_b = a.covariance, b.covariance
    if cov_a.shape != cov_b.shape:
        raise ValueError(f"cannot compare moments of {len(cov_a)} and of {len(cov_b)} features")
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0))  # [F, F]
    inner = root.T @ cov_b @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    gap = a.mean - b.mean
    return max(0.0, float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


def frechet_error(features: NDArray[np.floating], reference: Moments, resamples: int, seed: int) -> float:
    """Standard error of the distance of images with these features [M, F] to a reference, by the bootstrap.

    It covers the chance of which images were drawn, not that of the reference nor of the training. Every resample
    costs two eigendecompositions of [F, F].
    """
    rng = np.random.default_rng(seed)
    rows = np.asarray(features)
    found = [
        frechet_distance(Moments.of(rows[rng.integers(0, len(rows), len(rows))]), reference) for _ in range(resamples)
    ]
    return float(np.std(found, ddof=1))
