"""The order of images in training: a pure function of (ids, seed, phase, epoch).

The ids of a phase (the whole set, or a leaf's members) lie in shards. Every epoch

    permutes the shards and joins their ids to a tape, turned round to begin anywhere;
    cuts the tape into S streams of equal length, one for each slot (less than a batch is left over);
    cuts a stream into blocks and permutes the ids within each block.

A slot reads its stream from left to right, so it needs few shards at a time, whatever the size of the set, and
(epoch, step) is the whole cursor: there is no iterator state, and going on in the middle reads one block anew.

Legend: M ids, S slots, K shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tdiff.seeds import permutation, seed_of

Ids = NDArray[np.int64]


class Block(NamedTuple):
    """A block of a slot's stream: in which epoch, the how-manieth."""

    epoch: int
    number: int


class Order:
    """The batches of one phase.

    counts: ids in each shard [K], in manifest order; batch: images per step over all S slots; block: images that a slot
    shuffles at a time, rounded down to whole steps, but at least one.
    """

    def __init__(self, counts: Sequence[int], batch: int, slots: int, seed: int, phase: str, block: int):
        self.count = int(sum(counts))
        if self.count < batch:
            raise ValueError(f"{self.count} images are fewer than one batch of {batch}: take a smaller batch")
        if batch % slots:
            raise ValueError(f"a batch of {batch} cannot be divided into {slots} equal slots")
        self.batch = batch
        self.slots = slots
        self.seed = seed
        self.phase = phase
        self.steps_per_epoch = self.count // batch
        self.part = batch // slots
        self.block_steps = min(max(1, block // self.part), self.steps_per_epoch)
        self._counts = np.asarray(counts, np.int64)
        self._first = np.cumsum(self._counts) - self._counts  # of each shard, among all ids
        self._tape = lru_cache(maxsize=2)(self._new_tape)
        self._block = lru_cache(maxsize=slots)(self._new_block)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def block_of(self, step: int) -> Block:
        """The block that every slot is in at `step`, counted from the phase's start."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return Block(epoch, step_in_epoch // self.block_steps)

    def after(self, block: Block) -> int:
        """The step at which the next block begins."""
        return block.epoch * self.steps_per_epoch + min((block.number + 1) * self.block_steps, self.steps_per_epoch)

    def rows(self, step: int) -> slice:
        """Where the batch/S ids of `step` lie in its block: the same for every slot."""
        step_in_block = step % self.steps_per_epoch % self.block_steps
        return slice(step_in_block * self.part, (step_in_block + 1) * self.part)

    def block(self, block: Block, slot: int) -> Ids:
        """Positions (into the ids, 0..M-1) of a block of `slot`, in the order of training."""
        return self._block(block, slot).copy()

    def positions(self, step: int, slot: int) -> Ids:
        """Positions (into the ids, 0..M-1) of the batch/S images that `slot` sees at `step`."""
        return self._block(self.block_of(step), slot)[self.rows(step)].copy()

    def _new_block(self, block: Block, slot: int) -> Ids:
        first = slot * self.steps_per_epoch + block.number * self.block_steps
        last = min(first + self.block_steps, (slot + 1) * self.steps_per_epoch)
        on_tape = np.arange(first * self.part, last * self.part)
        shuffled = permutation(len(on_tape), "order", self.seed, self.phase, *block, slot)
        return self._ids_at(block.epoch, on_tape[shuffled])

    def _ids_at(self, epoch: int, on_tape: Ids) -> Ids:
        """Places on an epoch's tape -> positions into the ids."""
        shards, ends, turn = self._tape(epoch)
        place = (on_tape + turn) % self.count
        k = np.searchsorted(ends, place, side="right")
        return self._first[shards[k]] + place - (ends[k] - self._counts[shards[k]])

    def _new_tape(self, epoch: int) -> tuple[Ids, Ids, int]:
        """The shards in this epoch's order, where each ends on the tape, and where on the tape the epoch begins."""
        shards = permutation(len(self._counts), "tape", self.seed, self.phase, epoch)
        # Turned round, so that what is left over is not always the end of a shard.
        return shards, np.cumsum(self._counts[shards]), seed_of("turn", self.seed, self.phase, epoch) % self.count
