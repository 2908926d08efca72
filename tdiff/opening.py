"""Opening a run: its data, its identity, its folder, its lock; all that can be refused before anything trains."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tdiff import config as configs
from tdiff import launch, lease, storage
from tdiff.config import Config
from tdiff.data.folder import set_name
from tdiff.data.known import open_known
from tdiff.data.shards import Manifest, read_manifest
from tdiff.data.stream import check_shards
from tdiff.errors import ConfigError, DataError
from tdiff.hardware import computes_in_bf16
from tdiff.mirroring import tracking_uri
from tdiff.packing import pack
from tdiff.runs import Run, existing
from tdiff.work import labels
from tdiff.work.diffusing import deepspeed_settings
from tdiff.work.growing import check

log = logging.getLogger(__name__)

RECORDS = ("run.json", "config.yaml")
"""The first says what the run is; either says that its folder is a run's."""


@dataclass(frozen=True)
class Opening:
    """An open run, and how many workers it wants."""

    run: Run
    crew: launch.Crew


@contextmanager
def opened(config: Config, fresh: bool = False) -> Iterator[Opening]:
    """The run of a config, made or found, locked for as long as it is worked on. Raises ConfigError or DataError."""
    crew = launch.crew_of(config.workers)
    tracking_uri(config)  # raises what would be raised at the end
    deepspeed_settings(config.diffusion)  # read again when it is needed; what is wrong with it is known now
    data_url, manifest = open_data(config)
    bf16 = resolve_precision(config.precision, crew.least)
    tree = None if config.tree.run is None else _tree_of(config, manifest, fresh)
    given = set_name(manifest.name)  # it comes from whoever made the data: no path may be in it
    name = config.name or f"{given}-{digest_of(config, bf16, manifest.digest, tree)[:8]}"
    run = Run(storage.absolute(storage.join(config.runs, name)))
    try:
        with only_driver(run):
            _identify(run, config, bf16, data_url, manifest, tree, fresh)
            yield Opening(run, crew)
    except PermissionError as error:
        raise ConfigError(f"runs={config.runs} cannot be written ({error}): take a folder that can.") from error


