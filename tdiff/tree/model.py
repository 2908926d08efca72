"""The TreeVAE: a tree of latent variables over images, its prior, its posterior, its decoders.

Notation as in the TreeDiffusion paper, section 3.1, equations 1 and 2; a "variance" here is what the
paper's formulas call sigma. Images are float in [0, 1].

Legend: B batch, N nodes, L leaves, R nodes with routers, P nodes on a path, I image channels,
H image size, C feature channels, D latent channels, r feature size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdiff.tree import stacked
from tdiff.tree.contrastive import ProjectionHeads
from tdiff.tree.layers import ENCODERS, ConvBlock, GaussianHeads, Router, SlotBatchNorm, Transformation, side
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
    projections: bool = False
    """Whether the features have heads for the contrastive term."""

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


class Level(NamedTuple):
    """Nodes of one depth that took the same number K of rows: what a pass found at all of them."""

    nodes: tuple[int, ...]
    choosing: tuple[int, ...]  # those of them with two children
    rows: Tensor | None  # [n, K] which rows of the batch each node took; None: all, in order
    z: Tensor  # [n, D, r, r, K], and so the moments; batch last, as `tdiff.tree.stacked` says
    q_mean: Tensor
    q_variance: Tensor
    p_mean: Tensor | None
    p_variance: Tensor | None
    reach: Tensor  # [n, K]
    q_logit: Tensor  # [choosing, K]
    p_logit: Tensor


class Walk(Mapping[int, Visit]):
    """A pass through the tree: the visit to every node by its id, breadth first; and all of it as `levels`.

    reach, q_logits: of all samples at all nodes, and at all nodes with a choice, breadth first. With a reach
    threshold a node's visit has the rows `levels` names, and `reach` is that after dropping.
    """

    def __init__(self, topology: Topology, levels: list[Level], reach: Tensor, q_logits: Tensor):
        self.levels = levels
        self.reach = reach  # [N, B]
        self.q_logits = q_logits  # [R, B]
        places = {node: (level, k) for level in levels for k, node in enumerate(level.nodes)}
        self._places = {node: places[node] for node in topology.top_down}

    def __getitem__(self, node: int) -> Visit:
        level, k = self._places[node]
        z, q_mean, q_variance = (stacked.batch_first(x[k]) for x in (level.z, level.q_mean, level.q_variance))
        p_mean, p_variance = (
            None if x is None else stacked.batch_first(x[k]) for x in (level.p_mean, level.p_variance)
        )
        q_logit = p_logit = None
        if node in level.choosing:
            choice = level.choosing.index(node)
            q_logit, p_logit = level.q_logit[choice], level.p_logit[choice]
        return Visit(z, q_mean, q_variance, p_mean, p_variance, level.reach[k], q_logit, p_logit)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class Path(NamedTuple):
    """Latents along one root-to-leaf path per sample, padded at the end to the tree's depth."""

    z: Tensor  # [B, P, D, r, r]
    nodes: Tensor  # [B, P] breadth-first position of each node; -1 where padded
    leaf: Tensor  # [B] index of the leaf, left to right
    reach: Tensor  # [B, L] probability of every leaf


class _Routes(NamedTuple):
    """Where the samples of a pass go, before any latent is drawn."""

    features: list[Tensor]  # of every depth, [C, r, r, B]
    logits: Tensor  # [R, B] of the posterior, breadth first
    reach: Tensor  # [N, B], breadth first
    score: Tensor | None  # [N, B], which samples a node takes first; None: all nodes take all


def pick(x: Tensor, places: Sequence[int]) -> Tensor:
    """x[places] along the first dimension, x itself where that is all of it in order."""
    return (
        x
        if list(places) == list(range(len(x)))
        else x.index_select(0, torch.tensor(places, dtype=torch.long, device=x.device))
    )


