"""From noise to images: one plain function a sampler, over any `predict(x_t, t) -> noise` and any process.

`predict` takes x_t [B, I, H, H] and one time t, and gives the predicted noise: `process.predictor(network)`, maybe
`guided`. Step-wise noise comes from an explicit `Noise`, so a run can be repeated. All coefficients are float64 numbers
of Python, only images are tensors. A grid is a falling list of S times. x starts as N(0, I) at the grid's first time;
the x0 predicted at its last is the result. A start other than pure noise is `process.q_sample(image, grid[0], noise)`.

    sampler          order    networks asked    draws noise
    ddpm             1        S                 yes
    ddim             1        S                 with eta > 0
    dpm-solver++     2        S
    unipc            3        S
    heun             2        2 S - 1

The order is that of the error in S, between the first and the last time. What is solved is (Song et al., 2021)

    d xbar / d level = eps(x_t, t),    xbar = x_t / signal_t,  level = sigma_t / signal_t

or, exactly in its linear part and with h the rise of lambda = -ln level (Lu et al., 2022),

    x_s = sigma_s / sigma_t x_t + sigma_s * integral of e^u x0(u) du from lambda_t to lambda_s = lambda_t + h

`clip`: whether every predicted x0 is clipped to [-1, 1] (and the noise taken that fits it).

Legend: B batch, I image channels, H = W image size, T steps of the process, S times of the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import expm1, inf, log, sqrt
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tdiff.diffusion.process import Predict, Process, Time, VariancePreserving

Noise = Callable[[Time, Tensor], Tensor]  # (t, x_t) -> standard normal like x_t, added on the way down from t
Interval = tuple[float, float]
ALWAYS: Interval = (0.0, inf)

Sampler = Literal["ddim", "ddpm", "dpm-solver++", "unipc", "heun"]
SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
Grid = Literal["quadratic", "uniform", "karras"]
GRIDS: tuple[Grid, ...] = get_args(Grid)
Start = Literal["noise", "recon"]
STARTS: tuple[Start, ...] = get_args(Start)


def noise_from(rng: torch.Generator) -> Noise:
    """Noise drawn in sequence from one generator, on the generator's device, then moved to x_t's."""

    def noise(t: Time, x_t: Tensor) -> Tensor:
        return torch.randn(x_t.shape, generator=rng, device=rng.device, dtype=x_t.dtype).to(x_t.device)

    return noise


# --- grids -------------------------------------------------------------------------------------------


def _check(total: int, count: int) -> None:
    if not 2 <= count <= total:
        raise ValueError(f"steps is {count}, but a sampler takes from 2 to the schedule's {total}")


def _falling(steps: Sequence[int]) -> list[int]:
    """The steps from the last to the first, duplicates dropped."""
    return sorted(set(steps), reverse=True)


def uniform_grid(total: int, count: int) -> list[int]:
    """S = `count` steps evenly from T - 1 down to 0, T = `total`. Raises ValueError unless 2 <= S <= T."""
    _check(total, count)
    return _falling([k * (total - 1) // (count - 1) for k in range(count)])


def quadratic_grid(total: int, count: int) -> list[int]:
    """t_k = floor(linspace(0, sqrt(0.8 T), S)²), falling, duplicates dropped.

    T = 1000, S = 100 leaves 96 steps from 800 down to 0. Raises ValueError unless 2 <= S <= T.
    """
    _check(total, count)
    # In whole numbers, so that no rounding of a square root moves a step.
    return _falling([4 * total * k * k // (5 * (count - 1) ** 2) for k in range(count)])


def karras_levels(low: float, high: float, count: int, rho: float = 7.0) -> list[float]:
    """S = `count` noise levels from `high` down to `low`, even in their rho-th root (Karras et al., 2022, equation 5).

    Raises ValueError unless S >= 2.
    """
    if count < 2:
        raise ValueError(f"steps is {count}, but a sampler takes at least 2")
    first, last = high ** (1 / rho), low ** (1 / rho)
    between = [(first + k / (count - 1) * (last - first)) ** rho for k in range(1, count - 1)]
    return [high, *between, low]


def time_grid(process: Process, name: Grid, count: int) -> list[Time]:
    """The falling times of a grid of S = `count`: "quadratic" and "uniform" in whole steps, "karras" in noise levels.

    A process of whole steps has those nearest to Karras' levels, duplicates dropped; it may leave fewer than S.
    Raises ValueError for an S that the process cannot have, and for a grid of steps where times are noise levels.
    """
    if isinstance(process, VariancePreserving):
        if name == "karras":
            _check(process.steps, count)
            return [*_falling([process.time_at(level) for level in karras_levels(*process.levels, count)])]
        return [*(quadratic_grid if name == "quadratic" else uniform_grid)(process.steps, count)]
    if name != "karras":
        raise ValueError(f"grid is {name!r}, but this model's times are noise levels, not steps: take 'karras'")
    return [process.time_at(level) for level in karras_levels(*process.levels, count)]


def network_evaluations(
    sampler: Sampler, process: Process, grid: Sequence[Time], w: float = 0.0, interval: Interval = ALWAYS
) -> int:
    """How often a sampler asks the network on a grid, each time about all images; guidance asks twice where active."""
    # Heun asks at both ends of every step, and once more at the last time.
    asked = [*grid, *grid[1:]] if sampler == "heun" else list(grid)
    return len(asked) + sum(_active(process, t, w, interval) for t in asked)


# --- guidance ----------------------------------------------------------------------------------------


def _active(process: Process, t: Time, w: float, interval: Interval) -> bool:
    return w != 0 and interval[0] <= process.level(t) <= interval[1]


def guided(
    predict_cond: Predict, predict_null: Predict, w: float, process: Process, interval: Interval = ALWAYS
) -> Predict:
    """Classifier-free guidance (Ho & Salimans, 2021): (1 + w) eps(y) - w eps(null).

    interval: the noise levels sigma_t / signal_t, both ends included, in which guidance is active (Kynkäänniemi et al.,
    2024); outside them the condition alone is asked. w = 0 is `predict_cond` itself. `predict_null` is never called in
    vain. Where active, the two are two calls of B images; whoever would rather make one call of 2 B writes a `Predict`
    that does. Raises ValueError for an interval that does not rise from 0 or above.
    """
    if not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"interval is {interval}, but must be two rising noise levels of at least 0")
    if w == 0:
        return predict_cond

    def predict(x_t: Tensor, t: Time) -> Tensor:
        if not _active(process, t, w, interval):
            return predict_cond(x_t, t)
        return (1 + w) * predict_cond(x_t, t) - w * predict_null(x_t, t)

    return predict


# --- samplers ----------------------------------------------------------------------------------------


class _Point(NamedTuple):
    """A time of the grid, and what the process is there."""

    t: Time
    bar: float

    @property
    def signal(self) -> float:
        return sqrt(self.bar)

    @property
    def sigma(self) -> float:
        return sqrt(1 - self.bar)

    @property
    def level(self) -> float:
        return self.sigma / self.signal

    @property
    def lam(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, which rises on the way down."""
        return -log(self.level)


