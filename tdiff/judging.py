"""The classifier that judges a run's samples: where it lies, and how it comes to be there. The driver's side of it.

RUNS/evaluation/classifiers/KEY/   classifier.safetensors classifier.json metrics/ summary.json COMPLETE

RUNS is the folder that holds the run. KEY says all that the classifier depends on, so runs on the same data share it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable

import numpy as np

from tdiff import launch, storage
from tdiff.runs import Run, finish_phase, phase_summary
from tdiff.work.classifying import PHASE, ClassifierPhase, classify, read_classifier_facts
from tdiff.work.reading import open_split


def classifier_url(run: Run) -> str:
    """Folder of the classifier for a run's data and its settings in `evaluation.classifier`."""
    config = run.config()
    parts = [run.record()["data_digest"], config.evaluation.classifier.model_dump(mode="json"), config.data.block]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    runs = run.url.rstrip("/").rpartition("/")[0]
    return storage.join(runs, "evaluation", "classifiers", key)


def ensure_classifier(run: Run, workers: int, say: Callable[[str], None] = print) -> str | None:
    """Folder of the finished classifier for a run's data, trained first on at most `workers` Ray workers unless that is
    done; None where the training images have no labels, or not two classes. Ray must be connected.

    Where another process on this machine trains it, this one waits. Raises ConfigError if the data is no longer what
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
    # In object storage two at once train the same and write the same.
    with storage.locked(url, lambda: say(f"{PHASE}: another process trains it, waiting")):
        if not storage.finished(url):
            _train(ClassifierPhase(url, data_url, config), workers, say)
    return url


def _train(phase: ClassifierPhase, workers: int, say: Callable[[str], None]) -> None:
    started = time.time()
    count = launch.workers_for(phase.config.evaluation.classifier.slots, workers)
    launch.fit(classify, phase, count, phase.url, say)
    summary, facts = phase_summary(phase.url, started), read_classifier_facts(phase.url)
    finish_phase(phase.url, summary)
    wall, overhead = summary["wall_seconds"], summary["overhead_seconds"]
    told = [f"{PHASE:<14} {wall:6.1f} s  (of which start and end {overhead:.1f} s)"]
    if facts["test_accuracy"] is not None:
        told.append(f"accuracy {facts['test_accuracy']:.3f} on {facts['test_images']} held-out images")
    say("  ".join(told))
