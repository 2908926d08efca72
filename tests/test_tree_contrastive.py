"""Protects the contrastive terms: InfoNCE against a plain double loop and closed forms, weights, gradients, heads."""

from __future__ import annotations

import math

import pytest
import torch

from tdiff.tree.contrastive import ProjectionHeads, decision_loss, feature_loss, info_nce
from tdiff.tree.layers import SlotBatchNorm
from tdiff.tree.model import TreeSpec, TreeVAE, norms
from tdiff.tree.topology import Topology

IMAGES, NODES, FEATURES = 7, 3, 5


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-10, "atol": 1e-10} | tolerance))


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def plain(vectors: torch.Tensor, temperature: float) -> list[float]:
    """Loss of every row of one set of vectors [2B, E], number by number."""
    units = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in vectors.tolist()]
    count, losses = len(units) // 2, []
    for a in range(2 * count):
        similar = [math.exp(sum(s * t for s, t in zip(units[a], unit, strict=True)) / temperature) for unit in units]
        other_view = a + count if a < count else a - count
        losses.append(-math.log(similar[other_view] / sum(s for b, s in enumerate(similar) if b != a)))
    return losses


def plain_decisions(left: torch.Tensor, reach: torch.Tensor) -> float:
    total = 0.0
    for node in range(left.shape[1]):
        p, weights = left[:, node], reach[:, node].tolist()
        losses = plain(torch.stack([p, 1 - p], 1), 1.0)
        total += sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    return total


def test_decisions_are_those_of_a_plain_loop():
    left, reach = rand(2 * IMAGES, NODES), rand(2 * IMAGES, NODES)
    close(decision_loss(left, reach).item(), plain_decisions(left, reach))
    close(decision_loss(left[:, :1], reach[:, :1]).item(), plain_decisions(left[:, :1], reach[:, :1]))


def test_features_are_those_of_a_plain_loop():
    projections = randn(FEATURES, 2 * IMAGES, 10)
    expected = sum(sum(plain(one, 0.5)) / (2 * IMAGES) for one in projections) / FEATURES
    close(feature_loss(projections).item(), expected)


def test_sets_of_vectors_do_not_mix():
    vectors = randn(4, 6, 3)
    close(info_nce(vectors, 0.7), torch.cat([info_nce(one[None], 0.7) for one in vectors]))
    close(info_nce(vectors * torch.tensor([1e-3, 1.0, 50.0, 1e4])[:, None, None], 0.7), info_nce(vectors, 0.7))


# --- closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_collapse_leaves_the_positive_no_better_than_the_rest(probability):
    left, reach = torch.full((2 * IMAGES, NODES), probability), torch.rand(2 * IMAGES, NODES)
    assert decision_loss(left, reach).item() == pytest.approx(NODES * math.log(2 * IMAGES - 1), rel=1e-6)


def test_two_clusters_on_which_both_views_agree():
    """Half the images surely left, half surely right: cosine 1 within a cluster, 0 across."""
    count = 8
    left = torch.tensor([0.0, 1.0]).repeat(count)[:, None]  # [16, 1], both views alike
    expected = math.log((count - 1) * math.e + count) - 1
    assert decision_loss(left, torch.ones(2 * count, 1)).item() == pytest.approx(expected, rel=1e-6)
    assert expected < math.log(2 * count - 1), "better than collapse"


def test_views_that_disagree_are_worse_than_collapse():
    count = 8
    left = torch.cat([torch.zeros(count), torch.ones(count)])[:, None]
    # the positive is on the other side, the count - 1 other images of the own view on this one
    expected = math.log((count - 1) * math.e + count)
    assert decision_loss(left, torch.ones(2 * count, 1)).item() == pytest.approx(expected, rel=1e-6)


def test_projections_all_alike_and_all_apart():
    alike = torch.ones(FEATURES, 2 * IMAGES, 10)
    assert feature_loss(alike).item() == pytest.approx(math.log(2 * IMAGES - 1), rel=1e-6)
    apart = torch.eye(10).repeat(2, 1)[None]  # both views alike, every image orthogonal to every other
    assert feature_loss(apart).item() == pytest.approx(math.log(math.exp(2) + 18) - 2, rel=1e-6)


def test_one_image_alone_costs_nothing():
    close(decision_loss(rand(2, NODES), rand(2, NODES)), torch.tensor(0.0).double())
    close(feature_loss(randn(FEATURES, 2, 10)), torch.tensor(0.0).double())


# --- invariances -------------------------------------------------------------------------------


def test_the_order_of_the_images_does_not_matter_but_their_pairing_does():
    left, reach, projections = rand(2 * IMAGES, NODES), rand(2 * IMAGES, NODES), randn(FEATURES, 2 * IMAGES, 10)
    order = torch.randperm(IMAGES)
    both = torch.cat([order, order + IMAGES])
    swapped = torch.arange(2 * IMAGES).roll(IMAGES)
    for rows in (both, swapped):
        close(decision_loss(left[rows], reach[rows]), decision_loss(left, reach))
        close(feature_loss(projections[:, rows]), feature_loss(projections))
    one = torch.cat([torch.arange(IMAGES), torch.arange(IMAGES).roll(1) + IMAGES])
    assert abs(decision_loss(left[one], reach[one]) - decision_loss(left, reach)) > 1e-4
    assert abs(feature_loss(projections[:, one]) - feature_loss(projections)) > 1e-4


def test_left_and_right_are_alike_and_only_the_share_of_reach_counts():
    left, reach = rand(2 * IMAGES, NODES), rand(2 * IMAGES, NODES)
    close(decision_loss(1 - left, reach), decision_loss(left, reach))
    close(decision_loss(left, reach * 1e-3), decision_loss(left, reach))


