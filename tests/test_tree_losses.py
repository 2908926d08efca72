"""Protects the objective: every term of the negative ELBO, over a whole tree and over the part a split adds.

Closed forms are held against torch.distributions and Monte Carlo; the ELBO of a small unbalanced tree against
an enumeration of all its root-to-leaf paths that shares no code with the model's walk; the split's objective
against the difference of two whole trees. What growing and pruning must leave alone is compared bit by bit.

All in float64 with random batch-norm statistics, in evaluation mode unless a test says otherwise.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F

from tdiff.tree import losses, model
from tdiff.tree.layers import Router, SlotBatchNorm
from tdiff.tree.losses import Elbo, frozen_features, kl_bernoulli, kl_normal, path_latent, split_elbo, tree_elbo
from tdiff.tree.model import TreeSpec, TreeVAE, image_nll, merge, norms
from tdiff.tree.topology import Topology

torch.set_num_threads(1)

GREY = TreeSpec(1, 8, features=5, latent_channels=3, feature_channels=8, size=2)
COLOUR = TreeSpec(3, 8, "cnn2", "gaussian", features=5, latent_channels=3, feature_channels=8, size=2, residual=True)
SPECS = pytest.mark.parametrize("spec", [GREY, COLOUR], ids=["grey", "colour"])

FOUR_LEAVES = Topology.root_with_two_leaves("init").split(1, "a").split(3, "b")  # leaves 5, 6, 4, 2
WITH_CHAIN = FOUR_LEAVES.split(2, "c").prune(4)  # 1 -> 3 only: leaves 5, 6, 7, 8
TREES = pytest.mark.parametrize("topology", [FOUR_LEAVES, WITH_CHAIN], ids=["four leaves", "one-child node"])

EPS = 0.7
"""The noise of `same_noise`: every latent is mean + EPS * standard deviation."""


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def same_noise(monkeypatch):
    """Makes every draw, in both modules, a fixed function of its moments."""

    def draw(mean, variance, rng):
        return mean + EPS * variance.sqrt()

    monkeypatch.setattr(model, "draw", draw)
    monkeypatch.setattr(losses, "draw", draw)


def calibrate(tree: TreeVAE, modules: list[torch.nn.Module]) -> None:
    """Sets the batch norms of `modules` near what images make of them, so that samples differ at every node."""
    tree.double().eval()
    with torch.no_grad():
        for tensor in (p for module in modules for p in module.parameters()):
            tensor.add_(torch.randn_like(tensor) * 0.1)
        for router in (m for module in modules for m in module.modules() if isinstance(m, Router)):
            router.layers[-1].weight.mul_(5)
        for module in modules:
            module.train()
        x = images(tree.spec, 64)
        tree_elbo(tree, tree.walk(x), x)
        for norm in list(norms(tree)):
            norm.running_mean.copy_(norm.slot_mean + 0.1 * norm.slot_var.sqrt())
            norm.running_var.copy_(norm.slot_var * 0.9)
            norm.slots_seen = 0
    tree.eval()


def lively(tree: TreeVAE) -> TreeVAE:
    """The tree in float64 and evaluation mode, weights and statistics away from their initial values."""
    calibrate(tree, [tree])
    return tree


def images(spec: TreeSpec, count: int = 6) -> torch.Tensor:
    """Noise of a brightness and contrast of its own in every image: samples that are far apart."""
    noise = torch.rand(count, spec.channels, spec.image_size, spec.image_size, dtype=torch.float64)
    low, span = torch.rand(2, count, 1, 1, 1, dtype=torch.float64)
    return low + (1 - low) * span * noise


def normal(mean, variance):
    return D.Independent(D.Normal(mean, variance.sqrt()), 3)


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


# --- closed forms ------------------------------------------------------------------------------


def moments(count: int = 4):
    shape = (count, 3, 2, 2)
    return [f(torch.randn(shape, dtype=torch.float64)) for f in (torch.clone, torch.exp) * 2]


def test_kl_normal_is_that_of_torch():
    q_mean, q_variance, p_mean, p_variance = moments()
    expected = D.kl_divergence(normal(q_mean, q_variance), normal(p_mean, p_variance))
    close(kl_normal(q_mean, q_variance, p_mean, p_variance), expected)
    standard = normal(torch.zeros_like(q_mean), torch.ones_like(q_mean))
    close(kl_normal(q_mean, q_variance, None, None), D.kl_divergence(normal(q_mean, q_variance), standard))
    close(kl_normal(q_mean, q_variance, q_mean, q_variance), torch.zeros(4, dtype=torch.float64))


def test_kl_normal_is_the_mean_log_ratio():
    q_mean, q_variance, p_mean, p_variance = (m[:1] for m in moments())
    q, p = normal(q_mean, q_variance), normal(p_mean, p_variance)
    z = q.sample((100_000,))
    ratio = (q.log_prob(z) - p.log_prob(z)).squeeze(1)
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - kl_normal(q_mean, q_variance, p_mean, p_variance)) < 4 * error


def test_kl_normal_is_not_clamped():
    """The public code clamps each node's KL to [-1, 1000]; ours stays the KL."""
    mean = torch.full((1, 3, 2, 2), 100.0)
    assert kl_normal(mean, torch.ones_like(mean), None, None).item() == pytest.approx(0.5 * 12 * 100**2)


