"""Protects the training loop: what a run computes depends on neither the back-end, the workers, ZeRO, nor kills.

Promises 2 and 3 of DESIGN.md, on the real tasks of the product (root, split, diffusion, classifier) over real digits:

    golden       losses of the plain back-end are those recorded in tests/golden (after a change that is MEANT to
                 move them: TDIFF_RECORD_GOLDEN=1 pytest tests/test_engine.py -k golden, and say why in the commit)
    Adam         DeepSpeed's update is torch.optim.Adam with L2, not AdamW
    workers      plain = DeepSpeed with 1, 2 and 4 workers = ZeRO 0, 1, 2, 3: losses, batch-norm statistics, EMAs and
                 their snapshots
    resume       killed and resumed equals straight through, bit for bit, metric lines and EMA snapshots included
    non-finite   stops every worker before the update
    split        trains every new parameter, and nothing else moves

Workers are forked from a server that has imported torch and DeepSpeed: no Ray, about a second a group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import save as save_arrays
from torch import Tensor, nn

from tdiff import engine, storage
from tdiff.checkpoints import Checkpoints
from tdiff.config import Config, validated
from tdiff.data.shards import read_manifest
from tdiff.data.sources import Source, Split, digits
from tdiff.data.stream import Reader
from tdiff.diffusion.ema import TRACKS, gamma_from_width, snapshot_steps
from tdiff.engine import Batch, NonFiniteError, Task
from tdiff.errors import Stopped
from tdiff.packing import pack
from tdiff.seeds import generator
from tdiff.tracking import read_metrics
from tdiff.tree.model import TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work import classifying, growing
from tdiff.work.classifying import ClassifierPhase, classify
from tdiff.work.diffusing import DiffusionPhase, deepspeed_settings, diffuse
from tdiff.work.growing import GrowingPhase, grow, load_tree, save_tree
from tdiff.work.snapshots import file_name, rebuild

GOLDEN = Path(__file__).parent / "golden"
DEEPSPEED = Path(__file__).parent.parent / "configs" / "deepspeed"
RECORD = os.environ.get("TDIFF_RECORD_GOLDEN") == "1"
EMA_WIDTH = 0.2  # no track of which snapshots are kept, so that training follows three averages
WIDTHS = (*TRACKS, EMA_WIDTH)
SNAPSHOTS = 5
VALIDATED = 12  # the step after which there is a validation
IMAGES = 512  # so few that 50 steps are several epochs

Tensors = dict[str, Tensor]


# --- jobs: the product's own tasks, made small ---------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One call of `engine.train`. kind: root, split or refit ("views-": of two views in colour), threshold (a root that
    leaves rows out), diffusion or classifier; name: folder of its metrics and checkpoints.
    """

    kind: str
    home: Path
    name: str
    steps: int
    slots: int = 4
    zero: int = 0
    bf16: bool = False
    keep_every: int = 10**6
    stops: int | None = None
    """After how many steps the last worker is told to stop."""
    dies_at: int | None = None
    """The step at which every worker is lost."""
    rollbacks: int = 0
    nan_at: tuple[int, int] | None = None
    """(step, slot) whose loss is NaN, and its kl_nodes where there are any."""
    still: bool = False
    """A learning rate of 0: only running statistics move."""
    diffusion: dict[str, Any] = field(default_factory=dict)
    """Further settings of the section `diffusion`."""

    @property
    def folder(self) -> Path:
        return self.home / self.name


@dataclass
class Result:
    """What one worker saw of a job."""

    initial: Tensors
    weights: Tensors
    """Parameters and buffers at the end, partitions gathered."""
    trained: set[str]
    averages: dict[str, Tensors] = field(default_factory=dict)
    """width -> average"""
    history: list[Tensors] = field(default_factory=list)
    """Trained weights after every step, where asked for."""
    error: str = ""


class Lost(Exception):
    """Stands for kill -9: nothing of the loop runs after it."""


class Member:
    """A worker without Ray: one of a process group. stops: the number of steps after which it is told to stop."""

    def __init__(self, rank: int = 0, world: int = 1, stops: int | None = None):
        self.rank, self.world = rank, world
        self.stops, self.asked = stops, 0

    def told_to_stop(self) -> bool:
        self.asked += 1
        return self.stops is not None and self.asked >= self.stops

    def expects(self, seconds: float) -> None:
        assert seconds > 0


class _Captured(Exception):
    pass


def small_config(slots: int = 4, zero: int = 1, views: bool = False, threshold: float = 0.0, **further: Any) -> Config:
    """further: settings of the section `diffusion`."""
    tree: dict[str, Any] = {
        "features": 3,
        "max_leaves": 4,
        "latent_channels": 4,
        "feature_channels": 16,
        "batch": 64,
        "slots": slots,
    }
    if threshold:
        tree["reach_threshold"] = threshold
    if views:
        tree |= {"encoder": "cnn2", "likelihood": "gaussian", "residual": True, "augmentation": "cifar10"}
        tree["contrastive"] = 100.0
    diffusion = {
        "width": 8,
        "multipliers": [1],
        "attention": [],
        "heads": 2,
        "batch": 32,
        "slots": slots,
        "warmup_images": 320,
        "zero": zero,
        "ema": EMA_WIDTH,
        "snapshots": SNAPSHOTS,
    }
    classifier = {"batch": 32, "slots": slots, "images": 32 * STEPS}
    # Every objective can be sampled on this grid.
    sections = {"tree": tree, "diffusion": diffusion | further, "samples": {"grid": "karras"}}
    return validated(sections | {"evaluation": {"classifier": classifier}})


