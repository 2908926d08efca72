"""The U-Net that denoises images, after Nichol & Dhariwal (Improved DDPM, 2021).

It knows time, an embedding added to that of time (the condition), and an image laid beside x_t (the
reconstruction); what these mean is said in condition.py. Images are float in [-1, 1].

Legend: B batch, I image channels, H = W image size, C feature channels, h feature size, E embedding
width (4 * width), A attention heads, N = h * h positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class UNetSpec:
    """All that a U-Net's shape depends on. Raises ValueError for a shape that cannot be built.

    channels, image_size: I and H in pixels. width: channels at full resolution, even; `multipliers` times it
    at each level, every level half the size of the one before. attention: the FEATURE RESOLUTIONS in pixels, after
    padding, that get attention (the middle always has it). blocks: residual blocks a level on the way down, one
    more on the way up. dropout: probability in [0, 1). condition_channels: of the image laid beside x_t, or 0.
    """

    channels: int
    image_size: int
    width: int
    multipliers: tuple[int, ...]
    attention: tuple[int, ...] = ()
    blocks: int = 2
    heads: int = 8
    dropout: float = 0.1
    condition_channels: int = 0

    def __post_init__(self) -> None:
        for name in ("channels", "image_size", "width", "blocks", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.width % 2:
            raise ValueError(f"width is {self.width}, but must be even: half of it are sines, half cosines of time")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers is {self.multipliers}: give one positive factor a level")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be in [0, 1)")
        if self.condition_channels < 0:
            raise ValueError(f"condition_channels is {self.condition_channels}, but cannot be negative")
        if unknown := sorted(set(self.attention) - set(self.resolutions)):
            raise ValueError(
                f"attention names resolution {unknown[0]}, but the feature resolutions are "
                f"{', '.join(map(str, self.resolutions))}: choose among them"
            )
        attending = [m for m, size in zip(self.multipliers, self.resolutions, strict=True) if size in self.attention]
        for multiplier in (*attending, self.multipliers[-1]):
            if self.width * multiplier % self.heads:
                raise ValueError(f"heads is {self.heads}, but must divide the {self.width * multiplier} channels there")

    @property
    def padded_size(self) -> int:
        """Size inside: the image's, padded until it can be halved at every level (28 -> 32 with four)."""
        step = 1 << (len(self.multipliers) - 1)
        return -(-self.image_size // step) * step

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Feature size of every level, finest first."""
        return tuple(self.padded_size >> level for level in range(len(self.multipliers)))

    @property
    def embedding_size(self) -> int:
        """E, the width of the time embedding and of any condition added to it."""
        return 4 * self.width

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists only, for JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> UNetSpec:
        """The inverse of `to_dict`. Raises ValueError for unknown, missing or mistyped entries."""
        known = {field.name for field in fields(UNetSpec)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown entry {unknown[0]!r} of a U-Net; known are {', '.join(sorted(known))}")
        try:
            tuples = {name: tuple(values[name]) for name in ("multipliers", "attention") if name in values}
            return UNetSpec(**{**values, **tuples})
        except TypeError as error:
            raise ValueError(f"not the shape of a U-Net: {error}") from error


def zeroed(layer: Layer) -> Layer:
    """The layer with all parameters 0, so that its residual branch starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm(32), or fewer groups where narrow maps need it: [B, C, h, h] -> the same shape."""
    # At least two channels a group: with one it would be instance norm, which erases the mean of every map.
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)


class TimeEmbedding(nn.Module):
    """Sines and cosines of t at geometric frequencies 1 .. 1/10000, then Linear-SiLU-Linear: [B] -> [B, E]."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        # Full precision whatever the caller's autocast: bf16's 8 bits cannot tell neighbouring steps apart.
        with torch.autocast(t.device.type, enabled=False):
            frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
            angles = t.float()[:, None] * frequencies  # [B, width/2]
            embedding: Tensor = self.layers(torch.cat([angles.cos(), angles.sin()], 1))  # [B, E]
        return embedding


def memory_format(device: torch.device) -> torch.memory_format:
    """Layout of the feature maps: channels-last on GPUs; on CPUs its norms cost more than its convs gain."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def normalised(norm: nn.GroupNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The group norm of x [B, C, h, h] with an affine map of its own, [C] or each sample's [B, C], in x's layout."""
    batch, channels, groups = *x.shape[:2], norm.num_groups
    if x.is_contiguous():
        if weight.ndim == 1:
            return F.group_norm(x, groups, weight, bias, norm.eps)
        # All samples as one of B * C channels: so torch's kernel applies [B, C] numbers in the same pass.
        flat = x.view(1, batch * channels, *x.shape[2:])
        return F.group_norm(flat, batch * groups, weight.flatten(), bias.flatten(), norm.eps).view(x.shape)
    # Written out: torch's kernel for GPUs copies channels-last maps to NCHW.
    variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)).float(), (2, 3, 4), correction=0)  # [B, G] each
    each = (-1, groups, channels // groups)
    gain = weight.view(each) * (variance + norm.eps).rsqrt()[:, :, None]  # [B, G, C/G]
    offset = bias.view(each) - mean[:, :, None] * gain
    return torch.addcmul(offset.flatten(1)[:, :, None, None], x, gain.flatten(1)[:, :, None, None])


class ResidualBlock(nn.Module):
    """x + two norm-SiLU-conv, the second norm scaled and shifted by the embedding.

    x [B, inputs, h, h], e [B, E] (after SiLU) -> [B, outputs, h, h].
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float):
        super().__init__()
        self.norm_in = group_norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm_out = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        y = normalised(self.norm_in, x, self.norm_in.weight, self.norm_in.bias)
        y = self.conv_in(F.silu(y))  # [B, outputs, h, h]
        scale, shift = self.modulation(e).float().chunk(2, 1)  # [B, outputs] each
        # norm(y) * (1 + scale) + shift, as one affine map.
        weight, bias = self.norm_out.weight * (1 + scale), self.norm_out.bias * (1 + scale) + shift
        y = F.silu(normalised(self.norm_out, y, weight, bias))
        y = self.conv_out(self.dropout(y))
        out: Tensor = self.shortcut(x) + y
        return out


def pointwise(linear: nn.Linear, x: Tensor) -> Tensor:
    """A Linear at every place: [B, C, h, h] -> [B, O, h, h]."""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


class Attention(nn.Module):
    """x + self-attention of the positions to each other: [B, C, h, h] -> [B, C, h, h]."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y = normalised(self.norm, x, self.norm.weight, self.norm.bias)
        # 1x1 convs on channels-last maps: the same as Linear on tokens, and on CPUs in fp32 1.5 times as fast.
        y = pointwise(self.qkv, y.contiguous(memory_format=torch.channels_last))  # [B, 3C, h, h]
        tokens = y.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, 3C]
        q, k, v = tokens.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, A, N, C/A] each
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # Written out: the backward of torch's own takes 2.5 times as long here.
            weights = (k @ (q * q.shape[3] ** -0.5).mT).softmax(2)  # [B, A, N, N], of keys for queries
            heads = weights.mT @ v  # [B, A, N, C/A]
        else:
            heads = F.scaled_dot_product_attention(q, k, v)  # [B, A, N, C/A]
        y = heads.transpose(1, 2).reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)  # [B, C, h, h]
        out: Tensor = x + pointwise(self.out, y)
        return out