def test_kl_bernoulli_is_that_of_torch():
    grid = torch.linspace(-12, 12, 25, dtype=torch.float64)
    q, p = (g.flatten() for g in torch.meshgrid(grid, grid, indexing="ij"))
    close(kl_bernoulli(q, p), D.kl_divergence(D.Bernoulli(logits=q), D.Bernoulli(logits=p)))
    close(kl_bernoulli(q, q), torch.zeros_like(q))


def test_kl_bernoulli_is_the_mean_log_ratio():
    q, p = D.Bernoulli(logits=torch.tensor(0.8)), D.Bernoulli(logits=torch.tensor(-0.5))
    left = q.sample((200_000,))
    ratio = q.log_prob(left) - p.log_prob(left)
    error = ratio.std() / math.sqrt(len(ratio))
    assert abs(ratio.mean() - kl_bernoulli(q.logits, p.logits)) < 4 * error


def test_kl_bernoulli_is_finite_and_so_are_its_gradients_at_extreme_logits():
    extreme = torch.tensor([-1e30, -1e4, -90.0, -17.0, 0.0, 17.0, 90.0, 1e4, 1e30])
    q, p = (g.flatten().requires_grad_() for g in torch.meshgrid(extreme, extreme, indexing="ij"))
    kl = kl_bernoulli(q, p)
    assert kl.isfinite().all()
    assert kl[extreme.numel() - 1].item() == pytest.approx(1e30), "sure of the wrong side: the prior's log-odds"
    kl.sum().backward()
    assert q.grad.isfinite().all()
    assert p.grad.isfinite().all()


def test_kl_bernoulli_treats_left_and_right_alike():
    grid = torch.tensor([-1e3, -40.0, -20.0, -3.0, 0.0, 3.0, 20.0, 40.0, 1e3])
    q, p = (g.flatten() for g in torch.meshgrid(grid, grid, indexing="ij"))
    torch.testing.assert_close(kl_bernoulli(q, p), kl_bernoulli(-q, -p), rtol=1e-4, atol=0)
    assert (kl_bernoulli(q, p) >= 0).all()


def test_kl_normal_is_finite_at_the_floor_of_the_variance():
    floor, mean = torch.full((1, 3, 2, 2), 1e-6), torch.ones(1, 3, 2, 2)
    for q_variance, p_variance in ((floor, mean), (mean, floor), (floor, floor)):
        assert kl_normal(mean, q_variance, -mean, p_variance).isfinite().all()


def test_merge_is_the_normalised_product_of_two_normals():
    a_mean, a_variance, b_mean, b_variance = moments()
    mean, variance = merge(a_mean, a_variance, b_mean, b_variance)
    close(variance, a_variance * b_variance / (a_variance + b_variance))
    close(mean, (a_mean * b_variance + b_mean * a_variance) / (a_variance + b_variance))
    # The product of the densities is that of the merged one up to a factor that z does not enter.
    z = torch.randn(50, *mean.shape, dtype=torch.float64)
    gap = D.Normal(a_mean, a_variance.sqrt()).log_prob(z) + D.Normal(b_mean, b_variance.sqrt()).log_prob(z)
    gap = gap - D.Normal(mean, variance.sqrt()).log_prob(z)
    close(gap, gap[:1].expand_as(gap), rtol=1e-7, atol=1e-7)


