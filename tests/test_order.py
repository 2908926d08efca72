"""Protects the order of training: each id at most once an epoch, fewer than a batch left out and others each time,
nearby ids far apart and yet few shards at a time; and that it is a function of (ids, seed, phase, epoch) alone.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tdiff.data.order import Block, Order

PHASE = "00-root"


def all_blocks(order: Order, epoch: int) -> list[Block]:
    first = epoch * order.steps_per_epoch
    return sorted({order.block_of(step) for step in range(first, first + order.steps_per_epoch)})


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """All positions of an epoch in the order of use, [steps, batch]."""
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    return np.array([np.concatenate([order.positions(t, s) for s in range(order.slots)]) for t in steps])


@st.composite
def settings_of(draw: st.DrawFn) -> dict:
    """Arguments of an Order; shards may be empty."""
    counts = draw(st.lists(st.one_of(st.integers(0, 2), st.integers(0, 40)), min_size=1, max_size=8))
    slots = draw(st.integers(1, 4))
    batch = slots * draw(st.integers(1, 6))
    assume(sum(counts) >= batch)
    block = draw(st.one_of(st.integers(1, 20), st.integers(1, 300)))
    return {
        "counts": counts,
        "batch": batch,
        "slots": slots,
        "seed": draw(st.integers(0, 5)),
        "phase": PHASE,
        "block": block,
    }


# --- each id once ------------------------------------------------------------------------------------


@given(settings_of(), st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_each_id_comes_at_most_once_an_epoch_and_less_than_a_batch_is_left_out(made: dict, epoch: int):
    order = Order(**made)
    seen = epoch_of(order, epoch).ravel()
    assert order.count == sum(made["counts"])
    assert len(np.unique(seen)) == len(seen) == order.steps_per_epoch * order.batch
    assert seen.min() >= 0
    assert seen.max() < order.count
    assert 0 <= order.count - len(seen) < order.batch


@given(settings_of(), st.data())
@settings(deadline=None, max_examples=50)
def test_a_subset_of_ids_is_ordered_by_how_many_of_them_lie_in_each_shard(made: dict, data: st.DataObject):
    shards = np.repeat(np.arange(len(made["counts"])), made["counts"])
    chosen = data.draw(st.lists(st.booleans(), min_size=len(shards), max_size=len(shards)))
    ids = np.flatnonzero(chosen)
    assume(len(ids) >= made["batch"])
    counts = np.bincount(shards[ids], minlength=len(made["counts"])).tolist()
    order = Order(**made | {"counts": counts})
    seen = ids[epoch_of(order, 0).ravel()]
    assert len(set(seen.tolist())) == len(seen) > len(ids) - order.batch
    for slot in range(order.slots):
        for block in all_blocks(order, 0):  # whatever is near on the tape is near in the manifest
            touched = Counter(shards[ids[order.block(block, slot)]].tolist())
            whole = [k for k in touched if touched[k] == counts[k]]
            assert len(touched) - len(whole) <= 2


def test_every_id_is_left_out_equally_often_and_sees_every_slot():
    epochs = 2000
    order = Order([3, 7, 1, 0, 12, 2], 9, 3, 0, PHASE, 4)
    left_out, in_first_slot = np.zeros(25), np.zeros(25)
    before: set[int] = set()
    same = 0
    for epoch in range(epochs):
        slots = [np.concatenate([order.positions(t, s) for t in (2 * epoch, 2 * epoch + 1)]) for s in range(3)]
        missing = set(range(25)) - set(np.concatenate(slots).tolist())
        left_out[list(missing)] += 1
        in_first_slot[slots[0]] += 1
        same += missing == before
        before = missing
    for found, chance in ((left_out, 7 / 25), (in_first_slot, 6 / 25)):
        assert np.abs(found / epochs - chance).max() < 5 * np.sqrt(chance * (1 - chance) / epochs)
    assert same < epochs / 25  # what turning round one and the same tape would give


def test_what_is_left_out_is_others_the_next_time():
    order = Order([30, 40, 30], 30, 2, 0, PHASE, 50)
    left_out = [frozenset(range(100)) - set(epoch_of(order, epoch).ravel().tolist()) for epoch in range(8)]
    assert all(len(ids) == 10 for ids in left_out)
    assert len(set(left_out)) == 8
    assert not frozenset.intersection(*left_out)


# --- a pure function ---------------------------------------------------------------------------------


@given(settings_of(), st.integers(0, 2))
@settings(deadline=None, max_examples=50)
def test_workers_share_the_slots_of_the_same_batches(made: dict, epoch: int):
    straight = epoch_of(Order(**made), epoch)
    slots, first = made["slots"], epoch * len(straight)
    for workers in (1, 2, 4):
        if slots % workers:
            continue
        parts: dict[tuple[int, int], np.ndarray] = {}
        for rank in range(workers):
            mine = Order(**made)
            for step in range(len(straight)):
                for slot in range(rank, slots, workers):
                    parts[step, slot] = mine.positions(first + step, slot)
        for step, batch in enumerate(straight):
            np.testing.assert_array_equal(np.concatenate([parts[step, slot] for slot in range(slots)]), batch)


@given(settings_of(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), min_size=1, max_size=8), st.randoms())
@settings(deadline=None, max_examples=60)
def test_the_order_has_no_memory(made: dict, asked: list[tuple[int, int]], random):
    order = Order(**made)
    asked = [(step, slot % made["slots"]) for step, slot in asked]
    before = {at: order.positions(*at) for at in asked}
    for positions in before.values():
        positions.copy()[:] = -1
    for at in reversed(asked):
        np.testing.assert_array_equal(order.positions(*at), before[at])
    random.shuffle(asked)
    resumed = Order(**made)
    for at in asked:
        np.testing.assert_array_equal(resumed.positions(*at), before[at])


def test_what_a_caller_does_to_positions_changes_no_later_ones():
    order = Order([12, 8], 10, 2, 0, PHASE, 100)
    for ask in (lambda: order.positions(0, 0), lambda: order.block(Block(0, 0), 0)):
        first = ask()
        kept = first.copy()
        first[:] = -1
        np.testing.assert_array_equal(ask(), kept)


def test_epochs_seeds_and_phases_have_orders_of_their_own():
    def order(seed: int = 0, phase: str = PHASE) -> Order:
        return Order([20, 30, 50], 30, 2, seed, phase, 40)

    orders = [
        epoch_of(order(), 0),
        epoch_of(order(), 1),
        epoch_of(order(seed=1), 0),
        epoch_of(order(phase="01-split-1"), 0),
        epoch_of(order(phase="02-split-1"), 0),
    ]
    assert len({tuple(found.ravel().tolist()) for found in orders}) == len(orders)


def test_the_order_is_the_same_on_every_machine():
    """Recorded: an order that changes would silently change every run that is resumed."""
    order = Order([3, 0, 5, 2], 4, 2, 0, PHASE, 4)
    assert order.positions(0, 0).tolist() == [5, 7]
    assert order.block(Block(0, 0), 0).tolist() == [5, 7, 6, 8]
    other = Order([1000, 3000, 2000], 100, 4, 7, "03-split-4", 500)
    assert other.positions(123, 3)[:6].tolist() == [987, 680, 666, 569, 795, 881]


# --- blocks ------------------------------------------------------------------------------------------


@given(settings_of(), st.integers(0, 2))
@settings(deadline=None, max_examples=100)
def test_steps_blocks_and_rows_agree(made: dict, epoch: int):
    order = Order(**made)
    first = epoch * order.steps_per_epoch
    part = order.batch // order.slots
    for step in range(first, first + order.steps_per_epoch):
        assert order.epoch(step) == epoch
        block, rows = order.block_of(step), order.rows(step)
        assert block.epoch == epoch
        for slot in range(order.slots):
            whole = order.block(block, slot)
            assert whole.dtype == np.int64
            assert len(whole[rows]) == part
            np.testing.assert_array_equal(whole[rows], order.positions(step, slot))
        after = order.after(block)
        assert after > step
        assert order.block_of(after) > block
        assert order.block_of(after - 1) == block
        assert order.rows(after) == slice(0, part)


@given(settings_of(), st.integers(0, 2))
@settings(deadline=None, max_examples=100)
def test_blocks_of_a_slot_are_its_stream_and_touch_few_shards(made: dict, epoch: int):
    order = Order(**made)
    counts = np.array(made["counts"])
    shard = np.repeat(np.arange(len(counts)), counts)
    smallest = counts[counts > 0].min()
    part = order.batch // order.slots
    stream_length = order.steps_per_epoch * part
    for slot in range(order.slots):
        blocks = [order.block(block, slot) for block in all_blocks(order, epoch)]
        np.testing.assert_array_equal(
            np.concatenate(blocks),
            np.concatenate(
                [order.positions(epoch * order.steps_per_epoch + t, slot) for t in range(stream_length // part)]
            ),
        )
        assert len({len(block) for block in blocks[:-1]}) <= 1
        for block in blocks:
            assert len(block) <= min(max(part, made["block"]), stream_length)
            assert len(np.unique(shard[block])) <= -(-len(block) // smallest) + 2
        for block in blocks[:-1]:
            assert len(block) > min(max(part, made["block"]), stream_length) - part  # as large as it may be


def test_a_stream_reads_the_shards_one_after_the_other():
    order = Order([100] * 30, 50, 2, 0, PHASE, 100)
    for epoch in range(4):
        for slot in range(2):
            opened = []
            for block in all_blocks(order, epoch):
                opened += sorted(set((order.block(block, slot) // 100).tolist()) - set(opened[-3:]))
            assert max(Counter(opened).values()) <= 2  # the one in which the tape is cut
            assert len(opened) <= 17


# --- how well it shuffles ----------------------------------------------------------------------------


def neighbours(found: np.ndarray) -> int:
    """How many pairs that are adjacent among the ids are adjacent in the order."""
    return int((np.abs(np.diff(found)) == 1).sum())


def test_in_one_block_neighbours_meet_as_rarely_as_in_a_uniform_permutation():
    count, epochs = 60, 600
    order = Order([7, 20, 3, 30], 10, 1, 0, PHASE, count)
    found = [epoch_of(order, epoch).ravel() for epoch in range(epochs)]
    mean = np.mean([neighbours(positions) for positions in found])
    expected = 2 * (count - 1) / count
    assert abs(mean - expected) < 5 * np.sqrt(expected / epochs)
    places = np.argsort(found, axis=1)  # of every id in every epoch
    assert np.abs(places.mean(0) - (count - 1) / 2).max() < 5 * count / np.sqrt(12 * epochs)


def test_within_a_block_neighbours_meet_rarely():
    order = Order([100] * 20, 50, 2, 0, PHASE, 200)
    blocks = [order.block(block, slot) for epoch in range(5) for block in all_blocks(order, epoch) for slot in (0, 1)]
    assert np.mean([neighbours(block) for block in blocks]) < 3  # 2 in a uniform permutation


def test_every_block_has_a_permutation_of_its_own():
    order = Order([4000], 100, 4, 0, PHASE, 100)
    patterns = [
        tuple(np.argsort(order.block(block, slot)).tolist())
        for epoch in (0, 1)
        for block in all_blocks(order, epoch)
        for slot in range(4)
    ]
    assert len(patterns) == 2 * 10 * 4
    assert len(set(patterns)) == len(patterns)


def test_shards_follow_each_other_in_another_order_every_epoch():
    order = Order([10] * 12, 10, 1, 0, PHASE, 10)
    circles = set()
    for epoch in range(6):
        shards = epoch_of(order, epoch).ravel() // 10
        seen = list(dict.fromkeys(shards.tolist()))
        at = seen.index(0)
        circles.add(tuple(seen[at:] + seen[:at]))
    assert len(circles) == 6


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[3], [1, 2], [0, 3, 0], []])
def test_too_few_images_are_refused(counts: list[int]):
    with pytest.raises(ValueError, match=f"{sum(counts)} images are fewer than one batch of 4"):
        Order(counts, 4, 2, 0, PHASE, 8)


def test_a_whole_batch_is_enough():
    order = Order([3, 1], 4, 2, 0, PHASE, 8)
    assert order.steps_per_epoch == 1
    assert sorted(epoch_of(order, 5).ravel().tolist()) == [0, 1, 2, 3]


def test_a_batch_that_slots_cannot_share_is_refused():
    with pytest.raises(ValueError, match="a batch of 10 cannot be divided into 4 equal slots"):
        Order([100], 10, 4, 0, PHASE, 8)
