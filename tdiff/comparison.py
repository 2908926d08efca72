"""Many runs beside each other: what the tables of `tdiff.evaluation.tables` are made of, and where they go."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tdiff import config as configs
from tdiff import results, storage, tracking
from tdiff.data.shards import read_manifest
from tdiff.errors import ConfigError, without_passwords
from tdiff.evaluation.published import method
from tdiff.evaluation.tables import Entry
from tdiff.figures.plots import sample_rows, save
from tdiff.mirroring import tracking_of
from tdiff.runs import Run

NAME = "tables"
"""Of the MLflow run that holds tables."""


def entries(runs: Sequence[Run]) -> list[Entry]:
    """What the tables need of every run. Raises ConfigError for one that comes twice or is not evaluated; DataError."""
    first: dict[str, Run] = {}
    for run in runs:
        digest = run.record()["digest"]
        if digest in first:
            raise ConfigError(
                f"RUN {run.url} and {first[digest].url} are one run: they agree in data, settings and seed, so name "
                "one of them."
            )
        first[digest] = run
    names = Counter(run.name for run in runs)
    return [_entry(run, run.name if names[run.name] == 1 else run.url) for run in runs]


def _entry(run: Run, name: str) -> Entry:
    record, config = run.record(), run.config()
    data, images = _data_set(run)
    settings = configs.dotted(config.identity()) | {"bf16": record["bf16"]}
    del settings["seed"], settings["diffusion.condition"]
    return Entry(
        run=name,
        data=data,
        digest=record["data_digest"],
        images=images,
        seed=config.seed,
        condition=config.diffusion.condition,
        settings=settings,
        tree=_tree_digest(run),
        numbers=_numbers(run),
    )


def _numbers(run: Run) -> dict[str, Any]:
    """The run's evaluation.json. Raises ConfigError if there is none, or it says too little about how it was made."""
    again = f"python -m tdiff.evaluate {run.url}"
    if (numbers := results.evaluation(run)) is None:
        raise ConfigError(f"RUN {run.url} is not evaluated yet: {again} gives its numbers.")
    samples = numbers.get("samples") or {}
    if samples and not isinstance(samples.get("reference"), dict):
        raise ConfigError(
            f"RUN {run.url} has numbers that do not say how its samples were measured: {again} gives them anew."
        )
    return numbers


def _data_set(run: Run) -> tuple[str, dict[str, int]]:
    """Name of the run's data set, and its images by split: none are known where the data is gone or another by now.

    Raises DataError if the data has no name without its manifest.
    """
    url, name = run.record()["data_url"], run.config().data
    if name.url is None and not storage.exists(storage.join(url, "manifest.json")):
        return name.name, {}
    manifest = read_manifest(url)
    if manifest.digest != run.record()["data_digest"]:
        return manifest.name, {}
    return manifest.name, {split: manifest.samples(split) for split in manifest.splits}


def _tree_digest(run: Run) -> str:
    """SHA-256 of the weights of the run's tree, its own or the one it took. Raises ConfigError if it has none."""
    if taken := run.record().get("tree_digest"):
        return str(taken)
    return hashlib.sha256(storage.read_bytes(storage.join(run.grown_tree, "model.safetensors"))).hexdigest()


def samples_side_by_side(runs: Sequence[Run]) -> bytes | None:
    """The papers' Figs. 2 and 3 as PNG: samples of the TreeVAE, and of every run's diffusion model for the same latents
    and noise. None unless there are two such runs: on one tree, of one seed, with as many images a shard.
    """
    drawn = [(run, found) for run in runs if (found := results.first_samples(run)) is not None]
    alike = [(run, found) for run, found in drawn if np.array_equal(found.treevae, drawn[0][1].treevae)]
    if len(alike) < 2:
        return None
    names = [method(run.config().diffusion.condition) for run, _ in alike]
    blocks = [(method("treevae"), alike[0][1].treevae / 255)]
    for (run, found), name in zip(alike, names, strict=True):
        blocks.append((name if names.count(name) == 1 else f"{name} ({run.name})", found.images / 255))
    return save(sample_rows(blocks, columns=10))


def store(run: Run, uri: str | None) -> tuple[str, str | None]:
    """MLflow's address, `uri` or else the run's own, and where the default store keeps files.

    Raises ConfigError if the run has none, or if there is a password in it.
    """
    if uri is not None:
        if without_passwords(uri) != uri:
            raise ConfigError(configs.password_told("--tracking"))
        return uri, None
    if (address := tracking_of(run)) is None:
        raise ConfigError(f"RUN {run.url} has no MLflow of its own: name one with --tracking URI, or --tracking none.")
    return address


def log(runs: Sequence[Run], data: Sequence[str], address: tuple[str, str | None], files: dict[str, str]) -> None:
    """Logs files into the MLflow run `tables` of every data set's experiment: one for each list of runs, in any order.

    Raises ConfigError if MLflow cannot be used.
    """
    uri, artifacts = address
    ids = sorted(str(run.record()["id"]) for run in runs)
    of = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    for experiment in dict.fromkeys(data):
        tracking.log_files(uri, experiment, artifacts, NAME, {"tdiff.tables": of}, files)
