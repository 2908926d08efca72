"""Protects the samplers: against closed forms where the exact noise is known, and against diffusers' schedulers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from tdiff.diffusion.condition import Denoiser, DenoiserSpec
from tdiff.diffusion.process import Edm, Predict, Process, Time, VariancePreserving, make_process
from tdiff.diffusion.samplers import (
    GRIDS,
    SAMPLERS,
    Sampler,
    ddim,
    ddpm,
    dpm_solver,
    guided,
    heun,
    karras_levels,
    network_evaluations,
    noise_from,
    quadratic_grid,
    run_sampler,
    time_grid,
    uniform_grid,
    unipc,
)
from tdiff.diffusion.unet import UNetSpec
from tdiff.tree.model import Path

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

VP, EDM = VariancePreserving(), Edm()
MEAN, STD = 0.15, 0.2


def exact_for(process: Process) -> Predict:
    """E[noise | x_t] for images of independent pixels N(MEAN, STD²)."""

    def predict(x_t: Tensor, t: Time) -> Tensor:
        bar = process.alpha_bar(t)
        return (1 - bar) ** 0.5 * (x_t - bar**0.5 * MEAN) / (bar * STD**2 + 1 - bar)

    return predict


exact = exact_for(VP)


def moments(process: Process, t: Time) -> tuple[float, float]:
    """Mean and standard deviation of x_t for these images."""
    bar = process.alpha_bar(t)
    return bar**0.5 * MEAN, (bar * STD**2 + 1 - bar) ** 0.5


def transported(x: Tensor, t: int) -> Tensor:
    """Where the probability flow takes x from step t to t = 0: the same number of standard deviations from the mean."""
    mean, std = moments(VP, t)
    return MEAN + STD * (x - mean) / std


def ideal(process: Process, x: Tensor, grid: Sequence[Time]) -> Tensor:
    """What an exact solver gives: the probability flow from the first time to the last, and the x0 seen there."""
    (mean, std), (last_mean, last_std) = moments(process, grid[0]), moments(process, grid[-1])
    x_last = last_mean + last_std * (x - mean) / std
    bar = process.alpha_bar(grid[-1])
    return (x_last - (1 - bar) ** 0.5 * exact_for(process)(x_last, grid[-1])) / bar**0.5


def points() -> Tensor:
    return torch.tensor([-2.0, -1, 0, 1, 2], dtype=torch.float64)[:, None, None, None]


# --- grids -------------------------------------------------------------------------------------------


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


def test_karras_levels_are_even_in_their_seventh_root() -> None:
    levels = karras_levels(0.002, 80.0, 18)
    assert (levels[0], levels[-1], len(levels)) == (80.0, 0.002, 18)
    roots = np.array(levels) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17, rtol=1e-10)
    assert time_grid(EDM, "karras", 18) == levels


def test_karras_grid_of_whole_steps() -> None:
    grid = time_grid(VP, "karras", 20)
    assert (grid[0], grid[-1], len(grid)) == (999, 0, 20)
    for t, level in zip(grid, karras_levels(VP.level(0), VP.level(999), 20), strict=True):
        assert isinstance(t, int)
        nearest = [abs(math.log(VP.level(s) / level)) for s in range(1000)]
        assert nearest[t] == min(nearest)


def test_time_grid_by_name() -> None:
    assert time_grid(VP, "quadratic", 100) == quadratic_grid(1000, 100)
    assert time_grid(VP, "uniform", 100) == uniform_grid(1000, 100)
    for grid in ("quadratic", "uniform"):
        with pytest.raises(ValueError, match=f"grid is '{grid}'.* take 'karras'"):
            time_grid(EDM, grid, 100)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 11])
@pytest.mark.parametrize("grid", [uniform_grid, quadratic_grid])
def test_impossible_grids_are_refused(grid: object, count: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {count}"):
        grid(10, count)  # type: ignore[operator]


@pytest.mark.parametrize(("process", "count"), [(VariancePreserving(10), 1), (VariancePreserving(10), 11), (EDM, 1)])
@pytest.mark.parametrize("name", GRIDS)
def test_impossible_grids_are_refused_by_name(process: Process, count: int, name: Any) -> None:
    with pytest.raises(ValueError, match=rf"steps is {count}|take 'karras'"):
        time_grid(process, name, count)


@pytest.mark.parametrize("grid", [[], [5, 5], [3, 8]])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_grid_that_does_not_fall_is_refused(sampler: Sampler, grid: list[int]) -> None:
    with pytest.raises(ValueError, match="must fall"):
        run_sampler(sampler, exact, torch.zeros(1, 1, 1, 1), VP, grid, noise_from(torch.Generator()))


@pytest.mark.parametrize(
    ("process", "grid"), [(VP, [1000, 0]), (VP, [4, -1]), (VP, [2.5, 0]), (EDM, [1.0, 0.0]), (EDM, [math.inf, 1.0])]
)
def test_a_grid_that_leaves_the_process_is_refused(process: Process, grid: list[Time]) -> None:
    with pytest.raises(ValueError, match=r"t is .*, but the (steps|times) of this process"):
        ddim(exact_for(process), torch.zeros(1, 1, 1, 1), process, grid)


# --- on a Gaussian -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make_grid", [uniform_grid, quadratic_grid])
def test_ddim_approaches_the_probability_flow(make_grid: object) -> None:
    x = points()
    errors = []
    for count in (10, 100, 1000):
        grid = make_grid(1000, count)  # type: ignore[operator]
        errors.append((ddim(exact, x, VP, grid) - transported(x, grid[0])).abs().max().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    # All the steps that the schedule has, and still a method of first order.
    assert errors[2] < 0.02 * STD


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddim, 1), (dpm_solver, 2), (heun, 2), pytest.param(unipc, 3, id="unipc: UniC adds one")]
)
def test_order_of_convergence(sampler: Callable[..., Tensor], order: int) -> None:
    x, errors = points(), []
    for count in (80, 160, 320):
        grid = time_grid(EDM, "karras", count)
        errors.append((sampler(exact_for(EDM), x, EDM, grid, clip=False) - ideal(EDM, x, grid)).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["karras", "quadratic"])
def test_higher_order_pays_with_whole_steps(name: Any) -> None:
    x, grid = points(), time_grid(VP, name, 40)
    first = (ddim(exact, x, VP, grid, clip=False) - ideal(VP, x, grid)).abs().max().item()
    for sampler in (dpm_solver, unipc, heun):
        assert (sampler(exact, x, VP, grid, clip=False) - ideal(VP, x, grid)).abs().max().item() < first / 5


def test_ddpm_converges_in_distribution_with_order_one() -> None:
    """Linear in its start and its noises, so a unit impulse of each gives the result's mean and spread exactly."""
    errors = []
    for count in (80, 160, 320):
        grid = time_grid(EDM, "karras", count)
        impulses = torch.zeros(count + 1, 1, 1, 1, dtype=torch.float64)
        impulses[1] = 1  # the start; row 0 has none at all
        asked = iter(range(2, count + 1))

        def impulse(t: Time, x: Tensor, asked: Any = asked) -> Tensor:
            return (torch.arange(len(x)) == next(asked)).to(x.dtype)[:, None, None, None]

        out = ddpm(exact_for(EDM), impulses, EDM, grid, impulse, clip=False).flatten()
        assert out[0].item() == pytest.approx(MEAN, abs=1e-3)
        mean, std = moments(EDM, grid[0])
        spread = ideal(EDM, torch.tensor(mean + std, dtype=torch.float64), grid).item() - MEAN
        errors.append(abs((out[1:] - out[0]).norm().item() - spread))
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.15)


