"""Protects the passes that take many nodes at once: they are those of a tree walked node by node.

The plain tree is tests/reference_tree.py. Compared are every term of the ELBO, the gradient of every parameter and the
statistics of every batch norm, for both encoders and likelihoods, residual or not, maps of 2x2 and 4x4, on trees grown
and pruned at random. Then what a reach threshold leaves out, and what it must not change.

In float64; the noise of a latent is the same at every node, another for every sample and place.
"""

from __future__ import annotations

import random

import pytest
import torch
from reference_tree import Reference

from tdiff.tree import losses, model, stacked
from tdiff.tree.layers import ConvBlock, PlainDecoder, Router, SlotBatchNorm, normed
from tdiff.tree.losses import Elbo, frozen_features, split_elbo, tree_elbo
from tdiff.tree.model import TreeSpec, TreeVAE, image_nll, norms
from tdiff.tree.topology import Topology

torch.set_num_threads(1)

SMALL = {"features": 5, "latent_channels": 3, "feature_channels": 8}
SPECS = {
    "cnn1 r2": TreeSpec(1, 8, **SMALL),
    "cnn1 r4 residual": TreeSpec(1, 8, size=4, residual=True, **SMALL),
    "cnn1 r2 residual, no shortcut conv": TreeSpec(1, 14, residual=True, **(SMALL | {"latent_channels": 8})),
    "cnn1 r4 residual, no shortcut conv": TreeSpec(1, 8, size=4, residual=True, **(SMALL | {"latent_channels": 8})),
    "cnn1 r2 gaussian": TreeSpec(3, 8, likelihood="gaussian", **SMALL),
    "cnn1 r3": TreeSpec(1, 12, size=3, **SMALL),
    "cnn2 r2 residual": TreeSpec(3, 8, "cnn2", "gaussian", residual=True, **SMALL),
    "cnn2 r4": TreeSpec(3, 8, "cnn2", "gaussian", size=4, **SMALL),
}
BATCH = 12


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, params=[0, 10**9], ids=["leaf by leaf", "all leaves"])
def decoding(request, monkeypatch):
    """Both ways to take the leaves' decoders, as a CPU does with large maps, and as a GPU does."""
    monkeypatch.setattr(losses, "LOOP_ABOVE", request.param)


def noise_like(mean: torch.Tensor, batch_last: bool) -> torch.Tensor:
    shape = mean.shape[-4:] if batch_last else (*mean.shape[1:], mean.shape[0])
    noise = torch.randn(shape, dtype=mean.dtype, generator=torch.Generator().manual_seed(5))
    return noise if batch_last else stacked.batch_first(noise)


@pytest.fixture
def same_noise(monkeypatch):
    """Makes every draw a function of the sample and the place, in our modules and in `reference_noise`."""

    def draw(mean, variance, rng):
        return mean + variance.sqrt() * noise_like(mean, mean.ndim == 5)

    monkeypatch.setattr(model, "draw", draw)
    monkeypatch.setattr(losses, "draw", draw)


@pytest.fixture
def no_noise(monkeypatch):
    """Latents at their means: what a sample is does not depend on the rows it is taken with, in evaluation."""
    monkeypatch.setattr(model, "draw", lambda mean, variance, rng: mean)


def reference_noise(node, mean):
    return noise_like(mean, batch_last=False)


def lively(tree: TreeVAE) -> TreeVAE:
    """In float64 and training mode, weights and statistics away from their initial values."""
    tree.double().train()
    with torch.no_grad():
        for parameter in tree.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in tree.modules():
            if isinstance(module, Router):
                module.layers[-1].weight.mul_(5)
            if isinstance(module, SlotBatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return tree


def images(spec: TreeSpec, count: int = BATCH) -> torch.Tensor:
    low, span = torch.rand(2, count, 1, 1, 1, dtype=torch.float64)
    noise = torch.rand(count, spec.channels, spec.image_size, spec.image_size, dtype=torch.float64)
    return low + (1 - low) * span * noise


def grown(spec: TreeSpec, seed: int) -> TreeVAE:
    """A model split and pruned at random, up to its maximum depth; some inner nodes have one child."""
    rng, tree = random.Random(seed), TreeVAE(spec, Topology.root_with_two_leaves("root"))
    for _ in range(6):
        tree.split(rng.choice([i for i in tree.topology.leaves if tree.topology[i].depth < spec.max_depth]), "split")
    for _ in range(2):
        tree.prune(rng.choice(tree.topology.leaves))
    return tree


def close(a, b, name=""):
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text: f"{name}: {text}")


