"""Protects the controls of the condition: labels that are those of k-means, or of no image at all; told as the leaf's
node is told; samples that differ from those of the other conditions in nothing but what the denoiser is told; and that
nothing asks for leaves where there are none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import TEST_IMAGES, TOPOLOGY, finished_run
from sklearn.cluster import KMeans
from torch import Tensor

import tdiff
from tdiff import results, storage
from tdiff.config import load
from tdiff.data.shards import read_manifest
from tdiff.data.stream import Reader, read_split
from tdiff.diffusion.condition import CLUSTERS, CONDITIONS, CONTROLS, KNOWN_CONDITIONS, Condition, PathEncoder
from tdiff.errors import ConfigError, DataError
from tdiff.opening import check_size
from tdiff.results import _complete, standard_jobs
from tdiff.runs import Run
from tdiff.seeds import permutation, seed_of
from tdiff.tree.growth import leaf_reach
from tdiff.tree.model import Path as TreePath
from tdiff.work import labels as labels_module
from tdiff.work.diffusing import DiffusionObjective
from tdiff.work.growing import load_routing
from tdiff.work.jobs import sample_job
from tdiff.work.labels import FILE, Labels, clusters_of, leaves_of, read_labels, write_labels
from tdiff.work.reading import as_images
from tdiff.work.sampling import SampleJob, Samples, draw_shard, open_denoiser, open_tree, read_samples

MODES = ("sample", "sample-all-leaves", "reconstruct", "reconstruct-all-leaves")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run of each kind; all have the same tree."""
    made = {}
    for condition in ("recon+path", "kmeans-10", "shuffled-leaf"):
        folder = tmp_path_factory.mktemp(condition)
        made[condition] = finished_run(folder, settings=(f"diffusion.condition={condition}",))
    return made


@pytest.fixture
def clustered(runs: dict[str, Run]) -> Run:
    return runs["kmeans-10"]


@pytest.fixture
def shuffled(runs: dict[str, Run]) -> Run:
    return runs["shuffled-leaf"]


def images_of(run: Run, split: str) -> np.ndarray:
    url = run.record()["data_url"]
    return read_split(url, read_manifest(url), split).images


def reader(run: Run) -> Reader:
    url = run.record()["data_url"]
    return Reader(url, read_manifest(url), "train")


def drawn(run: Run, name: str, order: list[int] | None = None, **settings: Any) -> Samples:
    """The samples of a job, its shards drawn in this order."""
    job = sample_job(run, name, **settings)
    entries = {shard: draw_shard(job, shard) for shard in (order or range(job.shards))}
    _complete(job, [entries[shard] for shard in range(job.shards)])
    return read_samples(job.url)


def column(samples: Samples, key: str) -> list[Any]:
    return [entry[key] for entry in samples.entries]


def kmeans_of(run: Run) -> KMeans:
    """sklearn's own k-means on the run's training images: ten starts of ten clusters."""
    order = permutation(TEST_IMAGES, "controls", run.config().seed)
    pixels = images_of(run, "train")[order].reshape(TEST_IMAGES, -1).astype(np.float32) / 255
    return KMeans(10, n_init=10, random_state=seed_of("kmeans", run.config().seed) % 2**31).fit(pixels)


# --- the labels --------------------------------------------------------------------------------------


def test_controls_are_no_variants() -> None:
    assert list(CONTROLS) == ["kmeans-10", "kmeans-100", "shuffled-leaf"]
    assert not set(CONTROLS) & set(CONDITIONS)
    assert set(KNOWN_CONDITIONS) == set(CONTROLS) | set(CONDITIONS)


def test_clusters_are_those_of_scikit_learn(clustered: Run) -> None:
    labels, fitted = read_labels(clustered.at("diffusion")), kmeans_of(clustered)
    for split in ("train", "test"):
        images = images_of(clustered, split)
        flat = images.reshape(TEST_IMAGES, -1).astype(np.float32) / 255
        found = labels.of(as_images(images), torch.Generator())
        np.testing.assert_array_equal(found.numpy(), fitted.predict(flat))
        if split == "train":
            np.testing.assert_array_equal(found.bincount(minlength=10).float() / TEST_IMAGES, labels.shares)
    assert labels.places.tolist() == list(range(10))