def test_ddim_on_the_quadratic_grid_against_its_closed_form() -> None:
    """Every step moves the distance from the mean by (signal_s signal_t STD² + sigma_s sigma_t) / variance of x_t."""
    grid = quadratic_grid(1000, 50)
    bars = np.array([VP.alpha_bar(t) for t in grid])
    signal, sigma = np.sqrt(bars), np.sqrt(1 - bars)
    factors = (signal[1:] * signal[:-1] * STD**2 + sigma[1:] * sigma[:-1]) / (bars * STD**2 + 1 - bars)[:-1]
    seen = signal[-1] * STD**2 / (bars[-1] * STD**2 + 1 - bars[-1])  # of the distance, in the last x0
    x = points()
    expected = MEAN + seen * factors.prod() * (x - signal[0] * MEAN)
    torch.testing.assert_close(ddim(exact, x, VP, grid, clip=False), expected, rtol=1e-10, atol=1e-12)


def test_ddim_gives_the_data_back() -> None:
    # The map is affine, so mean and spread of the result follow from two points, without sampling.
    at = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    low, high = ddim(exact, at, VP, uniform_grid(1000, 1000)).flatten().tolist()
    assert low == pytest.approx(MEAN, abs=0.01)
    assert high - low == pytest.approx(STD, rel=0.01)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", [VP, EDM])
