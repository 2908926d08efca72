"""Protects the record of a run: JSONL parts that neither lose nor double a step, and their mirror in MLflow.

The mirror is tested against a real MLflow store (sqlite): started again and again it must not double anything, and
where MLflow cannot be reached it costs a sentence, never the run.
"""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from tdiff import storage
from tdiff.tracking import Ended, MetricParts, Mirror, part_name, read_metrics
from tdiff.tree.encoding import encode
from tdiff.tree.model import TreeSpec, TreeVAE
from tdiff.tree.topology import Topology


def line(step: int, **values: float) -> dict[str, Any]:
    return {"step": step, "images": step * 10, "loss": 1 / step, **values}


# --- JSONL -------------------------------------------------------------------------------------------


def test_parts_are_read_back_in_order_of_steps(tmp_path: Path):
    url = str(tmp_path / "metrics")
    parts = MetricParts(url)
    for end in (9, 10, 100, 99_999, 100_000):
        parts.add(**line(end - 1))
        parts.add(**line(end))
        parts.write(end)
    # What stands in two parts, as where a worker thought dead has written one, counts once.
    assert [found["step"] for found in read_metrics(url)] == [8, 9, 10, 99, 100, 99_998, 99_999, 100_000]
    assert read_metrics(url)[0] == line(8)
    assert storage.listing(url) == [part_name(end) for end in (9, 10, 100, 99_999, 100_000)]


def test_nothing_is_written_before_its_checkpoint_and_nothing_twice(tmp_path: Path):
    url = str(tmp_path)
    parts = MetricParts(url)
    parts.add(**line(1))
    assert read_metrics(url) == []
    parts.write(1)
    parts.write(2)  # nothing new: no empty part
    assert storage.listing(url) == [part_name(1)]
    parts.add(**line(3))
    parts.write(3)
    assert [found["step"] for found in read_metrics(url)] == [1, 3]


def test_a_resumed_run_drops_what_it_will_repeat(tmp_path: Path):
    url = str(tmp_path)
    parts = MetricParts(url)
    for step in (10, 20, 30):
        parts.add(**line(step))
        parts.write(step)
    (tmp_path / f"{part_name(40)}.abc.partial").write_text("{")  # killed while writing
    parts.drop_beyond(20)
    assert [found["step"] for found in read_metrics(url)] == [10, 20]
    parts.add(**line(30, again=1.0))
    parts.write(30)
    assert read_metrics(url)[-1] == line(30, again=1.0)
    parts.drop_beyond(0)
    assert read_metrics(url) == []


def test_numbers_that_are_none_survive(tmp_path: Path):
    parts = MetricParts(str(tmp_path))
    parts.add(step=1, loss=math.nan, other=math.inf)
    parts.write(1)
    (found,) = read_metrics(str(tmp_path))
    assert math.isnan(found["loss"])
    assert found["other"] == math.inf


def test_ranks_without_a_url_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    parts = MetricParts(None)
    parts.add(**line(1))
    parts.write(1)
    parts.drop_beyond(0)
    assert list(tmp_path.iterdir()) == []


def test_a_phase_without_metrics_has_none(tmp_path: Path):
    assert read_metrics(str(tmp_path / "nothing")) == []
    MetricParts(str(tmp_path / "nothing")).drop_beyond(3)


# --- MLflow ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """URI of a sqlite store, made once (it takes seconds), and its folder of artifacts."""
    folder = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder}/mlflow.db", f"file://{folder}/artifacts"


def tree_files() -> dict[str, bytes]:
    """tree.json and model.safetensors of a random tree of three leaves."""
    torch.manual_seed(3)
    topology = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")
    tree = TreeVAE(TreeSpec(1, 8, features=3, latent_channels=2, feature_channels=8), topology)
    return {"tree.json": tree.to_json().encode(), "model.safetensors": save_tensors(tree.state_dict())}


