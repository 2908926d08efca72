"""Protects what is said of a run before it runs: FLOPs and formulas against closed forms, phases and steps against what
the pipeline does, and that every config can be planned, with a warning where something will not fit.

Legend: M images, W workers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import Alone, finished_run
from torch import nn

from tdiff import config, estimates, launch, pipeline
from tdiff.data.order import Order
from tdiff.diffusion.condition import Denoiser
from tdiff.errors import ConfigError
from tdiff.estimates import KINDS
from tdiff.plan import main
from tdiff.planning.expected import Memory, Plan, drawn, plan_of
from tdiff.planning.given import DEFAULT_WORKERS, Data, Machines, Phase, data_of, schedule
from tdiff.planning.misfits import misfits
from tdiff.planning.speeds import Costs, Speed, assumed, counted, measured, speeds_of
from tdiff.tree.growth import leaf_reach, members
from tdiff.tree.model import TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work import counting
from tdiff.work.counting import Cost, cost_of, grown
from tdiff.work.diffusing import DiffusionPhase, denoiser_spec, diffuse, steps_of
from tdiff.work.growing import GrowingPhase, grow

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = Data.of_size(1500, 297, (1, 8, 8), 10, 500)
HUGE = Data.of_size(10**9, 0, (1, 64, 64), 0)


def machines(gpu: str = "cpu", workers: int = 2, **other: float) -> Machines:
    given = {"per_node": 8, "memory": 1000.0, "cores": 96, "network": 50.0, "storage": 1.0, "price": 2.0, **other}
    return Machines(gpu, KINDS[gpu], workers, **given)  # type: ignore[arg-type]


def planned(chosen: config.Config, data: Data, on: Machines) -> tuple[Plan, Costs, list[Phase]]:
    phases = schedule(chosen, data.images)
    costs = counted(chosen, data, phases, bf16=True)
    return plan_of(chosen, data, on, assumed(on, True), costs, phases), costs, phases


# --- counting ----------------------------------------------------------------------------------------


def cost(model: nn.Module, images: torch.Tensor) -> Cost:
    return cost_of(lambda: model(images).sum(), len(images), list(model.parameters()))


def test_flops_of_a_linear_layer():
    """2 I O forward, as many for the weights' gradients; the input wants none."""
    assert cost(nn.Linear(5, 7), torch.rand(3, 5)).flops == 2 * 2 * 5 * 7


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_a_convolution(groups: int):
    """2 k k C_in / g C_out H W, times two with the weights' gradients and three with those of the input."""
    conv = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    once = 2 * 9 * 8 // groups * 12 * 6 * 6
    assert cost(conv, torch.rand(2, 8, 6, 6)).flops == 2 * once
    assert cost(conv, torch.rand(2, 8, 6, 6, requires_grad=True)).flops == 3 * once


def test_what_is_saved_for_the_backward_pass():
    """exp keeps its result: 4 bytes a number; weights are no activations."""
    model, images = nn.Linear(5, 7), torch.rand(3, 5)
    found = cost_of(lambda: model(images).exp().sum(), 3, list(model.parameters()))
    assert found.saved_bytes == 4 * (5 + 7)


def test_the_tree_is_counted_without_content_as_with_it():
    """Kernels and saved bytes on tensors without content, against a step on real ones; leaves cost the same each."""
    chosen = config.load(None)
    found = {leaves: counting.tree_costs(chosen, (1, 8, 8), grown(leaves), 64) for leaves in (2, 4, 6)}
    model = TreeVAE(chosen.tree_spec(1, 8), grown(4))
    assert found[4].parameters == sum(p.numel() for p in model.parameters())
    half = found[2].whole.towards(found[6].whole, 0.5)
    assert half.flops == pytest.approx(found[4].whole.flops, rel=0.02)
    assert half.saved_bytes == pytest.approx(found[4].whole.saved_bytes, rel=0.05)