def gradients(tree: TreeVAE, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    tree.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in tree.named_parameters()}


def same_gradients(ours, expected):
    for name, gradient in expected.items():
        assert (gradient is None) == (ours[name] is None), name
        if gradient is not None:
            close(ours[name], gradient, name)


def same_statistics(tree: TreeVAE, reference: Reference):
    """Every norm in training has seen one slot, with the batch's statistics; no running statistic has moved."""
    modules = dict(tree.named_modules())
    trained = {name for name, m in modules.items() if isinstance(m, SlotBatchNorm) and m.training}
    assert trained == set(reference.statistics)
    for name, (mean, variance) in reference.statistics.items():
        assert modules[name].slots_seen == 1, name
        close(modules[name].slot_mean, mean, name)
        close(modules[name].slot_var, variance, name)


# --- the whole tree ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_pass_is_that_of_the_plain_tree(spec, training, same_noise):
    for seed in range(3):
        tree, x = lively(grown(spec, seed)).train(training), images(spec)
        reference = Reference(tree, reference_noise)
        expected = reference.elbo(x)
        walk = tree.walk(x)
        ours = tree_elbo(tree, walk, x)
        for name, term in expected.items():
            close(getattr(ours, name), term, name)
        for node, reach in reference.reach.items():
            close(walk[node].reach, reach)
        alpha = 0.7
        theirs = gradients(tree, Elbo(**expected).loss(alpha))
        same_gradients(gradients(tree, ours.loss(alpha)), theirs)
        same_statistics(tree, reference)
    assert any(None in tree.topology.children(i) for i in tree.topology.inner), "no node of one child was tested"


def test_single_precision_agrees_to_five_digits(same_noise):
    spec = TreeSpec(1, 28, features=5)
    tree, x = lively(grown(spec, 0)).float(), images(spec, 32).float()
    expected = Elbo(**Reference(tree, reference_noise).elbo(x))
    ours = tree_elbo(tree, tree.walk(x), x)
    torch.testing.assert_close(ours.loss(1.0), expected.loss(1.0), rtol=1e-5, atol=0)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    theirs = gradients(tree, expected.loss(1.0))
    for name, gradient in gradients(tree, ours.loss(1.0)).items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm() + 1e-5, name


def test_several_slots_average_their_statistics(same_noise):
    tree = lively(grown(SPECS["cnn1 r2"], 0))
    seen = []
    for x in (images(tree.spec), images(tree.spec)):
        reference = Reference(tree, reference_noise)
        reference.elbo(x)
        seen.append(reference.statistics)
        tree_elbo(tree, tree.walk(x), x)
    for name, norm in tree.named_modules():
        if isinstance(norm, SlotBatchNorm):
            assert norm.slots_seen == 2
            close(norm.slot_mean, (seen[0][name][0] + seen[1][name][0]) / 2, name)
            close(norm.slot_var, (seen[0][name][1] + seen[1][name][1]) / 2, name)


def test_routing_is_that_of_the_plain_tree():
    tree, x = lively(grown(SPECS["cnn1 r2"], 1)).eval(), images(SPECS["cnn1 r2"])
    reference = Reference(tree)
    features = reference.features(x)
    for column, node in enumerate(tree.topology.deciding):
        logit = reference.router(features[tree.topology[node].depth], f"nodes.{node}.posterior_router")
        close(tree.routing(x)[:, column], logit.sigmoid())


def test_levels_of_the_tree():
    topology = Topology.root_with_two_leaves("root").split(1, "a").split(2, "b").prune(3)  # 0 -> 1 -> 4; 2 -> 5, 6
    assert topology.levels == ((0,), (1, 2), (4, 5, 6))
    assert topology.choosing == (0, 2)
    assert Topology.root_with_two_leaves("root").split(2, "a").split(1, "b").split(3, "c").choosing == (0, 1, 2, 3)


