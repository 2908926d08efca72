"""Protects the U-Net: parameter counts, padding, attention, time embedding, JSON; the same numbers however computed."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import interpolate, pad, silu

from tdiff.diffusion import unet
from tdiff.diffusion.unet import (
    Attention,
    ResidualBlock,
    TimeEmbedding,
    UNet,
    UNetSpec,
    Upsample,
    group_norm,
    normalised,
)

torch.set_num_threads(1)

DIGITS = UNetSpec(channels=1, image_size=8, width=32, multipliers=(1, 2), attention=(4,))
SMALL = UNetSpec(channels=2, image_size=6, width=8, multipliers=(1, 2, 2), attention=(4,), blocks=1, heads=2, dropout=0)


def awake(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with noise on every parameter: what starts as zero would hide what is behind it."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return module


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        (UNetSpec(1, 28, 64, (1, 2, 2, 2), attention=()), 9_259_713),
        (UNetSpec(3, 32, 128, (1, 2, 2, 2), attention=(4,)), 38_307_203),
        (UNetSpec(3, 64, 128, (1, 2, 2, 2, 4), attention=(8, 4)), 88_095_875),
    ],
    ids=["28px", "32px", "64px"],
)
def test_parameter_counts_of_the_public_code(spec: UNetSpec, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(spec).parameters()) == parameters


def test_digits_start_as_zero_and_keep_their_shape() -> None:
    net = UNet(DIGITS)
    out = net(torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999]))
    assert out.shape == (3, 1, 8, 8)
    assert not out.any()


def test_28_pixels_are_padded_to_32_and_cropped() -> None:
    spec = UNetSpec(1, 28, 8, (1, 1, 1, 1), attention=(16,), blocks=1, heads=2, dropout=0)
    assert spec.resolutions == (32, 16, 8, 4)
    net, bare = awake(UNet(spec)), UNet(UNetSpec(1, 32, 8, (1, 1, 1, 1), (16,), blocks=1, heads=2, dropout=0))
    bare.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    out = net(x, t)
    assert out.shape == x.shape
    torch.testing.assert_close(out, bare(pad(x, (2, 2, 2, 2)), t)[:, :, 2:-2, 2:-2])


def test_odd_padding_keeps_the_shape() -> None:
    assert UNetSpec(1, 7, 8, (1, 2)).padded_size == 8
    assert awake(UNet(UNetSpec(1, 7, 8, (1, 2))))(torch.randn(1, 1, 7, 7), torch.tensor([1])).shape == (1, 1, 7, 7)


def test_output_depends_on_time_embedding_and_image_beside() -> None:
    spec = replace(SMALL, condition_channels=2)
    net = awake(UNet(spec))
    x, recon, y = torch.randn(2, 2, 6, 6), torch.randn(2, 2, 6, 6), torch.randn(2, spec.embedding_size)
    t = torch.tensor([10, 10])
    base = net(x, t, y, recon)
    assert not torch.allclose(base, net(x, t + 1, y, recon))
    assert not torch.allclose(base, net(x, t, 2 * y, recon))
    assert not torch.allclose(base, net(x, t, y, -recon))
    torch.testing.assert_close(base, net(x, t.double(), y, recon))
    torch.testing.assert_close(base[:1], net(x[:1], t[:1], y[:1], recon[:1]))
    with pytest.raises(ValueError, match="recon has 0 channels"):
        net(x, t, y)


def test_autocast_gives_float32_near_full_precision() -> None:
    net, x, t = awake(UNet(SMALL)), torch.randn(2, 2, 6, 6), torch.tensor([5, 900])
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t)
    assert out.dtype == torch.float32
    assert (out - net(x, t)).norm() < 0.1 * out.norm()


def channels_last(device: torch.device) -> torch.memory_format:
    return torch.channels_last


def gradients(net: torch.nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A loss and the gradients of all parameters; dropout draws the same every time."""
    torch.manual_seed(0)
    loss = (net(*inputs) - 1).square().mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(net.parameters())))


def test_channels_last_equals_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    net = awake(UNet(SMALL))
    inputs = torch.randn(3, 2, 6, 6), torch.tensor([5, 400, 900]), torch.randn(3, SMALL.embedding_size)
    loss, expected = gradients(net, *inputs)
    seen, last = [], torch.channels_last
    for block in net.modules():
        if isinstance(block, ResidualBlock | Attention | Upsample):
            block.register_forward_hook(lambda _, inputs, out: seen.append(out.is_contiguous(memory_format=last)))
    monkeypatch.setattr(unet, "memory_format", channels_last)
    other_loss, other = gradients(net, *inputs)
    assert len(seen) == (3 + 2 + 3 * 2) + (1 + 1 + 2) + 2
    assert all(seen)
    torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


