"""How probable images are under a TreeVAE: importance-sampled log-likelihood and ELBO, per image and per leaf.

METHOD.md, Evaluation. The generative model of an image x and its leaf l, whose path from the root is P_l:

    p(x, l, z) = N(z_0; 0, I) * prod_{i in P_l, i > 0} p(z_i | z_pa(i)) * p(l | z) * p(x | z_l)
    p(l | z)   = prod_{i in P_l with a choice} (r_p,i(z_i) or 1 - r_p,i(z_i))

The proposal draws, once per sample, the latents of ALL nodes from the posterior, parents first, and enumerates
the leaves. With K samples z^(1..K) ~ q(z | x) = q(z_0 | x) * prod_{i > 0} q(z_i | z_pa(i), x) the estimator is

    p^(x) = 1/K sum_k sum_l w_kl        w_kl = p(l | z^k) * prod_{i in P_l} [p(z_i^k | z_pa^k) / q(z_i^k | z_pa^k, x)]
                                               * p(x | z_l^k)

Unbiased: w_kl sees only the latents on P_l, and the other nodes' integrate to 1, so that

    E_q[w_kl] = int prod_{P_l} q * [p(l | z) * prod_{P_l} p / prod_{P_l} q * p(x | z_l)] dz_{P_l} = p(x, l),

and the sum over l is p(x). (That leaves share the latents of their common ancestors correlates the terms of a sum,
which no expectation minds.) The posterior's routers do not appear: a leaf drawn from q(l | x) would carry the
weight w_kl / q(l | x), and averaging that over q(l | x) exactly, as the sum does, cancels it. They do appear in the
ELBO. By Jensen E[log p^(x)] <= log p(x), rising with K; already at K = 1 it is no less than the ELBO. (The public
code sums exp(ELBO of one sample), KL terms in closed form and leaves averaged inside the exponent: that is not
unbiased, and not a bound either, so its log-likelihoods do not compare with these.)

Below the root a posterior is narrower than its prior (it is a product with it), so the weights are not bounded, and
where a decoder tells little of a latent their variance need not be finite. `effective` is the diagnostic.

What p(x | z) is. `gaussian`: a density of unit variance, with its constant: NOT the training loss, which is the
squared error without the 1/2. So the ELBO here is the bound of this likelihood, and of no use to compare with a
training loss. `bernoulli`: exp(-BCE), as in training. On pixels 0 and 1 it is a probability. On a grey value t in
between it is s^t (1 - s)^(1 - t), which is no density over [0, 1] (it does not integrate to 1): the image is read as
the probabilities t of a random binary image b, and p~(x) = int p(z) exp(E_b log p(b | z)) dz. As logsumexp is convex,
log p~(x) <= E_b log p(b): a lower bound of the mean log-probability of the binarised image. It compares between models
that use the same convention, not with models of binarised data, nor with densities.

Legend: B images, K samples, S samples in one pass, N nodes, L leaves, I image channels, H image size, D latent
channels, r feature size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdiff.tree.losses import kl_normal
from tdiff.tree.model import TreeVAE, evaluating, merge


class Likelihood(NamedTuple):
    """What K posterior samples say of every image. Natural logarithms (nats), float64, leaves left to right."""

    log_p: Tensor
    """[B] estimate of log p(x): the log of an unbiased estimate. Its own standard deviation is about
    sqrt(1/effective - 1/K)."""
    leaf_log_p: Tensor
    """[B, L] the same for log p(x, leaf); minus log_p it is the log of the model's true p(leaf | x), estimated."""
    effective: Tensor
    """[B] effective number of samples, (sum_k w_k)^2 / sum_k w_k^2 with w_k = sum_l w_kl: 1 (one sample decides,
    distrust log_p) to K (the posterior is exact)."""
    elbo: Tensor
    """[B] lower bound of log p(x), its expectation over z estimated by K samples, all else exact; with
    `bernoulli` the negative of the training loss at alpha = 1."""
    leaf_elbo: Tensor
    """[B, L] lower bound of log p(x, leaf): the ELBO of an image whose posterior goes to this leaf for certain
    (reach 1 all the way, in place of the routers'): E_q[log p(x | z_l) + log p(l | z)] - sum_{i in P_l} KL(q || p).
    elbo = sum_l q(l | x) * (leaf_elbo_l - log q(l | x))."""
    log_reach: Tensor
    """[B, L] log q(leaf | x), from the posterior's routers."""


