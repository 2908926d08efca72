"""The networks at the nodes of a tree: encoder, bottom-up blocks, transformations, denses, routers, decoders.

Legend: B batch, I image channels, H = W image size, C feature channels, D latent channels, r feature size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlotBatchNorm(nn.BatchNorm2d):
    """Batch norm over one slot, whose running statistics move once per global step.

    A global batch is S slots, each normalised by its own statistics. While the slots of a step pass
    through, `slot_mean` and `slot_var` become the mean of the slots' batch statistics; the engine then
    averages them over the workers and calls `move_running_statistics`. So neither outputs nor running
    statistics depend on how many workers share the slots. Takes [B, C, h, w] or [B, C].
    """

    slot_mean: Tensor
    slot_var: Tensor

    def __init__(self, channels: int):
        super().__init__(channels)
        self.register_buffer("slot_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("slot_var", torch.zeros(channels), persistent=False)
        self.slots_seen = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        self.slots_seen += 1
        # A momentum of 1/k for the k-th slot makes the buffers the plain mean of the k slots' statistics.
        momentum = 1.0 / self.slots_seen
        return F.batch_norm(x, self.slot_mean, self.slot_var, self.weight, self.bias, True, momentum, self.eps)

    def move_running_statistics(self) -> None:
        """Running statistics <- lerp towards the slots' mean, once per global step."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.running_mean.lerp_(self.slot_mean, self.momentum)
        self.running_var.lerp_(self.slot_var, self.momentum)
        self.slots_seen = 0


def conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A padded conv, kernel 3 or stride + 1 if that is larger: stride 1 keeps the size, 2 halves it rounding up."""
    return nn.Conv2d(inputs, outputs, max(3, stride + 1), stride, padding=1, bias=bias)


def conv_bn_silu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """[B, inputs, h, w] -> [B, outputs, h/stride, w/stride].

    No bias before a batch norm, here or below: its gradient is nothing but rounding, which Adam makes full steps of,
    and running means would come to depend on how many workers share the slots.
    """
    return nn.Sequential(conv3x3(inputs, outputs, stride, bias=False), SlotBatchNorm(outputs), nn.SiLU())


class ConvBlock(nn.Module):
    """Three conv-BN-SiLU, optionally around a shortcut: [B, inputs, r, r] -> [B, outputs, r, r]."""

    def __init__(self, inputs: int, outputs: int, residual: bool):
        super().__init__()
        self.body = nn.Sequential(*(conv_bn_silu(inputs if i == 0 else outputs, outputs) for i in range(3)))
        self.residual = residual
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if residual and inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return self.shortcut(x) + y if self.residual else y


class GaussianHeads(nn.Module):
    """Two 3x3 convs: [B, inputs, r, r] -> mean [B, D, r, r] and variance [B, D, r, r] > 0 (softplus)."""

    def __init__(self, inputs: int, latent: int):
        super().__init__()
        self.mean = conv3x3(inputs, latent)
        self.variance = conv3x3(inputs, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The floor keeps 1/variance finite in fp32 when softplus underflows.
        return self.mean(x), F.softplus(self.variance(x)) + 1e-6


class Transformation(nn.Module):
    """Prior of a node given its parent's latent, p(z_i | z_pa(i)): [B, D, r, r] -> mean, variance of z_i."""

    def __init__(self, latent: int, hidden: int, residual: bool):
        super().__init__()
        self.block = ConvBlock(latent, hidden, residual)
        self.heads = GaussianHeads(hidden, latent)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = self.heads(self.block(z))
        return mean, variance


