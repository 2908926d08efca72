"""The diffusion process: how images become noise, what a network is asked, and the loss of its answer.

Whatever the objective, an image at time t is

    x_t = signal_t x_0 + sigma_t noise,    signal_t = sqrt(ab_t),  sigma_t = sqrt(1 - ab_t)

and its noise level is sigma_t / signal_t. A `Process` says what a time is, which times a network is trained at, what
it is told and asked there, and what its answer means as a noise; training and samplers need nothing else.

    objective   time t                  the network predicts
    noise       whole, 0 .. T - 1       the noise                           Ho et al., DDPM, 2020
    v           whole, 0 .. T - 1       signal_t noise - sigma_t x_0        Salimans & Ho, 2022
    edm         its noise level, > 0    a preconditioned mixture of both    Karras et al., EDM, 2022

Karras et al. write their images as x_0 + level * noise; here that is x_t / signal_t, so that every sampler serves
every process, and pure noise is N(0, I) for all. Images are float in [-1, 1].

Legend: B batch, T steps, I image channels, H = W image size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Objective = Literal["noise", "v", "edm"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)

Time = int | float
Network = Callable[[Tensor, Tensor], Tensor]  # (images [B, I, H, H], number that tells the time [B]) -> like images
Predict = Callable[[Tensor, Time], Tensor]  # (x_t [B, I, H, H], t) -> the noise in x_t


class DenoisingLoss(NamedTuple):
    """The loss of a batch."""

    mean: Tensor  # [], what is trained on
    per_sample: Tensor  # [B], each the mean over a sample's pixels, weighted by its time


class Process(ABC):
    """What training and sampling know of a diffusion model besides its network."""

    @property
    @abstractmethod
    def levels(self) -> tuple[float, float]:
        """The least and the greatest noise level to sample at."""

    @abstractmethod
    def alpha_bar(self, t: Time) -> float:
        """ab_t in float64. Raises ValueError if t is no time of this process."""

    @abstractmethod
    def time_at(self, level: float) -> Time:
        """The time with this noise level, or the nearest that there is."""

    @abstractmethod
    def times(self, t: Time, x: Tensor) -> Tensor:
        """One time for all of x [B, ...]: [B], on its device."""

    @abstractmethod
    def draw_times(self, count: int, rng: torch.Generator) -> Tensor:
        """[count] times to train at, on the generator's device: each from their distribution, together stratified."""

    @abstractmethod
    def share_below(self, t: Tensor) -> Tensor:
        """The share of the times to train at that lie below t [B]: [B] in [0, 1)."""

    @abstractmethod
    def signal_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """signal_t and sigma_t of times t [B]: two of [B, 1, 1, 1] on t's device."""

    @abstractmethod
    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should answer at x_t: [B, I, H, H]."""

    @abstractmethod
    def to_noise(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The noise that an answer at x_t means: [B, I, H, H]."""

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is told at x_t [B, I, H, H]: images of the same shape, and a number for the time [B]."""
        return x_t, t

    def weight(self, t: Tensor) -> Tensor | None:
        """The weight of each sample's squared error, [B]; None: 1."""
        return None

    def level(self, t: Time) -> float:
        """The noise level sigma_t / signal_t. Raises ValueError if t is no time of this process."""
        bar = self.alpha_bar(t)
        return sqrt((1 - bar) / bar)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Images x0 [B, I, H, H] in [-1, 1] at times t [B]: x_t = signal_t x_0 + sigma_t noise."""
        signal, sigma = self.signal_sigma(t)
        return signal * x0 + sigma * noise

    def loss(self, network: Network, x0: Tensor, t: Tensor, noise: Tensor) -> DenoisingLoss:
        """Weighted squared error of the network's answers (DDPM equation 14), for x0 [B, I, H, H] in [-1, 1].

        t: [B], from `draw_times`. noise: standard normal, like x0.
        """
        output = network(*self.network_input(self.q_sample(x0, t, noise), t))
        error = output.float() - self.target(x0, t, noise).float()
        per_sample = error.square().flatten(1).mean(1)  # [B]
        if (weight := self.weight(t)) is not None:
            per_sample = weight * per_sample
        return DenoisingLoss(per_sample.mean(), per_sample)

    def predictor(self, network: Network) -> Predict:
        """The network as samplers ask it: x_t [B, I, H, H] and one time -> the noise in x_t, of x_t's dtype."""

        def predict(x_t: Tensor, t: Time) -> Tensor:
            at = self.times(t, x_t)
            return self.to_noise(x_t, at, network(*self.network_input(x_t, at)).to(x_t.dtype))

        return predict