def test_of_many_images_some_are_fitted_to_and_all_are_counted(clustered: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels_module, "KMEANS_VALUES", 12 * 64 + 63)
    few = clusters_of(reader(clustered), 10, seed=3)
    fitted_to = permutation(TEST_IMAGES, "controls", 3)[:12]
    pixels = as_images(images_of(clustered, "train")).flatten(1)
    fitted = KMeans(10, n_init=10, random_state=seed_of("kmeans", 3) % 2**31).fit(pixels[fitted_to].numpy())
    assert few.centres is not None
    np.testing.assert_allclose(few.centres, fitted.cluster_centers_, atol=1e-6)
    counts = np.bincount(fitted.predict(pixels.numpy()), minlength=10)
    np.testing.assert_allclose(few.shares, counts / TEST_IMAGES)
    assert not torch.equal(few.centres, clusters_of(reader(clustered), 10, seed=4).centres)


def test_leaves_come_by_their_shares_whatever_the_image(shuffled: Run) -> None:
    labels = read_labels(shuffled.at("diffusion"))
    leaf = leaf_reach(TOPOLOGY, load_routing(shuffled.grown_tree, "train")).argmax(1)
    np.testing.assert_allclose(labels.shares, np.bincount(leaf, minlength=3) / TEST_IMAGES)
    count = 20_000
    one = labels.of(torch.zeros(count, 1, 8, 8), torch.Generator().manual_seed(5))
    other = labels.of(torch.rand(count, 1, 8, 8), torch.Generator().manual_seed(5))
    assert torch.equal(one, other)
    np.testing.assert_allclose(one.bincount(minlength=3) / count, labels.shares, atol=0.015)  # 4 standard errors


def test_a_shuffled_leaf_is_told_as_the_leaf_is(shuffled: Run) -> None:
    """With the path that the tree has to this leaf, the condition `leaf` says the same."""
    tree, labels = open_tree(shuffled.grown_tree), read_labels(shuffled.at("diffusion"))
    leaf = torch.tensor([0, 1, 2, 1])
    path = tree.path(tree.descend(4), leaf=leaf)
    for encoding in ("index", "embedding"):
        told = PathEncoder(Condition(leaf=True), 16, encoding, len(TOPOLOGY.nodes), 8)  # type: ignore[arg-type]
        torch.testing.assert_close(told(labels.path(leaf)), told(path))
    assert labels.places.tolist() == [3, 4, 2]


@pytest.mark.parametrize("condition", ["kmeans-10", "shuffled-leaf"])
def test_labels_are_written_once_and_always_the_same(runs: dict[str, Run], condition: str, tmp_path: Path) -> None:
    run = runs[condition]
    arguments = (run.config(), run.record()["data_url"], run.grown_tree)
    write_labels(str(tmp_path), *arguments)
    file = tmp_path / FILE
    assert file.read_bytes() == Path(run.at("diffusion", FILE)).read_bytes()
    file.write_bytes(b"as an earlier start left it")
    write_labels(str(tmp_path), *arguments)
    assert file.read_bytes() == b"as an earlier start left it"
    with pytest.raises(DataError, match=r"labels\.safetensors is damaged"):
        read_labels(str(tmp_path))


def test_more_clusters_than_images_are_refused_before_any_worker() -> None:
    few = ["diffusion.batch=64", "tree.batch=64"]
    check_size(load(None, [*few, "diffusion.condition=kmeans-10"]), "few", 99, (1, 8, 8))
    check_size(load(None, [*few, "diffusion.condition=kmeans-100"]), "few", 100, (1, 8, 8))
    with pytest.raises(ConfigError, match=r"diffusion.condition=kmeans-100 is fitted to 99 images.*needs 100"):
        check_size(load(None, [*few, "diffusion.condition=kmeans-100"]), "few", 99, (1, 8, 8))
    large = load(None, [*few, "diffusion.condition=kmeans-100", "tree.likelihood=gaussian", "diffusion.attention=[]"])
    with pytest.raises(ConfigError, match="fitted to 97 images"):  # as many as memory allows
        check_size(large, "large", 1000, (3, 414, 414))


