"""The TreeVAE's objective: the negative ELBO over the whole tree, and over the sub-tree that a split adds.

METHOD.md, stage 1; TreeDiffusion paper, section 3.1. Every sum runs over pixels and latents, per sample.

Legend: B batch, D latent channels, r feature size, I image channels, H image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdiff.tree import stacked
from tdiff.tree.model import Level, TreeVAE, Walk, draw, image_nll, merge, pick

LOOP_ABOVE = 30_000
"""Image values a leaf decodes above which a CPU takes leaves one by one: large grouped convs are slow there.

16 leaves of 28x28 with 256 rows each take 189 ms together, 150 one by one; with 32 rows 25 and 32. A GPU always takes
all at once.
"""


class Elbo(NamedTuple):
    """The terms of the negative ELBO for every sample, [B] each, unweighted by alpha."""

    reconstruction: Tensor
    kl_root: Tensor
    kl_nodes: Tensor
    kl_decisions: Tensor

    def loss(self, alpha: float) -> Tensor:
        """Mean over the batch of rec + alpha * (kl_root + kl_nodes + kl_decisions): a scalar."""
        return (self.reconstruction + alpha * (self.kl_root + self.kl_nodes + self.kl_decisions)).mean()


def kl_normal(
    q_mean: Tensor,
    q_variance: Tensor,
    p_mean: Tensor | None,
    p_variance: Tensor | None,
    dims: tuple[int, ...] = (-3, -2, -1),
) -> Tensor:
    """KL(N(q) || N(p)) with diagonal variances, summed over [D, r, r], which are at `dims`; p None means N(0, I)."""
    if p_mean is None or p_variance is None:
        kl = q_variance + q_mean.square() - 1 - q_variance.log()
    else:
        kl = (q_variance + (q_mean - p_mean).square()) / p_variance - 1 + p_variance.log() - q_variance.log()
    return 0.5 * kl.sum(dims)


def kl_bernoulli(q_logit: Tensor, p_logit: Tensor) -> Tensor:
    """KL(Ber(sigmoid(q)) || Ber(sigmoid(p))), [B]; finite for any finite logits."""
    # Log-sigmoids, and sigmoid(-q) for 1 - q: no log of, and no factor that is, a rounded 0 or 1.
    left = q_logit.sigmoid() * (F.logsigmoid(q_logit) - F.logsigmoid(p_logit))
    right = (-q_logit).sigmoid() * (F.logsigmoid(-q_logit) - F.logsigmoid(-p_logit))
    return left + right


def tree_elbo(model: TreeVAE, walk: Walk, x: Tensor) -> Elbo:
    """The negative ELBO's terms for images [B, I, H, H], from one pass `model.walk(x)`."""
    kl_root, kl_nodes, kl_decisions = (x.new_zeros(len(x)) for _ in range(3))
    by_rows: dict[int, list[tuple[Level, list[int]]]] = {}  # where the leaves are, K of them at a time
    for level in walk.levels:
        kl = kl_normal(level.q_mean, level.q_variance, level.p_mean, level.p_variance, dims=(1, 2, 3))  # [n, K]
        if level.p_mean is None:
            kl_root = kl[0]
        else:
            kl_nodes = kl_nodes + _per_sample(level.reach * kl, level.rows, len(x))
        if level.choosing:
            places = [level.nodes.index(node) for node in level.choosing]
            reach, rows = pick(level.reach, places), None if level.rows is None else pick(level.rows, places)
            kl_decisions = kl_decisions + _per_sample(reach * kl_bernoulli(level.q_logit, level.p_logit), rows, len(x))
        if places := [k for k, node in enumerate(level.nodes) if model.topology.is_leaf(node)]:
            by_rows.setdefault(level.reach.shape[1], []).append((level, places))
    reconstruction = x.new_zeros(len(x))
    for parts in by_rows.values():
        leaves = [level.nodes[k] for level, places in parts for k in places]
        z = torch.cat([pick(level.z, places) for level, places in parts])  # [n, D, r, r, K]
        reach = torch.cat([pick(level.reach, places) for level, places in parts])
        rows = None
        if any(level.rows is not None for level, _ in parts):
            rows = torch.cat([pick(level.rows, places) for level, places in parts if level.rows is not None])
        reconstruction = reconstruction + _reconstruction(model, leaves, z, reach, rows, x)
    return Elbo(reconstruction, kl_root, kl_nodes, kl_decisions)


def _per_sample(terms: Tensor, rows: Tensor | None, batch: int) -> Tensor:
    """Terms [n, K] of n nodes added up for every sample, [B]; `rows` says which samples they are of, None: all."""
    if rows is None:
        return terms.sum(0)
    return terms.new_zeros(batch).index_add(0, rows.flatten(), terms.flatten())