def task_of(job: Job) -> Task:
    """The task that the product itself would train, with the job's steps, checkpoints and mishaps."""
    views = job.kind.startswith("views-")
    kind: Any = "root" if job.kind == "threshold" else job.kind.removeprefix("views-")
    threshold = 0.3 if job.kind == "threshold" else 0.0  # each row leaves out one of two leaves, more often than not
    url, settings = str(job.folder), small_config(job.slots, job.zero, views, threshold, **job.diffusion)
    start, data_url = (str(job.home / f"{'colour-' if views else ''}{name}") for name in ("start", "data"))
    captured: list[Task] = []

    def capture(task: Task, worker: Any) -> Any:
        captured.append(task)
        raise _Captured

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Captured):
        patch.setattr(engine, "train", capture)
        worker = Member()
        if kind in ("root", "split", "refit"):
            name = {"root": "00-root", "split": "01-split-1", "refit": "02-refit"}[kind]
            previous, leaf = None if kind == "root" else start, 1 if kind == "split" else None
            grow(GrowingPhase(name, kind, url, previous, leaf, data_url, settings), worker)
        elif kind == "classifier":
            classify(ClassifierPhase(url, data_url, settings), worker)
        else:
            # Without it networks as small as these would not be partitioned.
            partitioned = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if job.zero == 3 else {}
            given = deepspeed_settings(settings.diffusion) or partitioned
            diffuse(DiffusionPhase(url, start, data_url, settings, job.bf16, given), worker)
    (task,) = captured
    given, reached = task.batch, list[tuple[int, int]]()

    def batch(step: int, slot: int) -> Batch:
        if step == job.dies_at:
            raise Lost
        reached.append((step, slot))
        return given(step, slot)

    def spoil(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensors]) -> tuple[Tensor, Tensors]:
        loss, terms = output
        if reached[-1] != job.nan_at:
            return loss, terms
        return loss * torch.nan, {name: t * torch.nan if name == "kl_nodes" else t for name, t in terms.items()}

    if job.nan_at is not None:
        task.objective.register_forward_hook(spoil)

    if task.validation is not None:
        task = dataclasses.replace(task, validation=dataclasses.replace(task.validation, steps=[VALIDATED]))
    if task.snapshots is not None:
        steps = snapshot_steps(job.steps, SNAPSHOTS)
        task = dataclasses.replace(task, snapshots=dataclasses.replace(task.snapshots, steps=steps))
    if job.still:
        task = dataclasses.replace(task, learning_rate=lambda step: 0.0)
    recovery = task.recovery.model_copy(update={"rollbacks": job.rollbacks})
    task = dataclasses.replace(task, recovery=recovery, rolls_back=job.rollbacks > 0)
    return dataclasses.replace(
        task, batch=batch, steps=job.steps, checkpoint_images=job.keep_every * task.batch_size, log_every=1
    )


def state_of(task: Task) -> Tensors:
    """A copy of all parameters and buffers, gathered where ZeRO 3 has cut them up."""
    parameters = list(task.objective.parameters())
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return {name: t.detach().clone() for name, t in task.objective.state_dict().items()}
    return {name: t.detach().clone() for name, t in task.objective.state_dict().items()}


def train(job: Job, rank: int = 0, world: int = 1, history: bool = False) -> Result:
    """Runs a job as worker `rank`; non-finite losses and losses of workers come back as `error`."""
    task = task_of(job)
    trained = {name for name, p in task.objective.named_parameters() if p.requires_grad}
    result = Result(state_of(task), {}, trained)
    if history:
        plain = task.batch

        def watched(step: int, slot: int) -> Batch:
            if slot == 0 and step > 0:
                result.history.append(state_of(task))
            return plain(step, slot)

        task = dataclasses.replace(task, batch=watched)
    savers: list[engine.Saver] = []

    class Noted(engine.Saver):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            savers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Saver", Noted)
        try:
            result.averages = engine.train(task, Member(rank, world, job.stops if rank == world - 1 else None)).averages
        except (NonFiniteError, Stopped, Lost) as error:
            result.error = f"{type(error).__name__}: {error}"
            for saver in savers:
                saver.writing.wait()  # a process that is killed writes nothing any more
    result.weights = state_of(task)
    if history:
        result.history.append(result.weights)
    return result


def train_all(rank: int, world: int, jobs: list[Job]) -> list[Result]:
    return [train(job, rank, world) for job in jobs]


def metrics(job: Job) -> list[dict[str, Any]]:
    return read_metrics(str(job.folder / "metrics"))


def losses(job: Job) -> list[float]:
    lines = metrics(job)
    assert [line["step"] for line in lines] == list(range(1, job.steps + 1))
    return [line["loss"] for line in lines]


# --- workers without Ray -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _server() -> None:
    """Starts the fork server with all that a worker imports, on CPU whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setenv("DS_LOG_LEVEL", "error")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.set_forkserver_preload(["deepspeed", "torch._dynamo", "torch._inductor.compile_fx", "test_engine"])
        forkserver.ensure_running()


def _work(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # as Ray Train does
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        torch.save(function(rank, world, *arguments), folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise


Launch = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def launch(_server: None, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    context = multiprocessing.get_context("forkserver")

    def launch(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """function(rank, world, *arguments) in `world` new processes with a process group; their results by rank."""
        folder = tmp_path_factory.mktemp("group")
        processes = [context.Process(target=_work, args=(r, world, folder, function, arguments)) for r in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 120
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                time.sleep(0.01)
                if any(process.exitcode for process in processes):
                    deadline = min(deadline, time.monotonic() + 5)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = [file.read_text() for file in sorted(folder.glob("*.error"))]
        if errors or any(process.exitcode for process in processes):
            pytest.fail(f"exit codes {[p.exitcode for p in processes]} of {world} workers\n" + "\n".join(errors))
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return launch


# --- a home for jobs -----------------------------------------------------------------------------


def make_home(home: Path) -> Path:
    """A folder with some packed digits, grey and in colour, each with a tree to start from that needs no training (so
    no rounding).
    """
    source = digits()
    grey = {name: split.images[:IMAGES] for name, split in source.splits.items()}
    colour = {name: np.concatenate([x, x[:, :, ::-1], 255 - x], 1) for name, x in grey.items()}
    for prefix, images in (("", grey), ("colour-", colour)):
        some = {name: Split(x, source.splits[name].labels[:IMAGES]) for name, x in images.items()}
        pack(Source("digits", some, source.classes), str(home / f"{prefix}data"), 200)
        torch.manual_seed(0)
        spec = small_config(views=bool(prefix)).tree_spec(images["train"].shape[1], 8)
        model = TreeVAE(spec, Topology.root_with_two_leaves("00-root"))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1)
        save_tree(str(home / f"{prefix}start"), model)
        left = np.random.default_rng(0).random((IMAGES, 1)).astype(np.float32)
        storage.write_bytes(str(home / f"{prefix}start" / "routing.safetensors"), save_arrays({"train": left}))
    return home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def fresh(home: Path, tmp_path: Path) -> Path:
    """The same data and start in a folder of the test's own."""
    for name in ("data", "start", "colour-data", "colour-start"):
        (tmp_path / name).symlink_to(home / name)
    return tmp_path


