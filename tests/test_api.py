"""Protects what notebooks use: `tdiff.load` and what it gives, on a run of random weights.

Images come to the clusters that the run itself noted, in every layout that cannot be mistaken, and others are refused
in one sentence; what is drawn here is what the workers write; nothing of it is imported before it is asked for.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import TEST_IMAGES, TOPOLOGY, finished_run

import tdiff
from tdiff import storage
from tdiff.api import LoadedRun
from tdiff.data.shards import read_manifest
from tdiff.data.stream import read_split
from tdiff.errors import ConfigError
from tdiff.results import _complete
from tdiff.runs import Run
from tdiff.tree import encoding
from tdiff.tree.growth import leaf_reach
from tdiff.tree.model import TreeSpec, TreeVAE
from tdiff.work.growing import load_routing
from tdiff.work.jobs import sample_job
from tdiff.work.sampling import Samples, draw_shard, read_samples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(made: Run) -> LoadedRun:
    return tdiff.load(made.url)


@pytest.fixture(scope="module")
def images(made: Run) -> np.ndarray:
    """The run's test images, uint8 [M, 1, 8, 8]."""
    url = made.record()["data_url"]
    return read_split(url, read_manifest(url), "test").images


@pytest.fixture(scope="module")
def colour(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return tdiff.load(finished_run(tmp_path_factory.mktemp("colour"), denoiser=False, channels=3).url)


def written(run: Run, name: str, **settings: Any) -> Samples:
    """The samples of a job as the workers of `tdiff.generate` write them."""
    job = sample_job(run, name, **settings)
    _complete(job, [draw_shard(job, shard) for shard in range(job.shards)])
    return read_samples(job.url)


def assert_same(found: Samples, expected: Samples) -> None:
    np.testing.assert_array_equal(found.images, expected.images)
    np.testing.assert_array_equal(found.treevae, expected.treevae)
    assert found.entries == expected.entries


# --- importing ---------------------------------------------------------------------------------------


def test_the_package_imports_nothing_and_load_neither_ray_nor_mlflow():
    code = (
        "import sys, tdiff; assert not {'torch', 'numpy'} & set(sys.modules); assert 'load' in dir(tdiff); "
        "tdiff.load; print(sorted({'torch', 'ray', 'deepspeed', 'mlflow', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['torch']"
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = tdiff.lode


# --- encoding ----------------------------------------------------------------------------------------


def test_images_come_where_the_run_sent_them(made: Run, run: LoadedRun, images: np.ndarray):
    assert run.tree.leaves == TOPOLOGY.leaves
    reach, leaf, path = run.encode(images)
    np.testing.assert_array_equal(reach, leaf_reach(TOPOLOGY, load_routing(made.grown_tree, "test")))
    np.testing.assert_array_equal(leaf, reach.argmax(1))
    assert len(set(leaf.tolist())) > 1, "a tree that sends all images to one leaf shows nothing"
    assert [tuple(row[row >= 0]) for row in path] == [TOPOLOGY.path(TOPOLOGY.leaves[k]) for k in leaf]
    assert (path.dtype, leaf.dtype, path.shape) == (np.int64, np.int64, (TEST_IMAGES, 3))


def test_the_same_images_in_every_form(run: LoadedRun, images: np.ndarray):
    expected = run.encode(images)
    floats = images.astype(np.float32) / 255
    read_only = images.copy()
    read_only.setflags(write=False)
    for form in (
        floats,
        floats.astype(np.float64),
        images[:, 0],
        np.moveaxis(images, 1, 3),
        images[::-1][::-1],  # negative strides
        read_only,
        torch.from_numpy(images),
        torch.from_numpy(floats).requires_grad_(),
        torch.from_numpy(floats)[:, 0],
    ):
        for found, wanted in zip(run.encode(form), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    half = run.encode(torch.from_numpy(floats).half())
    np.testing.assert_allclose(half.reach, expected.reach, atol=1e-3)
    one = run.encode(images[0])  # [1, 8, 8]: one grey image, channels and all, or one without
    np.testing.assert_allclose(one.reach, expected.reach[:1], atol=1e-6)


def test_colour_comes_first_or_last(colour: LoadedRun):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    expected = colour.encode(images).reach
    np.testing.assert_array_equal(colour.encode(np.moveaxis(images, 1, 3)).reach, expected)
    np.testing.assert_array_equal(colour.encode(torch.from_numpy(images).movedim(1, 3)).reach, expected)
    with pytest.raises(ConfigError, match=r"\[5, 8, 8\]: this tree takes \[M, 3, 8, 8\]"):
        colour.encode(images[:, 0])
    with pytest.raises(ConfigError, match=r"\[3, 8, 8\]: this tree takes"):
        colour.encode(images[0])


def test_what_may_be_either_is_channels_first():
    model = TreeVAE(TreeSpec(3, 3, likelihood="gaussian", features=3), TOPOLOGY)
    images = np.arange(54, dtype=np.uint8).reshape(2, 3, 3, 3)
    np.testing.assert_array_equal(encoding.arranged(images, model.spec), images)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((4, 8, 9), np.uint8), "images have the shape [4, 8, 9]: this tree takes [M, 1, 8, 8]"),
        (np.zeros((4, 3, 8, 8), np.uint8), "[4, 3, 8, 8]"),
        (np.zeros((8, 8), np.uint8), "[8, 8]"),
        (np.zeros((4, 1, 8, 8, 1), np.uint8), "[4, 1, 8, 8, 1]"),
        (np.zeros((), np.uint8), "images have the shape []"),
        (np.zeros((4, 8, 8), np.int64), "images are int64: take uint8, or floats in [0, 1]"),
        (torch.zeros(4, 8, 8, dtype=torch.bool), "images are bool"),
        (np.full((4, 8, 8), 255.0), "images hold values from 255 to 255: take uint8, or floats in [0, 1]"),
        (torch.full((4, 8, 8), -0.5), "from -0.5"),
        (torch.full((4, 8, 8), torch.nan), "from nan"),
        ([[0.0]], "images are a list: take an array of numpy or torch"),
    ],
)
def test_images_that_are_not_the_trees_are_refused(run: LoadedRun, wrong: Any, words: str):
    with pytest.raises(ConfigError) as refused:
        run.encode(wrong)
    assert words in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_no_images_are_no_clusters(run: LoadedRun, images: np.ndarray):
    reach, leaf, path = run.encode(images[:0])
    assert (reach.shape, leaf.shape, path.shape) == ((0, 3), (0,), (0, 3))