def test_merge_follows_the_surer_side_and_stays_finite():
    one, tiny, huge = (torch.full((1, 3, 2, 2), v) for v in (1.0, 1e-6, 1e6))
    torch.testing.assert_close(merge(one, tiny, -one, huge)[0], one)
    torch.testing.assert_close(merge(one, huge, -one, tiny)[0], -one)
    assert all(m.isfinite().all() for m in merge(one, tiny, -one, tiny))


def test_image_nll():
    x, decoded = images(GREY), torch.randn(6, 1, 8, 8, dtype=torch.float64) * 5
    expected = F.binary_cross_entropy(decoded.sigmoid(), x, reduction="none").sum((1, 2, 3))
    close(image_nll(decoded, x, "bernoulli"), expected)
    binary = x.round()
    close(image_nll(decoded, binary, "bernoulli"), -D.Bernoulli(logits=decoded).log_prob(binary).sum((1, 2, 3)))
    x, decoded = images(COLOUR), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    close(image_nll(decoded, x, "gaussian"), ((x - decoded) ** 2).sum((1, 2, 3)))  # no 1/2, as the public code
    assert image_nll(torch.full((1, 1, 8, 8), 1e4), torch.zeros(1, 1, 8, 8), "bernoulli").item() == 64e4


# --- the whole tree ----------------------------------------------------------------------------


