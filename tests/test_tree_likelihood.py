"""Protects the log-likelihood: that the importance samples estimate p(x) of the tree, and nothing beside it.

Two toy trees have the interface of a TreeVAE and a known p(x). In the linear Gaussian one it is a mixture of
Gaussians, one per leaf, by Gaussian algebra. In the other nothing is linear, the routers read the latents and pixels
are Bernoulli; its latents have one dimension, so quadrature over a grid of a path's latents gives p(x). Their
posteriors are deliberately poor, or the estimate would be right whatever the weights. A real TreeVAE's terms are then
held against its own walk and its own ELBO.

All in float64 unless a test says otherwise.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch import nn

from tdiff.tree import likelihood
from tdiff.tree.layers import Router, SlotBatchNorm
from tdiff.tree.likelihood import bits_per_dimension, dequantised, log_density, log_likelihood
from tdiff.tree.losses import tree_elbo
from tdiff.tree.model import TreeSpec, TreeVAE, norms
from tdiff.tree.topology import Topology

FOUR_LEAVES = Topology.root_with_two_leaves("init").split(1, "a").split(3, "b")  # leaves 5, 6, 4, 2
WITH_CHAIN = FOUR_LEAVES.split(2, "c").prune(4)  # 1 -> 3 only: leaves 5, 6, 7, 8
THREE_LEAVES = Topology.root_with_two_leaves("init").split(1, "a")  # leaves 3, 4, 2
ONE_LEAF = Topology.root_with_two_leaves("init").prune(1)
TREES = pytest.mark.parametrize("topology", [FOUR_LEAVES, WITH_CHAIN], ids=["four leaves", "one-child node"])

PIXELS = 4  # images of 1x2x2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Toy(nn.Module):
    """What `log_likelihood` uses of a TreeVAE, bottom-up features being the pixels themselves."""

    def __init__(self, topology: Topology, kind: str):
        super().__init__()
        self.topology = topology
        self.spec = SimpleNamespace(likelihood=kind)

    def features(self, x):
        return [x.flatten(1)] * (self.topology.depth + 1)


class Linear(Toy):
    """p(z_i | z_pa) = N(A_i z + b_i, v_i), routers that are fixed numbers, x | z_l ~ N(W_l z + c_l, 1); D = 2."""

    def __init__(self, topology: Topology, prior_proposal: bool = False):
        super().__init__(topology, "gaussian")
        ids = topology.top_down
        self.prior_proposal = prior_proposal
        self.a, self.b = {i: 0.5 * randn(2, 2) for i in ids}, {i: randn(2) for i in ids}
        self.v = {i: randn(2).exp() for i in ids}
        self.p_logit, self.q_logit = ({i: 0.7 * randn() for i in topology.deciding} for _ in range(2))
        self.w, self.c = {i: 0.5 * randn(PIXELS, 2) for i in ids}, {i: 0.7 * randn(PIXELS) for i in ids}
        # Off, but no narrower than 5/6 of the prior's variance: the weights' variance is finite, their error known.
        self.g, self.h = (
            {i: 0.1 * randn(2, PIXELS) for i in ids},
            {i: 5 * self.v[i] if i else self.v[i] + 1 for i in ids},
        )

    def dense(self, node, feature):
        mean, variance = feature @ self.g[node].T, self.h[node].expand(len(feature), 2)
        if self.prior_proposal:  # what says nothing leaves the prior alone in the product
            mean, variance = torch.zeros_like(mean), torch.ones_like(variance) * (1e18 if node else 1)
        return mean[..., None, None], variance[..., None, None]

    def transformation(self, node, z):
        mean = z[..., 0, 0] @ self.a[node].T + self.b[node]
        return mean[..., None, None], self.v[node].expand_as(mean)[..., None, None]

    def prior_logit(self, node, z):
        return self.p_logit[node].expand(len(z))

    def posterior_logit(self, node, feature):
        return self.q_logit[node].expand(len(feature))

    def decoded(self, leaf, z):
        return (z[..., 0, 0] @ self.w[leaf].T + self.c[leaf]).reshape(-1, 1, 2, 2)

    def exact(self, x):
        """log p(x, leaf), [B, L]."""
        logs, tree = [], self.topology
        for leaf in tree.leaves:
            log_prior, mean, covariance = 0.0, torch.zeros(2).double(), torch.eye(2).double()
            for node, child in pairwise(tree.path(leaf)):
                if node in tree.deciding:
                    p = self.p_logit[node].sigmoid()
                    log_prior += (p if tree[child].side == "left" else 1 - p).log()
                mean = self.a[child] @ mean + self.b[child]
                covariance = self.a[child] @ covariance @ self.a[child].T + self.v[child].diag()
            mean = self.w[leaf] @ mean + self.c[leaf]
            covariance = self.w[leaf] @ covariance @ self.w[leaf].T + torch.eye(PIXELS).double()
            logs.append(log_prior + D.MultivariateNormal(mean, covariance).log_prob(x.flatten(1)))
        return torch.stack(logs, 1)

    def images(self, count: int):
        """Noise round the images of every leaf."""
        return torch.cat([0.7 * randn(count, 1, 2, 2) + self.c[leaf].reshape(1, 2, 2) for leaf in self.topology.leaves])


class Curved(Toy):
    """Transformations, variances and routers that bend with z, Bernoulli pixels; D = 1."""

    def __init__(self, topology: Topology):
        super().__init__(topology, "bernoulli")
        ids = topology.top_down
        self.a, self.b, self.w, self.g = ({i: randn(n) for i in ids} for n in (1, 1, PIXELS, PIXELS))

    def dense(self, node, feature):
        mean = (feature @ self.g[node]).tanh().reshape(-1, 1, 1, 1)
        return mean, 3 + mean.square()  # wide, as above

    def transformation(self, node, z):
        return (z * 2 + self.a[node]).sin() + self.b[node], 0.2 + (z * self.a[node]).sigmoid()

    def prior_logit(self, node, z):
        return (2 * z + self.b[node]).flatten()

    def posterior_logit(self, node, feature):
        return feature @ self.w[node]

    def decoded(self, leaf, z):
        return (2 * z.reshape(-1, 1) * self.w[leaf] + self.b[leaf]).reshape(-1, 1, 2, 2)

    def exact(self, x, cells: int = 120, reach: float = 7.0):
        """log p(x, leaf), [B, L]: forward along the path on a grid of latents, one matrix a node."""
        tree = self.topology
        grid = torch.linspace(-reach, reach, cells, dtype=torch.float64)
        step, z = grid[1] - grid[0], grid.reshape(-1, 1, 1, 1)
        logs = []
        for leaf in tree.leaves:
            mass = D.Normal(0.0, 1.0).log_prob(grid).exp() * step
            for node, child in pairwise(tree.path(leaf)):
                if node in tree.deciding:
                    left = self.prior_logit(node, z).sigmoid()
                    mass = mass * (left if tree[child].side == "left" else 1 - left)
                mean, variance = (m.reshape(-1, 1) for m in self.transformation(child, z))
                mass = mass @ (D.Normal(mean, variance.sqrt()).log_prob(grid[None]).exp() * step)
            logit, pixels = self.decoded(leaf, z).reshape(1, -1, PIXELS), x.reshape(-1, 1, PIXELS)
            terms = pixels * F.logsigmoid(logit) + (1 - pixels) * F.logsigmoid(-logit)
            logs.append((terms.sum(2).exp() @ mass).log())
        return torch.stack(logs, 1)


def copies(x: torch.Tensor, count: int) -> torch.Tensor:
    """One image many times: as many independent estimates."""
    return x.expand(count, -1, -1, -1)


# --- against known p(x) --------------------------------------------------------------------------


@TREES
@pytest.mark.parametrize("prior_proposal", [False, True], ids=["poor posterior", "prior"])
def test_linear_gaussian_tree(topology, prior_proposal):
    toy = Linear(topology, prior_proposal)
    x = toy.images(3)
    exact = toy.exact(x)
    assert ((exact - exact.logsumexp(1, keepdim=True)).exp().mean(0) > 0.02).all(), "every leaf must count"
    got = log_likelihood(toy, x, samples=40_000, rng=generator(), samples_per_pass=2000)
    assert (got.effective > 200).all(), "or the tolerance below is no promise"
    assert got.effective.min() < 20_000, "a posterior this good would hide a wrong weight"
    error = (1 / got.effective - 1 / 40_000).sqrt()
    assert ((got.log_p - exact.logsumexp(1)).abs() < 4 * error).all()
    assert error.max() < 0.07
    likely = exact > exact.amax(1, keepdim=True) - 3  # `effective` speaks of the sum, so of the leaves that make it
    assert ((got.leaf_log_p - exact)[likely].abs() < 0.2).all()
    close(got.leaf_log_p.logsumexp(1), got.log_p)


@TREES
def test_curved_tree(topology):
    toy = Curved(topology)
    x = torch.cat([torch.rand(4, 1, 2, 2, dtype=torch.float64), torch.rand(4, 1, 2, 2, dtype=torch.float64).round()])
    exact = toy.exact(x)
    close(toy.exact(x, 160, 9.0), exact, atol=1e-6, rtol=0)
    got = log_likelihood(toy, x, samples=40_000, rng=generator(), samples_per_pass=2000)
    error = (1 / got.effective - 1 / 40_000).sqrt()
    assert error.max() < 0.02
    assert ((got.log_p - exact.logsumexp(1)).abs() < 4 * error).all()
    close(got.leaf_log_p, exact, atol=0.1, rtol=0)


def test_the_probabilities_of_all_binary_images_sum_to_one():
    toy = Curved(THREE_LEAVES)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * PIXELS).reshape(-1, 1, 2, 2)
    got = log_likelihood(toy, x, samples=20_000, rng=generator(), samples_per_pass=2000)
    error = (got.log_p.exp().square() / got.effective).sum().sqrt()
    assert error < 0.01
    assert abs(got.log_p.exp().sum() - 1) < 4 * error


def test_a_grey_image_scores_below_the_mean_of_its_binarisations():
    """What the docstring says of real-valued pixels under `bernoulli`."""
    toy = Curved(THREE_LEAVES)
    binary = torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * PIXELS).reshape(-1, 1, 2, 2)
    x = torch.tensor([0.1, 0.7, 0.4, 0.95]).double().reshape(1, 1, 2, 2)
    share = (x * binary + (1 - x) * (1 - binary)).flatten(1).prod(1)
    mean = (share * toy.exact(binary).logsumexp(1)).sum()
    assert log_likelihood(toy, x, samples=5000, rng=generator()).log_p.item() < mean - 0.01


def test_the_estimate_is_unbiased_and_its_log_rises_with_the_samples_to_the_truth():
    toy = Linear(THREE_LEAVES)
    x = toy.images(1)[:1]
    exact, means, previous = toy.exact(x).logsumexp(1), [], -math.inf
    for samples in (1, 4, 16, 64):
        got = log_likelihood(toy, copies(x, 4000), samples=samples, rng=generator(samples))
        ratio = (got.log_p - exact).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(4000), "E[p^(x)] = p(x) for every K"
        means.append(got.log_p.mean())
        assert means[-1] > previous + 4 * got.log_p.std() / math.sqrt(4000)
        previous = means[-1]
        assert got.elbo.mean() < means[0] - 4 * got.elbo.std() / math.sqrt(4000), "the ELBO is below even K = 1"
    assert exact - 0.1 < means[-1] < exact


@TREES
@pytest.mark.parametrize("kind", [Linear, Curved])
def test_elbo_bounds_the_likelihood_of_image_and_leaf(kind, topology):
    toy = kind(topology)
    x = torch.rand(8, 1, 2, 2, dtype=torch.float64)
    exact = toy.exact(x)
    got = log_likelihood(toy, x, samples=4000, rng=generator(), samples_per_pass=500)
    assert (got.elbo < exact.logsumexp(1)).all()
    assert (got.leaf_elbo < exact).all()
    q = got.log_reach.exp()
    close(q.sum(1), torch.ones(8, dtype=torch.float64))
    close(got.elbo, (q * got.leaf_elbo).sum(1) - (q * got.log_reach).sum(1))
    assert (got.leaf_elbo.logsumexp(1) > got.elbo).all(), "routers of the posterior other than the best lose"


class Exact(Toy):
    """One path, D = 1, with the very posterior: p(x | z) is a Gaussian of z, which q-hat of the leaf is."""

    a, v, w = 0.6, 0.4, torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)

    def __init__(self):
        super().__init__(ONE_LEAF, "gaussian")

    def dense(self, node, feature):
        precision = self.w @ self.w
        mean, variance = (feature @ self.w / precision).reshape(-1, 1, 1, 1), 1 / precision
        if node == 0:  # the leaf's likelihood carried up through z_1 = a z_0 + noise, times the root's N(0, 1)
            up = self.a**2 / (variance + self.v)
            mean, variance = mean / self.a * up / (1 + up), 1 / (1 + up)
        return mean, variance.expand_as(mean)

    def transformation(self, node, z):
        return self.a * z, torch.full_like(z, self.v)

    def decoded(self, leaf, z):
        return (z.reshape(-1, 1) * self.w).reshape(-1, 1, 2, 2)


def test_with_the_true_posterior_one_sample_is_exact():
    """Then every weight is p(x): nothing is left to chance, and bound, estimate and truth are one."""
    x = randn(5, 1, 2, 2)
    variance = Exact.a**2 + Exact.v
    covariance = variance * torch.outer(Exact.w, Exact.w) + torch.eye(PIXELS).double()
    truth = D.MultivariateNormal(torch.zeros(PIXELS).double(), covariance).log_prob(x.flatten(1))
    got = log_likelihood(Exact(), x, samples=1, rng=generator())
    close(got.log_p, truth)
    many = log_likelihood(Exact(), x, samples=50, rng=generator(), samples_per_pass=7)
    close(many.log_p, truth)
    close(many.effective, torch.full((5,), 50.0, dtype=torch.float64))
    # A bound holds for every z only in the mean; over many z it meets the truth.
    close(log_likelihood(Exact(), x, samples=40_000, rng=generator(), samples_per_pass=4000).elbo, truth, atol=0.05)
    assert not many.log_reach.any()


def test_effective_samples():
    toy = Linear(THREE_LEAVES)
    x = toy.images(2)
    one = log_likelihood(toy, x, samples=1, rng=generator())
    close(one.effective, torch.ones(len(x), dtype=torch.float64))
    rng, weights = generator(5), []
    for _ in range(20):
        weights.append(log_likelihood(toy, x, samples=1, rng=rng).log_p.exp())
    w = torch.stack(weights)
    got = log_likelihood(toy, x, samples=20, rng=generator(5), samples_per_pass=6)
    close(got.effective, w.sum(0).square() / w.square().sum(0))
    close(got.log_p, w.mean(0).log())


# --- the real model ----------------------------------------------------------------------------

GREY = TreeSpec(1, 8, features=5, latent_channels=3, feature_channels=8, size=2)
COLOUR = TreeSpec(3, 8, "cnn2", "gaussian", features=5, latent_channels=3, feature_channels=8, size=2, residual=True)
SPECS = pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])


def lively(spec: TreeSpec, topology: Topology) -> TreeVAE:
    """A tree in float64 and evaluation mode, norms near what images make of them, routers that decide."""
    tree = TreeVAE(spec, topology).double().train()
    with torch.no_grad():
        for router in (m for m in tree.modules() if isinstance(m, Router)):
            router.layers[-1].weight.mul_(10)
        x = pictures(spec, 64)
        tree_elbo(tree, tree.walk(x), x)
        for norm in norms(tree):
            norm.running_mean.copy_(norm.slot_mean + 0.1 * norm.slot_var.sqrt())
            norm.running_var.copy_(norm.slot_var * 0.9)
            norm.slots_seen = 0
    return tree.eval()


def pictures(spec: TreeSpec, count: int = 5) -> torch.Tensor:
    """Noise of a brightness of its own in every image: samples that are far apart."""
    brightness = torch.rand(count, 1, 1, 1, dtype=torch.float64)
    return brightness * torch.rand(count, spec.channels, spec.image_size, spec.image_size, dtype=torch.float64)


@pytest.fixture
def noise_of_the_walk(monkeypatch):
    """Makes the one sample of a likelihood that of some visits: gives the function that says which."""

    def use(tree, visits):
        eps = [(visits[i].z - visits[i].q_mean) / visits[i].q_variance.sqrt() for i in tree.topology.top_down]
        monkeypatch.setattr(likelihood, "_noise", lambda data, count, rng: torch.stack(eps, 1)[None])

    return use


@SPECS
@TREES
@torch.no_grad()
def test_weights_are_those_of_the_model_s_own_walk(spec, topology, noise_of_the_walk):
    tree, x = lively(spec, topology), pictures(spec)
    visits = tree.walk(x, generator())
    noise_of_the_walk(tree, visits)
    got = log_likelihood(tree, x, samples=1, rng=generator())

    def log_normal(z, mean, variance):
        return D.Independent(D.Normal(mean, variance.sqrt()), 3).log_prob(z)

    for column, leaf in enumerate(topology.leaves):
        expected = torch.zeros(len(x), dtype=torch.float64)
        path = topology.path(leaf)
        for node in path:
            v = visits[node]
            p_mean = torch.zeros_like(v.z) if v.p_mean is None else v.p_mean
            p_variance = torch.ones_like(v.z) if v.p_variance is None else v.p_variance
            expected += log_normal(v.z, p_mean, p_variance) - log_normal(v.z, v.q_mean, v.q_variance)
        for node, child in pairwise(path):
            if visits[node].p_logit is not None:
                left = torch.tensor(float(topology[child].side == "left")).double()
                expected += D.Bernoulli(logits=visits[node].p_logit).log_prob(left)
        decoded = tree.decoded(leaf, visits[leaf].z)
        if spec.likelihood == "bernoulli":
            p = decoded.sigmoid()
            expected += (x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2, 3))
        else:
            expected += log_normal(x, decoded, torch.ones_like(x))
        close(got.leaf_log_p[:, column], expected, rtol=1e-7)
        close(got.log_reach[:, column].exp(), visits[leaf].reach)
    assert got.log_reach.exp().std(0).max() > 0.01


@TREES
@torch.no_grad()
def test_elbo_is_the_negative_of_the_training_loss_on_grey_images(topology, noise_of_the_walk):
    tree, x = lively(GREY, topology), pictures(GREY)
    visits = tree.walk(x, generator())
    noise_of_the_walk(tree, visits)
    got = log_likelihood(tree, x, samples=1, rng=generator())
    close(got.elbo, -sum(tree_elbo(tree, visits, x)))


@torch.no_grad()
def test_elbo_of_colour_images_has_the_density_s_half_and_constant(noise_of_the_walk):
    tree, x = lively(COLOUR, FOUR_LEAVES), pictures(COLOUR)
    visits = tree.walk(x, generator())
    noise_of_the_walk(tree, visits)
    training = tree_elbo(tree, visits, x)
    density = -0.5 * training.reconstruction - 0.5 * 3 * 8 * 8 * math.log(2 * math.pi)
    expected = density - training.kl_root - training.kl_nodes - training.kl_decisions
    close(log_likelihood(tree, x, samples=1, rng=generator()).elbo, expected)


@SPECS
def test_passes_of_any_size_give_the_same(spec):
    tree, x = lively(spec, FOUR_LEAVES).float(), pictures(spec).float()
    whole = log_likelihood(tree, x, samples=12, rng=generator(3), samples_per_pass=12)
    for size in (1, 5, 100):
        part = log_likelihood(tree, x, samples=12, rng=generator(3), samples_per_pass=size)
        for a, b in zip(whole, part, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    other = log_likelihood(tree, x, samples=12, rng=generator(4))
    assert not torch.equal(other.log_p, whole.log_p)
    assert whole.log_p.dtype == torch.float64


def test_the_model_and_the_random_state_are_left_as_they_were():
    tree, x = lively(GREY, FOUR_LEAVES).train(), pictures(GREY)
    tree.nodes["5"].eval()
    before, state = {k: v.clone() for k, v in tree.state_dict().items()}, torch.get_rng_state()
    log_likelihood(tree, x, samples=3, rng=generator())
    assert torch.equal(state, torch.get_rng_state())
    assert tree.training
    assert not tree.nodes["5"].training
    assert all(torch.equal(v, before[k]) for k, v in tree.state_dict().items())
    assert not any(m.slots_seen for m in tree.modules() if isinstance(m, SlotBatchNorm))


def test_routers_that_are_sure_leave_everything_finite():
    tree, x = lively(GREY, FOUR_LEAVES).float(), pictures(GREY).float()
    with torch.no_grad():
        for router in (m for m in tree.modules() if isinstance(m, Router)):
            router.layers[-1].weight.zero_()
            router.layers[-1].bias.fill_(-1e4)
    got = log_likelihood(tree, x, samples=4, rng=generator())
    assert all(part.isfinite().all() for part in got)
    torch.testing.assert_close(got.log_p, got.leaf_log_p[:, 3])  # all go right, to leaf 2
    torch.testing.assert_close(got.elbo, got.leaf_elbo[:, 3])


# --- units ---------------------------------------------------------------------------------------


def test_bits_per_dimension_by_hand():
    assert bits_per_dimension(torch.tensor(0.0), 3072).item() == 8, "density 1 on [0, 1]: all 256 levels alike"
    assert bits_per_dimension(torch.tensor(-12 * math.log(2)), 12).item() == pytest.approx(9)
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    perfect = bits_per_dimension(log_density(x, x, "gaussian"), 48)
    close(perfect, torch.full((2,), 8 + 0.5 * math.log2(2 * math.pi), dtype=torch.float64))
    close(perfect, torch.full((2,), 9.3257, dtype=torch.float64), atol=1e-4)
    off = bits_per_dimension(log_density(x + 0.1, x, "gaussian"), 48)
    close(off - perfect, torch.full((2,), 0.5 * 0.01 / math.log(2), dtype=torch.float64))


def test_log_density_is_that_of_torch():
    x, decoded = torch.rand(2, 4, 3, 5, 5, dtype=torch.float64), randn(2, 4, 3, 5, 5)
    close(log_density(decoded, x, "gaussian"), D.Independent(D.Normal(decoded, 1.0), 3).log_prob(x))
    binary = D.Independent(D.Bernoulli(logits=decoded), 3).log_prob(x.round())
    close(log_density(decoded, x.round(), "bernoulli"), binary)


def test_dequantised_pixels_fill_their_level_evenly():
    levels = torch.arange(256).repeat(1000)
    x = dequantised(levels.float().reshape(1000, 1, 16, 16) / 255, generator()).flatten()
    assert x.min() >= 0
    assert x.max() <= 1
    inside = x.double() * 256 - levels
    assert inside.min() >= 0
    assert inside.max() <= 1
    assert abs(inside.mean() - 0.5) < 4 / math.sqrt(12 * 256_000)
    assert abs(inside.var() - 1 / 12) < 0.001
