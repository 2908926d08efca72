"""A whole run: which phases make it, what is done already, what comes next.

    data -> tree/00-root -> splits, refits -> prune -> finetune -> diffusion -> samples -> evaluation, report

Every phase is one folder that is finished when its COMPLETE marker is there, so the same command started again
goes on where the last one stopped. The decisions between the tree's phases are pure functions of what the
phases wrote (`tdiff.tree.growth`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tdiff import judging, launch, results, storage
from tdiff.config import Config
from tdiff.diffusion.condition import CONTROLS
from tdiff.errors import ConfigError, Stopped
from tdiff.hardware import one_thread
from tdiff.launch import Crew, workers_for
from tdiff.mirroring import mirror_of, numbers_in, protocol_of, tracking_uri
from tdiff.opening import opened
from tdiff.runs import CHECKPOINTS, PHASE_NAME, Run, drop_checkpoints, existing, finish_phase, phase_summary
from tdiff.tracking import Ended, Mirror
from tdiff.tree.growth import leaf_to_split, leaves_to_prune
from tdiff.tree.topology import Topology
from tdiff.work import scoring
from tdiff.work.diffusing import PHASE as DIFFUSION
from tdiff.work.diffusing import DiffusionPhase, deepspeed_settings, diffuse
from tdiff.work.growing import GrowingPhase, Kind, grow, load_decisions, load_routing, load_topology, prune
from tdiff.work.labels import write_labels

Say = Callable[[str], None]
STAGES = ("tree", "diffusion", "samples", "report")
NEXT = "next"
"""What `--until` names the phase or stage that comes next."""


# --- what comes next ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class NextPhase:
    """name: NN-root, NN-split-ID, NN-refit, NN-prune or NN-finetune; node: the leaf to split; leaves: to prune."""

    name: str
    kind: Kind | Literal["prune"]
    node: int | None = None
    leaves: tuple[int, ...] = ()


def kind_of(phase: str) -> str:
    """`03-split-4` -> `split`."""
    return phase.split("-")[1]


def next_tree_phase(done: list[str], config: Config, read: Callable[[str], tuple[Topology, Any]]) -> NextPhase | None:
    """What comes after the finished phases `done`; None if the tree is finished.

    read: a finished phase's name -> its topology and its routing of the training images.
    """
    number = f"{len(done):02d}"
    if not done:
        return NextPhase(f"{number}-root", "root")
    last = kind_of(done[-1])
    if last == "finetune":
        return None
    if last == "prune":
        return NextPhase(f"{number}-finetune", "finetune")
    tree = config.tree
    topology, left = read(done[-1])
    leaf = leaf_to_split(topology, left, tree.max_leaves, tree.features - 1, tree.images_per_step)
    if leaf is None:
        return NextPhase(f"{number}-prune", "prune", leaves=tuple(leaves_to_prune(topology, left)))
    splits = sum(kind_of(phase) == "split" for phase in done)
    if last == "split" and splits % tree.refit_every == 0 and tree.epochs.refit > 0:
        return NextPhase(f"{number}-refit", "refit")
    return NextPhase(f"{number}-split-{leaf}", "split", node=leaf)


# --- the run -----------------------------------------------------------------------------------------


@dataclass
class Driver:
    """Carries one run from where it is to where it should stop."""

    config: Config
    run: Run
    data_url: str
    crew: Crew
    mirror: Mirror
    say: Say
    samplers: launch.NodeSamplers = field(default_factory=launch.NodeSamplers)

    def upcoming(self) -> str | None:
        """What comes next: a phase of the tree, a stage, or nothing."""
        phase = next_tree_phase(self.run.tree_phases(), self.config, self._read_phase)
        if phase is not None:
            return phase.name
        if not storage.finished(self.run.at(DIFFUSION)):
            return "diffusion"
        if results.unfinished(results.standard_jobs(self.run)):
            return "samples"
        return None if self._reported() else "report"

    def crew_for(self, stage: str, slots: int) -> Crew:
        """Connects to Ray; the workers of a stage of so many slots. Says so where they are fewer than asked for."""
        launch.connect(self.crew.least)
        if self.crew.least < self.crew.most:
            return self.crew
        workers = workers_for(slots, launch.at_once(self.crew.most))
        if workers != self.crew.most:
            self.say(f"{stage}: {workers} of {self.crew.most} workers, the most that share {slots} slots evenly")
        return Crew(workers, workers)

    def connect(self) -> int:
        """Connects to Ray; how many actors can work at once."""
        launch.connect(self.crew.least)
        return launch.at_once(self.crew.most)

    def fit(self, function: Callable[..., None], phase: Any, name: str, url: str, crew: Crew, slots: int) -> None:
        """Trains a phase on Ray workers, and tells MLflow of it meanwhile."""

        def meanwhile() -> None:
            self.mirror.progress(name, storage.join(url, "metrics"))
            self.mirror.system(self.samplers.take())

        checkpoints = storage.join(url, CHECKPOINTS)
        launch.fit(function, phase, crew, slots, checkpoints, self.config.recovery, self.say, meanwhile)

    def grow_tree(self, until: str | None) -> bool:
        """Runs the tree's phases; whether it came to its end (False: `until` came first)."""
        if self.config.tree.run is not None and not self.run.has_tree:
            self._take_tree(existing(self.config.tree.run))
        done = self.run.tree_phases()
        for name in done:
            self._take_up(self.run.at("tree", name), name)
        crew: Crew | None = None
        while until not in done:
            upcoming = next_tree_phase(done, self.config, self._read_phase)
            if upcoming is None:
                return True
            url = self.run.at("tree", upcoming.name)
            previous = self.run.at("tree", done[-1]) if done else None
            started = time.time()
            if upcoming.kind == "prune":
                assert previous is not None
                prune(previous, url, upcoming.leaves)
            else:
                slots = self.config.tree.slots
                crew = crew or self.crew_for("tree", slots)
                kind, leaf = upcoming.kind, upcoming.node
                phase = GrowingPhase(upcoming.name, kind, url, previous, leaf, self.data_url, self.config)
                self.fit(grow, phase, upcoming.name, url, crew, slots)
            self._finish(url, upcoming.name, started)
            launch.check_stop()
            done.append(upcoming.name)
        return False

    def _take_tree(self, other: Run) -> None:
        """Copies the finished phases of another run's tree."""
        done = self.run.tree_phases()
        for name in other.tree_phases():
            if name not in done:
                storage.copy(other.at("tree", name), self.run.at("tree", name))
                self.say(f"{name:<14} taken from {other.url}")

    def _read_phase(self, name: str) -> tuple[Topology, Any]:
        url = self.run.at("tree", name)
        return load_topology(url), load_routing(url, "train")

    def diffuse(self) -> None:
        """Trains the diffusion model, unless that is done."""
        url = self.run.at(DIFFUSION)
        if storage.finished(url):
            self._take_up(url, DIFFUSION)
            return
        slots = self.config.diffusion.slots
        crew = self.crew_for(DIFFUSION, slots)
        settings = deepspeed_settings(self.config.diffusion)
        bf16, tree_url = self.run.record()["bf16"], self.run.grown_tree
        phase = DiffusionPhase(url, tree_url, self.data_url, self.config, bf16, settings)
        started = time.time()
        if self.config.diffusion.condition in CONTROLS:
            write_labels(url, self.config, self.data_url, tree_url)
        self.fit(diffuse, phase, DIFFUSION, url, crew, slots)
        self._finish(url, DIFFUSION, started)
        launch.check_stop()

    def _finish(self, url: str, name: str, started: float) -> None:
        """Marks a phase as complete, noting what its last start took; says so, and mirrors it."""
        summary = phase_summary(url, started)
        if storage.exists(storage.join(url, "routing.safetensors")):
            with one_thread():
                summary |= scoring.progress(load_topology(url), load_decisions(url))
        finish_phase(url, summary)
        told = [] if name == DIFFUSION else [f"{len(load_topology(url).leaves)} leaves"]
        told += [f"{key[:3].upper()} {summary[key]:.3f}" for key in ("nmi_train", "acc_train") if key in summary]
        wall, overhead = summary["wall_seconds"], summary["overhead_seconds"]
        self.say("  ".join([f"{name:<14} {wall:6.1f} s  (of which start and end {overhead:.1f} s)", *told]))
        self._mirror_phase(url, name)

    def _take_up(self, url: str, name: str) -> None:
        """Does what an earlier start may not have come to after it marked a phase as complete."""
        drop_checkpoints(url)
        self._mirror_phase(url, name)

    def _mirror_phase(self, url: str, name: str) -> None:
        summary = storage.read_json(storage.join(url, "summary.json"))
        totals = {key: value for key, value in summary.items() if isinstance(value, int | float)}
        self.mirror.phase(name, storage.join(url, "metrics"), totals)

    def sample(self) -> None:
        """Draws what the numbers and pictures need, unless that is done."""
        jobs = results.unfinished(results.standard_jobs(self.run))
        if jobs:
            workers = self.connect()
            started = time.time()
            count = results.draw(jobs, workers)
            seconds = time.time() - started
            self.run.update(sampling={"images": count, "seconds": seconds})
            self.say(f"{'samples':<14} {seconds:6.1f} s  {count} images")

    def report(self) -> dict[str, Any]:
        """Numbers, pictures and the report page, unless that is done; returns the numbers."""
        done = self._reported()
        if done is None:
            started = time.time()
            done = results.evaluate(self.run, self.connect(), self.say)
            results.figures(self.run)
            results.report(self.run)
            storage.finish(self.run.at("report"))
            self.say(f"{'report':<14} {time.time() - started:6.1f} s")
        self.mirror.result(dict(numbers_in(done)), results.shown(self.run), protocol_of(done))
        self.mirror.finish(results.tree_files(self.run))
        return done

    def check_judges(self) -> None:
        """Raises ConfigError if weights that the report will need cannot be had, instead of after all the training."""
        if "inception" in self.config.evaluation.features and self._reported() is None:
            judging.inception_extractor(self.run)

    def _reported(self) -> dict[str, Any] | None:
        """The numbers, if they are those of the settings, and the report page is there."""
        done = results.evaluation(self.run)
        settings = self.config.evaluation.model_dump(mode="json")
        asked = done is not None and done.get("settings") == settings
        return done if asked and storage.finished(self.run.at("report")) else None