class Block(nn.Module):
    """A residual block, with attention after it where asked for: [B, inputs, h, h], [B, E] -> [B, outputs, h, h]."""

    def __init__(self, inputs: int, outputs: int, spec: UNetSpec, attention: bool):
        super().__init__()
        self.residual = ResidualBlock(inputs, outputs, spec.embedding_size, spec.dropout)
        self.attention = Attention(outputs, spec.heads) if attention else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        y: Tensor = self.attention(self.residual(x, e))
        return y


class Downsample(nn.Module):
    """Learned halving: [B, C, h, h] -> [B, C, h/2, h/2]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class Upsample(nn.Module):
    """Nearest neighbours, then a learned conv: [B, C, h, h] -> [B, C, 2h, 2h].

    Computed as the one transposed conv that both are together, with 4 weights an output where the 3x3 conv on the
    enlarged map has 9: a weight of the 4x4 kernel is the sum of those 3x3 weights that meet the same input place.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        kernel = self.conv.weight.flip(2, 3).transpose(0, 1)  # [C in, C out, 3, 3]
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))  # [C in, C out, 4, 4]
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


class UNet(nn.Module):
    """The U-Net of a given spec; its output starts as 0 everywhere.

    recompute: a switch (gradient checkpointing): backward computes every block anew instead of keeping what is inside
    it. The same numbers for less memory and a third more work.
    """

    def __init__(self, spec: UNetSpec):
        super().__init__()
        self.spec = spec
        self.recompute = False
        self.time = TimeEmbedding(spec.width, spec.embedding_size)
        self.stem = nn.Conv2d(spec.channels + spec.condition_channels, spec.width, 3, padding=1)
        levels = [
            (spec.width * m, size in spec.attention) for m, size in zip(spec.multipliers, spec.resolutions, strict=True)
        ]
        channels, skips = spec.width, [spec.width]

        self.down = nn.ModuleList()
        for level, (width, attention) in enumerate(levels):
            if level > 0:
                self.down.append(Downsample(channels))
                skips.append(channels)
            for _ in range(spec.blocks):
                self.down.append(Block(channels, width, spec, attention))
                skips.append(channels := width)

        self.middle = nn.ModuleList(Block(channels, channels, spec, attention) for attention in (True, False))

        self.up = nn.ModuleList()
        for level, (width, attention) in reversed(list(enumerate(levels))):
            for _ in range(spec.blocks + 1):
                self.up.append(Block(channels + skips.pop(), width, spec, attention))
                channels = width
            if level > 0:
                self.up.append(Upsample(channels))

        self.norm = group_norm(channels)
        self.out = zeroed(nn.Conv2d(channels, spec.channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, embedding: Tensor | None = None, recon: Tensor | None = None) -> Tensor:
        """Noisy images x_t [B, I, H, H] at steps t [B] (any number type) -> the network's output, [B, I, H, H] float32.

        embedding: [B, E], added to the time embedding. recon: [B, condition_channels, H, H] in [-1, 1], beside x_t.
        Raises ValueError if recon is there and was not planned for, or the other way round.
        """
        spec = self.spec
        given = 0 if recon is None else recon.shape[1]
        if given != spec.condition_channels:
            raise ValueError(f"recon has {given} channels, but the U-Net was built for {spec.condition_channels}")
        x = x_t if recon is None else torch.cat([x_t, recon], 1)  # [B, I + condition_channels, H, H]
        before, total = (spec.padded_size - spec.image_size) // 2, spec.padded_size - spec.image_size
        x = F.pad(x, (before, total - before, before, total - before))
        e = self.time(t) if embedding is None else self.time(t) + embedding  # [B, E]
        e = F.silu(e)

        x = self.stem(x).contiguous(memory_format=memory_format(x.device))
        skips = [x]
        for layer in self.down:
            x = self._apply_layer(layer, x, e)
            skips.append(x)
        for layer in self.middle:
            x = self._apply_layer(layer, x, e)
        for layer in self.up:
            x = self._apply_layer(layer, x if isinstance(layer, Upsample) else torch.cat([x, skips.pop()], 1), e)
        x = self.out(F.silu(normalised(self.norm, x, self.norm.weight, self.norm.bias)))
        inside = slice(before, before + spec.image_size)
        y: Tensor = x[:, :, inside, inside].float()
        return y

    def _apply_layer(self, layer: nn.Module, x: Tensor, e: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            y: Tensor = checkpoint(layer, x, e, use_reentrant=False)
        else:
            y = layer(x, e)
        return y