# --- training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("condition", ["kmeans-10", "shuffled-leaf"])
def test_images_are_told_their_labels(
    runs: dict[str, Run], condition: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs[condition]
    tree, denoiser = open_tree(run.grown_tree), open_denoiser(run.at("diffusion"), None)
    labels = read_labels(run.at("diffusion"))
    objective = DiffusionObjective(denoiser, tree, 0.1, labels=labels).train(training)
    told: list[Tensor] = []
    forward = denoiser.forward

    def listening(x_t: Tensor, t: Tensor, path: TreePath, *rest: Any) -> Tensor:
        told.append(path.nodes)
        return forward(x_t, t, path, *rest)

    monkeypatch.setattr(denoiser, "forward", listening)
    images = as_images(images_of(run, "train"))
    loss, metrics = objective({"images": images}, 0, torch.Generator().manual_seed(1))
    assert loss.isfinite()
    assert any("leaf-" in name for name in metrics) is not training  # of the tree's leaf, whatever is told
    (nodes,) = told
    if condition == "kmeans-10":
        assert torch.equal(nodes[:, 0], labels.of(images, torch.Generator()))
    else:
        assert set(nodes.flatten().tolist()) <= {3, 4, 2}
        objective({"images": images}, 0, torch.Generator().manual_seed(2))
        assert not torch.equal(*told)  # another leaf every time


# --- sampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("condition", ["kmeans-10", "shuffled-leaf"])
def test_the_same_bytes_in_whatever_order(runs: dict[str, Run], condition: str, mode: str) -> None:
    if condition in CLUSTERS and mode.endswith("all-leaves"):
        return  # refused, below
    run, settings = runs[condition], {"mode": mode, "num": 7, "sampler": "ddpm", "guidance": 1.0, "batch": 3}
    one = drawn(run, f"one-{mode}", **settings)
    torch.manual_seed(99)  # nothing comes from the global generator
    last = sample_job(run, "x", **settings).shards
    other = drawn(run, f"other-{mode}", list(range(last))[::-1], **settings)
    np.testing.assert_array_equal(one.images, other.images)
    assert one.entries == other.entries
    here = tdiff.load(run.url)
    options: dict[str, Any] = {"sampler": "ddpm", "guidance": 1.0, "batch": 3, "all_leaves": mode.endswith("leaves")}
    if mode.startswith("sample"):
        found = here.sample(7, **options)
    else:
        found = here.reconstruct(images_of(run, "test")[:7], **options)
        assert found.entries[0]["label"] == one.entries[0]["label"]
    np.testing.assert_array_equal(found.images, one.images)


@pytest.mark.parametrize("condition", ["kmeans-10", "shuffled-leaf"])
def test_the_tree_draws_as_for_the_other_conditions(runs: dict[str, Run], condition: str) -> None:
    plain = drawn(runs["recon+path"], "paired", num=9, sampler="ddpm")
    control = drawn(runs[condition], "paired", num=9, sampler="ddpm")
    np.testing.assert_array_equal(control.treevae, plain.treevae)
    assert [{**entry, "label": 0} for entry in plain.entries] == [{**entry, "label": 0} for entry in control.entries]
    assert not any("label" in entry for entry in plain.entries)


@pytest.mark.parametrize("condition", ["kmeans-10", "shuffled-leaf"])
def test_labels_are_drawn_by_their_shares(runs: dict[str, Run], condition: str) -> None:
    shares = read_labels(runs[condition].at("diffusion")).shares
    samples = drawn(runs[condition], "many", num=900, batch=300, steps=2)
    found = np.bincount(column(samples, "label"), minlength=len(shares)) / 900
    np.testing.assert_allclose(found, shares, atol=4 * 0.5 / 30)
    labels, leaves = (np.array(column(samples, key)) for key in ("label", "leaf"))
    together = np.histogram2d(labels, leaves, (len(shares), 3))[0] / 900
    apart = np.outer(found, np.bincount(leaves, minlength=3) / 900)
    assert np.abs(together - apart).max() < 0.05  # independent of the tree's leaf


@pytest.mark.parametrize("condition", ["kmeans-10", "shuffled-leaf"])
def test_a_sample_depends_on_its_label(runs: dict[str, Run], condition: str, tmp_path: Path) -> None:
    """Samples that are told another label are others, and those with the same one are the same."""
    run = runs[condition]
    job = sample_job(run, "told", num=12, batch=12)
    drawn(run, "told", num=12, batch=12)
    labels = read_labels(run.at("diffusion"))
    other = tmp_path / "diffusion"
    other.mkdir()
    for name in ("unet.json", "ema.safetensors"):
        (other / name).write_bytes(Path(run.at("diffusion", name)).read_bytes())
    whole = replace(labels, shares=torch.eye(len(labels.shares))[1])
    tensors = {name: tensor for name, tensor in vars(whole).items() if tensor is not None}
    storage.write_bytes(str(other / FILE), labels_module.save_tensors(tensors))
    again = replace(job, url=str(tmp_path / "again"), diffusion_url=str(other))
    _complete(again, [draw_shard(again, 0)])
    one, two = read_samples(job.url), read_samples(again.url)
    assert set(column(two, "label")) == {1}
    for first, second, label in zip(one.images, two.images, column(one, "label"), strict=True):
        assert np.array_equal(first, second) == (label == 1)


def test_images_are_reconstructed_with_their_own_cluster(clustered: Run) -> None:
    samples = drawn(clustered, "own", mode="reconstruct", num=TEST_IMAGES, batch=9)
    flat = images_of(clustered, "test").reshape(TEST_IMAGES, -1).astype(np.float32) / 255
    assert column(samples, "label") == kmeans_of(clustered).predict(flat).tolist()


def test_a_leaf_that_is_asked_for_is_told(shuffled: Run) -> None:
    for settings in ({"leaf": 1}, {"node": 1}, {"mode": "sample-all-leaves"}, {"mode": "reconstruct", "leaf": 2}):
        samples = drawn(shuffled, "-".join(map(str, settings.values())), num=6, **settings)  # type: ignore[arg-type]
        assert column(samples, "label") == column(samples, "leaf")
    mixed = drawn(shuffled, "mixed", num=40)
    assert column(mixed, "label") != column(mixed, "leaf")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"leaf": 1}, "leaf=1 asks for leaves, and the model of diffusion.condition=kmeans-10 knows none"),
        ({"node": 1}, "node=1 asks"),
        ({"mode": "sample-all-leaves"}, "mode=sample-all-leaves asks"),
        ({"mode": "reconstruct-all-leaves"}, "mode=reconstruct-all-leaves asks"),
    ],
)
def test_clusters_are_no_leaves(clustered: Run, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sample_job(clustered, "x", num=3, **settings)
    assert isinstance(sample_job(clustered, "x", num=3, model="treevae", **settings), SampleJob)


# --- what a run yields -------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", ["kmeans-10", "shuffled-leaf"])
def test_a_run_s_own_samples_and_pictures(tmp_path: Path, condition: str) -> None:
    settings = (f"diffusion.condition={condition}", "samples.draws=8", "samples.reconstructions=6")
    run = finished_run(tmp_path, settings=settings)
    (Path(run.at("diffusion")) / "summary.json").write_text('{"wall_seconds": 1}')
    (Path(run.grown_tree) / "summary.json").write_text('{"wall_seconds": 1}')
    jobs = standard_jobs(run)
    of_leaves = {"root-draws", "leaf-00", "leaf-01", "leaf-02"}
    assert set(jobs) - of_leaves == {"prior", "reconstructions", "treevae-prior", "treevae-reconstructions"}
    assert of_leaves <= set(jobs) if condition == "shuffled-leaf" else not of_leaves & set(jobs)
    for job in jobs.values():
        _complete(job, [draw_shard(job, shard) for shard in range(job.shards)])
    results.figures(run)
    pictures = {"leaves.png", "root-draw.png"}
    drawn = set(results.pictures(run))
    assert "samples.png" in drawn
    assert pictures <= drawn if condition == "shuffled-leaf" else not pictures & drawn
    page = Path(results.report(run)).read_text()
    assert condition in page
    assert "no samples yet" not in page


def test_shares_that_are_given_are_drawn_by() -> None:
    labels = Labels(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([3, 4, 2]))
    assert labels.drawn(5, torch.Generator()).tolist() == [1] * 5
    assert labels.path(labels.drawn(5, torch.Generator())).nodes.tolist() == [[4]] * 5


def test_leaves_are_those_of_the_tree_alone(shuffled: Run) -> None:
    found, written = leaves_of(shuffled.grown_tree), read_labels(shuffled.at("diffusion"))
    assert torch.equal(found.shares, written.shares)
    assert written.centres is None