_Seen = tuple[_Point, Tensor]  # a time, and the x0 that the network saw there


def _transitions(process: Process, grid: Sequence[Time]) -> Iterator[tuple[_Point, _Point | None]]:
    """Every time and the next, None at the end. Raises ValueError if the grid does not fall, or leaves the process."""
    if not grid or any(a <= b for a, b in pairwise(grid)):
        raise ValueError(f"a grid must fall from step to step, but is {list(grid)}")
    points = [_Point(t, process.alpha_bar(t)) for t in grid]
    yield from zip(points, [*points[1:], None], strict=True)


def _predicted_x0(predict: Predict, x: Tensor, at: _Point, clip: bool) -> Tensor:
    """The image that the network sees in x_t: x0 = (x_t - sqrt(1 - ab_t) eps) / sqrt(ab_t)."""
    x0 = (x - at.sigma * predict(x, at.t)) / at.signal
    return x0.clamp(-1, 1) if clip else x0


def _noise_beside(x: Tensor, x0: Tensor, at: _Point) -> Tensor:
    """The noise that adds up to x_t with x0, which may be clipped."""
    return (x - at.signal * x0) / at.sigma


@torch.no_grad()
def ddpm(
    predict: Predict, x: Tensor, process: Process, grid: Sequence[Time], noise: Noise, clip: bool = True
) -> Tensor:
    """DDPM, ancestral sampling (Ho et al., 2020, algorithm 2), on any grid: x [B, I, H, H] at grid[0] -> x0.

    Each step draws from q(x_s | x_t, x0), equations 6 and 7, with beta the noise between the two times:

        mean = sqrt(ab_s) beta / (1 - ab_t) x0 + sqrt(1 - beta) (1 - ab_s) / (1 - ab_t) x_t
        variance = beta (1 - ab_s) / (1 - ab_t),    beta = 1 - ab_t / ab_s
    """
    for at, following in _transitions(process, grid):
        x0 = _predicted_x0(predict, x, at, clip)
        if following is None:
            return x0
        bar, bar_next = at.bar, following.bar
        beta = 1 - bar / bar_next
        mean = sqrt(bar_next) * beta / (1 - bar) * x0 + sqrt(1 - beta) * (1 - bar_next) / (1 - bar) * x
        x = mean + sqrt(beta * (1 - bar_next) / (1 - bar)) * noise(at.t, x)
    raise AssertionError("a grid has a last time")


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    process: Process,
    grid: Sequence[Time],
    eta: float = 0.0,
    noise: Noise | None = None,
    clip: bool = True,
) -> Tensor:
    """DDIM (Song et al., 2021, equations 12 and 16): x [B, I, H, H] at grid[0] -> x0.

        x_s = sqrt(ab_s) x0 + sqrt(1 - ab_s - sigma²) eps + sigma noise
        sigma² = eta² (1 - ab_s) / (1 - ab_t) (1 - ab_t / ab_s)

    eta: 0 draws nothing, 1 equals DDPM; in between a mixture. Raises ValueError if noise is needed and not given.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta}, but there is no noise to add: give it, or use eta 0")
    for at, following in _transitions(process, grid):
        x0 = _predicted_x0(predict, x, at, clip)
        if following is None:
            return x0
        bar, bar_next = at.bar, following.bar
        variance = eta**2 * (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
        x = sqrt(bar_next) * x0 + sqrt(1 - bar_next - variance) * _noise_beside(x, x0, at)
        if noise is not None and variance > 0:
            x = x + sqrt(variance) * noise(at.t, x)
    raise AssertionError("a grid has a last time")


@torch.no_grad()
def dpm_solver(predict: Predict, x: Tensor, process: Process, grid: Sequence[Time], clip: bool = True) -> Tensor:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): x [B, I, H, H] at grid[0] -> x0.

        x_s = sigma_s / sigma_t x_t - signal_s (e^-h - 1) (x0_t + h / (2 h_before) (x0_t - x0_before))

    h: the rise of lambda in this step, h_before in the one before; the first step has none, and is DDIM's.
    """
    before: _Seen | None = None
    for at, following in _transitions(process, grid):
        x0 = _predicted_x0(predict, x, at, clip)
        if following is None:
            return x0
        h, middle = following.lam - at.lam, x0
        if before is not None:
            middle = x0 + h / (2 * (at.lam - before[0].lam)) * (x0 - before[1])
        x = following.sigma / at.sigma * x - following.signal * expm1(-h) * middle
        before = at, x0
    raise AssertionError("a grid has a last time")


