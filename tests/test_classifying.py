"""Protects the classifier that judges samples: it is good enough to judge, its accuracy is that of the weights it
leaves, runs on the same data share it, and data without labels has none.

That it depends neither on the workers nor on kills is `test_engine.py`'s, with the other phases.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_set

from tdiff import judging, launch, storage
from tdiff.config import Config, validated
from tdiff.data.shards import read_manifest
from tdiff.data.sources import Source, Split, digits
from tdiff.errors import ConfigError, DataError
from tdiff.evaluation.classifier import ClassifierSpec
from tdiff.judging import classifier_url, ensure_classifier
from tdiff.packing import pack
from tdiff.runs import Run
from tdiff.seeds import seed_of
from tdiff.tracking import read_metrics
from tdiff.tree.layers import SlotBatchNorm
from tdiff.work.classifying import ClassifierPhase, classify, load_classifier, read_classifier_facts
from tdiff.work.reading import as_images


class Alone:
    """One worker of one."""

    rank, world = 0, 1

    def told_to_stop(self) -> bool:
        return False

    def expects(self, seconds: float) -> None: ...


def config_of(data: dict[str, Any] | None = None, **classifier: Any) -> Config:
    return validated({"data": data or {}, "evaluation": {"classifier": classifier}})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits, packed."""
    url = str(tmp_path_factory.mktemp("data"))
    pack(digits(), url, 500)
    return url


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the demo's classifier."""
    url = str(tmp_path_factory.mktemp("classifier"))
    classify(ClassifierPhase(url, data, Config()), Alone())  # type: ignore[arg-type]
    return url


# --- the phase ---------------------------------------------------------------------------------------


def test_the_demos_classifier_tells_digits_apart(trained: str) -> None:
    facts = read_classifier_facts(trained)
    assert facts.pop("test_accuracy") > 0.95
    assert facts == {
        "network": "small",
        "channels": 1,
        "image_size": 8,
        "classes": 10,
        "test_images": 297,
        "train_images": 1500,
    }
    lines = read_metrics(storage.join(trained, "metrics"))
    assert lines[-1]["step"] == 300
    assert lines[-1]["accuracy"] > 0.95 > lines[0]["accuracy"]
    assert lines[0]["learning_rate"] == pytest.approx(3e-3, rel=0.01)
    assert lines[-1]["learning_rate"] < 1e-6
    summary = storage.read_json(storage.join(trained, "summary.json"))
    assert summary["first_step_at"] < summary["last_step_at"]


def test_the_classifier_that_is_loaded_is_the_one_whose_accuracy_is_told(trained: str) -> None:
    model, test = load_classifier(trained), digits().splits["test"]
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    logits = model(as_images(test.images))  # type: ignore[attr-defined]
    assert model.features(as_images(test.images[:3])).shape == (3, 64)  # type: ignore[attr-defined]
    accuracy = float((logits.argmax(1).numpy() == test.labels).mean())
    assert accuracy == read_classifier_facts(trained)["test_accuracy"]


def test_running_statistics_are_those_of_the_images(trained: str) -> None:
    """The first norm's: mean and variance of what its conv makes of the training images."""
    model, train = load_classifier(trained), digits().splits["train"]
    conv, norm = model.body[0][0], model.body[0][1]  # type: ignore[index]
    assert isinstance(norm, SlotBatchNorm)
    y = conv(2 * as_images(train.images) - 1)  # type: ignore[attr-defined]
    torch.testing.assert_close(norm.running_mean, y.mean((0, 2, 3)), rtol=0.1, atol=0.1)
    torch.testing.assert_close(norm.running_var, y.var((0, 2, 3)), rtol=0.2, atol=0.05)


