"""Training the classifier that judges samples, as every worker of its Ray job runs it.

Reads the labelled shards; writes `classifier.safetensors` and `classifier.json`: its shape, and how often it is right
about held-out images. It depends on the data and on `evaluation.classifier` alone, so runs on the same data share it.

Legend: B batch, I image channels, H image size, C classes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from tdiff import engine, storage
from tdiff.config import Config
from tdiff.data.order import Order
from tdiff.data.shards import Manifest
from tdiff.data.stream import Batches, Reader
from tdiff.engine import Batch, Task, Worker
from tdiff.errors import DataError
from tdiff.evaluation.classifier import ClassifierSpec, Network, flip, shift
from tdiff.hardware import device
from tdiff.runs import CHECKPOINTS
from tdiff.seeds import seed_of
from tdiff.tree.model import evaluating, norms
from tdiff.work.reading import as_images, open_split

PHASE = "classifier"

TEST_BLOCK = 128
"""Images per forward pass where accuracy is measured: fixed, so that the same weights give the same numbers."""

CHECKPOINT_IMAGES = 100_000
"""Images between resume checkpoints."""


@dataclass(frozen=True)
class ClassifierPhase:
    """What a worker needs to know. url: the phase's folder. Of the config it goes by `data` and
    `evaluation.classifier`.
    """

    url: str
    data_url: str
    config: Config


def classifier_spec(config: Config, manifest: Manifest) -> ClassifierSpec:
    """The classifier's shape for labelled data."""
    assert manifest.classes is not None
    channels, image_size, _ = manifest.shape
    return ClassifierSpec(config.evaluation.classifier.network, channels, image_size, len(manifest.classes))


class ClassifierObjective(nn.Module):
    """Cross entropy of images that are moved by up to a pixel each time, and mirrored where `flips` says so."""

    def __init__(self, network: Network, flips: bool):
        super().__init__()
        self.network = network
        self.flips = flips

    def forward(self, batch: Batch, step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = shift(batch["images"], rng), batch["labels"]
        logits = self.network(flip(images, rng) if self.flips else images)  # [B, C]
        return F.cross_entropy(logits, labels), {"accuracy": (logits.argmax(1) == labels).float().mean()}


def classify(phase: ClassifierPhase, worker: Worker) -> None:
    """Trains the classifier and writes its folder. Raises DataError if an image for training has no label."""
    config, section = phase.config, phase.config.evaluation.classifier
    train = open_split(config, phase.data_url, "train")
    spec = classifier_spec(config, train.manifest)
    torch.manual_seed(seed_of("init", section.seed, PHASE))
    network = spec.build().to(device())
    objective = ClassifierObjective(network, flips=spec.network == "resnet50" and spec.channels == 3)
    at_once = min(section.batch, len(train) // section.slots * section.slots)
    order = Order(train.counts(), at_once, section.slots, section.seed, PHASE, config.data.block)
    steps = max(1, section.images // order.batch)
    batches = Batches(train, order, steps)

    def batch(step: int, slot: int) -> Batch:
        found = batches.take(step, slot)
        if found.labels is None:
            raise DataError(f"{phase.data_url}: manifest.json lists classes, but some images of train have no label")
        return {"images": as_images(found.images), "labels": torch.from_numpy(found.labels)}

    outcome = engine.train(
        Task(
            phase=PHASE,
            objective=objective,
            batch=batch,
            steps=steps,
            batch_size=order.batch,
            slots=order.slots,
            seed=section.seed,
            learning_rate=lambda step: section.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2,
            checkpoints_url=storage.join(phase.url, CHECKPOINTS),
            checkpoint_images=CHECKPOINT_IMAGES,
            recovery=config.recovery,
            rolls_back=config.on_nonfinite == "rollback",
            norms=list(norms(objective)),
            metrics_url=storage.join(phase.url, "metrics"),
        ),
        worker,
    )
    right = judged = 0
    if "test" in train.manifest.splits:
        patience = config.recovery.first_step_seconds
        right, judged = right_of(network, open_split(config, phase.data_url, "test"), worker, patience)
    if worker.rank == 0:
        facts = {
            **json.loads(spec.to_json()),
            "test_accuracy": right / judged if judged else None,
            "test_images": judged,
            "train_images": len(train),
        }
        summary = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "seconds": outcome.seconds,
            "first_step_at": outcome.first_step_at,
            "last_step_at": outcome.last_step_at,
        }
        tensors = save_tensors(dict(network.state_dict()))
        storage.write_bytes(storage.join(phase.url, "classifier.safetensors"), tensors)
        storage.write_text(storage.join(phase.url, "classifier.json"), json.dumps(facts, indent=1) + "\n")
        storage.write_text(storage.join(phase.url, "summary.json"), json.dumps(summary, indent=1) + "\n")


def right_of(network: Network, split: Reader, worker: Worker, patience: float) -> tuple[int, int]:
    """How many labelled images of a split the classifier is right about, and how many there are: in fixed blocks, each
    worker a stretch of them. Called by all workers.

    patience: seconds after which a worker without a further block hangs.
    """
    blocks = -(-len(split) // TEST_BLOCK)
    first, last = (min(blocks * k // worker.world * TEST_BLOCK, len(split)) for k in (worker.rank, worker.rank + 1))
    counts = torch.zeros(2, dtype=torch.int64, device=device())
    with evaluating(network):
        for _, found in split.blocks(first, last, TEST_BLOCK):
            worker.expects(patience)
            if found.labels is not None:
                labels = torch.from_numpy(found.labels).to(counts.device)
                predicted = network(as_images(found.images).to(counts.device)).argmax(1)
                counts += torch.stack([(predicted == labels).sum(), labels.new_tensor(len(labels))])
    if worker.world > 1:
        dist.all_reduce(counts)
    right, judged = counts.tolist()
    return right, judged


def load_classifier(url: str) -> Network:
    """The classifier of a finished phase's folder, frozen, in evaluation mode. Raises DataError if it is damaged."""
    spec = storage.read_as(storage.join(url, "classifier.json"), ClassifierSpec.from_json)
    network = storage.read_module(storage.join(url, "classifier.safetensors"), spec.build)
    return network.eval().requires_grad_(False)


def read_classifier_facts(url: str) -> dict[str, Any]:
    """What classifier.json says: the entries of the spec, and

    test_accuracy: share of the labelled held-out images that it takes for what they are, None where there are none;
    test_images: how many those are; train_images: how many images it was trained on, each many times.
    """
    return storage.read_json(storage.join(url, "classifier.json"))