def test_walk_is_in_the_order_of_the_tree_and_keeps_all_routing():
    tree, x = lively(grown(SPECS["cnn1 r2"], 2)), images(SPECS["cnn1 r2"])
    walk, order = tree.walk(x), tree.topology.top_down
    assert list(walk) == list(order)
    assert len(walk) == len(order)
    for k, node in enumerate(order):
        assert torch.equal(walk.reach[k], walk[node].reach)
    for k, node in enumerate(tree.topology.choosing):
        assert torch.equal(walk.q_logits[k], walk[node].q_logit)


# --- splits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_split_is_that_of_the_plain_tree(spec, same_noise):
    for seed in range(3):
        tree, x = lively(grown(spec, seed)), images(spec)
        can = [i for i in tree.topology.leaves if tree.topology[i].depth < spec.max_depth]
        leaf = random.Random(seed).choice(can)
        with torch.no_grad():
            frozen = frozen_features(tree.eval(), leaf, x)
        new = [module.double() for module in tree.split(leaf, "split")]
        tree.train_only(new)
        reference = Reference(tree, reference_noise)
        expected = reference.split_elbo(leaf, x)
        ours = split_elbo(tree, leaf, frozen, x, None)
        for name, term in expected.items():
            close(getattr(ours, name), term, name)
        theirs = gradients(tree, Elbo(**expected).loss(0.7))
        same_gradients(gradients(tree, ours.loss(0.7)), theirs)
        same_statistics(tree, reference)


# --- layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "size"), [(28, 2), (28, 4), (8, 2), (32, 4), (12, 4), (30, 7), (36, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_decoder_that_convolves_before_it_doubles(image_size, size, channels):
    tree = TreeVAE(TreeSpec(channels, image_size, size=size, **SMALL), Topology.root_with_two_leaves("root")).double()
    z = torch.randn(3, 3, size, size, dtype=torch.float64)
    for node in (1, 2):
        close(tree.decoded(node, z), Reference(tree).decoder(z, f"nodes.{node}.decoder"))
    both = tree.decoded_together((1, 2), stacked.batch_last(z)[None].expand(2, -1, -1, -1, -1))
    both = torch.nn.functional.pixel_shuffle(both, image_size // both.shape[-1])
    close(both, torch.stack([tree.decoded(node, z) for node in (1, 2)], 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [True, False])
def test_convs_of_several_nodes(size, shared):
    weight = torch.randn(3, 5, 4, 3, 3, dtype=torch.float64)
    bias = torch.randn(3, 5, dtype=torch.float64)
    x = torch.randn(1 if shared else 3, 4, size, size, 7, dtype=torch.float64)
    y = stacked._leave(stacked.convs(weight, bias, stacked._enter(x)), 3)
    for k in range(3):
        own = stacked.batch_first(x[0 if shared else k])
        close(stacked.batch_first(y[k]), torch.nn.functional.conv2d(own, weight[k], bias[k], padding=1))


def test_norms_in_different_modes_are_each_their_own():
    """As after `train_only`: a new node's norms train beside frozen ones."""
    together, alone = ([SlotBatchNorm(4) for _ in range(3)] for _ in range(2))
    for group in (together, alone):
        group[1].eval()
    x = torch.randn(1, 12, 50)
    y = normed(together, x)
    assert torch.equal(y, torch.cat([norm(part) for norm, part in zip(alone, x.chunk(3, 1), strict=True)], 1))
    assert [norm.slots_seen for norm in together] == [1, 0, 1]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.slot_var, b.slot_var)


def test_norms_together_are_norms_alone():
    together, alone = ([SlotBatchNorm(4) for _ in range(3)] for _ in range(2))
    for x in torch.randn(3, 1, 12, 50):
        expected = torch.cat([norm(part) for norm, part in zip(alone, x.chunk(3, 1), strict=True)], 1)
        torch.testing.assert_close(normed(together, x), expected)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.slot_mean, b.slot_mean)
        torch.testing.assert_close(a.slot_var, b.slot_var)
        assert a.slots_seen == 3