FEWEST_ROWS = 32
"""Rows that every node takes at least where a reach threshold leaves rows out: its batch norms need some."""


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
        heads = ProjectionHeads(spec.features, spec.feature_channels, spec.size) if spec.projections else None
        self.projections = heads
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
        return stacked.chain(list(self.bottom_up), self.encoder(x))[::-1]  # type: ignore[arg-type]

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
        logits = torch.cat(self._posterior_logits([stacked.batch_last(d) for d in self.features(x)]))
        order = [self.topology.choosing.index(node) for node in self.topology.deciding]
        return pick(logits, order).T.sigmoid()

    def walk(
        self,
        x: Tensor,
        rng: torch.Generator | None = None,
        reach_threshold: float = 0.0,
        features: Sequence[Tensor] | None = None,
    ) -> Walk:
        """One posterior sample at every node, with its prior, posterior and routing, for [B, I, H, H] images.

        features: what `self.features(x)` gave, if that is known already.

        The nodes of one depth pass together. The noise is drawn depth by depth, for [nodes, D, r, r, B].

        `reach_threshold` > 0 leaves those samples out of a node that come to it with less, so that the cost follows the
        leaves that a sample really visits; 0 is exact. What that changes:

        - All samples still pass the routers of the posterior, which is cheap: their batch norms see what they see in
          the exact pass, and routing means the same.
        - Of two children the less probable one is dropped where its reach is below the threshold, and the sample goes
          to the other for certain. So reach still sums to 1 over the leaves: a loss with terms merely left out would
          pay the routers for sending samples where nothing is counted.
        - The other networks of a node take K rows: the samples that reach it and, to fill up, those that came nearest
          to it. K is the next power of two, at least `FEWEST_ROWS`. Fillers have reach 0 and add nothing to any term,
          but they keep the batch norms of a node with three samples from being noise. Those statistics are thus of the
          samples that count and a few like them, no longer of the whole slot, most of which weighs nothing there.
        """
        tree = self.topology
        chain = [stacked.batch_last(d) for d in features or self.features(x)]  # [C, r, r, B] each
        logits = self._posterior_logits(chain)
        reach = self._reach(logits, len(x), reach_threshold)
        score, take = None, dict.fromkeys(tree.top_down, len(x))
        if reach_threshold > 0:
            with torch.no_grad():
                # Who reaches a node comes before who does not, and among those who do not the nearest.
                score = torch.where(reach > 0, 1 + reach, self._reach(logits, len(x), 0.0))
            # The one thing here that a GPU has to be waited for.
            for node, count in zip(tree.top_down, (reach > 0).sum(1).tolist(), strict=True):
                take[node] = min(len(x), max(FEWEST_ROWS, 1 << (count - 1).bit_length()))
        routes = _Routes(chain, torch.cat(logits), reach, score)
        levels = above = [self._visit((0,), None, None, routes, rng)]
        for nodes in tree.levels[1:]:
            counts = sorted({take[node] for node in nodes}, reverse=True)
            alike = [self._rows([node for node in nodes if take[node] == k], k, above, routes) for k in counts]
            above = [self._visit(*those, routes, rng) for those in alike]
            levels = levels + above
        return Walk(tree, levels, routes.reach, routes.logits)

    def _posterior_logits(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits of going left at the nodes with a choice, for every depth [R of the depth, B]: all samples at all."""
        logits = []
        for feature, nodes in zip(features, self.topology.levels, strict=False):
            choosing = [node for node in nodes if node in self.topology.choosing]
            logits.append(
                stacked.routers(self.networks(choosing, "posterior_router"), feature[None])
                if choosing
                else feature.new_zeros(0, feature.shape[-1])
            )
        return logits

    def _reach(self, logits: Sequence[Tensor], batch: int, threshold: float) -> Tensor:
        """Reach [N, B] of all nodes, breadth first, from the logits of every depth; less than the threshold is 0."""
        tree = self.topology
        one = logits[0].new_ones(1, batch)
        reach = [one]
        for logit, nodes, below in zip(logits, tree.levels, tree.levels[1:], strict=False):
            choosing = [node for node in nodes if node in tree.choosing]
            left, right = logit.sigmoid(), (-logit).sigmoid()  # [R of the depth, B]
            if threshold > 0:
                here = pick(reach[-1], [nodes.index(node) for node in choosing])
                no_left, no_right = (here * left < threshold) & (left < right), (here * right < threshold)
                no_right = no_right & (right <= left)
                left = left.masked_fill(no_left, 0).masked_fill(no_right, 1)
                right = right.masked_fill(no_right, 0).masked_fill(no_left, 1)
            ways, way, parent = torch.cat([left, right, one]), [], []  # the last one: where there is no choice
            for child in below:
                above = tree[child].parent
                assert above is not None
                side = 0 if tree[child].side == "left" else len(choosing)
                way.append(choosing.index(above) + side if above in choosing else 2 * len(choosing))
                parent.append(nodes.index(above))
            reach.append(pick(reach[-1], parent) * pick(ways, way))
        return torch.cat(reach)

    def _rows(
        self, nodes: Sequence[int], count: int, above: Sequence[Level], routes: _Routes
    ) -> tuple[tuple[int, ...], Tensor, Tensor | None]:
        """`count` rows K for each of n nodes of one depth, whose parents are in `above`.

        The nodes in the order of `above`, the latents [n, D, r, r, K] of their parents, and which rows of the batch
        these are, [n, K]; None: all.
        """
        tree, ordered, latents, taken = self.topology, list[int](), list[Tensor](), list[Tensor]()
        for parents in above:
            children = [node for node in nodes if tree[node].parent in parents.nodes]
            if not children:
                continue
            ordered += children
            places = [parents.nodes.index(self._parent(node)) for node in children]
            z, rows = pick(parents.z, places), None if parents.rows is None else pick(parents.rows, places)
            if routes.score is not None and count < z.shape[-1]:
                score = pick(routes.score, [tree.top_down.index(node) for node in children])
                best = (score if rows is None else score.gather(1, rows)).topk(count).indices  # [n, K] of parents' rows
                rows = best if rows is None else rows.gather(1, best)
                z = z.gather(-1, best[:, None, None, None].expand(*z.shape[:-1], count))
            latents.append(z)
            if rows is not None:
                taken.append(rows)
        return tuple(ordered), side(latents), side(taken) if taken else None

    def _visit(
        self,
        nodes: tuple[int, ...],
        z_parent: Tensor | None,
        rows: Tensor | None,
        routes: _Routes,
        rng: torch.Generator | None,
    ) -> Level:
        """Visits nodes of one depth with the rows that `_rows` chose."""
        tree = self.topology
        choosing = tuple(node for node in nodes if node in tree.choosing)
        places = [nodes.index(node) for node in choosing]
        reach = pick(routes.reach, [tree.top_down.index(node) for node in nodes])  # [n, B]
        q_logit = pick(routes.logits, [tree.choosing.index(node) for node in choosing])
        feature = routes.features[tree[nodes[0]].depth][None]  # [1, C, r, r, B], one for all nodes
        p_mean = p_variance = None
        if rows is not None:
            reach = reach.gather(1, rows)
            q_logit = q_logit.gather(1, pick(rows, places))
            shape = feature.shape[1:-1]
            feature = feature[0].flatten(0, 2).T.index_select(0, rows.flatten())  # [n K, C r r]
            feature = feature.unflatten(0, rows.shape).transpose(1, 2).unflatten(1, shape)  # [n, C, r, r, K]
        q_mean, q_variance = stacked.denses(self.networks(nodes, "dense"), feature)
        if z_parent is not None:
            p_mean, p_variance = stacked.transformations(self.networks(nodes, "transformation"), z_parent)
            q_mean, q_variance = merge(q_mean, q_variance, p_mean, p_variance)
        z = draw(q_mean, q_variance, rng)
        p_logit = q_logit
        if choosing:
            p_logit = stacked.routers(self.networks(choosing, "prior_router"), pick(z, places))
        return Level(nodes, choosing, rows, z, q_mean, q_variance, p_mean, p_variance, reach, q_logit, p_logit)

    def _parent(self, node: int) -> int:
        parent = self.topology[node].parent
        assert parent is not None
        return parent

    def networks(self, nodes: Iterable[int], name: str) -> list[Any]:
        """The networks of one name, such as `decoder`, of several nodes."""
        return [self._network(node, name) for node in nodes]

    # --- generation ----------------------------------------------------------------------------

    def descend(self, count: int, rng: torch.Generator | None = None) -> dict[int, Visit]:
        """The same for `count` draws from the prior: reach follows the prior's routers."""
        device = next(self.parameters()).device
        shape = (count, self.spec.latent_channels, self.spec.size, self.spec.size)
        mean, variance = torch.zeros(shape, device=device), torch.ones(shape, device=device)
        reach = torch.ones(count, device=device)
        return self.redrawn_below(0, {0: self._drawn(0, mean, variance, reach, rng)}, rng)

    def redrawn_below(
        self, node: int, visits: Mapping[int, Visit], rng: torch.Generator | None = None
    ) -> dict[int, Visit]:
        """Visits in which everything below `node` is drawn anew from the prior, given what `visits` found at `node`.

        Reach there is that of whoever comes to `node`.

        With the visits of an image's `walk`: what else there is in the part of the tree that it came to.
        """
        found = dict(visits)
        # However improbable the node is: its own reach would round that of the nodes below to nothing.
        found[node] = found[node]._replace(reach=torch.ones_like(found[node].reach))
        for child in self.topology.top_down:
            if child != node and node in self.topology.path(child):
                parent = found[self._parent(child)]
                reach = parent.reach
                if parent.p_logit is not None:
                    side = parent.p_logit if self.topology[child].side == "left" else -parent.p_logit
                    reach = reach * side.sigmoid()
                found[child] = self._drawn(child, *self.transformation(child, parent.z), reach, rng)
        return found

    def _drawn(self, node: int, mean: Tensor, variance: Tensor, reach: Tensor, rng: torch.Generator | None) -> Visit:
        """A visit to `node` by a draw from its prior."""
        z = draw(mean, variance, rng)
        logit = self.prior_logit(node, z) if node in self.topology.deciding else None
        return Visit(z, mean, variance, None, None, reach, None, logit)

    def decoded_together(self, leaves: Sequence[int], z: Tensor) -> Tensor:
        """Several leaves' logits or means, [n, D, r, r, B] -> [B, n, I, H, H].

        Where their decoder ends with a pixel shuffle by s, it is left to the caller: [B, n, I s s, H/s, H/s].
        """
        decoders = self.networks(leaves, "decoder")
        y = z.permute(4, 0, 1, 2, 3).flatten(1, 2)  # [B, n D, r, r]
        images: Tensor = type(decoders[0]).stacked(decoders, y)
        return images.view(len(images), len(leaves), -1, *images.shape[2:])

    def decoded(self, leaf: int, z: Tensor) -> Tensor:
        """[B, D, r, r] at leaf id `leaf` -> logits (Bernoulli) or means (Gaussian), [B, I, H, H]."""
        image: Tensor = self._network(leaf, "decoder")(z)
        return image

    def image(self, leaf: int, z: Tensor) -> Tensor:
        """[B, D, r, r] at leaf id `leaf` -> its reconstruction in [0, 1], [B, I, H, H]."""
        image = self.decoded(leaf, z)
        return image.sigmoid() if self.spec.likelihood == "bernoulli" else image.clamp(0, 1)

    def path(
        self,
        visits: Mapping[int, Visit],
        rng: torch.Generator | None = None,
        leaf: Tensor | None = None,
        within: int = 0,
        likeliest: bool = False,
    ) -> Path:
        """Latents along one path per sample: to `leaf` [B] (indices), or to leaves drawn by the visits' reach (with
        `likeliest` to those of largest reach), among those below the node `within`.
        """
        tree = self.topology
        reach = torch.stack([visits[i].reach for i in tree.leaves], 1)  # [B, L]
        if leaf is None:
            open_to = torch.tensor([within in tree.path(i) for i in tree.leaves], device=reach.device)
            weights = reach.clamp_min(1e-12) * open_to
            leaf = weights.argmax(1) if likeliest else torch.multinomial(weights, 1, generator=rng).squeeze(1)
        position = {node: k for k, node in enumerate(tree.top_down)}
        table = torch.full((len(tree.leaves), tree.depth + 1), -1, device=reach.device)
        for row, node in enumerate(tree.leaves):
            places = [position[i] for i in tree.path(node)]
            table[row, : len(places)] = torch.tensor(places, device=reach.device)
        nodes = table[leaf]  # [B, P]
        latents = torch.stack([visits[i].z for i in tree.top_down], 1)  # [B, N, D, r, r]
        rows = torch.arange(len(leaf), device=reach.device)[:, None]
        return Path(latents[rows, nodes.clamp_min(0)], nodes, leaf, reach)

    def leaf_images(self, visits: Mapping[int, Visit]) -> Tensor:
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
    """Negative log-likelihood of images [..., I, H, H], summed over pixels: [...].

    Bernoulli: binary cross entropy with logits. Gaussian: squared error, without the 1/2 (public code).
    """
    if likelihood == "bernoulli":
        return F.binary_cross_entropy_with_logits(decoded, x, reduction="none").flatten(-3).sum(-1)
    return (x - decoded).square().flatten(-3).sum(-1)
