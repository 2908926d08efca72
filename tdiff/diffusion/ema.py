"""Exponential moving averages of weights, which are what is sampled: with a constant or a power-function decay.

    average <- beta_t average + (1 - beta_t) weights,    after step t = 1, 2, ...

A constant beta remembers its initial weights for long (0.9999: 82% of them after 2,000 steps). A power function
(idea: Karras et al., EDM2, 2024) remembers a fixed FRACTION of the run, however long it is: with
beta_t = (1 - 1/t)^(gamma + 1) the products telescope, and the weights of step i hold the share
(i^(gamma+1) - (i-1)^(gamma+1)) / t^(gamma+1) of the average at step t; the initial weights hold none.

Any power function can be had after training, too: snapshots of two tracks (TRACKS), taken at regular steps
(`snapshot_steps`), are averages over the run with known profiles, and a sum of them (`combination`) has nearly the
profile of any other (EDM2, section 3.2 and appendix C). `tdiff.work.snapshots` keeps them in files.

Legend: t steps taken so far, N profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

Decay = Callable[[int], float]

TRACKS = (0.05, 0.10)
"""Relative widths of the two averages whose snapshots stand for all others (the paper's choice)."""


def relative_width(gamma: float) -> float:
    """Standard deviation of the power function's profile, as a fraction of the run: that of Beta(gamma + 1, 1)."""
    return sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


WIDEST = relative_width(0.0)  # about 0.289: the plain mean of all steps


def gamma_from_width(sigma_rel: float) -> float:
    """The exponent gamma >= 0 whose profile has relative width sigma_rel. Raises ValueError outside (0, 0.2886]."""
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"the relative width of an EMA is {sigma_rel}, but must be in (0, {WIDEST:.4f}]: try 0.1")
    # The width falls in gamma and is below 1 / (gamma + 2), so the solution lies in this interval.
    low, high = 0.0, 1 / sigma_rel
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if relative_width(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def power_decay(gamma: float) -> Decay:
    """beta_t = (1 - 1/t)^(gamma + 1); t counts from 1, where beta is 0. Raises ValueError for gamma <= -1."""
    if gamma <= -1:
        raise ValueError(f"gamma is {gamma}, but must be above -1")
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def constant_decay(beta: float) -> Decay:
    """The same beta at every step. Raises ValueError outside [0, 1)."""
    if not 0 <= beta < 1:
        raise ValueError(f"the decay of an EMA is {beta}, but must be in [0, 1)")
    return lambda step: beta


class Profile(NamedTuple):
    """How a power-function EMA weighs the moments of the run: (gamma + 1) tau^gamma / step^(gamma+1), 0 < tau <= step.

    Its integral from i - 1 to i is the share of step i's weights, for any step i.
    """

    step: int
    """The steps taken, from 1."""
    gamma: float
    """The exponent, >= 0."""


def snapshot_steps(steps: int, count: int) -> list[int]:
    """`count` steps at regular intervals, the last of all `steps` among them; all, if there are no more than that."""
    count = min(count, steps)
    return [-(-k * steps // count) for k in range(1, count + 1)]


def inner_products(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """Integrals of the products of two lists of profiles over the run, float64 [len(first), len(second)].

    In closed form, with m = min(s, t): (a+1)(b+1) / (a+b+1) * m^(a+b+1) / (s^(a+1) t^(b+1)) for the profiles (s, a)
    and (t, b).
    """
    s, a = torch.tensor(first, dtype=torch.float64).T[:, :, None]  # [N, 1] each
    t, b = torch.tensor(second, dtype=torch.float64).T[:, None, :]  # [1, N]
    shorter, longer = torch.minimum(s, t), torch.maximum(s, t)
    # By powers of ratios <= 1, for those of the steps themselves would overflow.
    integrals: Tensor = (a + 1) * (b + 1) / (a + b + 1) * (shorter / s) ** a * (shorter / t) ** b / longer
    return integrals


def combination(target: Profile, basis: Sequence[Profile]) -> tuple[list[float], float]:
    """The coefficients of the sum of `basis` that is nearest to `target`, and how far from it that still is.

    Least squares (EDM2, algorithm 3), of sums whose coefficients add up to 1: weights that stood still in training
    come back as they are. basis: N different profiles, in any order. Returns N coefficients, and the distance from
    the target, as a share of the target's norm: 0 is exact. It is small where the basis has a profile of the target's
    own step and the steps lie dense against the target's width: with 16 regular steps of both TRACKS below 1% for
    widths of 0.05 to 0.15, 12% at 0.02, 8% at 0.25.
    """
    n = len(basis)
    unit = target.step  # of time, so that what the system holds is of the same order for any length of training
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = products = inner_products(basis, basis) * unit
    system[:n, n] = system[n, :n] = 1  # a Lagrange multiplier holds the sum of the coefficients at 1
    wanted = inner_products(basis, [target])[:, 0] * unit  # [N]
    found = torch.linalg.solve(system, torch.cat([wanted, wanted.new_ones(1)]))[:n]
    norm = inner_products([target], [target])[0, 0] * unit
    distance = norm - 2 * found @ wanted + found @ products @ found
    return found.tolist(), sqrt(max(0.0, float(distance / norm)))


class Ema:
    """A float32 running average of some tensors, which it reads where they are whenever `update` is called.

    tensors: named ones, or a list (whole parameters or flat partitions of them; names "0", "1", ...). The
    average starts as their values, on their devices.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | Iterable[Tensor], decay: Decay):
        named = tensors if isinstance(tensors, Mapping) else {str(k): tensor for k, tensor in enumerate(tensors)}
        self.decay = decay
        self.names = list(named)
        # The tensors themselves, no aliases of their storage: `parameter.data = ...` must not leave a stale one.
        self.sources = list(named.values())
        self.averages = [source.detach().to(torch.float32, copy=True) for source in self.sources]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the tensors' values after step `step`, counted from 1. Raises ValueError for a step below that."""
        if step < 1:
            raise ValueError(f"step is {step}, but an EMA counts the steps taken, from 1")
        if self.averages:
            sources = [source.float() for source in self.sources]
            torch._foreach_lerp_(self.averages, sources, 1 - self.decay(step))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, float32: the very tensors that `update` changes."""
        return dict(zip(self.names, self.averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Sets the averages to `state`. Raises ValueError, changing nothing, if names or shapes differ."""
        if differing := sorted(set(state) ^ set(self.names)):
            raise ValueError(
                f"the EMA to load and this one differ in which tensors they hold: {differing[0]!r} is in one"
            )
        for name, average in self.state_dict().items():
            if state[name].shape != average.shape:
                raise ValueError(
                    f"tensor {name!r} of the EMA to load has shape {list(state[name].shape)}, "
                    f"but {list(average.shape)} here"
                )
        for name, average in self.state_dict().items():
            average.copy_(state[name])