class Router(nn.Module):
    """Logit of going LEFT at an inner node: [B, inputs, r, r] -> [B]."""

    def __init__(self, inputs: int, hidden: int, size: int):
        super().__init__()
        self.squeeze = conv3x3(inputs, 1, bias=False)
        self.layers = nn.Sequential(
            nn.Linear(size * size, hidden, bias=False),
            SlotBatchNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden, bias=False),
            SlotBatchNorm(hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        logit: Tensor = self.layers(self.squeeze(x).flatten(1))
        return logit.squeeze(1)  # [B]


def stage_sizes(image_size: int, size: int, stages: int = 3) -> list[int]:
    """Sizes through `cnn1`, from the image to r: halvings, as late as they can be; the last stage takes the rest.

    28 -> 2 gives [28, 14, 7, 2], 28 -> 4 gives [28, 14, 7, 4], 8 -> 2 gives [8, 8, 4, 2].
    """
    halvings = max(0, math.ceil(math.log2(image_size / size)))
    sizes = [image_size]
    for stage in range(stages):
        at_full_size = stage < stages - halvings
        sizes.append(sizes[-1] if at_full_size else -(-sizes[-1] // 2))
    sizes[-1] = size
    return sizes


def stride(size: int, to: int) -> int:
    """The largest stride whose conv leaves at least `to` of `size` places."""
    return max(s for s in range(1, -(-size // to) + 1) if (size + 2 - max(3, s + 1)) // s + 1 >= to)


class PlainEncoder(nn.Module):
    """`cnn1`: three conv-BN-SiLU stages, [B, I, H, H] -> [B, C, r, r]."""

    def __init__(self, channels: int, image_size: int, features: int, size: int):
        super().__init__()
        sizes = stage_sizes(image_size, size)
        self.size = size
        widths = [channels, max(features // 4, 8), max(features // 2, 8), features]
        # A stride that divides evenly or leaves more than r: rounded down where it is no divisor.
        self.stages = nn.Sequential(
            *(conv_bn_silu(widths[i], widths[i + 1], stride(sizes[i], sizes[i + 1])) for i in range(3))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stages(x)
        # Where r does not divide the size before it, the stride leaves a few places too many.
        return y if y.shape[-1] == self.size else F.adaptive_avg_pool2d(y, self.size)


class PlainDecoder(nn.Module):
    """Mirror of `cnn1`: [B, D, r, r] -> logits or means of the image, [B, I, H, H]."""

    def __init__(self, latent: int, channels: int, image_size: int, features: int, size: int):
        super().__init__()
        self.sizes = stage_sizes(image_size, size)[-2::-1]
        widths = [latent, max(features // 2, 8), max(features // 4, 8), max(features // 4, 8)]
        self.stages = nn.ModuleList(conv_bn_silu(widths[i], widths[i + 1]) for i in range(3))
        self.image = conv3x3(widths[-1], channels)

    def forward(self, z: Tensor) -> Tensor:
        for size, stage in zip(self.sizes, self.stages, strict=True):
            z = stage(z if z.shape[-1] == size else F.interpolate(z, size=(size, size)))
        image: Tensor = self.image(z)
        return image


class ResidualBlock(nn.Module):
    """Block of `cnn2`: shortcut + 0.1 * (three BN-SiLU-conv). [B, inputs, h, h] -> [B, outputs, h, h]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        widths = [inputs, outputs, outputs, outputs]
        self.branch = nn.Sequential(
            *(
                layer
                for i in range(3)
                for layer in (SlotBatchNorm(widths[i]), nn.SiLU(), conv3x3(widths[i], widths[i + 1], bias=i == 2))
            )
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.shortcut(x) + 0.1 * self.branch(x)
        return y


def residual_widths(image_size: int, features: int, size: int, first: int = 8) -> tuple[list[int], list[int]]:
    """Sizes and channels of `cnn2`: one halving per block from H to r, channels from 8 evenly up to C."""
    sizes = [image_size]
    while sizes[-1] > size:
        sizes.append(max(-(-sizes[-1] // 2), size))
    steps = max(len(sizes) - 1, 1)
    return sizes, [round(first + (features - first) * i / steps) for i in range(len(sizes))]


class ResidualEncoder(nn.Module):
    """`cnn2`: residual blocks, average-pooled between them: [B, I, H, H] -> [B, C, r, r]."""

    def __init__(self, channels: int, image_size: int, features: int, size: int):
        super().__init__()
        self.sizes, widths = residual_widths(image_size, features, size)
        self.stem = conv3x3(channels, widths[0])
        self.blocks = nn.ModuleList(ResidualBlock(widths[max(i - 1, 0)], widths[i]) for i in range(len(widths)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for size, block in zip(self.sizes, self.blocks, strict=True):
            x = block(x if x.shape[-1] == size else F.adaptive_avg_pool2d(x, size))
        return F.silu(x)


class ResidualDecoder(nn.Module):
    """Mirror of `cnn2`: [B, D, r, r] -> logits or means of the image, [B, I, H, H]."""

    def __init__(self, latent: int, channels: int, image_size: int, features: int, size: int):
        super().__init__()
        sizes, widths = residual_widths(image_size, features, size)
        self.sizes, widths = sizes[::-1], widths[::-1]
        self.stem = conv3x3(latent, widths[0])
        self.blocks = nn.ModuleList(ResidualBlock(widths[max(i - 1, 0)], widths[i]) for i in range(len(widths)))
        self.image = conv3x3(widths[-1], channels)

    def forward(self, z: Tensor) -> Tensor:
        z = self.stem(z)
        for size, block in zip(self.sizes, self.blocks, strict=True):
            z = block(z if z.shape[-1] == size else F.interpolate(z, size=(size, size)))
        image: Tensor = self.image(F.silu(z))
        return image


ENCODERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "cnn1": (PlainEncoder, PlainDecoder),
    "cnn2": (ResidualEncoder, ResidualDecoder),
}