def path_terms(tree: TreeVAE, leaf: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """One root-to-leaf path on its own: its probability and its terms, from the networks and torch.distributions.

    The decisions enter as the log ratio of the path's probabilities under posterior and prior, whose
    expectation over the leaves is the sum of the decisions' KLs.
    """
    shape, path = tree.topology, tree.topology.path(leaf)
    chain = [tree.encoder(x)]
    for block in tree.bottom_up:
        chain.append(block(chain[-1]))
    kl_nodes = log_q = log_p = torch.zeros(len(x), dtype=torch.float64)
    kl_root = z = None
    for depth, node in enumerate(path):
        networks, feature = tree.nodes[str(node)], chain[len(chain) - 1 - depth]
        mean, variance = networks["dense"](feature)
        if z is None:
            kl_root = D.kl_divergence(normal(mean, variance), normal(torch.zeros_like(mean), torch.ones_like(mean)))
        else:
            p_mean, p_variance = networks["transformation"](z)
            total = variance + p_variance
            mean, variance = (mean * p_variance + p_mean * variance) / total, variance * p_variance / total
            kl_nodes = kl_nodes + D.kl_divergence(normal(mean, variance), normal(p_mean, p_variance))
        z = mean + EPS * variance.sqrt()
        children = [c for c in shape.children(node) if c is not None]
        if len(children) == 2:
            went_left = torch.full((len(x),), float(path[depth + 1] == children[0]), dtype=torch.float64)
            log_q = log_q + D.Bernoulli(logits=networks["posterior_router"](feature)).log_prob(went_left)
            log_p = log_p + D.Bernoulli(logits=networks["prior_router"](z)).log_prob(went_left)
    decoded = tree.nodes[str(leaf)]["decoder"](z)
    if tree.spec.likelihood == "bernoulli":
        # -log of x s + (1 - x)(1 - s) in logits: a rounded sigmoid would lose the digits that are compared.
        rec = (torch.logaddexp(torch.zeros_like(decoded), decoded) - x * decoded).sum((1, 2, 3))
    else:
        rec = (x - decoded).square().sum((1, 2, 3))
    return {"q": log_q.exp(), "rec": rec, "root": kl_root, "nodes": kl_nodes, "decisions": log_q - log_p}


@SPECS
@TREES
@torch.no_grad()
def test_tree_elbo_is_the_expectation_over_all_paths(spec, topology, same_noise):
    tree, x = lively(TreeVAE(spec, topology)), images(spec)
    elbo = tree_elbo(tree, tree.walk(x), x)
    paths = [path_terms(tree, leaf, x) for leaf in topology.leaves]
    close(sum(p["q"] for p in paths), torch.ones(6, dtype=torch.float64))
    assert all(p["q"].mean() > 1e-2 for p in paths), "every path must count, or this test shows nothing"
    assert all(p["q"].std() > 0.1 * p["q"].mean() for p in paths), "and differ between samples"
    close(elbo.reconstruction, sum(p["q"] * p["rec"] for p in paths))
    close(elbo.kl_root, sum(p["q"] * p["root"] for p in paths))
    close(elbo.kl_nodes, sum(p["q"] * p["nodes"] for p in paths))
    close(elbo.kl_decisions, sum(p["q"] * p["decisions"] for p in paths))
    alpha = 0.3
    whole = sum(p["q"] * (p["rec"] + alpha * (p["root"] + p["nodes"] + p["decisions"])) for p in paths)
    close(elbo.loss(alpha), whole.mean())


def test_loss_anneals_every_kl_but_not_the_reconstruction():
    elbo = Elbo(*(torch.tensor([1.0, 3.0]) * 10**k for k in range(4)))
    assert elbo.loss(0.0).item() == 2
    assert elbo.loss(0.5).item() == 2 + 0.5 * (20 + 200 + 2000)


@SPECS
@torch.no_grad()
def test_a_tree_of_one_leaf_is_a_plain_vae(spec, same_noise):
    tree, x = lively(TreeVAE(spec, Topology.root_with_two_leaves("init").prune(1))), images(spec)
    elbo, path = tree_elbo(tree, tree.walk(x), x), path_terms(tree, 2, x)
    close(elbo.reconstruction, path["rec"])
    close(elbo.kl_root + elbo.kl_nodes, path["root"] + path["nodes"])
    assert not elbo.kl_decisions.any()
    assert tree.routing(x).shape == (6, 0)


@TREES
@torch.no_grad()
def test_reach_adds_up_and_routing_is_the_walk_s(topology):
    tree, x = lively(TreeVAE(GREY, topology)), images(GREY)
    visits = tree.walk(x)
    assert list(visits) == list(topology.top_down)
    close(sum(visits[leaf].reach for leaf in topology.leaves), torch.ones(6, dtype=torch.float64))
    for node in topology.inner:
        close(visits[node].reach, sum(visits[c].reach for c in topology.children(node) if c is not None))
        assert (visits[node].q_logit is not None) == (node in topology.deciding)
    routing = tree.routing(x)
    assert routing.shape == (6, len(topology.deciding))
    close(routing, torch.stack([visits[i].q_logit.sigmoid() for i in topology.deciding], 1))


@torch.no_grad()
def test_walk_is_a_function_of_its_generator():
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)), images(GREY)
    a, b, c = (tree.walk(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a[i].z, b[i].z) for i in a)
    assert not any(torch.equal(a[i].z, c[i].z) for i in a)
    tree.walk(x)
    state = torch.get_rng_state()
    tree.walk(x, torch.Generator().manual_seed(1))
    assert torch.equal(state, torch.get_rng_state()), "with a generator given, torch's own stays untouched"


@torch.no_grad()
def test_walk_draws_from_the_posterior_it_reports():
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)), images(GREY, 1).expand(4000, -1, -1, -1)
    for visit in tree.walk(x, torch.Generator().manual_seed(0)).values():
        noise = (visit.z - visit.q_mean) / visit.q_variance.sqrt()
        assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
        assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.numel())


@SPECS
@torch.no_grad()
def test_descend_follows_the_prior(spec):
    tree = lively(TreeVAE(spec, WITH_CHAIN)).float()
    visits = tree.descend(500, torch.Generator().manual_seed(0))
    assert visits[0].z.mean().abs() < 4 / math.sqrt(visits[0].z.numel())
    torch.testing.assert_close(sum(visits[leaf].reach for leaf in WITH_CHAIN.leaves), torch.ones(500))
    for node in WITH_CHAIN.top_down[1:]:
        parent = WITH_CHAIN[node].parent
        mean, variance = tree.transformation(node, visits[parent].z)
        assert torch.equal(mean, visits[node].q_mean)
        assert torch.equal(variance, visits[node].q_variance)
        p = tree.prior_logit(parent, visits[parent].z).sigmoid() if parent in WITH_CHAIN.deciding else torch.ones(500)
        p = p if WITH_CHAIN[node].side == "left" or parent not in WITH_CHAIN.deciding else 1 - p
        torch.testing.assert_close(visits[node].reach, visits[parent].reach * p, atol=1e-6, rtol=1e-4)
    pictures = tree.leaf_images(visits)
    assert pictures.shape == (500, 4, spec.channels, 8, 8)
    assert pictures.min() >= 0
    assert pictures.max() <= 1


