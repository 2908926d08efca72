"""Protects the numbers of samples: the same whoever looks and however work is shared, FID as torch-fidelity's,
references that are looked at once and never mistaken for others, and nothing called FID that is not.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from finished import finished_run
from inception_weights import random_inception
from making import DataSet, make_set, png_of
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import calculate_metrics

from tdiff import judging, launch, quality, results, storage
from tdiff.config import Config, validated
from tdiff.data.shards import Shard
from tdiff.errors import ConfigError, DataError
from tdiff.evaluation import inception
from tdiff.evaluation.classifier import ClassifierSpec
from tdiff.evaluation.frechet import Moments, frechet_distance
from tdiff.evaluation.precision import precision_recall
from tdiff.quality import Fold
from tdiff.runs import Run
from tdiff.work.judging import Extractor, Seen, see_split
from tdiff.work.sampling import SampleJob


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    launch.connect(2)
    yield
    launch.disconnect()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_set(tmp_path_factory.mktemp("data"), [700, 500], (1, 8, 8))


def made_run(folder: Path, data: DataSet, **evaluation: Any) -> Run:
    """A run's folder without a tree, of some settings."""
    run = Run(str(folder / "runs" / "some"))
    config = validated({"data": {"cache_gb": 0}, "evaluation": evaluation})
    record = {"id": "a", "digest": "b", "config": config.model_dump(mode="json"), "bf16": False}
    record |= {"data_url": data.url, "data_digest": data.manifest.digest}
    storage.write_text(run.at("run.json"), json.dumps(record))
    return run


def classifier(folder: Path, seed: int, channels: int = 1, size: int = 8) -> Extractor:
    """A classifier that has learnt nothing: its features are as good as any to compare with."""
    torch.manual_seed(seed)
    spec = ClassifierSpec("small", channels, size, 3)
    folder.mkdir(parents=True)
    save_file(spec.build().state_dict(), folder / "classifier.safetensors")
    (folder / "classifier.json").write_text(spec.to_json())
    return Extractor("classifier", str(folder), f"{seed}")


def samples(folder: Path, images: np.ndarray, leaf: np.ndarray, shard_size: int = 40, **settings: Any) -> SampleJob:
    """A finished folder of samples; the TreeVAE's own images are the negatives."""
    shards = []
    folder.mkdir(parents=True)
    for first in range(0, len(images), shard_size):
        out = io.BytesIO()
        with wds.TarWriter(out, encoder=False) as writer:
            for k in range(first, min(first + shard_size, len(images))):
                entry = json.dumps({"index": k, "leaf": int(leaf[k])}).encode()
                own = png_of(255 - images[k])
                writer.write({"__key__": f"{k:09d}", "png": png_of(images[k]), "treevae.png": own, "json": entry})
        name = f"shard-{len(shards):06d}.tar"
        (folder / name).write_bytes(out.getvalue())
        digest = hashlib.sha256(out.getvalue()).hexdigest()
        shards.append(Shard(name, min(shard_size, len(images) - first), len(out.getvalue()), digest))
    (folder / "manifest.json").write_text(json.dumps({"samples": len(images), "shards": [asdict(s) for s in shards]}))
    fixed: dict[str, Any] = {"tree_url": "", "diffusion_url": "", "data_url": "", "mode": "sample", "seed": 0}
    fixed |= {"batch": shard_size, "steps": 2, "sampler": "ddim", "grid": "uniform", "bf16": False, "leaves": 3}
    return SampleJob(str(folder), num=len(images), **(fixed | settings))


def noise(count: int, seed: int, most: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, (count, 1, 8, 8), dtype=np.uint8)


def seen_of(features: np.ndarray, leaf: np.ndarray | None = None, prediction: np.ndarray | None = None) -> Seen:
    empty = np.empty(0, np.int64)
    sure = np.full(0 if prediction is None else len(prediction), 0.75)
    leaf, prediction = (empty if found is None else found for found in (leaf, prediction))
    return Seen(Moments.of(features), features.astype(np.float32), prediction, sure, leaf)


