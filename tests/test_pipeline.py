"""Protects the driver's decisions: which phase comes next, whose run folder it is, what stops a run before it starts.

Nothing here starts a worker: next phases are decided on hand-made histories, and every refusal must come before Ray.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from tdiff import config as configs
from tdiff import launch, pipeline, storage
from tdiff.config import Config
from tdiff.data.shards import Manifest, Shard, read_manifest
from tdiff.data.sources import Source, Split
from tdiff.errors import ConfigError, DataError
from tdiff.hardware import computes_in_bf16
from tdiff.mirroring import numbers_in, tracking_uri
from tdiff.opening import _commit, bf16_for, digest_of, only_driver, open_data, opened
from tdiff.packing import pack
from tdiff.pipeline import NextPhase, kind_of, next_tree_phase, train, workers_for
from tdiff.runs import Run
from tdiff.tracking import Mirror
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import deepspeed_settings


def open_run(config: Config, fresh: bool = False) -> Run:
    with opened(config, fresh) as opening:
        return opening.run


TWO = Topology.root_with_two_leaves("00-root")
THREE = TWO.split(1, "01-split-1")  # leaves 3, 4, 2
FOUR = THREE.split(2, "02-split-2")  # leaves 3, 4, 5, 6


def sent(topology: Topology, counts: list[int]) -> np.ndarray:
    """Routing [M, R] that surely sends counts[k] images to leaf index k."""
    rows = []
    for leaf, count in zip(topology.leaves, counts, strict=True):
        left = np.full(len(topology.deciding), 0.5)
        for node, child in itertools.pairwise(topology.path(leaf)):
            if node in topology.deciding:
                left[topology.deciding.index(node)] = topology[child].side == "left"
        rows += [left] * count
    return np.array(rows)


def configured(*settings: str) -> Config:
    return configs.load(None, ["tree.batch=4", "tree.slots=1", "tree.features=7", *settings])


def after(done: list[str], topology: Topology, counts: list[int], *settings: str) -> NextPhase | None:
    """What comes after `done`, whose last phase left this tree and sent so many images to its leaves."""

    def read(name: str) -> tuple[Topology, Any]:
        assert name == done[-1]  # only the last phase's numbers decide
        return topology, sent(topology, counts)

    return next_tree_phase(done, configured(*settings), read)


def history(*settings: str) -> list[str]:
    """All phases of a run in which every split divides the images evenly."""
    config, done, topology = configured(*settings), list[str](), TWO
    while True:
        counts = [60 // len(topology.leaves) + (k < 60 % len(topology.leaves)) for k in range(len(topology.leaves))]
        upcoming = next_tree_phase(done, config, lambda _, t=topology, c=counts: (t, sent(t, c)))
        if upcoming is None:
            return done
        assert upcoming.name == f"{len(done):02d}-{upcoming.name[3:]}"
        assert kind_of(upcoming.name) == upcoming.kind
        assert pipeline.PHASE_NAME.fullmatch(upcoming.name)
        if upcoming.kind == "split":
            assert upcoming.node is not None
            assert upcoming.name.endswith(f"-split-{upcoming.node}")
            topology = topology.split(upcoming.node, upcoming.name)
        done.append(upcoming.name)


# --- what comes next ---------------------------------------------------------------------------------


def test_a_run_from_its_root_to_its_end():
    assert history("tree.max_leaves=3") == ["00-root", "01-split-1", "02-prune", "03-finetune"]
    assert history("tree.max_leaves=2") == ["00-root", "01-prune", "02-finetune"]


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        # after every third split, but not after the last one, which finetuning follows
        (["tree.max_leaves=5"], "root split split split prune finetune"),
        (["tree.max_leaves=6"], "root split split split refit split prune finetune"),
        (["tree.max_leaves=8"], "root split split split refit split split split prune finetune"),
        (["tree.max_leaves=9"], "root split split split refit split split split refit split prune finetune"),
        (["tree.max_leaves=6", "tree.epochs.refit=0"], "root split split split split prune finetune"),
        (["tree.max_leaves=4", "tree.refit_every=1"], "root split refit split prune finetune"),
        (["tree.max_leaves=6", "tree.refit_every=2"], "root split split refit split split prune finetune"),
    ],
)
def test_refits_come_after_every_third_split(settings: list[str], kinds: str):
    assert [kind_of(name) for name in history(*settings)] == kinds.split()


def test_the_leaf_with_most_members_is_split_and_named_by_its_node():
    assert after(["00-root"], TWO, [20, 30]) == NextPhase("01-split-2", "split", node=2)
    assert after(["00-root"], TWO, [30, 20]) == NextPhase("01-split-1", "split", node=1)
    three = after(["00-root", "01-split-1"], THREE, [10, 40, 30])
    assert three == NextPhase("02-split-4", "split", node=4)


def test_growing_stops_at_k_effective_leaves_not_at_k_leaves():
    done = ["00-root", "01-split-1", "02-split-2"]
    assert after(done, FOUR, [250, 250, 250, 250], "tree.max_leaves=4") == NextPhase("03-prune", "prune")
    # one of the four is empty: three are effective, so growing goes on
    more = after(done, FOUR, [500, 0, 250, 250], "tree.max_leaves=4")
    assert more == NextPhase("03-split-3", "split", node=3)


def test_growing_stops_where_no_leaf_can_be_split():
    # none has a batch of members
    done = ["00-root", "01-split-1"]
    assert after(done, THREE, [3, 3, 3]) == NextPhase("02-prune", "prune")
    # those with members are as deep as the features reach
    assert after(done, THREE, [50, 50, 3], "tree.features=3", "tree.max_leaves=4") == NextPhase("02-prune", "prune")
    assert after(done, THREE, [50, 50, 4], "tree.features=3", "tree.max_leaves=4") == NextPhase(
        "02-split-2", "split", node=2
    )
    # and then there is nothing to refit either
    full = [*done, "02-split-2", "03-split-3"]
    assert after(full, THREE, [3, 3, 3], "tree.refit_every=1") == NextPhase("04-prune", "prune")


def test_empty_leaves_are_pruned_smallest_first():
    done = ["00-root", "01-split-1", "02-split-2"]
    pruned = after(done, FOUR, [600, 2, 400, 0], "tree.batch=1024")
    assert pruned == NextPhase("03-prune", "prune", leaves=(6, 4))


def test_the_end_is_the_end_and_asks_nobody():
    def nobody(name: str) -> tuple[Topology, Any]:
        raise AssertionError(f"{name} need not be read")

    assert next_tree_phase([], configured(), nobody) == NextPhase("00-root", "root")
    assert next_tree_phase(["00-root", "01-prune"], configured(), nobody) == NextPhase("02-finetune", "finetune")
    assert next_tree_phase(["00-root", "01-prune", "02-finetune"], configured(), nobody) is None


def test_asking_twice_gives_the_same_answer():
    done = ["00-root", "01-split-1"]
    assert after(done, THREE, [10, 40, 30]) == after(done, THREE, [10, 40, 30])


@pytest.mark.parametrize(
    ("slots", "at_most", "workers"),
    [(1, 8, 1), (2, 1, 1), (2, 2, 2), (2, 3, 2), (8, 3, 2), (8, 7, 4), (8, 8, 8), (6, 4, 3), (7, 6, 1), (12, 11, 6)],
)
def test_workers_are_the_largest_divisor_within_the_bound(slots: int, at_most: int, workers: int):
    assert workers_for(slots, at_most) == workers


# --- opening a run -----------------------------------------------------------------------------------


def here(tmp_path: Path, *settings: str) -> Config:
    """A config with its runs in tmp_path."""
    return configs.load(None, [f"runs={tmp_path / 'runs'}", "workers=1", "precision=fp32", *settings])


def refused(*arguments: Any, **options: Any) -> str:
    """The message with which `train` refuses, which must come before any worker, as one line."""

    def unwanted(*_: Any) -> None:
        raise AssertionError("a worker was about to start")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "connect", unwanted)
        with pytest.raises((ConfigError, DataError)) as caught:
            train(*arguments, say=lambda _: None, **options)
    assert not ray.is_initialized()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_is_made_once_and_then_found(tmp_path: Path):
    config = here(tmp_path)
    run = open_run(config)
    record = run.record()
    assert run.config() == config
    assert record["digest"] == digest_of(config, False, record["data_digest"])
    assert run.url == str(tmp_path / "runs" / f"digits-{record['digest'][:8]}")
    assert record["bf16"] is False
    assert {"tdiff", "torch", "ray", "deepspeed"} <= set(record["versions"])
    assert configs.load(run.at("config.yaml")) == config
    assert open_run(config) == run
    assert run.record() == record


def test_what_results_do_not_depend_on_may_change(tmp_path: Path):
    run = open_run(here(tmp_path, "name=mine"))
    record = run.record()
    again = here(tmp_path, "name=mine", "workers=2", "tracking=http://elsewhere", "diffusion.checkpoint_images=1")
    assert open_run(again).record() == {**record, "config": again.model_dump(mode="json")}
    assert run.config() == configs.load(run.at("config.yaml")) == again  # what was said last counts from now on


def test_another_config_under_the_same_name_is_refused(tmp_path: Path):
    run = open_run(here(tmp_path, "name=mine"))
    before = run.record()
    with pytest.raises(ConfigError) as caught:
        open_run(here(tmp_path, "name=mine", "seed=1", "tree.max_leaves=5"))
    message = str(caught.value)
    assert run.url in message
    assert "seed: 1 here, 0 there" in message
    assert f"tree.max_leaves: 5 here, {Config().tree.max_leaves} there" in message
    assert "name=" in message
    assert "--fresh" in message
    assert run.record() == before
    assert configs.load(run.at("config.yaml")).seed == 0


def test_without_a_name_another_config_is_another_run(tmp_path: Path):
    assert open_run(here(tmp_path)).url != open_run(here(tmp_path, "seed=1")).url


def test_fresh_starts_over(tmp_path: Path):
    run = open_run(here(tmp_path, "name=mine"))
    old = run.record()
    phase = Path(run.at("tree", "00-root"))
    phase.mkdir(parents=True)
    (phase / "COMPLETE").touch()
    assert run.tree_phases() == ["00-root"]
    open_run(here(tmp_path, "name=mine", "seed=1"), fresh=True)
    assert run.tree_phases() == []
    assert run.config().seed == 1
    assert run.record()["id"] != old["id"]
    assert open_run(here(tmp_path, "name=other"), fresh=True).config().name == "other"


def test_fresh_deletes_nothing_but_a_run(tmp_path: Path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is no run's folder"):
        open_run(here(tmp_path, "name=mine"), fresh=True)
    assert (folder / "thesis.tex").exists()


def test_fresh_waits_for_the_driver_that_works_there(tmp_path: Path):
    config = here(tmp_path)
    run = open_run(config)
    record = run.record()
    with only_driver(run):
        assert "is being worked on" in refused(config, fresh=True)
    assert run.record() == record


def test_phases_without_a_record_are_nobodys(tmp_path: Path):
    run = open_run(here(tmp_path))
    Path(run.at("tree", "00-root")).mkdir(parents=True)
    Path(run.at("run.json")).unlink()  # as a deletion that was cut short leaves it
    with pytest.raises(ConfigError, match=r"holds files but no run\.json: start it over with --fresh"):
        open_run(here(tmp_path))
    open_run(here(tmp_path), fresh=True)
    assert not Path(run.at("tree")).exists()


def test_a_refusal_names_what_matters(tmp_path: Path):
    folder = data_at(tmp_path)
    settings = ["tree.batch=4", "diffusion.batch=4", f"data.url={folder}"]
    open_run(here(tmp_path, "name=mine", *settings))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    moved = ["workers=2", "tracking=http://x", *settings[:2], f"data.url={elsewhere}", "tree.checkpoint_images=1"]
    with pytest.raises(ConfigError) as caught:
        open_run(here(tmp_path, "name=mine", "tree.max_leaves=5", *moved))
    assert f"(tree.max_leaves: 5 here, {Config().tree.max_leaves} there)" in str(caught.value)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    message = refused(here(tmp_path))
    assert f"runs={tmp_path / 'runs'}" in message
    assert "cannot be read or written" in message


def test_a_run_folder_says_what_it_lacks(tmp_path: Path):
    run = Run(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no run\.json"):
        run.config()
    with pytest.raises(ConfigError, match="has no finished tree yet"):
        _ = run.grown_tree
    run = open_run(here(tmp_path))
    Path(run.at("run.json")).write_text("{")
    with pytest.raises(DataError, match=r"run\.json is damaged: it is not JSON"):
        run.record()
    Path(run.at("run.json")).write_text("{}")
    with pytest.raises(ConfigError, match=r"run\.json has no entry"):
        open_run(here(tmp_path))


def test_a_phase_counts_when_it_is_complete(tmp_path: Path):
    run = Run(str(tmp_path))
    for name in ("00-root", "01-split-1", "02-prune", "03-finetune"):
        folder = tmp_path / "tree" / name
        folder.mkdir(parents=True)
        (folder / "tree.json").touch()
        if name != "03-finetune":
            (folder / "COMPLETE").touch()
    assert run.tree_phases() == ["00-root", "01-split-1", "02-prune"]
    with pytest.raises(ConfigError, match="no finished tree"):
        _ = run.grown_tree
    (tmp_path / "tree" / "03-finetune" / "COMPLETE").touch()
    assert run.grown_tree == str(tmp_path / "tree" / "03-finetune")


def test_a_hundred_phases_stay_in_order(tmp_path: Path):
    names = [f"{k:02d}-split-{k}" for k in range(103)]
    for name in names:
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name / "COMPLETE").touch()
    assert Run(str(tmp_path)).tree_phases() == names
    assert all(pipeline.PHASE_NAME.fullmatch(name) for name in names)


# --- settings of DeepSpeed -----------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_files_of_deepspeed_settings_are_taken(zero: int):
    file = Path(__file__).parent.parent / "configs" / "deepspeed" / f"zero{zero}.json"
    config = configs.load(None, [f"diffusion.deepspeed={file}", f"diffusion.zero={zero}"])
    assert deepspeed_settings(config.diffusion)["zero_optimization"]["stage"] == zero
    assert deepspeed_settings(Config().diffusion) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {"stge": 1}}', "zero_optimization.stge cannot be set there: take one of stage"),
        ('{"zero_optimization": {"zero_quantized_weights": true}}', "zero_quantized_weights cannot be set there"),
        ('{"communication_data_type": "bf16"}', "communication_data_type cannot be set there"),
        ('{"zero_optimization": {"reduce_bucket_size": "many"}}', "reduce_bucket_size='many' cannot be used"),
        ('{"zero_optimization": {"stage": 2}}', "its ZeRO stage is 2 and diffusion.zero is 1"),
        ('{"zero_optimization": 1}', "it should be a section"),
        ('{"optimizer": {"type": "SGD"}}', "optimizer cannot be set there: take one of zero_optimization"),
        ("[1]", "holds a list"),
        ("{", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_other_deepspeed_settings_are_refused(tmp_path: Path, text: str | None, words: str):
    file = tmp_path / "zero.json"
    if text is not None:
        file.write_text(text)
    message = refused(here(tmp_path, f"diffusion.deepspeed={file}"))
    assert message.startswith(f"diffusion.deepspeed={file}")
    assert words in message


# --- another run's tree ------------------------------------------------------------------------------


@pytest.fixture
def grown(tmp_path: Path) -> Run:
    """A run with a finished tree, whose contents nobody reads here."""
    run = open_run(here(tmp_path, "name=grown"))
    for name in ("00-root", "01-prune", "02-finetune"):
        storage.write_text(run.at("tree", name, "model.safetensors"), name)
        storage.write_text(run.at("tree", name, "metrics", "000000010.jsonl"), "{}")
        storage.finish(run.at("tree", name))
    return run


def test_a_tree_of_another_run_is_copied_once(grown: Run, tmp_path: Path):
    config = here(tmp_path, "name=mine", f"tree.run={grown.url}", "diffusion.condition=none")
    run, said = open_run(config), list[str]()
    driver = pipeline.Driver(config, run, "", 1, Mirror("", "", "", "", None), said.append)
    storage.write_text(run.at("tree", "01-prune", "model.safetensors"), "cut short")  # without its marker
    driver._take_tree(grown)
    assert run.tree_phases() == grown.tree_phases()
    for name in run.tree_phases():
        assert storage.versions(run.at("tree", name)).keys() == storage.versions(grown.at("tree", name)).keys()
        assert storage.read_text(run.at("tree", name, "model.safetensors")) == name
    assert len(said) == 3
    driver._take_tree(grown)
    assert len(said) == 3


def test_what_a_kill_left_of_a_finished_phase_s_checkpoints_goes(grown: Run, monkeypatch: pytest.MonkeyPatch):
    """Killed between the marker and the removal, as `finish_phase` does them."""
    left = grown.at("tree", "00-root", "checkpoints", "000000010-00000000", "weights-00000.safetensors")
    storage.write_text(left, "moments")
    monkeypatch.setattr(pipeline.Driver, "_mirror_phase", lambda driver, url, name: None)
    driver = pipeline.Driver(grown.config(), grown, "", launch.Crew(1, 1), Mirror("", "", "", "", None), print)
    assert driver.grow_tree(None)
    assert set(storage.listing(grown.at("tree", "00-root"))) == {"COMPLETE", "metrics", "model.safetensors"}


def test_a_tree_that_is_copied_needs_the_other_run_no_more(grown: Run, tmp_path: Path):
    config = here(tmp_path, "name=mine", f"tree.run={grown.url}")
    run = open_run(config)
    for name in grown.tree_phases():
        storage.copy(grown.at("tree", name), run.at("tree", name))
    record = run.record()
    shutil.copytree(grown.url, tmp_path / "runs" / "other-tree")
    weights = f"{tmp_path}/runs/other-tree/tree/02-finetune/model.safetensors"
    storage.write_text(weights, "another tree")
    with pytest.raises(ConfigError, match=r"tree\.run: .*other-tree here, .*grown there"):
        open_run(here(tmp_path, "name=mine", f"tree.run={tmp_path}/runs/other-tree"))
    shutil.rmtree(grown.url)
    assert open_run(config).record() == record
    with pytest.raises(ConfigError, match="is not a run folder"):
        open_run(config, fresh=True)  # which takes the tree anew
    with pytest.raises(ConfigError, match="is not a run folder"):
        open_run(here(tmp_path, "name=other", f"tree.run={grown.url}"))


def test_runs_of_one_tree_are_told_apart_by_it(grown: Run, tmp_path: Path):
    settings = [f"tree.run={grown.url}", "diffusion.condition=none"]
    taken = open_run(here(tmp_path, *settings))
    assert taken.url != open_run(here(tmp_path, "diffusion.condition=none")).url
    assert open_run(here(tmp_path, *settings)).url == taken.url
    named = here(tmp_path, "name=mine", *settings)
    assert open_run(named).record() == open_run(named).record()
    storage.write_text(grown.at("tree", "02-finetune", "model.safetensors"), "grown anew")
    with pytest.raises(ConfigError, match=r"tree\.run: .*grown here, .*grown there"):
        open_run(named)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tree.max_leaves=4"], "has another tree \\(tree.max_leaves: 4 here, 10 there\\)"),
        (["tree.run=nowhere"], "nowhere is not a run folder"),
        (["data.shard_samples=7", "runs={tmp}/others"], "was grown on other data"),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(grown: Run, tmp_path: Path, settings: list[str], message: str):
    settings = [setting.format(tmp=tmp_path) for setting in settings]
    with pytest.raises(ConfigError, match=message):
        open_run(here(tmp_path, f"tree.run={grown.url}", *settings))


def test_a_tree_that_is_not_finished_is_refused(grown: Run, tmp_path: Path):
    Path(grown.at("tree", "02-finetune", "COMPLETE")).unlink()
    assert "has no finished tree yet" in refused(here(tmp_path, f"tree.run={grown.url}"))


# --- entries -----------------------------------------------------------------------------------------


def test_entries_are_added_to_the_record(tmp_path: Path):
    run = open_run(here(tmp_path))
    before = run.record()
    run.update(data_digest="abc", sampling={"images": 3})
    assert run.record() == {**before, "data_digest": "abc", "sampling": {"images": 3}}


# --- data --------------------------------------------------------------------------------------------


def test_data_is_packed_once(tmp_path: Path):
    config = here(tmp_path)
    url, manifest = open_data(config)
    assert url == str(tmp_path / "runs" / "data" / "digits")
    assert {split: manifest.samples(split) for split in manifest.splits} == {"train": 1500, "test": 297}
    written = (Path(url) / "manifest.json").stat().st_mtime_ns
    assert open_data(config) == (url, manifest)
    assert (Path(url) / "manifest.json").stat().st_mtime_ns == written


def data_at(tmp_path: Path, count: int = 40, splits: tuple[str, ...] = ("train", "test"), channels: int = 1) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (count, channels, 8, 8), dtype=np.uint8)
    folder = tmp_path / f"data-{count}-{channels}"
    pack(Source("noise", {split: Split(images, None) for split in ("train", *splits)}, None), str(folder), 100)
    return folder


def test_data_that_cannot_be_grown_on_is_refused_before_any_worker(tmp_path: Path):
    few = data_at(tmp_path)
    message = refused(here(tmp_path, f"data.url={few}", "tree.batch=128"))
    assert "tree.batch=128 is more than the 40 training images: take at most 40" in message
    message = refused(here(tmp_path, f"data.url={few}", "tree.batch=40", "diffusion.batch=128"))
    assert "diffusion.batch=128 is more than the 40 training images" in message
    small = ["tree.batch=4", "diffusion.batch=4"]
    message = refused(here(tmp_path, f"data.url={data_at(tmp_path, channels=3)}", *small))
    assert "tree.likelihood=bernoulli" in message
    assert "gaussian" in message
    message = refused(here(tmp_path, f"data.url={few}", "tree.size=9", *small))
    assert "tree.size=9 is more than the images' 8 pixels" in message


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("diffusion.attention=[3]", "diffusion.attention names resolution 3"),
        ("diffusion.width=33", "diffusion.width is 33"),
        ("diffusion.heads=5", "diffusion.heads is 5"),
        ("diffusion.multipliers=[0,1]", "diffusion.multipliers is (0, 1)"),
    ],
)
def test_a_diffusion_model_that_cannot_be_built_is_refused_before_the_tree_grows(
    tmp_path: Path, setting: str, part: str
):
    assert part in refused(here(tmp_path, setting))


def test_a_data_set_without_training_images_is_refused(tmp_path: Path):
    folder = data_at(tmp_path)
    manifest = read_manifest(str(folder))
    only = Manifest(manifest.name, manifest.shape, None, {"test": manifest.splits["test"]})
    (folder / "manifest.json").write_text(only.to_json())
    assert "has no split named train" in refused(here(tmp_path, f"data.url={folder}"))


def test_images_that_are_not_square_are_refused(tmp_path: Path):
    folder = tmp_path / "wide"
    folder.mkdir()
    manifest = Manifest("wide", (1, 8, 9), None, {"train": (Shard("train/shard-000000.tar", 500, 1, "0"),)})
    (folder / "manifest.json").write_text(manifest.to_json())
    assert "are 8x9" in refused(here(tmp_path, f"data.url={folder}"))


def test_a_damaged_manifest_is_refused(tmp_path: Path):
    folder = data_at(tmp_path)
    (folder / "manifest.json").write_text("{}")
    message = refused(here(tmp_path, f"data.url={folder}"))
    assert f"{folder}/manifest.json is damaged" in message


def test_a_shard_that_is_missing_or_cut_is_refused_before_any_worker(tmp_path: Path):
    folder = data_at(tmp_path, 200)
    shard = sorted((folder / "train").glob("*.tar"))[-1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    message = refused(here(tmp_path, f"data.url={folder}"))
    assert f"train/{shard.name} is damaged" in message
    shard.unlink()
    message = refused(here(tmp_path, f"data.url={folder}"))
    assert f"train/{shard.name} is missing" in message


def test_a_data_set_s_name_leads_nowhere_else(tmp_path: Path):
    folder = data_at(tmp_path, 200)
    manifest = read_manifest(str(folder))
    (folder / "manifest.json").write_text(replace(manifest, name="a/../../b c").to_json())
    with opened(here(tmp_path, f"data.url={folder}")) as opening:
        assert Path(opening.run.url).parent == tmp_path / "runs"
        assert opening.run.name.startswith("b-c-")


def test_data_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    url = tmp_path / "file" / "data"
    assert f"data.url={url} cannot be read or written" in refused(here(tmp_path, f"data.url={url}"))


def test_changed_data_is_refused(tmp_path: Path):
    settings = ["tree.batch=4", "diffusion.batch=4", f"data.url={data_at(tmp_path, 40)}"]
    run = open_run(here(tmp_path, "name=mine", *settings))
    other = data_at(tmp_path, 44)
    message = refused(here(tmp_path, "name=mine", *settings[:-1], f"data.url={other}"))
    assert "belongs to another config (data: " in message
    assert read_manifest(str(other)).digest[:12] in message
    assert run.record()["data_digest"][:12] in message
    assert "name=" in message


# --- what stops `train` before it starts -------------------------------------------------------------


@pytest.mark.parametrize("until", ["foo", "", "root", "split-3", "03-split", "3-split-4", "00-root "])
def test_an_unknown_end_is_refused(tmp_path: Path, until: str):
    message = refused(here(tmp_path), until)
    assert f"--until {until} is no stage or phase" in message
    assert "tree, diffusion, samples, report" in message
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_cpus_are_refused(tmp_path: Path):
    cpus = len(os.sched_getaffinity(0))
    message = refused(here(tmp_path, f"workers={cpus + 1}"))
    assert f"workers={cpus + 1} is more than this machine's {cpus} CPUs: take workers={cpus}." == message
    assert not (tmp_path / "runs").exists()
    assert launch.default_workers(cpus) == cpus
    assert launch.default_workers(None) == min(2, cpus)


def test_mlflow_needs_a_place(tmp_path: Path):
    message = refused(here(tmp_path, "runs=s3://nowhere/runs"))
    assert "runs=s3://nowhere/runs" in message
    assert "tracking=URI" in message
    assert tracking_uri(here(tmp_path, "tracking=http://mlflow:5000")) == ("http://mlflow:5000", None)
    uri, artifacts = tracking_uri(here(tmp_path))
    assert uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert artifacts == f"file://{tmp_path}/runs/mlartifacts"


def test_weights_that_the_report_needs_are_looked_for_before_anything_trains(tmp_path: Path):
    weights = tmp_path / "weights.pth"
    settings = ("evaluation.features=[inception]", f"evaluation.inception={weights}")
    assert f"evaluation.inception={weights} cannot be read" in refused(here(tmp_path, *settings))
    weights.write_bytes(b"no weights")
    assert f"evaluation.inception={weights} cannot be used" in refused(here(tmp_path, *settings))


def test_a_start_that_was_killed_before_it_wrote_its_record_is_no_run_yet(tmp_path: Path):
    run = Run(str(tmp_path / "runs" / "mine"))
    Path(run.url).mkdir(parents=True)
    Path(run.at(f"config.yaml.{'0a' * 16}.partial")).write_text("seed: 0")
    assert open_run(here(tmp_path, "name=mine")).record()["id"].startswith("mine-")


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=test", "-c", "user.email=test"]
    done = subprocess.run(["git", "-C", folder, *names, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the repository that has the code, not of one around it; else what the image or the job says."""
    monkeypatch.setenv("TDIFF_COMMIT", "")
    package = tmp_path / ".venv" / "tdiff"
    package.mkdir(parents=True)
    for name in ("__init__.py", "opening.py"):
        (package / name).touch()
    monkeypatch.setattr("tdiff.opening.__file__", str(package / "opening.py"))
    assert _commit() is None, "no repository, and empty is nothing"
    git(tmp_path, "init", "--quiet")
    (tmp_path / "file").touch()
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message=theirs")
    assert _commit() is None, "somebody else's repository"
    monkeypatch.setenv("TDIFF_COMMIT", "0123abc+")
    assert _commit() == "0123abc+"
    git(tmp_path, "add", "--force", ".venv")
    git(tmp_path, "commit", "--quiet", "--message=ours")
    assert _commit() == git(tmp_path, "rev-parse", "HEAD")
    (package / "opening.py").write_text("changed")
    assert _commit() == git(tmp_path, "rev-parse", "HEAD") + "+"


