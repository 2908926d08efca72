"""The reader: images out of shards, in the order that training asks for.

A shard is read whole and compared with the manifest's size and checksum before a member of it is used. What is
decoded goes to the node's cache (`tdiff.data.cache`); what comes next is read in the background.

Legend: B batch, M images, I channels, H image size, K shards.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from tdiff import storage
from tdiff.data.cache import Cache
from tdiff.data.decode import Images, shard_images
from tdiff.data.images import Pixels
from tdiff.data.order import Block, Ids, Order
from tdiff.data.shards import Manifest, Shard
from tdiff.errors import DataError

log = logging.getLogger(__name__)

AHEAD = 4
"""Shards that are read while an earlier one is waited for, and decoded ones that are kept at hand."""

MOST_MAPPED = 16_384
"""Cached shards that a process maps at a time; Linux allows it 65,530 maps."""


class Reader:
    """The images of a split, shard by shard.

    cache_root: where this node keeps decoded shards, cache_bytes: how much of them (0: none). max_bad_samples: how many
    images may be damaged; each is told, counted in `bad`, and its place taken by its neighbour in the shard.

    Raises DataError naming shard and key, whatever is asked of it, where the data is not what the manifest says.
    """

    def __init__(
        self,
        url: str,
        manifest: Manifest,
        split: str,
        cache_root: Path | None = None,
        cache_bytes: int = 0,
        max_bad_samples: int = 0,
    ):
        self.url = url
        self.manifest = manifest
        self.split = split
        self.shards = manifest.splits[split]
        self.max_bad_samples = max_bad_samples
        self.bad: dict[str, None] = {}
        self._doubted: set[str] = set()
        samples = [shard.samples for shard in self.shards]
        self._ends = np.cumsum(samples)
        self._first = self._ends - samples
        self._versions = check_shards(url, manifest, split)
        self._cache = None
        if cache_root is not None and cache_bytes:
            name = hashlib.sha256(f"{url} {manifest.digest}".encode()).hexdigest()[:32]
            self._cache = Cache(cache_root, name, cache_bytes)
        self._mapped: dict[int, Images] = {}
        # A shard is often wanted again at once: where one block ends, the next begins.
        self._recent: OrderedDict[int, Images] = OrderedDict()
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(AHEAD, "shards")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def counts(self, ids: Ids | None = None) -> list[int]:
        """How many of the ids (ascending; None: all) lie in each shard."""
        if ids is None:
            return [shard.samples for shard in self.shards]
        edges = np.searchsorted(ids, np.append(self._first, self._ends[-1]))
        return [int(count) for count in np.diff(edges)]

    def gather(self, ids: Ids) -> Pixels:
        """The images of the ids (places in the manifest's order), uint8 [B, I, H, H]; ids in any order."""
        return self.take(ids).images

    def take(self, ids: Ids) -> Images:
        """The images of the ids, as `gather` gives them, with their labels if all of them have one."""
        if self._cache is not None:
            self._cache.keep_alive()
        out = np.empty((len(ids), *self.manifest.shape), np.uint8)
        labels: NDArray[np.int64] | None = np.empty(len(ids), np.int64)
        of_shard = np.searchsorted(self._ends, ids, side="right")
        rows = np.argsort(of_shard, kind="stable")
        parts = np.split(rows, np.flatnonzero(np.diff(of_shard[rows])) + 1) if len(ids) else []
        shards = [int(of_shard[part[0]]) for part in parts]
        for k, part, images in zip(shards, parts, self._in_turn(shards), strict=True):
            within = ids[part] - self._first[k]
            out[part] = images.images[within]
            if images.labels is None:
                labels = None
            elif labels is not None:
                labels[part] = images.labels[within]
        return Images(out, labels)

    def blocks(self, first: int, last: int, size: int) -> Iterator[tuple[slice, Images]]:
        """The images first…last-1 in the manifest's order, `size` at a time, each with its place; one is read ahead."""
        places = [slice(k, min(k + size, last)) for k in range(first, last, size)]
        with ThreadPoolExecutor(1) as pool:
            coming = deque(pool.submit(self.take, np.arange(place.start, place.stop)) for place in places[:1])
            for place, after in zip_longest(places, places[1:]):
                if after is not None:
                    coming.append(pool.submit(self.take, np.arange(after.start, after.stop)))
                yield place, coming.popleft().result()

    def all(self) -> Images:
        """The whole split, in the manifest's order."""
        parts = list(self._in_turn(range(len(self.shards))))
        labels = [part.labels for part in parts if part.labels is not None]
        if labels and len(labels) != len(parts):
            raise DataError(f"{self.url}: some shards of {self.split} have labels and some have none")
        return Images(np.concatenate([part.images for part in parts]), np.concatenate(labels) if labels else None)

    def _in_turn(self, shards: Sequence[int]) -> Iterator[Images]:
        """Yields shards in turn, while threads read the next ones."""
        if all(k in self._mapped for k in shards):
            yield from (self._shard(k) for k in shards)
            return
        coming: deque[Future[Images]] = deque()
        try:
            for k in shards:
                coming.append(self._pool.submit(self._shard, k))
                if len(coming) > AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:  # after an error nobody wants them
                future.cancel()

    def _shard(self, k: int) -> Images:
        if (mapped := self._mapped.get(k)) is not None:
            return mapped
        with self._lock:
            if k in self._recent:
                self._recent.move_to_end(k)
                return self._recent[k]
        shard = self.shards[k]
        kept = hashlib.sha256(f"{shard.sha256} {self._versions[shard.name]}".encode()).hexdigest()[:32]
        tensors = None if self._cache is None else self._cache.read(kept)
        if tensors is not None and len(tensors["images"]) == shard.samples:
            labels = tensors.get("labels")
            images = Images(tensors["images"].numpy(), None if labels is None else labels.numpy())
            if len(self._mapped) >= MOST_MAPPED:
                self._mapped.clear()
            self._mapped[k] = images
            return images
        damaged: list[str] = []
        images = self._read(shard, damaged)
        with self._lock:
            for message in damaged:
                self._tell(message)
            self._recent[k] = images
            if len(self._recent) > AHEAD:
                self._recent.popitem(last=False)
        if self._cache is not None and not damaged:
            tensors = {"images": torch.from_numpy(images.images)}
            if images.labels is not None:
                tensors["labels"] = torch.from_numpy(images.labels)
            self._cache.write(kept, tensors)
        return images

    def _read(self, shard: Shard, damaged: list[str]) -> Images:
        """Reads, checks and decodes a shard; `damaged` gets the messages about images that may be damaged."""
        where = f"{self.url}: shard {shard.name}"
        try:
            content = storage.read_bytes(storage.join(self.url, shard.name))
        except FileNotFoundError as error:
            raise DataError(f"{where} is missing, though manifest.json lists it: bring it back") from error
        intact = len(content) == shard.bytes and hashlib.sha256(content).hexdigest() == shard.sha256
        classes = None if self.manifest.classes is None else len(self.manifest.classes)
        try:
            images = shard_images(content, where, self.manifest.shape, classes, damaged)
        except DataError as error:
            if intact:
                raise
            raise DataError(f"{self._not_intact(where, shard, content)}; {error}") from error
        excused = bool(damaged) and self.max_bad_samples > 0 and len(content) == shard.bytes
        if not intact and not (excused and len(images) == shard.samples):
            first = f"; first at {damaged[0].removeprefix(where + ', ')}" if damaged else ""
            raise DataError(self._not_intact(where, shard, content) + first)
        if not intact and shard.name not in self._doubted:
            self._doubted.add(shard.name)
            log.warning("%s: its SHA-256 differs, so other bytes than its damaged images' may have changed too", where)
        if len(images) != shard.samples:
            raise DataError(f"{where} holds {len(images)} samples, manifest.json says {shard.samples}: pack it again")
        return images

    def _not_intact(self, where: str, shard: Shard, content: bytes) -> str:
        return (
            f"{where} is damaged ({len(content)} bytes, manifest.json says {shard.bytes} with SHA-256 "
            f"{shard.sha256[:12]}…): copy or pack it again"
        )

    def _tell(self, message: str) -> None:
        """Counts a damaged image, once however often it is met. Raises DataError if they are too many."""
        known = message in self.bad
        self.bad[message] = None
        if len(self.bad) > self.max_bad_samples:
            raise DataError(
                f"{message}; mend it, or let data.max_bad_samples, which is {self.max_bad_samples}, skip more of them"
            )
        if not known:
            log.warning("%s: skipped (%d of %d allowed)", message, len(self.bad), self.max_bad_samples)


def check_shards(url: str, manifest: Manifest, split: str) -> dict[str, str]:
    """Compares what storage lists with the manifest, reading nothing: shard's name -> a text that changes if it does.

    Raises DataError naming the shard that is missing or has another size.
    """
    there = storage.versions(url)
    for shard in manifest.splits[split]:
        if shard.name not in there:
            raise DataError(f"{url}: shard {shard.name} is missing, though manifest.json lists it: bring it back")
        size, _ = there[shard.name]
        if size != shard.bytes:
            raise DataError(
                f"{url}: shard {shard.name} is damaged ({size} bytes, manifest.json says {shard.bytes}): "
                "copy or pack it again"
            )
    return {shard.name: there[shard.name][1] for shard in manifest.splits[split]}


class Batches:
    """The images of a phase's batches: (step, slot) -> uint8 [B/S, I, H, H], for steps below `steps`; `take` gives them
    with their labels.

    While one block of a slot is used, its next is gathered in the background: two blocks of each slot that this
    worker serves are in memory. ids: those that `order` orders, ascending (None: the whole split).
    """

    def __init__(self, reader: Reader, order: Order, steps: int, ids: Ids | None = None):
        self._reader = reader
        self._order = order
        self._steps = steps
        self._ids = ids
        self._pool = ThreadPoolExecutor(1, "blocks")
        self._now: dict[int, tuple[Block, Images]] = {}
        self._coming: dict[int, tuple[Block, Future[Images]]] = {}

    def __call__(self, step: int, slot: int) -> Pixels:
        return self.take(step, slot).images

    def take(self, step: int, slot: int) -> Images:
        """The same with their labels, if all of their block have one."""
        block = self._order.block_of(step)
        if slot not in self._now or self._now[slot][0] != block:
            self._now.pop(slot, None)  # its memory is needed for the next
            coming = self._coming.pop(slot, None)
            if coming is not None and coming[0] == block:
                self._now[slot] = (block, coming[1].result())
            else:  # the first block, not queued behind the second ones of other slots
                self._now[slot] = (block, self._gathered(block, slot))
            if (next_step := self._order.after(block)) < self._steps:
                following = self._order.block_of(next_step)
                self._coming[slot] = (following, self._pool.submit(self._gathered, following, slot))
        found, rows = self._now[slot][1], self._order.rows(step)
        return Images(found.images[rows], None if found.labels is None else found.labels[rows])

    def _gathered(self, block: Block, slot: int) -> Images:
        positions = self._order.block(block, slot)
        return self._reader.take(positions if self._ids is None else self._ids[positions])


def read_split(url: str, manifest: Manifest, split: str, max_bad_samples: int = 0) -> Images:
    """All images of a split, decoded, in manifest order."""
    return Reader(url, manifest, split, max_bad_samples=max_bad_samples).all()
