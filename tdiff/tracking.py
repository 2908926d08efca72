"""Metrics: JSONL in the run folder first, MLflow as its mirror.

Workers only write JSONL, one part per resume checkpoint and one at the end, so that a resumed run neither loses nor
doubles a step. The driver mirrors the parts that are there to MLflow: workers need neither its import (seconds) nor its
address. Where a run is in MLflow, and what comes there after it: `tdiff.mirroring`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tdiff import storage
from tdiff.errors import ConfigError, without_passwords
from tdiff.tree.model import TreeVAE

NOTE = "mlflow.note.content"
"""The tag that MLflow shows as a run's description, in Markdown."""

FILES = "tdiff.files"
"""The tag that tells which pictures and report MLflow has: a digest of their content."""

PAUSE = 30.0
"""Seconds without tries after one that MLflow did not take: a start must not wait for it at every phase again."""

Sample = tuple[str, float, dict[str, float]]
"""What a node was busy with: its name, the Unix time in seconds, values by name (`tdiff.nodes`)."""

Ended = Literal["FAILED", "KILLED"]
"""How MLflow calls the end of a run before its time."""

ABOUT_RUN = """\
**{name}**: a TreeDiffusion run on `{data}`{leaves}. Its phases are the runs below it, named {name}/PHASE.

| metrics here | unit |
|---|---|
| `clustering.…` | shares from 0 to 1, more is better; of the tree, and of k-means and Ward for scale |
| `likelihood.elbo`, `likelihood.log_likelihood` | nats per image, more is better |
| `samples.…frechet…` | squared distance in the features of the network in its name, less is better |
| `samples.…precision…`, `samples.…recall…`, `…confidence…` | shares from 0 to 1, more is better |
| `samples.…entropy…` | nats, less is better |
| `generated.NAME.SPLIT.…` | the same for what `tdiff.generate --fid` drew into samples/NAME, against that split |
| `…_error` | standard error of the metric without this ending |
| `seconds.…` | seconds of wall time |
| `system/NODE/…` | as their names say, of a whole machine; the step is the seconds since the run began |
"""

ABOUT_PHASE = """\
The step is the optimizer's step.

| metrics | unit |
|---|---|
| `loss`, `reconstruction`, `kl_…` of the tree | nats per image, mean over the steps since the last line |
| `loss`, `validation/loss` of the diffusion | squared error per value, weighted as `diffusion.objective` says |
| `validation/leaf-…`, `validation/time-…` | the same, by leaf and by tenth of the noising time, least noise first |
| `images` | images seen since the phase began |
| `alpha` | weight of the KL terms, 0 to 1 |
| `share/NODE`, `train_share/NODE` | share of the held-out or training images that reach a node |
| `workers` | how many trained it in its last start |
| `wall_seconds`, `overhead_seconds` | seconds of that start; of it what was not steps |
"""


class MetricParts:
    """Metric lines of one phase, kept until `write(step)` makes them the file URL/STEP.jsonl. url None: dropped."""

    def __init__(self, url: str | None):
        self.url = url
        self.lines: list[str] = []

    def add(self, **values: float) -> None:
        if self.url is not None:
            self.lines.append(json.dumps(values))

    def writer(self, step: int) -> Callable[[], None]:
        """What writes the lines so far since the last part, now or later; until it has, they are kept."""
        count = len(self.lines)

        def write() -> None:
            if self.url is not None and count:
                storage.write_text(storage.join(self.url, part_name(step)), "\n".join(self.lines[:count]) + "\n")
            del self.lines[:count]

        return write

    def write(self, step: int) -> None:
        """Writes the lines since the last part."""
        self.writer(step)()

    def drop_beyond(self, step: int) -> None:
        """Removes parts that a killed run wrote after the checkpoint it is resumed from."""
        if self.url is not None:
            for name in storage.listing(self.url):
                if name.endswith(".jsonl") and int(name.removesuffix(".jsonl")) > step:
                    storage.remove(storage.join(self.url, name))


def part_name(step: int) -> str:
    return f"{step:09d}.jsonl"


def read_metrics(url: str, after: int = -1) -> list[dict[str, Any]]:
    """The metric lines of a phase's folder beyond the step `after`, in order; parts without any are not read."""
    parts = [name for name in storage.listing(url) if name.endswith(".jsonl")]
    names = [name for name in parts if int(name.removesuffix(".jsonl")) > after]
    texts = (storage.read_text(storage.join(url, name)) for name in names)
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    # A worker thought dead may have written a part of its own: the same lines once more.
    found = {line["step"]: line for line in lines if line["step"] > after}
    return [found[step] for step in sorted(found)]


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
        reason = without_passwords(" ".join(str(error).split()))[:300]
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
    kind = {"mlflow.experimentKind": "custom_model_development"}  # else the UI takes it for one of language models
    return client, str(client.create_experiment(experiment, artifact_location=artifacts, tags=kind))