def test_the_denoiser_is_counted_without_content_as_with_it():
    chosen = config.load(None, ["diffusion.dropout=0"])
    found = counting.denoiser_costs(chosen, (1, 8, 8), 2, 2, 4, bf16=False)
    tree = TreeVAE(chosen.tree_spec(1, 8), grown(2))
    denoiser = Denoiser(denoiser_spec(chosen, tree))
    assert found.parameters == sum(p.numel() for p in denoiser.parameters())
    images, rng = torch.rand(4, 1, 8, 8), torch.Generator().manual_seed(0)
    with torch.no_grad():
        path = tree.path(tree.walk(images, rng), rng)
    real = cost_of(lambda: denoiser(images, torch.rand(4), path).square().mean(), 4, list(denoiser.parameters()))
    assert found.step.flops == real.flops
    assert found.step.kernels == pytest.approx(real.kernels, rel=0.02)
    assert found.step.saved_bytes == pytest.approx(real.saved_bytes, rel=0.02)
    # Forward once, and for the backward pass almost two of it: the images themselves want no gradient.
    assert 2.5 < found.step.flops / found.evaluation.flops <= 3.1


# --- formulas ----------------------------------------------------------------------------------------


def test_memory_under_zero():
    """fp32 weights, gradients, moments; masters from ZeRO 1 on; one EMA. P = 1000, W = 4."""
    found = [estimates.bytes_per_rank(1000, zero, 4, 1) for zero in range(4)]
    assert found == [20_000, 8000 + 16_000 / 4, 4000 + 20_000 / 4, 24_000 / 4]
    assert estimates.transient_bytes(1000, 0) == 0
    assert estimates.transient_bytes(1000, 3) == 8000
    assert estimates.transient_bytes(10**9, 1) == 2 * 10**9


def test_bytes_that_a_step_sends():
    """Rings of W = 4 workers move 3/4 of the numbers; P = 1000, three passes."""
    assert [estimates.bytes_per_step(1000, zero, 4, 3) for zero in range(4)] == [6000, 6000, 12_000, 27_000]
    assert estimates.bytes_per_step(1000, 3, 1, 3) == 0
    assert estimates.needed_bandwidth(10**9, 1.0) == 10.0


def test_seconds_of_a_pass():
    assert estimates.pass_seconds(1e12, 1000, 1e12, 1e-3, together=True) == 1.0
    assert estimates.pass_seconds(1e12, 1000, 1e12, 1e-3, together=False) == 2.0


def test_what_all_images_take():
    assert estimates.decision_bytes(10**9, 10) == 44 * 10**9
    assert estimates.checkpoint_bytes(1000, 2) == 20_000
    assert estimates.frozen_bytes(10, 7) == 280
    order = Order([1000], 100, 2, 0, "plan", 128)
    first = order.block(order.block_of(0), 0)
    assert estimates.block_bytes(192, 128, 50, 2, order.steps_per_epoch) == 2 * 2 * len(first) * 192


# --- phases ------------------------------------------------------------------------------------------


