"""Randomness as a function of progress: every random draw's seed comes from what it is for, not from the past."""

from __future__ import annotations

import hashlib

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