# --- splitting ---------------------------------------------------------------------------------


@SPECS
@pytest.mark.parametrize(("topology", "leaf"), [(FOUR_LEAVES, 2), (FOUR_LEAVES, 6), (WITH_CHAIN, 5), (WITH_CHAIN, 7)])
@torch.no_grad()
def test_split_elbo_is_what_the_split_adds_to_the_tree(spec, topology, leaf, same_noise):
    tree, x = lively(TreeVAE(spec, topology)), images(spec)
    before_visits = tree.walk(x)
    before, visit = tree_elbo(tree, before_visits, x), before_visits[leaf]
    leaf_rec = visit.reach * image_nll(tree.decoded(leaf, visit.z), x, spec.likelihood)
    early = frozen_features(tree, leaf, x)
    calibrate(tree, tree.split(leaf, "split"))
    frozen = frozen_features(tree, leaf, x)
    added = split_elbo(tree, leaf, frozen, x, None)
    after = tree_elbo(tree, tree.walk(x), x)
    close(after.reconstruction, before.reconstruction - leaf_rec + added.reconstruction)
    close(after.kl_root, before.kl_root + added.kl_root)
    close(after.kl_nodes, before.kl_nodes + added.kl_nodes)
    close(after.kl_decisions, before.kl_decisions + added.kl_decisions)
    assert all(torch.equal(a, b) for a, b in zip(early, frozen, strict=True)), "the same before and after the split"
    for term in (added.reconstruction, added.kl_nodes, added.kl_decisions):
        assert term.max() > 1e-3, "a term of zero would show nothing"


@TREES
@torch.no_grad()
def test_frozen_features_agree_with_the_walk(topology, same_noise):
    tree, x = lively(TreeVAE(GREY, topology)), images(GREY)
    visits, depths = tree.walk(x), tree.features(x)
    for leaf in topology.leaves:
        frozen, depth = frozen_features(tree, leaf, x), topology[leaf].depth
        close(frozen.reach, visits[leaf].reach)
        assert torch.equal(frozen.feature, depths[depth])
        assert torch.equal(frozen.child_feature, depths[depth + 1])
        assert frozen.mean_hat.shape == frozen.variance_hat.shape == (6, depth + 1, 3, 2, 2)
        close(path_latent(tree, leaf, frozen, None), visits[leaf].z)


@torch.no_grad()
def test_every_step_of_a_split_draws_the_path_anew():
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)), images(GREY)
    frozen, rng = frozen_features(tree, 6, x), torch.Generator().manual_seed(0)
    first, second = (path_latent(tree, 6, frozen, rng) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, path_latent(tree, 6, frozen, torch.Generator().manual_seed(0)))


@SPECS
def test_one_step_on_a_split_moves_every_new_tensor_and_no_other(spec):
    tree, x = lively(TreeVAE(spec, FOUR_LEAVES)), images(spec)
    new = [module.double() for module in tree.split(6, "split")]
    tree.train_only(new)
    fresh = {id(t) for module in new for t in (*module.parameters(), *module.buffers())}
    tensors = {**dict(tree.named_parameters()), **dict(tree.named_buffers())}
    before = {name: t.detach().clone() for name, t in tensors.items()}
    assert {n for n, p in tree.named_parameters() if p.requires_grad} == {
        n for n, p in tree.named_parameters() if id(p) in fresh
    }
    adam = torch.optim.Adam((p for module in new for p in module.parameters()), 1e-3, weight_decay=1e-5)
    with torch.no_grad():
        frozen = frozen_features(tree, 6, x)
    split_elbo(tree, 6, frozen, x, None).loss(alpha=1.0).backward()
    for name, parameter in tree.named_parameters():
        if id(parameter) in fresh:
            # Batch norm takes the mean away, so a bias before it feels only rounding: weight decay moves it.
            assert parameter.grad is not None, name
            assert parameter.ndim == 1 or parameter.grad.abs().max() > 1e-8, f"{name} gets no gradient"
        else:
            assert parameter.grad is None, name
    adam.step()
    for module in tree.modules():
        if isinstance(module, SlotBatchNorm):
            inside = id(module.weight) in fresh
            assert module.training == inside
            assert module.slots_seen == int(inside), "each new norm sees the slot once, frozen ones never"
            if inside:
                module.move_running_statistics()
    for name, tensor in tensors.items():
        moved = not torch.equal(tensor, before[name])
        if not name.endswith("num_batches_tracked"):
            assert moved == (id(tensor) in fresh), f"{name} {'moved' if moved else 'stayed'}"


