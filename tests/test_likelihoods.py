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

from tdiff.tree.model import TreeSpec, TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.growing import save_tree
from tdiff.work.likelihoods import BLOCK, Arrays, LikelihoodJob, joined, likelihood_block, summary

TOPOLOGY = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_set(tmp_path_factory.mktemp("data"), [70, 53], shape=(1, 8, 8))


@pytest.fixture(scope="module")
def job(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> LikelihoodJob:
    folder = tmp_path_factory.mktemp("tree")
    torch.manual_seed(0)
    save_tree(str(folder), TreeVAE(TreeSpec(1, 8, features=3, latent_channels=2, feature_channels=8), TOPOLOGY))
    return LikelihoodJob(str(folder), data.url, "train", images=60, samples=8, seed=0)


def all_blocks(job: LikelihoodJob) -> Arrays:
    return joined([likelihood_block(job, *block) for block in job.blocks()])


@pytest.mark.parametrize("images", [0, 1, BLOCK, 60, 123, 1000])
def test_every_image_is_in_one_block(job: LikelihoodJob, images: int):
    blocks = dataclasses.replace(job, images=images).blocks()
    assert [k for first, last, _ in blocks for k in range(first, last)] == list(range(123))
    assert all(last - first <= BLOCK for first, last, _ in blocks)
    assert sum(last - first for first, last, samples in blocks if samples == 8) == min(images, 123)


def test_a_block_does_not_depend_on_who_comes_before(job: LikelihoodJob):
    forwards = all_blocks(job)
    backwards = joined([likelihood_block(job, *block) for block in job.blocks()[::-1]][::-1])
    assert forwards.keys() == {"log_p", "effective", "elbo", "leaf_elbo", "log_reach"}
    for name, array in forwards.items():
        np.testing.assert_array_equal(array, backwards[name], err_msg=name)
    other = all_blocks(dataclasses.replace(job, seed=1))
    assert not np.array_equal(other["elbo"], forwards["elbo"])


def test_the_summary_is_of_the_right_images(job: LikelihoodJob):
    found = all_blocks(job)
    assert np.isnan(found["log_p"][60:]).all()
    told = summary(job, found, 64, density=False)
    assert (told["elbo_images"], told["log_likelihood_images"], told["log_likelihood_samples"]) == (123, 60, 8)
    assert told["elbo"] == pytest.approx(found["elbo"].mean())
    assert told["log_likelihood"] == pytest.approx(found["log_p"][:60].mean())
    assert found["log_p"][:60].mean() > found["elbo"][:60].mean()  # Jensen, here by far more than noise
    assert told["elbo_standard_error"] == pytest.approx(found["elbo"].std(ddof=1) / 123**0.5)
    assert 1 <= told["effective_samples"] <= 8
    assert not any("bits" in name for name in told)
    leaf = found["log_reach"].argmax(1)
    for k, elbo in enumerate(told["leaf_elbo"]):
        here = found["elbo"][leaf == k]
        assert elbo == (pytest.approx(here.mean()) if len(here) else None)


def test_without_samples_there_is_an_elbo_and_no_likelihood(job: LikelihoodJob):
    job = dataclasses.replace(job, images=0)
    told = summary(job, all_blocks(job), 64, density=False)
    assert told["log_likelihood"] is None
    assert told["log_likelihood_images"] == 0
    assert np.isfinite(told["elbo"])


def test_colour_is_dequantised_and_told_in_bits(tmp_path: Path):
    made = make_set(tmp_path / "data", [20], shape=(3, 8, 8))
    spec = TreeSpec(3, 8, encoder="cnn2", likelihood="gaussian", features=3, latent_channels=2, feature_channels=8)
    save_tree(str(tmp_path / "tree"), TreeVAE(spec, TOPOLOGY))
    job = LikelihoodJob(str(tmp_path / "tree"), made.url, "train", images=20, samples=4, seed=0)
    told = summary(job, all_blocks(job), 192, density=True)
    bits = told["log_likelihood_bits_per_dimension"]
    assert bits == pytest.approx(-told["log_likelihood"] / (192 * np.log(2)) + 8)
    assert bits > 8 + np.log2(2 * np.pi) / 2  # what unit variance cannot come below
