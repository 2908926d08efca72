"""Metrics: JSONL in the run folder first, MLflow as its mirror.

Workers only write JSONL, one part per resume checkpoint, so that a resumed run neither loses nor doubles a
step. The driver mirrors finished phases to MLflow: workers need neither its import (seconds) nor its address.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tdiff import storage
from tdiff.errors import ConfigError
from tdiff.tree.model import TreeVAE


class MetricParts:
    """Metric lines of one phase, kept until `write(step)` makes them the file URL/STEP.jsonl. url None: dropped."""

    def __init__(self, url: str | None):
        self.url = url
        self.lines: list[str] = []

    def add(self, **values: float) -> None:
        if self.url is not None:
            self.lines.append(json.dumps(values))

    def write(self, step: int) -> None:
        """Writes the lines since the last part."""
        if self.url is not None and self.lines:
            storage.write_text(storage.join(self.url, part_name(step)), "\n".join(self.lines) + "\n")
        self.lines.clear()

    def drop_beyond(self, step: int) -> None:
        """Removes parts that a killed run wrote after the checkpoint it is resumed from."""
        if self.url is not None:
            for name in storage.listing(self.url):
                if name.endswith(".jsonl") and int(name.removesuffix(".jsonl")) > step:
                    storage.remove(storage.join(self.url, name))


def part_name(step: int) -> str:
    return f"{step:09d}.jsonl"


def read_metrics(url: str) -> list[dict[str, Any]]:
    """All metric lines of a phase's folder, in order of steps."""
    names = [name for name in storage.listing(url) if name.endswith(".jsonl")]
    return [json.loads(line) for name in names for line in storage.read_text(storage.join(url, name)).splitlines()]


def log_files(
    uri: str, experiment: str, artifacts: str | None, name: str, tags: dict[str, str], files: dict[str, str]
) -> None:
    """Text files by name, into the run of an experiment that has these tags, made if there is none; they replace files
    that it has by these names. artifacts: where a new experiment keeps its files; None: its server knows.

    Raises ConfigError if MLflow cannot be used.
    """
    try:
        client, experiment_id = _connected(uri, experiment, artifacts)
        run = _tagged_run(client, experiment_id, tags, name)
        for file, text in files.items():
            client.log_text(run, text, file)
        client.set_terminated(run, "FINISHED")
    except Exception as error:  # whatever MLflow's stores and their drivers raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"MLflow at {uri} cannot be used ({reason}): name another with --tracking URI, or --tracking none."
        ) from error


def _connected(uri: str, experiment: str, artifacts: str | None) -> tuple[Any, str]:
    """MLflow's client, and the id of the experiment, made if there is none."""
    # MLflow's own 7 retries of 120 s keep a finished run waiting for minutes where nobody answers.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow.tracking import MlflowClient  # it takes seconds

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    if found:
        return client, str(found.experiment_id)
    return client, str(client.create_experiment(experiment, artifact_location=artifacts))