def test_train_only_follows_the_modules_it_is_given():
    tree = TreeVAE(GREY, FOUR_LEAVES)
    tree.train_only([tree.nodes["5"]])
    assert [n for n, m in tree.nodes.items() if m.training] == ["5"]
    tree.train_only([tree])
    assert all(m.training for m in tree.modules())
    assert all(p.requires_grad for p in tree.parameters())


def test_the_gradient_of_the_whole_tree_reaches_every_parameter():
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)).train(), images(GREY, 8)
    tree_elbo(tree, tree.walk(x), x).loss(alpha=1.0).backward()
    # A bias right before batch norm has no effect: what gradient it shows is rounding.
    silent = [n for n, p in tree.named_parameters() if p.grad is None or (p.ndim > 1 and not p.grad.any())]
    assert silent == []


def test_split_returns_exactly_the_new_networks():
    tree = TreeVAE(GREY, FOUR_LEAVES)
    old, removed = set(tree.parameters()), set(tree.nodes["2"]["decoder"].parameters())
    new = tree.split(2, "split")
    assert {p for m in new for p in m.parameters()} == set(tree.parameters()) - old
    assert old - set(tree.parameters()) == removed
    assert tree.topology.children(2) == (7, 8)
    assert set(tree.nodes["2"]) == {"dense", "transformation", "prior_router", "posterior_router"}
    assert set(tree.nodes["8"]) == {"dense", "transformation", "decoder"}


def test_names_after_growing_are_those_of_a_tree_built_at_once():
    """A checkpoint of a grown and pruned tree must load into a model made from its topology, tensor for tensor."""
    grown = TreeVAE(GREY, Topology.root_with_two_leaves("init"))
    for leaf in (1, 3, 2):
        grown.split(leaf, "x")
    grown.prune(4)
    at_once = TreeVAE(GREY, grown.topology)
    assert list(grown.state_dict()) == list(at_once.state_dict()), "in the same order, which optimizers rely on"


def test_a_tree_too_deep_for_its_features_is_refused():
    deep = FOUR_LEAVES.split(5, "c").split(7, "d")
    with pytest.raises(ValueError, match=r"5 deep, but 5 features .* depth 4"):
        TreeVAE(GREY, deep)


def test_splitting_a_leaf_at_the_maximum_depth_is_refused():
    tree = TreeVAE(GREY, FOUR_LEAVES.split(5, "c"))
    with pytest.raises(ValueError, match=r"tree\.features"):
        tree.split(7, "too deep")
    assert set(tree.nodes["7"]) == {"dense", "transformation", "decoder"}, "and the model is as it was"


def test_new_networks_are_of_the_model_s_own_type_and_device():
    tree = TreeVAE(GREY, FOUR_LEAVES).double().to("meta")
    tree.split(2, "split")
    assert {(p.dtype, p.device.type) for p in tree.parameters()} == {(torch.float64, "meta")}