def test_a_stacked_pass_copies_no_parameter_into_the_model():
    """Names, storage and gradients stay per node: what checkpoints, pruning and ZeRO rely on."""
    tree, x = lively(grown(SPECS["cnn1 r2"], 0)), images(SPECS["cnn1 r2"])
    before = {name: p.data_ptr() for name, p in tree.named_parameters()}
    state = list(tree.state_dict())
    tree_elbo(tree, tree.walk(x), x).loss(1.0).backward()
    assert {name: p.data_ptr() for name, p in tree.named_parameters()} == before
    assert list(tree.state_dict()) == state
    assert all(p.grad is not None and p.grad.shape == p.shape for p in tree.parameters())
    assert isinstance(tree.nodes["1"]["transformation"].block, ConvBlock)
    assert isinstance(tree.nodes[str(tree.topology.leaves[0])]["decoder"], PlainDecoder)


# --- a reach threshold -------------------------------------------------------------------------

MANY = 96


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(model, "FEWEST_ROWS", 4)


def peaked(seed: int, spec: TreeSpec = SPECS["cnn1 r2"]) -> TreeVAE:
    """A tree whose samples visit few leaves, but not all of them only one; in training as in evaluation."""
    return peak(lively(grown(spec, seed)))


def peak(tree: TreeVAE) -> TreeVAE:
    with torch.no_grad():
        walk = tree.walk(images(tree.spec, MANY))
        for node, logit in zip(tree.topology.choosing, walk.q_logits, strict=True):
            last = tree.nodes[str(node)]["posterior_router"].layers[-1]
            last.weight.mul_(15 / logit.std())
            last.bias.copy_((last.bias - logit.median()) * 15 / logit.std())
    for norm in norms(tree):
        if norm.slots_seen:
            norm.running_mean.copy_(norm.slot_mean)
            norm.running_var.copy_(norm.slot_var)
            norm.slots_seen = 0
    return tree


def dropped_reach(tree: TreeVAE, walk, threshold: float) -> dict[int, torch.Tensor]:
    """Reach of every node, sample by sample: the less probable child goes, if less than the threshold reaches it."""
    shape, reach = tree.topology, {0: torch.ones(walk.reach.shape[1], dtype=torch.float64)}
    logit = dict(zip(shape.choosing, walk.q_logits, strict=True))
    for node in shape.top_down:
        left, right = shape.children(node)
        if left is None or right is None:
            reach |= {child: reach[node] for child in (left, right) if child is not None}
            continue
        reach[left], reach[right] = torch.zeros(2, len(reach[node]), dtype=torch.float64)
        for b, (here, p) in enumerate(zip(reach[node].tolist(), logit[node].sigmoid().tolist(), strict=True)):
            small, large = (left, right) if p < 0.5 else (right, left)
            gone = here * min(p, 1 - p) < threshold
            reach[small][b] = 0 if gone else here * min(p, 1 - p)
            reach[large][b] = here if gone else here * max(p, 1 - p)
    return reach


@pytest.mark.parametrize("threshold", [1e-3, 0.1, 0.4])
def test_reach_with_a_threshold(threshold, few_rows):
    for seed in range(3):
        tree, x = peaked(seed), images(SPECS["cnn1 r2"], MANY)
        walk = tree.walk(x, None, threshold)
        expected = dropped_reach(tree, walk, threshold)
        places = {node: k for k, node in enumerate(tree.topology.top_down)}
        for node, reach in expected.items():
            close(walk.reach[places[node]], reach)
        leaves = walk.reach[[places[leaf] for leaf in tree.topology.leaves]]
        close(leaves.sum(0), torch.ones(MANY, dtype=torch.float64))
        assert ((walk.reach == 0) | (walk.reach >= threshold) | (walk.reach == 1)).float().mean() > 0.99
        assert (walk.reach == 0).any(), "nothing was left out"