@dataclass(frozen=True)
class VariancePreserving(Process):
    """The process of DDPM, beta linear from `beta_first` to `beta_last` in T = `steps` steps, predicting noise or v.

        ab_t = product over s <= t of (1 - beta_s),    t = 0 (nearly the image) .. T - 1 (nearly noise)

    All tables are computed in float64: at t = 0, sigma² is 1e-4, of which float32's 1 - ab_0 keeps three digits.

    min_snr: gamma of the min-SNR weighting (Hang et al., 2023), 5 in their paper, None for plain squared error. The
    error of the implied image is weighted by min(SNR, gamma), SNR = ab / (1 - ab), which on the noise's error is
    min(SNR, gamma) / SNR and on v's min(SNR, gamma) / (SNR + 1).

    Raises ValueError for values that are no such process.
    """

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02
    objective: Literal["noise", "v"] = "noise"
    min_snr: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, but a schedule has at least 2")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(f"beta runs from {self.beta_first} to {self.beta_last}, but must rise within (0, 1)")
        if self.objective not in ("noise", "v"):
            raise ValueError(f"objective is {self.objective!r}, but this process has noise and v")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr is {self.min_snr}, but must be above 0: 5 is usual")

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

    @property
    def levels(self) -> tuple[float, float]:
        return self.level(0), self.level(self.steps - 1)

    def alpha_bar(self, t: Time) -> float:
        if not (isinstance(t, int) and 0 <= t < self.steps):
            raise ValueError(f"t is {t}, but the steps of this process are 0 .. {self.steps - 1}")
        return float(self._alphas_bar[t])

    def time_at(self, level: float) -> int:
        """The step whose noise level is nearest to `level` > 0, on a logarithmic scale."""
        logs = ((1 - self._alphas_bar) / self._alphas_bar).log() / 2
        return int((logs - log(level)).abs().argmin())

    def times(self, t: Time, x: Tensor) -> Tensor:
        return torch.full((len(x),), t, device=x.device, dtype=torch.int64)

    def draw_times(self, count: int, rng: torch.Generator) -> Tensor:
        """[count] int64 steps, each uniform in 0 .. T - 1, one from each of `count` equal strata."""
        # Rounding may carry the last stratum to T itself.
        return (strata(count, rng) * (self.steps / count)).long().clamp_max(self.steps - 1)

    def share_below(self, t: Tensor) -> Tensor:
        return t / self.steps

    def signal_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """signal_t and sigma_t of steps t [B]: two of [B, 1, 1, 1], float32, on t's device."""
        if t.device not in self._tables:
            with torch.inference_mode(False):
                signal, sigma = self._alphas_bar.sqrt(), (1 - self._alphas_bar).sqrt()
                self._tables[t.device] = signal.float().to(t.device), sigma.float().to(t.device)
        signal, sigma = self._tables[t.device]
        return signal[t][:, None, None, None], sigma[t][:, None, None, None]

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The noise, or v = signal_t noise - sigma_t x_0: [B, I, H, H]."""
        if self.objective == "noise":
            return noise
        signal, sigma = self.signal_sigma(t)
        return signal * noise - sigma * x0

    def to_noise(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The answer itself, or sigma_t x_t + signal_t v: [B, I, H, H]."""
        if self.objective == "noise":
            return output
        signal, sigma = self.signal_sigma(t)
        return sigma * x_t + signal * output

    def weight(self, t: Tensor) -> Tensor | None:
        """Min-SNR weights [B] in (0, 1], or None without them."""
        if self.min_snr is None:
            return None
        signal, sigma = self.signal_sigma(t)
        snr = (signal / sigma).square().flatten()  # [B]
        return snr.clamp_max(self.min_snr) / (snr if self.objective == "noise" else snr + 1)