@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_a_resnet50_trains(channels: int, size: int, tmp_path: Path) -> None:
    made = make_set(tmp_path / "data", [9, 7], shape=(channels, size, size))
    url = str(tmp_path / "classifier")
    config = config_of(network="resnet50", images=16, batch=8, learning_rate=1e-3)
    classify(ClassifierPhase(url, made.url, config), Alone())  # type: ignore[arg-type]
    assert [line["step"] for line in read_metrics(storage.join(url, "metrics"))] == [2]
    facts = read_classifier_facts(url)
    assert (facts["network"], facts["test_accuracy"], facts["test_images"]) == ("resnet50", None, 0)
    found = load_classifier(url).state_dict()
    torch.manual_seed(seed_of("init", 0, "classifier"))
    before = ClassifierSpec("resnet50", channels, size, 3).build().state_dict()
    assert found.keys() == before.keys()
    assert all(not torch.equal(found[n], before[n]) for n in found if n.endswith(("weight", "running_mean")))


def test_fewer_images_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    made = make_set(tmp_path / "data", [9, 8], shape=(1, 8, 8))
    url = str(tmp_path / "classifier")
    classify(ClassifierPhase(url, made.url, config_of(images=80)), Alone())  # type: ignore[arg-type]
    assert read_metrics(storage.join(url, "metrics"))[-1]["images"] == 5 * 16


def test_images_without_labels_stop_it(tmp_path: Path) -> None:
    made = make_set(tmp_path / "data", [9, 8], shape=(1, 8, 8), labelled=False)
    with pytest.raises(DataError, match="some images of train have no label"):
        classify(ClassifierPhase(str(tmp_path / "c"), made.url, config_of(images=80)), Alone())  # type: ignore[arg-type]


def test_what_is_no_classifier_is_refused(trained: str, tmp_path: Path) -> None:
    (tmp_path / "classifier.json").write_text('{"network": "small"}')
    with pytest.raises(DataError, match=r"not a classifier\.json: 'channels'"):
        load_classifier(str(tmp_path))
    (tmp_path / "classifier.json").write_text(json.dumps(read_classifier_facts(trained)))
    with pytest.raises(DataError, match=r"classifier\.safetensors is missing"):
        load_classifier(str(tmp_path))


# --- of a run ----------------------------------------------------------------------------------------