@dataclass(frozen=True)
class Outcome:
    """What `train` returns: the run, its numbers (None where it stopped earlier), MLflow's address and trouble, and
    what comes next.
    """

    run: Run
    numbers: dict[str, Any] | None
    tracking: str
    warning: str | None
    upcoming: str | None


def train(config: Config, until: str | None = None, fresh: bool = False, say: Say = print) -> Outcome:
    """Carries a run on from where it is, to its end or to the end of `until` (a stage, a tree phase's name, or "next").

    Raises ConfigError or DataError, before any worker starts, for what can be known to be wrong by then.
    """
    if until is not None and until not in (*STAGES, NEXT) and not PHASE_NAME.fullmatch(until):
        raise ConfigError(
            f"--until {until} is no stage or phase: take one of {', '.join(STAGES)}, {NEXT}, or as 03-split-4."
        )
    with opened(config, fresh) as opening:
        run = opening.run
        mirror = mirror_of(run, *tracking_uri(config))
        driver = Driver(config, run, run.record()["data_url"], opening.crew, mirror, say)
        numbers: dict[str, Any] | None = None
        ended: Ended | None = None
        mirror.go_on()
        try:
            if until == NEXT:
                until = driver.upcoming()
            if until in (None, "report"):
                driver.check_judges()
            if driver.grow_tree(until) and until != "tree":
                if until is not None and until not in STAGES:
                    grown = run.tree_phases()[-1]
                    raise ConfigError(f"--until {until} never came: the tree of RUN {run.url} ended with {grown}.")
                driver.diffuse()
                if until != "diffusion":
                    driver.sample()
                    if until != "samples":
                        numbers = driver.report()
        except (Stopped, KeyboardInterrupt):
            ended = "KILLED"
            raise
        except BaseException:
            ended = "FAILED"
            raise
        finally:
            launch.disconnect()
            warning = mirror.close(ended)
        return Outcome(run, numbers, mirror.uri, warning, driver.upcoming())
