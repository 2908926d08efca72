"""Protects what the U-Net is told: the path's sum, padding, the null condition per sample, no idle parameter."""

from __future__ import annotations

import json

import pytest
import torch

from tdiff.diffusion.condition import CONDITIONS, NODE_ENCODINGS, Denoiser, DenoiserSpec, NodeEncoding, PathEncoder
from tdiff.diffusion.unet import UNetSpec
from tdiff.tree.model import Path, TreeSpec, TreeVAE
from tdiff.tree.topology import Topology

torch.set_num_threads(1)

D, R, NODES = 3, 2, 7
LATENT = D * R * R


def a_path(seed: int = 0) -> Path:
    """Four samples in a tree of depth 2 (nodes breadth first), one of them at a leaf of depth 1."""
    rng = torch.Generator().manual_seed(seed)
    nodes = torch.tensor([[0, 1, 3], [0, 2, -1], [0, 1, 4], [0, 1, 3]])
    leaf = torch.tensor([0, 2, 1, 0])
    return Path(torch.randn(4, 3, D, R, R, generator=rng), nodes, leaf, torch.full((4, 3), 1 / 3))


def a_spec(condition: str, node_encoding: NodeEncoding = "index", null: bool = False) -> DenoiserSpec:
    beside = 1 if CONDITIONS[condition].recon else 0
    unet = UNetSpec(1, 8, 8, (1, 2), (4,), blocks=1, heads=2, dropout=0, condition_channels=beside)
    return DenoiserSpec(unet, condition, node_encoding, NODES, LATENT, null)


def awake(module: torch.nn.Module) -> torch.nn.Module:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return module


def encoder(name: str, node_encoding: NodeEncoding = "index", null: bool = False) -> PathEncoder:
    torch.manual_seed(0)
    return PathEncoder(CONDITIONS[name], 16, node_encoding, NODES, LATENT, null)


def test_the_eight_conditions() -> None:
    assert len(CONDITIONS) == 8
    for name, told in CONDITIONS.items():
        parts = set(name.split("+"))
        flags = {flag for flag in ("recon", "leaf", "latent", "path") if getattr(told, flag)}
        assert flags == parts - {"none"}


@pytest.mark.parametrize("node_encoding", NODE_ENCODINGS)
@pytest.mark.parametrize("name", [name for name, told in CONDITIONS.items() if told.embeds])
def test_condition_against_a_plain_loop(name: str, node_encoding: NodeEncoding) -> None:
    net, path, told = encoder(name, node_encoding), a_path(), CONDITIONS[name]
    expected = []
    for sample in range(4):
        steps = [(path.z[sample, k].flatten(), int(i)) for k, i in enumerate(path.nodes[sample]) if i >= 0]
        y = torch.zeros(16)
        for z, node in steps if told.path else steps[-1:]:
            if told.latent or told.path:
                assert net.f_embed is not None
                y = y + net.f_embed(z)
            if told.leaf or told.path:
                assert net.f_node is not None
                by_index = net.node_vectors is None
                y = y + net.f_node(torch.tensor([float(node)]) if by_index else net.node_vectors.weight[node])
        expected.append(y)
    torch.testing.assert_close(net(path), torch.stack(expected))


@pytest.mark.parametrize("name", ["path", "leaf+latent"])
def test_padding_says_nothing(name: str) -> None:
    net, path = encoder(name), a_path()
    z, pad = path.z.clone(), torch.full((4, 2), -1)
    z[1, 2] = 1e3
    longer = Path(
        torch.cat([z, 1e3 * torch.ones(4, 2, D, R, R)], 1), torch.cat([path.nodes, pad], 1), path.leaf, path.reach
    )
    torch.testing.assert_close(net(longer), net(path))


def test_paths_of_a_real_tree_fit() -> None:
    tree = TreeVAE(
        TreeSpec(1, 8, features=3, latent_channels=D, feature_channels=8), Topology.root_with_two_leaves("root")
    )
    tree.split(1, "split").clear()
    tree.eval()
    rng = torch.Generator().manual_seed(0)
    path = tree.path(tree.descend(5, rng), rng)
    assert encoder("path")(path).shape == (5, 16)
    spec = a_spec("path")
    assert len(tree.topology.nodes) <= spec.nodes
    assert Denoiser(spec)(torch.randn(5, 1, 8, 8), torch.arange(5), path).shape == (5, 1, 8, 8)


