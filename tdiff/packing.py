"""Packing: a source becomes shards and a manifest, one shard a task, here or on Ray workers.

    DEST/packing/plan.json            first: what is packed here
    DEST/train/shard-000000.tar       then every shard, and behind it …
    DEST/packing/train/shard-000000.tar.json   … its entry: this shard is finished
    DEST/manifest.json                last; then packing/ is removed

The same command again goes on from the finished shards, and ends with the same bytes as one that was never stopped.
A shard is a fixed part of its split's order, whoever packs it and whatever happened to others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tdiff import launch, storage
from tdiff.data.folder import folder_of_images
from tdiff.data.images import Shape
from tdiff.data.known import NAMES, open_known
from tdiff.data.shards import Manifest, Shard, check_manifest, default_shard_samples, read_manifest, shard_bytes
from tdiff.data.sources import Samples, Source
from tdiff.data.tars import Tars, checked_tar, existing_tars
from tdiff.errors import ConfigError, DataError

BYTES_FOR_WORKERS = 200_000_000
"""Sources whose files are larger are packed on Ray workers, unless one says how many: below, starting Ray takes longer.
Sources held in memory are packed in this process."""

FORMAT = 1
"""Goes up when the same source would be packed into other bytes."""


@dataclass(frozen=True)
class Entry:
    """A finished shard. shard: None where all of its images were damaged; bad: the messages about those left out;
    top_label: the highest label of an existing shard (None: it has no labels, or they are known already).
    """

    shard: Shard | None
    bad: tuple[str, ...] = ()
    top_label: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Entry:
        shard = None if raw["shard"] is None else Shard(**raw["shard"])
        return cls(shard, tuple(raw["bad"]), raw["top_label"])


@dataclass(frozen=True)
class Encode:
    """Makes a shard of images: this part of `split`, which begins at its image `first`."""

    part: Samples
    split: str
    first: int
    source: str

    def entry(self, url: str, name: str) -> Entry:
        content, bad = shard_bytes(self.part, self.split, self.first, self.source)
        samples = len(self.part) - len(bad)
        if not samples:
            return Entry(None, tuple(bad))
        storage.write_bytes(storage.join(url, name), content)
        return Entry(_shard(name, samples, content), tuple(bad))


@dataclass(frozen=True)
class Check:
    """Takes an existing shard as it is: checks it, and copies it unless it is in its place already.

    sha256: what a manifest that is there already says of it.
    """

    url: str
    shape: Shape
    sha256: str | None = None

    def entry(self, url: str, name: str) -> Entry:
        content, samples, top_label = checked_tar(self.url, name, self.shape)
        if self.sha256 is not None and hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"{self.url}, shard {name} is not what manifest.json there says: copy it anew")
        if self.url != url:
            storage.write_bytes(storage.join(url, name), content)
        return Entry(_shard(name, samples, content), top_label=top_label)


def _shard(name: str, samples: int, content: bytes) -> Shard:
    return Shard(name, samples, len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Plan:
    """All shards of a data set before they are there: name below DEST -> what makes it, by split. classes: None where
    there are no labels, or existing shards will tell. digest: of the source and of the settings that matter.
    """

    name: str
    shape: Shape
    classes: tuple[str, ...] | None
    shards: dict[str, dict[str, Encode | Check]]
    digest: str
    file_bytes: int
    in_place: str | None = None

    def manifest(self, entries: dict[str, Entry]) -> Manifest:
        """Raises DataError if a split has no image left or one shard twice, or only some shards have labels."""
        splits: dict[str, tuple[Shard, ...]] = {}
        for split, jobs in self.shards.items():
            splits[split] = tuple(shard for name in jobs if (shard := entries[name].shard) is not None)
            if not splits[split]:
                raise DataError(f"all images of {self.name} for {split} are damaged: nothing is left to pack")
        manifest = Manifest(self.name, self.shape, self.classes or _classes_of(entries), splits)
        try:
            check_manifest(manifest)
        except (TypeError, ValueError) as error:
            raise DataError(f"{self.name} is no data set: {error}") from error
        return manifest


def _classes_of(entries: dict[str, Entry]) -> tuple[str, ...] | None:
    """Names for the labels that existing shards turned out to have."""
    without = [name for name, entry in entries.items() if entry.top_label is None]
    if len(without) == len(entries):
        return None
    if without:
        raise DataError(f"shard {without[0]} has no labels, though others have: label all images or none")
    return tuple(str(k) for k in range(1 + max(entry.top_label or 0 for entry in entries.values())))


def plan_of(source: Source | Tars, shard_samples: int | None = None) -> Plan:
    """Cuts a source into shards of `shard_samples` images (None: `default_shard_samples`). Raises DataError."""
    shards: dict[str, dict[str, Encode | Check]] = {}
    if isinstance(source, Tars):
        for split, names in source.splits.items():
            shards[split] = {name: Check(source.url, source.shape, source.sha256.get(name)) for name in names}
        digest = _digest(source.name, source.shape, source.classes, None, source.listed)
        return Plan(source.name, source.shape, source.classes, shards, digest, source.file_bytes, in_place=source.url)
    if not all(len(samples) for samples in source.splits.values()) or "train" not in source.splits:
        raise DataError(f"{source.name} has no images for training or for testing: nothing is packed")
    each = shard_samples or default_shard_samples(source.shape)
    for split, samples in source.splits.items():
        shards[split] = {
            f"{split}/shard-{number:06d}.tar": Encode(samples.part(first, first + each), split, first, source.name)
            for number, first in enumerate(range(0, len(samples), each))
        }
    prints = {split: samples.fingerprint() for split, samples in source.splits.items()}
    digest = _digest(source.name, source.shape, source.classes, each, prints)
    file_bytes = sum(samples.file_bytes for samples in source.splits.values())
    return Plan(source.name, source.shape, source.classes, shards, digest, file_bytes)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


def open_source(name: str, source_dir: str | None = None, **options: Any) -> Source | Tars:
    """SOURCE as the command line names it: a known data set, a folder of images or of shards, local or s3://.

    options: of `folder_of_images`. Raises ConfigError or DataError.
    """
    if name in NAMES:
        return open_known(name, source_dir)
    url = storage.absolute(name)
    if storage.is_local(url) and not Path(url).is_dir():
        raise ConfigError(f"SOURCE {name} is no folder: name one, or one of {', '.join(NAMES)}.")
    versions = storage.versions(url)
    tars = existing_tars(url, versions)
    if tars is None:
        return folder_of_images(url, versions, **options)
    if any(value not in (None, True) for value in options.values()):
        raise ConfigError(f"SOURCE {name} is a WebDataset, which is taken as it is: leave out options for images.")
    return tars


def pack(
    source: Source | Tars,
    url: str,
    shard_samples: int | None = None,
    *,
    workers: int | None = None,
    max_bad: int = 0,
    wait: bool = False,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int, int], None] = lambda done, total, images: None,
) -> Manifest:
    """Writes a source as shards and a manifest to `url`, local or s3://, or goes on where that was stopped.

    workers: 1 for this process, more for Ray's; None: this process, or `launch.default_workers` where the source's
    files are larger than BYTES_FOR_WORKERS. max_bad: how many image files may be damaged; they are left out, and said.
    wait: for another process that packs here, and take what it made; otherwise that is an error. progress is told how
    many shards of how many are finished, and how many images this call packed.

    Raises ConfigError, DataError or StorageError (DEST is full) where it cannot go on; what is finished is kept.
    """
    plan = plan_of(source, shard_samples)
    with _only_packer(url, wait):
        if wait and storage.exists(storage.join(url, "manifest.json")):
            return read_manifest(url)
        return _packed(plan, url, workers, max_bad, say, progress)


def _packed(
    plan: Plan,
    url: str,
    workers: int | None,
    max_bad: int,
    say: Callable[[str], None],
    progress: Callable[[int, int, int], None],
) -> Manifest:
    entries = _finished_before(plan, url)
    if entries is None:
        manifest = read_manifest(url)
    else:
        jobs = {name: job for of_split in plan.shards.values() for name, job in of_split.items()}
        todo = [(name, job) for name, job in jobs.items() if name not in entries]
        if entries:
            say(f"{len(entries)} of {len(jobs)} shards are there already")
        _check_bad(entries, max_bad)
        images = 0
        progress(len(entries), len(jobs), 0)
        for name, entry in _made(todo, url, _workers(plan, workers)):
            entries[name] = entry
            _check_bad(entries, max_bad)
            images += entry.shard.samples if entry.shard else 0
            progress(len(entries), len(jobs), images)
        for name in jobs:
            for message in entries[name].bad:
                say(f"left out: {message}")
        manifest = plan.manifest(entries)
        storage.write_text(storage.join(url, "manifest.json"), manifest.to_json())
    # The plan last: stopped before that, the next call knows that the data set is its own and tidies up.
    for name in storage.listing(storage.join(url, "packing")):
        if name != "plan.json":
            storage.remove(storage.join(url, "packing", name))
    storage.remove(storage.join(url, "packing"))
    return manifest


def _workers(plan: Plan, workers: int | None) -> int:
    if workers is None and plan.file_bytes < BYTES_FOR_WORKERS:
        return 1
    return launch.default_workers(workers)


def _made(todo: Sequence[tuple[str, Encode | Check]], url: str, workers: int) -> Iterator[tuple[str, Entry]]:
    """Makes the shards and their entries, in whatever order they finish."""
    if workers == 1 or len(todo) < 2:
        for name, job in todo:
            yield name, make_shard(name, job, url)
        return
    launch.connect(workers)
    tasks = [(name, job, url) for name, job in todo]
    for index, entry in launch.map_on_actors(make_shard, tasks, workers, use_gpu=False):
        yield todo[index][0], entry


def make_shard(name: str, job: Encode | Check, url: str) -> Entry:
    """One shard and, once it is written, its entry. Done twice, it writes the same bytes."""
    entry = job.entry(url, name)
    storage.write_text(storage.join(url, "packing", f"{name}.json"), entry.to_json())
    return entry


def _check_bad(entries: dict[str, Entry], max_bad: int) -> None:
    bad = [message for entry in entries.values() for message in entry.bad]
    if len(bad) > max_bad:
        found = f"{len(bad)} damaged images found so far" if len(bad) > 1 else "the first damaged image"
        raise DataError(f"{bad[-1]}: mend it, or allow it by --max-bad-samples, which is {max_bad} ({found})")


def _finished_before(plan: Plan, url: str) -> dict[str, Entry] | None:
    """What an earlier call finished of this plan, after writing the plan if none was begun; None: all, manifest too.

    Raises ConfigError if DEST holds anything else.
    """
    there = set(storage.listing(url))
    file = storage.join(url, "packing", "plan.json")
    if "packing" in there and storage.exists(file):
        if storage.read_json(file).get("digest") != plan.digest:
            raise ConfigError(
                f"DEST {url} holds the beginning of another packing (another source, changed files or other settings): "
                "take a new folder, or delete this one."
            )
        if "manifest.json" in there:
            return None
        return _entries(plan, url)
    if "manifest.json" in there and plan.in_place == url:
        raise ConfigError(f"DEST {url} has its manifest.json already: delete that file to have it written anew.")
    if "manifest.json" in there:
        raise ConfigError(f"DEST {url} is a finished data set: take a new folder, or delete this one.")
    if plan.in_place != url:
        foreign = sorted(name for name in there if name != "packing")
        if foreign:
            raise ConfigError(f"DEST {url} holds other files, such as {foreign[0]}: take a new folder.")
    storage.remove(storage.join(url, "packing"))  # at most a plan that was never written to its end
    shards = sum(len(jobs) for jobs in plan.shards.values())
    record = {"name": plan.name, "shape": plan.shape, "shards": shards, "digest": plan.digest}
    storage.write_text(file, json.dumps(record) + "\n")
    return {}


def _entries(plan: Plan, url: str) -> dict[str, Entry]:
    """The finished shards that are still there. Removes what killed writers left behind."""
    there = storage.versions(url)
    own = ("packing/", "manifest.json") if plan.in_place == url else ("",)
    for name in there:
        if storage.PARTIAL.search(name) and name.startswith(own):
            storage.remove(storage.join(url, name))
    entries: dict[str, Entry] = {}
    for jobs in plan.shards.values():
        for name in jobs:
            if f"packing/{name}.json" not in there:
                continue
            entry = Entry.from_json(storage.read_json(storage.join(url, "packing", f"{name}.json")))
            if entry.shard is None or there.get(name, (None, ""))[0] == entry.shard.bytes:
                entries[name] = entry
    return entries


@contextmanager
def _only_packer(url: str, wait: bool) -> Iterator[None]:
    """Keeps a second process from packing into a local folder at the same time. Raises ConfigError."""

    def held() -> None:
        if not wait:
            raise ConfigError(f"DEST {url} is being packed by another process: wait for it.")

    with storage.locked(url, held):  # in object storage two would write the same bytes twice
        yield
