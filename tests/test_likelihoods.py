"""Protects the likelihood of a split as tasks: every image once, the same numbers whoever computes a block, and
summaries that say what they are of.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from making import DataSet, make_set

from tdiff.config import Config, validated
from tdiff.errors import NonFiniteError
from tdiff.tree.growth import leaf_reach
from tdiff.tree.model import TreeSpec, TreeVAE, evaluating
from tdiff.tree.topology import Topology
from tdiff.work.growing import load_tree, save_tree
from tdiff.work.likelihoods import BLOCK, BLOCK_OF_ONE, Arrays, LikelihoodJob, joined, likelihood_block, summary
from tdiff.work.reading import as_images

TOPOLOGY = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_set(tmp_path_factory.mktemp("data"), [70, 53], shape=(1, 8, 8))


@pytest.fixture(scope="module")
def job(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> LikelihoodJob:
    folder = tmp_path_factory.mktemp("tree")
    torch.manual_seed(0)
    save_tree(str(folder), TreeVAE(TreeSpec(1, 8, features=3, latent_channels=2, feature_channels=8), TOPOLOGY))
    return LikelihoodJob(str(folder), data.url, "train", configured(images=60, samples=8, seed=0))


def configured(images: int, samples: int, seed: int) -> Config:
    wanted = {"likelihood_images": images, "likelihood_samples": samples}
    return validated({"seed": seed, "data": {"cache_gb": 0}, "evaluation": wanted})


def changed(job: LikelihoodJob, images: int = 60, seed: int = 0) -> LikelihoodJob:
    return dataclasses.replace(job, config=configured(images, 8, seed))


def all_blocks(job: LikelihoodJob) -> Arrays:
    blocks = job.blocks()
    return joined(blocks, [likelihood_block(job, *block) for block in blocks])


@pytest.mark.parametrize("images", [0, 1, BLOCK, 60, 123, 1000])
def test_every_image_is_in_one_block(job: LikelihoodJob, images: int):
    blocks = changed(job, images).blocks()
    assert [number for number, _, _ in blocks] == list(range(len(blocks)))
    assert sorted(np.concatenate([ids for _, ids, _ in blocks]).tolist()) == list(range(123))
    assert all(len(ids) <= (BLOCK if samples == 8 else BLOCK_OF_ONE) for _, ids, samples in blocks)
    assert sum(len(ids) for _, ids, samples in blocks if samples == 8) == min(images, 123)


def test_images_with_many_samples_are_drawn_from_all(job: LikelihoodJob):
    """The first ones would be of the first classes, where a split is sorted."""
    drawn = np.concatenate([ids for _, ids, samples in job.blocks() if samples == 8])
    assert 20 < (drawn < 62).sum() < 40  # 30 expected, of 60
    other = np.concatenate([ids for _, ids, samples in changed(job, seed=1).blocks() if samples == 8])
    assert set(drawn) != set(other)


def test_a_block_does_not_depend_on_who_comes_before(job: LikelihoodJob):
    forwards, blocks = all_blocks(job), job.blocks()
    backwards = joined(blocks, [likelihood_block(job, *block) for block in blocks[::-1]][::-1])
    assert forwards.keys() == {"log_p", "effective", "elbo", "leaf_elbo", "log_reach"}
    for name, array in forwards.items():
        np.testing.assert_array_equal(array, backwards[name], err_msg=name)
    assert not np.array_equal(all_blocks(changed(job, seed=1))["elbo"], forwards["elbo"])


def test_every_image_gets_its_own_numbers(job: LikelihoodJob, data: DataSet):
    """Reach draws nothing, so it tells whose numbers these are."""
    model = load_tree(job.tree_url)
    with evaluating(model):
        reach = leaf_reach(TOPOLOGY, model.routing(as_images(data.images)).numpy())
    np.testing.assert_allclose(np.exp(all_blocks(job)["log_reach"]), reach, rtol=1e-4, atol=1e-6)


def test_the_summary_is_of_the_right_images(job: LikelihoodJob):
    found = all_blocks(job)
    sampled = np.sort(np.concatenate([ids for _, ids, samples in job.blocks() if samples == 8]))
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(found["log_p"])), sampled)
    told = summary(job, found, 64, density=False)
    assert (told["elbo_images"], told["log_likelihood_images"], told["log_likelihood_samples"]) == (123, 60, 8)
    assert told["elbo"] == pytest.approx(found["elbo"].mean())
    assert told["log_likelihood"] == pytest.approx(found["log_p"][sampled].mean())
    assert found["log_p"][sampled].mean() > found["elbo"][sampled].mean()  # Jensen, here by far more than noise
    assert told["elbo_standard_error"] == pytest.approx(found["elbo"].std(ddof=1) / 123**0.5)
    assert told["effective_samples"] == pytest.approx(found["effective"][sampled].mean())
    assert not any("bits" in name for name in told)
    leaf = found["log_reach"].argmax(1)
    for k, elbo in enumerate(told["leaf_elbo"]):
        here = found["elbo"][leaf == k]
        assert elbo == (pytest.approx(here.mean()) if len(here) else None)


def test_a_likelihood_that_is_not_finite_is_an_error(job: LikelihoodJob, tmp_path: Path):
    model = load_tree(job.tree_url)
    next(model.nodes["3"].parameters()).data.fill_(torch.nan)
    save_tree(str(tmp_path), model)
    broken = dataclasses.replace(job, tree_url=str(tmp_path))
    with pytest.raises(NonFiniteError, match="not finite under the tree"):
        likelihood_block(broken, *broken.blocks()[0])


def test_without_samples_there_is_an_elbo_and_no_likelihood(job: LikelihoodJob):
    job = changed(job, images=0)
    told = summary(job, all_blocks(job), 64, density=False)
    assert told["log_likelihood"] is None
    assert told["log_likelihood_images"] == 0
    assert np.isfinite(told["elbo"])


def test_colour_is_dequantised_and_told_in_bits(tmp_path: Path):
    made = make_set(tmp_path / "data", [20], shape=(3, 8, 8))
    spec = TreeSpec(3, 8, encoder="cnn2", likelihood="gaussian", features=3, latent_channels=2, feature_channels=8)
    save_tree(str(tmp_path / "tree"), TreeVAE(spec, TOPOLOGY))
    job = LikelihoodJob(str(tmp_path / "tree"), made.url, "train", configured(20, 4, 0))
    none = dataclasses.replace(job, config=configured(0, 4, 0))
    assert "log_likelihood_bits_per_dimension" not in summary(none, all_blocks(none), 192, density=True)
    told = summary(job, all_blocks(job), 192, density=True)
    bits = told["log_likelihood_bits_per_dimension"]
    assert bits == pytest.approx(-told["log_likelihood"] / (192 * np.log(2)) + 8)
    assert bits > 8 + np.log2(2 * np.pi) / 2  # what unit variance cannot come below