@pytest.mark.parametrize("threshold", [1e-2, 0.3])  # the latter: who stays may come with less than who goes
def test_every_sample_is_taken_where_it_comes_and_the_rest_are_the_nearest(threshold, few_rows):
    fewer = 0
    for seed in range(3):
        tree, x = peaked(seed), images(SPECS["cnn1 r2"], MANY)
        walk, exact = tree.walk(x, None, threshold), tree.walk(x)
        places = {node: k for k, node in enumerate(tree.topology.top_down)}
        for level in walk.levels:
            for k, node in enumerate(level.nodes):
                comes = set((walk.reach[places[node]] > 0).nonzero().flatten().tolist())
                taken = list(range(MANY)) if level.rows is None else level.rows[k].tolist()
                assert len(taken) == len(set(taken)), "no sample twice"
                assert comes <= set(taken)
                assert len(taken) == min(MANY, max(4, 1 << (len(comes) - 1).bit_length()))
                assert torch.equal(level.reach[k], walk.reach[places[node]][taken])
                fewer += len(taken) < MANY
                fillers = set(taken) - comes
                parent = tree.topology[node].parent
                if fillers and parent is not None and (walk.reach[places[parent]] > 0).all():
                    left_out = set(range(MANY)) - set(taken)
                    worst = min(exact[node].reach[b] for b in fillers)
                    assert all(exact[node].reach[b] <= worst for b in left_out)
        assert fewer >= 5


def test_who_comes_is_taken_before_who_nearly_came(few_rows, monkeypatch):
    """Who stays where both ways are below the threshold may come to it with less than who was sent elsewhere."""
    tree = lively(TreeVAE(SPECS["cnn1 r2"], Topology.root_with_two_leaves("root").split(1, "a")))
    left = torch.tensor([[0.31] * 4 + [1 - 1e-9] * 4, [0.55] * 4 + [0.29] * 4], dtype=torch.float64).logit()
    monkeypatch.setattr(tree, "_posterior_logits", lambda features: [left[:1], left[1:], left[:0]])
    walk = tree.walk(images(tree.spec, 8), None, 0.3)
    close(walk[3].reach, torch.full((4,), 0.31, dtype=torch.float64))
    level = next(level for level in walk.levels if 3 in level.nodes)
    assert sorted(level.rows[level.nodes.index(3)].tolist()) == [0, 1, 2, 3]


@torch.no_grad()
def test_terms_with_a_threshold_are_those_of_the_reach_it_leaves(few_rows, no_noise):
    """In evaluation a network's output is the sample's own, so only reach can differ."""
    for spec in (SPECS["cnn1 r2"], SPECS["cnn2 r4"]):
        tree, x = peaked(0, spec).eval(), images(spec, MANY)
        exact, walk = tree.walk(x), tree.walk(x, None, 1e-2)
        ours, reach = tree_elbo(tree, walk, x), dropped_reach(tree, walk, 1e-2)
        zero = torch.zeros(MANY, dtype=torch.float64)
        rec = nodes = decisions = zero
        for node, visit in exact.items():
            if tree.topology.is_leaf(node):
                rec = rec + reach[node] * image_nll(tree.decoded(node, visit.z), x, spec.likelihood)
            if node != 0:
                moments = (visit.q_mean, visit.q_variance, visit.p_mean, visit.p_variance)
                nodes = nodes + reach[node] * losses.kl_normal(*moments)
            if visit.q_logit is not None:
                decisions = decisions + reach[node] * losses.kl_bernoulli(visit.q_logit, visit.p_logit)
        close(ours.reconstruction, rec)
        close(ours.kl_nodes, nodes)
        close(ours.kl_decisions, decisions)
        close(ours.kl_root, tree_elbo(tree, exact, x).kl_root)
        assert min(level.z.shape[-1] for level in walk.levels) < MANY


@torch.no_grad()
def test_what_a_node_computes_does_not_matter_to_a_sample_below_the_threshold(few_rows, no_noise):
    tree, x = peaked(1).eval(), images(SPECS["cnn1 r2"], MANY)
    walk = tree.walk(x, None, 1e-2)
    before = tree_elbo(tree, walk, x)
    node = max(tree.topology.leaves, key=lambda i: (walk.reach[tree.topology.top_down.index(i)] == 0).sum())
    here = walk.reach[tree.topology.top_down.index(node)] > 0
    assert here.any()
    assert not here.all()
    for parameter in tree.nodes[str(node)].parameters():
        parameter.add_(1)
    after = tree_elbo(tree, tree.walk(x, None, 1e-2), x)
    for name in ("reconstruction", "kl_nodes"):
        a, b = getattr(before, name), getattr(after, name)
        assert torch.equal(a[~here], b[~here]), name
        assert not torch.isclose(a[here], b[here]).any(), name


