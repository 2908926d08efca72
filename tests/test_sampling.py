"""Protects that a sample is a function of (run, seed, its index, the shard's batch shape) and of nothing else.

Tiny TreeVAE and U-Net with random weights, saved as a run saves them; shards are drawn as a Ray actor draws them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors

from tdiff import storage
from tdiff.data.shards import Shard
from tdiff.data.sources import Source, Split
from tdiff.diffusion.condition import Denoiser, DenoiserSpec
from tdiff.diffusion.ema import TRACKS
from tdiff.diffusion.unet import UNetSpec
from tdiff.errors import DataError
from tdiff.packing import pack
from tdiff.results import _complete
from tdiff.tree.growth import leaf_reach
from tdiff.tree.model import TreeSpec, TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.growing import as_images, load_tree, save_tree
from tdiff.work.sampling import MODES, SampleJob, Samples, draw_shard, read_samples
from tdiff.work.snapshots import Snapshots, file_name

TOPOLOGY = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")  # leaves 3, 4, 2
PATHS = {0: [0, 1, 3], 1: [0, 1, 4], 2: [0, 2]}
TEST_IMAGES = 7

New = Callable[..., SampleJob]


def weights_of(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    """Weights away from the first ones, whose output is 0."""
    return {n: (t + 0.1 * torch.randn_like(t)).contiguous() for n, t in denoiser.state_dict().items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tree/, diffusion/ and data/ of a tiny run."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    tree = TreeVAE(TreeSpec(1, 8, features=3, latent_channels=2, feature_channels=8), TOPOLOGY)
    for parameter in tree.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # leaves that differ, routers that decide
    save_tree(str(folder / "tree"), tree)
    unet = UNetSpec(1, 8, width=8, multipliers=(1,), blocks=1, heads=1, condition_channels=1)
    spec = DenoiserSpec(unet, "recon+path", "embedding", len(TOPOLOGY.nodes), 8, null=True, timesteps=20)
    url = str(folder / "diffusion")
    kept = Snapshots(f"{url}/ema", [10, 20], "")
    kept.start(0)
    for step, width in itertools.product([10, 20], TRACKS):
        kept.write(step, str(width), weights_of(Denoiser(spec)))
    storage.write_bytes(f"{url}/ema.safetensors", save_tensors(weights_of(Denoiser(spec))))
    storage.write_text(f"{url}/unet.json", spec.to_json())
    images = np.random.default_rng(0).integers(0, 256, (TEST_IMAGES, 1, 8, 8), dtype=np.uint8)
    pack(Source("noise", {"train": Split(images, None), "test": Split(images, None)}, None), str(folder / "data"), 100)
    return folder


@pytest.fixture
def new(run: Path, tmp_path: Path) -> New:
    """A new job into a folder of its own."""
    count = itertools.count()

    def job(**settings: Any) -> SampleJob:
        defaults: dict[str, Any] = {
            "mode": "sample",
            "num": 10,
            "seed": 0,
            "batch": 4,
            "steps": 4,
            "sampler": "ddim",
            "grid": "quadratic",
            "bf16": False,
            "leaves": 3,
        }
        places = {f"{name}_url": str(run / name) for name in ("tree", "diffusion", "data")}
        return SampleJob(url=str(tmp_path / f"samples-{next(count)}"), **{**places, **defaults, **settings})

    return job


def drawn(job: SampleJob, order: list[int] | None = None) -> list[Shard]:
    """All shards of a job, drawn in this order, and its folder completed."""
    entries = {shard: draw_shard(job, shard) for shard in (order or range(job.shards))}
    shards = [entries[shard] for shard in range(job.shards)]
    _complete(job, shards)
    return shards


def contents(job: SampleJob) -> list[bytes]:
    return [Path(job.shard_url(shard)).read_bytes() for shard in range(job.shards)]


def everything(job: SampleJob) -> Samples:
    drawn(job)
    return read_samples(job.url)


def column(samples: Samples, key: str) -> list[Any]:
    return [entry[key] for entry in samples.entries]


# --- a function of its arguments ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampler", [{"sampler": "ddim"}, {"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}])
def test_the_same_bytes_in_whatever_order(new: New, mode: str, sampler: dict[str, Any]):
    settings = {"mode": mode, **sampler, "num": 5, "batch": 6}
    one, two = new(**settings), new(**settings)
    first = drawn(one)
    torch.manual_seed(99)  # nothing comes from the global generator
    torch.rand(17)
    second = drawn(two, list(range(one.shards))[::-1])
    assert one.shards == (3 if mode.endswith("all-leaves") else 1)
    assert first == second
    assert contents(one) == contents(two)
    assert Path(one.url, "manifest.json").read_bytes() == Path(two.url, "manifest.json").read_bytes()
    assert Path(one.url, "grid.png").read_bytes() == Path(two.url, "grid.png").read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_fewer_samples_are_the_first_of_more(new: New, mode: str):
    per_draw = 3 if mode.endswith("all-leaves") else 1
    many = everything(new(mode=mode, num=7, batch=6, sampler="ddpm"))
    few = everything(new(mode=mode, num=3, batch=6, sampler="ddpm"))
    kept = 3 * per_draw
    assert len(few.images) == kept
    assert len(many.images) == 7 * per_draw
    np.testing.assert_array_equal(few.images, many.images[:kept])
    np.testing.assert_array_equal(few.treevae, many.treevae[:kept])
    assert few.entries == many.entries[:kept]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch": 5},
        {"steps": 6},
        *({"sampler": sampler} for sampler in ("ddpm", "dpm-solver++", "unipc", "heun")),
        *({"grid": grid} for grid in ("uniform", "karras")),
        {"eta": 0.5},
        {"start": "recon"},
        {"guidance": 1.0},
        {"ema": 0.07},
        {"node": 1, "leaves": 2},
    ],
)
def test_what_a_sample_depends_on(new: New, change: dict[str, Any]):
    assert (everything(new()).images != everything(new(**change)).images).any()


def test_guidance_that_is_nowhere_active_changes_nothing(new: New):
    plain, nowhere = everything(new()), everything(new(guidance=1.0, guidance_interval=(1e6, 2e6)))
    np.testing.assert_array_equal(plain.images, nowhere.images)
    np.testing.assert_array_equal(plain.images, everything(new(guidance_interval=(0.0, 2.0))).images)


def test_a_width_that_was_followed_draws_from_its_last_snapshot(new: New):
    job = new(ema=TRACKS[0])
    there = everything(job)
    url = Path(job.diffusion_url)
    other = url.with_name("copied")
    other.mkdir(exist_ok=True)
    (other / "unet.json").write_bytes((url / "unet.json").read_bytes())
    (other / "ema.safetensors").write_bytes((url / "ema" / file_name(20, TRACKS[0])).read_bytes())
    np.testing.assert_array_equal(there.images, everything(new(diffusion_url=str(other))).images)


def test_no_two_draws_are_alike_within_or_between_shards(new: New):
    samples = everything(new(num=12, batch=4))
    assert len({image.tobytes() for image in samples.images}) == 12
    assert len({image.tobytes() for image in samples.treevae}) == 12


def test_a_shard_that_is_there_is_not_drawn_again(new: New):
    job = new(num=4)
    first = draw_shard(job, 0)
    assert draw_shard(job, 0) == first
    Path(job.shard_url(0)).write_bytes(b"as left by an earlier attempt")
    again = draw_shard(job, 0)
    assert again.bytes == 29
    assert again.sha256 != first.sha256
    assert Path(job.shard_url(0)).read_bytes() == b"as left by an earlier attempt"


@pytest.mark.parametrize("mode", MODES)
def test_the_tree_alone_draws_its_own_images(new: New, mode: str):
    wanted: dict[str, Any] = {"mode": mode, "num": 5, "batch": 6}
    job = new(**wanted, model="treevae", diffusion_url="nowhere")
    alone = everything(job)
    assert json.loads(Path(job.url, "manifest.json").read_text())["network_evaluations"] == 0
    if mode.endswith("all-leaves"):
        both = everything(new(**wanted))
        np.testing.assert_array_equal(alone.images, both.treevae)
        assert alone.entries == both.entries
        return
    of_leaves = [everything(new(**wanted, leaf=leaf)) for leaf in range(3)]
    reach = np.array([[float(str(entry["reach"])) for entry in one.entries] for one in of_leaves])
    for k, leaf in enumerate(reach.argmax(0)):  # the most probable leaf stands for the TreeVAE, as in the papers
        np.testing.assert_array_equal(alone.images[k], of_leaves[leaf].treevae[k])
        assert alone.entries[k] == of_leaves[leaf].entries[k]


# --- counts and entries ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shards"),
    [
        ({"num": 10, "batch": 4}, [4, 4, 2]),
        ({"num": 8, "batch": 4}, [4, 4]),
        ({"num": 1, "batch": 4}, [1]),
        ({"num": 3, "batch": 1}, [1, 1, 1]),
        ({"num": 5, "batch": 7, "mode": "sample-all-leaves"}, [6, 6, 3]),  # whole draws only
        ({"num": 2, "batch": 1, "mode": "sample-all-leaves"}, [3, 3]),
    ],
)
def test_shards_hold_what_was_asked_for(new: New, settings: dict[str, Any], shards: list[int]):
    job = new(**settings)
    assert [entry.samples for entry in drawn(job)] == shards
    samples = read_samples(job.url)
    assert len(samples.images) == len(samples.treevae) == len(samples.entries) == sum(shards)
    assert column(samples, "index") == list(range(sum(shards)))
    assert samples.images.shape[1:] == samples.treevae.shape[1:] == (1, 8, 8)
    assert samples.images.dtype == np.uint8


def test_leaf_path_and_reach_agree(new: New):
    samples = everything(new(num=24, batch=8))
    leaves = column(samples, "leaf")
    assert set(leaves) == {0, 1, 2}  # drawn from the tree's own probabilities
    assert column(samples, "path") == [PATHS[leaf] for leaf in leaves]
    assert all(0 < reach <= 1 for reach in column(samples, "reach"))
    assert column(samples, "draw") == list(range(24))
    assert set(column(samples, "seed")) == {0}


def test_leaves_come_as_often_as_the_tree_says(new: New):
    job = new(num=600, batch=600, steps=2)
    leaves = np.array(column(everything(job), "leaf"))
    shares = np.bincount(leaves, minlength=3) / len(leaves)
    tree = load_tree(job.tree_url).eval()
    with torch.no_grad():
        visits = tree.descend(20_000, torch.Generator().manual_seed(3))
    expected = np.array([float(visits[leaf].reach.mean()) for leaf in TOPOLOGY.leaves])
    np.testing.assert_allclose(shares, expected, atol=0.08)  # 4 standard errors


@pytest.mark.parametrize("mode", ["sample", "reconstruct"])
@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_a_forced_leaf_is_every_samples_leaf(new: New, mode: str, leaf: int):
    samples = everything(new(mode=mode, num=5, leaf=leaf))
    assert set(column(samples, "leaf")) == {leaf}
    assert all(path == PATHS[leaf] for path in column(samples, "path"))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_all_leaves_share_the_draw(new: New, sampler: str):
    job = new(mode="sample-all-leaves", num=5, batch=12, sampler=sampler)
    samples = everything(job)
    assert column(samples, "index") == list(range(15))
    assert column(samples, "draw") == [draw for draw in range(5) for _ in range(3)]
    assert column(samples, "leaf") == [0, 1, 2] * 5
    reach = np.array(column(samples, "reach")).reshape(5, 3)
    np.testing.assert_allclose(reach.sum(1), 1, atol=1e-5)
    # Same latents and noise for every leaf, so each is what a job with this leaf alone draws (4 draws a shard in both).
    for leaf in range(3):
        alone = everything(new(num=5, batch=4, leaf=leaf, sampler=sampler))
        np.testing.assert_array_equal(samples.images[leaf::3], alone.images)
        np.testing.assert_array_equal(samples.treevae[leaf::3], alone.treevae)
        np.testing.assert_array_equal(reach[:, leaf], column(alone, "reach"))
    assert (samples.images[0::3] != samples.images[1::3]).any()


# --- below a node ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sample", "reconstruct"])
@pytest.mark.parametrize(("node", "below"), [(0, {0, 1, 2}), (1, {0, 1}), (2, {2}), (4, {1})])
def test_samples_below_a_node_end_there(new: New, mode: str, node: int, below: set[int]):
    samples = everything(new(mode=mode, num=TEST_IMAGES, node=node, leaves=len(below)))
    assert set(column(samples, "leaf")) <= below
    assert all(node in path for path in column(samples, "path"))


def test_all_leaves_below_a_node(new: New):
    job = new(mode="sample-all-leaves", num=3, batch=4, node=1, leaves=2)
    samples = everything(job)
    assert column(samples, "leaf") == [0, 1] * 3
    assert column(samples, "index") == list(range(6))
    assert column(samples, "draw") == [0, 0, 1, 1, 2, 2]


def test_an_image_keeps_its_path_down_to_the_node(new: New):
    """The leaf of the posterior's own path, and of the prior's below the node, from the same latents above."""
    below = everything(new(mode="reconstruct", num=TEST_IMAGES, batch=9, node=4, leaves=1))
    whole = everything(new(mode="reconstruct", num=TEST_IMAGES, batch=9, leaf=1))
    np.testing.assert_array_equal(below.treevae, whole.treevae)  # nothing lies below a leaf
    redrawn = everything(new(mode="reconstruct", num=TEST_IMAGES, batch=9, node=0, leaf=1))
    assert (redrawn.treevae != whole.treevae).any()


# --- reconstruction ----------------------------------------------------------------------------------


def test_reconstructions_follow_the_test_images(new: New):
    job = new(mode="reconstruct-all-leaves", num=TEST_IMAGES, batch=9)
    samples = everything(job)
    assert column(samples, "draw") == [row for row in range(TEST_IMAGES) for _ in range(3)]
    tree = load_tree(job.tree_url).eval()
    images = np.random.default_rng(0).integers(0, 256, (TEST_IMAGES, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        expected = leaf_reach(TOPOLOGY, tree.routing(as_images(images)).numpy())
    reach = np.array(column(samples, "reach")).reshape(TEST_IMAGES, 3)
    np.testing.assert_allclose(reach, expected, atol=1e-4)


def test_reconstructions_of_one_leaf_each(new: New):
    samples = everything(new(mode="reconstruct", num=TEST_IMAGES, batch=4))
    assert column(samples, "index") == column(samples, "draw") == list(range(TEST_IMAGES))
    assert column(samples, "path") == [PATHS[leaf] for leaf in column(samples, "leaf")]


# --- reading back ------------------------------------------------------------------------------------


def test_a_sample_that_is_missing_is_noticed(new: New):
    job = new(num=8)
    drawn(job)
    shard = Path(job.shard_url(1))
    content = shard.read_bytes()
    shard.write_bytes(content[: 512 * 6])  # a tar reader takes this for the end
    with pytest.raises(DataError, match=r"shard-000001\.tar is damaged"):
        read_samples(job.url)
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        read_samples(job.url)
    shard.write_bytes(content)
    assert len(read_samples(job.url).images) == 8


def test_a_folder_is_complete_with_its_manifest_and_picture(new: New):
    job = new(num=8)
    for shard in range(job.shards):
        draw_shard(job, shard)
    assert not storage.finished(job.url)
    shards = drawn(job)
    assert storage.finished(job.url)
    manifest = json.loads(Path(job.url, "manifest.json").read_text())
    assert manifest["samples"] == 8
    assert manifest["shards"] == [dataclasses.asdict(shard) for shard in shards]
    assert manifest["job"]["seed"] == 0
    assert not any(key.endswith("url") for key in manifest["job"])
    assert Path(job.url, "grid.png").read_bytes().startswith(b"\x89PNG")


def test_the_first_samples_take_the_first_shards_alone(new: New):
    """The picture shows a hundred samples, whatever their number."""
    job = new(num=110, batch=50, steps=2)
    shards = drawn(job)
    everything, picture = read_samples(job.url), Path(job.url, "grid.png").read_bytes()
    Path(job.shard_url(2)).unlink()
    first = read_samples(job.url, most=60)
    np.testing.assert_array_equal(first.images, everything.images[:60])
    np.testing.assert_array_equal(first.treevae, everything.treevae[:60])
    assert first.entries == everything.entries[:60]
    _complete(job, shards)
    assert Path(job.url, "grid.png").read_bytes() == picture
    with pytest.raises(FileNotFoundError):
        read_samples(job.url, most=101)
