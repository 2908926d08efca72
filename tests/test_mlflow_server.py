"""Protects the record of runs where a team keeps it: MLflow's own server, PostgreSQL behind it, artifacts on S3.

All three are real processes. A run is killed and started again, the server goes and comes back; what it holds in the
end is what the run folder holds, once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import psycopg2
import pytest
import servers
from mlflow.tracking import MlflowClient
from test_end_to_end import TINY

from tdiff import config as configs
from tdiff.runs import Run
from tdiff.tracking import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(servers.postgres_programs() is None, reason="PostgreSQL is not installed (apt: postgresql)"),
]


@pytest.fixture
def database() -> Iterator[servers.Server]:
    with servers.postgres() as server:
        yield server


@pytest.fixture
def server(
    tmp_path: Path, database: servers.Server, moto_server: servers.Server, no_aws: None
) -> Iterator[servers.Server]:
    with servers.mlflow_server(tmp_path, database, "s3://tests/mlflow", moto_server) as found:
        yield found


class Command:
    """`python -m tdiff.train …`, to be started, killed and started again in one folder."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder, self.log = folder, folder / "command.log"
        self.line = [sys.executable, "-m", "tdiff.train", *arguments]

    def until(self, happened: Callable[[], bool], then: Callable[[int], None]) -> int:
        """Starts it, calls `then` with its process group once that has happened; its exit code."""
        with self.log.open("w") as log:
            process = subprocess.Popen(self.line, cwd=self.folder, start_new_session=True, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 400
            while not happened() and time.monotonic() < deadline:
                assert process.poll() is None, self.log.read_text()
                time.sleep(0.05)
            assert happened(), self.log.read_text()
            then(process.pid)
            return process.wait(400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def kill(group: int) -> None:
    os.killpg(group, signal.SIGKILL)


@pytest.mark.timeout(1500)
def test_killed_runs_and_a_killed_server_leave_one_record(
    tmp_path: Path, server: servers.Server, database: servers.Server, moto_server: servers.Server
) -> None:
    less = ("tree.max_leaves=2", "samples.draws=20", "samples.per_leaf=4", "evaluation.classifier.images=2560")
    train = Command(tmp_path, *TINY, *less, f"tracking={server.endpoint}")
    run = Run(str(tmp_path / "runs" / "tiny"))
    root, part, drawn = (
        Path(run.at(*path)) for path in (("tree", "00-root"), ("diffusion", "metrics", "000000010.jsonl"), ("samples",))
    )

    def stop_both(group: int) -> None:
        server.stop()
        kill(group)

    def bring_back_later(group: int) -> None:
        server.stop()
        time.sleep(8)  # the diffusion's metrics cannot be mirrored meanwhile
        server.start()

    assert train.until((root / "COMPLETE").exists, stop_both) == -signal.SIGKILL
    server.start()
    assert train.until(part.exists, kill) == -signal.SIGKILL
    assert train.until(drawn.exists, bring_back_later) == 0, train.log.read_text()
    told = train.log.read_text()
    assert "TreeVAE, held-out images" in told
    assert not any(line.startswith("Traceback") for line in told.splitlines())  # Ray's own have a prefix
    assert train.until(lambda: True, lambda _: None) == 0, train.log.read_text()
    assert "MLflow at" not in train.log.read_text(), "the last start had nothing in its way"

    client = MlflowClient(server.endpoint)
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    found = {one.data.tags["tdiff.phase"]: one for one in client.search_runs([experiment.experiment_id])}
    phases = {name: run.at("tree", name) for name in run.tree_phases()} | {"diffusion": run.at("diffusion")}
    assert set(found) == {"all", *phases}
    assert len(client.search_runs([experiment.experiment_id])) == len(found)
    parent = found.pop("all")
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {key: str(value) for key, value in configs.flat(run.config()).items()}
    for name, one in found.items():
        assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (one.info.run_name, one.info.status) == (f"tiny/{name}", "FINISHED")
        lines = read_metrics(os.path.join(phases[name], "metrics"))  # noqa: PTH118
        for key in {key for line in lines for key in line if key != "step"}:
            history = client.get_metric_history(one.info.run_id, key)
            expected = [(line["step"], line[key]) for line in lines if key in line]
            assert [(metric.step, metric.value) for metric in history] == expected, f"{name}: {key}"
    with psycopg2.connect(
        host="127.0.0.1", port=database.port, user=servers.KEY, password=servers.SECRET, dbname="postgres"
    ) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT count(*) FROM metrics")
        assert cursor.fetchone() > (100,)
        cursor.execute("SELECT run_uuid, key, step FROM metrics GROUP BY run_uuid, key, step HAVING count(*) > 1")
        assert cursor.fetchall() == []

    s3 = boto3.client(
        "s3",
        endpoint_url=moto_server.endpoint,
        aws_access_key_id=servers.KEY,
        aws_secret_access_key=servers.SECRET,
        region_name="us-east-1",
    )
    listed = s3.list_objects_v2(Bucket="tests", Prefix="mlflow/").get("Contents", [])
    names = {entry["Key"].partition(f"{parent.info.run_id}/artifacts/")[2] for entry in listed}
    assert {"config.yaml", "report/index.html", "figures/tree.png", "figures/leaves.png"} <= names
    page = Path(client.download_artifacts(parent.info.run_id, "report/index.html", str(tmp_path)))
    assert page.read_bytes() == Path(run.at("report", "index.html")).read_bytes()
    (model,) = client.search_logged_models([experiment.experiment_id])
    (key,) = (
        entry["Key"]
        for entry in listed
        if model.model_id in entry["Key"] and entry["Key"].endswith("/model.safetensors")
    )
    weights = s3.get_object(Bucket="tests", Key=key)["Body"].read()
    assert weights == Path(run.grown_tree, "model.safetensors").read_bytes()
