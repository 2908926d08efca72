"""The main job for real: Ray, DeepSpeed, MLflow, files. A tiny run, interrupted and straight through.

Protects the promises a user meets first: the same command goes on after a kill, redoing at most the interrupted
phase, to the very same weights; a finished run is a no-op; what a run leaves is complete and readable; problems are
one sentence before a worker starts.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
from commands import python, together
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file

import tdiff
from tdiff import storage
from tdiff.data.shards import read_manifest
from tdiff.data.stream import read_split
from tdiff.mirroring import numbers_in
from tdiff.runs import Run
from tdiff.work.growing import load_topology, load_tree
from tdiff.work.sampling import read_samples

TINY = [
    "name=tiny",
    "tree.features=3",
    "tree.max_leaves=3",
    "tree.epochs.initial=3",
    "tree.epochs.split=2",
    "tree.epochs.final=2",
    "diffusion.images=2560",
    "diffusion.width=16",
    "diffusion.checkpoint_images=640",
    "samples.per_leaf=12",
    "samples.draws=100",
    "samples.draws_all_leaves=2",
    "samples.reconstructions=60",
    "samples.steps=4",
    "samples.batch=40",
    "evaluation.likelihood_images=60",
    "evaluation.likelihood_samples=10",
    "evaluation.classifier.images=12800",
]


def command(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", f"tdiff.{module}", *arguments, cwd=cwd)


Refusal = tuple[str, list[str], str]
"""A command, its arguments, and what its one sentence says."""


def assert_refused(cases: Sequence[Refusal], cwd: Path) -> None:
    lines = [["-m", f"tdiff.{module}", *arguments] for module, arguments, _ in cases]
    for line, (*_, words), done in zip(lines, cases, together(lines, cwd), strict=True):
        assert done.returncode == 2, (line, done.stdout + done.stderr)
        assert words in done.stderr, line
        assert done.stderr.startswith("tdiff: "), line
        assert len(done.stderr.strip().splitlines()) == 1, (line, done.stderr)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose runs/tiny was trained without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    done = command("train", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "TreeVAE, held-out images" in done.stdout
    return folder


def tiny(folder: Path) -> Run:
    return Run(str(folder / "runs" / "tiny"))


def test_what_a_run_leaves(straight: Path) -> None:
    run = tiny(straight)
    phases = run.tree_phases()
    assert [phase.split("-")[1] for phase in phases] == ["root", "split", "prune", "finetune"]
    folder = Path(run.url)
    for phase in phases:
        assert {"model.safetensors", "tree.json", "COMPLETE"} <= {f.name for f in (folder / "tree" / phase).iterdir()}
        load_tree(str(folder / "tree" / phase))
    numbers = json.loads((folder / "evaluation.json").read_text())
    assert numbers["leaves"] == len(load_topology(run.grown_tree).leaves)
    assert 0 < numbers["clustering"]["tree_test"]["nmi"] < 1
    bounds = numbers["likelihood"]
    assert (bounds["split"], bounds["elbo_images"], bounds["log_likelihood_images"]) == ("test", 297, 60)
    assert -70 < bounds["elbo"] < bounds["log_likelihood"] + 3 < -20  # other images; half as bad as guessing 0.5 is -44
    of_images = load_file(folder / "likelihood.safetensors")
    assert of_images["elbo"].shape == (297,)
    assert of_images["leaf_elbo"].shape == (297, numbers["leaves"])
    judged = numbers["samples"]
    assert judged["classifier"]["test_accuracy"] > 0.5
    for model in ("treediffusion", "treevae"):
        assert judged[model]["classifier_frechet_gen"] > 0
        assert judged[model]["classifier_frechet_rec"] > 0
        assert 0 <= judged[model]["classifier_recall_gen"] <= 1
        assert np.shape(judged[model]["classifier_histograms"]) == (numbers["leaves"], 10)
    for name in ("tree", "leaves", "root-draw", "samples", "losses-tree", "losses-diffusion"):
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            assert min(picture.size) > 300, f"{name}.png is too small to look at"
    page = (folder / "report" / "index.html").read_text()
    assert all(f'<section id="{name}"' in page for name in ("tree", "walk", "leaves", "samples", "numbers", "training"))
    assert page.count('class="node-button') == len(load_topology(run.grown_tree).nodes)
    assert len(page) < 5e6
    assert "http://" not in page
    assert "https://" not in page


def test_what_is_compared_while_drawing_is_what_evaluation_finds(straight: Path) -> None:
    run = tiny(straight)
    found = json.loads((Path(run.url) / "evaluation.json").read_text())["samples"]
    drawn = command("generate", run.url, "--num", "100", "--fid", "--workers", "1", "--out", "again", cwd=straight)
    assert drawn.returncode == 0, drawn.stderr
    told = json.loads((Path(run.url) / "samples" / "again" / "quality-classifier-train.json").read_text())
    assert told["images"] == 100
    assert told["extractor"]["digest"] == found["classifier"]["digest"]
    for name in ("classifier_frechet_gen", "classifier_frechet_gen_error", "classifier_precision_gen"):
        assert told[name] == found["treediffusion"][name]
    once_more = command("generate", run.url, "--num", "100", "--fid", "--out", "again", cwd=straight)
    assert once_more.returncode == 0, once_more.stderr
    against = ("--fid", "--reference", "test")
    other = command("generate", run.url, "--num", "100", *against, "--out", "again", cwd=straight)
    assert other.returncode == 0, other.stderr
    of_test = json.loads((Path(run.url) / "samples" / "again" / "quality-classifier-test.json").read_text())
    assert of_test["reference"] == {"split": "test", "images": 297}
    assert of_test["classifier_frechet_gen"] != told["classifier_frechet_gen"]
    assert json.loads((Path(run.url) / "samples" / "again" / "quality-classifier-train.json").read_text()) == told


def test_samples_are_shards_with_their_place_in_the_tree(straight: Path) -> None:
    run = tiny(straight)
    topology = load_topology(run.grown_tree)
    samples = read_samples(run.at("samples", "prior"))
    assert samples.images.shape == (100, 1, 8, 8)
    for entry in samples.entries:
        assert entry["path"] == list(topology.path(topology.leaves[int(str(entry["leaf"]))]))
    draws = read_samples(run.at("samples", "root-draws"))
    assert [(e["draw"], e["leaf"]) for e in draws.entries] == [
        (draw, leaf) for draw in range(2) for leaf in range(len(topology.leaves))
    ]


def test_mlflow_mirrors_the_run(straight: Path) -> None:
    client = MlflowClient(f"sqlite:///{straight}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    parent = parents[0]
    children = {run.data.tags["tdiff.phase"]: run for run in runs if run is not parent}
    assert set(children) == {*tiny(straight).tree_phases(), "diffusion"}
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in children.values())
    split = children["01-split-1"].data.metrics if "01-split-1" in children else children["01-split-2"].data.metrics
    assert "effective_leaves" in children["00-root"].data.metrics
    assert {
        "share/3",
        "share/4",
        "train_share/3",
        "train_effective_leaves",
        "nmi_train",
        "acc_test",
        "kl_decisions",
        "alpha",
    } <= set(split)
    assert parent.data.params["diffusion.images"] == "2560"
    assert parent.data.tags["mlflow.source.git.commit"]
    assert "clustering.tree_test.nmi" in parent.data.metrics
    steps = [metric.step for metric in client.get_metric_history(children["diffusion"].info.run_id, "loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20
    assert {"learning_rate", "grad_norm", "images"} <= set(children["diffusion"].data.metrics)
    pictures = {file.path for file in client.list_artifacts(parent.info.run_id, "figures")}
    assert "figures/tree.png" in pictures
    (page,) = client.list_artifacts(parent.info.run_id, "report")
    assert page.path == "report/index.html"
    assert page.file_size == Path(tiny(straight).at("report", "index.html")).stat().st_size


def test_mlflow_serves_the_clusters(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which loading a model adds
    client = MlflowClient(f"sqlite:///{straight}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (model,) = client.search_logged_models([experiment.experiment_id])
    served = mlflow.pyfunc.load_model(model.artifact_location)
    run = tdiff.load(tiny(straight).url)
    url = tiny(straight).record()["data_url"]
    test = read_split(url, read_manifest(url), "test").images
    found, expected = served.predict(test.astype(np.float32) / 255), run.encode(test)
    for name in ("reach", "leaf", "path"):
        np.testing.assert_array_equal(found[name], getattr(expected, name))


def test_a_finished_run_is_a_no_op(straight: Path) -> None:
    folder = Path(tiny(straight).url)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    started = time.monotonic()
    again = command("train", *TINY, cwd=straight)
    assert again.returncode == 0, again.stderr
    assert time.monotonic() - started < 15
    assert "TreeVAE, held-out images" in again.stdout
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


def test_killed_and_resumed_equals_straight_through(straight: Path, tmp_path: Path) -> None:
    """SIGKILL to the driver's process group in a split, and again in the diffusion after its first checkpoint."""
    run = tiny(tmp_path)
    kills = [Path(run.at("tree", "00-root", "COMPLETE")), Path(run.at("diffusion", "metrics", "000000010.jsonl"))]
    for sign in kills:
        with subprocess.Popen(
            [sys.executable, "-m", "tdiff.train", *TINY],
            cwd=tmp_path,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as driver:
            deadline = time.monotonic() + 400
            while not sign.exists() and time.monotonic() < deadline:
                assert driver.poll() is None, f"the run ended before {sign.name} appeared"
                time.sleep(0.02)
            assert sign.exists()
            os.killpg(driver.pid, signal.SIGKILL)
    kept = {phase: Path(run.at("tree", phase, "model.safetensors")).stat().st_mtime_ns for phase in run.tree_phases()}
    assert not Path(run.at("diffusion", "COMPLETE")).exists()

    # The second part is there, so the checkpoint that came with the first one counts.
    first = Path(run.at("diffusion", "metrics", "000000005.jsonl"))
    first_written = first.stat().st_mtime_ns
    done = command("train", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    assert first.stat().st_mtime_ns == first_written, "the diffusion began again instead of going on"
    for phase, written in kept.items():
        assert Path(run.at("tree", phase, "model.safetensors")).stat().st_mtime_ns == written, f"{phase} was redone"
    for file in (*(f"tree/{phase}/model" for phase in run.tree_phases()), "diffusion/ema"):
        ours, theirs = (load_file(Path(r.at(f"{file}.safetensors"))) for r in (run, tiny(straight)))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours), f"{file} differs from the undisturbed run's"
    lines = {}
    for r in (run, tiny(straight)):
        parts = sorted(Path(r.at("diffusion", "metrics")).iterdir())
        lines[r.url] = [line for part in parts for line in part.read_text().splitlines()]
    assert lines[run.url] == lines[tiny(straight).url], "steps were lost, doubled or changed"
    for name in ("prior", "root-draws"):
        shards = [Path(r.at("samples", name, "shard-000000.tar")).read_bytes() for r in (run, tiny(straight))]
        assert shards[0] == shards[1]


def test_generate_draws_the_same_whatever_the_workers(straight: Path) -> None:
    run = tiny(straight)
    shards = []
    for workers in ("1", "2"):
        options = ("--num", "60", "--leaf", "1", "--seed", "5", "--batch", "20", "--steps", "3")
        done = command("generate", run.url, *options, "--workers", workers, "--out", f"w{workers}", cwd=straight)
        assert done.returncode == 0, done.stderr
        shards.append([file.read_bytes() for file in sorted(Path(run.at("samples", f"w{workers}")).glob("*.tar"))])
        entries = read_samples(run.at("samples", f"w{workers}")).entries
        assert {entry["leaf"] for entry in entries} == {1}
        assert [entry["index"] for entry in entries] == list(range(60))
    assert shards[0] == shards[1]
    other = command("generate", run.url, "--num", "61", "--out", "w1", cwd=straight)
    assert other.returncode == 2
    assert "another job" in other.stderr


def test_evaluate_and_report_again(straight: Path) -> None:
    run = tiny(straight)
    before = json.loads(Path(run.at("evaluation.json")).read_text())
    assert command("evaluate", run.url, cwd=straight).returncode == 0
    assert json.loads(Path(run.at("evaluation.json")).read_text()) == before
    assert command("report", run.url, cwd=straight).stdout.strip().endswith("report/index.html")


def test_what_is_computed_later_comes_to_mlflow_too(straight: Path, tmp_path: Path) -> None:
    """Into the same MLflow run, which stays finished; from another folder than the run was trained in."""
    run = Run(shutil.copytree(straight, tmp_path / "copy") / "runs" / "tiny")
    options = ("--num", "40", "--fid", "--seed", "7")
    done = command("generate", run.url, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (samples,) = [name for name in storage.listing(run.at("samples")) if "seed=7" in name]
    found = json.loads(Path(run.at("samples", samples, "quality-classifier-train.json")).read_text())
    written = Path(run.at("evaluation.json"))
    numbers = json.loads(written.read_text())
    written.write_text("{}")
    done = command("evaluate", run.url, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(written.read_text()) == numbers
    client = MlflowClient(f"sqlite:///{tmp_path}/copy/runs/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`tdiff.phase` = 'all'")
    assert parent.info.status == "FINISHED"
    mine = f"generated.{samples.replace('=', ':')}.train."
    logged = {key.removeprefix(mine): value for key, value in parent.data.metrics.items() if key.startswith(mine)}
    assert logged == dict(numbers_in(found))
    assert len(logged) > 5


def test_a_tree_alone_is_evaluated_as_far_as_it_goes(straight: Path, tmp_path: Path) -> None:
    run = Run(str(tmp_path / "tree-only"))
    finished = Path(tiny(straight).url)
    shutil.copytree(finished / "tree", tmp_path / "tree-only" / "tree")
    for name in ("run.json", "config.yaml"):
        shutil.copy(finished / name, tmp_path / "tree-only")
    done = command("evaluate", run.url, "--workers", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "log-likelihood" in done.stdout
    numbers = json.loads(Path(run.at("evaluation.json")).read_text())
    whole = json.loads((finished / "evaluation.json").read_text())
    assert numbers["samples"] == {}
    for part in ("clustering", "likelihood"):
        assert numbers[part] == whole[part]  # by one worker, as by two
    drawn = command("generate", run.url, "--model", "treevae", "--num", "7", "--out", "own", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert len(read_samples(run.at("samples", "own")).images) == 7
    refused = command("generate", run.url, "--num", "7", cwd=tmp_path)
    assert refused.returncode == 2
    assert "no diffusion model yet" in refused.stderr
    assert command("report", run.url, cwd=tmp_path).returncode == 0
    page = Path(run.at("report", "index.html")).read_text()
    assert '<section id="tree"' in page
    assert "ELBO" in page
    assert '<section id="walk"' not in page
    assert {file.name for file in Path(run.at("figures")).iterdir()} == {"tree.png", "losses-tree.png"}


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    cases: list[Refusal] = [
        ("train", ["tree.max_leafs=4"], "tree.max_leaves"),
        ("train", ["tree.max_leaves=many"], "tree.max_leaves='many'"),
        ("train", ["tree.learning_rate=-1"], "greater than 0"),
        ("train", ["configs/nowhere.yaml"], "configs/nowhere.yaml does not exist"),
        ("train", ["workers=99"], "workers=99 is more than"),
        ("train", ["tree.batch=127"], "tree.batch=127 cannot be divided"),
        ("train", ["runs=/proc/nowhere"], "runs=/proc/nowhere"),
        ("train", ["data.url=."], "holds no manifest.json"),
        ("train", ["--until", "lunch"], "--until lunch"),
        ("train", ["tree.batch=4096"], "tree.batch=4096"),
        ("generate", ["nowhere"], "is not a run folder"),
        ("evaluate", ["nowhere"], "is not a run folder"),
        ("report", ["nowhere"], "is not a run folder"),
        ("pack", ["imagenet", "x"], "SOURCE imagenet is no folder: name one, or one of digits"),
        ("plan", ["tree.batch=127"], "tree.batch=127 cannot be divided"),
        ("evaluate", ["nowhere", "--workers", "0"], "--workers=0 cannot be used: take 1 or more"),
    ]
    assert_refused(cases, tmp_path)


def test_bad_input_about_a_run_that_is_there(straight: Path) -> None:
    run = tiny(straight)
    cases: list[Refusal] = [
        ("train", [*TINY, "seed=1"], "belongs to another config (seed: 1 here, 0 there)"),
        ("generate", [run.url, "--out", ".."], "is no plain name"),
        ("generate", [run.url, "--leaf", "9"], "leaf=9 does not exist"),
        ("generate", [run.url, "--steps", "1001"], "steps=1001"),
        ("generate", [run.url, "--node", "99"], "node=99 does not exist"),
        ("generate", [run.url, "--out", "leaf-03"], "where the run's own samples lie"),
        ("generate", [run.url, "--eta", "1.5"], "eta=1.5 cannot be used: take from 0 to 1"),
        ("generate", [run.url, "--eta", "0.5", "--sampler", "heun"], "take sampler=ddim, or eta=0"),
        ("generate", [run.url, "--guidance", "nan"], "guidance=nan cannot be used"),
        ("generate", [run.url, "--node", "1", "--leaf", "0"], "exclude each other"),
        ("generate", [run.url, "--guidance", "1"], "diffusion.condition_dropout=0.1"),
        ("generate", [run.url, "--guidance-interval", "1", "3"], "no effect with guidance=0"),
        ("generate", [run.url, "--ema", "0.5"], "sigma_rel=0.5 cannot be rebuilt"),
        ("generate", [run.url, "--mode", "reconstruct", "--num", "298"], "297 test images"),
        ("generate", [run.url, "--model", "treevae", "--steps", "5"], "steps=5 has no effect with model=treevae"),
        ("generate", [run.url, "--fid", "--leaf", "0"], "--fid compares what the whole model draws"),
        ("generate", [run.url, "--reference", "test"], "--reference=test has an effect only with --fid"),
        ("generate", [run.url, "--fid", "--mode", "sample-all-leaves"], "--fid compares what the whole model draws"),
    ]
    assert_refused(cases, straight)


def test_pack_and_train_on_what_was_packed(straight: Path, tmp_path: Path) -> None:
    dest = tmp_path / "digits"
    done = command("pack", "digits", str(dest), "--shard-samples", "700", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(str(dest))
    assert [shard.samples for shard in manifest.splits["train"]] == [700, 700, 100]
    assert command("pack", "digits", str(dest), cwd=tmp_path).returncode == 2
    assert command("train", *TINY, f"data.url={dest}", "tree.batch=4096", cwd=tmp_path).returncode == 2
    assert not (tmp_path / "runs").exists()  # what is refused leaves nothing behind
    until = command("train", *TINY, f"data.url={dest}", "--until", "00-root", cwd=tmp_path)
    assert until.returncode == 0, until.stderr
    assert tiny(tmp_path).tree_phases() == ["00-root"]


def test_a_loss_that_is_not_finite_stops_the_run_with_one_sentence(tmp_path: Path) -> None:
    done = command("train", *TINY, "tree.learning_rate=1e30", "--until", "tree", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tdiff: 00-root, step ")
    assert "not finite" in last
    assert not list((tmp_path / "runs").rglob("COMPLETE"))