@pytest.mark.parametrize("name", ["path", "recon+leaf"])
def test_null_condition_is_per_sample(name: str) -> None:
    net, path = awake(encoder(name, null=True)), a_path()
    drop = torch.tensor([True, False, False, True])
    y, full = net(path, drop), net(path)
    assert net.null is not None
    assert torch.equal(y[drop], net.null.expand(2, -1))
    assert torch.equal(y[~drop], full[~drop])
    with pytest.raises(ValueError, match="no null condition"):
        encoder(name)(path, drop)


def test_autocast_does_not_blur_node_indices() -> None:
    net, path = encoder("path"), a_path()
    high = path._replace(nodes=torch.tensor([[256]] * 4), z=path.z[:, :1])
    with torch.autocast("cpu", torch.bfloat16):
        y, other = net(high), net(high._replace(nodes=high.nodes + 1))
    assert y.dtype == torch.float32
    assert not torch.equal(y, other)


@pytest.mark.parametrize("node_encoding", NODE_ENCODINGS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_parameter_gets_a_gradient(condition: str, node_encoding: NodeEncoding) -> None:
    torch.manual_seed(0)
    for null in {False, condition != "none"}:
        net = awake(Denoiser(a_spec(condition, node_encoding, null)))
        drop = torch.tensor([True, False, False, False]) if null else None
        net(
            torch.randn(4, 1, 8, 8), torch.tensor([0, 5, 400, 999]), a_path(), torch.rand(4, 1, 8, 8), drop
        ).square().sum().backward()
        idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []


def test_null_has_a_gradient_even_when_nothing_is_dropped() -> None:
    net = Denoiser(a_spec("path", null=True))
    net(torch.randn(4, 1, 8, 8), torch.zeros(4), a_path()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_reconstruction_enters_as_minus_one_to_one() -> None:
    net = awake(Denoiser(a_spec("recon")))
    x, t, recon = torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.rand(2, 1, 8, 8)
    assert torch.equal(net(x, t, recon=recon), net.unet(x, t, None, 2 * recon - 1))
    assert torch.equal(net(x, t, recon=recon * 10), net(x, t, recon=(recon * 10).clamp(0, 1)))


@pytest.mark.parametrize("condition", ["recon", "recon+path"])
def test_who_is_told_nothing_sees_no_reconstruction_either(condition: str) -> None:
    net = awake(Denoiser(a_spec(condition, null=True)))
    x, t, recon = torch.randn(4, 1, 8, 8), torch.arange(4), torch.rand(4, 1, 8, 8)
    drop = torch.tensor([True, False, False, True])
    told, other = net(x, t, a_path(), recon, drop), net(x, t, a_path(), 1 - recon, drop)
    assert torch.equal(told[drop], other[drop])
    assert not torch.equal(told[~drop], other[~drop])
    assert torch.equal(told[~drop], net(x, t, a_path(), recon)[~drop])


def test_same_seed_same_denoiser_same_output() -> None:
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        net = awake(Denoiser(a_spec("path")))
        outputs.append(net(torch.ones(4, 1, 8, 8), torch.arange(4), a_path()))
    assert torch.equal(*outputs)


def test_missing_inputs_are_named() -> None:
    x, t = torch.randn(4, 1, 8, 8), torch.zeros(4)
    with pytest.raises(ValueError, match="'path' needs path"):
        Denoiser(a_spec("path"))(x, t)
    with pytest.raises(ValueError, match=r"'recon\+path' needs recon"):
        Denoiser(a_spec("recon+path"))(x, t, a_path())
    with pytest.raises(ValueError, match=r"'recon\+path' needs path"):
        Denoiser(a_spec("recon+path"))(x, t, None, x)
    with pytest.raises(ValueError, match="no null condition"):
        Denoiser(a_spec("none"))(x, t, drop=torch.ones(4, dtype=torch.bool))


def test_spec_survives_json() -> None:
    for condition in CONDITIONS:
        spec = a_spec(condition, "embedding")
        assert DenoiserSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"condition": "tree"}, "condition is 'tree'"),
        ({"condition": "recon+path"}, "condition_channels is 0, but must be 1"),
        ({"condition": "none", "null": True}, "null is set"),
        ({"node_encoding": "sine"}, "node_encoding is 'sine'"),
        ({"nodes": 0}, "nodes is 0"),
        ({"latent_size": 0}, "latent_size is 0"),
        ({"layers": 3}, "unknown entry 'layers'"),
        ({"unet": None}, "no entry 'unet'"),
        ({"unet": {}}, "missing"),
        ({"nodes": "many"}, "not a unet.json"),
    ],
)
def test_a_wrong_unet_json_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserSpec.from_json(json.dumps({**json.loads(a_spec("path").to_json()), **change}))


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a unet\.json"):
        DenoiserSpec.from_json(text)