def halved(topology: Topology, images: int) -> np.ndarray:
    """[M, R] of a tree whose nodes send the first half of their images left, for certain."""
    rows = {0: np.arange(images)}
    left = np.zeros((images, len(topology.deciding)), np.float32)
    for node in topology.top_down:
        children = topology.children(node)
        if children[0] is None:
            continue
        mine = rows[node]
        half = len(mine) - len(mine) // 2
        left[mine[:half], topology.deciding.index(node)] = 1
        rows[children[0]], rows[children[1]] = mine[:half], mine[half:]
    return left


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["tree.max_leaves=7", "tree.refit_every=2"],
        ["tree.max_leaves=16", "tree.features=5", "tree.epochs.refit=0"],
        ["tree.max_leaves=16", "tree.batch=256"],
        ["tree.max_leaves=2"],
    ],
)
def test_phases_and_steps_are_those_of_the_pipeline(settings: list[str]):
    chosen, images = config.load(None, settings), 1500
    topologies: list[Topology] = []
    names: list[str] = []
    steps: list[int] = []
    tree = chosen.tree
    while upcoming := pipeline.next_tree_phase(
        names, chosen, lambda _: (topologies[-1], halved(topologies[-1], images))
    ):
        count, topology = images, topologies[-1] if topologies else Topology.root_with_two_leaves("00-root")
        if upcoming.kind == "split":
            assert upcoming.node is not None
            left = halved(topology, images)
            count = len(members(leaf_reach(topology, left), topology.leaves.index(upcoming.node)))
            topology = topology.split(upcoming.node, upcoming.name)
        epochs = {"root": tree.epochs.initial, "split": tree.epochs.split, "refit": tree.epochs.refit}
        per_epoch = Order([count], tree.images_per_step, tree.slots, 0, upcoming.name, 8192).steps_per_epoch
        if upcoming.kind != "prune":
            steps.append(epochs.get(upcoming.kind, tree.epochs.final) * per_epoch)
        names.append(upcoming.name)
        topologies.append(topology)
    phases = schedule(chosen, images)
    assert [phase.kind for phase in phases] == [kind for name in names if (kind := name.split("-")[1]) != "prune"]
    assert [phase.steps for phase in phases] == steps
    assert phases[-1].leaves == len(topologies[-1].leaves)


# --- plans -------------------------------------------------------------------------------------------