def run_of(folder: Path, name: str, data_url: str, config: Config | None = None) -> Run:
    """A run folder as the driver's side of the classifier reads it."""
    run = Run(str(folder / name))
    record = {
        "id": name,
        "digest": "",
        "bf16": False,
        "data_url": data_url,
        "data_digest": read_manifest(data_url).digest,
        "config": (config or Config()).model_dump(mode="json"),
    }
    storage.write_text(run.at("run.json"), json.dumps(record))
    return run


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Training without Ray; the folders of the trainings."""
    urls: list[str] = []

    def fit(function: Callable[..., None], phase: ClassifierPhase, *further: Any) -> None:
        url = phase.url
        urls.append(url)
        assert not storage.finished(url)
        function(phase, Alone())

    monkeypatch.setattr(launch, "fit", fit)
    return urls


def test_runs_on_the_same_data_share_a_classifier(data: str, tmp_path: Path, fits: list[str]) -> None:
    said: list[str] = []
    config = config_of(images=1280)
    one, other = run_of(tmp_path, "one", data, config), run_of(tmp_path, "other", data, config)
    url = ensure_classifier(one, 1, said.append)
    assert url == classifier_url(one) == ensure_classifier(other, 2, said.append)
    assert fits == [url]
    assert Path(url).parent == tmp_path / "evaluation" / "classifiers"
    (line,) = said
    assert line.startswith("classifier ")
    assert line.endswith("on 297 held-out images")
    assert f"accuracy {read_classifier_facts(url)['test_accuracy']:.3f}" in line
    assert {"classifier.safetensors", "classifier.json", "summary.json", "metrics", "COMPLETE"} == set(
        storage.listing(url)
    )
    summary = storage.read_json(storage.join(url, "summary.json"))
    assert 0 < summary["overhead_seconds"] < summary["wall_seconds"]


@pytest.mark.parametrize(
    "changed",
    [
        config_of(images=640),
        config_of(seed=1),
        config_of(network="resnet50"),
        config_of(batch=64),
        config_of({"block": 100}),
    ],
)
def test_what_a_classifier_depends_on_gives_it_another_folder(data: str, tmp_path: Path, changed: Config) -> None:
    assert classifier_url(run_of(tmp_path, "a", data)) != classifier_url(run_of(tmp_path, "b", data, changed))


def test_what_it_does_not_depend_on_does_not(data: str, tmp_path: Path) -> None:
    config = validated({"seed": 5, "tree": {"max_leaves": 4}, "workers": 1, "data": {"cache_gb": 0}})
    assert classifier_url(run_of(tmp_path, "a", data)) == classifier_url(run_of(tmp_path, "b", data, config))


def unlabelled(folder: Path) -> str:
    return make_set(folder / "unlabelled", [9, 8], shape=(1, 8, 8), labelled=False).url  # its manifest names classes


def without_classes(folder: Path) -> str:
    splits = {name: Split(split.images, None) for name, split in digits().splits.items()}  # type: ignore[attr-defined]
    pack(Source("digits", splits, None), str(folder / "without"), 500)
    return str(folder / "without")


def of_one_class(folder: Path) -> str:
    images = digits().splits["train"].images[:20]  # type: ignore[attr-defined]
    pack(Source("digits", {"train": Split(images, np.zeros(20, np.int64))}, ("0",)), str(folder / "one"), 10)
    return str(folder / "one")


@pytest.mark.parametrize("make", [unlabelled, without_classes, of_one_class])
def test_data_without_two_classes_has_no_classifier(make: Callable[[Path], str], tmp_path: Path, fits: list[str]):
    assert ensure_classifier(run_of(tmp_path, "run", make(tmp_path)), 1) is None
    assert fits == []
    assert not (tmp_path / "evaluation").exists()


def test_data_that_changed_is_refused(tmp_path: Path, fits: list[str]) -> None:
    run = run_of(tmp_path, "run", make_set(tmp_path / "data", [9], shape=(1, 8, 8)).url)
    make_set(tmp_path / "data", [9], shape=(1, 8, 8), seed=1)
    with pytest.raises(ConfigError, match="was made from other data"):
        ensure_classifier(run, 1)
    assert fits == []


def test_who_comes_second_waits_for_who_trains(data: str, tmp_path: Path, fits: list[str], monkeypatch) -> None:
    """Two at once: one trains, the other takes what it made."""
    run = run_of(tmp_path, "run", data, config_of(images=256))
    waits, train = threading.Event(), judging._train
    said: list[str] = []

    def slow(*arguments: Any) -> None:
        second.start()
        assert waits.wait(30)
        train(*arguments)

    def say(text: str) -> None:
        said.append(text)
        waits.set()

    found: list[str | None] = []
    second = threading.Thread(target=lambda: found.append(ensure_classifier(run, 1, say)))
    monkeypatch.setattr(judging, "_train", slow)
    found.append(ensure_classifier(run, 1, lambda text: None))
    second.join(30)
    assert found == [classifier_url(run)] * 2
    assert said == ["classifier: another process trains it, waiting"]
    assert fits == [classifier_url(run)]


@pytest.fixture
def ray() -> Iterator[None]:
    launch.connect(2)
    yield
    launch.disconnect()


def test_on_ray_workers(data: str, tmp_path: Path, ray: None) -> None:
    run = run_of(tmp_path, "run", data, config_of(images=6400))
    url = ensure_classifier(run, 2)
    assert url is not None
    assert storage.finished(url)
    assert read_classifier_facts(url)["test_accuracy"] > 0.8
    assert read_metrics(storage.join(url, "metrics"))[-1]["step"] == 50
    assert "checkpoints" not in storage.listing(url)