def _unipc_weights(h: float, r: float) -> tuple[float, float]:
    """The corrector's weights of the older and the newer difference quotient, so that two orders are met.

    They solve sum_m a_m r_m^(k-1) = b_k for k = 1, 2 with r_1 = r, r_2 = 1 (Zhao et al., 2023, theorem 3.1, for x0) and

        b_k = k! h' phi_(k+1)(h') / B,    phi_(k+1)(h') = (phi_k(h') - 1 / k!) / h',  phi_1(h') = B / h'

    h' = -h, B = e^h' - 1.
    """
    b = expm1(-h)
    phi_2 = (b / -h - 1) / -h
    phi_3 = (phi_2 - 1 / 2) / -h
    b_1, b_2 = -h * phi_2 / b, 2 * -h * phi_3 / b
    older = (b_1 - b_2) / (1 - r)
    return older, b_1 - older


def _unipc_step(x: Tensor, seen: Sequence[_Seen], to: _Point, x0_to: Tensor | None = None) -> Tensor:
    """From x at the last of one or two times seen to the time `to`; with `x0_to`, the x0 seen there, corrected by it.

        x_s = sigma_s / sigma_t x_t - signal_s B(h) (x0_t + older / r (x0_before - x0_t) + newer (x0_s - x0_t))

    r: the earlier time's distance in lambda, as a multiple of h; negative.
    """
    at, x0 = seen[-1]
    h = to.lam - at.lam
    middle = x0
    if len(seen) == 1:
        if x0_to is not None:
            middle = (x0 + x0_to) / 2
    else:
        before, x0_before = seen[-2]
        r = (before.lam - at.lam) / h
        older, newer = (1 / 2, 0.0) if x0_to is None else _unipc_weights(h, r)
        middle = x0 + older / r * (x0_before - x0)
        if x0_to is not None:
            middle = middle + newer * (x0_to - x0)
    return to.sigma / at.sigma * x - to.signal * expm1(-h) * middle


