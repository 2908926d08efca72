"""The TreeVAE: a tree of latent variables over images, its prior, its posterior, its decoders.

Notation as in the TreeDiffusion paper, section 3.1, equations 1 and 2; a "variance" here is what the
paper's formulas call sigma. Images are float in [0, 1].

Legend: B batch, N nodes, L leaves, R nodes with routers, P nodes on a path, I image channels,
H image size, C feature channels, D latent channels, r feature size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdiff.tree.layers import ENCODERS, ConvBlock, GaussianHeads, Router, SlotBatchNorm, Transformation
from tdiff.tree.topology import Topology


@dataclass(frozen=True)
class TreeSpec:
    """All that a TreeVAE's networks depend on, besides the topology."""

    channels: int
    image_size: int
    encoder: Literal["cnn1", "cnn2"] = "cnn1"
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"
    features: int = 7
    latent_channels: int = 16
    feature_channels: int = 32
    size: int = 2
    residual: bool = False

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node that the chain of features can serve."""
        return self.features - 1


class Visit(NamedTuple):
    """What a pass through the tree found at one node, for a batch. Prior moments are None at the root."""

    z: Tensor  # [B, D, r, r], one sample of the posterior
    q_mean: Tensor
    q_variance: Tensor
    p_mean: Tensor | None
    p_variance: Tensor | None
    reach: Tensor  # [B], posterior probability of coming here
    q_logit: Tensor | None  # [B], of going left; None where there is no choice
    p_logit: Tensor | None


class Path(NamedTuple):
    """Latents along one root-to-leaf path per sample, padded at the end to the tree's depth."""

    z: Tensor  # [B, P, D, r, r]
    nodes: Tensor  # [B, P] breadth-first position of each node; -1 where padded
    leaf: Tensor  # [B] index of the leaf, left to right
    reach: Tensor  # [B, L] probability of every leaf


def draw(mean: Tensor, variance: Tensor, rng: torch.Generator | None) -> Tensor:
    """One reparameterised sample of N(mean, variance)."""
    noise = torch.randn(mean.shape, generator=rng, device=mean.device, dtype=mean.dtype)
    return mean + variance.sqrt() * noise