def test_every_sampler_gives_the_data_back(process: Process, sampler: Sampler) -> None:
    rng, count = torch.Generator().manual_seed(0), 8000
    x = torch.randn(count, 1, 1, 1, generator=rng)
    grid = time_grid(process, "karras", 400)  # of first order are ddim and ddpm
    out = run_sampler(sampler, exact_for(process), x, process, grid, noise_from(rng))
    assert out.dtype == torch.float32
    assert out.mean().item() == pytest.approx(MEAN, abs=4 * STD / count**0.5 + 0.005)
    assert out.std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim, eta 1", "ddim, eta 0.5"])
def test_stochastic_samplers_give_the_data_back(sampler: str) -> None:
    rng, count = torch.Generator().manual_seed(0), 8000
    x = torch.randn(count, 1, 1, 1, generator=rng)
    grid = uniform_grid(1000, 250)
    if sampler == "ddpm":
        out = ddpm(exact, x, VP, grid, noise_from(rng))
    else:
        out = ddim(exact, x, VP, grid, float(sampler.split()[-1]), noise_from(rng))
    assert out.mean().item() == pytest.approx(MEAN, abs=4 * STD / count**0.5 + 0.005)
    assert out.std().item() == pytest.approx(STD, rel=0.05)


def test_ddim_with_eta_one_is_ddpm() -> None:
    x, grid = torch.randn(6, 2, 3, 3, dtype=torch.float64), quadratic_grid(1000, 20)
    first = ddpm(exact, x, VP, grid, noise_from(torch.Generator().manual_seed(1)))
    second = ddim(exact, x, VP, grid, 1.0, noise_from(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(first, second)


def test_eta_by_a_sampler_s_name() -> None:
    x, grid = torch.randn(6, 2, 3, 3, dtype=torch.float64), quadratic_grid(1000, 20)
    found = {
        eta: run_sampler("ddim", exact, x, VP, grid, noise_from(torch.Generator().manual_seed(1)), eta)
        for eta in (0.0, 0.3, 1.0)
    }
    assert torch.equal(found[0.0], ddim(exact, x, VP, grid))
    assert torch.equal(found[0.3], ddim(exact, x, VP, grid, 0.3, noise_from(torch.Generator().manual_seed(1))))
    by_ddpm = run_sampler("ddpm", exact, x, VP, grid, noise_from(torch.Generator().manual_seed(1)))
    torch.testing.assert_close(found[1.0], by_ddpm)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
def test_eta_has_a_meaning_for_ddim_only(sampler: Sampler) -> None:
    x, noise = torch.zeros(1, 1, 1, 1), noise_from(torch.Generator())
    with pytest.raises(ValueError, match=re.escape(f"eta=0.5 has no effect with sampler={sampler}: take sampler=ddim")):
        run_sampler(sampler, exact, x, VP, [5, 0], noise, 0.5)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_is_a_share(eta: float) -> None:
    with pytest.raises(ValueError, match="cannot be used: take from 0 to 1"):
        run_sampler("ddim", exact, torch.zeros(1, 1, 1, 1), VP, [5, 0], noise_from(torch.Generator()), eta)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", [VP, EDM])
def test_results_repeat_and_stay_in_range(process: Process, sampler: Sampler) -> None:
    x, grid = 3 * torch.randn(4, 1, 4, 4), time_grid(process, "karras", 10)

    def wild(x_t: Tensor, t: Time) -> Tensor:
        return 5 * x_t.sin()

    one, two = (
        run_sampler(sampler, wild, x, process, grid, noise_from(torch.Generator().manual_seed(7))) for _ in range(2)
    )
    assert torch.equal(one, two)
    assert one.abs().max() <= 1


# --- against diffusers -------------------------------------------------------------------------------


BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def two_modes(x_t: Tensor, t: Time) -> Tensor:
    """E[noise | x_t] for pixels that are -0.6 or 0.8 with spread 0.1: a smooth prediction, and far from linear."""
    bar = VP.alpha_bar(int(t))
    centres, variance = torch.tensor([-0.6, 0.8], dtype=x_t.dtype), bar * 0.1**2 + 1 - bar
    off = x_t[..., None] - bar**0.5 * centres
    share = (-off.square() / (2 * variance)).softmax(-1)
    return (1 - bar) ** 0.5 / variance * (share * off).sum(-1)


def theirs(scheduler: Any, x: Tensor, grid: Sequence[Time], **settings: Any) -> Tensor:
    """x through one of diffusers' schedulers, which has been told its steps."""
    for t in grid:
        x = scheduler.step(two_modes(x, t), int(t), x, **settings).prev_sample
    return x


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("count", [10, 28, 112])
def test_ddim_on_the_uniform_grid_against_diffusers(count: int, clip: bool) -> None:
    scheduler = DDIMScheduler(**BETAS, clip_sample=clip)
    scheduler.set_timesteps(count - 1)  # whose stride is that of our grid, which ends in 0 and not above it
    grid = uniform_grid(1000, count)
    assert grid[0] - grid[1] == 1000 // scheduler.num_inference_steps
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    out = ddim(two_modes, x, VP, grid, clip=clip)
    torch.testing.assert_close(out, theirs(scheduler, x, grid, use_clipped_model_output=clip), rtol=0, atol=1e-4)


def test_ddim_with_noise_against_diffusers() -> None:
    scheduler, grid = DDIMScheduler(**BETAS), uniform_grid(1000, 28)
    scheduler.set_timesteps(27)
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    out = ddim(two_modes, x, VP, grid, 0.6, noise_from(torch.Generator().manual_seed(1)))
    rng = torch.Generator().manual_seed(1)
    expected = theirs(scheduler, x, grid, eta=0.6, use_clipped_model_output=True, generator=rng)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


# With final_sigmas_type "zero" their last step, of first order, is the x0 of the last time, as ours is.
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("count", [5, 10, 20, 50])
@pytest.mark.parametrize(
    ("sampler", "scheduler"), [(dpm_solver, DPMSolverMultistepScheduler), (unipc, UniPCMultistepScheduler)]
)
def test_multistep_solvers_against_diffusers(sampler: Any, scheduler: Any, count: int, spacing: str) -> None:
    scheduler = scheduler(**BETAS, solver_order=2, timestep_spacing=spacing, final_sigmas_type="zero")
    scheduler.set_timesteps(count)
    grid = [int(t) for t in scheduler.timesteps]
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    out = sampler(two_modes, x, VP, grid, clip=False)
    torch.testing.assert_close(out, theirs(scheduler, x, grid), rtol=0, atol=1e-4)


@pytest.mark.parametrize("count", [10, 20])
def test_dpm_solver_on_the_quadratic_grid_against_diffusers(count: int) -> None:
    scheduler, grid = DPMSolverMultistepScheduler(**BETAS, solver_order=2), quadratic_grid(1000, count)
    scheduler.set_timesteps(timesteps=grid)
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        dpm_solver(two_modes, x, VP, grid, clip=False), theirs(scheduler, x, grid), rtol=0, atol=1e-4
    )


# --- what the network is asked -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", [VP, EDM])
def test_the_network_is_asked_as_often_as_is_said(process: Process, sampler: Sampler) -> None:
    asked = 0

    def network(x: Tensor, label: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        return x

    grid, noise = time_grid(process, "karras", 20), noise_from(torch.Generator())
    run_sampler(sampler, process.predictor(network), torch.randn(2, 1, 2, 2), process, grid, noise)
    assert asked == network_evaluations(sampler, process, grid) == (39 if sampler == "heun" else 20)


def test_the_network_is_asked_once_a_step_with_int64() -> None:
    asked: list[int] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        assert t.dtype == torch.int64
        assert t[0] == t[1]
        asked.append(int(t[0]))
        return x_t

    ddim(VP.predictor(network), torch.randn(2, 1, 2, 2), VP, quadratic_grid(1000, 100))
    assert asked == quadratic_grid(1000, 100)


def test_noise_that_is_needed_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"eta is 0\.5"):
        ddim(exact, torch.zeros(1, 1, 1, 1), VP, [5, 0], eta=0.5)


# --- guidance ----------------------------------------------------------------------------------------


def never(x_t: Tensor, t: Time) -> Tensor:
    raise AssertionError("only the conditional prediction is needed")


def test_guidance() -> None:
    x, t, grid = torch.randn(2, 1, 2, 2), 3, quadratic_grid(1000, 10)
    assert torch.equal(ddim(guided(exact, never, 0.0, VP), x, VP, grid), ddim(exact, x, VP, grid))
    torch.testing.assert_close(guided(exact, lambda x, t: x, 2.0, VP)(x, t), 3 * exact(x, t) - 2 * x)
    torch.testing.assert_close(guided(exact, exact, 1.5, VP)(x, t), exact(x, t))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", [VP, EDM])
def test_guidance_within_an_interval(process: Process, sampler: Sampler) -> None:
    grid = time_grid(process, "karras", 30)
    interval = process.level(grid[20]), process.level(grid[10])  # both ends are inside
    conditional, alone = exact_for(process), []

    def null(x_t: Tensor, t: Time) -> Tensor:
        alone.append(t)
        return x_t

    x = torch.randn(2, 1, 2, 2)
    predict = guided(conditional, null, 2.0, process, interval)
    for k, t in enumerate(grid):
        plain = conditional(x, t)
        assert torch.equal(predict(x, t), 3 * plain - 2 * x if 10 <= k <= 20 else plain)
    alone.clear()
    run_sampler(sampler, predict, x, process, grid, noise_from(torch.Generator().manual_seed(0)))
    assert sorted(set(alone), reverse=True) == grid[10:21]
    plain_evaluations = network_evaluations(sampler, process, grid)
    assert network_evaluations(sampler, process, grid, 2.0, interval) == plain_evaluations + len(alone)
    assert network_evaluations(sampler, process, grid, 2.0) == 2 * plain_evaluations
    assert network_evaluations(sampler, process, grid, 0.0, interval) == plain_evaluations


def test_guidance_sharpens_where_it_is_active() -> None:
    """Condition N(MEAN, STD²), null N(0, 1): guidance pulls towards the condition's mean and narrows."""
    at = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    grid, spreads = time_grid(EDM, "karras", 100), []

    def null(x_t: Tensor, t: Time) -> Tensor:
        return (1 - EDM.alpha_bar(t)) ** 0.5 * x_t  # E[noise | x_t] for x_0 from N(0, 1)

    for interval in ((1e3, 1e4), (0.3, 3.0), (0.0, 1e4)):
        low, high = ddim(guided(exact_for(EDM), null, 1.0, EDM, interval), at, EDM, grid).flatten().tolist()
        spreads.append(high - low)
    assert spreads[0] == pytest.approx(STD, rel=0.05)
    assert spreads[0] > 1.02 * spreads[1] > 1.02**2 * spreads[2]


@pytest.mark.parametrize("interval", [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0)])
def test_an_interval_that_does_not_rise_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="interval is"):
        guided(exact, exact, 1.0, VP, interval)


