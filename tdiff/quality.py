"""How good a run's samples are: distances to real images, precision and recall, specificity. The driver's side of it.

RUNS/evaluation/references/KEY.safetensors   what a network saw in real images

Legend: L leaves, C classes, F features, K images whose features are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from tdiff import launch, storage
from tdiff.config import Config, Evaluation
from tdiff.data.shards import Shard
from tdiff.errors import ConfigError
from tdiff.evaluation.classifier import class_histograms, mean_entropy
from tdiff.evaluation.frechet import Moments, frechet_distance, frechet_error
from tdiff.evaluation.precision import NEIGHBOURS, precision_recall
from tdiff.hardware import one_thread
from tdiff.judging import Say, extractor_facts, extractor_of, shared
from tdiff.runs import Run
from tdiff.seeds import permutation, seed_of
from tdiff.work.judging import Extractor, Member, Seen, nearest_of, see_shard, see_split
from tdiff.work.reading import open_split
from tdiff.work.sampling import SampleJob, read_samples

BLOCK = 500
"""Real images that a task looks at."""

NEAREST_BLOCK = 5000
"""Training images that a task looks through for the nearest."""

MOST_RESAMPLED = 512
"""Features up to which a bootstrap is affordable: its eigendecompositions grow with their cube."""

Numbers = dict[str, Any]


# --- looking -----------------------------------------------------------------------------------------


Task = tuple[Any, ...]
"""A function of `tdiff.work.judging` and its arguments."""


def look(groups: Sequence[Sequence[Task]], workers: int, what: str = "looking at images") -> list[Seen]:
    """What Ray actors see in the tasks of each group, joined in their order: sums do not depend on who was first.

    Memory holds one sum a group and what came too early, not what every task saw.
    """
    folds = [Fold() for _ in groups]
    places = [(fold, k) for fold, group in zip(folds, groups, strict=True) for k in range(len(group))]
    for index, seen in launch.map_on_actors(_call, [task for group in groups for task in group], workers, what=what):
        fold, k = places[index]
        fold.add(k, seen)
    return [fold.seen() for fold in folds]


def _call(function: Callable[..., Seen], *arguments: Any) -> Seen:
    return function(*arguments)


class Fold:
    """Joins what was seen in parts 0, 1, … which come in any order."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, Seen] = {}
        self._parts: list[Seen] = []
        self._moments: Moments | None = None

    def add(self, k: int, part: Seen) -> None:
        self._early[k] = part
        while (upcoming := self._early.pop(self._next, None)) is not None:
            self._next += 1
            self._moments = upcoming.moments if self._moments is None else self._moments + upcoming.moments
            self._parts.append(replace(upcoming, moments=Moments.empty(0)))

    def seen(self) -> Seen:
        """All parts. Raises ValueError if there was none."""
        if self._moments is None:
            raise ValueError("there are no images to judge")
        names = ("features", "prediction", "confidence", "leaf")
        rest = {name: np.concatenate([getattr(part, name) for part in self._parts]) for name in names}
        return Seen(self._moments, **rest)


def _shards(job: SampleJob) -> list[Shard]:
    """The shards of a finished job. Raises ConfigError if they hold fewer images than it was to draw."""
    manifest = storage.read_json(storage.join(job.url, "manifest.json"))
    shards = [Shard(**entry) for entry in manifest["shards"]]
    there, asked = sum(shard.samples for shard in shards), job.num * job.images_per_draw
    if there != asked:
        raise ConfigError(f"{job.url} holds {there} images and not the {asked} that were asked for: delete the folder.")
    return shards


def sample_tasks(extractor: Extractor, job: SampleJob, member: Member, keep: int) -> list[Task]:
    """The tasks of looking at a job's samples, the features of the first `keep` of them kept."""
    tasks: list[Task] = []
    first = 0
    for shard in _shards(job):
        tasks.append((see_shard, extractor, job.url, shard, member, max(0, keep - first)))
        first += shard.samples
    return tasks


