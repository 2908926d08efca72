"""The diffusion process: how images become noise, and the loss of undoing it (Ho et al., DDPM, 2020).

    q(x_t | x_0) = N( sqrt(ab_t) x_0, (1 - ab_t) I ),    ab_t = product over s <= t of (1 - beta_s)

signal_t = sqrt(ab_t) and sigma_t = sqrt(1 - ab_t) are what everything here is written in. Images are float
in [-1, 1], steps t whole numbers from 0 (nearly the image) to T - 1 (nearly noise).

Legend: B batch, T steps, I image channels, H = W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

# What the network predicts: the noise, or v = signal * noise - sigma * x_0 (Salimans & Ho, 2022).
Objective = Literal["noise", "v"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


@dataclass(frozen=True)
class Schedule:
    """Linear noise schedule: beta from `beta_first` to `beta_last` in T = `steps` steps. ValueError if it is none.

    All tables are computed in float64: at t = 0, sigma² is 1e-4, of which float32's 1 - ab_0 keeps three digits.
    """

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, but a schedule has at least 2")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(f"beta runs from {self.beta_first} to {self.beta_last}, but must rise within (0, 1)")

    @cached_property
    def _alphas_bar(self) -> Tensor:
        """[T] float64 on the CPU, whatever modes are on where it is first asked for."""
        with torch.inference_mode(False):
            betas = torch.linspace(self.beta_first, self.beta_last, self.steps, dtype=torch.float64, device="cpu")
            return (1 - betas).cumprod(0)

    @cached_property
    def _tables(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    @property
    def alphas_bar(self) -> Tensor:
        """[T] float32, ab_t of every step."""
        return self._alphas_bar.float()

    def alpha_bar(self, t: int) -> float:
        """ab_t of one step, in float64."""
        return float(self._alphas_bar[t])

    def signal_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """signal_t and sigma_t of steps t [B]: two of [B, 1, 1, 1], float32, on t's device."""
        if t.device not in self._tables:
            with torch.inference_mode(False):
                signal, sigma = self._alphas_bar.sqrt(), (1 - self._alphas_bar).sqrt()
                self._tables[t.device] = signal.float().to(t.device), sigma.float().to(t.device)
        signal, sigma = self._tables[t.device]
        return signal[t][:, None, None, None], sigma[t][:, None, None, None]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Images x0 [B, I, H, H] in [-1, 1] after t [B] steps: x_t = signal_t x_0 + sigma_t noise."""
        signal, sigma = self.signal_sigma(t)
        return signal * x0 + sigma * noise

    def target(self, objective: Objective, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should answer at x_t, [B, I, H, H]: the noise, or v = signal_t noise - sigma_t x_0."""
        if objective == "noise":
            return noise
        signal, sigma = self.signal_sigma(t)
        return signal * noise - sigma * x0

    def to_noise(self, objective: Objective, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise that an output at x_t means: itself, or sigma_t x_t + signal_t v."""
        if objective == "noise":
            return output
        signal, sigma = self.signal_sigma(t)
        return sigma * x_t + signal * output

    def to_x0(self, objective: Objective, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The image that an output at x_t means: (x_t - sigma_t noise) / signal_t, or signal_t x_t - sigma_t v."""
        signal, sigma = self.signal_sigma(t)
        if objective == "noise":
            return (x_t - sigma * output) / signal
        return signal * x_t - sigma * output


def stratified_steps(count: int, steps: int, rng: torch.Generator) -> Tensor:
    """[count] steps in 0 .. T - 1, on the generator's device: each uniform, all together spread evenly.

    [0, T) is cut into `count` equal strata, one drawn from each, dealt to the samples in random order: the loss of
    a batch varies less than with independent draws, and has the same expectation.
    """
    device = rng.device
    stratum = torch.randperm(count, generator=rng, device=device)
    within = torch.rand(count, generator=rng, device=device, dtype=torch.float64)
    # Rounding may carry the last stratum to T itself.
    return ((stratum + within) * (steps / count)).long().clamp_max(steps - 1)


class DenoisingLoss(NamedTuple):
    """The loss of a batch."""

    mean: Tensor  # [], what is trained on
    per_sample: Tensor  # [B], each the mean over a sample's pixels


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    objective: Objective = "noise",
) -> DenoisingLoss:
    """Squared error of `predict(x_t, t)` against its target, DDPM equation 14, for x0 [B, I, H, H] in [-1, 1].

    t: [B] steps. noise: standard normal, like x0. For the objective "v" the target is v instead.
    """
    output = predict(schedule.q_sample(x0, t, noise), t)
    error = output.float() - schedule.target(objective, x0, t, noise).float()
    per_sample = error.square().flatten(1).mean(1)  # [B]
    return DenoisingLoss(per_sample.mean(), per_sample)