def test_the_batch_norms_of_a_node_see_its_rows_and_the_routers_of_the_posterior_see_all(few_rows):
    tree, x = peaked(0), images(SPECS["cnn1 r2"], MANY)
    walk, reference = tree.walk(x, None, 1e-2), Reference(tree)
    tree_elbo(tree, walk, x)
    features, modules, checked = reference.features(x), dict(tree.named_modules()), 0
    for level in walk.levels:
        for k, node in enumerate(level.nodes):
            parent = tree.topology[node].parent
            if level.rows is None or parent is None:
                continue
            above = next(other for other in walk.levels if parent in other.nodes)
            rows = list(range(MANY)) if above.rows is None else above.rows[above.nodes.index(parent)].tolist()
            z_parent = walk[parent].z[[rows.index(b) for b in level.rows[k].tolist()]]
            p_mean, p_variance = reference.heads(
                reference.block(z_parent, f"nodes.{node}.transformation.block"), f"nodes.{node}.transformation.heads"
            )
            close(walk[node].p_mean, p_mean)
            close(walk[node].p_variance, p_variance)
            if node in tree.topology.choosing:
                close(walk[node].p_logit, reference.router(walk[node].z, f"nodes.{node}.prior_router"))
                feature = features[tree.topology[node].depth]
                logit = reference.router(feature, f"nodes.{node}.posterior_router")
                close(walk[node].q_logit, logit[level.rows[k]])
            if tree.topology.is_leaf(node):
                reference.decoder(walk[node].z, f"nodes.{node}.decoder")
            checked += 1
    assert checked > 4
    for name, (mean, variance) in reference.statistics.items():
        close(modules[name].slot_mean, mean, name)
        close(modules[name].slot_var, variance, name)


def test_a_threshold_of_nothing_is_exact_bit_for_bit():
    tree, x = peaked(0), images(SPECS["cnn1 r2"], MANY)
    results = []
    for threshold in (None, 0.0, 1e-300):
        rng = torch.Generator().manual_seed(1)
        walk = tree.walk(x, rng) if threshold is None else tree.walk(x, rng, threshold)
        elbo = tree_elbo(tree, walk, x)
        results.append((*elbo, *gradients(tree, elbo.loss(0.5)).values()))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropped_samples_pay_the_routers_nothing(few_rows, no_noise):
    """A loss with terms merely left out would reward sending samples to a child that is not counted."""
    spec = SPECS["cnn1 r2"]
    tree, x = peak(lively(TreeVAE(spec, Topology.root_with_two_leaves("root")))).eval(), images(spec, MANY)
    walk = tree.walk(x, None, 1e-2)
    sure = (walk.reach[1] == 0) | (walk.reach[2] == 0)
    assert sure.any()
    assert not sure.all()
    logit = dict(tree.named_parameters())["nodes.0.posterior_router.layers.6.bias"]
    rec = tree_elbo(tree, walk, x).reconstruction
    (sures,) = torch.autograd.grad(rec[sure].sum(), logit, retain_graph=True)
    (others,) = torch.autograd.grad(rec[~sure].sum(), logit)
    assert sures.item() == 0
    assert others.item() != 0


def test_fewer_rows_than_the_least_are_all_rows():
    tree, x = peaked(0), images(SPECS["cnn1 r2"], 16)
    assert model.FEWEST_ROWS > 16
    walk = tree.walk(x, None, 1e-2)
    assert all(level.rows is None for level in walk.levels)
    tree_elbo(tree, walk, x).loss(1.0).backward()


def test_grads_flow_with_a_threshold_to_every_parameter(few_rows):
    tree, x = peaked(0), images(SPECS["cnn1 r2"], MANY)
    tree_elbo(tree, tree.walk(x, None, 1e-3), x).loss(1.0).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tree.parameters())


@pytest.mark.parametrize("threshold", [0.0, 1e-3])
def test_one_leaf_and_a_chain_of_single_children(threshold, same_noise):
    spec, topology = SPECS["cnn1 r2"], Topology.root_with_two_leaves("root").split(1, "a").prune(2).prune(3)
    tree, x = lively(TreeVAE(spec, topology)), images(spec, MANY)
    assert topology.choosing == ()
    ours, expected = tree_elbo(tree, tree.walk(x, None, threshold), x), Reference(tree, reference_noise).elbo(x)
    for name, term in expected.items():
        close(getattr(ours, name), term, name)