def test_a_second_driver_is_refused(tmp_path: Path):
    config = here(tmp_path)
    run = open_run(config)
    with only_driver(run):
        message = refused(config)
    assert f"RUN {run.url} is being worked on by another process" in message
    with only_driver(run):
        pass  # the lock is gone with its holder


def test_the_lock_of_a_killed_driver_is_free(tmp_path: Path):
    run = open_run(here(tmp_path))
    code = (
        "import sys, time; from tdiff.opening import only_driver; from tdiff.runs import Run\n"
        "with only_driver(Run(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, run.url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="is being worked on"), only_driver(run):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    with only_driver(run):
        assert time.monotonic() - started < 5


def test_the_numbers_of_a_result_get_dotted_names():
    nested = json.loads('{"run": "x", "leaves": 3, "clustering": {"tree_test": {"acc": 0.5, "why": "no number"}}}')
    assert dict(numbers_in(nested)) == {"leaves": 3.0, "clustering.tree_test.acc": 0.5}


@pytest.mark.parametrize(
    ("precision", "fast", "bf16"),
    [("fp32", True, False), ("fp32", False, False), ("auto", True, True), ("auto", False, False), ("bf16", True, True)],
)
def test_what_a_precision_means(precision: str, fast: bool, bf16: bool):
    assert bf16_for(precision, fast) is bf16


def test_bf16_on_workers_without_it_is_refused():
    with pytest.raises(ConfigError, match=r"^precision=bf16 needs a GPU or CPU that computes in bf16.*: take auto\.$"):
        bf16_for("bf16", False)


@pytest.mark.parametrize("has_it", [True, False])
def test_a_gpu_that_emulates_bf16_does_not_compute_in_it(monkeypatch: pytest.MonkeyPatch, has_it: bool):
    """Before Ampere torch emulates bf16, and says that it is supported unless asked more closely."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_it)
    assert computes_in_bf16(torch.device("cuda")) is has_it


def test_a_cluster_s_workers_are_asked_for_their_precision():
    """A real cluster with what Ray takes for a GPU: the question goes to a worker that has it; that there is one is no
    answer. A worker knows by ray.get_gpu_ids() that it is none of the driver.
    """
    code = """
import os, ray
from tdiff import launch, opening
from tdiff.errors import ConfigError
ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False)
opening.computes_in_bf16 = lambda: len(ray.get_gpu_ids()) == 1
answers = [opening.resolve_precision("auto", 1)]
os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
answers += [opening.resolve_precision("auto", 1), opening.resolve_precision("fp32", 1)]
opening.computes_in_bf16 = lambda: not ray.get_gpu_ids()
answers += [opening.resolve_precision("auto", 1)]
try:
    opening.resolve_precision("bf16", 1)
except ConfigError as error:
    answers += [str(error).partition(" ")[0]]
print(answers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[False, True, False, False, 'precision=bf16']"


def test_ray_may_be_imported_first():
    """Ray keeps the mode of authentication that it finds when it is imported."""
    code = "import ray; from tdiff import launch; launch.connect(1); print(ray.cluster_resources()['CPU'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