@dataclass(frozen=True)
class Edm(Process):
    """Preconditioned denoising of Karras et al., "Elucidating the design space ...", 2022: a time IS a noise level s.

    The network F sees c_in x and c_noise, and the image in x = x_0 + s noise is D(x; s) = c_skip x + c_out F, with
    (table 1; d = sigma_data)

        c_skip = d² / (s² + d²)    c_out = s d / sqrt(s² + d²)    c_in = 1 / sqrt(s² + d²)    c_noise = ln(s) / 4

    which gives F inputs and targets of variance 1. The loss weight of D, lambda = 1 / c_out², leaves F's own squared
    error with weight 1. With d = 1, F is -v.

    sigma_data: standard deviation of the images' pixels, 0.5 for images in [-1, 1]. In training ln s is normal with
    `mean` and `std`. level_min, level_max: the range to sample in.

    What the network is told of the time is 1000 c_noise: its time embedding is made for steps 0 .. 999, of standard
    deviation 289, and the c_noise of training, of 0.3, would move no more than its few highest frequencies.

    Raises ValueError for values that are no such process.
    """

    sigma_data: float = 0.5
    mean: float = -1.2
    std: float = 1.2
    level_min: float = 0.002
    level_max: float = 80.0

    def __post_init__(self) -> None:
        for name in ("sigma_data", "std"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be above 0")
        if not 0 < self.level_min < self.level_max:
            raise ValueError(f"levels run from {self.level_min} to {self.level_max}, but must rise from above 0")

    @property
    def levels(self) -> tuple[float, float]:
        return self.level_min, self.level_max

    def alpha_bar(self, t: Time) -> float:
        """1 / (1 + t²)."""
        if not 0 < t < float("inf"):
            raise ValueError(f"t is {t}, but the times of this process are noise levels above 0")
        return 1 / (1 + t * t)

    def level(self, t: Time) -> float:
        """t itself, free of the rounding on the way through ab_t."""
        self.alpha_bar(t)
        return float(t)

    def time_at(self, level: float) -> float:
        return level

    def times(self, t: Time, x: Tensor) -> Tensor:
        return torch.full((len(x),), t, device=x.device, dtype=x.dtype)

    def draw_times(self, count: int, rng: torch.Generator) -> Tensor:
        """[count] float32 noise levels, each log-normal, one from each of `count` parts of equal probability."""
        # The normal's quantiles of 0 and 1 are infinite.
        quantile = (strata(count, rng) / count).clamp(1e-9, 1 - 1e-9)
        normal: Tensor = torch.special.ndtri(quantile)
        return (self.mean + self.std * normal).exp().float()

    def share_below(self, t: Tensor) -> Tensor:
        share: Tensor = torch.special.ndtr((t.log() - self.mean) / self.std)
        return share

    def signal_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 / sqrt(1 + t²) and t / sqrt(1 + t²) of noise levels t [B]: two of [B, 1, 1, 1], of t's dtype and device."""
        signal = (1 + t.square()).rsqrt()
        return signal[:, None, None, None], (t * signal)[:, None, None, None]

    def _levels_and_norm(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s and sqrt(s² + d²): two of [B, 1, 1, 1]."""
        level = t[:, None, None, None]
        return level, (level.square() + self.sigma_data**2).sqrt()

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x [B, I, H, H], of variance 1, and 1000 c_noise [B]."""
        level, norm = self._levels_and_norm(t)
        return (1 + level.square()).sqrt() / norm * x_t, 250 * t.log()

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(x_0 - c_skip x) / c_out = (s / d x_0 - d noise) / sqrt(s² + d²): [B, I, H, H]."""
        level, norm = self._levels_and_norm(t)
        return (level / self.sigma_data * x0 - self.sigma_data * noise) / norm

    def to_noise(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """(x - D(x; s)) / s = s / (s² + d²) x - d / sqrt(s² + d²) F: [B, I, H, H]."""
        level, norm = self._levels_and_norm(t)
        x = (1 + level.square()).sqrt() * x_t
        return level / norm.square() * x - self.sigma_data / norm * output


def make_process(objective: Objective, timesteps: int, min_snr: float | None = None) -> Process:
    """The process of an objective. timesteps: T, without effect for edm.

    min_snr: see VariancePreserving. Raises ValueError for what is no process, and for min_snr with edm, which has a
    weighting of its own.
    """
    if objective == "edm":
        if min_snr is not None:
            raise ValueError(f"min_snr is {min_snr}, but objective 'edm' has its own weighting: leave it out")
        return Edm()
    return VariancePreserving(timesteps, objective=objective, min_snr=min_snr)


def strata(count: int, rng: torch.Generator) -> Tensor:
    """[count] float64 in [0, count), on the generator's device: one in each unit interval, in random order.

    The loss of a batch varies less with times made of them than with independent draws, and has the same expectation.
    """
    stratum = torch.randperm(count, generator=rng, device=rng.device)
    within = torch.rand(count, generator=rng, device=rng.device, dtype=torch.float64)
    return within + stratum
