"""A whole run: which phases make it, what is done already, what comes next.

    data -> tree/00-root -> splits, refits -> prune -> finetune -> diffusion -> samples -> evaluation -> figures

Every phase is one folder that is finished when its COMPLETE marker is there, so the same command started again
goes on where the last one stopped. The decisions between the tree's phases are pure functions of what the
phases wrote (`tdiff.tree.growth`).
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from tdiff import config as configs
from tdiff import launch, results, storage
from tdiff.config import Config, ConfigError
from tdiff.data.shards import DataError, Manifest, pack, read_manifest
from tdiff.data.sources import SOURCES
from tdiff.runs import Run
from tdiff.tracking import Mirror, read_metrics
from tdiff.tree.growth import leaf_to_split, leaves_to_prune
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import PHASE as DIFFUSION
from tdiff.work.diffusing import DiffusionPhase, diffuse
from tdiff.work.growing import GrowingPhase, Kind, check, grow, load_routing, load_topology, prune

Say = Callable[[str], None]
STAGES = ("tree", "diffusion", "samples", "report")
PHASE_NAME = re.compile(r"\d\d+-(root|refit|prune|finetune|split-\d+)")


def workers_for(slots: int, at_most: int) -> int:
    """The largest divisor of `slots` that is not above `at_most`."""
    return max(w for w in range(1, min(slots, at_most) + 1) if slots % w == 0)


def resolve_precision(precision: str) -> bool:
    """Whether stage 2 runs in bf16. auto: on GPUs, and on CPUs that compute in it. Raises ConfigError."""
    has_gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported() if has_gpu else torch.cpu._is_avx512_bf16_supported()
    if precision == "bf16" and not fast:
        raise ConfigError("precision='bf16' needs a GPU or CPU that computes in bf16, this one does not: take auto.")
    return precision != "fp32" and fast


# --- what comes next ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextPhase:
    """name: NN-root, NN-split-ID, NN-refit, NN-prune or NN-finetune; node: the leaf to split; leaves: to prune."""

    name: str
    kind: Kind | Literal["prune"]
    node: int | None = None
    leaves: tuple[int, ...] = ()


def kind_of(phase: str) -> str:
    """`03-split-4` -> `split`."""
    return phase.split("-")[1]


def next_tree_phase(done: list[str], config: Config, read: Callable[[str], tuple[Topology, Any]]) -> NextPhase | None:
    """What comes after the finished phases `done`; None if the tree is finished.

    read: a finished phase's name -> its topology and its routing of the training images.
    """
    number = f"{len(done):02d}"
    if not done:
        return NextPhase(f"{number}-root", "root")
    last = kind_of(done[-1])
    if last == "finetune":
        return None
    if last == "prune":
        return NextPhase(f"{number}-finetune", "finetune")
    tree = config.tree
    topology, left = read(done[-1])
    leaf = leaf_to_split(topology, left, tree.max_leaves, tree.features - 1, tree.batch)
    if leaf is None:
        return NextPhase(f"{number}-prune", "prune", leaves=tuple(leaves_to_prune(topology, left)))
    splits = sum(kind_of(phase) == "split" for phase in done)
    if last == "split" and splits % tree.refit_every == 0 and tree.epochs.refit > 0:
        return NextPhase(f"{number}-refit", "refit")
    return NextPhase(f"{number}-split-{leaf}", "split", node=leaf)


# --- opening a run -----------------------------------------------------------------------------------


def open_run(config: Config, fresh: bool = False) -> Run:
    """The run folder for a config, made or found. Raises ConfigError if it belongs to another config."""
    run = Run(storage.absolute(storage.join(config.runs, config.run_name)))
    bf16 = resolve_precision(config.precision)
    if storage.exists(run.at("run.json")) and not fresh:
        record, theirs = run.record(), run.config()
        if record["digest"] != config.digest():
            what = "; ".join(configs.differences(config, theirs)[:3])
            raise ConfigError(
                f"RUN {run.url} belongs to another config ({what}): give this one a name=… of its own, or --fresh."
            )
        return run
    try:
        _make_room(run, fresh)
        storage.write_text(run.at("config.yaml"), config.to_yaml())
        record = {
            "id": f"{run.name}-{config.digest()[:12]}-{time.time_ns():x}",
            "digest": config.digest(),
            "config": config.model_dump(mode="json"),
            "bf16": bf16,
            "commit": _commit(),
            "versions": {name: metadata.version(name) for name in ("tdiff", "torch", "deepspeed", "ray", "webdataset")},
        }
        storage.write_text(run.at("run.json"), json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"runs={config.runs} cannot be written ({error}): take a folder that can.") from error
    return run


def _make_room(run: Run, fresh: bool) -> None:
    """Deletes a run's folder if asked to. Raises ConfigError for a folder that is another's, or being worked on."""
    there = set(storage.listing(run.url))
    if fresh and there & {"run.json", "config.yaml"}:
        with only_driver(run):
            # First, so that a deletion that is cut short never leaves old phases under a valid record.
            storage.remove(run.at("run.json"))
            storage.remove(run.url)
    elif fresh and there:
        raise ConfigError(f"RUN {run.url} is not a run's folder, so --fresh does not delete it: use another name=….")
    elif "tree" in there:
        raise ConfigError(f"RUN {run.url} holds phases but no run.json: start it over with --fresh.")


def _commit() -> str | None:
    """The git commit of the code, with a + if the work tree differs from it; None outside a checkout."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def data_url(config: Config) -> str:
    """Where the shards are, or will be."""
    return storage.absolute(config.data.url or storage.join(config.runs, "data", config.data.name))


