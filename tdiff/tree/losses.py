"""The TreeVAE's objective: the negative ELBO over the whole tree, and over the sub-tree that a split adds.

METHOD.md, stage 1; TreeDiffusion paper, section 3.1. Every sum runs over pixels and latents, per sample.

Legend: B batch, D latent channels, r feature size, I image channels, H image size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdiff.tree.model import TreeVAE, Visit, draw, image_nll, merge


class Elbo(NamedTuple):
    """The terms of the negative ELBO for every sample, [B] each, unweighted by alpha."""

    reconstruction: Tensor
    kl_root: Tensor
    kl_nodes: Tensor
    kl_decisions: Tensor

    def loss(self, alpha: float) -> Tensor:
        """Mean over the batch of rec + alpha * (kl_root + kl_nodes + kl_decisions): a scalar."""
        return (self.reconstruction + alpha * (self.kl_root + self.kl_nodes + self.kl_decisions)).mean()


def kl_normal(q_mean: Tensor, q_variance: Tensor, p_mean: Tensor | None, p_variance: Tensor | None) -> Tensor:
    """KL(N(q) || N(p)) with diagonal variances, summed over [D, r, r]; p None means N(0, I). Returns [B]."""
    if p_mean is None or p_variance is None:
        kl = q_variance + q_mean.square() - 1 - q_variance.log()
    else:
        kl = (q_variance + (q_mean - p_mean).square()) / p_variance - 1 + p_variance.log() - q_variance.log()
    return 0.5 * kl.flatten(1).sum(1)


def kl_bernoulli(q_logit: Tensor, p_logit: Tensor) -> Tensor:
    """KL(Ber(sigmoid(q)) || Ber(sigmoid(p))), [B]; finite for any finite logits."""
    # Log-sigmoids, and sigmoid(-q) for 1 - q: no log of, and no factor that is, a rounded 0 or 1.
    left = q_logit.sigmoid() * (F.logsigmoid(q_logit) - F.logsigmoid(p_logit))
    right = (-q_logit).sigmoid() * (F.logsigmoid(-q_logit) - F.logsigmoid(-p_logit))
    return left + right


def tree_elbo(model: TreeVAE, visits: dict[int, Visit], x: Tensor) -> Elbo:
    """The negative ELBO's terms for images [B, I, H, H], from one pass `visits = model.walk(x)`."""
    zero = x.new_zeros(len(x))
    reconstruction, kl_nodes, kl_decisions = zero, zero, zero
    for node, visit in visits.items():
        if node != 0:
            kl = kl_normal(visit.q_mean, visit.q_variance, visit.p_mean, visit.p_variance)
            kl_nodes = kl_nodes + visit.reach * kl
        if visit.q_logit is not None and visit.p_logit is not None:
            kl_decisions = kl_decisions + visit.reach * kl_bernoulli(visit.q_logit, visit.p_logit)
        if model.topology.is_leaf(node):
            nll = image_nll(model.decoded(node, visit.z), x, model.spec.likelihood)
            reconstruction = reconstruction + visit.reach * nll
    root = visits[0]
    return Elbo(reconstruction, kl_normal(root.q_mean, root.q_variance, None, None), kl_nodes, kl_decisions)


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


def split_elbo(model: TreeVAE, node: int, frozen: Frozen, x: Tensor, rng: torch.Generator | None) -> Elbo:
    """The terms that the two new leaves below `node` add to the negative ELBO, weighted by the reach of `node`."""
    with torch.no_grad():
        z = path_latent(model, node, frozen, rng)
    q_logit, p_logit = model.posterior_logit(node, frozen.feature), model.prior_logit(node, z)
    reconstruction = kl_nodes = x.new_zeros(len(x))
    for child, logit in zip(model.topology.children(node), (q_logit, -q_logit), strict=True):
        assert child is not None
        reach = frozen.reach * logit.sigmoid()
        p_mean, p_variance = model.transformation(child, z)
        q_mean, q_variance = merge(*model.dense(child, frozen.child_feature), p_mean, p_variance)
        decoded = model.decoded(child, draw(q_mean, q_variance, rng))
        reconstruction = reconstruction + reach * image_nll(decoded, x, model.spec.likelihood)
        kl_nodes = kl_nodes + reach * kl_normal(q_mean, q_variance, p_mean, p_variance)
    kl_decisions = frozen.reach * kl_bernoulli(q_logit, p_logit)
    return Elbo(reconstruction, torch.zeros_like(reconstruction), kl_nodes, kl_decisions)