def merge(mean_hat: Tensor, variance_hat: Tensor, p_mean: Tensor, p_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Precision-weighted product of the data's Gaussian and the prior's: the posterior of a node."""
    variance = 1 / (1 / variance_hat + 1 / p_variance)
    return (mean_hat / variance_hat + p_mean / p_variance) * variance, variance


class TreeVAE(nn.Module):
    """A TreeVAE of a given topology. `nodes.ID` holds the networks of node ID, under stable names."""

    def __init__(self, spec: TreeSpec, topology: Topology):
        super().__init__()
        self.spec = spec
        self._check_depth(topology)
        self.topology = topology
        encoder, _ = ENCODERS[spec.encoder]
        self.encoder = encoder(spec.channels, spec.image_size, spec.feature_channels, spec.size)
        self.bottom_up = nn.ModuleList(
            ConvBlock(spec.feature_channels, spec.feature_channels, spec.residual) for _ in range(spec.features - 1)
        )
        self.nodes = nn.ModuleDict()
        for node in topology.nodes:
            self.nodes[str(node.id)] = self._networks(node.id)

    def _check_depth(self, topology: Topology) -> None:
        if topology.depth > self.spec.max_depth:
            raise ValueError(
                f"the tree is {topology.depth} deep, but {self.spec.features} features serve nodes down to "
                f"depth {self.spec.max_depth}: raise tree.features"
            )

    def _networks(self, node: int) -> nn.ModuleDict:
        """The networks that `node` needs where it stands in the current topology."""
        spec, networks = self.spec, nn.ModuleDict()
        hidden = spec.feature_channels
        networks["dense"] = GaussianHeads(hidden, spec.latent_channels)
        if node != 0:
            networks["transformation"] = Transformation(spec.latent_channels, hidden, spec.residual)
        if node in self.topology.deciding:
            networks.update(self._routers())
        if self.topology.is_leaf(node):
            _, decoder = ENCODERS[spec.encoder]
            networks["decoder"] = decoder(spec.latent_channels, spec.channels, spec.image_size, hidden, spec.size)
        return networks

    def _routers(self) -> dict[str, nn.Module]:
        spec, hidden = self.spec, self.spec.feature_channels
        return {
            "prior_router": Router(spec.latent_channels, hidden, spec.size),
            "posterior_router": Router(hidden, hidden, spec.size),
        }

    def _network(self, node: int, name: str) -> nn.Module:
        networks = self.nodes[str(node)]
        assert isinstance(networks, nn.ModuleDict)
        return networks[name]

    # --- growing -------------------------------------------------------------------------------

    def split(self, leaf: int, phase: str) -> list[nn.Module]:
        """Turns `leaf` into an inner node with two new leaves; returns the new networks, freshly initialised."""
        topology = self.topology.split(leaf, phase)
        self._check_depth(topology)
        self.topology, like = topology, next(self.parameters())
        networks = self.nodes[str(leaf)]
        assert isinstance(networks, nn.ModuleDict)
        del networks["decoder"]
        routers = {name: router.to(like) for name, router in self._routers().items()}
        networks.update(routers)
        new = list(routers.values())
        for child in self.topology.children(leaf):
            self.nodes[str(child)] = self._networks(child).to(like)  # type: ignore[arg-type]
            new.append(self.nodes[str(child)])
        return new

    def prune(self, leaf: int) -> None:
        """Removes `leaf`, the inner nodes it leaves childless, and the routers of nodes left with one child."""
        self.topology = self.topology.prune(leaf)
        for node in list(self.nodes):
            if int(node) not in self.topology:
                del self.nodes[node]
            elif int(node) not in self.topology.deciding:
                networks = self.nodes[node]
                assert isinstance(networks, nn.ModuleDict)
                for name in ("prior_router", "posterior_router"):
                    if name in networks:
                        del networks[name]

    def train_only(self, modules: Iterable[nn.Module]) -> None:
        """Freezes everything (evaluation mode, no gradients) but `modules`."""
        self.eval().requires_grad_(False)
        for module in modules:
            module.train().requires_grad_(True)

    # --- inference -----------------------------------------------------------------------------

    def features(self, x: Tensor) -> list[Tensor]:
        """[B, I, H, H] in [0, 1] -> bottom-up features by depth: item k, [B, C, r, r], serves the nodes of depth k."""
        chain = [self.encoder(x)]
        for block in self.bottom_up:
            chain.append(block(chain[-1]))
        return chain[::-1]

    def dense(self, node: int, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of `node` from the data alone (q-hat), [B, D, r, r] each."""
        moments: tuple[Tensor, Tensor] = self._network(node, "dense")(feature)
        return moments

    def transformation(self, node: int, z_parent: Tensor) -> tuple[Tensor, Tensor]:
        """Prior mean and variance of `node` given its parent's latent, [B, D, r, r] each."""
        moments: tuple[Tensor, Tensor] = self._network(node, "transformation")(z_parent)
        return moments

    def prior_logit(self, node: int, z: Tensor) -> Tensor:
        """[B] logit of going left from `node`, given its latent."""
        logit: Tensor = self._network(node, "prior_router")(z)
        return logit

    def posterior_logit(self, node: int, feature: Tensor) -> Tensor:
        """[B] logit of going left from `node`, given the feature of its depth."""
        logit: Tensor = self._network(node, "posterior_router")(feature)
        return logit

    def routing(self, x: Tensor) -> Tensor:
        """Posterior probability of going left at every node with a choice: [B, R], in the order `topology.deciding`."""
        depths = self.features(x)
        tree = self.topology
        if not tree.deciding:
            return x.new_zeros(len(x), 0)
        return torch.stack([self.posterior_logit(i, depths[tree[i].depth]).sigmoid() for i in tree.deciding], 1)

    def walk(self, x: Tensor, rng: torch.Generator | None = None) -> dict[int, Visit]:
        """One posterior sample at every node, with its prior, posterior and routing, for [B, I, H, H] images."""
        depths, tree = self.features(x), self.topology
        visits: dict[int, Visit] = {}
        reach = {0: x.new_ones(len(x))}
        for node in tree.top_down:
            feature, parent = depths[tree[node].depth], tree[node].parent
            q_mean, q_variance = self.dense(node, feature)
            p_mean = p_variance = None
            if parent is not None:
                p_mean, p_variance = self.transformation(node, visits[parent].z)
                q_mean, q_variance = merge(q_mean, q_variance, p_mean, p_variance)
            z = draw(q_mean, q_variance, rng)
            q_logit = p_logit = None
            left, right = tree.children(node)
            if left is not None and right is not None:
                q_logit, p_logit = self.posterior_logit(node, feature), self.prior_logit(node, z)
                reach[left] = reach[node] * q_logit.sigmoid()
                reach[right] = reach[node] * (-q_logit).sigmoid()
            elif (only := left if left is not None else right) is not None:
                reach[only] = reach[node]
            visits[node] = Visit(z, q_mean, q_variance, p_mean, p_variance, reach[node], q_logit, p_logit)
        return visits

    # --- generation ----------------------------------------------------------------------------

    def descend(self, count: int, rng: torch.Generator | None = None) -> dict[int, Visit]:
        """The same for `count` draws from the prior: reach follows the prior's routers."""
        device = next(self.parameters()).device
        shape = (count, self.spec.latent_channels, self.spec.size, self.spec.size)
        tree, visits = self.topology, dict[int, Visit]()
        reach = {0: torch.ones(count, device=device)}
        for node in tree.top_down:
            parent = tree[node].parent
            mean, variance = torch.zeros(shape, device=device), torch.ones(shape, device=device)
            if parent is not None:
                mean, variance = self.transformation(node, visits[parent].z)
            z = draw(mean, variance, rng)
            logit = None
            left, right = tree.children(node)
            if left is not None and right is not None:
                logit = self.prior_logit(node, z)
                reach[left], reach[right] = reach[node] * logit.sigmoid(), reach[node] * (-logit).sigmoid()
            elif (only := left if left is not None else right) is not None:
                reach[only] = reach[node]
            visits[node] = Visit(z, mean, variance, None, None, reach[node], None, logit)
        return visits

    def decoded(self, leaf: int, z: Tensor) -> Tensor:
        """[B, D, r, r] at leaf id `leaf` -> logits (Bernoulli) or means (Gaussian), [B, I, H, H]."""
        image: Tensor = self._network(leaf, "decoder")(z)
        return image

    def image(self, leaf: int, z: Tensor) -> Tensor:
        """[B, D, r, r] at leaf id `leaf` -> its reconstruction in [0, 1], [B, I, H, H]."""
        image = self.decoded(leaf, z)
        return image.sigmoid() if self.spec.likelihood == "bernoulli" else image.clamp(0, 1)

    def path(self, visits: dict[int, Visit], rng: torch.Generator | None = None, leaf: Tensor | None = None) -> Path:
        """Latents along one path per sample: to `leaf` [B] (indices), or to leaves drawn by the visits' reach."""
        tree = self.topology
        reach = torch.stack([visits[i].reach for i in tree.leaves], 1)  # [B, L]
        if leaf is None:
            leaf = torch.multinomial(reach.clamp_min(1e-12), 1, generator=rng).squeeze(1)
        position = {node: k for k, node in enumerate(tree.top_down)}
        table = torch.full((len(tree.leaves), tree.depth + 1), -1, device=reach.device)
        for row, node in enumerate(tree.leaves):
            places = [position[i] for i in tree.path(node)]
            table[row, : len(places)] = torch.tensor(places, device=reach.device)
        nodes = table[leaf]  # [B, P]
        latents = torch.stack([visits[i].z for i in tree.top_down], 1)  # [B, N, D, r, r]
        rows = torch.arange(len(leaf), device=reach.device)[:, None]
        return Path(latents[rows, nodes.clamp_min(0)], nodes, leaf, reach)

    def leaf_images(self, visits: dict[int, Visit]) -> Tensor:
        """Every leaf's reconstruction, [B, L, I, H, H]."""
        return torch.stack([self.image(leaf, visits[leaf].z) for leaf in self.topology.leaves], 1)

    # --- state ---------------------------------------------------------------------------------

    def to_json(self) -> str:
        """tree.json: the topology and the networks' shapes; with the tensors it is the whole model."""
        return json.dumps({"network": asdict(self.spec)})[:-1] + ", " + self.topology.to_json()[1:].lstrip()

    @staticmethod
    def from_json(text: str) -> TreeVAE:
        """A model of that shape, freshly initialised. Raises ValueError if the text is no tree.json."""
        topology = Topology.from_json(text)
        try:
            return TreeVAE(TreeSpec(**json.loads(text)["network"]), topology)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a tree.json: {error}") from error


def norms(module: nn.Module) -> Iterator[SlotBatchNorm]:
    """The slot batch norms of `module` that are in training mode."""
    return (m for m in module.modules() if isinstance(m, SlotBatchNorm) and m.training)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, each sub-module's own mode restored afterwards."""
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, was in training.items():
            m.training = was


def image_nll(decoded: Tensor, x: Tensor, likelihood: str) -> Tensor:
    """Negative log-likelihood of images [B, I, H, H], summed over pixels: [B].

    Bernoulli: binary cross entropy with logits. Gaussian: squared error, without the 1/2 (public code).
    """
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(decoded, x, reduction="none").flatten(1).sum(1)
    return (x - decoded).square().flatten(1).sum(1)