def log_likelihood(
    model: TreeVAE, x: Tensor, *, samples: int, rng: torch.Generator, samples_per_pass: int = 1
) -> Likelihood:
    """Likelihoods and bounds of the images x [B, I, H, H] in [0, 1] from `samples` posterior samples each.

    The model is used in evaluation mode, without gradients. Memory is bounded by samples_per_pass * B images in one
    pass, whatever `samples`; `samples_per_pass` does not change the result (but for rounding), as each sample's noise
    is drawn by itself. The noise depends on B: fix the blocks of images, and give each its own `rng` (on x's device),
    where results must not depend on who computes them. Colour images want `dequantised` first.
    """
    assert samples >= 1
    assert samples_per_pass >= 1
    leaves = len(model.topology.leaves)
    with evaluating(model):
        data, log_reach = _from_data(model, x)
        # Running logs of sums: over samples, per leaf; and of the squared weights of whole samples.
        sum_leaf = x.new_full((len(x), leaves), -math.inf, dtype=torch.float64)  # [B, L]
        sum_square = sum_leaf[:, 0].clone()  # [B]
        sum_bound = torch.zeros_like(sum_leaf)
        for first in range(0, samples, samples_per_pass):
            noise = _noise(data, min(samples_per_pass, samples - first), rng)
            log_weight, bound = _one_pass(model, x, data, noise)
            sum_leaf = torch.logaddexp(sum_leaf, log_weight.logsumexp(0))
            sum_square = torch.logaddexp(sum_square, (2 * log_weight.logsumexp(2)).logsumexp(0))
            sum_bound += bound.sum(0)
    total = sum_leaf.logsumexp(1)
    leaf_elbo = sum_bound / samples
    return Likelihood(
        log_p=total - math.log(samples),
        leaf_log_p=sum_leaf - math.log(samples),
        effective=(2 * total - sum_square).exp(),
        elbo=(log_reach.exp() * (leaf_elbo - log_reach)).sum(1),
        leaf_elbo=leaf_elbo,
        log_reach=log_reach,
    )


def dequantised(x: Tensor, rng: torch.Generator) -> Tensor:
    """Pixels k/255 of [0, 1] -> (k + u)/256 in [0, 1], with u uniform in [0, 1): noise of one of 256 levels.

    The mean over u of the density's logarithm bounds that of the 8-bit image's probability from below, up to the 256
    per pixel that `bits_per_dimension` accounts for (Theis et al. 2016, "A note on the evaluation of generative
    models", section 3.1).
    """
    noise = torch.rand(x.shape, generator=rng, device=x.device, dtype=x.dtype)
    return ((x * 255).round() + noise) / 256


def bits_per_dimension(log_p: Tensor, dimensions: int) -> Tensor:
    """log p (nats) of dequantised images of `dimensions` = I H H values -> bits a value, -log2 p(x)/(I H H) + 8.

    The 8 is log2 of the 256 levels: a level is a bin 1/256 wide, with the probability density/256. A decoder of unit
    variance cannot come below 8 + log2(2 pi)/2 = 9.3257, perfect reconstructions included.
    """
    return -log_p / (math.log(2) * dimensions) + 8


def log_density(decoded: Tensor, x: Tensor, likelihood: str) -> Tensor:
    """log p(x | z) of x [..., I, H, H] from what a leaf decoded, logits or means of the same shape: [...], float64."""
    if likelihood == "bernoulli":
        per_pixel = -F.binary_cross_entropy_with_logits(decoded, x, reduction="none")
    else:
        per_pixel = -0.5 * (x - decoded).square() - 0.5 * math.log(2 * math.pi)
    return per_pixel.flatten(-3).sum(-1, dtype=torch.float64)


# --- one pass ----------------------------------------------------------------------------------

_Moments = dict[int, tuple[Tensor, Tensor]]  # of every node, [B, D, r, r] each