# --- looking -----------------------------------------------------------------------------------------


def test_parts_join_bit_for_bit_in_any_order() -> None:
    rng = np.random.default_rng(0)
    parts = [seen_of(rng.normal(size=(9, 5)), leaf=np.full(9, k)) for k in range(7)]
    found = []
    for order in (list(range(7)), [6, 0, 5, 1, 4, 2, 3], random.Random(1).sample(range(7), 7)):
        fold = Fold()
        for k in order:
            fold.add(k, parts[k])
        found.append(fold.seen())
    for one in found:
        assert one.moments.n == 63
        assert (one.moments.outer == found[0].moments.outer).all()
        assert (one.leaf == np.repeat(np.arange(7), 9)).all()
        assert (one.features == np.concatenate([part.features for part in parts])).all()
    with pytest.raises(ValueError, match="no images"):
        Fold().seen()


def test_real_images_are_seen_whole_and_the_same_by_any_number_of_workers(tmp_path: Path, data: DataSet) -> None:
    extractor = classifier(tmp_path / "network", 0)
    found = [quality.real(made_run(tmp_path / str(w), data), extractor, "train", None, w) for w in (1, 2)]
    assert found[0].moments.n == 1200
    assert (found[0].moments.outer == found[1].moments.outer).all()
    assert (found[0].prediction == found[1].prediction).all()
    at_once = see_split(extractor, made_run(tmp_path / "3", data).config(), data.url, "train", np.arange(1200), 0)
    np.testing.assert_allclose(found[0].moments.mean, at_once.moments.mean, rtol=1e-6)
    np.testing.assert_allclose(found[0].moments.covariance, at_once.moments.covariance, atol=1e-6)


def test_references_are_kept_under_all_that_they_depend_on(tmp_path: Path) -> None:
    data = make_set(tmp_path / "data", [60], (1, 8, 8))
    run = made_run(tmp_path, data)
    first, other = classifier(tmp_path / "a", 1), classifier(tmp_path / "b", 2)
    cold = quality.real(run, first, "train", None, 1)
    data.shard(0).rename(tmp_path / "away")
    warm = quality.real(run, first, "train", None, 1)  # the images are not needed any more
    assert (warm.moments.outer == cold.moments.outer).all()
    assert (warm.features == cold.features).all()
    for changed in ((other, "train", None), (first, "train", 50)):  # other weights, another count
        with pytest.raises(DataError):
            quality.real(run, *changed, 1)
    (tmp_path / "away").rename(data.shard(0))
    assert not np.allclose(quality.real(run, other, "train", None, 1).moments.mean, cold.moments.mean)
    assert quality.real(run, first, "train", 50, 1).moments.n == 50


def test_samples_are_seen_as_they_lie_in_their_shards(tmp_path: Path) -> None:
    extractor, leaf = classifier(tmp_path / "network", 0), np.arange(100) % 3
    job = samples(tmp_path / "samples", noise(100, 1), leaf)
    both = [quality.sample_tasks(extractor, job, member, 70) for member in ("png", "treevae.png")]
    drawn, own = quality.look(both, 2)
    assert drawn.moments.n == own.moments.n == 100
    assert len(drawn.features) == 70
    assert (drawn.leaf == leaf).all()
    assert not np.allclose(drawn.moments.mean, own.moments.mean)
    (one,) = quality.look([quality.sample_tasks(extractor, job, "png", 70)], 1)
    assert (one.moments.outer == drawn.moments.outer).all()


def test_fewer_images_than_asked_are_an_error(tmp_path: Path) -> None:
    extractor, job = classifier(tmp_path / "network", 0), samples(tmp_path / "s", noise(100, 1), np.zeros(100))
    manifest = Path(job.url, "manifest.json")
    manifest.write_text(json.dumps({"shards": json.loads(manifest.read_text())["shards"][:-1]}))
    with pytest.raises(ConfigError, match="80 images and not the 100"):
        quality.sample_tasks(extractor, job, "png", 0)


