"""Randomness as a function of progress: every random draw's seed comes from what it is for, not from the past.

And sums in one order, where numbers must come out the same again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed for the named purpose, the same on every machine and in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `seed_of`."""
    return torch.Generator(device).manual_seed(seed_of(*parts))


def permutation(count: int, *parts: int | str) -> np.ndarray:
    """A permutation of range(count), int64, seeded by `seed_of`."""
    return np.random.default_rng(seed_of(*parts)).permutation(count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: numbers must not depend on how many cores this machine has."""
    from threadpoolctl import threadpool_limits  # here: the models, which draw by seeds too, need torch alone

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