def _from_data(model: TreeVAE, x: Tensor) -> tuple[_Moments, Tensor]:
    """What is computed once for all samples: q-hat of every node, and log q(leaf | x) [B, L]."""
    depths, tree = model.features(x), model.topology
    data = {node: model.dense(node, depths[tree[node].depth]) for node in tree.top_down}
    log_reach = {0: x.new_zeros(len(x), dtype=torch.float64)}
    for node in tree.top_down:
        logit = model.posterior_logit(node, depths[tree[node].depth]) if node in tree.deciding else None
        log_reach |= _to_children(model, node, log_reach[node], logit)
    return data, torch.stack([log_reach[leaf] for leaf in tree.leaves], 1)


def _to_children(model: TreeVAE, node: int, log_path: Tensor, logit: Tensor | None) -> dict[int, Tensor]:
    """Log-probability of the path to each child of `node`, given that to the node and the logit of going left."""
    left, right = model.topology.children(node)
    if left is not None and right is not None:
        assert logit is not None
        logit = logit.double().reshape(log_path.shape)
        return {left: log_path + F.logsigmoid(logit), right: log_path + F.logsigmoid(-logit)}
    return {child: log_path for child in (left, right) if child is not None}


def _noise(data: _Moments, count: int, rng: torch.Generator) -> Tensor:
    """Standard normal noise [S, B, N, D, r, r] for S = `count` samples, drawn one sample after the other."""
    like = data[0][0]
    shape = (len(like), len(data), *like.shape[1:])
    return torch.stack([torch.randn(shape, generator=rng, device=like.device, dtype=like.dtype) for _ in range(count)])


def _one_pass(model: TreeVAE, x: Tensor, data: _Moments, noise: Tensor) -> tuple[Tensor, Tensor]:
    """log w_kl and the terms whose mean over k is leaf_elbo, [S, B, L] each, for the samples that `noise` makes.

    Node by node: with S * B rows a pass, every network is busy as it is.
    """
    tree, rows = model.topology, noise.shape[:2]
    z: dict[int, Tensor] = {}  # [S * B, D, r, r]
    log_ratio: dict[int, Tensor] = {}  # [S, B], of p to q along the path
    kl: dict[int, Tensor] = {}  # [S, B], along the path
    log_prior = {0: noise.new_zeros(rows, dtype=torch.float64)}  # [S, B], of the path
    for position, node in enumerate(tree.top_down):
        parent, eps = tree[node].parent, noise[:, :, position].flatten(0, 1)
        mean, variance = (moment.expand(rows + moment.shape[1:]).flatten(0, 1) for moment in data[node])
        p_mean, p_variance = torch.zeros_like(mean), torch.ones_like(variance)
        if parent is not None:  # the root takes q-hat as it is
            p_mean, p_variance = model.transformation(node, z[parent])
            mean, variance = merge(mean, variance, p_mean, p_variance)
        z[node] = mean + variance.sqrt() * eps
        # log N(z; p) - log N(z; q), where z is eps standard deviations of q from its mean.
        ratio = eps.square() - (z[node] - p_mean).square() / p_variance + variance.log() - p_variance.log()
        log_ratio[node] = 0.5 * ratio.flatten(1).sum(1, dtype=torch.float64).reshape(rows)
        kl[node] = kl_normal(mean, variance, p_mean, p_variance).double().reshape(rows)
        if parent is not None:
            log_ratio[node] += log_ratio[parent]
            kl[node] += kl[parent]
        logit = model.prior_logit(node, z[node]) if node in tree.deciding else None
        log_prior |= _to_children(model, node, log_prior[node], logit)

    log_weight, bound = [], []
    for leaf in tree.leaves:
        decoded = model.decoded(leaf, z[leaf])
        decoded = decoded.reshape(*rows, *decoded.shape[1:])  # [S, B, I, H, H]
        joint = log_density(decoded, x.expand_as(decoded), model.spec.likelihood) + log_prior[leaf]
        log_weight.append(joint + log_ratio[leaf])
        bound.append(joint - kl[leaf])
    return torch.stack(log_weight, 2), torch.stack(bound, 2)