def test_images_become_floats_block_by_block(run: LoadedRun, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    plain = encoding.as_floats

    def seen(images: encoding.ImageArray) -> torch.Tensor:
        sizes.append(len(images))
        return plain(images)

    monkeypatch.setattr(encoding, "as_floats", seen)
    images = np.random.default_rng(0).integers(0, 256, (2 * encoding.BLOCK + 3, 8, 8), dtype=np.uint8)
    found = run.encode(images)
    assert sizes == [encoding.BLOCK, encoding.BLOCK, 3]
    np.testing.assert_allclose(found.reach[-3:], run.encode(images[-3:]).reach, atol=1e-6)
    np.testing.assert_allclose(found.reach.sum(1), 1, atol=1e-6)


# --- drawing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"leaf": 1, "seed": 5},
        {"node": 1, "sampler": "ddpm", "steps": 5},
        {"sampler": "dpm-solver++", "grid": "uniform", "guidance": 1.5, "guidance_interval": (0.1, 2.0)},
        {"start": "recon", "batch": 4, "eta": 0.5},
        {"ema": 0.07},
        {"model": "treevae"},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_what_is_drawn_here_is_what_the_workers_write(made: Run, run: LoadedRun, options: dict[str, Any], request: Any):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # as a notebook may have them
    try:
        found = run.sample(13, **options)
    finally:
        assert torch.get_num_threads() == 2
        torch.set_num_threads(threads)
    assert_same(found, written(made, request.node.callspec.id, num=13, **options))
    assert found.images.dtype == np.uint8
    assert found.leaf.tolist() == [entry["leaf"] for entry in found.entries]


def test_a_draw_through_all_leaves(made: Run, run: LoadedRun):
    found = run.sample(3, all_leaves=True)
    assert found.leaf.tolist() == [0, 1, 2] * 3
    assert_same(found, written(made, "all", mode="sample-all-leaves", num=3))


def test_widths_one_after_the_other(made: Run, run: LoadedRun):
    first, other, again = (run.sample(4, ema=width) for width in (None, 0.05, None))
    assert_same(first, again)
    assert (first.images != other.images).any()


@pytest.mark.parametrize("options", [{}, {"node": 3}, {"leaf": 2, "sampler": "ddpm"}, {"model": "treevae"}])
def test_reconstructions_are_those_of_the_test_images(
    made: Run, run: LoadedRun, images: np.ndarray, options: dict[str, Any]
):
    name = f"reconstruct-{'-'.join(options)}"
    expected = written(made, name, mode="reconstruct", num=TEST_IMAGES, **options)
    assert_same(run.reconstruct(images, **options), expected)
    assert_same(run.reconstruct(torch.from_numpy(images[:, 0]), **options), expected)


def test_one_image_through_all_leaves(run: LoadedRun, images: np.ndarray):
    found = run.reconstruct(images[:1], all_leaves=True, model="treevae")
    assert found.leaf.tolist() == [0, 1, 2]
    np.testing.assert_allclose([entry["reach"] for entry in found.entries], run.encode(images[:1]).reach[0], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"leaf": 3}, "leaf=3 does not exist"),
        ({"node": 9}, "node=9 does not exist"),
        ({"leaf": 1, "node": 1}, "exclude each other"),
        ({"sampler": "euler"}, "sampler=euler is not known: take one of ddim, ddpm"),
        ({"grid": "cubic"}, "grid=cubic is not known"),
        ({"model": "gan"}, "model=gan is not known: take one of treediffusion, treevae"),
        ({"steps": 21}, "steps=21 cannot be used"),
        ({"all_leaves": True, "leaf": 1}, "leaf=1 has no effect"),
        ({"model": "treevae", "steps": 5}, "steps=5 has no effect with model=treevae"),
        ({"model": "treevae", "guidance": 1.0}, "guidance=1.0 has no effect with model=treevae"),
        ({"guidance": 1.0, "guidance_interval": [3.0, 1.0]}, "two rising noise levels"),
        ({"guidance_interval": [0.1, 1.0]}, "guidance_interval has no effect with guidance=0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run: LoadedRun, options: dict[str, Any], words: str):
    with pytest.raises(ConfigError) as refused:
        run.sample(2, **options)
    assert words in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_numbers_of_images_that_cannot_be(run: LoadedRun, images: np.ndarray):
    with pytest.raises(ConfigError, match=r"num=0 cannot be used: take 1 or more"):
        run.sample(0)
    with pytest.raises(ConfigError, match="images are none"):
        run.reconstruct(images[:0])
    with pytest.raises(ConfigError, match=r"values from 0 to 255"):
        run.reconstruct(images.astype(np.float32))


def test_a_tree_alone(made: Run, run: LoadedRun, images: np.ndarray, tmp_path: Path):
    shutil.copytree(made.url, tmp_path / "made")
    shutil.rmtree(tmp_path / "made" / "diffusion")
    alone = tdiff.load(str(tmp_path / "made"))
    np.testing.assert_array_equal(alone.encode(images).reach, run.encode(images).reach)
    np.testing.assert_array_equal(alone.sample(5, model="treevae").images, run.sample(5, model="treevae").images)
    for refused in (lambda: alone.sample(5), lambda: alone.reconstruct(images)):
        with pytest.raises(ConfigError, match=r"has no diffusion model yet: .* or take model=treevae\.$"):
            refused()


def test_no_run_and_a_run_without_a_tree(made: Run, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is not a run folder: it holds no run\.json"):
        tdiff.load(str(tmp_path))
    shutil.copy(Path(made.url, "run.json"), tmp_path)
    with pytest.raises(ConfigError, match=r"has no finished tree yet: finish it with python -m tdiff\.train"):
        tdiff.load(str(tmp_path))


def test_the_data_may_be_gone(made: Run, images: np.ndarray, tmp_path: Path):
    shutil.copytree(made.url, tmp_path / "made")
    Run(str(tmp_path / "made")).update(data_url=str(tmp_path / "nowhere"))
    run = tdiff.load(str(tmp_path / "made"))
    assert len(run.encode(images).leaf) == len(run.reconstruct(images).images) == TEST_IMAGES
    assert len(run.sample(2).images) == 2


def test_a_run_on_s3(made: Run, run: LoadedRun, images: np.ndarray, s3: str):
    for file in Path(made.url).rglob("*"):
        if file.is_file():
            storage.write_bytes(f"{s3}/made/{file.relative_to(made.url)}", file.read_bytes())
    there = tdiff.load(f"{s3}/made/")
    np.testing.assert_array_equal(there.encode(images).reach, run.encode(images).reach)
    assert_same(there.sample(3), run.sample(3))
