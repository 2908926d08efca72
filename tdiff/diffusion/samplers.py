"""From noise to images: one plain function a sampler, over any `predict(x_t, t) -> noise`.

`predict` takes x_t [B, I, H, H] and t [B] (int64) and gives the predicted noise. Step-wise noise comes from an explicit
`Noise`, so a run can be repeated. ab_t is the product of the schedule's (1 - beta); all coefficients are float64
numbers of Python, only images are tensors. A grid is a falling list of steps t; the network is evaluated once
for each of them, and the last one's clipped x0 is the result. A start other than pure noise is
`schedule.q_sample(image, t = grid[0], noise)`.

Legend: B batch, I image channels, H = W image size, T steps of the schedule, S steps asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from tdiff.diffusion.process import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[int, Tensor], Tensor]  # (t, x_t) -> standard normal like x_t, added on the way down from t


def noise_from(rng: torch.Generator) -> Noise:
    """Noise drawn in sequence from one generator, on the generator's device, then moved to x_t's."""

    def noise(t: int, x_t: Tensor) -> Tensor:
        return torch.randn(x_t.shape, generator=rng, device=rng.device, dtype=x_t.dtype).to(x_t.device)

    return noise


def _falling(steps: Sequence[int]) -> list[int]:
    """The steps from the last to the first, duplicates dropped."""
    return sorted(set(steps), reverse=True)


def _check(total: int, count: int) -> None:
    if not 2 <= count <= total:
        raise ValueError(f"steps is {count}, but a sampler takes from 2 to the schedule's {total}")


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


def guided(predict_cond: Predict, predict_null: Predict, w: float) -> Predict:
    """Classifier-free guidance (Ho & Salimans, 2021): (1 + w) eps(y) - w eps(null).

    w = 0 is `predict_cond` itself: `predict_null` is never called.
    """
    if w == 0:
        return predict_cond

    def predict(x_t: Tensor, t: Tensor) -> Tensor:
        return (1 + w) * predict_cond(x_t, t) - w * predict_null(x_t, t)

    return predict


def _transitions(schedule: Schedule, grid: Sequence[int]) -> Iterator[tuple[int, float, float | None]]:
    """t, ab_t and the ab of the next step, None at the end. Raises ValueError if the grid does not fall within T."""
    if not grid or grid[0] >= schedule.steps or grid[-1] < 0 or any(a <= b for a, b in pairwise(grid)):
        raise ValueError(f"a grid must fall from step to step within 0 .. {schedule.steps - 1}, but is {list(grid)}")
    bars = [schedule.alpha_bar(t) for t in grid]
    yield from zip(grid, bars, [*bars[1:], None], strict=True)


def _clipped_x0(predict: Predict, x: Tensor, t: int, bar: float) -> Tensor:
    """The image that the network sees in x_t: x0 = (x_t - sqrt(1 - ab_t) eps) / sqrt(ab_t), clipped to [-1, 1]."""
    eps = predict(x, torch.full((len(x),), t, device=x.device, dtype=torch.int64))
    return ((x - sqrt(1 - bar) * eps) / sqrt(bar)).clamp(-1, 1)


@torch.no_grad()
def ddpm(predict: Predict, x: Tensor, schedule: Schedule, grid: Sequence[int], noise: Noise) -> Tensor:
    """DDPM, ancestral sampling (Ho et al., 2020, algorithm 2), on any grid: x [B, I, H, H] at grid[0] -> x0 in [-1, 1].

    Each step draws from q(x_s | x_t, x0), equations 6 and 7, with beta the noise between the two steps:

        mean = sqrt(ab_s) beta / (1 - ab_t) x0 + sqrt(1 - beta) (1 - ab_s) / (1 - ab_t) x_t
        variance = beta (1 - ab_s) / (1 - ab_t),    beta = 1 - ab_t / ab_s
    """
    for t, bar, bar_next in _transitions(schedule, grid):
        x0 = _clipped_x0(predict, x, t, bar)
        if bar_next is None:
            return x0
        beta = 1 - bar / bar_next
        mean = sqrt(bar_next) * beta / (1 - bar) * x0 + sqrt(1 - beta) * (1 - bar_next) / (1 - bar) * x
        x = mean + sqrt(beta * (1 - bar_next) / (1 - bar)) * noise(t, x)
    raise AssertionError("a grid has a last step")


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    schedule: Schedule,
    grid: Sequence[int],
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Tensor:
    """DDIM (Song et al., 2021, equations 12 and 16): x [B, I, H, H] at grid[0] -> x0 in [-1, 1].

        x_s = sqrt(ab_s) x0 + sqrt(1 - ab_s - sigma²) eps + sigma noise
        sigma² = eta² (1 - ab_s) / (1 - ab_t) (1 - ab_t / ab_s)

    eta: 0 draws nothing, 1 equals DDPM; in between a mixture. Raises ValueError if noise is needed and not given.
    """
    if eta > 0 and noise is None:
        raise ValueError(f"eta is {eta}, but there is no noise to add: give it, or use eta 0")
    for t, bar, bar_next in _transitions(schedule, grid):
        x0 = _clipped_x0(predict, x, t, bar)
        if bar_next is None:
            return x0
        # The noise that fits the CLIPPED x0, so that the two still add up to x_t.
        eps = (x - sqrt(bar) * x0) / sqrt(1 - bar)
        variance = eta**2 * (1 - bar_next) / (1 - bar) * (1 - bar / bar_next)
        x = sqrt(bar_next) * x0 + sqrt(1 - bar_next - variance) * eps
        if noise is not None and variance > 0:
            x = x + sqrt(variance) * noise(t, x)
    raise AssertionError("a grid has a last step")