def _tagged_run(
    client: Any, experiment_id: str, tags: dict[str, str], name: str, more: dict[str, str] | None = None
) -> str:
    """Id of the run with these tags, made if there is none, with `more` tags."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment_id], wanted, max_results=1)
    if found:
        return str(found[0].info.run_id)
    return str(client.create_run(experiment_id, tags=tags | (more or {}), run_name=name).info.run_id)


class Mirror:
    """Copies a run's metrics, settings, pictures, report and tree to MLflow: one parent run, a child per phase.

    Works in a thread of its own beside training. Idempotent: what MLflow holds already is not logged again, so a
    resumed run goes on in the same MLflow runs without duplicate steps. What MLflow does not take is kept and tried
    again with what comes next, `PAUSE` seconds later at the earliest: an outage costs a delay, and a warning if it
    lasts to the end.
    """

    def __init__(self, uri: str, experiment: str, run_name: str, run_id: str, artifacts: str | None):
        self.uri = uri
        self.problem: str | None = None
        self._experiment, self._name, self._run_id, self._artifacts = experiment, run_name, run_id, artifacts
        self._client: Any = None
        self._parent = ""
        self._started = 0  # of the parent run, in ms
        self._params: dict[str, Any] = {}
        self._children: dict[str, str] = {}  # ids by phase
        self._mirrored: dict[str, int] = {}  # a phase's last step that MLflow has, where it is known
        self._undone: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._failed_at = -math.inf
        self._pool = ThreadPoolExecutor(1, "mlflow-mirror")

    def open(self, params: dict[str, Any], tags: dict[str, str], files: dict[str, str]) -> None:
        """Finds or makes the parent run, with its settings, tags and text files."""
        self._later(self._open, params, tags, files)

    def progress(self, name: str, url: str) -> None:
        """What a phase that still runs has written into its folder of metrics by now, into a child run of that name.

        To be called now and then: only parts that are new are read.
        """
        self._later(self._progress, name, url)

    def phase(self, name: str, url: str, totals: dict[str, float]) -> None:
        """A finished phase's metrics: what is in the folder and is not mirrored yet, and its totals."""
        self._later(self._phase, name, url, totals)

    def system(self, samples: list[Sample]) -> None:
        """What nodes were busy with, into the parent run: as MLflow's page for system metrics shows it."""
        if self.problem is None:  # in an outage they are dropped
            self._later(self._system, samples)

    def result(self, metrics: dict[str, float], files: dict[str, bytes], tags: dict[str, str] | None = None) -> None:
        """Numbers, files (by their path) and tags of a run as they are now, into the parent run; computed anew, they
        are logged anew.
        """
        self._later(self._result, metrics, files, tags or {})

    def finish(self, tree: dict[str, bytes]) -> None:
        """The run is at its end. tree: contents of tree.json and model.safetensors, which become a model."""
        self._later(self._finish, tree)

    def go_on(self) -> None:
        """The run is worked on again: one that had failed or was stopped is shown as running."""
        self._later(self._go_on)

    def close(self, ended: Ended | None = None) -> str | None:
        """Waits until all is copied; the sentence to show if something could not be.

        ended: how, where the work ends before its time. Without it, a run that is not finished is still running.
        """
        if ended is not None:
            self._later(self._end, ended)
        self._pool.shutdown(wait=True)
        return self.problem

    def _later(self, function: Callable[..., None], *arguments: Any) -> None:
        if (function, arguments) not in self._undone:
            self._undone.append((function, arguments))
            self._pool.submit(self._catch_up)

    def _catch_up(self) -> None:
        """Does what is undone, in order, as far as MLflow takes it."""
        if time.monotonic() - self._failed_at < PAUSE:
            return
        while self._undone:
            function, arguments = self._undone[0]
            try:
                function(*arguments)
            except Exception as error:  # whatever MLflow's stores and their drivers raise; shown by `close`
                reason = without_passwords(" ".join(str(error).split()))[:300]
                self.problem = f"MLflow at {self.uri} is behind, the next start catches up: {reason}"
                self._failed_at = time.monotonic()
                return
            del self._undone[0]
            self.problem = None

    def _open(self, params: dict[str, Any], tags: dict[str, str], files: dict[str, str]) -> None:
        # Here, in the thread: importing MLflow takes seconds in which the first phase's workers already start.
        self._client, self._experiment_id = _connected(self.uri, self._experiment, self._artifacts)
        from mlflow.entities import RunTag

        more = {"tdiff.phase": "all", NOTE: self._about()}
        self._parent = _tagged_run(self._client, self._experiment_id, {"tdiff.run": self._run_id}, self._name, more)
        # An earlier start may have been cut short between any two of these.
        run = self._client.get_run(self._parent)
        known, self._started = run.data, run.info.start_time
        self._params = params
        self._log_params(self._parent, params, known.params)
        new = [RunTag(key, value) for key, value in tags.items() if key not in known.tags]
        self._client.log_batch(self._parent, tags=new)
        stored = {artifact.path for artifact in self._client.list_artifacts(self._parent)}
        for name, text in files.items():
            if name not in stored:
                self._client.log_text(self._parent, text, name)

    def _log_params(self, run: str, params: dict[str, Any], known: dict[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(key, str(value)) for key, value in params.items() if key not in known]
        for first in range(0, len(new), 100):  # the most that one call takes
            self._client.log_batch(run, params=new[first : first + 100])

    def _about(self, leaves: float | None = None) -> str:
        told = "" if leaves is None else f", whose tree has {leaves:g} leaves"
        return ABOUT_RUN.format(name=self._name, data=self._experiment, leaves=told)

    def _child(self, phase: str) -> str:
        """Id of a phase's run, which has the parent's name and the settings of its stage, by which MLflow compares."""
        if phase not in self._children:
            tags = {"mlflow.parentRunId": self._parent, "tdiff.phase": phase}
            name = f"{self._name}/{phase}"
            found = _tagged_run(self._client, self._experiment_id, tags, name, {NOTE: ABOUT_PHASE})
            self._set_running(found)
            known = self._client.get_run(found).data.params
            section = "diffusion." if phase == "diffusion" else "tree."
            self._log_params(found, {key: v for key, v in self._params.items() if key.startswith(section)}, known)
            self._children[phase] = found
        return self._children[phase]

    def _progress(self, name: str, url: str) -> None:
        from mlflow.entities import Metric

        child = self._child(name)
        # Forgotten until all is logged: after a failure nobody knows what MLflow took.
        last = self._mirrored.pop(name, None)
        if last is None:
            last = max((metric.step for metric in self._client.get_metric_history(child, "loss")), default=-1)
        now = int(time.time() * 1000)
        batch: list[Metric] = []
        for line in read_metrics(url, last):
            last = line["step"]
            metrics = [Metric(key, float(value), now, last) for key, value in line.items() if key != "step"]
            if len(batch) + len(metrics) > 1000:  # the most that one call takes; whole lines, or a step would be cut
                self._client.log_batch(child, metrics=batch)
                batch = []
            batch += metrics
        if batch:
            self._client.log_batch(child, metrics=batch)
        self._mirrored[name] = last

    def _phase(self, name: str, url: str, totals: dict[str, float]) -> None:
        from mlflow.entities import Metric

        child = self._child(name)
        run = self._client.get_run(child)
        if run.info.status == "FINISHED":
            return
        self._progress(name, url)
        now = int(time.time() * 1000)
        new = [Metric(key, float(value), now, 0) for key, value in totals.items() if key not in run.data.metrics]
        self._client.log_batch(child, metrics=new)
        self._client.set_terminated(child, "FINISHED")

    def _system(self, samples: list[Sample]) -> None:
        from mlflow.entities import Metric

        # Steps are seconds since the run began: a resumed run's go on from them.
        metrics = [
            Metric(f"system/{node}/{key}", float(value), int(at * 1000), int(at - self._started / 1000))
            for node, at, values in samples
            for key, value in values.items()
        ]
        for first in range(0, len(metrics), 1000):
            self._client.log_batch(self._parent, metrics=metrics[first : first + 1000])

    def _result(self, metrics: dict[str, float], files: dict[str, bytes], tags: dict[str, str]) -> None:
        from mlflow.entities import Metric

        known = self._client.get_run(self._parent).data
        if known.tags.get(NOTE) == self._about() and "leaves" in metrics:  # else somebody has written their own
            self._client.set_tag(self._parent, NOTE, self._about(metrics["leaves"]))
        for key, value in tags.items():
            if known.tags.get(key) != value:
                self._client.set_tag(self._parent, key, value)
        now = int(time.time() * 1000)
        new = [Metric(k, float(v), now, 0) for k, v in metrics.items() if not _same(known.metrics.get(k), float(v))]
        for first in range(0, len(new), 1000):
            self._client.log_batch(self._parent, metrics=new[first : first + 1000])
        digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in files.values())).hexdigest()
        if files and known.tags.get(FILES) != digest:
            with tempfile.TemporaryDirectory() as folder:
                _write(Path(folder), files)
                self._client.log_artifacts(self._parent, folder)
            self._client.set_tag(self._parent, FILES, digest)

    def _go_on(self) -> None:
        self._set_running(self._parent)

    def _set_running(self, run: str) -> None:
        if self._client.get_run(run).info.status in ("FAILED", "KILLED"):
            self._client.update_run(run, status="RUNNING")

    def _end(self, status: str) -> None:
        for run in (*self._children.values(), self._parent):
            if self._client.get_run(run).info.status == "RUNNING":
                self._client.set_terminated(run, status)

    def _finish(self, tree: dict[str, bytes]) -> None:
        if self._client.get_run(self._parent).info.status != "FINISHED":
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


def _same(known: float | None, value: float) -> bool:
    return known == value or (known is not None and math.isnan(known) and math.isnan(value))


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