def test_a_damaged_shard_is_an_error(tmp_path: Path) -> None:
    extractor, job = classifier(tmp_path / "network", 0), samples(tmp_path / "s", noise(50, 1), np.zeros(50))
    with Path(job.shard_url(1)).open("r+b") as file:
        file.seek(700)
        file.write(b"!")
    with pytest.raises(DataError, match="shard-000001"):
        quality.look([quality.sample_tasks(extractor, job, "png", 0)], 1)


# --- numbers -----------------------------------------------------------------------------------------


def test_distances_are_named_by_their_network() -> None:
    rng, config = np.random.default_rng(0), Config()
    reference, drawn = seen_of(rng.normal(size=(400, 6))), seen_of(rng.normal(0.2, 1, (300, 6)))
    found = {
        kind: quality.distances(config, Extractor(kind, "", ""), [drawn], reference, "gen")
        for kind in ("inception", "classifier")
    }
    assert set(found["inception"]) == {"fid_gen", "fid_gen_error", "inception_precision_gen", "inception_recall_gen"}
    assert not any("fid" in name for name in found["classifier"])
    expected = frechet_distance(drawn.moments, reference.moments)
    assert found["inception"]["fid_gen"] == found["classifier"]["classifier_frechet_gen"] == expected
    assert 0 < found["inception"]["fid_gen_error"] < expected
    pair = precision_recall(drawn.features, reference.features[:300])
    assert (found["inception"]["inception_precision_gen"], found["inception"]["inception_recall_gen"]) == pair


def test_blocks_of_seeds_give_mean_and_spread() -> None:
    rng = np.random.default_rng(0)
    reference = seen_of(rng.normal(size=(400, 4)))
    blocks = [seen_of(rng.normal(0.3, 1, (100, 4))) for _ in range(3)]
    found = quality.distances(Config(), Extractor("inception", "", ""), blocks, reference, "gen")
    each = [frechet_distance(block.moments, reference.moments) for block in blocks]
    assert found["fid_gen_blocks"] == each
    assert found["fid_gen"] == pytest.approx(np.mean(each))
    assert found["fid_gen_error"] == pytest.approx(np.std(each, ddof=1) / 3**0.5)


def test_the_bootstrap_knows_how_far_other_draws_are() -> None:
    rng = np.random.default_rng(0)
    reference = seen_of(rng.normal(size=(5000, 3)))
    draws = [seen_of(rng.normal(0.3, 1, (200, 3))) for _ in range(60)]
    config, extractor = Config(), Extractor("classifier", "", "")
    found = [quality.distances(config, extractor, [draw], reference, "gen") for draw in draws]
    spread = np.std([one["classifier_frechet_gen"] for one in found], ddof=1)
    assert np.mean([one["classifier_frechet_gen_error"] for one in found]) == pytest.approx(spread, rel=0.3)


def test_one_image_has_no_distance() -> None:
    rng, config = np.random.default_rng(0), Config()
    many, one = seen_of(rng.normal(size=(40, 4))), seen_of(rng.normal(size=(1, 4)))
    extractor = Extractor("classifier", "", "")
    assert quality.distances(config, extractor, [one], many, "gen") == {}
    assert quality.distances(config, extractor, [many], one, "rec") == {}


def test_hundreds_of_leaves_have_no_entropy_but_histograms() -> None:
    """None of them holds the 1% of the draws that a mean over leaves counts."""
    seen = [seen_of(np.zeros((2, 2)), np.full(2, k), np.array([0, 1])) for k in range(200)]
    found = quality.specificity(seen, 2, shares=np.full(200, 7))
    assert found["classifier_entropy"] is None
    assert found["classifier_histograms"] == [[1, 1]] * 200


