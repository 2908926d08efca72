"""The networks that judge a run's samples: where they lie, and how they come to be there. The driver's side of it.

RUNS/evaluation/classifiers/KEY/               classifier.safetensors classifier.json metrics/ summary.json COMPLETE
                inception-DIGEST.safetensors   InceptionV3, without pickle

RUNS is the folder that holds the run. KEY says all that the classifier depends on, so runs on the same data share it.
"""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from tdiff import launch, storage
from tdiff.errors import ConfigError
from tdiff.evaluation import inception
from tdiff.lease import leased
from tdiff.runs import CHECKPOINTS, Run, finish_phase, phase_summary
from tdiff.work.classifying import PHASE, ClassifierPhase, classify, read_classifier_facts
from tdiff.work.judging import Extractor, Kind
from tdiff.work.reading import open_split

Say = Callable[[str], None]


def shared(run: Run, *parts: str) -> str:
    """Where RUNS/evaluation/parts lies, which all runs of a folder share."""
    return storage.join(run.url.rpartition("/")[0], "evaluation", *parts)


def extractor_of(run: Run, kind: Kind, workers: int, say: Say = print) -> Extractor | None:
    """The network of that kind, brought there first; None for a classifier of data without labels.

    Ray must be connected. Raises ConfigError if it cannot be had.
    """
    if kind == "inception":
        return inception_extractor(run)
    url = ensure_classifier(run, workers, say)
    if url is None:
        return None
    content = storage.read_bytes(storage.join(url, "classifier.safetensors"))
    return Extractor("classifier", url, hashlib.sha256(content).hexdigest())


def extractor_facts(extractor: Extractor) -> dict[str, Any]:
    """What a number in its features is reported with."""
    told = {"digest": extractor.digest}
    return told | (read_classifier_facts(extractor.url) if extractor.kind == "classifier" else {})


# --- the classifier ----------------------------------------------------------------------------------


def classifier_url(run: Run) -> str:
    """Folder of the classifier for a run's data and its settings in `evaluation.classifier`."""
    config = run.config()
    parts = [run.record()["data_digest"], config.evaluation.classifier.model_dump(mode="json"), config.data.block]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return shared(run, "classifiers", key)


def ensure_classifier(run: Run, workers: int, say: Say = print) -> str | None:
    """Folder of the finished classifier for a run's data, trained first on at most `workers` Ray workers unless that is
    done; None where the training images have no labels, or not two classes. Ray must be connected.

    Where another process trains it, this one waits. Raises ConfigError if the data is no longer what
    the run was made from, DataError if it is damaged.
    """
    config, manifest, data_url = run.config(), run.manifest(), run.record()["data_url"]
    if manifest.classes is None or len(manifest.classes) < 2:
        return None
    if open_split(config, data_url, "train").take(np.array([0])).labels is None:  # whatever the manifest says
        return None
    url = classifier_url(run)
    if storage.finished(url):
        return url
    only_one = storage.locked if storage.is_local(url) else leased
    with only_one(url, lambda: say(f"{PHASE}: another process trains it, waiting")):
        if not storage.finished(url):
            _train(ClassifierPhase(url, data_url, config), workers, say)
    return url


def _train(phase: ClassifierPhase, workers: int, say: Say) -> None:
    started = time.time()
    slots = phase.config.evaluation.classifier.slots
    crew = launch.Crew(workers, workers)
    launch.fit(classify, phase, crew, slots, storage.join(phase.url, CHECKPOINTS), phase.config.recovery, say)
    summary, facts = phase_summary(phase.url, started), read_classifier_facts(phase.url)
    finish_phase(phase.url, summary)
    launch.check_stop()
    wall, overhead = summary["wall_seconds"], summary["overhead_seconds"]
    told = [f"{PHASE:<14} {wall:6.1f} s  (of which start and end {overhead:.1f} s)"]
    if facts["test_accuracy"] is not None:
        told.append(f"accuracy {facts['test_accuracy']:.3f} on {facts['test_images']} held-out images")
    say("  ".join(told))


# --- InceptionV3 -------------------------------------------------------------------------------------


def inception_extractor(run: Run) -> Extractor:
    """InceptionV3, its weights put where every worker finds them. Raises ConfigError if they cannot be had."""
    named, content = _inception_file(run.config().evaluation.inception)
    digest = hashlib.sha256(content).hexdigest()
    url = shared(run, f"inception-{digest[:16]}.safetensors")
    if not storage.exists(url):
        try:
            weights = inception.read_weights(content)
            inception.Inception(weights)
        except ValueError as error:
            raise ConfigError(f"{named} cannot be used: {error}.") from error
        storage.write_bytes(url, save_tensors({name: tensor.contiguous() for name, tensor in weights.items()}))
    return Extractor("inception", url, digest)


def _inception_file(given: str | None) -> tuple[str, bytes]:
    """What a message calls the file of InceptionV3's weights, and its content. Raises ConfigError."""
    if given is not None:
        named = f"evaluation.inception={given}"
        try:
            return named, storage.read_bytes(given)
        except OSError as error:
            raise ConfigError(f"{named} cannot be read ({error}): name a file of InceptionV3's weights.") from error
    source = inception.weights_source()
    file = Path(torch.hub.get_dir(), "checkpoints", source.rpartition("/")[2])
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(source, str(file), progress=False)
        except (urllib.error.URLError, OSError) as error:
            raise ConfigError(
                f"FID needs InceptionV3's weights, and {source} cannot be downloaded ({error}): set "
                "evaluation.inception=FILE, or take evaluation.features=[classifier]."
            ) from error
    return str(file), file.read_bytes()
