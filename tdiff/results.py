"""What a finished run yields: samples, numbers, pictures, a report. The driver's side of it.

RUN/samples/NAME/    job.json  shard-000000.tar …  manifest.json  grid.png  COMPLETE
RUN/evaluation.json  RUN/likelihood.safetensors  RUN/figures/*.png  RUN/report/index.html
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import save as save_arrays

from tdiff import config as configs
from tdiff import judging, launch, quality, storage
from tdiff.data.shards import Manifest, Shard, read_manifest
from tdiff.diffusion.condition import CLUSTERS
from tdiff.errors import ConfigError
from tdiff.evaluation.published import method
from tdiff.figures.contents import Contents
from tdiff.figures.page import page
from tdiff.figures.plots import grid, save
from tdiff.hardware import one_thread
from tdiff.judging import Say
from tdiff.quality import Fold
from tdiff.runs import Run
from tdiff.seeds import seed_of
from tdiff.tracking import read_metrics
from tdiff.tree.topology import Topology
from tdiff.work import drawing, scoring, showing
from tdiff.work.drawing import Pictured, pictured
from tdiff.work.growing import load_decisions, load_routing, load_topology
from tdiff.work.jobs import Settings, sample_job
from tdiff.work.judging import DISTANCES, Extractor, Kind, draw_and_see
from tdiff.work.likelihoods import LikelihoodJob, joined, likelihood_block
from tdiff.work.likelihoods import summary as likelihood_summary
from tdiff.work.reading import open_split
from tdiff.work.sampling import SampleJob, Samples, draw_shard, evaluations, read_samples

Progress = Callable[[int, int], None]


STANDARD = re.compile(r"(treevae-)?(prior(-\d+)?|reconstructions)|root-draws|leaf-\d+")
"""Names in RUN/samples that a run itself uses."""


def standard_jobs(run: Run) -> dict[str, SampleJob]:
    """Name in RUN/samples -> what a run draws for its numbers and pictures.

    The TreeVAE's own images come with every sample, of the same leaf; those that stand for the TreeVAE alone are drawn
    apart, of the most probable leaf. A diffusion model that is told k-means clusters draws nothing leaf by leaf.
    """
    wanted, seed = run.config().samples, run.config().seed
    splits = read_manifest(run.record()["data_url"])
    held_out = min(wanted.reconstructions, splits.samples("test") if "test" in splits.splits else 0)
    jobs = {}
    for model, prefix in (("treediffusion", ""), ("treevae", "treevae-")):
        for block in range(wanted.blocks):
            name = f"{prefix}prior" + (f"-{block}" if block else "")
            own_seed = seed_of("prior", seed, block) if block else seed
            jobs[name] = sample_job(run, name, model=model, num=wanted.draws, seed=own_seed)
        if held_out:
            name = f"{prefix}reconstructions"
            jobs[name] = sample_job(run, name, model=model, mode="reconstruct", num=held_out)
    if run.config().diffusion.condition in CLUSTERS:
        return jobs
    jobs["root-draws"] = sample_job(run, "root-draws", mode="sample-all-leaves", num=wanted.draws_all_leaves)
    for leaf in range(jobs["prior"].leaves):
        name = f"leaf-{leaf:02d}"
        jobs[name] = sample_job(run, name, num=wanted.per_leaf, leaf=leaf, seed=seed + 1 + leaf)
    return jobs


def _settings(job: SampleJob) -> Settings:
    """What a job's images depend on, besides the run itself."""
    kept: Settings = json.loads(json.dumps(asdict(job)))  # as they come back from job.json
    return {key: value for key, value in kept.items() if not key.endswith("url") and key != "max_bad_samples"}


def unfinished(jobs: dict[str, SampleJob]) -> dict[str, SampleJob]:
    """The jobs that are not drawn yet. Raises ConfigError if another job's images lie in the folder of one."""
    missing = {}
    for name, job in jobs.items():
        file, ours = storage.join(job.url, "job.json"), _settings(job)
        if storage.exists(file) and (theirs := storage.read_json(file)) != ours:
            other = ", ".join(f"{key}={theirs.get(key)}" for key in ours if theirs.get(key) != ours[key])
            raise ConfigError(f"{job.url} holds samples of another job ({other}): choose another --out.")
        if not storage.finished(job.url):
            missing[name] = job
    return missing


