"""Protects the ablation and its controls: every config with every condition builds, trains, and moves every parameter.

Two steps of a few random images each through a random tree, by the loop itself (its plain back-end). In the fast test
the U-Nets are narrow; the slow one takes them as they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tdiff import engine
from tdiff.config import Config, load
from tdiff.diffusion.condition import CLUSTERS, CONDITIONS, CONTROLS, Denoiser
from tdiff.engine import Task
from tdiff.tree.model import TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import DiffusionObjective, denoiser_spec, leaf_reconstruction
from tdiff.work.labels import Labels

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPES = {
    "mnist": (1, 28),
    "fashion-mnist": (1, 28),
    "fashion-cpu-edm": (1, 28),
    "cifar10": (3, 32),
    "cifar10-edm": (3, 32),
    "celeba": (3, 64),
    "cubicc": (3, 64),
}
THREE = Topology.root_with_two_leaves("00-root").split(1, "01-split-1")


class Alone:
    """One worker of one."""

    rank, world = 0, 1

    def told_to_stop(self) -> bool:
        return False

    def expects(self, seconds: float) -> None: ...


def variant(stem: str, condition: str, *settings: str) -> Config:
    # Without a condition there is no guidance.
    return load(str(CONFIGS / f"{stem}.yaml"), [f"diffusion.condition={condition}", "samples.guidance=0", *settings])


def labels(config: Config, channels: int, size: int) -> Labels | None:
    """What a control tells: random clusters, or THREE's leaves by their breadth-first positions."""
    condition = config.diffusion.condition
    if condition not in CONTROLS:
        return None
    if clusters := CLUSTERS.get(condition):
        centres = torch.rand(clusters, channels * size * size)
        return Labels(torch.full((clusters,), 1 / clusters), torch.arange(clusters), centres)
    return Labels(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([3, 4, 2]))


def trained_two_steps(config: Config, channels: int, size: int) -> None:
    torch.manual_seed(0)
    tree = TreeVAE(config.tree_spec(channels, size), THREE)
    denoiser = Denoiser(denoiser_spec(config, tree))
    # Where anybody is told the null condition, it is half of all, and of more images: told and untold both move.
    count, dropped = (4, 0.5) if config.diffusion.condition_dropout else (2, 0.0)
    objective = DiffusionObjective(denoiser, tree, dropped, labels=labels(config, channels, size))
    for parameter in denoiser.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)  # what starts as 0 would keep what lies before it still
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    images = torch.rand(2, count, channels, size, size)
    engine.train(
        Task("diffusion", objective, lambda step, slot: {"images": images[step]}, 2, count, 1, 0, lambda step: 1e-3),
        Alone(),
    )
    assert all(p.isfinite().all() for p in denoiser.parameters())
    assert [name for name, p in denoiser.named_parameters() if torch.equal(p, before[name])] == []


@torch.no_grad()
def test_every_sample_is_reconstructed_by_its_own_leaf() -> None:
    torch.manual_seed(0)
    tree = TreeVAE(load(str(CONFIGS / "mnist.yaml"), ["tree.feature_channels=8"]).tree_spec(1, 28), THREE).eval()
    visits = tree.walk(torch.rand(20, 1, 28, 28))
    for leaf in (torch.randint(0, 3, (20,)), torch.zeros(20, dtype=torch.long)):
        expected = tree.leaf_images(visits)[torch.arange(20), leaf]
        torch.testing.assert_close(leaf_reconstruction(tree, visits, leaf), expected)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("stem", SHAPES)
def test_narrow_variants_train(stem: str, condition: str) -> None:
    narrow = ["diffusion.width=16", "tree.latent_channels=4", "tree.feature_channels=8"]
    trained_two_steps(variant(stem, condition, *narrow), *SHAPES[stem])


@pytest.mark.parametrize("dropout", [0, 0.5])
@pytest.mark.parametrize("encoding", ["index", "embedding"])
@pytest.mark.parametrize("condition", CONTROLS)
def test_controls_train(condition: str, encoding: str, dropout: float) -> None:
    narrow = ["diffusion.width=16", "tree.latent_channels=4", "tree.feature_channels=8"]
    told = [f"diffusion.condition={condition}", f"diffusion.node_encoding={encoding}"]
    dropped = [f"diffusion.condition_dropout={dropout}"]
    trained_two_steps(load(str(CONFIGS / "fashion-mnist.yaml"), [*narrow, *told, *dropped]), 1, 28)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("stem", SHAPES)
def test_variants_train_at_their_size(stem: str, condition: str) -> None:
    trained_two_steps(variant(stem, condition), *SHAPES[stem])