@torch.no_grad()
def unipc(predict: Predict, x: Tensor, process: Process, grid: Sequence[Time], clip: bool = True) -> Tensor:
    """UniPC of order 2, data prediction, B(h) = e^-h - 1 (Zhao et al., 2023): x [B, I, H, H] at grid[0] -> x0.

    Each step predicts the next x, asks the network there, and goes the step again with this answer; the answer also
    serves the step that follows, so the network is asked once a step, and the correction adds an order. The first step
    is of one order less.
    """
    seen: list[_Seen] = []
    corrected = x
    for at, following in _transitions(process, grid):
        x0 = _predicted_x0(predict, x, at, clip)
        if following is None:
            return x0
        if seen:
            corrected = _unipc_step(corrected, seen, at, x0)
        seen = [*seen[-1:], (at, x0)]
        x = _unipc_step(corrected, seen, following)
    raise AssertionError("a grid has a last time")


@torch.no_grad()
def heun(predict: Predict, x: Tensor, process: Process, grid: Sequence[Time], clip: bool = True) -> Tensor:
    """Heun's method (Karras et al., 2022, algorithm 1, no noise added): x [B, I, H, H] at grid[0] -> x0.

        xbar_s = xbar_t + (level_s - level_t) (eps_t + eps_s) / 2,    xbar = x / signal

    eps_s is asked where eps_t alone would lead. It needs no times between those of the grid, so it serves models of
    whole steps as well; on the "karras" grid of an EDM model it is the paper's sampler, whose step to noise level 0 is
    the x0 of the last time. Asks the network 2 S - 1 times.
    """
    for at, following in _transitions(process, grid):
        x0 = _predicted_x0(predict, x, at, clip)
        if following is None:
            return x0
        eps = _noise_beside(x, x0, at)
        there = following.signal * x0 + following.sigma * eps
        eps_there = _noise_beside(there, _predicted_x0(predict, there, following, clip), following)
        rise = (following.level - at.level) / 2 * (eps + eps_there)
        x = following.signal * (x / at.signal + rise)
    raise AssertionError("a grid has a last time")


def check_eta(sampler: Sampler, eta: float) -> None:
    """Raises ValueError, one sentence, unless 0 <= eta <= 1, and 0 for every sampler but ddim."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta:g} cannot be used: take from 0 to 1")
    if eta > 0 and sampler != "ddim":
        raise ValueError(f"eta={eta:g} has no effect with sampler={sampler}: take sampler=ddim, or eta=0")


def run_sampler(
    sampler: Sampler,
    predict: Predict,
    x: Tensor,
    process: Process,
    grid: Sequence[Time],
    noise: Noise,
    eta: float = 0.0,
) -> Tensor:
    """Any sampler by its name, clipped: x [B, I, H, H] at grid[0] -> x0 in [-1, 1].

    noise: asked by ddpm, and by ddim where its eta is above 0. Raises ValueError for an eta that `check_eta` refuses.
    """
    check_eta(sampler, eta)
    if sampler == "ddpm":
        return ddpm(predict, x, process, grid, noise)
    if sampler == "ddim":
        return ddim(predict, x, process, grid, eta, noise)
    return _NOISELESS[sampler](predict, x, process, grid)


_NOISELESS: dict[Sampler, Callable[[Predict, Tensor, Process, Sequence[Time]], Tensor]] = {
    "dpm-solver++": dpm_solver,
    "unipc": unipc,
    "heun": heun,
}