# --- weights and extremes ----------------------------------------------------------------------


def test_gradients_reach_the_probabilities_and_not_the_weights():
    logits, reach = randn(2 * IMAGES, NODES).requires_grad_(), rand(2 * IMAGES, NODES).requires_grad_()
    decision_loss(logits.sigmoid(), reach).backward()
    assert reach.grad is None
    assert (logits.grad != 0).all()
    left, weights = rand(4, 2).requires_grad_(), rand(4, 2)
    assert torch.autograd.gradcheck(lambda p: decision_loss(p, weights), left)
    projections = randn(2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(feature_loss, projections)


def test_a_node_that_nobody_reaches_adds_nothing():
    left, reach = torch.rand(2 * IMAGES, 3), torch.rand(2 * IMAGES, 3)
    reach[:, 1] = 0
    left.requires_grad_()
    loss = decision_loss(left, reach)
    torch.testing.assert_close(loss, decision_loss(left[:, [0, 2]], reach[:, [0, 2]]))
    loss.backward()
    assert left.grad.isfinite().all()
    assert not left.grad[:, 1].any()
    assert decision_loss(left, torch.zeros(2 * IMAGES, 3)).item() == 0
    faint = decision_loss(left, torch.full((2 * IMAGES, 3), 1e-42))
    assert faint.isfinite()
    assert faint >= 0


def test_a_tree_without_decisions_costs_nothing():
    assert decision_loss(torch.zeros(6, 0), torch.zeros(6, 0)).item() == 0


def test_single_images_weigh_by_their_reach():
    left, reach = rand(2 * IMAGES, 1), torch.zeros(2 * IMAGES, 1).double()
    reach[3] = 1e-5
    close(decision_loss(left, reach).item(), plain(torch.cat([left, 1 - left], 1), 1.0)[3])


def test_extremes_in_fp32_are_finite_with_their_gradients():
    sure = torch.tensor([0.0, 1.0, 1e-45, 1 - 6e-8]).repeat(4)[:, None].requires_grad_()
    loss = decision_loss(sure, torch.ones(16, 1))
    loss.backward()
    assert loss.isfinite()
    assert sure.grad.isfinite().all()
    for value in (0.0, 1e-20, 1.0, 1e15):
        vectors = torch.full((2, 16, 10), value, requires_grad=True)
        loss = feature_loss(vectors)
        loss.backward()
        assert loss.isfinite(), value
        assert vectors.grad.isfinite().all(), value


def test_bf16_inputs_are_compared_in_fp32():
    projections = torch.randn(2, 8, 10).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = feature_loss(projections)
        assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, feature_loss(projections.float()), rtol=1e-5, atol=1e-5)


# --- heads -------------------------------------------------------------------------------------


def test_every_head_is_a_plain_network_of_its_own_feature():
    heads = ProjectionHeads(3, channels=4, size=2, hidden=6).double()
    features = [randn(8, 4, 2, 2) for _ in range(3)]
    got = heads(features)
    assert got.shape == (3, 8, 10)
    for k, feature in enumerate(features):
        inward, outward = torch.nn.Linear(16, 6, bias=False).double(), torch.nn.Linear(6, 10).double()
        norm = torch.nn.BatchNorm1d(6).double()
        with torch.no_grad():
            inward.weight.copy_(heads.inward[k].T)
            outward.weight.copy_(heads.outward[k].T)
            outward.bias.copy_(heads.bias[k, 0])
        close(got[k], outward(torch.nn.functional.silu(norm(inward(feature.flatten(1))))))
    assert not torch.equal(heads.inward[0], heads.inward[1])


def test_heads_take_the_model_s_features_and_every_parameter_gets_a_gradient():
    spec = TreeSpec(3, 8, "cnn2", "gaussian", features=5, latent_channels=3, feature_channels=8, size=2, residual=True)
    tree = TreeVAE(spec, Topology.root_with_two_leaves("init").split(1, "a"))
    heads = ProjectionHeads(spec.features, spec.feature_channels, spec.size)
    features = tree.features(torch.rand(12, 3, 8, 8))
    feature_loss(heads(features)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-8 for p in heads.parameters())
    assert tree.encoder.stem.weight.grad.any(), "the chain itself is what learns"
    assert [type(norm) for norm in norms(heads)] == [SlotBatchNorm], "one the engine averages over the workers"
    assert heads.norm.slots_seen == 1


def test_training_on_the_decisions_makes_the_views_agree():
    """A router on noisy two-dimensional images: after training, both views go the same way, half of them left."""
    torch.manual_seed(1)
    centres = torch.randn(64, 1, 2).sign() * torch.tensor([2.0, 0.0]) + torch.randn(64, 1, 2)
    router = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.SiLU(), torch.nn.Linear(16, 1))
    adam = torch.optim.Adam(router.parameters(), 1e-2)
    for _ in range(150):
        views = (centres + 0.3 * torch.randn(64, 2, 2)).transpose(0, 1).reshape(128, 2)
        adam.zero_grad()
        decision_loss(router(views).sigmoid(), torch.ones(128, 1)).backward()
        adam.step()
    with torch.no_grad():
        views = (centres + 0.3 * torch.randn(64, 2, 2)).transpose(0, 1).reshape(128, 2)
        left = router(views).sigmoid()[:, 0]
    assert ((left[:64] > 0.5) == (left[64:] > 0.5)).float().mean() > 0.9
    assert 0.3 < left.mean() < 0.7
    assert (left - 0.5).abs().mean() > 0.35, "and surely"