def open_data(config: Config) -> tuple[str, Manifest]:
    """The shards' folder and manifest, packed first if there are none. Raises ConfigError."""
    url = data_url(config)
    try:
        if not storage.exists(storage.join(url, "manifest.json")):
            pack(SOURCES[config.data.name](), url, config.data.shard_samples)
        manifest = read_manifest(url)
        if "train" not in manifest.splits:
            raise DataError(f"{url} has no split named train")
        check(config, manifest)
    except OSError as error:
        raise ConfigError(f"data.url={url} cannot be read or written ({error}): take another folder.") from error
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    return url, manifest


@contextmanager
def only_driver(run: Run) -> Iterator[None]:
    """Keeps a second driver off a local run folder while this one works on it. Raises ConfigError."""
    if not storage.is_local(run.url):
        yield
        return
    import fcntl

    with Path(run.at(".lock")).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"RUN {run.url} is being worked on by another process: wait for it, or use a name=… of its own."
            ) from error
        yield


# --- the run -----------------------------------------------------------------------------------------


@dataclass
class Driver:
    """Carries one run from where it is to where it should stop."""

    config: Config
    run: Run
    data_url: str
    mirror: Mirror
    say: Say

    def connect(self) -> None:
        launch.connect(self.config.workers)

    def grow_tree(self, until: str | None) -> bool:
        """Runs the tree's phases; whether it came to its end (False: `until` came first)."""
        tree = self.config.tree
        workers = workers_for(tree.slots, self.config.workers)
        while True:
            done = self.run.tree_phases()
            for name in done:
                self._mirror_phase(self.run.at("tree", name), name)
            if until in done:
                return False
            upcoming = next_tree_phase(done, self.config, self._read_phase)
            if upcoming is None:
                return True
            url = self.run.at("tree", upcoming.name)
            previous = self.run.at("tree", done[-1]) if done else None
            started = time.time()
            if upcoming.kind == "prune":
                assert previous is not None
                prune(previous, url, upcoming.leaves)
            else:
                self.connect()
                kind, leaf = upcoming.kind, upcoming.node
                phase = GrowingPhase(upcoming.name, kind, url, previous, leaf, self.data_url, self.config)
                launch.fit(grow, phase, workers, url, self.say)
            self._finish(url, upcoming.name, started)

    def _read_phase(self, name: str) -> tuple[Topology, Any]:
        url = self.run.at("tree", name)
        return load_topology(url), load_routing(url, "train")

    def diffuse(self) -> None:
        """Trains the diffusion model, unless that is done."""
        url = self.run.at(DIFFUSION)
        if not storage.finished(url):
            self.connect()
            section = self.config.diffusion
            phase = DiffusionPhase(url, self.run.grown_tree, self.data_url, self.config, self.run.record()["bf16"])
            started = time.time()
            launch.fit(diffuse, phase, workers_for(section.slots, self.config.workers), url, self.say)
            self._finish(url, DIFFUSION, started)
        self._mirror_phase(url, DIFFUSION)

    def _finish(self, url: str, name: str, started: float) -> None:
        """Marks a phase as complete, noting what it took; says so."""
        ended = time.time()
        summary_url = storage.join(url, "summary.json")
        summary = json.loads(storage.read_text(summary_url)) if storage.exists(summary_url) else {}
        first, last = summary.pop("first_step_at", started), summary.pop("last_step_at", ended)
        # Everything of a Ray job that is not its steps: processes, imports, set-up, and writing at the end.
        summary["wall_seconds"] = ended - started
        summary["overhead_seconds"] = ended - started - (last - first)
        storage.write_text(summary_url, json.dumps(summary, indent=1) + "\n")
        storage.finish(url)
        leaves = f"{summary['leaves']} leaves" if "leaves" in summary else ""
        self.say(
            f"{name:<14} {summary['wall_seconds']:6.1f} s  (of which start and end {summary['overhead_seconds']:.1f} s)"
            f"  {leaves}"
        )

    def _mirror_phase(self, url: str, name: str) -> None:
        summary = json.loads(storage.read_text(storage.join(url, "summary.json")))
        totals = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        self.mirror.phase(name, read_metrics(storage.join(url, "metrics")), totals)

    def sample(self) -> None:
        """Draws what the numbers and pictures need, unless that is done."""
        jobs = results.unfinished(results.standard_jobs(self.run))
        if jobs:
            self.connect()
            started = time.time()
            count = results.draw(jobs, self.config.workers)
            seconds = time.time() - started
            self.run.update(sampling={"images": count, "seconds": seconds})
            self.say(f"{'samples':<14} {seconds:6.1f} s  {count} images")

    def report(self) -> dict[str, Any]:
        """Numbers, pictures and the report page, unless that is done; returns the numbers."""
        done = results.evaluation(self.run)
        if done is None or not storage.finished(self.run.at("report")):
            started = time.time()
            done = results.evaluate(self.run)
            pictures = results.figures(self.run)
            results.report(self.run)
            storage.finish(self.run.at("report"))
            self.say(f"{'report':<14} {time.time() - started:6.1f} s")
        else:
            pictures = {name: storage.read_bytes(self.run.at("figures", name)) for name in results.PICTURES}
        self.mirror.result(dict(_numbers(done)), pictures)
        return done


