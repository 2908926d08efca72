"""Protects what a phase hands from one step to the next: frozen features, decisions and labels, running metrics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from making import DataSet, make_set

from tdiff import storage
from tdiff.data.stream import Reader
from tdiff.errors import ConfigError
from tdiff.tree.growth import leaf_reach
from tdiff.tree.losses import frozen_features
from tdiff.tree.model import TreeSpec, TreeVAE, evaluating
from tdiff.tree.topology import Topology
from tdiff.work import growing
from tdiff.work.growing import Decisions, decisions_of, frozen_of, packed, unpacked
from tdiff.work.reading import as_images

TOPOLOGY = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")  # leaves 3, 4, 2
IMAGES = 1100  # two decision blocks and a bit


class Alone:
    """One worker of one."""

    rank, world = 0, 1

    def __init__(self) -> None:
        self.expected: list[float] = []

    def expects(self, seconds: float) -> None:
        self.expected.append(seconds)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_set(tmp_path_factory.mktemp("data"), [500, 600], shape=(1, 8, 8))


@pytest.fixture(scope="module")
def model() -> TreeVAE:
    torch.manual_seed(0)
    tree = TreeVAE(TreeSpec(1, 8, features=4, latent_channels=2, feature_channels=8), TOPOLOGY)
    for parameter in tree.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return tree


def reader(data: DataSet) -> Reader:
    return Reader(data.url, data.manifest, "train")


@pytest.mark.parametrize("leaf", [2, 3])
def test_frozen_features_come_back_as_they_were(model: TreeVAE, leaf: int):
    with evaluating(model):
        frozen = frozen_features(model, leaf, torch.rand(5, 1, 8, 8))
    again = unpacked(packed(frozen), model, leaf)
    for name, tensor in frozen._asdict().items():
        assert torch.equal(getattr(again, name), tensor), name


@pytest.mark.parametrize("on_disk", [False, True])
def test_frozen_features_are_those_of_the_members(
    model: TreeVAE, data: DataSet, on_disk: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # which is read once
    if on_disk:
        monkeypatch.setattr(growing, "FROZEN_IN_MEMORY", 1000)
    ids = np.arange(0, IMAGES, 2)
    kept = frozen_of(model, 3, reader(data), ids, Alone(), 60.0)
    assert list(tmp_path.iterdir()) == []  # what lies on disk has no name any more
    assert ("tdiff-frozen-" in Path("/proc/self/maps").read_text()) == on_disk
    assert len(kept) == len(ids)
    rows = np.array([549, 0, 511, 512])  # across blocks
    with evaluating(model):
        expected = frozen_features(model, 3, as_images(data.images[ids[rows]]))
    for name, tensor in unpacked(kept[rows], model, 3)._asdict().items():
        torch.testing.assert_close(tensor, getattr(expected, name), msg=name)


def test_a_disk_without_room_is_told_before_it_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(growing, "FROZEN_IN_MEMORY", 1000)
    with pytest.raises(ConfigError, match=r"has no room for 40000000\.0 GB of frozen features"):
        growing._storage(10**9, 10**7)


def test_the_workers_of_a_node_share_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(growing, "FROZEN_IN_MEMORY", 4000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for workers, on_disk in (("1", False), ("8", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", workers)
        kept = growing._storage(100, 10)
        assert kept.shape == (100, 10)
        assert (str(tmp_path) in Path("/proc/self/maps").read_text()) == on_disk


def test_no_number_of_images_makes_decisions_a_worker_that_hangs(model: TreeVAE, data: DataSet):
    worker = Alone()
    decisions_of(model, reader(data), worker, 7.0)
    assert worker.expected == [7.0] * 3  # once a block


def test_decisions_carry_the_labels_and_come_back(model: TreeVAE, data: DataSet, tmp_path: Path):
    found = decisions_of(model, reader(data), Alone(), 60.0)
    assert found.left.shape == (IMAGES, 2)
    assert data.labels is not None
    assert found.labels is not None
    np.testing.assert_array_equal(found.labels, data.labels)
    url = str(tmp_path)
    storage.write_bytes(f"{url}/routing.safetensors", growing.decisions_bytes({"train": found}))
    again = growing.load_decisions(url)
    assert list(again) == ["train"]
    np.testing.assert_array_equal(again["train"].left, found.left)
    np.testing.assert_array_equal(again["train"].labels, found.labels)  # type: ignore[arg-type]
    np.testing.assert_array_equal(growing.load_routing(url, "train"), found.left)


def test_decisions_on_images_without_labels_have_none(model: TreeVAE, tmp_path: Path):
    made = make_set(tmp_path, [40, 30], shape=(1, 8, 8), labelled=False)
    found = decisions_of(model, reader(made), Alone(), 60.0)
    assert found.labels is None
    url = str(tmp_path / "phase")
    storage.write_bytes(f"{url}/routing.safetensors", growing.decisions_bytes({"train": found, "test": found}))
    assert {split: d.labels for split, d in growing.load_decisions(url).items()} == {"train": None, "test": None}


def test_shares_are_the_means_of_reach():
    left = torch.rand(400, 2, dtype=torch.float64)
    reach = torch.from_numpy(leaf_reach(TOPOLOGY, left.numpy()))
    found = growing._shares(TOPOLOGY.leaves, reach.T)
    assert [float(found[f"share/{leaf}"]) for leaf in TOPOLOGY.leaves] == pytest.approx(reach.mean(0).tolist())


def test_a_batch_tells_how_many_of_its_leaves_are_effective(model: TreeVAE):
    tree = TreeVAE(model.spec, TOPOLOGY)
    layer = tree.nodes["1"]["posterior_router"].layers[-1]  # type: ignore[index]
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.bias, 7.0)  # leaf 4 holds a thousandth of what comes to node 1
    objective = growing.TreeObjective(tree, lambda step: 1.0, 0.0, 0.0)  # type: ignore[arg-type]
    _, told = objective({"images": torch.rand(64, 1, 8, 8)}, 0, torch.Generator().manual_seed(0))
    assert float(told["effective_leaves"]) == 2
    assert sum(float(told[f"share/{leaf}"]) for leaf in TOPOLOGY.leaves) == pytest.approx(1)


def test_a_phases_numbers_are_of_its_decisions():
    from tdiff.work.scoring import progress

    labels = np.repeat([0, 1, 2], 20)
    left = np.zeros((60, 2), np.float32)  # label 0 -> leaf 3, 1 -> leaf 4, 2 -> leaf 2
    left[labels < 2, TOPOLOGY.deciding.index(0)] = 1
    left[labels == 0, TOPOLOGY.deciding.index(1)] = 1
    found = progress(TOPOLOGY, {"train": Decisions(left, labels), "test": Decisions(left, None)})
    assert found == pytest.approx(
        {
            **{f"train_share/{leaf}": 1 / 3 for leaf in (3, 4, 2)},
            "train_effective_leaves": 3,
            "acc_train": 1,
            "nmi_train": 1,
        }
    )
