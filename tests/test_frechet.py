"""Protects FID: moments that add up to the whole however workers share the images, and the distance against
torch-fidelity's own formula, scipy's matrix square root and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from tdiff.evaluation.frechet import Moments, frechet_distance

torch.set_num_threads(1)


def like_inception(rng: np.random.Generator, n: int, features: int, shift: float = 0.0) -> np.ndarray:
    """Positive, correlated features of mean about 0.5, float32 as a network gives them."""
    mixing = np.random.default_rng(99).normal(size=(features, features)) / np.sqrt(features)
    return np.abs(0.4 + shift + 0.3 * rng.normal(size=(n, features)) @ mixing).astype(np.float32)


def torch_fidelity(a: np.ndarray, b: np.ndarray) -> float:
    statistics = [fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (a, b)]
    return float(fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 120), max_size=6), order=st.randoms())
def test_moments_of_parts_add_up_to_those_of_the_whole(seed: int, cuts: list[int], order: object) -> None:
    x = like_inception(np.random.default_rng(seed), 120, 7)
    whole = Moments.of(x)
    parts = [Moments.of(part) for part in np.split(x, sorted(cuts))]
    order.shuffle(parts)  # type: ignore[attr-defined]
    total = sum(parts, Moments.empty(7))
    assert total.n == whole.n == 120
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-10)
    scale = np.abs(whole.covariance).max()
    np.testing.assert_allclose(total.covariance, whole.covariance, rtol=1e-10, atol=1e-10 * scale)
    assert frechet_distance(total, whole) < 1e-7 * np.trace(whole.covariance)


def test_moments_are_numpys() -> None:
    x = like_inception(np.random.default_rng(0), 500, 12)
    moments = Moments.empty(12)
    for batch in torch.from_numpy(x).split(64):
        moments.update(batch)
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-14)
    assert moments.sum.dtype == moments.outer.dtype == np.float64


def test_adding_leaves_the_parts_alone() -> None:
    a, b = Moments.of(np.ones((3, 2))), Moments.of(np.zeros((2, 2)))
    total = a + b
    total.update(np.ones((1, 2)))
    assert (a.n, b.n, total.n) == (3, 2, 6)
    assert a.sum.tolist() == [3, 3]


@pytest.mark.parametrize("n", [400, 60], ids=["full rank", "fewer images than features"])
def test_distance_is_torch_fidelitys(n: int) -> None:
    rng = np.random.default_rng(1)
    a, b = like_inception(rng, n, 96), like_inception(rng, n + 20, 96, shift=0.1)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(torch_fidelity(a, b), rel=1e-3)


def test_distance_is_scipys() -> None:
    rng = np.random.default_rng(2)
    a, b = Moments.of(like_inception(rng, 300, 40)), Moments.of(1.3 * like_inception(rng, 300, 40))
    root = sqrtm(a.covariance @ b.covariance)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * np.real(root))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def gaussian(n: int, mean: np.ndarray, covariance: np.ndarray) -> Moments:
    """Moments whose mean and covariance are exactly these."""
    return Moments(n, n * mean, (n - 1) * covariance + n * np.outer(mean, mean))


def test_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    std_a, std_b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 0.25])
    found = frechet_distance(gaussian(10, mean_a, np.diag(std_a**2)), gaussian(20, mean_b, np.diag(std_b**2)))
    assert found == pytest.approx(((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum(), rel=1e-12)


def test_distance_is_symmetric_and_zero_to_itself() -> None:
    rng = np.random.default_rng(3)
    a, b = Moments.of(like_inception(rng, 50, 64)), Moments.of(like_inception(rng, 90, 64, 0.05))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert 0 <= frechet_distance(a, a) < 1e-6


def test_bad_input_gives_one_clear_sentence() -> None:
    with pytest.raises(ValueError, match="two feature vectors, not 1"):
        frechet_distance(Moments.of(np.ones((1, 3))), Moments.of(np.ones((4, 3))))
    with pytest.raises(ValueError, match="3 and of 4 features"):
        frechet_distance(Moments.of(np.ones((5, 3))), Moments.of(np.ones((5, 4))))
    with pytest.raises(ValueError, match=r"must be \[B, 3\]"):
        Moments.empty(3).update(np.ones((2, 4)))
    with pytest.raises(ValueError, match="not finite"):
        Moments.empty(2).update(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="none"):
        _ = Moments.empty(2).mean