class Copy:
    """One run in one experiment of the store, mirrored as often as asked."""

    def __init__(self, store: tuple[str, str], folder: Path):
        from mlflow.tracking import MlflowClient

        (self.uri, self.artifacts), self.folder = store, folder
        self.experiment = self.id = uuid.uuid4().hex
        self.client = MlflowClient(self.uri)

    def again(self, phases: dict[str, list[dict[str, Any]]], result: dict[str, float] | None = None) -> str | None:
        """One start of the command: mirrors what there is by now."""
        mirror = Mirror(self.uri, self.experiment, "mine", self.id, self.artifacts)
        mirror.open({"seed": 0, "tree.batch": 128}, {"git_commit": "abc"}, {"config.yaml": "seed: 0\n"})
        for name, lines in phases.items():
            mirror.phase(name, self.written(name, lines), {"seconds": 1.5})
        if result is not None:
            files = {"figures/tree.png": b"\x89PNG", "report/index.html": b"<!doctype html>"}
            mirror.result(result, files)
            mirror.finish(tree_files())
        return mirror.close()

    def written(self, phase: str, lines: list[dict[str, Any]], every: int = 1000) -> str:
        """The folder of a phase's metrics, which holds these lines, in parts of so many."""
        url = str(self.folder / self.id / phase / "metrics")
        parts = MetricParts(url)
        parts.drop_beyond(-1)
        for number, one in enumerate(lines, 1):
            parts.add(**one)
            if number % every == 0 or number == len(lines):
                parts.write(one["step"])
        return url

    def mirror(self) -> Mirror:
        """An open mirror, as a start of the command has it."""
        mirror = Mirror(self.uri, self.experiment, "mine", self.id, self.artifacts)
        mirror.open({"seed": 0}, {}, {})
        return mirror

    def runs(self) -> dict[str, Any]:
        """All runs of the experiment by phase; the parent's phase is `all`."""
        experiment = self.client.get_experiment_by_name(self.experiment)
        found = self.client.search_runs([experiment.experiment_id])
        assert len({run.data.tags["tdiff.phase"] for run in found}) == len(found)
        return {run.data.tags["tdiff.phase"]: run for run in found}

    def models(self) -> list[Any]:
        """All models of the experiment."""
        experiment = self.client.get_experiment_by_name(self.experiment)
        return list(self.client.search_logged_models([experiment.experiment_id]))

    def history(self, phase: str, key: str = "loss") -> list[tuple[int, float]]:
        found = self.client.get_metric_history(self.runs()[phase].info.run_id, key)
        return sorted((metric.step, metric.value) for metric in found)


@pytest.fixture
def copy(store: tuple[str, str], tmp_path: Path) -> Copy:
    return Copy(store, tmp_path / "runs")


def settle(mirror: Mirror) -> None:
    """Waits until what was asked of it so far is done, or has failed."""
    mirror._pool.submit(lambda: None).result()


ROOT = [line(step, kl=0.1 * step) for step in (1, 2, 3)]
SPLIT = [line(step) for step in (1, 2)]


def test_a_run_becomes_a_parent_with_a_child_per_phase(copy: Copy):
    assert copy.again({"00-root": ROOT, "01-split-1": SPLIT, "02-prune": []}, {"acc": 0.5}) is None
    runs = copy.runs()
    assert set(runs) == {"all", "00-root", "01-split-1", "02-prune"}
    parent = runs["all"]
    assert parent.info.run_name == "mine"
    assert parent.data.params == {"seed": "0", "tree.batch": "128"}
    assert parent.data.tags["git_commit"] == "abc"
    assert parent.data.metrics == {"acc": 0.5}
    assert parent.info.status == "FINISHED"
    for phase in ("00-root", "01-split-1", "02-prune"):
        assert runs[phase].data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert runs[phase].info.run_name == f"mine/{phase}"
        assert "| `loss`" in runs[phase].data.tags["mlflow.note.content"]
        assert runs[phase].data.params == {"tree.batch": "128"}
        assert runs[phase].info.status == "FINISHED"
        assert runs[phase].data.metrics["seconds"] == 1.5
    assert copy.history("00-root") == [(one["step"], one["loss"]) for one in ROOT]
    assert copy.history("00-root", "kl") == [(one["step"], one["kl"]) for one in ROOT]
    assert copy.history("00-root", "images") == [(1, 10), (2, 20), (3, 30)]
    assert copy.history("01-split-1") == [(1, 1.0), (2, 0.5)]
    artifacts = {artifact.path for artifact in copy.client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"config.yaml", "figures", "report"}
    for folder, file in (("figures", "figures/tree.png"), ("report", "report/index.html")):
        assert [artifact.path for artifact in copy.client.list_artifacts(parent.info.run_id, folder)] == [file]