@dataclass
class Looking:
    """An extractor that looks at samples as they are drawn: what it saw, by name of the job."""

    extractor: Extractor
    keep: int
    """How many features to keep."""
    folds: dict[str, Fold] = field(default_factory=dict)


def draw(
    jobs: dict[str, SampleJob], workers: int, progress: Progress | None = None, looking: Looking | None = None
) -> int:
    """Draws the missing shards of all jobs on Ray actors and completes their folders; returns how many images."""
    for job in jobs.values():
        storage.write_text(storage.join(job.url, "job.json"), json.dumps(_settings(job), indent=1) + "\n")
    tasks = [(name, shard) for name, job in jobs.items() for shard in range(job.shards)]
    shards: dict[str, dict[int, Shard]] = {name: {} for name in jobs}
    calls: list[tuple[Any, ...]] = [(jobs[name], shard) for name, shard in tasks]
    function: Callable[..., Any] = draw_shard
    what = "samples" if progress is None else ""
    if looking is not None:
        function = draw_and_see
        calls = [
            (job, shard, looking.extractor, max(0, looking.keep - shard * job.draws_per_shard * job.images_per_draw))
            for job, shard in calls
        ]
    for finished, (index, result) in enumerate(launch.map_on_actors(function, calls, workers, what=what), start=1):
        name, shard = tasks[index]
        entry = result
        if looking is not None:
            entry, seen = result
            looking.folds.setdefault(name, Fold()).add(shard, seen)
        shards[name][shard] = entry
        if progress is not None:
            progress(finished, len(tasks))
        if len(shards[name]) == jobs[name].shards:
            _complete(jobs[name], [shards[name][k] for k in range(jobs[name].shards)])
    return sum(entry.samples for of_job in shards.values() for entry in of_job.values())


def judge(run: Run, kind: Kind, workers: int) -> Extractor:
    """The network whose features samples are compared in. Raises ConfigError if it cannot be had."""
    extractor = judging.extractor_of(run, kind, workers)
    if extractor is None:
        raise ConfigError(f"RUN {run.url} has no labelled images to train a classifier on: take --fid inception.")
    return extractor


def quality_file(found: Settings) -> str:
    """Name in a job's folder of what `draw_and_compare` found: one for each network and split."""
    return f"quality-{found['extractor']['kind']}-{found['reference']['split']}.json"


def draw_and_compare(
    run: Run,
    name: str,
    job: SampleJob,
    extractor: Extractor,
    workers: int,
    progress: Progress | None = None,
    reference: str | None = None,
) -> Settings:
    """Draws a job, unless that is done, and compares its images with real ones as `evaluate` does.

    reference: the split of real images that draws are held against; None: the run's.

    The same actors that draw look at what they drew. Writes `quality_file` into the job's folder and returns it.
    """
    keep = run.config().evaluation.neighbour_images
    if unfinished({name: job}):
        looking = Looking(extractor, keep)
        draw({name: job}, workers, progress, looking)
        seen = looking.folds[name].seen()
    else:
        (seen,) = quality.look([quality.sample_tasks(extractor, job, "png", keep)], workers)
    facts = {"kind": extractor.kind, **judging.extractor_facts(extractor)}
    found = {"extractor": facts, **quality.compare(run, extractor, job, seen, workers, reference)}
    storage.write_text(storage.join(job.url, quality_file(found)), json.dumps(found, indent=1) + "\n")
    return found


def _complete(job: SampleJob, shards: list[Shard]) -> None:
    """Writes a drawn job's manifest.json and grid.png, and marks its folder complete."""
    manifest = {
        "job": _settings(job),
        "samples": sum(shard.samples for shard in shards),
        "network_evaluations": evaluations(job),
        "shards": [asdict(shard) for shard in shards],
    }
    storage.write_text(storage.join(job.url, "manifest.json"), json.dumps(manifest, indent=1) + "\n")
    across = job.images_per_draw if job.images_per_draw > 1 else 10
    out = io.BytesIO()
    grid(read_samples(job.url, most=10 * across).images / 255, across).save(out, "png")
    storage.write_bytes(storage.join(job.url, "grid.png"), out.getvalue())
    storage.finish(job.url)


# --- numbers and pictures ----------------------------------------------------------------------------