def _numbers(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted names of all numbers in nested dicts."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def tracking_uri(config: Config) -> tuple[str, str | None]:
    """MLflow's address and, for the default sqlite store, its folder of artifacts. Raises ConfigError."""
    if config.tracking:
        return config.tracking, None
    runs = storage.absolute(config.runs)
    if not storage.is_local(runs):
        raise ConfigError(f"runs={config.runs} cannot hold MLflow's sqlite file: set tracking=URI of an MLflow server.")
    return f"sqlite:///{runs}/mlflow.db", f"file://{runs}/mlartifacts"


@dataclass(frozen=True)
class Outcome:
    """What `train` returns: the run, its numbers (None where it stopped earlier), MLflow's address and trouble."""

    run: Run
    numbers: dict[str, Any] | None
    tracking: str
    warning: str | None


def train(config: Config, until: str | None = None, fresh: bool = False, say: Say = print) -> Outcome:
    """Carries a run on from where it is, to its end or to the end of `until` (a stage or a tree phase's name).

    Raises ConfigError, before any worker starts, for what can be known to be wrong by then.
    """
    if until is not None and until not in STAGES and not PHASE_NAME.fullmatch(until):
        raise ConfigError(f"--until {until} is no stage or phase: take one of {', '.join(STAGES)}, or as 03-split-4.")
    uri, artifacts = tracking_uri(config)
    launch.check_workers(config.workers)
    run = open_run(config, fresh)
    with only_driver(run):
        url, manifest = open_data(config)
        record = run.record()
        if record.setdefault("data_digest", manifest.digest) != manifest.digest:
            raise ConfigError(
                f"RUN {run.url} was made from other data than {url} now holds: "
                "bring the old data back, or use a name=… of its own."
            )
        run.update(data_digest=manifest.digest, data_url=url)
        mirror = Mirror(uri, config.data.name, run.name, record["id"], artifacts)
        versions = {f"version.{name}": version for name, version in record["versions"].items()}
        tags = {"git_commit": record["commit"] or "unknown", "data_digest": manifest.digest, **versions}
        mirror.open(configs.flat(config), tags, {"config.yaml": config.to_yaml()})
        driver = Driver(config, run, url, mirror, say)
        numbers = None
        try:
            if driver.grow_tree(until) and until != "tree":
                if until is not None and until not in STAGES:
                    grown = run.tree_phases()[-1]
                    raise ConfigError(f"--until {until} never came: the tree of RUN {run.url} ended with {grown}.")
                driver.diffuse()
                if until != "diffusion":
                    driver.sample()
                    if until != "samples":
                        numbers = driver.report()
        finally:
            launch.disconnect()
            warning = mirror.close()
    return Outcome(run, numbers, uri, warning)