# --- golden losses -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """A job whose losses are recorded."""

    kind: str
    steps: int
    diffusion: dict[str, Any] = field(default_factory=dict)


GOLDENS = {
    **{kind: Recorded(kind, 100) for kind in ("root", "split", "refit")},
    **{kind: Recorded(kind, 80) for kind in ("views-root", "views-split")},
    "diffusion": Recorded("diffusion", 60),
    "diffusion-v": Recorded("diffusion", 60, {"objective": "v", "min_snr": 5.0}),
    "diffusion-edm": Recorded("diffusion", 60, {"objective": "edm"}),
    "diffusion-told": Recorded("diffusion", 60, {"condition": "recon+path", "condition_dropout": 0.1}),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_losses(fresh: Path, name: str) -> None:
    recorded = GOLDENS[name]
    job = Job(recorded.kind, fresh, name, recorded.steps, slots=2, diffusion=recorded.diffusion)
    train(job)
    found, file = losses(job), GOLDEN / f"{name}.json"
    if RECORD:
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"torch": torch.__version__, "losses": found}, indent=0) + "\n")
        pytest.skip(f"recorded {file}")
    golden = json.loads(file.read_text())["losses"]
    assert np.mean(golden[-10:]) < 0.95 * np.mean(golden[:10]), "a golden run that does not learn protects nothing"
    np.testing.assert_allclose(found[:10], golden[:10], rtol=1e-5)
    np.testing.assert_allclose(found, golden, rtol=1e-3)


# --- back-ends, workers, ZeRO --------------------------------------------------------------------

STEPS, SHORT = 50, 20
PHASES = {
    "root": 0,
    "split": 0,
    "refit": 0,
    "views-root": 0,
    "views-split": 0,
    "threshold": 0,
    "diffusion": 1,
    "classifier": 0,
}  # kind -> ZeRO stage, as the product has it


def parity_job(home: Path, kind: str, label: str) -> Job:
    # One DeepSpeed worker is told from the plain back-end, which is one worker too, in fewer steps.
    return Job(kind, home, f"{kind}-{label}", SHORT if label == "1" else STEPS, zero=PHASES[kind])


def still_job(home: Path, label: str) -> Job:
    return Job("root", home, f"still-{label}", 5, still=True)


@dataclass(frozen=True)
class Reference:
    """Every phase by the plain back-end; of diffusion the weights after every step too."""

    phases: dict[str, Result]
    still: Result


@pytest.fixture(scope="session")
def plain(home: Path) -> Reference:
    phases = {kind: train(parity_job(home, kind, "plain"), history=kind == "diffusion") for kind in PHASES}
    return Reference(phases, train(still_job(home, "plain")))


@pytest.fixture(scope="session")
def by_workers(home: Path, launch: Launch) -> Callable[[int], dict[str, list[Result]]]:
    """The same by DeepSpeed on so many workers: kind -> results by rank. Each number of workers runs once."""
    done: dict[int, dict[str, list[Result]]] = {}

    def by_workers(world: int) -> dict[str, list[Result]]:
        if world not in done:
            jobs = [parity_job(home, kind, str(world)) for kind in PHASES] + [still_job(home, str(world))]
            ranks = launch(world, train_all, jobs)
            done[world] = {kind: [results[i] for results in ranks] for i, kind in enumerate([*PHASES, "still"])}
        return done[world]

    return by_workers


def power_average(history: list[Tensors], width: float) -> Tensors:
    """An EMA in float64 and in closed form, from the weights after each of t steps."""
    steps, power = len(history), gamma_from_width(width) + 1
    shares = [(i / steps) ** power - ((i - 1) / steps) ** power for i in range(1, steps + 1)]
    return {n: sum(s * h[n].double() for s, h in zip(shares, history, strict=True)).float() for n in history[0]}


def assert_same_everywhere(results: list[Result]) -> None:
    """All workers hold the same weights, buffers and averages, to the last bit."""
    for result in results[1:]:
        assert_identical(result.weights, results[0].weights)
        assert result.averages.keys() == results[0].averages.keys()
        for name, average in result.averages.items():
            assert_identical(average, results[0].averages[name])


