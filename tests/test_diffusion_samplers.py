"""Protects the samplers: on Gaussian data, where the exact noise is known, they must give back the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tdiff.diffusion.condition import Denoiser, DenoiserSpec
from tdiff.diffusion.process import Schedule, denoising_loss, stratified_steps
from tdiff.diffusion.samplers import ddim, ddpm, guided, noise_from, quadratic_grid, uniform_grid
from tdiff.diffusion.unet import UNetSpec
from tdiff.tree.model import Path

torch.set_num_threads(1)

SCHEDULE = Schedule()
MEAN, STD = 0.15, 0.2


def exact(x_t: Tensor, t: Tensor) -> Tensor:
    """E[noise | x_t] for images of independent pixels N(MEAN, STD²)."""
    bar = SCHEDULE.alpha_bar(int(t[0]))
    return (1 - bar) ** 0.5 * (x_t - bar**0.5 * MEAN) / (bar * STD**2 + 1 - bar)


def transported(x: Tensor, t: int) -> Tensor:
    """Where the probability flow takes x from step t to t = 0: the same number of standard deviations from the mean."""
    bar = SCHEDULE.alpha_bar(t)
    return MEAN + STD * (x - bar**0.5 * MEAN) / (bar * STD**2 + 1 - bar) ** 0.5


def test_quadratic_grid_is_the_papers() -> None:
    grid = quadratic_grid(1000, 100)
    assert len(grid) == 96
    assert (grid[0], grid[-1]) == (800, 0)
    formula = np.floor(np.linspace(0, np.sqrt(0.8 * 1000), 100) ** 2).astype(int)
    assert grid == sorted(set(formula.tolist()), reverse=True)


def test_uniform_grid_spans_all_steps() -> None:
    assert uniform_grid(1000, 1000) == list(range(999, -1, -1))
    assert uniform_grid(1000, 2) == [999, 0]
    assert len(uniform_grid(1000, 50)) == 50


@pytest.mark.parametrize("count", [1, 11])
@pytest.mark.parametrize("grid", [uniform_grid, quadratic_grid])
def test_impossible_grids_are_refused(grid: object, count: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {count}"):
        grid(10, count)  # type: ignore[operator]


@pytest.mark.parametrize("grid", [[], [1000, 0], [5, 5], [3, 8], [4, -1]])
def test_a_grid_that_does_not_fall_is_refused(grid: list[int]) -> None:
    with pytest.raises(ValueError, match="must fall"):
        ddim(exact, torch.zeros(1, 1, 1, 1), SCHEDULE, grid)


@pytest.mark.parametrize("make_grid", [uniform_grid, quadratic_grid])
def test_ddim_approaches_the_probability_flow(make_grid: object) -> None:
    x = torch.tensor([-2.0, -1, 0, 1, 2], dtype=torch.float64)[:, None, None, None]
    errors = []
    for count in (10, 100, 1000):
        grid = make_grid(1000, count)  # type: ignore[operator]
        errors.append((ddim(exact, x, SCHEDULE, grid) - transported(x, grid[0])).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    # All the steps that the schedule has, and still a method of first order.
    assert errors[2] < 0.02 * STD


def test_ddim_gives_the_data_back() -> None:
    # The map is affine, so mean and spread of the result follow from two points, without sampling.
    at = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    low, high = ddim(exact, at, SCHEDULE, uniform_grid(1000, 1000)).flatten().tolist()
    assert low == pytest.approx(MEAN, abs=0.01)
    assert high - low == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim, eta 1", "ddim, eta 0.5"])
def test_stochastic_samplers_give_the_data_back(sampler: str) -> None:
    rng, count = torch.Generator().manual_seed(0), 8000
    x = torch.randn(count, 1, 1, 1, generator=rng)
    grid = uniform_grid(1000, 250)
    if sampler == "ddpm":
        out = ddpm(exact, x, SCHEDULE, grid, noise_from(rng))
    else:
        out = ddim(exact, x, SCHEDULE, grid, float(sampler.split()[-1]), noise_from(rng))
    assert out.mean().item() == pytest.approx(MEAN, abs=4 * STD / count**0.5 + 0.005)
    assert out.std().item() == pytest.approx(STD, rel=0.05)


def test_ddim_with_eta_one_is_ddpm() -> None:
    x, grid = torch.randn(6, 2, 3, 3, dtype=torch.float64), quadratic_grid(1000, 20)
    first = ddpm(exact, x, SCHEDULE, grid, noise_from(torch.Generator().manual_seed(1)))
    second = ddim(exact, x, SCHEDULE, grid, 1.0, noise_from(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(first, second)


def test_results_repeat_and_stay_in_range() -> None:
    x, grid = 3 * torch.randn(4, 1, 4, 4), uniform_grid(1000, 10)

    def wild(x_t: Tensor, t: Tensor) -> Tensor:
        return 5 * x_t.sin()

    runs = [ddpm(wild, x, SCHEDULE, grid, noise_from(torch.Generator().manual_seed(7))) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(ddim(wild, x, SCHEDULE, grid), ddim(wild, x, SCHEDULE, grid))
    for image in (runs[0], ddim(wild, x, SCHEDULE, grid)):
        assert image.abs().max() <= 1


def test_the_network_is_asked_once_a_step_with_int64() -> None:
    asked: list[int] = []

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        assert t.dtype == torch.int64
        asked.append(int(t[0]))
        return x_t

    ddim(predict, torch.randn(2, 1, 2, 2), SCHEDULE, quadratic_grid(1000, 100))
    assert asked == quadratic_grid(1000, 100)


def test_noise_that_is_needed_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"eta is 0\.5"):
        ddim(exact, torch.zeros(1, 1, 1, 1), SCHEDULE, [5, 0], eta=0.5)


def test_guidance() -> None:
    def never(x_t: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("weight 0 asks only the conditional prediction")

    x, t, grid = torch.randn(2, 1, 2, 2), torch.tensor([3, 3]), quadratic_grid(1000, 10)
    assert torch.equal(ddim(guided(exact, never, 0.0), x, SCHEDULE, grid), ddim(exact, x, SCHEDULE, grid))
    torch.testing.assert_close(guided(exact, lambda x, t: x, 2.0)(x, t), 3 * exact(x, t) - 2 * x)
    torch.testing.assert_close(guided(exact, exact, 1.5)(x, t), exact(x, t))


def test_a_trained_denoiser_draws_the_image_of_its_leaf() -> None:
    """End to end: two leaves, one dark and one bright image each; the path decides which is drawn."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    unet = UNetSpec(1, 4, 16, (1,), (), blocks=1, heads=2, dropout=0)
    net = Denoiser(DenoiserSpec(unet, "path", "embedding", nodes=3, latent_size=4, null=True))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)

    def paths(leaf: Tensor) -> Path:
        z = torch.randn(len(leaf), 2, 1, 2, 2, generator=rng)
        return Path(z, torch.stack([torch.zeros_like(leaf), leaf + 1], 1), leaf, torch.full((len(leaf), 2), 0.5))

    for _ in range(250):
        leaf = torch.randint(2, (32,), generator=rng)
        x0 = (leaf.float() - 0.5)[:, None, None, None].expand(-1, 1, 4, 4)  # -1/2 or 1/2
        path, drop = paths(leaf), torch.rand(32, generator=rng) < 0.1
        t, noise = stratified_steps(32, 1000, rng), torch.randn(x0.shape, generator=rng)
        loss = denoising_loss(lambda x, t, path=path, drop=drop: net(x, t, path, None, drop), SCHEDULE, x0, t, noise)
        optimiser.zero_grad()
        loss.mean.backward()
        optimiser.step()

    leaf = torch.arange(8) % 2
    path, nothing = paths(leaf), torch.ones(8, dtype=torch.bool)
    predict = guided(lambda x, t: net(x, t, path), lambda x, t: net(x, t, path, None, nothing), 0.5)
    images = ddim(predict, torch.randn(8, 1, 4, 4, generator=rng), SCHEDULE, quadratic_grid(1000, 15))
    torch.testing.assert_close(images.mean((1, 2, 3)), leaf.float() - 0.5, rtol=0, atol=0.2)