def real(run: Run, extractor: Extractor, split: str, count: int | None, workers: int) -> Seen:
    """What an extractor sees in a split's images, or in `count` of them drawn at random.

    It is kept in RUNS/evaluation/references under a key of all that it depends on.
    """
    config, data_url, manifest = run.config(), run.record()["data_url"], run.manifest()
    # In random order: of many images the features of the first are kept, and splits are often sorted by class.
    ids = permutation(manifest.samples(split), "reference", split)[:count]
    keep = config.evaluation.neighbour_images
    what = [extractor.kind, extractor.digest, manifest.digest, split, len(ids), keep, BLOCK, "unsorted"]
    url = shared(run, "references", f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.safetensors")
    if storage.exists(url):
        return _from_arrays({name: tensor.numpy() for name, tensor in storage.read_tensors(url).items()})
    blocks = range(0, len(ids), BLOCK)
    tasks = [(see_split, extractor, config, data_url, split, ids[k : k + BLOCK], max(0, keep - k)) for k in blocks]
    (seen,) = look([tasks], workers)
    storage.write_bytes(url, save_arrays(_arrays(seen)))
    return seen


def _arrays(seen: Seen) -> dict[str, NDArray[Any]]:
    rest = {name: getattr(seen, name) for name in ("features", "prediction", "confidence", "leaf")}
    return seen.moments.arrays() | rest


def _from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Seen:
    rest = {name: arrays[name] for name in ("features", "prediction", "confidence", "leaf")}
    return Seen(Moments.from_arrays(arrays), **rest)


# --- numbers -----------------------------------------------------------------------------------------


def distances(config: Config, extractor: Extractor, seen: Sequence[Seen], reference: Seen, end: str) -> Numbers:
    """Of blocks of images against a reference: means over the blocks of Fréchet distance, precision and recall.

    Names are those of the extractor (fid_gen, classifier_frechet_rec, …), `end` gen or rec. Beside the distance stands
    its standard error: over the blocks where there are several, else by the bootstrap.
    """
    with one_thread():
        return _distances(config.evaluation, extractor, seen, reference, end)


def _distances(section: Evaluation, extractor: Extractor, seen: Sequence[Seen], reference: Seen, end: str) -> Numbers:
    if min(one.moments.n for one in (*seen, reference)) < 2:
        return {}  # one image has no covariance
    name = extractor.distance
    each = [frechet_distance(one.moments, reference.moments) for one in seen]
    found: Numbers = {f"{name}_{end}": float(np.mean(each))}
    first = seen[0]
    if len(each) > 1:
        found[f"{name}_{end}_blocks"] = each
        found[f"{name}_{end}_error"] = float(np.std(each, ddof=1) / np.sqrt(len(each)))
    elif section.resamples > 1 and len(first.features) == first.moments.n and first.features.shape[1] <= MOST_RESAMPLED:
        seed = seed_of("bootstrap", end)
        found[f"{name}_{end}_error"] = frechet_error(first.features, reference.moments, section.resamples, seed)
    pairs = [_as_many(one.features, reference.features) for one in seen]
    if min(len(part) for pair in pairs for part in pair) > NEIGHBOURS:
        both = [precision_recall(*pair) for pair in pairs]
        found[f"{extractor.kind}_precision_{end}"] = float(np.mean([one.precision for one in both]))
        found[f"{extractor.kind}_recall_{end}"] = float(np.mean([one.recall for one in both]))
    return found


def _as_many(generated: NDArray[np.float32], reference: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """As many features on both sides: precision and recall depend on how many there are."""
    count = min(len(generated), len(reference))
    return generated[:count], reference[:count]


def specificity(seen: Sequence[Seen], classes: int, shares: NDArray[np.integer]) -> Numbers:
    """How sure a classifier is of the samples of each leaf, and of how many classes they are.

    seen: of every leaf; shares: [L], how many draws from the prior each holds.
    """
    prediction, leaf = (np.concatenate([getattr(one, name) for one in seen]) for name in ("prediction", "leaf"))
    histograms = class_histograms(prediction, leaf, classes, len(seen))
    try:
        entropy: float | None = mean_entropy(histograms, shares=shares)
    except ValueError:
        entropy = None  # of many leaves none holds enough of the draws
    return {
        "classifier_confidence": float(np.concatenate([one.confidence for one in seen]).mean()),
        "classifier_entropy": entropy,
        "classifier_histograms": histograms.tolist(),
    }


def measure(run: Run, jobs: Mapping[str, SampleJob], workers: int, say: Say = print) -> Numbers:
    """The numbers of a run's drawn samples (name -> job), by model, in the features of all networks the config names.

    Without labels there is no classifier, and so nothing in its features: {} where nothing is left. Raises ConfigError
    if a network's weights cannot be had.
    """
    config = run.config()
    facts: Numbers = {}
    models: dict[str, Numbers] = {}
    for kind in config.evaluation.features:
        extractor = extractor_of(run, kind, workers, say)
        if extractor is None:
            say("the training images have no labels of two classes or more: nothing is judged by a classifier")
            continue
        facts[kind] = extractor_facts(extractor)
        for model, numbers in _judged(run, extractor, jobs, workers).items():
            models[model] = models.get(model, {}) | numbers
    if not models:
        return {}
    split, count = reference_of(run)
    return {
        "reference": {"split": split, "images": count},
        "draws": jobs["prior"].num,
        "blocks": config.samples.blocks,
        "reconstructions": jobs["reconstructions"].num if "reconstructions" in jobs else 0,
        "per_leaf": config.samples.per_leaf,
        **facts,
        **models,
    }


def _judged(run: Run, extractor: Extractor, jobs: Mapping[str, SampleJob], workers: int) -> dict[str, Numbers]:
    """The numbers of every model in the features of one network."""
    config = run.config()
    groups: dict[tuple[str, str], list[list[Task]]] = {}
    keep = config.evaluation.neighbour_images
    for name, job in jobs.items():
        kind = re.sub(r"^treevae-|-\d+$", "", name)
        if kind in ("prior", "reconstructions"):
            what = "gen" if kind == "prior" else "rec"
            groups.setdefault((job.model, what), []).append(sample_tasks(extractor, job, "png", keep))
        elif kind == "leaf" and extractor.kind == "classifier":
            groups.setdefault((job.model, "leaf"), []).append(sample_tasks(extractor, job, "png", 0))
            groups.setdefault(("treevae", "leaf"), []).append(sample_tasks(extractor, job, "treevae.png", 0))
    every = look([tasks for group in groups.values() for tasks in group], workers)
    seen = {key: [every.pop(0) for _ in group] for key, group in groups.items()}

    split, count = reference_of(run)
    reference = real(run, extractor, split, count, workers)
    held_out = real(run, extractor, "test", None, workers) if any(what == "rec" for _, what in seen) else reference
    found: dict[str, Numbers] = {}
    for (model, what), parts in seen.items():
        numbers = found.setdefault(model, {})
        if what == "leaf":
            shares = np.bincount(seen["treediffusion", "gen"][0].leaf, minlength=len(parts))
            numbers |= specificity(parts, extractor_facts(extractor)["classes"], shares)
        else:
            numbers |= distances(config, extractor, parts, held_out if what == "rec" else reference, what)
    if other := _other(run, split, min(reference.moments.n, jobs["prior"].num)):
        seen_other = real(run, extractor, *other, workers)
        found["real"] = {"split": other[0], "images": seen_other.moments.n}
        found["real"] |= distances(config, extractor, [seen_other], reference, "gen")
    return found


def nearest(run: Run, job: SampleJob, workers: int) -> Numbers:
    """How far a job's first samples lie from the training images, beside held-out images: has anything been learnt by
    heart? {} where nothing is asked for.

    samples, held_out: median and least Euclidean distance over pixels in [0, 1]; ids: the nearest training image of
    each sample.
    """
    config, data_url, manifest = run.config(), run.record()["data_url"], run.manifest()
    most = config.evaluation.nearest_images
    if not most:
        return {}
    queries = {"samples": read_samples(job.url, most).images}
    if "test" in manifest.splits:
        ids = permutation(manifest.samples("test"), "nearest")[: len(queries["samples"])]
        queries["held_out"] = open_split(config, data_url, "test").gather(ids)
    every = np.concatenate(list(queries.values()))
    places = np.arange(manifest.samples("train"))
    tasks = [(config, data_url, places[k : k + NEAREST_BLOCK], every) for k in range(0, len(places), NEAREST_BLOCK)]
    best, least = np.zeros(len(every), np.int64), np.full(len(every), np.inf)
    for _, (ids, distance) in sorted(
        launch.map_on_actors(nearest_of, tasks, workers, use_gpu=False, what="nearest images")
    ):
        closer = distance < least
        best[closer], least[closer] = ids[closer], distance[closer]
    ends = np.cumsum([len(images) for images in queries.values()])
    found: Numbers = {"images": len(queries["samples"]), "ids": best[: ends[0]].tolist()}
    for name, distances in zip(queries, np.split(least, ends[:-1]), strict=True):
        found[name] = {"median": float(np.median(distances)), "least": float(distances.min())}
    return found


def reference_of(run: Run, asked: str | None = None) -> tuple[str, int]:
    """The split that samples are held against, and how many of its images: the split asked for, else the run's, or the
    training images where there is no other.
    """
    section, manifest = run.config().evaluation, run.manifest()
    wanted = asked or section.reference
    split = wanted if wanted in manifest.splits else "train"
    there = manifest.samples(split)
    return split, min(there, section.reference_images or there)


def _other(run: Run, split: str, count: int) -> tuple[str, int] | None:
    """Real images to hold against the reference, for scale: those of the other split, at most as many."""
    manifest = run.manifest()
    for other in ("test", "train"):
        if other != split and other in manifest.splits:
            return other, min(count, manifest.samples(other))
    return None


def compare(
    run: Run, extractor: Extractor, job: SampleJob, seen: Seen, workers: int, reference: str | None = None
) -> Numbers:
    """What was seen in one job's samples against real images, as `measure` would do it: reconstructions against the
    held-out images, draws against the reference, a split or else the run's.
    """
    end = "rec" if job.mode.startswith("reconstruct") else "gen"
    split, count = ("test", None) if end == "rec" else reference_of(run, reference)
    there = real(run, extractor, split, count, workers)
    numbers = distances(run.config(), extractor, [seen], there, end)
    return {"images": seen.moments.n, "reference": {"split": split, "images": there.moments.n}, **numbers}