def assert_identical(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_close(found: Tensors, expected: Tensors, rtol: float, atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", PHASES)
def test_one_deepspeed_worker_equals_the_plain_back_end(home, plain, by_workers, kind: str) -> None:
    by_workers(1)
    found, expected = losses(parity_job(home, kind, "1")), losses(parity_job(home, kind, "plain"))
    np.testing.assert_allclose(found, expected[:SHORT], rtol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", PHASES)
def test_metrics_do_not_depend_on_the_workers(home, plain, by_workers, kind: str, world: int) -> None:
    assert_same_everywhere(by_workers(world)[kind])
    found, expected = metrics(parity_job(home, kind, str(world))), metrics(parity_job(home, kind, "plain"))
    assert len(found) == (SHORT if world == 1 else STEPS)
    expected = expected[: len(found)]
    np.testing.assert_allclose([m["loss"] for m in found], [m["loss"] for m in expected], rtol=1e-4)
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=1e-3, abs=1e-5), f"step {reference['step']}"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_running_statistics_do_not_depend_on_the_workers(plain, by_workers, world: int) -> None:
    """At a learning rate of 0 the statistics are all that moves, and they are the same."""
    found, expected = by_workers(world)["still"][0].weights, plain.still.weights
    moved = {name for name in expected if not torch.equal(expected[name], plain.still.initial[name])}
    assert moved == {name for name in expected if name.endswith(("running_mean", "running_var"))}
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["root", "split", "classifier"])
@pytest.mark.parametrize("world", [2, 4])
def test_running_statistics_stay_together_in_training(plain, by_workers, kind: str, world: int) -> None:
    """Means too, after 50 steps of training: there is no bias before a batch norm for rounding to drift along."""
    found, expected = by_workers(world)[kind][0].weights, plain.phases[kind].weights
    statistics = [name for name in expected if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert_close({n: found[n] for n in statistics}, {n: expected[n] for n in statistics}, rtol=1e-3, atol=1e-5)


def assert_averages(found: dict[str, Tensors], history: list[Tensors], rtol: float, atol: float) -> None:
    """The EMAs that training follows, against their closed form from the weights after every step."""
    assert found.keys() == {str(width) for width in WIDTHS}
    for width in WIDTHS:
        assert_close(found[str(width)], power_average(history, width), rtol, atol)


def assert_snapshots(job: Job, history: list[Tensors], rtol: float, atol: float) -> None:
    """The snapshots that training kept, against the same."""
    steps = snapshot_steps(job.steps, SNAPSHOTS)
    assert list(snapshots(job)) == sorted([file_name(s, w) for s in steps for w in TRACKS] + ["index.json"])
    for step in steps:
        for width in TRACKS:
            found = storage.read_tensors(str(job.folder / "ema" / file_name(step, width)))
            expected = power_average(history[:step], width)
            assert_close(found, {n.removeprefix("denoiser."): t for n, t in expected.items()}, rtol, atol)


def snapshots(job: Job) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((job.folder / "ema").iterdir())}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_snapshots_do_not_depend_on_the_workers(home, plain, by_workers, world: int) -> None:
    by_workers(world)
    reference = plain.phases["diffusion"]
    history = [{n: h[n] for n in reference.trained} for h in reference.history]
    assert_snapshots(parity_job(home, "diffusion", "plain"), history, rtol=1e-5, atol=1e-6)
    assert_snapshots(parity_job(home, "diffusion", str(world)), history, rtol=1e-4, atol=1e-5)


def test_a_width_that_was_not_followed_is_rebuilt(home, plain) -> None:
    """In one call from what the product left: to 2% of the way from the last weights, for so few snapshots."""
    reference = plain.phases["diffusion"]
    history = [{n: h[n] for n in reference.trained} for h in reference.history]
    found = rebuild(str(parity_job(home, "diffusion", "plain").folder), 0.07)
    expected = {n.removeprefix("denoiser."): t for n, t in power_average(history, 0.07).items()}
    last = {n.removeprefix("denoiser."): t for n, t in history[-1].items()}
    assert found.keys() == expected.keys()
    apart = sum((found[n] - expected[n]).square().sum() for n in expected) ** 0.5
    away = sum((last[n] - expected[n]).square().sum() for n in expected) ** 0.5
    assert apart < 0.02 * away


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ema_does_not_depend_on_the_workers(plain, by_workers, world: int) -> None:
    reference = plain.phases["diffusion"]
    assert len(reference.history) == STEPS
    history = [{n: h[n] for n in reference.trained} for h in reference.history]
    assert_averages(reference.averages, history, rtol=1e-5, atol=1e-6)
    history = history[: SHORT if world == 1 else STEPS]
    assert_averages(by_workers(world)["diffusion"][0].averages, history, rtol=1e-4, atol=1e-5)
    for width in WIDTHS:
        expected = power_average(history, width)
        moved = max((expected[n] - reference.initial[n]).abs().max().item() for n in expected)
        assert moved > 1e-2, "the average must have gone further than the tolerance"


def test_validation_is_no_part_of_training(fresh: Path) -> None:
    """Weights, averages and training metrics to the last bit; what it finds is the mean over the same draws by hand."""
    without, with_it = (Job("diffusion", fresh, name, 6, slots=2) for name in ("without", "with"))
    results = []
    for job in (without, with_it):
        task = task_of(job)
        steps = [] if job is without else [2, 6]
        assert task.validation is not None
        task = dataclasses.replace(task, validation=dataclasses.replace(task.validation, steps=steps))
        results.append((engine.train(task, Member()), state_of(task), task))
    (plain, weights, _), (watched, same, task) = results
    assert_identical(weights, same)
    for name, average in plain.averages.items():
        assert_identical(average, watched.averages[name])
    lines = metrics(with_it)
    found = {line["step"]: {k: v for k, v in line.items() if k.startswith("validation/")} for line in lines}
    assert [step for step, values in found.items() if values] == [2, 6]
    assert [{k: v for k, v in line.items() if k not in found[line["step"]]} for line in lines] == metrics(without)

    validation = task.validation
    assert validation is not None
    means: dict[str, list[float]] = defaultdict(list)
    task.objective.eval()
    with torch.no_grad():
        for number, slot in itertools.product(range(validation.batches), range(task.slots)):
            rng = generator("validation", task.seed, task.phase, number, slot)
            loss, terms = task.objective(validation.batch(number, slot), 0, rng)
            for name, value in {"loss": loss, **terms}.items():
                means[name].append(float(value))
    expected = validation.summary({name: float(np.mean(values)) for name, values in means.items()})
    assert found[6] == pytest.approx(expected)
    times = [found[6][f"validation/time-{k}"] for k in range(10)]
    assert np.mean(times) == pytest.approx(found[6]["validation/loss"], rel=0.05)  # as many samples of each
    assert {name for name in found[6] if "leaf" in name} <= {"validation/leaf-0", "validation/leaf-1"}


def test_bf16_does_not_depend_on_the_zero_stage(home, launch) -> None:
    """Only the computation of a slot is in bf16: nothing is rounded on its way between workers."""
    jobs = [Job("diffusion", home, f"bf16-{zero}", 6, zero=zero, bf16=True) for zero in range(4)]
    launch(2, train_all, jobs)
    expected = losses(jobs[0])
    for job in jobs[1:]:
        np.testing.assert_allclose(losses(job), expected, rtol=1e-3)
    alone = dataclasses.replace(jobs[0], name="bf16-alone")
    train(alone)
    np.testing.assert_allclose(losses(alone), expected, rtol=1e-3)
    full = dataclasses.replace(jobs[0], name="bf16-not", bf16=False)
    train(full)
    assert losses(full) != losses(alone)


def decided(rank: int, world: int, home: Path, block: int) -> tuple[Any, Tensor]:
    """The decisions and the frozen features of a tree, in blocks of so many images."""
    growing.DECISION_BLOCK = block
    model, worker = load_tree(str(home / "start")), Member(rank, world)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # routers that tell images apart
    reader = Reader(str(home / "data"), read_manifest(str(home / "data")), "train")
    found = growing.decisions_of(model, reader, worker, 60.0)
    return found.left, growing.frozen_of(model, 1, reader, np.arange(0, IMAGES, 3), worker, 60.0)


@pytest.mark.parametrize("block", [50, IMAGES])
def test_decisions_and_frozen_features_do_not_depend_on_the_workers(home, launch, block: int) -> None:
    """Whole blocks of images go to workers, so some may have none."""
    ((left, frozen),) = launch(1, decided, home, block)
    assert np.ptp(left) > 0.01
    assert len(frozen) == -(-IMAGES // 3)
    for world in (2, 4):
        for other, features in launch(world, decided, home, block):
            np.testing.assert_array_equal(other, left)
            assert torch.equal(features, frozen)


def judged(rank: int, world: int, home: Path, block: int) -> tuple[int, int]:
    """How many images of the test split a classifier that was never trained is right about, in blocks of so many."""
    classifying.TEST_BLOCK = block
    torch.manual_seed(0)
    manifest = read_manifest(str(home / "data"))
    network = classifying.classifier_spec(small_config(), manifest).build()
    return classifying.right_of(network, Reader(str(home / "data"), manifest, "test"), Member(rank, world), 60.0)


@pytest.mark.parametrize("block", [50, IMAGES])
def test_accuracy_does_not_depend_on_the_workers(home, launch, block: int) -> None:
    """Whole blocks of images go to workers, so some may have none."""
    (found,) = launch(1, judged, home, block)
    assert found[1] == len(digits().splits["test"])
    assert 0 < found[0] < found[1] / 2
    for world in (2, 4):
        assert launch(world, judged, home, block) == [found] * world


def test_a_reach_threshold_changes_what_a_phase_computes(plain) -> None:
    exact, left_out = plain.phases["root"], plain.phases["threshold"]
    assert any(not torch.equal(exact.weights[name], left_out.weights[name]) for name in exact.trained)


@pytest.mark.parametrize("files", [False, True])
def test_zero_stages_are_equal(home, launch, plain, files: bool) -> None:
    """ZeRO 0, 1, 2, 3 on two workers, plain and by the files in configs/deepspeed: losses to 1e-5 relative, EMAs as in
    closed form from the plain weights.
    """
    jobs = [Job("diffusion", home, f"zero-{zero}-{files}", 12, zero=zero) for zero in range(4)]
    if files:
        jobs = [dataclasses.replace(j, diffusion={"deepspeed": str(DEEPSPEED / f"zero{j.zero}.json")}) for j in jobs]
        assert [task_of(job).deepspeed["zero_optimization"]["stage"] for job in jobs] == [0, 1, 2, 3]
    ranks = launch(2, train_all, jobs)
    history = plain.phases["diffusion"].history[: jobs[0].steps]
    trained = [{n: h[n] for n in plain.phases["diffusion"].trained} for h in history]
    reference = losses(parity_job(home, "diffusion", "plain"))[: jobs[0].steps]
    by_hand = parity_job(home, "diffusion", "plain")
    of_plain = {n: v for n, v in metrics(by_hand)[jobs[0].steps - 1].items() if n.startswith("validation/")}
    for i, job in enumerate(jobs):
        results = [r[i] for r in ranks]
        assert_same_everywhere(results)
        np.testing.assert_allclose(losses(job), reference, rtol=1e-5)
        validated = {name: value for name, value in metrics(job)[-1].items() if name.startswith("validation/")}
        assert len(validated) > 10
        assert validated == pytest.approx(of_plain, rel=1e-4)
        assert_averages(results[0].averages, trained, rtol=1e-4, atol=1e-5)
        assert_snapshots(job, trained, rtol=1e-4, atol=1e-5)
        assert_close(results[0].weights, history[-1], rtol=1e-4, atol=1e-5)


def test_a_split_trains_the_new_networks_and_nothing_else(by_workers) -> None:
    for result in by_workers(2)["split"]:
        moved = {n for n in result.weights if not torch.equal(result.weights[n], result.initial[n])}
        new = tuple(f"model.nodes.{part}." for part in ("1.prior_router", "1.posterior_router", "3", "4"))
        statistics = {n for n in result.weights if n.startswith(new) and "running_" in n}
        fixed = {n for n in result.weights if not n.startswith(new) or n.endswith("num_batches_tracked")}
        assert result.trained == result.weights.keys() - statistics - fixed
        assert moved == result.trained | statistics, (
            f"{sorted(moved ^ (result.trained | statistics))} should (not) move"
        )


# --- resume --------------------------------------------------------------------------------------

KEEP, HALF, DEATH, LAST = 2, 4, 7, 8  # checkpoints after steps 2, 4, 6; the second one is gone on from


def parts(job: Job) -> dict[str, str]:
    return {file.name: file.read_text() for file in sorted((job.folder / "metrics").iterdir())}


def resume_jobs(home: Path, kind: str, zero: int) -> tuple[Job, Job, Job]:
    """The straight run, the run that is lost, and the one that goes on from half way."""
    straight = Job(kind, home, f"{kind}-{zero}-straight", LAST, slots=2 if zero == 3 else 4, zero=zero, keep_every=KEEP)
    lost = dataclasses.replace(straight, name=f"{kind}-{zero}-lost", dies_at=DEATH)
    return straight, lost, dataclasses.replace(lost, dies_at=None)


def assert_resumed(straight: Job, lost: Job, results: tuple[Result, Result, Result], before: dict[str, str]) -> None:
    """before: the metric parts that the lost run had written."""
    expected, killed, resumed = results
    assert killed.error.startswith("Lost")
    assert list(before) == [f"{step:09d}.jsonl" for step in (2, 4, 6)]
    assert_same_everywhere([resumed, expected])
    assert parts(lost) == parts(straight)
    assert list(parts(straight)) == [f"{step:09d}.jsonl" for step in (2, 4, 6, 8)]
    losses(lost)  # every step once
    if lost.kind == "diffusion":
        assert snapshots(lost) == snapshots(straight)
        assert len(snapshots(straight)) == 1 + SNAPSHOTS * len(TRACKS)


def spoil(job: Job) -> None:
    """Leaves what a run with other intervals would have: parts beyond the checkpoint that nothing overwrites. The last
    checkpoint lacks a file, as if it had not been written to its end.
    """
    for kept in Checkpoints(str(job.folder / "checkpoints")).all():
        if kept.step > HALF:
            next(Path(kept.url).glob("weights-*")).unlink()
    (job.folder / "metrics" / "000000007.jsonl").write_text('{"step": 7, "loss": 0}\n')
    if job.kind == "diffusion":
        (job.folder / "ema" / file_name(6, TRACKS[0])).write_bytes(b"later")


@pytest.mark.parametrize("kind", PHASES)
def test_resumed_equals_straight_through_plain(fresh: Path, kind: str) -> None:
    straight, lost, resumed = resume_jobs(fresh, kind, 0)
    expected, killed = train(straight), train(lost)
    before = parts(lost)
    spoil(lost)
    assert_resumed(straight, lost, (expected, killed, train(resumed)), before)


@pytest.mark.slow
def test_resumed_equals_straight_through_compiled(fresh: Path) -> None:
    straight, lost, resumed = (
        dataclasses.replace(job, diffusion={"compile": True}) for job in resume_jobs(fresh, "diffusion", 0)
    )
    expected, killed = train(straight), train(lost)
    before = parts(lost)
    spoil(lost)
    torch.compiler.reset()  # a new process would compile anew
    results = expected, killed, train(resumed)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    assert_resumed(straight, lost, results, before)


def test_resumed_equals_straight_through_with_workers(fresh: Path, launch) -> None:
    """Two workers; the root without ZeRO, diffusion with ZeRO 1 and 3; going on in new processes."""
    runs = [resume_jobs(fresh, *which) for which in [("root", 0), ("diffusion", 1), ("diffusion", 3)]]
    first = launch(2, train_all, [job for straight, lost, _ in runs for job in (straight, lost)])
    before = [parts(lost) for _, lost, _ in runs]
    for _, lost, _ in runs:
        spoil(lost)
    second = launch(2, train_all, [resumed for _, _, resumed in runs])
    for i, (straight, lost, _) in enumerate(runs):
        for rank in range(2):
            results = (first[rank][2 * i], first[rank][2 * i + 1], second[rank][i])
            assert_resumed(straight, lost, results, before[i])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_any_number_of_workers_goes_on_from_what_any_other_left(fresh: Path, launch, zero: int) -> None:
    """2 workers, then 1, 2 and 4: every kind of state is put together and cut up anew, to the last bit."""
    two = Job("diffusion", fresh, "two", 4, zero=zero, keep_every=1)
    launch(2, train_all, [two])
    kept = Checkpoints(str(two.folder / "checkpoints")).all()
    assert [one.step for one in kept] == [2, 3]
    after = {}
    for world in (1, 2, 4):
        still, moving = (Job("diffusion", fresh, f"{world}-{k}", 4, zero=zero, still=k == 0) for k in range(2))
        for job in (still, moving):
            shutil.copytree(two.folder / "checkpoints", job.folder / "checkpoints")
        after[world] = launch(world, train_all, [still, moving])[0]
    for still, moving in after.values():
        # Weights that do not move are the checkpoint's own, and so is what averages are made from.
        assert_same_everywhere([still, after[2][0]])
        for name, expected in after[2][1].weights.items():
            torch.testing.assert_close(moving.weights[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_told_to_stop_a_step_is_finished_and_kept(fresh: Path, launch, world: int) -> None:
    """One worker is told; all stop after the same step, and go on from it as if nothing had been."""
    straight = Job("diffusion", fresh, "straight", 6, zero=1)
    stopped = dataclasses.replace(straight, name="stopped", stops=3)
    expected, halted = launch(world, train_all, [straight, stopped])[0]
    assert halted.error == "Stopped: diffusion was told to stop after step 3 of 6"
    (kept,) = Checkpoints(str(stopped.folder / "checkpoints")).all()
    assert kept.step == 3
    (resumed,) = launch(world, train_all, [dataclasses.replace(stopped, stops=None)])[0]
    assert_same_everywhere([resumed, expected])
    assert metrics(stopped) == metrics(straight)


def test_lines_do_not_depend_on_when_checkpoints_are_written(fresh: Path) -> None:
    told = []
    for name, every, stops in (("never", 10**6, None), ("often", 1, None), ("stopped", 10**6, 4)):
        job = Job("root", fresh, name, 7, keep_every=every)
        with contextlib.suppress(Stopped):
            engine.train(dataclasses.replace(task_of(job), log_every=3), Member(stops=stops))
        if stops:
            engine.train(dataclasses.replace(task_of(job), log_every=3), Member())
        told.append(metrics(job))
    assert told[0] == told[1] == told[2]
    assert [line["step"] for line in told[0]] == [3, 6, 7]


def test_checkpoints_come_by_the_clock_too(fresh: Path) -> None:
    job = Job("root", fresh, "clock", 4)
    task = task_of(job)
    often = task.recovery.model_copy(update={"checkpoint_minutes": 1e-9})
    engine.train(dataclasses.replace(task, recovery=often), Member())
    assert [kept.step for kept in Checkpoints(str(job.folder / "checkpoints")).all()] == [2, 3]


def test_a_checkpoint_that_cannot_be_written_is_given_up(fresh: Path, monkeypatch, caplog) -> None:
    """As when storage is away, or a disk full: training goes on, and the next one counts."""
    write = storage.write_bytes

    def full(url: str, data: bytes) -> None:
        if "/000000004-" in url and "exp_avg-" in url:
            raise OSError(28, "No space left on device", url)
        write(url, data)

    straight, job = (Job("root", fresh, name, 8, keep_every=2) for name in ("straight", "full"))
    train(straight)
    monkeypatch.setattr(storage, "write_bytes", full)
    train(job)
    assert "the checkpoint of step 4 could not be written" in caplog.text
    assert [kept.step for kept in Checkpoints(str(job.folder / "checkpoints")).all()] == [2, 6]
    assert metrics(job) == metrics(straight)


def test_a_worker_that_waits_for_storage_does_not_hang(fresh: Path) -> None:
    class Watched(Member):
        def expects(self, seconds: float) -> None:
            expected.append(seconds)

    task, expected = task_of(Job("root", fresh, "slow", 3, keep_every=1)), list[float]()
    engine.train(task, Watched())
    first, further = task.recovery.first_step_seconds, task.recovery.step_seconds
    # At the second step the first checkpoint is still under way.
    assert [seconds for seconds, _ in itertools.groupby(expected)][:4] == [first, further, first, further]


# --- what must stop ------------------------------------------------------------------------------


def test_slots_that_the_workers_cannot_share_are_refused(fresh: Path) -> None:
    task = task_of(Job("root", fresh, "root", 1, slots=4))
    with pytest.raises(ValueError, match="4 slots cannot be shared evenly by 3 workers"):
        engine.train(task, Member(0, 3))


def test_a_loss_that_is_not_finite_stops_all_workers_before_the_update(fresh: Path, launch) -> None:
    step, slot = 3, 1  # slot 1 is the second worker's
    jobs = []
    for kind in ("root", "diffusion"):
        until = Job(kind, fresh, f"{kind}-until", step, zero=PHASES[kind])
        jobs += [until, dataclasses.replace(until, name=f"{kind}-nan", steps=step + 2, nan_at=(step, slot))]
    for until, stopped, smooth, broken in launch(2, train_all, jobs):
        assert stopped.error.startswith(
            "NonFiniteError: 00-root, step 3: loss, kl_nodes of worker 1 (slot 1) not finite"
        )
        assert broken.error.startswith("NonFiniteError: diffusion, step 3: loss of worker 1 (slot 1) not finite")
        assert until.error == smooth.error == ""
        assert_identical(stopped.weights, until.weights)
        assert_identical(broken.weights, smooth.weights)


@pytest.mark.parametrize("world", [1, 2])
def test_after_a_fault_of_the_machine_training_goes_back_and_nothing_is_seen_of_it(fresh, launch, world: int) -> None:
    straight = Job("diffusion", fresh, "straight", 7, zero=1, keep_every=2)
    broken = dataclasses.replace(straight, name="broken", nan_at=(4, 1), rollbacks=2)
    expected, first = launch(world, train_all, [straight, broken])[0]
    whose = f"loss of worker {1 % world} (slot 1) not finite"
    assert first.error == f"RolledBack: diffusion, step 4: {whose}; going back to step 4, rollback 1 of 2"
    (again,) = launch(world, train_all, [dataclasses.replace(broken, nan_at=None)])[0]
    assert_same_everywhere([again, expected])
    assert metrics(broken) == metrics(straight)


def test_what_is_not_finite_again_and_again_gets_other_draws_and_stops_in_the_end(fresh: Path) -> None:
    job = Job("diffusion", fresh, "broken", 7, keep_every=3, nan_at=(4, 1), rollbacks=2)
    errors = [train(job).error for _ in range(3)]
    assert [error.partition(":")[0] for error in errors] == ["RolledBack", "RolledBack", "NonFiniteError"]
    assert errors[2].endswith("not finite after 2 rollbacks; the last checkpoint is kept.")
    kept = Checkpoints(str(job.folder / "checkpoints")).rollbacks()
    assert kept == [(4, 3), (4, 3)]
    assert [engine.renewals(kept[:1], step) for step in (2, 3, 4)] == [0, 0, 0]
    assert [engine.renewals(kept, step) for step in (2, 3, 4)] == [0, 1, 1]
    mended = train(dataclasses.replace(job, nan_at=None))
    straight = train(dataclasses.replace(job, name="straight", nan_at=None))
    assert mended.error == straight.error == ""
    lines, expected = metrics(job), metrics(dataclasses.replace(job, name="straight"))
    assert lines[:3] == expected[:3]
    assert all(ours["loss"] != theirs["loss"] for ours, theirs in zip(lines[3:], expected[3:], strict=True))


# --- a toy objective: the optimizer itself -------------------------------------------------------


class Line(nn.Module):
    """Least squares; at step `breaks_at` its gradient is NaN, its loss is not."""

    def __init__(self, breaks_at: int | None):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-2, 2, 7))
        self.breaks_at = breaks_at

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, Tensors]:
        loss = (batch["x"] @ self.w - batch["y"]).square().mean()
        if step == self.breaks_at:
            loss = loss + (self.w - self.w.detach()).abs().sqrt().sum()
        return loss, {}


def line_batch(step: int, slot: int) -> Batch:
    rng = torch.Generator().manual_seed(100 * step + slot)
    return {"x": torch.randn(4, 7, generator=rng), "y": torch.randn(4, generator=rng)}


RATE, DECAY = 0.1, 0.1


def fit_line(rank: int, world: int, zeros: list[int], steps: int, breaks_at: int | None) -> list[tuple[Tensor, str]]:
    """The weights after `steps` steps, and the error if there was one, for each ZeRO stage."""
    found = []
    for zero in zeros:
        objective, error = Line(breaks_at), ""
        task = Task("line", objective, line_batch, steps, 8, 2, 0, lambda step: RATE, DECAY, zero=zero, clip=100.0)
        try:
            engine.train(task, Member(rank, world))
        except NonFiniteError as problem:
            error = str(problem)
        found.append((state_of(task)["w"], error))
    return found


def fit_line_by_torch(steps: int, optimizer_class: type[torch.optim.Optimizer]) -> Tensor:
    line = Line(None)
    optimizer = optimizer_class(line.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(steps):
        optimizer.zero_grad()
        for slot in range(2):
            (line(line_batch(step, slot), step, torch.Generator())[0] / 2).backward()
        optimizer.step()
    return line.w.detach()


@pytest.mark.parametrize("world", [1, 2])
def test_the_optimizer_is_adam_with_l2(launch, world: int) -> None:
    one, three = ([w for w, _ in results] for results in launch(world, fit_lines)[0])
    for steps, found in ((1, one), (3, three)):
        adam, adamw = fit_line_by_torch(steps, torch.optim.Adam), fit_line_by_torch(steps, torch.optim.AdamW)
        assert (adam - adamw).abs().max() > 1e-2, "the two must be told apart here"
        for zero, w in enumerate(found):
            torch.testing.assert_close(w, adam, rtol=1e-6, atol=1e-6, msg=lambda m, z=zero: f"ZeRO {z}: {m}")


def fit_lines(rank: int, world: int) -> list[list[tuple[Tensor, str]]]:
    return [fit_line(rank, world, [0, 1, 2, 3], steps, None) for steps in (1, 3)]


def test_a_gradient_that_is_not_finite_stops_before_the_update(launch) -> None:
    expected = fit_line_by_torch(2, torch.optim.Adam)
    found = [fit_line(0, 1, [0], 5, 2)[0]] + [
        pair for results in launch(2, fit_line, [0, 1, 2, 3], 5, 2) for pair in results
    ]
    for number, (w, error) in enumerate(found):
        both = "gradient of w of worker 0 (slot 0); gradient of w of worker 1 (slot 1)"
        alone = "gradient of w of worker 0 (slot 0); gradient of w of worker 0 (slot 1)"
        blamed = alone if number == 0 else "gradient" if number % 4 == 0 else both  # the last: ZeRO 3
        assert error == f"line, step 2: {blamed} not finite."
        torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-6)


def bucket_sizes(rank: int, world: int, given: dict[str, int]) -> list[int]:
    found = []
    for zero in (1, 2, 3):
        task = Task("line", Line(None), line_batch, 1, 8, 2, 0, lambda step: RATE, zero=zero)
        task.deepspeed = {"zero_optimization": given}
        found.append(engine.DeepSpeedBackend(task, world).engine.optimizer.reduce_bucket_size)
    return found


def test_gradients_are_sent_in_a_bucket_no_larger_than_all_of_them(launch) -> None:
    assert launch(1, bucket_sizes, {}) == [[7, 7, 7]]
    assert launch(1, bucket_sizes, {"reduce_bucket_size": 1000}) == [[1000, 1000, 1000]]


# --- means over the workers ----------------------------------------------------------------------


def average(rank: int, world: int) -> list[Tensor]:
    values = [
        torch.tensor(float(rank)),
        torch.full((2, 3), 2.0**rank),
        torch.zeros(0),
        torch.arange(4.0).reshape(2, 2).T * rank,  # not contiguous
        torch.tensor(float("nan") if rank == 1 else 1.0),
        torch.full((5,), 0.1),
        torch.randn(1000, generator=torch.Generator().manual_seed(rank)),
    ]
    engine.average_over_workers(values, world)
    return values


@pytest.mark.parametrize("world", [2, 4])
def test_average_over_workers_is_exact(launch, world: int) -> None:
    ranks = launch(world, average)
    mean, powers, empty, turned, spoiled, tenth, noise = ranks[0]
    assert mean == (world - 1) / 2
    assert torch.equal(powers, torch.full((2, 3), (2.0**world - 1) / world))
    assert empty.numel() == 0
    assert torch.equal(turned, torch.arange(4.0).reshape(2, 2).T * (world - 1) / 2)
    assert spoiled.isnan(), "one worker's NaN is everybody's"
    assert torch.equal(tenth, torch.full((5,), 0.1))
    draws = [torch.randn(1000, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    torch.testing.assert_close(noise, torch.stack(draws).double().mean(0).float(), rtol=0, atol=2e-7)
    for other in ranks[1:]:
        assert all(torch.equal(a, b) or a.isnan() for a, b in zip(ranks[0], other, strict=True))


def test_one_worker_needs_no_process_group() -> None:
    values = [torch.tensor(3.0)]
    engine.average_over_workers(values, 1)
    assert values == [torch.tensor(3.0)]