def digest_of(config: Config, bf16: bool, data_digest: str, tree_digest: str | None = None) -> str:
    """SHA-256 over all that a run's results depend on: settings, the precision they resolve to, the data, and the
    weights of the tree if it is another run's.
    """
    parts = [config.identity(), bf16, data_digest, *([tree_digest] if tree_digest else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tree_of(config: Config, manifest: Manifest, fresh: bool) -> str:
    """SHA-256 of the weights of the finished tree of the run that `tree.run` names.

    Raises ConfigError if that tree is none, or not one of this data and these settings.
    """
    assert config.tree.run is not None
    if config.name is not None and not fresh:
        run = Run(storage.absolute(storage.join(config.runs, config.name)))
        if "run.json" in storage.listing(run.url) and run.has_tree and run.config().tree.run == config.tree.run:
            return str(run.record()["tree_digest"])  # copied already: the other run is not needed any more
    other, field = existing(config.tree.run), f"tree.run={config.tree.run}"
    if (theirs := other.record()["data_digest"]) != manifest.digest:
        raise ConfigError(f"{field} was grown on other data ({theirs[:12]} there, {manifest.digest[:12]} here).")
    if what := [line for line in configs.differences(config, other.config()) if line.startswith("tree.")]:
        raise ConfigError(f"{field} has another tree ({'; '.join(what[:3])}): take its settings.")
    content = storage.read_bytes(storage.join(other.grown_tree, "model.safetensors"))
    return hashlib.sha256(content).hexdigest()


def _identify(
    run: Run, config: Config, bf16: bool, data_url: str, manifest: Manifest, tree_digest: str | None, fresh: bool
) -> None:
    """Writes run.json, or finds that the one there says the same. Raises ConfigError if it does not."""
    found = {name for name in storage.listing(run.url) if not storage.PARTIAL.search(name)}
    there = found - {".lock", lease.FILE}
    if fresh and there:
        if not there & set(RECORDS):
            raise ConfigError(f"RUN {run.url} is no run's folder, so --fresh does not delete it: use another name=….")
        # run.json first, config.yaml last: cut short anywhere, this is still a run's folder without a valid record.
        for name in ("run.json", *sorted(there - set(RECORDS)), "config.yaml"):
            storage.remove(run.at(name))
        there = set()
    if "run.json" not in there:
        if there - {"config.yaml"}:
            raise ConfigError(f"RUN {run.url} holds files but no run.json: start it over with --fresh.")
        digest = digest_of(config, bf16, manifest.digest, tree_digest)
        record: dict[str, Any] = {
            "id": f"{run.name}-{digest[:12]}-{time.time_ns():x}",
            "digest": digest,
            "config": config.model_dump(mode="json"),
            "bf16": bf16,
            "data_url": data_url,
            "data_digest": manifest.digest,
            "tree_digest": tree_digest,
            "commit": _commit(),
            "versions": {name: metadata.version(name) for name in ("tdiff", "torch", "deepspeed", "ray", "webdataset")},
        }
        storage.write_text(run.at("config.yaml"), config.to_yaml())
        storage.write_text(run.at("run.json"), json.dumps(record, indent=2) + "\n")
        return
    record, theirs = run.record(), run.config()
    if config.precision == "auto":  # resolved once, when the run was made
        bf16 = record["bf16"]
    if record["digest"] != digest_of(config, bf16, manifest.digest, tree_digest):
        what = configs.differences(config, theirs)
        if record.get("tree_digest") != tree_digest:
            what.append(f"tree.run: {config.tree.run} here, {theirs.tree.run} there")
        if record["data_digest"] != manifest.digest:
            what.append(f"data: {manifest.digest[:12]} here, {record['data_digest'][:12]} there")
        if record["bf16"] != bf16:
            what.append(f"bf16: {bf16} here, {record['bf16']} there")
        raise ConfigError(
            f"RUN {run.url} belongs to another config ({'; '.join(what[:3])}): give this one a name=… of its own, "
            "or --fresh."
        )
    if record["data_url"] != data_url:
        run.update(data_url=data_url)
    # What results do not depend on may change: whoever works on the run later goes by what was said last.
    if config.model_dump(mode="json") != record["config"]:
        run.settle(config)


@contextmanager
def only_driver(run: Run) -> Iterator[None]:
    """Keeps a second driver off a run while this one works on it. Raises ConfigError."""
    taken = f"RUN {run.url} is being worked on by another process: wait for it, or use a name=… of its own."

    def refuse() -> None:
        raise ConfigError(taken)

    if not storage.is_local(run.url):
        with lease.leased(run.url, refuse):
            yield
        return
    import fcntl

    try:
        Path(run.url).mkdir(parents=True, exist_ok=True)
        lock = Path(run.at(".lock")).open("a")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"RUN {run.url} cannot be written ({error}): take another runs=… folder.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(taken) from error
        except OSError as error:
            if error.errno not in storage.NO_LOCKS:
                raise
            log.warning("RUN %s lies on a file system without locks: start no second command on it", run.url)
        yield


def data_url(config: Config) -> str:
    """Where the shards are, or will be."""
    return storage.absolute(config.data.url or storage.join(config.runs, "data", config.data.name))


def open_data(config: Config) -> tuple[str, Manifest]:
    """The shards' folder and manifest. Packs `data.name` into the runs folder, unless `data.url` says where data is.

    Raises ConfigError or DataError.
    """
    url = data_url(config)
    try:
        if config.data.url is None and not storage.exists(storage.join(url, "manifest.json")):
            source = open_known(config.data.name, config.data.source_dir)
            check_size(config, source.name, len(source.splits["train"]), source.shape)
            # Where two runs start at once, one packs and the other waits.
            pack(source, url, config.data.shard_samples, wait=True)
        manifest = read_manifest(url)
    except storage.StorageError:
        raise  # says what to do already
    except OSError as error:
        field = f"data.url={config.data.url}" if config.data.url else f"runs={config.runs}"
        raise ConfigError(f"{field} cannot be read or written ({error}): take another folder.") from error
    if not manifest.splits.get("train"):
        raise DataError(f"{url} has no split named train")
    check_size(config, manifest.name, manifest.samples("train"), manifest.shape)
    for split in manifest.splits:
        check_shards(url, manifest, split)
    return url, manifest


def check_size(config: Config, name: str, images: int, shape: tuple[int, int, int]) -> None:
    """Raises ConfigError where growing on data of that many training images of [I, H, H] could not even begin."""
    try:
        check(config, name, images, shape)
        labels.check(config, images, shape)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def resolve_precision(precision: str, workers: int) -> bool:
    """Whether stage 2 runs in bf16. auto: on GPUs, and on CPUs that compute in it. Raises ConfigError.

    What counts is what the workers have: where RAY_ADDRESS names a cluster one of them is asked, not this machine.
    """
    if precision == "fp32":
        return False
    if not os.environ.get("RAY_ADDRESS"):
        return bf16_for(precision, computes_in_bf16())
    launch.connect(workers)
    [(_, fast)] = launch.map_on_actors(computes_in_bf16, [()], 1)
    return bf16_for(precision, fast)


def bf16_for(precision: str, fast: bool) -> bool:
    """Whether `precision` means bf16 where workers compute in bf16 or (not `fast`) do not. Raises ConfigError."""
    if precision == "bf16" and not fast:
        raise ConfigError("precision=bf16 needs a GPU or CPU that computes in bf16, the workers have none: take auto.")
    return fast and precision != "fp32"


def _commit() -> str | None:
    """The git commit of the code, with a + if the work tree differs from it.

    Outside a checkout of its own, as in an image or a Ray job's working directory: what TDIFF_COMMIT says, or None.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # A repository that does not have this file is somebody else's, with a .venv in it.
        subprocess.run([*git, "ls-files", "--error-unmatch", "--", "__init__.py"], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TDIFF_COMMIT") or None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