def evaluate(run: Run, workers: int, say: Say = print) -> Settings:
    """Computes and writes evaluation.json, part of it on so many Ray actors; returns it.

    Its entry `samples` is empty where the run has no samples yet. Raises ConfigError if there is no finished tree.
    """
    topology = load_topology(run.grown_tree)
    jobs = standard_jobs(run) if storage.finished(run.at("diffusion")) else {}
    if missing := unfinished(jobs):
        say(
            f"{len(missing)} of the run's {len(jobs)} sets of samples are not drawn, so none is judged: "
            "python -m tdiff.train goes on"
        )
        jobs = {}
    if jobs and "inception" in run.config().evaluation.features:
        judging.inception_extractor(run)  # what is wrong with its weights is known before the long work
    config, record, splits = run.config(), run.record(), run.manifest().splits
    gather = {split: open_split(config, record["data_url"], split).gather for split in splits}
    bounds = likelihood(run, workers)
    with one_thread():
        clusters = scoring.clustering(topology, load_decisions(run.grown_tree), gather, config.seed)
    result = {
        "run": run.name,
        "data": {"url": record["data_url"], "digest": record["data_digest"]},
        "condition": config.diffusion.condition,
        "settings": config.evaluation.model_dump(mode="json"),
        "leaves": len(topology.leaves),
        "clustering": clusters,
        "likelihood": bounds,
        "samples": quality.measure(run, jobs, workers, say) if jobs else {},
        "nearest": quality.nearest(run, jobs["prior"], workers) if jobs else {},
        "seconds": seconds(run),
    }
    storage.write_text(run.at("evaluation.json"), json.dumps(result, indent=1) + "\n")
    return result


def likelihood(run: Run, workers: int) -> Settings:
    """The TreeVAE's ELBO and log-likelihood on held-out images (training images where there are no others), computed
    on Ray actors. Every image's own numbers go to RUN/likelihood.safetensors.
    """
    config, record = run.config(), run.record()
    manifest = run.manifest()
    split = "test" if "test" in manifest.splits else "train"
    job = LikelihoodJob(run.grown_tree, record["data_url"], split, config)
    blocks = job.blocks()
    found = dict(
        launch.map_on_actors(likelihood_block, [(job, *block) for block in blocks], workers, what="likelihood")
    )
    arrays = joined(blocks, [found[k] for k in range(len(blocks))])
    storage.write_bytes(run.at("likelihood.safetensors"), save_arrays(arrays))
    return likelihood_summary(job, arrays, math.prod(manifest.shape), config.tree.likelihood == "gaussian")


def settle(run: Run, given: Settings) -> None:
    """Changes settings of a run's section `evaluation`, which its results do not depend on. Raises ConfigError."""
    config = run.config().model_dump(mode="json")
    config["evaluation"] |= given
    run.settle(configs.validated(config))


def evaluation(run: Run) -> Settings | None:
    """evaluation.json, if it is there."""
    url = run.at("evaluation.json")
    return storage.read_json(url) if storage.exists(url) else None


def _model(run: Run) -> str:
    """What the run's diffusion model is called."""
    return method(run.config().diffusion.condition)


def seconds(run: Run) -> dict[str, float]:
    """Wall-clock seconds of every phase, as its Ray job took them."""
    out = {}
    phases = [(phase, run.at("tree", phase)) for phase in run.tree_phases()]
    if storage.finished(run.at("diffusion")):
        phases.append(("diffusion", run.at("diffusion")))
    for name, url in phases:
        summary = storage.read_json(storage.join(url, "summary.json"))
        out[name] = round(float(summary["wall_seconds"]), 1)
    if "sampling" in (record := run.record()):
        out["samples"] = round(float(record["sampling"]["seconds"]), 1)
    return out


def figures(run: Run) -> None:
    """Draws the pictures of a run, as far as it has come, into RUN/figures as PNG.

    Raises ConfigError if there is no finished tree.
    """
    topology, left = load_topology(run.grown_tree), load_routing(run.grown_tree, "train")
    shown, model = _pictured(run, topology, left), _model(run)
    metrics = {name: read_metrics(run.at("tree", name, "metrics")) for name in run.tree_phases()}
    drawn: dict[str, Figure] = {
        "tree.png": drawing.tree(topology, left, shown),
        "losses-tree.png": drawing.growing_losses(metrics),
    }
    if storage.finished(run.at("diffusion")):
        drawn["losses-diffusion.png"] = drawing.diffusion_losses(read_metrics(run.at("diffusion", "metrics")))
        jobs = standard_jobs(run)
        if not unfinished(jobs):
            samples = _shown_samples(jobs)
            of_leaves = [samples[name] for name in samples if name.startswith("leaf-")]
            if of_leaves:
                predicted, names = _predicted(evaluation(run), len(topology.leaves)), run.manifest().classes or ()
                drawn["leaves.png"] = drawing.leaves(topology, left, of_leaves, predicted, names, model)
                drawn["root-draw.png"] = drawing.root_draw(topology, samples["root-draws"], 0, model)
            drawn["samples.png"] = drawing.side_by_side(shown.images, samples["prior"], model)
    for name, figure in drawn.items():
        storage.write_bytes(run.at("figures", name), save(figure))


