"""The run folder: where each thing lies, and which run it is.

RUN/config.yaml  run.json
    tree/00-root/ 01-split-2/ …   model.safetensors tree.json routing.safetensors summary.json metrics/ COMPLETE
    diffusion/                    ema/ ema.safetensors unet.json (labels.safetensors) summary.json metrics/ COMPLETE
    samples/NAME/                 job.json shard-000000.tar … manifest.json grid.png COMPLETE
    evaluation.json  likelihood.safetensors  figures/  report/index.html
RUNS/evaluation/                  what judges samples (`tdiff.judging`), what it saw in real images (`tdiff.quality`)

A phase that is trained has checkpoints/ (`tdiff.checkpoints`) until it is COMPLETE.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any

from tdiff import config as configs
from tdiff import storage
from tdiff.config import Config
from tdiff.data.shards import Manifest, read_manifest
from tdiff.errors import ConfigError

CHECKPOINTS = "checkpoints"
"""Folder of a phase's resume checkpoints, in the phase's own."""

PHASE_NAME = re.compile(r"\d\d+-(root|refit|prune|finetune|split-\d+)")


def _number(phase: str) -> int:
    return int(phase.partition("-")[0])


@dataclass(frozen=True)
class Run:
    """A run folder, local or s3://."""

    url: str

    def at(self, *parts: str) -> str:
        """Where RUN/parts lies."""
        return storage.join(self.url, *parts)

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    def tree_phases(self) -> list[str]:
        """Names of the tree's phases that are finished, in order. Raises ConfigError if one is missing between them."""
        names = [name for name in storage.listing(self.at("tree")) if PHASE_NAME.fullmatch(name)]
        done = sorted((name for name in names if storage.finished(self.at("tree", name))), key=_number)
        for k, name in enumerate(done):
            if _number(name) != k:
                raise ConfigError(f"RUN {self.url} lacks phase {k:02d} but has {name}: start it over with --fresh.")
        return done

    @property
    def has_tree(self) -> bool:
        """Whether the tree is finished."""
        done = self.tree_phases()
        return bool(done) and done[-1].endswith("-finetune")

    @property
    def grown_tree(self) -> str:
        """Folder of the finished tree. Raises ConfigError if there is none yet."""
        done = self.tree_phases()
        if not self.has_tree:
            raise ConfigError(f"RUN {self.url} has no finished tree yet: finish it with python -m tdiff.train.")
        return self.at("tree", done[-1])

    def record(self) -> dict[str, Any]:
        """run.json. Raises ConfigError if this is no run folder."""
        try:
            record = storage.read_json(self.at("run.json"))
        except FileNotFoundError as error:
            raise ConfigError(f"RUN {self.url} is not a run folder: it holds no run.json.") from error
        missing = {"id", "digest", "config", "bf16", "data_url", "data_digest"} - record.keys()
        if missing:
            raise ConfigError(f"RUN {self.url} is damaged: its run.json has no entry {sorted(missing)[0]}.")
        return record

    def config(self) -> Config:
        """The resolved config of the run."""
        try:
            return configs.validated(self.record()["config"])
        except ConfigError as error:
            raise ConfigError(f"RUN {self.url} was made by another version of tdiff: {error}") from error

    def settle(self, config: Config) -> None:
        """Takes over a config that differs in nothing that results depend on."""
        self.update(config=config.model_dump(mode="json"))
        storage.write_text(self.at("config.yaml"), config.to_yaml())

    def manifest(self) -> Manifest:
        """The manifest of the run's data. Raises ConfigError if that is no longer what the run was made from."""
        record = self.record()
        manifest = read_manifest(record["data_url"])
        if manifest.digest != record["data_digest"]:
            url = record["data_url"]
            raise ConfigError(f"RUN {self.url} was made from other data than {url} now holds: bring the old data back.")
        return manifest

    def update(self, **entries: Any) -> None:
        """Adds entries to run.json."""
        storage.write_text(self.at("run.json"), json.dumps({**self.record(), **entries}, indent=2) + "\n")


def phase_summary(url: str, started: float) -> dict[str, Any]:
    """What a phase whose Ray job has just ended says of itself in summary.json, with the seconds that its last start
    took, begun at the Unix time `started`.
    """
    ended, file = time.time(), storage.join(url, "summary.json")
    summary = storage.read_json(file) if storage.exists(file) else {}
    first, last = summary.pop("first_step_at", started), summary.pop("last_step_at", ended)
    # Everything of a Ray job that is not its steps: processes, imports, set-up, and writing at the end.
    return summary | {"wall_seconds": ended - started, "overhead_seconds": ended - started - (last - first)}


def finish_phase(url: str, summary: dict[str, Any]) -> None:
    """Writes a phase's summary.json and marks its folder as complete."""
    storage.write_text(storage.join(url, "summary.json"), json.dumps(summary, indent=1) + "\n")
    storage.finish(url)
    drop_checkpoints(url)


def drop_checkpoints(url: str) -> None:
    """Removes a finished phase's resume checkpoints, which no later phase reads, unless that is done."""
    storage.remove(storage.join(url, CHECKPOINTS))


def existing(url: str) -> Run:
    """The run in a folder, local or s3://. Raises ConfigError if there is none."""
    run = Run(storage.absolute(url.rstrip("/")))
    run.record()
    return run