def _tagged_run(client: Any, experiment_id: str, tags: dict[str, str], name: str) -> str:
    """Id of the run with these tags, made if there is none."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment_id], wanted, max_results=1)
    if found:
        return str(found[0].info.run_id)
    return str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)


class Mirror:
    """Copies a run's metrics, settings, pictures, report and tree to MLflow: one parent run, a child per phase.

    Works in a thread of its own beside training. Idempotent: what MLflow holds already is not logged again, so a
    resumed run goes on in the same MLflow runs without duplicate steps. An outage costs a warning and a delay.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, run_id: str, artifacts: str | None):
        self.uri = uri
        self.problem: str | None = None
        self._experiment, self._name, self._run_id, self._artifacts = experiment, run_name, run_id, artifacts
        self._client: Any = None
        self._parent = ""
        self._pool = ThreadPoolExecutor(1, "mlflow-mirror")

    def open(self, params: dict[str, Any], tags: dict[str, str], files: dict[str, str]) -> None:
        """Finds or makes the parent run, with its settings, tags and text files."""
        self._later(self._open, params, tags, files)

    def phase(self, name: str, lines: list[dict[str, Any]], totals: dict[str, float]) -> None:
        """A phase's metrics, into a child run of that name."""
        self._later(self._phase, name, lines, totals)

    def result(self, metrics: dict[str, float], files: dict[str, bytes], tree: dict[str, bytes]) -> None:
        """The finished run's numbers and files (by their path), into the parent run, and its tree as a model.

        tree: contents of tree.json and model.safetensors.
        """
        self._later(self._result, metrics, files, tree)

    def close(self) -> str | None:
        """Waits until all is copied; the sentence to show if something could not be."""
        self._pool.shutdown(wait=True)
        return self.problem

    def _later(self, function: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            if self.problem is not None:  # the next start of the command copies everything
                return
            try:
                function(*arguments)
            except Exception as error:  # whatever MLflow's stores and their drivers raise; shown by `close`
                reason = " ".join(str(error).split())[:300]
                self.problem = f"MLflow at {self.uri} is behind, the next start catches up: {reason}"

        self._pool.submit(guarded)

    def _open(self, params: dict[str, Any], tags: dict[str, str], files: dict[str, str]) -> None:
        # Here, in the thread: importing MLflow takes seconds in which the first phase's workers already start.
        self._client, self._experiment_id = _connected(self.uri, self._experiment, self._artifacts)
        from mlflow.entities import Param, RunTag

        self._parent = self._run({"tdiff.run": self._run_id}, self._name)
        # An earlier start may have been cut short between any two of these.
        known = self._client.get_run(self._parent).data
        self._client.log_batch(
            self._parent,
            params=[Param(key, str(value)) for key, value in params.items() if key not in known.params],
            tags=[RunTag(key, value) for key, value in tags.items() if key not in known.tags],
        )
        stored = {artifact.path for artifact in self._client.list_artifacts(self._parent)}
        for name, text in files.items():
            if name not in stored:
                self._client.log_text(self._parent, text, name)

    def _run(self, tags: dict[str, str], name: str) -> str:
        """Id of the run with these tags, made if there is none."""
        if "mlflow.parentRunId" not in tags:
            tags = {**tags, "tdiff.phase": "all"}
        return _tagged_run(self._client, self._experiment_id, tags, name)

    def _phase(self, name: str, lines: list[dict[str, Any]], totals: dict[str, float]) -> None:
        from mlflow.entities import Metric

        tags = {"mlflow.parentRunId": self._parent, "tdiff.phase": name}
        child = self._run(tags, name)
        run = self._client.get_run(child)
        if run.info.status == "FINISHED":
            return
        history = self._client.get_metric_history(child, "loss") if lines else []
        last = max((metric.step for metric in history), default=-1)
        now = int(time.time() * 1000)
        batch: list[Metric] = []
        for line in lines:
            if line["step"] <= last:
                continue
            metrics = [Metric(key, float(value), now, line["step"]) for key, value in line.items() if key != "step"]
            if len(batch) + len(metrics) > 1000:  # the most that one call takes; whole lines, or a step would be cut
                self._client.log_batch(child, metrics=batch)
                batch = []
            batch += metrics
        batch += [Metric(key, float(value), now, 0) for key, value in totals.items() if key not in run.data.metrics]
        self._client.log_batch(child, metrics=batch)
        self._client.set_terminated(child, "FINISHED")

    def _result(self, metrics: dict[str, float], files: dict[str, bytes], tree: dict[str, bytes]) -> None:
        if self._client.get_run(self._parent).info.status == "FINISHED":
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._parent, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items()])
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), files)
            self._client.log_artifacts(self._parent, folder)
        self._model(tree)
        self._client.set_terminated(self._parent, "FINISHED")

    def _model(self, tree: dict[str, bytes]) -> None:
        """Logs the run's tree as a model, images -> clusters (`tdiff.served`), unless an earlier start has.

        As `mlflow.pyfunc.log_model(name="tree", …)` does it, which however asks for this process's one tracking URI.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models import Model

        for model in self._client.search_logged_models([self._experiment_id], f"source_run_id = '{self._parent}'"):
            if model.status == LoggedModelStatus.READY:
                return
            self._client.delete_logged_model(model.model_id)  # cut short
        model = self._client.create_logged_model(self._experiment_id, "tree", self._parent)
        described = Model(model.artifact_location, self._parent, model_uuid=model.model_id, model_id=model.model_id)
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), tree)
            save_model(Path(folder, "model"), Path(folder), mlflow_model=described)
            self._client.log_model_artifacts(model.model_id, str(Path(folder, "model")))
        self._client.log_outputs(self._parent, [LoggedModelOutput(model.model_id, step=0)])
        self._client.finalize_logged_model(model.model_id, "READY")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def save_model(folder: Path, tree: Path, **options: Any) -> None:
    """Writes an MLflow model, images -> clusters, into a new folder, from tree.json and model.safetensors in `tree`.

    It holds this package's code, and no pickle.
    """
    # Else bars of every copied file would go over the command's own lines.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    model = TreeVAE.from_json((tree / "tree.json").read_text())
    leaves, longest = len(model.topology.leaves), model.topology.depth + 1
    image = (model.spec.channels, model.spec.image_size, model.spec.image_size)
    outputs = {"reach": ("float64", (-1, leaves)), "leaf": ("int64", (-1,)), "path": ("int64", (-1, longest))}
    package = Path(__file__).parent
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(package / "served.py"),
        artifacts={"tree": str(tree / "tree.json"), "weights": str(tree / "model.safetensors")},
        code_paths=[str(package)],
        pip_requirements=[f"{name}=={_public_version(name)}" for name in ("mlflow", "numpy", "safetensors", "torch")],
        signature=ModelSignature(
            Schema([TensorSpec(np.dtype("float32"), (-1, *image))]),
            Schema([TensorSpec(np.dtype(kind), shape, name) for name, (kind, shape) in outputs.items()]),
        ),
        input_example=np.full((1, *image), 0.5, np.float32),
        **options,
    )


def _public_version(name: str) -> str:
    """What package indexes know: without a local label such as +cpu."""
    return metadata.version(name).partition("+")[0]