# --- pruning -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("leaf", "gone"), [(4, {4}), (2, {2}), (5, {5})])
@torch.no_grad()
def test_pruning_leaves_every_other_network_bit_for_bit(leaf, gone, same_noise):
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)), images(GREY)
    tensors, before = {k: v.clone() for k, v in tree.state_dict().items()}, tree.walk(x)
    decoded = {i: tree.decoded(i, before[i].z) for i in tree.topology.leaves}
    parent = tree.topology[leaf].parent
    tree.prune(leaf)
    after = tree.walk(x)
    assert set(after) == set(before) - gone
    for node, visit in after.items():
        for field in ("z", "q_mean", "q_variance", "p_mean", "p_variance"):
            a, b = getattr(visit, field), getattr(before[node], field)
            assert (a is None and b is None) or torch.equal(a, b), (node, field)
        assert (visit.q_logit is None) == (node not in tree.topology.deciding)
        if visit.q_logit is not None:
            assert torch.equal(visit.q_logit, before[node].q_logit)
            assert torch.equal(visit.p_logit, before[node].p_logit)
    for i in tree.topology.leaves:
        assert torch.equal(tree.decoded(i, after[i].z), decoded[i])
    (sibling,) = (c for c in tree.topology.children(parent) if c is not None)
    assert torch.equal(after[sibling].reach, after[parent].reach), "the sibling takes all that comes"
    close(sum(after[i].reach for i in tree.topology.leaves), torch.ones(6, dtype=torch.float64))
    lost = set(tensors) - set(tree.state_dict())
    assert all(torch.equal(v, tensors[k]) for k, v in tree.state_dict().items())
    assert {k.split(".")[1] for k in lost} == {str(i) for i in gone | {parent}}
    assert {tuple(k.split(".")[1:3]) for k in lost if k.split(".")[1] == str(parent)} == {
        (str(parent), "prior_router"),
        (str(parent), "posterior_router"),
    }


def test_pruning_takes_childless_inner_nodes_along():
    tree = TreeVAE(GREY, FOUR_LEAVES)
    tree.prune(5)
    tree.prune(6)
    assert set(tree.nodes) == {"0", "1", "2", "4"}
    assert set(tree.nodes["1"]) == {"dense", "transformation"}


# --- paths -------------------------------------------------------------------------------------


@TREES
@torch.no_grad()
def test_path_gathers_what_a_plain_loop_gathers(topology):
    tree, x = lively(TreeVAE(GREY, topology)), images(GREY, 500)
    visits = tree.walk(x)
    path = tree.path(visits, torch.Generator().manual_seed(0))
    order = list(topology.top_down)
    assert path.z.shape == (500, topology.depth + 1, 3, 2, 2)
    assert path.nodes.shape == (500, topology.depth + 1)
    assert len(path.leaf.unique()) == len(topology.leaves), "or some leaf goes untested"
    for b in range(500):
        nodes = topology.path(topology.leaves[path.leaf[b]])
        padding = topology.depth + 1 - len(nodes)
        assert path.nodes[b].tolist() == [order.index(i) for i in nodes] + [-1] * padding
        for k, node in enumerate(nodes):
            assert torch.equal(path.z[b, k], visits[node].z[b])
    close(path.reach, torch.stack([visits[leaf].reach for leaf in topology.leaves], 1))


@TREES
@torch.no_grad()
def test_below_a_node_the_prior_goes_on_from_an_image(topology):
    tree, x = lively(TreeVAE(GREY, topology)).float(), images(GREY, 400).float()
    walked = tree.walk(x, torch.Generator().manual_seed(0))
    found = tree.redrawn_below(1, walked, torch.Generator().manual_seed(1))
    assert list(found) == list(topology.top_down)
    for node in topology.top_down:
        kept = node == 1 or 1 not in topology.path(node)
        assert torch.equal(found[node].z, walked[node].z) == kept, node
        if not kept:
            parent = topology[node].parent
            mean, variance = tree.transformation(node, found[parent].z)
            torch.testing.assert_close((found[node].q_mean, found[node].q_variance), (mean, variance))
            noise = (found[node].z - mean) / variance.sqrt()
            assert noise.mean().abs() < 4 / math.sqrt(noise.numel())
    below = topology.leaves_below(1)
    torch.testing.assert_close(sum(found[leaf].reach for leaf in below), torch.ones(400))
    path = tree.path(found, torch.Generator().manual_seed(2), within=1)
    assert {topology.leaves[k] for k in path.leaf.tolist()} == set(below)


@torch.no_grad()
def test_leaves_below_an_improbable_node_come_as_often_as_the_prior_says():
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)).float(), images(GREY, 1).float().expand(4000, -1, -1, -1)
    walked = dict(tree.walk(x, torch.Generator().manual_seed(0)))
    walked[1] = walked[1]._replace(reach=torch.full((4000,), 1e-30))
    found = tree.redrawn_below(1, walked, torch.Generator().manual_seed(1))
    leaf = tree.path(found, torch.Generator().manual_seed(2), within=1).leaf
    for k, node in enumerate(FOUR_LEAVES.leaves):
        expected = found[node].reach.mean() if node in FOUR_LEAVES.leaves_below(1) else torch.zeros(())
        assert abs((leaf == k).float().mean() - expected) < 0.03  # 4 standard errors