def test_a_plan_adds_up():
    chosen = config.load(None)
    plan, costs, phases = planned(chosen, DIGITS, machines())
    rows = {row.name: row for row in plan.rows}
    assert rows["tree: root"].steps == 60 * (1500 // 128)
    assert rows["diffusion"].steps == steps_of(chosen.diffusion, 1500) == 585
    assert plan.hours == sum(row.seconds for row in plan.rows) / 3600
    assert plan.cost == pytest.approx(plan.hours * 2 * 2.0)
    assert drawn(chosen, DIGITS, 10) == 1500 + 297 + 10 * (4 + 50)
    assert [held.zero for held in plan.memory if held.stage == "diffusion"] == [0, 1, 2, 3]
    assert list(misfits(chosen, plan, costs, phases)) == []


def test_measured_speeds_are_taken_as_they_are():
    chosen = config.load(None, ["workers=1"])
    on = machines(workers=1)
    phases = schedule(chosen, 1500)
    costs = counted(chosen, DIGITS, phases, bf16=True)
    speeds: dict[str, Speed] = {**assumed(on, True), **measured({"diffusion": 100.0}, costs)}
    speeds["tree"] = Speed(1e30, 0.0, "nothing to speak of")  # its pass before the denoiser
    plan = plan_of(chosen, DIGITS, on, speeds, costs, phases)
    row = next(row for row in plan.rows if row.name == "diffusion")
    assert row.computing == pytest.approx(
        128 / 100 * costs.denoiser.step.flops / (costs.denoiser.step.flops + costs.all.visit.flops)
    )
    assert "measured" in speeds["diffusion"].source


LARGER = ["diffusion.attention=[32]"]


@pytest.fixture(scope="module")
def costs() -> Costs:
    """Of the demo's networks on larger images."""
    chosen = config.load(None, [*LARGER, "tree.max_leaves=4"])
    return counted(chosen, HUGE, schedule(chosen, HUGE.images), bf16=True)


FAR = machines("h100", 64)


@pytest.mark.parametrize(
    ("settings", "on", "words"),
    [
        (["tree.batch=262144", "tree.slots=1"], FAR, "tree: a step takes"),
        (["tree.slots=1"], FAR, "tree: 1 of 64 workers have work"),
        (["diffusion.batch=1000000"], FAR, "diffusion: a step takes"),
        (["tree.slots=8"], FAR, "each of 8 slots 16 rows: batch norm wants 32 or more"),
        (["tree.max_leaves=120", "tree.features=8"], FAR, "tree.max_leaves=120 is never reached"),
        ([], FAR, "the frozen features of the largest leaf take"),
        ([], machines("h100", 64, memory=10.0), "a node needs"),
        (["tree.slots=64", "tree.batch=4096"], machines("h100", 64, network=0.1), "the network adds"),
        ([], machines("h100", 64, storage=0.001), "and storage gives"),
        (["tree.batch=8192"], machines("h100", 64, cores=1), "decoding takes about"),
        (["data.cache_gb=10"], FAR, "do not fit into data.cache_gb=10"),
        ([], FAR, "to list, in each phase"),
        ([], FAR, "kernels takes longer than what 64 rows compute"),
    ],
)
def test_what_will_not_fit_is_told(settings: list[str], on: Machines, words: str, costs: Costs):
    chosen = config.load(None, [*LARGER, "tree.max_leaves=4", *settings])
    phases = schedule(chosen, HUGE.images)
    plan = plan_of(chosen, HUGE, on, assumed(on, True), costs, phases)
    told = list(misfits(chosen, plan, costs, phases))
    assert any(words in sentence for sentence in told), told


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_can_be_planned(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    size = ["--images", "1000000000", "--shape", "3,64,64"] if file.stem in ("scale", "cubicc") else []
    options = ["--json", "--gpu", "h100", "--gpus", "8", f"runs={tmp_path}", "tree.max_leaves=2"]
    monkeypatch.setattr("sys.argv", ["plan", str(file), *options, *size])
    main()
    found = json.loads(capsys.readouterr().out)
    assert found["hours"] > 0
    assert found["cost"] == pytest.approx(found["hours"] * 8 * KINDS["h100"].price)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--images", "5"], "--images and --shape"),
        (["--images", "5000", "--shape", "3,64"], "--shape 3,64 cannot be used"),
        (["--gpus", "0"], "--gpus 0 cannot be used"),
        (["--efficiency", "-1"], "--efficiency -1 cannot be used"),
        (["--measured", "lunch=3"], "--measured lunch=3 cannot be used"),
        (["--measured", "tree=0"], "--measured tree=0 cannot be used"),
        (["--from", "."], "is not a run folder"),
        (["--images", "100", "--shape", "1,8,8"], "tree.batch=128 is more than the 100 training images"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], words: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["plan", *options])
    with pytest.raises(ConfigError, match=re.escape(words)):
        main()


def test_a_step_needs_some_of_a_gpus_memory_beside_its_tensors(costs: Costs):
    """92% of the data sheet's GB hold them, all of a core's."""
    chosen = config.load(None, [*LARGER, "tree.max_leaves=4"])
    phases = schedule(chosen, HUGE.images)
    for gpu, usable in (("h100", 0.92), ("cpu", 1.0)):
        on = machines(gpu)
        plan = plan_of(chosen, HUGE, on, assumed(on, True), costs, phases)
        room = int(usable * on.kind.memory * estimates.GB)
        for total, fits in ((room, True), (room + 10**6, False)):
            plan.memory = [Memory("tree", 0, total, 0, 0)]
            told = [sentence for sentence in misfits(chosen, plan, costs, phases) if "tree: a step takes" in sentence]
            assert bool(told) == (not fits), told


def planning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What the command prints with --json."""
    monkeypatch.setattr("sys.argv", ["plan", "--json", *arguments])
    main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


TINY = ("tree.features=3", "tree.max_leaves=2", "diffusion.width=8", "diffusion.heads=1")


@pytest.mark.parametrize(
    ("options", "workers"),
    [
        (["workers=64", "--gpu", "h100"], 64),
        (["workers=[2,64]", "--gpu", "h100"], 64),
        (["workers=64", "--gpus", "8"], 8),
        (["workers=64", "--gpu", "h100", "--gpus", "8"], 8),
        (["--gpu", "h100"], 2),
    ],
)
def test_what_is_planned_is_the_job_that_would_run(
    options: list[str],
    workers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Whatever this machine has, where the plan is not for its own cores."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert planning(monkeypatch, capsys, f"runs={tmp_path}", *TINY, *options)["machines"]["workers"] == workers


def test_this_machines_cores_must_be_enough_for_a_plan_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("sys.argv", ["plan", f"runs={tmp_path}", "workers=64"])
    with pytest.raises(ConfigError, match="take workers=2, or plan for other machines with --gpus"):
        main()


def test_workers_by_default_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://a-cluster:8265")
    assert launch.default_workers(None) == DEFAULT_WORKERS


def trained(url: str, workers: int | None, seconds: float) -> None:
    """Lets a finished phase say that it trained on 80 images in so many seconds beside 2 for data."""
    folder = Path(url)
    (folder / "metrics").mkdir()
    (folder / "metrics" / "000000010.jsonl").write_text('{"step": 5, "images": 40}\n{"step": 10, "images": 80}\n')
    summary: dict[str, Any] = {"seconds": {"train": seconds + 2.0, "data": 2.0}}
    (folder / "summary.json").write_text(json.dumps(summary if workers is None else summary | {"workers": workers}))


SMALL = ("tree.batch=8", "diffusion.batch=8")


@pytest.mark.parametrize(
    ("told", "on"),
    [
        ({"tree": None, "diffusion": None}, {"tree": 1, "diffusion": 2}),
        ({"tree": 1, "diffusion": 4}, {"tree": 1, "diffusion": 4}),
    ],
    ids=["by slots", "by summaries"],
)
def test_a_run_says_how_fast_workers_are(told: dict[str, int | None], on: dict[str, int], tmp_path: Path):
    """Each stage by its own number of workers: as it was written down, or else those that share its slots."""
    run = finished_run(tmp_path, settings=(*SMALL, "tree.slots=1", "diffusion.slots=2"))
    assert run.config().workers is None
    with pytest.raises(ConfigError, match="has no finished phase to measure by"):
        speeds_of(run)
    trained(run.at("tree", "00-finetune"), told["tree"], 8.0)
    trained(run.at("diffusion"), told["diffusion"], 16.0)
    found = speeds_of(run)
    costs = counted(run.config(), data_of(run.manifest()), schedule(run.config(), 23), bf16=False)
    whole = counting.tree_costs(run.config(), (1, 8, 8), grown(3), 8).whole
    assert set(found) == {"tree", "diffusion"}
    assert found["tree"].rate == pytest.approx(whole.flops * 80 / 8 / on["tree"])
    denoising = costs.denoiser.step.flops + costs.all.visit.flops
    assert found["diffusion"].rate == pytest.approx(denoising * 80 / 16 / on["diffusion"])
    assert found["tree"].source == f"measured in RUN {run.url} on 1 worker"
    assert found["diffusion"].source == f"measured in RUN {run.url} on {on['diffusion']} workers"


class Untroubled(Alone):
    """The one worker, which nobody tells to stop."""

    def told_to_stop(self) -> bool:
        return False


def test_phases_write_down_how_many_workers_trained_them(tmp_path: Path):
    """Which the config does not say: fewer share the slots, or the cluster had no more."""
    short = ("tree.epochs.initial=1", "diffusion.images=8", "diffusion.validations=0")
    run = finished_run(tmp_path, denoiser=False, settings=(*SMALL, *short))
    root, data_url, chosen = run.at("tree", "root-again"), run.record()["data_url"], run.config()
    grow(GrowingPhase("00-root", "root", root, None, None, data_url, chosen), Untroubled())
    diffuse(DiffusionPhase(run.at("diffusion"), run.grown_tree, data_url, chosen, bf16=False), Untroubled())
    for url in (root, run.at("diffusion")):
        assert json.loads(Path(url, "summary.json").read_text())["workers"] == 1


def test_a_run_on_more_workers_than_this_machine_has_cores_says_how_fast_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    run = finished_run(tmp_path, denoiser=False, settings=(*SMALL, "workers=64"))
    trained(run.at("tree", "00-finetune"), None, 8.0)
    found = planning(monkeypatch, capsys, f"runs={tmp_path}", *TINY, "workers=64", "--gpu", "h100", "--from", run.url)
    assert found["machines"]["workers"] == 64
    assert found["hours"] > 0