def test_a_command_started_again_adds_only_what_is_new(copy: Copy):
    assert copy.again({"00-root": ROOT}) is None
    before = {phase: run.info.run_id for phase, run in copy.runs().items()}
    assert copy.runs()["all"].info.status == "RUNNING"
    for _ in range(2):
        assert copy.again({"00-root": ROOT, "01-split-1": SPLIT}, {"acc": 0.5}) is None
    runs = copy.runs()
    assert set(runs) == {"all", "00-root", "01-split-1"}
    assert {phase: runs[phase].info.run_id for phase in before} == before
    assert copy.history("00-root") == [(one["step"], one["loss"]) for one in ROOT]
    assert copy.history("01-split-1") == [(1, 1.0), (2, 0.5)]
    assert copy.history("00-root", "seconds") == [(0, 1.5)]
    assert copy.history("all", "acc") == [(0, 0.5)]
    assert len(copy.models()) == 1


@pytest.mark.parametrize("ended", ["FAILED", "KILLED"])
def test_how_a_command_ended_is_shown_until_it_goes_on(copy: Copy, ended: Ended):
    mirror = copy.mirror()
    mirror.phase("00-root", copy.written("00-root", ROOT), {})
    mirror.progress("01-split-1", copy.written("01-split-1", SPLIT))
    assert mirror.close(ended) is None
    statuses = {phase: run.info.status for phase, run in copy.runs().items()}
    assert statuses == {"all": ended, "00-root": "FINISHED", "01-split-1": ended}
    mirror = copy.mirror()
    mirror.go_on()
    mirror.progress("01-split-1", copy.written("01-split-1", SPLIT))
    settle(mirror)
    statuses = {phase: run.info.status for phase, run in copy.runs().items()}
    assert statuses == {"all": "RUNNING", "00-root": "FINISHED", "01-split-1": "RUNNING"}
    assert mirror.close() is None
    assert copy.history("01-split-1") == [(1, 1.0), (2, 0.5)]


def test_what_is_no_number_is_logged_once(copy: Copy):
    for _ in range(2):
        mirror = copy.mirror()
        mirror.result({"acc": float("nan")}, {}, {"samples.reference": "10 test images"})
        assert mirror.close() is None
    assert len(copy.history("all", "acc")) == 1
    assert copy.runs()["all"].data.tags["samples.reference"] == "10 test images"


def test_a_phase_is_mirrored_while_it_runs(copy: Copy):
    many = [line(step) for step in range(1, 21)]
    for until in (4, 12, 20):  # three starts of the command, each mirroring twice what is there
        mirror = copy.mirror()
        for shown in (until - 2, until):
            url = copy.written("00-root", many[:shown], every=2)
            mirror.progress("00-root", url)
            mirror.progress("00-root", url)
            settle(mirror)
            assert copy.history("00-root") == [(one["step"], one["loss"]) for one in many[:shown]]
            assert copy.runs()["00-root"].info.status == "RUNNING"
        assert mirror.close() is None
    assert copy.again({"00-root": many}) is None
    assert copy.history("00-root") == [(one["step"], one["loss"]) for one in many]
    assert copy.history("00-root", "seconds") == [(0, 1.5)]
    assert copy.runs()["00-root"].info.status == "FINISHED"