def test_the_first_features_kept_are_of_all_parts_of_a_split(tmp_path: Path) -> None:
    """Splits are often sorted by class, and precision and recall look at as many real images as there are samples."""
    many = make_set(tmp_path / "data", [900, 900], (1, 8, 8))
    judge = classifier(tmp_path / "judge", 1)
    seen = quality.real(made_run(tmp_path, many), judge, "train", None, 2)
    every = see_split(judge, Config(), many.url, "train", np.arange(1800), 1800).features
    places = np.square(seen.features[:200, None] - every).sum(2).argmin(1)
    assert np.bincount(places // 180, minlength=10).min() > 5


def test_specificity_of_pure_and_of_mixed_leaves() -> None:
    classes = np.array([0, 0, 0, 0]), np.array([1, 1, 2, 2])
    seen = [seen_of(np.zeros((4, 2)), np.full(4, k), found) for k, found in enumerate(classes)]
    found = quality.specificity(seen, 3, shares=np.array([0.5, 0.5]))
    assert found["classifier_histograms"] == [[4, 0, 0], [0, 2, 2]]
    assert found["classifier_entropy"] == pytest.approx(np.log(2) / 2)
    assert found["classifier_confidence"] == 0.75
    rare = quality.specificity(seen, 3, shares=np.array([0.995, 0.005]))  # below 1% of the draws
    assert rare["classifier_entropy"] == 0


def test_without_images_of_leaves_nothing_is_said_of_them(
    tmp_path: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = classifier(tmp_path / "judge", 3)
    monkeypatch.setattr(quality, "extractor_of", lambda *_: judge)
    run = made_run(tmp_path, data, resamples=2)
    made = {
        name: samples(tmp_path / name, noise(50, k), np.arange(50) % 3, model=model)
        for k, (name, model) in enumerate({"prior": "treediffusion", "treevae-prior": "treevae"}.items())
    }
    found = quality.measure(run, made, 1)
    for model in ("treediffusion", "treevae"):
        assert found[model]["classifier_frechet_gen"] > 0
        assert not {"classifier_entropy", "classifier_confidence", "classifier_histograms"} & found[model].keys()


@pytest.mark.parametrize("reference", ["test", "train"])
def test_what_samples_are_held_against(tmp_path: Path, data: DataSet, reference: str) -> None:
    run = made_run(tmp_path, data, reference=reference, reference_images=90)
    assert quality.reference_of(run) == ("train", 90)  # there is no other split


# --- extractors --------------------------------------------------------------------------------------


def test_weights_are_put_where_every_worker_finds_them(tmp_path: Path, data: DataSet) -> None:
    file = random_inception(tmp_path / "weights.pth")
    run = made_run(tmp_path, data, features=["inception"], inception=str(file))
    extractor = judging.inception_extractor(run)
    assert extractor.digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert extractor.url.endswith(".safetensors")
    assert set(storage.read_tensors(extractor.url)) == set(torch.load(file))
    assert judging.inception_extractor(run) == extractor


def test_weights_that_cannot_be_had(tmp_path: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.inception=.*nothing.pth cannot be read"):
        judging.inception_extractor(made_run(tmp_path, data, inception=str(tmp_path / "nothing.pth")))
    (tmp_path / "page.pth").write_bytes(b"<html>")
    with pytest.raises(ConfigError, match=r"page.pth cannot be used: it is no file of tensors"):
        judging.inception_extractor(made_run(tmp_path, data, inception=str(tmp_path / "page.pth")))
    monkeypatch.setattr(inception, "weights_source", lambda: "http://127.0.0.1:9/weights.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(ConfigError, match=r"cannot be downloaded.*evaluation.inception=FILE"):
        judging.inception_extractor(made_run(tmp_path, data))
    assert not list((tmp_path / "torch").rglob("*.pth"))


def test_a_run_without_labels_is_judged_by_inception(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From drawing to the table, with both networks asked for: a classifier needs labels."""
    file = random_inception(tmp_path / "weights.pth")
    settings = ("samples.draws=7", "samples.reconstructions=6", "samples.blocks=2", "samples.per_leaf=2")
    settings += ("samples.draws_all_leaves=1", "evaluation.features=[classifier, inception]")
    settings += ("evaluation.reference=test", f"evaluation.inception={file}")
    run = finished_run(tmp_path, settings=settings)
    jobs = results.standard_jobs(run)
    results.draw(results.unfinished(jobs), 2)
    found = results.evaluate(run, 2)
    assert "no labels" in capsys.readouterr().out
    judged = found["samples"]
    assert judged["reference"] == {"split": "test", "images": 23}
    assert (judged["draws"], judged["blocks"], judged["reconstructions"]) == (7, 2, 6)
    assert "classifier" not in judged
    assert judged["inception"]["digest"] == hashlib.sha256(file.read_bytes()).hexdigest()
    for model in ("treediffusion", "treevae"):
        assert judged[model]["fid_rec"] > 0
        assert judged[model]["fid_gen"] == pytest.approx(np.mean(judged[model]["fid_gen_blocks"]))
        assert not any("classifier" in name for name in judged[model])
    assert (judged["real"]["split"], judged["real"]["images"]) == ("train", 7)  # as many as draws
    assert len(found["nearest"]["ids"]) == 7
    titles = [title for title, _ in results.table(found)]
    assert any(title.startswith("FID of 7 draws to 23 test images") for title in titles)
    one = jobs["prior"]
    again = results.draw_and_compare(run, "prior", one, judging.inception_extractor(run), 1)
    assert again["fid_gen"] == judged["treediffusion"]["fid_gen_blocks"][0]
    results.figures(run)
    assert 'id="nearest"' in Path(results.report(run)).read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fid_is_torch_fidelitys_on_two_folders_of_256_images(tmp_path: Path) -> None:
    """Promise 8: images of a data set and of samples, seen by two Ray actors."""
    file = random_inception(tmp_path / "weights.pth")
    data = make_set(tmp_path / "data", [156, 100], (1, 8, 8))
    drawn = noise(256, 5, most=128)
    job = samples(tmp_path / "samples", drawn, np.zeros(256))
    run = made_run(tmp_path, data, features=["inception"], inception=str(file))
    extractor = judging.inception_extractor(run)
    (seen,) = quality.look([quality.sample_tasks(extractor, job, "png", 0)], 2)
    found = quality.compare(run, extractor, job, seen, 2)
    for name, images in (("real", data.images), ("drawn", drawn)):
        (tmp_path / name).mkdir()
        for k, image in enumerate(images):
            Image.fromarray(image[0]).convert("RGB").save(tmp_path / name / f"{k:03d}.png")
    theirs = calculate_metrics(
        input1=str(tmp_path / "drawn"),
        input2=str(tmp_path / "real"),
        fid=True,
        cuda=False,
        cache=False,
        verbose=False,
        feature_extractor_weights_path=str(file),
    )["frechet_inception_distance"]
    assert found["fid_gen"] == pytest.approx(theirs, rel=1e-3)
    assert found["images"] == found["reference"]["images"] == 256


# --- nearest training images -------------------------------------------------------------------------


def test_what_is_learnt_by_heart_is_found(tmp_path: Path, data: DataSet) -> None:
    copied = data.images[[700, 3, 1199]]
    drawn = np.concatenate([copied, noise(5, 9)])
    job = samples(tmp_path / "samples", drawn, np.zeros(8), shard_size=5)
    run = made_run(tmp_path, data, nearest_images=6)
    found = [quality.nearest(run, job, workers) for workers in (1, 2)]
    assert found[0] == found[1]
    assert found[0]["images"] == 6
    assert found[0]["ids"][:3] == [700, 3, 1199]
    assert found[0]["samples"]["least"] == 0
    others = ((data.images / 255 - drawn[4] / 255) ** 2).sum((1, 2, 3))
    assert found[0]["ids"][4] == others.argmin()
    assert "held_out" not in found[0]  # there is no such split
    assert quality.nearest(made_run(tmp_path / "none", data, nearest_images=0), job, 1) == {}
