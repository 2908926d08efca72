"""A real Ray cluster of several nodes (tests/nodes.py), and everything through `ray job submit`.

Protects what a local cluster cannot show: code, files and process groups that reach other nodes, and a run that goes on
when one of them is gone, to the very same weights. The workers are known to run on different nodes because their
processes live in different network namespaces, one node with one CPU each.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nodes
import pytest
import servers
from nodes import Job, Nodes
from safetensors.torch import load_file
from test_end_to_end import TINY

from tdiff.runs import Run
from tdiff.tracking import read_metrics
from tdiff.work.sampling import read_samples

ROOT = Path(__file__).parent.parent
SETTINGS = [*TINY, "diffusion.images=5120", "workers=2"]  # 40 steps, a checkpoint every 5
# Ray notices within some 15 s that a node is silent, instead of after a minute.
WATCHFUL = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}

reason = nodes.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(reason is not None, reason=f"no nodes on this machine: {reason}"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run on a plain local cluster."""
    folder = tmp_path_factory.mktemp("alone")
    done = subprocess.run(
        [sys.executable, "-m", "tdiff.train", *SETTINGS, f"runs={folder}", "--until", "samples"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return Run(str(folder / "tiny"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Nodes]:
    with nodes.cluster(tmp_path / "nodes", workers=2, environment=WATCHFUL) as cluster:
        yield cluster


def equal(ours: Run, theirs: Run) -> None:
    """Weights of every phase are the same, bit for bit."""
    assert ours.tree_phases() == theirs.tree_phases()
    for file in (*(f"tree/{phase}/model" for phase in theirs.tree_phases()), "diffusion/ema"):
        one, other = (load_file(Path(run.at(f"{file}.safetensors"))) for run in (ours, theirs))
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one), f"{file} differs"


def wait_until(condition: Callable[[], bool], job: Job, what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.process.poll() is None, f"the job ended before {what}:\n{job.output[-3000:]}"
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}\n{job.output[-3000:]}"
        time.sleep(0.02)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def diffusion_of(finished: Run, runs: Path) -> tuple[Run, list[str]]:
    """A run that takes its tree from a finished one, and the command that trains its diffusion model."""
    options = [f"runs={runs}", f"tree.run={finished.url}", "--until", "diffusion"]
    return Run(str(runs / "tiny")), ["python", "-m", "tdiff.train", *SETTINGS, *options]


def test_nodes_die_with_the_test_process(tmp_path: Path) -> None:
    program = (
        "import sys, time, nodes; from pathlib import Path; cluster = nodes.Nodes(Path(sys.argv[1]), {}); "
        "cluster.open(); cluster.add(cpus=0); cluster.wait_for(1); print(cluster[0].network, flush=True); "
        "time.sleep(99)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT / "tests", stdout=subprocess.PIPE, text=True
    ) as test:
        assert test.stdout is not None
        network = test.stdout.readline().strip()
        head = nodes.Node(0, tmp_path, test, network)
        assert any("gcs_server" in title for title in head.processes())
        test.kill()
    deadline = time.monotonic() + 10
    while head.processes():
        assert time.monotonic() < deadline, head.processes()
        time.sleep(0.1)


def test_jobs_on_two_nodes(cluster: Nodes, alone: Run, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "runs" / "tiny"))
    training = ("python", "-m", "tdiff.train", *SETTINGS, f"runs={tmp_path / 'runs'}")
    job = cluster.submit(*training, working_dir=ROOT)
    wait_until(lambda: cluster[1].works() and cluster[2].works(), job, "both nodes work")
    assert not cluster[0].works()
    assert job.wait(400) == 0, job.output[-3000:]
    equal(run, alone)
    for name in ("prior", "root-draws"):
        shards = [Path(r.at("samples", name, "shard-000000.tar")).read_bytes() for r in (run, alone)]
        assert shards[0] == shards[1]

    drawing = cluster.submit(
        *("python", "-m", "tdiff.generate", run.url, "--num", "30", "--workers", "2", "--out", "more"),
        working_dir=ROOT,
    )
    assert drawing.wait(200) == 0, drawing.output[-3000:]
    assert len(read_samples(run.at("samples", "more")).images) == 30

    found = json.loads(Path(run.at("evaluation.json")).read_text())
    scoring = cluster.submit("python", "-m", "tdiff.evaluate", run.url, working_dir=ROOT)
    assert scoring.wait(200) == 0, scoring.output[-3000:]
    assert json.loads(Path(run.at("evaluation.json")).read_text()) == found

    refused = cluster.submit(*training, "tree.max_leafs=4", working_dir=ROOT)
    assert refused.wait(100) != 0
    assert "tree.max_leaves" in refused.output


def test_a_node_cut_off_is_replaced(cluster: Nodes, alone: Run, tmp_path: Path) -> None:
    """In the middle of the diffusion, after a checkpoint; a third node comes. The old one, back, works no more."""
    run, training = diffusion_of(alone, tmp_path / "runs")
    job = cluster.submit(*training, working_dir=ROOT)
    parts = Path(run.at("diffusion", "metrics"))
    wait_until((parts / "000000010.jsonl").exists, job, "the second checkpoint")
    first_written = (parts / "000000005.jsonl").stat().st_mtime_ns
    cluster.cut_off(cluster[2])
    assert cluster[2].works()
    cut = time.monotonic()
    third = cluster.add(cpus=1)
    wait_until(lambda: "going on from step" in cluster.said(job), job, "the loss is noticed", 90)
    noticed = time.monotonic() - cut
    wait_until(third.works, job, "the third node works", 120)
    cluster.join_again(cluster[2])
    # By the command itself: the client of a job that a node was lost to may wait for its last lines for ever.
    wait_for(lambda: "next: " in cluster.said(job), "the command ends", 300)
    print(f"noticed after {noticed:.1f} s, finished after {time.monotonic() - cut:.1f} s")
    assert (parts / "000000005.jsonl").stat().st_mtime_ns == first_written, "the diffusion began again"
    assert "try 1 of" in cluster.said(job)
    assert "try 2 of" not in cluster.said(job)
    equal(run, alone)
    wait_for(lambda: not cluster[2].works(), "the worker of the lost node has ended")


def test_a_node_silent_for_a_moment_costs_nothing(cluster: Nodes, alone: Run, tmp_path: Path) -> None:
    """Its network is back before Ray gives the node up: the same processes go on."""
    run, training = diffusion_of(alone, tmp_path / "runs")
    job = cluster.submit(*training, working_dir=ROOT)
    parts = Path(run.at("diffusion", "metrics"))
    wait_until((parts / "000000010.jsonl").exists, job, "the second checkpoint")
    cluster.cut_off(cluster[1])
    time.sleep(3)
    cluster.join_again(cluster[1])
    assert job.wait(300) == 0, job.output[-3000:]
    assert "a worker failed" not in cluster.said(job)
    equal(run, alone)


def in_the_network(cluster: Nodes, program: str) -> None:
    """Runs Python where the cluster's network is reached."""
    job = cluster.start(sys.executable, "-c", program, cwd=ROOT, name="program")
    assert job.wait(200) == 0, job.output


def test_a_run_on_s3_and_a_node_switched_off(alone: Run, tmp_path: Path) -> None:
    """The nodes share nothing but the store, which they reach over their network."""
    store = f"http://{nodes.CLIENT}:9000"
    with nodes.cluster(tmp_path / "nodes", workers=2, environment=WATCHFUL | servers.lead_to(store)) as cluster:
        cluster.start(servers.program("moto_server"), "-H", nodes.CLIENT, "-p", "9000", cwd=tmp_path, name="moto")
        s3 = "import boto3, fsspec, time; s3 = fsspec.filesystem('s3'); client = boto3.client('s3')\n"
        in_the_network(cluster, f"{s3}client.create_bucket(Bucket='tests')")
        in_the_network(cluster, f"{s3}s3.put('{alone.url}/', 's3://tests/alone/', recursive=True)")
        options = ["runs=s3://tests/runs", "tree.run=s3://tests/alone", f"tracking=sqlite:///{tmp_path}/mlflow.db"]
        training = ["python", "-m", "tdiff.train", *SETTINGS, *options, "--until", "diffusion"]
        job = cluster.submit(*training, working_dir=ROOT)
        second = "Bucket='tests', Prefix='runs/tiny/diffusion/metrics/000000010'"
        in_the_network(cluster, f"{s3}while not client.list_objects_v2({second})['KeyCount']: time.sleep(0.05)")
        cluster.kill(cluster[1])
        cluster.add(cpus=1)
        wait_for(lambda: "next: " in cluster.said(job), "the command ends", 400)
        assert "try 1 of" in cluster.said(job)
        in_the_network(cluster, f"{s3}s3.get('s3://tests/runs/tiny/', '{tmp_path}/tiny/', recursive=True)")
        equal(Run(str(tmp_path / "tiny")), alone)


def test_a_job_for_every_phase(cluster: Nodes, alone: Run, tmp_path: Path) -> None:
    """jobs/submit.sh --per-phase, stopped once: the phase's job ends it, and the same command goes on."""
    run = Run(str(tmp_path / "runs" / "tiny"))
    submit = [str(ROOT / "jobs" / "submit.sh"), "--per-phase", *SETTINGS, f"runs={tmp_path / 'runs'}"]
    first = cluster.start(*submit, cwd=ROOT, name="first")
    wait_until(lambda: run.tree_phases() == ["00-root"] and "-1-01-" in first.output, first, "the second phase")
    second = next(word for word in first.output.split() if "-1-01-" in word).strip("'")
    assert cluster.start(servers.program("ray"), "job", "stop", second, cwd=ROOT, name="stop").wait(100) == 0
    assert first.wait(100) == 1
    assert f"{second} was stopped" in first.output
    again = cluster.start(*submit, cwd=ROOT, name="again")
    assert again.wait(800) == 0, again.output[-3000:]
    equal(run, alone)
    stages = [*run.tree_phases()[1:], "diffusion", "samples", "report"]
    assert again.output.count("submitted successfully") == len(stages)
    for number, stage in enumerate(stages[1:], 1):
        assert f"-{number}-{stage}' submitted successfully" in again.output
    assert json.loads(Path(run.at("evaluation.json")).read_text())["samples"]


def test_a_stopped_job_goes_on(alone: Run, tmp_path: Path) -> None:
    """`ray job stop` in the middle of the diffusion: the job writes a checkpoint and ends, no step is done twice."""
    patient = WATCHFUL | {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    with nodes.cluster(tmp_path / "nodes", workers=2, environment=patient) as cluster:
        run, training = diffusion_of(alone, tmp_path / "runs")
        job = cluster.submit(*training, working_dir=ROOT)
        parts = Path(run.at("diffusion", "metrics"))
        wait_until((parts / "000000010.jsonl").exists, job, "the second checkpoint")
        stop = cluster.start(servers.program("ray"), "job", "stop", job.name, cwd=ROOT, name="stop")
        assert stop.wait(100) == 0
        job.wait(60)
        assert f"Job '{job.name}' was stopped" in job.output
        assert not Path(run.at("diffusion", "COMPLETE")).exists()
        kept = {part.name: part.stat().st_mtime_ns for part in parts.iterdir()}
        again = cluster.submit(*training, working_dir=ROOT)
        assert again.wait(300) == 0, again.output[-3000:]
        assert kept == {name: (parts / name).stat().st_mtime_ns for name in kept}, "steps were done twice"
        equal(run, alone)


def test_other_numbers_of_workers_go_on(alone: Run, tmp_path: Path) -> None:
    """What two workers left half-way is gone on with by one, two and four: the same losses, trained and held out."""
    patient = WATCHFUL | {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    runs = {workers: tmp_path / f"runs-{workers}" for workers in (2, 1, 4)}
    with nodes.cluster(tmp_path / "nodes", workers=1, environment=patient, cpus=4) as cluster:
        for workers, folder in runs.items():
            run, training = diffusion_of(alone, folder)
            training += ["diffusion.slots=4", f"workers={workers}"]
            if workers == 2:
                job = cluster.submit(*training, working_dir=ROOT)
                parts = Path(run.at("diffusion", "metrics"))
                wait_until((parts / "000000010.jsonl").exists, job, "the second checkpoint")
                stop = cluster.start(servers.program("ray"), "job", "stop", job.name, cwd=ROOT, name="stop")
                assert stop.wait(100) == 0
                job.wait(60)
                for other in (1, 4):
                    shutil.copytree(folder, runs[other])
                kept = {part.name for part in parts.iterdir()}
            job = cluster.submit(*training, working_dir=ROOT)
            assert job.wait(300) == 0, job.output[-3000:]
            assert "goes on from step" in job.output
    lines = {w: read_metrics(Run(str(folder / "tiny")).at("diffusion", "metrics")) for w, folder in runs.items()}
    assert max(kept) < "000000040.jsonl"
    assert [line["step"] for line in lines[2]][-1] == 40
    for workers in (1, 4):
        assert [line["step"] for line in lines[workers]] == [line["step"] for line in lines[2]]
        for key in ("loss", "validation/loss"):
            ours, theirs = ([line[key] for line in lines[w] if key in line] for w in (workers, 2))
            assert len(ours) >= 4
            assert ours == pytest.approx(theirs, rel=1e-4), (workers, key)