def test_only_new_parts_are_read(copy: Copy, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    plain = storage.read_text
    monkeypatch.setattr(storage, "read_text", lambda url: read.append(url.rpartition("/")[2]) or plain(url))
    many = [line(step) for step in range(1, 9)]
    mirror = copy.mirror()
    for shown in (4, 4, 8):
        mirror.progress("00-root", copy.written("00-root", many[:shown], every=2))
        settle(mirror)
    assert read == [part_name(step) for step in (2, 4, 6, 8)]
    assert mirror.close() is None
    read.clear()
    assert copy.again({"00-root": many}) is None
    assert read == []


def test_steps_that_a_resumed_run_repeats_are_not_doubled(copy: Copy):
    mirror = copy.mirror()
    url = copy.written("00-root", [line(step) for step in range(1, 8)], every=3)  # parts 3, 6 and 7
    mirror.progress("00-root", url)
    settle(mirror)
    MetricParts(url).drop_beyond(3)  # its workers died before the checkpoint of step 6 counted
    mirror.progress("00-root", url)
    settle(mirror)
    parts = MetricParts(url)
    for step in range(4, 11):  # with other intervals between checkpoints
        parts.add(**line(step))
    parts.write(10)
    mirror.progress("00-root", url)
    assert mirror.close() is None
    assert copy.history("00-root") == [(step, 1 / step) for step in range(1, 11)]


def test_an_outage_is_caught_up_with_in_the_same_run(copy: Copy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tdiff.tracking.PAUSE", 0.0)
    mirror = copy.mirror()
    settle(mirror)
    client, plain = mirror._client, mirror._client.log_batch
    taken: list[int] = []

    def broken(run: str, metrics: list[Any]) -> None:
        plain(run, metrics=metrics)  # MLflow took it, but the answer never came
        taken.append(len(metrics))
        raise ConnectionError("connection reset\nby peer")

    client.log_batch = broken
    url = copy.written("00-root", ROOT)
    mirror.progress("00-root", url)
    settle(mirror)
    assert mirror.problem is not None
    assert mirror.problem.endswith("connection reset by peer")
    mirror.phase("01-split-1", copy.written("01-split-1", SPLIT), {})
    settle(mirror)
    assert mirror.problem is not None
    mirror.system([("node", 0.0, {"cpu": 1.0})])
    client.log_batch = plain
    mirror.phase("00-root", url, {"seconds": 1.0})
    assert mirror.close() is None
    assert taken == [9, 4]
    assert copy.history("01-split-1") == [(1, 1.0), (2, 0.5)]
    assert copy.history("00-root") == [(one["step"], one["loss"]) for one in ROOT]
    assert {copy.runs()[phase].info.status for phase in ("00-root", "01-split-1")} == {"FINISHED"}
    assert copy.history("all", "system/node/cpu") == []


def test_nodes_are_told_apart_by_the_time_since_the_run_began(copy: Copy):
    assert copy.again({}) is None
    began = copy.runs()["all"].info.start_time / 1000
    for start in (10, 30):  # of the command
        mirror = copy.mirror()
        samples = [(node, began + start + k, {"cpu": 10.0 * k}) for k in (1, 2) for node in ("a", "b")]
        mirror.system(samples)
        settle(mirror)
        assert mirror.close() is None
    for node in ("a", "b"):
        assert copy.history("all", f"system/{node}/cpu") == [(11, 10), (12, 20), (31, 10), (32, 20)]
    run = copy.runs()["all"].info.run_id
    times = [metric.timestamp for metric in copy.client.get_metric_history(run, "system/a/cpu")]
    assert times == [int((began + second) * 1000) for second in (11, 12, 31, 32)]


def test_the_description_tells_data_leaves_and_units(copy: Copy):
    assert copy.again({}) is None
    before = copy.runs()["all"].data.tags["mlflow.note.content"]
    assert f"**mine**: a TreeDiffusion run on `{copy.experiment}`." in before
    assert "nats per image" in before
    assert copy.again({}, {"acc": 0.5, "leaves": 7}) is None
    after = copy.runs()["all"].data.tags["mlflow.note.content"]
    assert after == before.replace(f"`{copy.experiment}`.", f"`{copy.experiment}`, whose tree has 7 leaves.")


def test_a_result_computed_anew_is_logged_anew(copy: Copy, tmp_path: Path):
    assert copy.again({}, {"acc": 0.5, "nmi": 0.25}) is None
    parent = copy.runs()["all"].info.run_id
    written = sorted(file.stat().st_mtime_ns for file in tmp_path.parent.rglob("index.html"))
    assert copy.again({}, {"acc": 0.75, "nmi": 0.25}) is None
    assert [metric.value for metric in copy.client.get_metric_history(parent, "acc")] == [0.5, 0.75]
    assert [metric.value for metric in copy.client.get_metric_history(parent, "nmi")] == [0.25]
    assert copy.runs()["all"].info.status == "FINISHED"
    assert sorted(file.stat().st_mtime_ns for file in tmp_path.parent.rglob("index.html")) == written
    mirror = Mirror(copy.uri, copy.experiment, "mine", copy.id, copy.artifacts)
    mirror.open({}, {}, {})
    mirror.result({}, {"report/index.html": b"<!doctype html><title>anew</title>"})
    assert mirror.close() is None
    assert b"anew" in Path(copy.client.download_artifacts(parent, "report/index.html")).read_bytes()
    assert len(copy.models()) == 1


def test_a_description_that_somebody_wrote_stays(copy: Copy):
    assert copy.again({}) is None
    copy.client.set_tag(copy.runs()["all"].info.run_id, "mlflow.note.content", "with the new laptop")
    assert copy.again({}, {"acc": 0.5, "leaves": 7}) is None
    assert copy.runs()["all"].data.tags["mlflow.note.content"] == "with the new laptop"


def test_a_phase_that_was_copied_in_part_is_completed(copy: Copy):
    assert copy.again({"00-root": ROOT[:2]}) is None
    copy.client.update_run(copy.runs()["00-root"].info.run_id, status="RUNNING")  # as if killed before the rest
    assert copy.again({"00-root": ROOT}) is None
    assert copy.history("00-root") == [(one["step"], one["loss"]) for one in ROOT]
    assert copy.history("00-root", "kl") == [(one["step"], one["kl"]) for one in ROOT]
    assert copy.runs()["00-root"].info.status == "FINISHED"


def test_a_parent_that_was_copied_in_part_is_completed(copy: Copy):
    broken = Mirror(copy.uri, copy.experiment, "mine", copy.id, copy.artifacts)
    broken.open({"seed": 0}, {}, {"..": "no name of a file"})
    assert broken.close() is not None
    assert copy.again({}) is None
    parent = copy.runs()["all"]
    assert parent.data.params == {"seed": "0", "tree.batch": "128"}
    assert [artifact.path for artifact in copy.client.list_artifacts(parent.info.run_id)] == ["config.yaml"]
    assert copy.again({}) is None  # and once more


def test_the_tree_becomes_a_model_that_needs_no_trust(copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert copy.again({}, {"acc": 0.5}) is None
    assert list(tmp_path.iterdir()) == []  # no store of MLflow's default
    (model,) = copy.models()
    assert (model.name, model.status, model.source_run_id) == ("tree", "READY", copy.runs()["all"].info.run_id)
    folder = Path(model.artifact_location.removeprefix("file://"))
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds <= {"", ".txt", ".yaml", ".json", ".py", ".safetensors", ".css", ".js"}, "a pickle?"
    requirements = (folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["mlflow", "numpy", "safetensors", "torch"]

    tree = TreeVAE.from_json(tree_files()["tree.json"].decode())
    tree.load_state_dict(load_tensors(tree_files()["model.safetensors"]))
    images = np.random.default_rng(0).random((7, 1, 8, 8), dtype=np.float32)
    np.save(tmp_path / "images.npy", images)
    code = (  # in a process of its own, which would find nothing but the model's own code
        "import mlflow, numpy, sys; mlflow.set_tracking_uri(sys.argv[1])\n"
        "model = mlflow.pyfunc.load_model(f'models:/{sys.argv[2]}')\n"
        "numpy.savez('found.npz', **model.predict(numpy.load('images.npy')))\n"
        "import tdiff; print(tdiff.__file__)\n"
        "try: model.predict(numpy.full((1, 1, 8, 8), 9, numpy.float32))\n"
        "except ValueError as error: print(error)\n"
        "try: model.predict(numpy.zeros((1, 1, 8, 9), numpy.float32))\n"
        "except mlflow.MlflowException as error: print(str(error).splitlines()[0])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, copy.uri, model.model_id], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    where, beyond, shape = done.stdout.splitlines()
    assert where == str(folder / "code" / "tdiff" / "__init__.py")
    assert "images hold values from 9 to 9" in beyond
    assert "Failed to enforce schema" in shape
    found = np.load(tmp_path / "found.npz")
    expected = encode(tree, images)
    np.testing.assert_allclose(found["reach"], expected.reach, atol=1e-6)
    np.testing.assert_array_equal(found["leaf"], expected.leaf)
    np.testing.assert_array_equal(found["path"], expected.path)


def test_a_model_that_was_cut_short_is_logged_anew(copy: Copy):
    assert copy.again({}) is None
    experiment = copy.client.get_experiment_by_name(copy.experiment)
    cut = copy.client.create_logged_model(experiment.experiment_id, "tree", copy.runs()["all"].info.run_id)
    assert copy.again({}, {"acc": 0.5}) is None
    (model,) = copy.models()
    assert model.model_id != cut.model_id
    assert model.status == "READY"
    copy.client.update_run(copy.runs()["all"].info.run_id, status="RUNNING")  # as if killed after the model
    assert copy.again({}, {"acc": 0.5}) is None
    assert [one.model_id for one in copy.models()] == [model.model_id]


def test_more_metrics_than_one_call_takes(copy: Copy):
    many = [line(step) for step in range(1, 701)]
    assert copy.again({"00-root": many}) is None
    for key in ("loss", "images"):
        assert [step for step, _ in copy.history("00-root", key)] == list(range(1, 701))


def test_two_runs_of_one_experiment_stay_apart(copy: Copy):
    assert copy.again({"00-root": ROOT}) is None
    first, copy.id = copy.id, uuid.uuid4().hex
    assert copy.again({"00-root": SPLIT}) is None
    experiment = copy.client.get_experiment_by_name(copy.experiment)
    found = copy.client.search_runs([experiment.experiment_id])
    assert len(found) == 4
    parents = {run.data.tags["tdiff.run"]: run.info.run_id for run in found if run.data.tags["tdiff.phase"] == "all"}
    assert set(parents) == {first, copy.id}
    children = [run.data.tags.get("mlflow.parentRunId") for run in found if run.data.tags["tdiff.phase"] == "00-root"]
    assert sorted(children) == sorted(parents.values())


def test_a_store_that_cannot_be_reached_costs_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        mirror = Mirror(uri, "digits", "mine", "id", None)
        started = time.monotonic()
        mirror.open({}, {}, {})
        mirror.phase("00-root", "", {})
        mirror.result({"acc": 0.5}, {})
        assert time.monotonic() - started < 1  # training does not wait for it
        warning = mirror.close()
        assert time.monotonic() - started < 60  # by MLflow's own settings it would be 4 minutes
    assert warning is not None
    assert uri in warning
    assert "the next start catches up" in warning
    assert "\n" not in warning