def pictures(run: Run) -> list[str]:
    """Names of the pictures that are in RUN/figures, in the order in which they are looked at."""
    there = storage.listing(run.at("figures"))
    return [name for name in drawing.FIGURES if name in there]


def shown(run: Run) -> dict[str, bytes]:
    """The numbers, the pictures and the report of a run, as far as they are there, by their path in it."""
    names = ["evaluation.json", *(f"figures/{name}" for name in pictures(run)), "report/index.html"]
    return {name: storage.read_bytes(run.at(name)) for name in names if storage.exists(run.at(name))}


def tree_files(run: Run) -> dict[str, bytes]:
    """The finished tree, whole: tree.json and model.safetensors."""
    return {name: storage.read_bytes(storage.join(run.grown_tree, name)) for name in ("tree.json", "model.safetensors")}


def report(run: Run) -> str:
    """Writes the run's one-file HTML report, as far as the run has come; returns where.

    Raises ConfigError if there is no finished tree.
    """
    url = run.at("report", "index.html")
    storage.write_text(url, page(contents(run)))
    return url


def contents(run: Run) -> Contents:
    """What the run's report shows. Raises ConfigError if there is no finished tree."""
    numbers, topology = evaluation(run), load_topology(run.grown_tree)
    manifest = run.manifest()
    decisions = load_decisions(run.grown_tree)["train"]
    shown = _pictured(run, topology, decisions.left)
    class_names = manifest.classes or ()
    samples = _drawn(run)
    of_leaves = [one for name, one in samples.items() if name.startswith("leaf-")]
    classes = max(len(class_names), 0 if decisions.labels is None else int(decisions.labels.max()) + 1)
    tree_metrics = {name: read_metrics(run.at("tree", name, "metrics")) for name in run.tree_phases()}
    diffused = storage.finished(run.at("diffusion"))
    return Contents(
        name=run.name,
        topology=topology,
        images=len(decisions.left),
        facts=_facts(run, manifest, topology),
        nodes=showing.nodes(
            topology,
            decisions,
            shown,
            classes,
            of_leaves if len(of_leaves) == len(topology.leaves) else None,
            _predicted(numbers, len(topology.leaves)),
            _elbo(run, len(topology.leaves)),
        ),
        config=run.config().to_yaml(),
        origin=_origin(run),
        class_names=class_names,
        draws=showing.root_draws(samples["root-draws"]) if "root-draws" in samples else (),
        samples=showing.side_by_side(shown.images, samples["prior"], _model(run)) if "prior" in samples else (),
        nearest=_nearest_pictures(run, numbers, samples),
        model=_model(run),
        elbo_of="held-out" if "test" in manifest.splits else "training",
        tables=[_seconds_table(seconds(run))] if numbers is None else table(numbers),
        charts=showing.charts(tree_metrics, read_metrics(run.at("diffusion", "metrics")) if diffused else []),
        missing=_missing(diffused, bool(samples), numbers is not None),
    )


def first_samples(run: Run) -> Samples | None:
    """The first of the run's draws from the prior, if they are there."""
    if not storage.finished(run.at("diffusion")):
        return None
    job = standard_jobs(run)["prior"]
    return read_samples(job.url, drawing.SIDE_BY_SIDE) if storage.finished(job.url) else None


def _drawn(run: Run) -> dict[str, Samples]:
    """The standard samples that are drawn, by name."""
    if not storage.finished(run.at("diffusion")):
        return {}
    jobs = standard_jobs(run)
    missing = unfinished(jobs)
    return _shown_samples({name: job for name, job in jobs.items() if name not in missing})