# --- a network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "sampler"), [("noise", "ddim"), ("v", "dpm-solver++"), ("edm", "heun")])
def test_a_trained_denoiser_draws_the_image_of_its_leaf(objective: Any, sampler: Sampler) -> None:
    """End to end: two leaves, one dark and one bright image each; the path decides which is drawn."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    unet = UNetSpec(1, 4, 16, (1,), (), blocks=1, heads=2, dropout=0)
    net = Denoiser(DenoiserSpec(unet, "path", "embedding", nodes=3, latent_size=4, null=True, objective=objective))
    process = make_process(objective, 1000)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)

    def paths(leaf: Tensor) -> Path:
        z = torch.randn(len(leaf), 2, 1, 2, 2, generator=rng)
        return Path(z, torch.stack([torch.zeros_like(leaf), leaf + 1], 1), leaf, torch.full((len(leaf), 2), 0.5))

    for _ in range(250):
        leaf = torch.randint(2, (32,), generator=rng)
        x0 = (leaf.float() - 0.5)[:, None, None, None].expand(-1, 1, 4, 4)  # -1/2 or 1/2
        path, drop = paths(leaf), torch.rand(32, generator=rng) < 0.1
        t, noise = process.draw_times(32, rng), torch.randn(x0.shape, generator=rng)
        loss = process.loss(lambda x, t, path=path, drop=drop: net(x, t, path, None, drop), x0, t, noise)
        optimiser.zero_grad()
        loss.mean.backward()
        optimiser.step()

    leaf = torch.arange(8) % 2
    path, nothing = paths(leaf), torch.ones(8, dtype=torch.bool)
    told = process.predictor(lambda x, t: net(x, t, path))
    predict = guided(told, process.predictor(lambda x, t: net(x, t, path, None, nothing)), 0.5, process)
    x, grid = (
        torch.randn(8, 1, 4, 4, generator=rng),
        time_grid(process, "karras" if objective == "edm" else "quadratic", 15),
    )
    images = run_sampler(sampler, predict, x, process, grid, noise_from(rng))
    torch.testing.assert_close(images.mean((1, 2, 3)), leaf.float() - 0.5, rtol=0, atol=0.2)
