"""Protects the networks at the nodes: the sizes they promise, and the batch norm that makes runs independent
of the number of workers.

SlotBatchNorm is held against torch's own BatchNorm2d: one slot must be exactly that, several slots must move
the running statistics once, towards the mean of the slots, in whatever order they come.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tdiff.tree.layers import (
    ENCODERS,
    ConvBlock,
    GaussianHeads,
    ResidualBlock,
    Router,
    SlotBatchNorm,
    Transformation,
    conv3x3,
    residual_widths,
    stage_sizes,
)
from tdiff.tree.model import evaluating, norms

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --- encoders and decoders ---------------------------------------------------------------------

ODD_SIZES = [(12, 4), (20, 4), (24, 4), (36, 4), (40, 4), (16, 3), (30, 7)]
SIZES = [(8, 2), (28, 2), (28, 4), (32, 4), (64, 4)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("image_size", "size"), SIZES)
@pytest.mark.parametrize("name", ["cnn1", "cnn2"])
def test_encoder_and_decoder_shapes(name, image_size, size, channels):
    make_encoder, make_decoder = ENCODERS[name]
    encoder, decoder = make_encoder(channels, image_size, 16, size), make_decoder(6, channels, image_size, 16, size)
    x = torch.rand(2, channels, image_size, image_size, requires_grad=True)
    feature = encoder(x)
    assert feature.shape == (2, 16, size, size)
    z = torch.randn(2, 6, size, size, requires_grad=True)
    image = decoder(z)
    assert image.shape == x.shape
    # A random projection, because batch norm makes the plain sum's gradient vanish.
    (feature * torch.randn_like(feature)).sum().backward()
    (image * torch.randn_like(image)).sum().backward()
    assert x.grad.abs().amax((0, 1, 2)).gt(0).all(), "every column of the image is seen"
    assert z.grad.abs().flatten(2).amax((0, 1)).gt(0).all(), "every place of the latent is used"


@pytest.mark.parametrize("name", ["cnn1", "cnn2"])
def test_decoder_output_is_unbounded(name):
    """Logits or means: no sigmoid, SiLU or ReLU at the end."""
    decoder = ENCODERS[name][1](6, 1, 8, 16, 2)
    with torch.no_grad():
        decoder.image.weight.mul_(100)
        image = decoder(torch.randn(16, 6, 2, 2))
    assert image.min() < -1
    assert image.max() > 1


@pytest.mark.parametrize(
    ("image_size", "size", "sizes"),
    [
        (8, 2, [8, 8, 4, 2]),
        (28, 2, [28, 14, 7, 2]),
        (28, 4, [28, 14, 7, 4]),
        (32, 4, [32, 16, 8, 4]),
        (64, 4, [64, 32, 16, 4]),
        (4, 4, [4, 4, 4, 4]),
    ],
)
def test_cnn1_sizes(image_size, size, sizes):
    assert stage_sizes(image_size, size) == sizes


def test_cnn2_halves_once_a_block_from_8_channels_up_to_c():
    assert residual_widths(64, 128, 4) == ([64, 32, 16, 8, 4], [8, 38, 68, 98, 128])
    assert residual_widths(32, 128, 4) == ([32, 16, 8, 4], [8, 48, 88, 128])
    assert residual_widths(28, 32, 4)[0] == [28, 14, 7, 4]


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_divides_the_size_rounding_up(stride):
    for n in range(2, 20):
        assert conv3x3(1, 1, stride)(torch.zeros(1, 1, n, n)).shape[-1] == -(-n // stride), n


@pytest.mark.parametrize(("image_size", "size"), ODD_SIZES)
def test_cnn1_reaches_r_from_any_image_size(image_size, size):
    """A folder of images may have any size."""
    encoder = ENCODERS["cnn1"][0](1, image_size, 16, size)
    assert encoder(torch.rand(2, 1, image_size, image_size)).shape == (2, 16, size, size)


@pytest.mark.parametrize(("image_size", "size"), ODD_SIZES)
def test_cnn2_and_both_decoders_reach_any_size(image_size, size):
    x, z = torch.rand(2, 1, image_size, image_size), torch.randn(2, 6, size, size)
    assert ENCODERS["cnn2"][0](1, image_size, 16, size)(x).shape == (2, 16, size, size)
    for _, decoder in ENCODERS.values():
        assert decoder(6, 1, image_size, 16, size)(z).shape == x.shape


# --- the small networks ------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(6, 16), (16, 16)])
def test_blocks_keep_the_size(inputs, outputs, residual):
    x = torch.randn(4, inputs, 2, 2)
    assert ConvBlock(inputs, outputs, residual)(x).shape == (4, outputs, 2, 2)
    assert ResidualBlock(inputs, outputs)(x).shape == (4, outputs, 2, 2)


def test_shortcuts():
    """Residual: shortcut + branch; cnn2: shortcut + 0.1 * branch. With a silent branch only the shortcut is left."""
    x = torch.randn(4, 6, 2, 2)
    block, pre = ConvBlock(6, 6, True).eval(), ResidualBlock(6, 6).eval()
    torch.testing.assert_close(block(x), x + block.body(x))
    torch.testing.assert_close(pre(x), x + pre.branch(x) / 10)
    plain = ConvBlock(6, 6, False).eval()
    torch.testing.assert_close(plain(x), plain.body(x))
    wider = ConvBlock(6, 16, True).eval()
    torch.testing.assert_close(wider(x), wider.shortcut(x) + wider.body(x))


def test_moments_have_positive_variance_even_when_softplus_underflows():
    heads = GaussianHeads(16, 6)
    with torch.no_grad():
        heads.variance.bias.fill_(-1e4)
    mean, variance = heads(torch.randn(4, 16, 2, 2))
    assert mean.shape == variance.shape == (4, 6, 2, 2)
    assert (variance > 0).all()
    assert (1 / variance).isfinite().all()


def test_softplus_makes_the_variance():
    heads = GaussianHeads(16, 6)
    x = torch.randn(4, 16, 2, 2)
    torch.testing.assert_close(heads(x)[1], heads.variance(x).exp().log1p(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_transformation_and_router_shapes(size):
    z = torch.randn(4, 6, size, size)
    mean, variance = Transformation(6, 16, residual=True)(z)
    assert mean.shape == variance.shape == z.shape
    router = Router(6, 16, size)
    assert router(z).shape == (4,)
    assert router.eval()(z[:1]).shape == (1,), "a batch of one is a batch"


# --- SlotBatchNorm -----------------------------------------------------------------------------


def norm_and_reference(channels: int = 5) -> tuple[SlotBatchNorm, nn.BatchNorm2d]:
    """The same weights and running statistics, none of them at their initial values."""
    ours, reference = SlotBatchNorm(channels), nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (reference.weight, reference.bias, reference.running_mean):
            tensor.normal_()
        reference.running_var.uniform_(0.5, 2)
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def slots(count: int, channels: int = 5) -> list[torch.Tensor]:
    """Slots of one step, each of another mean and scale."""
    return [torch.randn(8, channels, 3, 3) * (k + 1) + 2 * k for k in range(count)]


def test_its_state_is_that_of_batch_norm():
    ours, reference = norm_and_reference()
    assert list(ours.state_dict()) == list(reference.state_dict()), "slot buffers are no part of a checkpoint"


def test_one_slot_is_batch_norm():
    ours, reference = norm_and_reference()
    for x in slots(3):  # three steps of one slot each
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = ours(a), reference(b)
        assert torch.equal(out, expected)
        weights = torch.randn_like(out)
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(ours.weight.grad, reference.weight.grad)
        ours.move_running_statistics()
        torch.testing.assert_close(ours.running_mean, reference.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.running_var, reference.running_var, rtol=1e-6, atol=1e-6)


def test_every_slot_is_normalised_by_itself():
    ours, reference = norm_and_reference()
    for x in slots(3):
        assert torch.equal(ours(x), reference(x))


def test_running_statistics_move_once_a_step_towards_the_mean_of_the_slots():
    ours, _ = norm_and_reference()
    for step in range(3):  # the second and third step must not see what the first left in the slot buffers
        mean, var = ours.running_mean.clone(), ours.running_var.clone()
        a, b = slots(2)
        a, b = a + step, b * (step + 1)
        ours(a), ours(b)
        assert torch.equal(ours.running_mean, mean), "nothing moves before the engine says so"
        assert torch.equal(ours.running_var, var)
        ours.move_running_statistics()
        means = torch.stack([x.mean((0, 2, 3)) for x in (a, b)])
        variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in (a, b)])  # unbiased, as torch keeps it
        torch.testing.assert_close(ours.running_mean, 0.9 * mean + 0.1 * means.mean(0))
        torch.testing.assert_close(ours.running_var, 0.9 * var + 0.1 * variances.mean(0))


def test_order_of_slots_does_not_matter():
    data, results = slots(4), []
    start = norm_and_reference()[0].state_dict()
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        ours = SlotBatchNorm(5)
        ours.load_state_dict(start)
        outputs = {k: ours(data[k]) for k in order}
        ours.move_running_statistics()
        results.append((outputs, ours.running_mean, ours.running_var))
    for outputs, mean, var in results[1:]:
        assert all(torch.equal(outputs[k], results[0][0][k]) for k in range(4))
        torch.testing.assert_close(mean, results[0][1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, results[0][2], rtol=1e-5, atol=1e-6)


def test_workers_that_share_the_slots_move_as_one_worker_would():
    """Two workers of two slots each, slot buffers averaged in between, equal one worker of four."""
    data, start = slots(4), norm_and_reference()[0].state_dict()
    one, left, right = (SlotBatchNorm(5) for _ in range(3))
    for norm, part in ((one, data), (left, data[:2]), (right, data[2:])):
        norm.load_state_dict(start)
        for x in part:
            norm(x)
    for name in ("slot_mean", "slot_var"):
        mean = (getattr(left, name) + getattr(right, name)) / 2
        for norm in (left, right):
            getattr(norm, name).copy_(mean)
    for norm in (one, left, right):
        norm.move_running_statistics()
    assert torch.equal(left.running_mean, right.running_mean)
    torch.testing.assert_close(left.running_mean, one.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(left.running_var, one.running_var, rtol=1e-5, atol=1e-6)


def test_evaluation_is_batch_norm_and_moves_nothing():
    ours, reference = norm_and_reference()
    ours.eval(), reference.eval()
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    for x in (*slots(2), torch.randn(1, 5, 1, 1)):
        assert torch.equal(ours(x), reference(x))
    assert ours.slots_seen == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())


def test_flat_features_are_batch_norm_too():
    ours, reference = SlotBatchNorm(5), nn.BatchNorm1d(5)
    x = torch.randn(16, 5) * 3 + 1
    assert torch.equal(ours(x), reference(x))
    ours.move_running_statistics()
    torch.testing.assert_close(ours.running_var, reference.running_var)
    assert torch.equal(ours.eval()(x).isfinite(), torch.ones(16, 5, dtype=torch.bool))


# --- modes -------------------------------------------------------------------------------------


def test_norms_lists_those_in_training_mode():
    network = nn.Sequential(ConvBlock(6, 6, False), ConvBlock(6, 6, False).eval())
    assert list(norms(network)) == [network[0].body[i][1] for i in range(3)]


def test_evaluating_restores_every_mode_also_after_an_error():
    network = nn.Sequential(ConvBlock(6, 6, False), ConvBlock(6, 6, False).eval())
    modes = [m.training for m in network.modules()]
    with pytest.raises(RuntimeError, match="stop"), evaluating(network):  # noqa: PT012
        assert not any(m.training for m in network.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert [m.training for m in network.modules()] == modes
    assert torch.is_grad_enabled()
