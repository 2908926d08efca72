"""A run in MLflow: where it is mirrored to, under which name, and how its numbers are called there.

`tdiff.train` has a mirror open while it works; what `evaluate`, `report` and `generate --fid` compute later is added to
the same MLflow run (`add_result`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tdiff import config as configs
from tdiff import storage
from tdiff.config import Config
from tdiff.errors import ConfigError
from tdiff.runs import Run
from tdiff.tracking import Mirror


def tracking_uri(config: Config) -> tuple[str, str | None]:
    """MLflow's address and, for the default sqlite store, its folder of artifacts. Raises ConfigError."""
    if config.tracking:
        return config.tracking, None
    runs = storage.absolute(config.runs)
    if not storage.is_local(runs):
        raise ConfigError(f"runs={config.runs} cannot hold MLflow's sqlite file: set tracking=URI of an MLflow server.")
    return f"sqlite:///{runs}/mlflow.db", f"file://{runs}/mlartifacts"


def tracking_of(run: Run) -> tuple[str, str | None] | None:
    """The same for a run that is there, wherever its folder lies by now; None if it has no MLflow."""
    config, folder = run.config(), run.url.rpartition("/")[0]
    if config.tracking is None and not storage.is_local(folder):
        return None
    return tracking_uri(config.model_copy(update={"runs": folder}))


def mirror_of(run: Run, uri: str, artifacts: str | None) -> Mirror:
    """A run's mirror in the MLflow of that address, open: it goes on where another process left it."""
    config, record = run.config(), run.record()
    mirror = Mirror(uri, run.manifest().name, run.name, record["id"], artifacts)
    tags = {
        "mlflow.source.git.commit": record["commit"] or "unknown",
        "data_digest": record["data_digest"],
        **{f"version.{name}": version for name, version in record["versions"].items()},
    }
    mirror.open(configs.flat(config), tags, {"config.yaml": config.to_yaml()})
    return mirror


def add_result(run: Run, numbers: dict[str, Any], files: dict[str, bytes]) -> str | None:
    """What was computed anew of a run that is there, into its MLflow run, if it has any; returns what to say of it."""
    address = tracking_of(run)
    if address is None:
        return None
    mirror = mirror_of(run, *address)
    mirror.result(dict(numbers_in(numbers)), files, protocol_of(numbers))
    return mirror.close()


def protocol_of(numbers: dict[str, Any]) -> dict[str, str]:
    """Tags that tell how the samples of an evaluation.json were judged: their numbers compare where these agree."""
    samples = numbers.get("samples") or {}
    if "reference" not in samples:
        return {}
    reference = samples["reference"]
    tags = {"samples.reference": f"{reference['images']} {reference['split']} images"}
    return tags | {
        f"samples.{kind}": samples[kind]["digest"] for kind in ("classifier", "inception") if kind in samples
    }


def numbers_in(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Dotted names of all numbers in nested dicts, as MLflow takes them."""
    for key, value in tree.items():
        name = prefix + key.replace("=", ":").replace("+", "_")  # which MLflow does not take
        if isinstance(value, dict):
            yield from numbers_in(value, f"{name}.")
        elif isinstance(value, int | float):
            yield name, float(value)