def _reconstruction(
    model: TreeVAE, leaves: Sequence[int], z: Tensor, reach: Tensor, rows: Tensor | None, x: Tensor
) -> Tensor:
    """Sum over n leaves of reach [n, K] times nll, for every sample: [B]. z [n, D, r, r, K]."""
    together = 1 if z.device.type == "cpu" and z.shape[-1] * x[0].numel() > LOOP_ABOVE else len(leaves)
    total = x.new_zeros(len(x))
    for k in range(0, len(leaves), together):
        part = slice(k, k + together)
        decoded = model.decoded_together(leaves[part], z[part])  # [K, n, I, H, H], or its parts before a pixel shuffle
        if x.shape[-1] != decoded.shape[-1]:  # the sum over an image is that over its parts: x is shuffled back, once
            x = F.pixel_unshuffle(x, x.shape[-1] // decoded.shape[-1])
        target = x[:, None].expand(decoded.shape) if rows is None else x[rows[part].T]
        nll = image_nll(decoded, target, model.spec.likelihood).T  # [n, K]
        total = total + _per_sample(reach[part] * nll, None if rows is None else rows[part], len(x))
    return total


class Frozen(NamedTuple):
    """What the frozen part of the tree says of an image, all that training a split needs, computed once.

    The frozen networks are in evaluation mode, so none of this changes while the split trains.
    """

    reach: Tensor  # [B], probability of coming to the leaf that is split
    feature: Tensor  # [B, C, r, r], bottom-up feature of that leaf's depth
    child_feature: Tensor  # [B, C, r, r], of the new leaves' depth
    mean_hat: Tensor  # [B, P, D, r, r], q-hat of every node on the leaf's path
    variance_hat: Tensor  # [B, P, D, r, r]


def frozen_features(model: TreeVAE, leaf: int, x: Tensor) -> Frozen:
    """Passes images [B, I, H, H] through the bottom-up chain and the denses and routers of the leaf's path."""
    depths, tree = model.features(x), model.topology
    path = tree.path(leaf)
    reach = x.new_ones(len(x))
    for node, child in pairwise(path):
        if node in tree.deciding:
            logit = model.posterior_logit(node, depths[tree[node].depth])
            reach = reach * (logit if tree[child].side == "left" else -logit).sigmoid()
    means, variances = zip(*(model.dense(i, depths[tree[i].depth]) for i in path), strict=True)
    depth = tree[leaf].depth
    return Frozen(reach, depths[depth], depths[depth + 1], torch.stack(means, 1), torch.stack(variances, 1))


def path_latent(model: TreeVAE, leaf: int, frozen: Frozen, rng: torch.Generator | None) -> Tensor:
    """A fresh posterior sample of z at `leaf`, drawn down its path through the frozen transformations: [B, D, r, r]."""
    z = draw(frozen.mean_hat[:, 0], frozen.variance_hat[:, 0], rng)
    for k, node in enumerate(model.topology.path(leaf)[1:], start=1):
        prior = model.transformation(node, z)
        z = draw(*merge(frozen.mean_hat[:, k], frozen.variance_hat[:, k], *prior), rng)
    return z


def split_elbo(
    model: TreeVAE, node: int, frozen: Frozen, x: Tensor, rng: torch.Generator | None, q_logit: Tensor | None = None
) -> Elbo:
    """The terms that the two new leaves below `node` add to the negative ELBO, weighted by the reach of `node`.

    q_logit: [B] what the new router of the posterior said, if that is known already.
    """
    with torch.no_grad():
        z = path_latent(model, node, frozen, rng)
    p_logit = model.prior_logit(node, z)
    if q_logit is None:
        q_logit = model.posterior_logit(node, frozen.feature)
    left, right = model.topology.children(node)
    assert left is not None
    assert right is not None
    children = (left, right)
    z, feature = (stacked.batch_last(t)[None] for t in (z, frozen.child_feature))  # one parent, one feature for both
    p_mean, p_variance = stacked.transformations(model.networks(children, "transformation"), z)
    q_mean, q_variance = merge(*stacked.denses(model.networks(children, "dense"), feature), p_mean, p_variance)
    kl = kl_normal(q_mean, q_variance, p_mean, p_variance, dims=(1, 2, 3))  # [2, B]
    reach = frozen.reach * torch.stack([q_logit.sigmoid(), (-q_logit).sigmoid()])
    reconstruction = _reconstruction(model, children, draw(q_mean, q_variance, rng), reach, None, x)
    kl_decisions = frozen.reach * kl_bernoulli(q_logit, p_logit)
    return Elbo(reconstruction, torch.zeros_like(reconstruction), (reach * kl).sum(0), kl_decisions)
