"""The order of images in training: a pure function of (ids, seed, phase, epoch).

No iterator state anywhere: the step alone says which images each slot sees, whatever happened before
and however many workers share the slots. Every epoch is another permutation of all the ids; its last
incomplete batch is left out, and is another one the next time.

Legend: S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tdiff.seeds import permutation


@dataclass(frozen=True)
class Order:
    """The batches of one phase over `count` ids. batch: images per step over all S slots."""

    count: int
    batch: int
    slots: int
    seed: int
    phase: str

    def __post_init__(self) -> None:
        if self.count < self.batch:
            raise ValueError(f"{self.count} images are fewer than one batch of {self.batch}: take a smaller batch")

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def positions(self, step: int, slot: int) -> NDArray[np.int64]:
        """Positions (into the ids) of the batch/S images that `slot` sees at `step`, counted from the phase's start."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        part = self.batch // self.slots
        first = step_in_epoch * self.batch + slot * part
        return _epoch_order(self.count, self.seed, self.phase, epoch)[first : first + part].copy()


@lru_cache(maxsize=2)
def _epoch_order(count: int, seed: int, phase: str, epoch: int) -> NDArray[np.int64]:
    return permutation(count, "order", seed, phase, epoch)