def _shown_samples(jobs: dict[str, SampleJob]) -> dict[str, Samples]:
    """Of drawn jobs those that pictures are made of, their first images only."""
    wanted = {name: job for name, job in jobs.items() if name in ("prior", "root-draws") or name.startswith("leaf-")}
    return {
        name: read_samples(job.url, None if name == "root-draws" else drawing.SIDE_BY_SIDE)
        for name, job in wanted.items()
    }


def _pictured(run: Run, topology: Topology, left: NDArray[np.float32]) -> Pictured:
    run.manifest()  # the data is still what the run was made from
    return pictured(topology, left, open_split(run.config(), run.record()["data_url"], "train").gather)


def _nearest_pictures(run: Run, numbers: Settings | None, samples: dict[str, Samples]) -> list[tuple[str, Any]]:
    """The first samples, and the training image nearest to each."""
    ids = (numbers or {}).get("nearest", {}).get("ids", [])[: drawing.SIDE_BY_SIDE]
    if not ids or "prior" not in samples:
        return []
    train = open_split(run.config(), run.record()["data_url"], "train")
    return [(_model(run), samples["prior"].images[: len(ids)]), ("Nearest", train.gather(np.array(ids)))]


def _facts(run: Run, manifest: Manifest, topology: Topology) -> list[tuple[str, str]]:
    """What the run is of, and what it made."""
    config = run.config()
    channels, height, width = manifest.shape
    inside = {"train": "training", "test": "held-out"}
    facts = [
        ("Data", manifest.name),
        ("Images", ", ".join(f"{manifest.samples(s):,} {inside.get(s, s)}" for s in manifest.splits)),
        ("Size", f"{width} × {height}, {'grey' if channels == 1 else 'colour'}"),
        ("Tree", f"{len(topology.leaves)} leaves, depth {topology.depth}"),
    ]
    if storage.finished(run.at("diffusion")):
        drawn = config.samples
        eta = f" with eta {drawn.eta:g}" if drawn.eta else ""
        facts += [
            ("Diffusion condition", config.diffusion.condition),
            ("Sampler", f"{drawn.sampler.upper()}{eta}, {drawn.steps} steps, {drawn.grid} grid"),
        ]
    return facts