def test_norms_of_both_layouts_against_the_formula() -> None:
    norm, x, weight, bias = awake(group_norm(8)), torch.randn(3, 8, 4, 4), torch.randn(3, 8), torch.randn(3, 8)
    plain = norm(x)
    affine = (plain - norm.bias[:, None, None]) / norm.weight[:, None, None]
    affine = affine * weight[:, :, None, None] + bias[:, :, None, None]
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(normalised(norm, y, norm.weight, norm.bias), plain)
        torch.testing.assert_close(normalised(norm, y, weight, bias), affine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_gives_the_same_loss_and_gradients(autocast: bool) -> None:
    net = awake(UNet(replace(SMALL, dropout=0.3)))
    inputs = torch.randn(3, 2, 6, 6), torch.tensor([5, 400, 900]), torch.randn(3, SMALL.embedding_size)
    calls = []
    net.middle[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = gradients(net, *inputs)
        net.recompute = True
        torch.testing.assert_close(gradients(net, *inputs), expected, rtol=0, atol=0)
    assert len(calls) == 1 + 2  # the second time forward and again backward
    with torch.no_grad():
        net(*inputs)
    assert len(calls) == 4
    assert "recompute" not in net.spec.to_dict()


@pytest.mark.parametrize("last", [False, True])
def test_bf16_is_near_fp32_in_loss_and_gradients(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerances: 1% of the loss; of the gradient, all parameters together, 3% (a bf16 number has 0.4%)."""
    net = awake(UNet(DIGITS), seed=1).eval()
    inputs = torch.randn(8, 1, 8, 8), torch.arange(0, 1000, 125), torch.randn(8, DIGITS.embedding_size)
    if last:
        monkeypatch.setattr(unet, "memory_format", channels_last)
    loss, expected = gradients(net, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough_loss, rough = gradients(net, *inputs)
    assert all(g.dtype == torch.float32 for g in rough)
    torch.testing.assert_close(rough_loss, loss, rtol=0.01, atol=0)
    a, b = (torch.cat([g.flatten() for g in parts]) for parts in (rough, expected))
    assert (a - b).norm() < 0.03 * b.norm()


def test_compiling_keeps_the_names_of_the_state() -> None:
    """`Module.compile` works in place, so that nothing called _orig_mod can come into ema.safetensors."""
    net, x, t = awake(UNet(SMALL)), torch.randn(2, 2, 6, 6), torch.tensor([5, 900])
    expected, names = net(x, t), list(net.state_dict())
    net.compile(backend="eager")  # through Dynamo, without the minutes of a C++ compiler
    torch.testing.assert_close(net(x, t), expected)
    assert list(net.state_dict()) == names
    assert not any("_orig_mod" in name for name in (*names, *dict(net.named_parameters()), *dict(net.named_modules())))


def test_upsampling_is_nearest_neighbours_and_a_conv() -> None:
    layer, x = awake(Upsample(6)), torch.randn(2, 6, 5, 5)
    expected = layer.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(layer(x, torch.empty(0)), expected)


def test_written_out_attention_of_bf16_is_that_of_fp32() -> None:
    layer, x = awake(Attention(32, heads=2)), torch.randn(3, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    change = layer(x) - x
    assert (rough - x - change).norm() < 0.02 * change.norm()


def test_attention_against_an_explicit_softmax() -> None:
    layer, x = awake(Attention(8, heads=2)), torch.randn(3, 8, 4, 4)
    tokens = layer.norm(x).reshape(3, 8, 16).permute(0, 2, 1)
    q, k, v = layer.qkv(tokens).chunk(3, -1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (q[..., head] @ k[..., head].mT / math.sqrt(4)).softmax(-1)
        heads.append(weights @ v[..., head])
    expected = x + layer.out(torch.cat(heads, -1)).permute(0, 2, 1).reshape(3, 8, 4, 4)
    torch.testing.assert_close(layer(x), expected)


def test_time_embedding_against_the_formula() -> None:
    layer = TimeEmbedding(4, 16)
    angles = [750.0, 750.0 / math.sqrt(10000)]
    row = torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]])
    torch.testing.assert_close(layer(torch.tensor([750])), layer.layers(row), rtol=1e-3, atol=1e-4)
    exact = layer(torch.tensor([750]))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(torch.tensor([750])), exact)


def test_residual_block_against_the_formula() -> None:
    layer = awake(ResidualBlock(8, 4, embedding=6, dropout=0.5)).eval()
    x, e = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    y = layer.norm_out(layer.conv_in(silu(layer.norm_in(x))))
    parameters = layer.modulation(e)
    y = y * (1 + parameters[:, :4].reshape(2, 4, 1, 1)) + parameters[:, 4:].reshape(2, 4, 1, 1)
    torch.testing.assert_close(layer(x, e), layer.shortcut(x) + layer.conv_out(silu(y)))
    assert not torch.equal(layer.train()(x, e), layer(x, e))  # dropout


def test_blocks_read_silu_of_time_plus_condition() -> None:
    net, y, t = awake(UNet(SMALL)), torch.randn(2, SMALL.embedding_size), torch.tensor([4, 800])
    read = []
    for module in net.modules():
        if isinstance(module, ResidualBlock):
            module.modulation.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    net(torch.randn(2, 2, 6, 6), t, y)
    assert len(read) == 3 + 2 + 3 * 2
    for e in read:
        torch.testing.assert_close(e, silu(net.time(t) + y))


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (128, 32), (384, 32), (32, 16), (8, 4), (3, 1), (1, 1)])
def test_group_norm_has_32_groups_or_what_fits(channels: int, groups: int) -> None:
    assert group_norm(channels).num_groups == groups


def test_spec_survives_json() -> None:
    assert UNetSpec.from_dict(json.loads(json.dumps(DIGITS.to_dict()))) == DIGITS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": (16,)}, "attention names resolution 16"),
        ({"heads": 7}, "heads is 7"),
        ({"width": 33}, "width is 33"),
        ({"width": "32"}, "not the shape"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"multipliers": ()}, "multipliers"),
        ({"blocks": 0}, "blocks is 0"),
        ({"depth": 3}, "unknown entry 'depth'"),
    ],
)
def test_what_cannot_be_built_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetSpec.from_dict({**DIGITS.to_dict(), **change})