@torch.no_grad()
def test_a_path_within_a_leaf_ends_there_however_improbable():
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)), images(GREY, 50)
    for k, leaf in enumerate(FOUR_LEAVES.leaves):
        assert set(tree.path(tree.walk(x), within=leaf).leaf.tolist()) == {k}


@torch.no_grad()
def test_path_to_a_given_leaf():
    tree, x = lively(TreeVAE(GREY, FOUR_LEAVES)), images(GREY, 4)
    visits, leaf = tree.walk(x), torch.tensor([3, 0, 2, 1])
    path = tree.path(visits, leaf=leaf)
    assert torch.equal(path.leaf, leaf)
    assert path.nodes.tolist() == [[0, 2, -1, -1], [0, 1, 3, 5], [0, 1, 4, -1], [0, 1, 3, 6]]
    assert torch.equal(path.z[0, 1], visits[2].z[0])


@torch.no_grad()
def test_leaves_are_drawn_by_reach():
    tree, count, share = lively(TreeVAE(GREY, FOUR_LEAVES)), 20_000, {5: 0.1, 6: 0.4, 4: 0.2, 2: 0.3}
    visits = tree.walk(images(GREY, count // 20))
    many = {
        i: v._replace(z=v.z.repeat(20, 1, 1, 1), reach=torch.full((count,), share.get(i, 1.0)))
        for i, v in visits.items()
    }
    drawn = tree.path(many, torch.Generator().manual_seed(0)).leaf
    expected = count * torch.tensor([share[leaf] for leaf in FOUR_LEAVES.leaves])
    chi2 = ((torch.bincount(drawn, minlength=4) - expected) ** 2 / expected).sum()
    assert chi2 < 16.3, "the 99.9% quantile for 3 degrees of freedom"


@torch.no_grad()
def test_a_leaf_out_of_reach_is_not_drawn_and_full_underflow_does_not_fail():
    tree = lively(TreeVAE(GREY, FOUR_LEAVES))
    visits = tree.walk(images(GREY, 500))
    reach = {5: 0.0, 6: 0.0, 4: 1.0, 2: 0.0}
    sure = {i: v._replace(reach=torch.full((500,), reach.get(i, 1.0))) for i, v in visits.items()}
    assert tree.path(sure).leaf.unique().tolist() == [2]
    lost = {i: v._replace(reach=torch.zeros(500)) for i, v in visits.items()}
    assert tree.path(lost).leaf.shape == (500,)


# --- state -------------------------------------------------------------------------------------


@SPECS
@TREES
@torch.no_grad()
def test_json_and_tensors_are_the_whole_model(spec, topology):
    tree, x = lively(TreeVAE(spec, topology.with_samples({2: 3.5}))), images(spec)
    read = TreeVAE.from_json(tree.to_json()).double().eval()
    read.load_state_dict(tree.state_dict())
    assert (read.spec, read.topology) == (tree.spec, tree.topology)
    a, b = (t.walk(x, torch.Generator().manual_seed(3)) for t in (tree, read))
    for node in topology.top_down:
        for mine, theirs in zip(a[node], b[node], strict=True):
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert torch.equal(tree.leaf_images(a), read.leaf_images(b))
    assert all(torch.equal(m, t) for m, t in zip(tree_elbo(tree, a, x), tree_elbo(read, b, x), strict=True))
    assert Topology.from_json(tree.to_json()) == tree.topology, "the model's file is a topology's file too"


@pytest.mark.parametrize("text", ["", "[]", FOUR_LEAVES.to_json(), '{"network": {}, "next_id": 1, "nodes": []}'])
def test_a_file_that_is_no_tree_is_refused(text):
    with pytest.raises(ValueError, match=r"not a tree\.json"):
        TreeVAE.from_json(text)


def test_a_network_of_unknown_kind_is_refused():
    text = TreeVAE(GREY, FOUR_LEAVES).to_json()
    assert "cnn1" in text
    with pytest.raises(ValueError, match=r"not a tree\.json"):
        TreeVAE.from_json(text.replace("cnn1", "cnn9"))