def _origin(run: Run) -> list[tuple[str, str]]:
    """What made the run."""
    record = run.record()
    versions, commit = record.get("versions", {}), record.get("commit")
    origin = [
        ("Seed", str(run.config().seed)),
        ("Data", record["data_url"]),
        ("Data digest", record["data_digest"][:12]),
    ]
    origin += [("Commit", str(commit)[:12])] if commit else []
    return [*origin, ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def _missing(diffused: bool, drawn: bool, evaluated: bool) -> list[str]:
    """What a run lacks for a whole report, a sentence each."""
    found = []
    if not diffused:
        found.append("This run has no diffusion model yet, so nothing is drawn by one: python -m tdiff.train goes on.")
    elif not drawn:
        found.append("This run has no samples yet: python -m tdiff.train goes on.")
    if not evaluated:
        found.append("This run is not evaluated yet: python -m tdiff.evaluate gives its numbers.")
    return found


def _predicted(numbers: Settings | None, leaves: int) -> NDArray[np.int64] | None:
    """The classes [L, C] that a classifier sees in the samples of every leaf, if evaluation.json has them."""
    found = ((numbers or {}).get("samples", {}).get("treediffusion", {})).get("classifier_histograms")
    return np.array(found, np.int64) if found and len(found) == leaves else None


def _elbo(run: Run, leaves: int) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """ELBO and most probable leaf of every image of likelihood.safetensors, if it is there and of this tree."""
    url = run.at("likelihood.safetensors")
    if not storage.exists(url):
        return None
    found = {name: tensor.numpy() for name, tensor in storage.read_tensors(url).items()}
    if found["log_reach"].shape[1] != leaves:
        return None
    return found["elbo"], found["log_reach"].argmax(1)


def _likelihood_table(bounds: Settings) -> tuple[str, list[tuple[str, ...]]]:
    rows: list[tuple[str, ...]] = [("likelihood", "images", "nats", "± standard error", "bits per dimension")]
    for name, title in (("elbo", "ELBO"), ("log_likelihood", "log-likelihood")):
        if bounds[name] is not None:
            error, bits = bounds[f"{name}_standard_error"], bounds.get(f"{name}_bits_per_dimension")
            shown = "" if error is None else f"{error:.2f}", "" if bits is None else f"{bits:.3f}"
            rows.append((title, f"{bounds[f'{name}_images']}", f"{bounds[name]:.2f}", *shown))
    samples = bounds["log_likelihood_samples"]
    return f"TreeVAE, {bounds['split']} images, {samples} importance samples for the log-likelihood", rows


def table(numbers: Settings) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The numbers of evaluation.json as titled tables; the first row of each is its header."""
    clusters = numbers["clustering"]
    fitted = clusters.get("ward_test", {}).get("fitted_to")
    names = {
        "tree_test": "TreeVAE, held-out images",
        "kmeans_test": "k-means on pixels, held-out images",
        "ward_test": f"Ward on pixels, held-out images (fitted to {fitted} images, them too)",
        "tree_train": "TreeVAE, training images",
    }
    header = ("clusters", "ACC", "NMI", "ARI", "leaf purity", "dendrogram purity")
    keys = ("acc", "nmi", "ari", "leaf_purity", "dendrogram_purity")
    rows = [
        (title, *(f"{clusters[name][key]:.3f}" if key in clusters[name] else "" for key in keys))
        for name, title in names.items()
        if name in clusters
    ]
    tables: list[tuple[str, list[tuple[str, ...]]]] = [(f"{numbers['leaves']} leaves", [header, *rows])]
    if bounds := numbers.get("likelihood"):
        tables.append(_likelihood_table(bounds))
    model = method(numbers.get("condition", "path"))
    tables += _sample_tables(numbers["samples"], model)
    if near := numbers.get("nearest"):
        tables.append(_nearest_table(near, model))
    tables.append(_seconds_table(numbers["seconds"]))
    return tables


def _sample_tables(found: Settings, model: str) -> list[tuple[str, list[tuple[str, ...]]]]:
    """How good samples are, a table for every network that judged them. model: what drew them is called."""
    if not found:
        return []
    real = found.get("real")
    models = {"treediffusion": model, "treevae": method("treevae")}
    if real is not None:
        of = "held-out" if real["split"] == "test" else "training"
        models["real"] = f"{real['images']:,} real {of} images, for scale"
    reference = found["reference"]
    tables = []
    for kind, name in DISTANCES.items():
        if kind not in found:
            continue
        columns = [(f"{name}_gen", "drawn"), (f"{kind}_precision_gen", "precision"), (f"{kind}_recall_gen", "recall")]
        columns += [(f"{name}_rec", "reconstructed")]
        if kind == "classifier":
            accuracy = found[kind]["test_accuracy"]
            right = "" if accuracy is None else f", right about {accuracy:.1%} of the held-out images"
            judge = f"a classifier trained on the data ({found[kind]['network']}{right}); this is not FID"
            columns += [("classifier_confidence", "confidence"), ("classifier_entropy", "class entropy per leaf")]
        else:
            judge = f"InceptionV3 (weights {found[kind]['digest'][:8]})"
        title = (
            f"{'FID' if kind == 'inception' else 'Fréchet distance'} of {found['draws']:,} draws to "
            f"{reference['images']:,} {reference['split']} images"
            + (
                f", of {found['reconstructions']:,} reconstructions to the test images"
                if found["reconstructions"]
                else ""
            )
            + f", in the features of {judge}"
        )
        rows = [
            (shown, *(_with_error(found[model], key) for key, _ in columns))
            for model, shown in models.items()
            if model in found
        ]
        tables.append((title, [("samples", *(title for _, title in columns)), *rows]))
    return tables


def _nearest_table(near: Settings, model: str) -> tuple[str, list[tuple[str, ...]]]:
    kinds = {"samples": model, "held_out": "real held-out images, for scale"}
    rows = [
        (shown, *(f"{near[kind][key]:.3f}" for key in ("median", "least")))
        for kind, shown in kinds.items()
        if kind in near
    ]
    title = f"distance of {near['images']} images to their nearest training image, over pixels from 0 to 1"
    return title, [("images", "median", "least"), *rows]


def _with_error(numbers: Settings, key: str) -> str:
    """A number and its standard error, if there are any."""
    if numbers.get(key) is None:
        return ""
    error = numbers.get(f"{key}_error")
    return f"{numbers[key]:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _seconds_table(taken: dict[str, float]) -> tuple[str, list[tuple[str, ...]]]:
    times = [(name, f"{value:.1f}") for name, value in taken.items()]
    total = ("all", f"{sum(taken.values()):.1f}")
    return "seconds per phase", [("phase", "seconds"), *times, total]
