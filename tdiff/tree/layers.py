"""The networks at the nodes of a tree: encoder, bottom-up blocks, transformations, denses, routers, decoders.

Legend: B batch, I image channels, H = W image size, C feature channels, D latent channels, r feature size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DENSE_SIZE = 2
"""Up to this map size a 3x3 conv is computed as the full linear map that it is."""


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


def normed(norms: Sequence[SlotBatchNorm], x: Tensor) -> Tensor:
    """n norms of C channels each on their parts of x [*, n C, M], as one kernel.

    Outputs and slot statistics are those of n calls, one norm after the other.
    """
    first = norms[0]
    if len(norms) == 1:
        y: Tensor = first(x)
        return y
    if len({(norm.training, norm.slots_seen) for norm in norms}) > 1:
        # In different modes, as after `train_only`: one by one.
        return torch.cat([norm(part) for norm, part in zip(norms, x.chunk(len(norms), 1), strict=True)], 1)
    weight, bias = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
    if not first.training:
        mean = torch.cat([norm.running_mean for norm in norms])  # type: ignore[misc]
        variance = torch.cat([norm.running_var for norm in norms])  # type: ignore[misc]
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, first.eps)
    # With a momentum of 1 the buffers become this slot's own statistics.
    mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)
    y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, first.eps)
    for norm in norms:
        norm.slots_seen += 1
    kept = [norm.slot_mean for norm in norms] + [norm.slot_var for norm in norms]
    new = [*mean.chunk(len(norms)), *variance.chunk(len(norms))]
    torch._foreach_lerp_(kept, new, 1.0 / first.slots_seen)  # the plain mean of the slots, as in `forward`
    return y


def conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A padded conv, kernel 3 or stride + 1 if that is larger: stride 1 keeps the size, 2 halves it rounding up."""
    return nn.Conv2d(inputs, outputs, max(3, stride + 1), stride, padding=1, bias=bias)


def side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of n modules along their first dimension; one alone as it is, not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def side_by_side(convs: Sequence[nn.Conv2d], x: Tensor) -> Tensor:
    """n padded convs of stride 1 side by side: [B, n C, h, w] -> [B, n O, h, w]."""
    weight = side([conv.weight for conv in convs])  # [n O, C, k, k]
    bias = None if convs[0].bias is None else side([conv.bias for conv in convs])  # type: ignore[misc]
    return F.conv2d(x, weight, bias, padding=convs[0].kernel_size[0] // 2, groups=len(convs))


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
    """Mirror of `cnn1`: [B, D, r, r] -> logits or means of the image, [B, I, H, H].

    Where the last stage doubles the map, every place has a conv of its own for each of the four it becomes: the mirror
    of a conv with stride 2. The stages before it repeat places and then convolve. Computed on small maps, with channels
    to fill a vector:

    - on a map of 2x2 places, repeating and convolving is a full linear map (`linear_map`);
    - where places double, it is four convs on the map as it was (`repeated`), whose outputs a pixel shuffle joins;
    - the last conv takes that map before the shuffle (`unshuffled`), and only the image is shuffled.

    For 256 images of 28x28 on one CPU thread, forward and backward: 6.8 ms; 10.6 with the second alone.
    """

    def __init__(self, latent: int, channels: int, image_size: int, features: int, size: int):
        super().__init__()
        *self.sizes, self.image_size = stage_sizes(image_size, size)[-2::-1]
        widths = [latent, max(features // 2, 8), max(features // 4, 8)]
        self.stages = nn.ModuleList(conv_bn_silu(widths[i], widths[i + 1]) for i in range(2))
        self.parts = 2 if image_size == 2 * self.sizes[-1] else 1
        self.image = conv3x3(widths[-1], channels * self.parts**2)

    def forward(self, z: Tensor) -> Tensor:
        image = PlainDecoder.stacked([self], z)
        return F.pixel_shuffle(image, self.image_size // image.shape[-1])

    @staticmethod
    def stacked(decoders: Sequence[PlainDecoder], z: Tensor) -> Tensor:
        """n decoders side by side: [B, n D, r, r] -> [B, n I s s, H/s, H/s], to be pixel-shuffled by s, 1 to 4."""
        first = decoders[0]
        for k, size in enumerate(first.sizes):
            if k > 0 and z.shape[-1] < first.sizes[k - 1]:
                z = F.pixel_shuffle(z, 2)
            stages = [decoder.stages[k] for decoder in decoders]
            z = enlarged_convs([stage[0] for stage in stages], z, size)  # type: ignore[index]
            # Before a shuffle the four parts of a place are one channel's.
            y = normed([stage[1] for stage in stages], z.reshape(len(z), -1, size * size))  # type: ignore[index]
            z = F.silu(y).view(z.shape)
        weight, bias = (side([getattr(d.image, name) for d in decoders]) for name in ("weight", "bias"))
        if z.shape[-1] < first.sizes[-1]:
            weight, bias = unshuffled(weight, first.parts), unshuffled_bias(bias, first.parts)
        elif first.parts == 1 and z.shape[-1] != first.image_size:
            z = F.interpolate(z, size=(first.image_size, first.image_size))
        return F.conv2d(z, weight, bias, padding=1, groups=len(decoders))


def enlarged_convs(convs: Sequence[nn.Conv2d], z: Tensor, size: int) -> Tensor:
    """n padded 3x3 convs side by side, on a map enlarged by repetition: [B, n C, h, h] -> [B, n O, size, size].

    Where the size doubles, before a pixel shuffle: [B, n O 4, h, h].
    """
    n, now = len(convs), z.shape[-1]
    weight = side([conv.weight for conv in convs])  # [n O, C, 3, 3]
    if now <= DENSE_SIZE:
        maps = linear_map(weight, now, size).reshape(n, -1, weight.shape[1] * now * now)  # [n, O size size, C h h]
        rows = z.reshape(len(z), n, -1).transpose(0, 1)  # [n, B, C h h]
        return torch.bmm(rows, maps.mT).transpose(0, 1).reshape(len(z), -1, size, size)
    if size == 2 * now:
        return F.conv2d(z, repeated(weight), padding=1, groups=n)
    z = z if now == size else F.interpolate(z, size=(size, size))
    return F.conv2d(z, weight, padding=1, groups=n)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: it must serve training whoever asks first
def _taps(size: int, to: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Which of a 3x3 kernel's weights lead to an output place from an input place, 0 or more: [9, s s r r].

    The conv is padded, on a map of r places a side enlarged to s by repeating them.
    """
    source = F.interpolate(torch.arange(size, dtype=torch.float64)[None, None], size=to)[0, 0]
    place, step = torch.arange(to), torch.arange(3)[:, None, None]
    # From enlarged coordinate v to output u the kernel's row (or column) is v - u + 1, if it has such a one.
    reached = (step == place[None, :] - place[:, None] + 1).to(torch.float64)  # [3, out, enlarged]
    one = reached @ (source[:, None] == torch.arange(size)).to(torch.float64)  # [3, out, in]
    return torch.einsum("aiu,bjv->abijuv", one, one).reshape(9, -1).to(device, dtype)


def linear_map(weight: Tensor, size: int, to: int) -> Tensor:
    """The padded 3x3 conv [O, C, 3, 3] on a map enlarged by repetition, as one linear map: [O, s s, C, r r]."""
    maps = weight.flatten(2) @ _taps(size, to, weight.device, weight.dtype)  # [O, C, s s r r]
    return torch.unflatten(maps, 2, (to * to, size * size)).transpose(1, 2)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: it must serve training whoever asks first
def _doubling(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Which weight of a 3x3 conv on a doubled map becomes which weight of a 3x3 conv on the map itself.

    A place u of the doubled map is the part u % 2 of place u // 2: kernel -> part of the output, part of the input,
    kernel, [3 3, 2 2, 2 2, 3 3].
    """
    one = torch.zeros(3, 2, 2, 3)
    for tap in range(3):
        for part in range(2):
            source = part + tap - 1  # from part 0 of place 0 of the map itself
            one[tap, part, source % 2, source // 2 + 1] = 1
    return torch.einsum("apsx,bqty->abpqstxy", one, one).reshape(9, 4, 4, 9).to(device, dtype)


def repeated(weight: Tensor) -> Tensor:
    """[O, C, 3, 3] on a map doubled by repetition -> [4 O, C, 3, 3] on the map itself, before a pixel shuffle."""
    outputs, inputs = weight.shape[:2]
    table = _doubling(weight.device, weight.dtype).sum(2)  # repetition: all parts of a place are the same
    kernels = (weight.flatten(2) @ table.flatten(1)).unflatten(2, (4, 9)).transpose(1, 2)  # [O, 4, C, 9]
    return torch.reshape(kernels, (4 * outputs, inputs, 3, 3))


def unshuffled(weight: Tensor, parts: int) -> Tensor:
    """[O, C, 3, 3] on a map doubled by a pixel shuffle -> [4 O, 4 C, 3, 3] on the map before that shuffle.

    The outputs are themselves p p parts of O / (p p) channels; those of the result are to be shuffled by 2 p at once.
    """
    outputs, inputs = weight.shape[:2]
    kernels = weight.flatten(2) @ _doubling(weight.device, weight.dtype).flatten(1)  # [O, C, 4 * 4 * 9]
    kernels = kernels.view(-1, parts, parts, inputs, 2, 2, 4, 9)  # outputs: channel, parts; C; parts by the doubling
    return kernels.permute(0, 4, 1, 5, 2, 3, 6, 7).reshape(4 * outputs, 4 * inputs, 3, 3)


def unshuffled_bias(bias: Tensor, parts: int) -> Tensor:
    """The bias [O] for `unshuffled` weights: [4 O]."""
    return bias.view(-1, 1, parts, 1, parts).expand(-1, 2, parts, 2, parts).flatten()


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
        return ResidualBlock.stacked([self], x)

    @staticmethod
    def stacked(blocks: Sequence[ResidualBlock], x: Tensor) -> Tensor:
        """n blocks side by side: [B, n inputs, h, h] -> [B, n outputs, h, h]."""
        y = x
        for k in (0, 3, 6):
            norms = [block.branch[k] for block in blocks]
            y = F.silu(normed(norms, y))  # type: ignore[arg-type]
            y = side_by_side([block.branch[k + 2] for block in blocks], y)  # type: ignore[misc]
        shortcuts = [block.shortcut for block in blocks]
        if isinstance(shortcuts[0], nn.Conv2d):
            x = side_by_side(shortcuts, x)  # type: ignore[arg-type]
        return x + 0.1 * y


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
        return ResidualDecoder.stacked([self], z)

    @staticmethod
    def stacked(decoders: Sequence[ResidualDecoder], z: Tensor) -> Tensor:
        """n decoders side by side: [B, n D, r, r] -> [B, n I, H, H]."""
        z = side_by_side([decoder.stem for decoder in decoders], z)
        for k, size in enumerate(decoders[0].sizes):
            z = z if z.shape[-1] == size else F.interpolate(z, size=(size, size))
            z = ResidualBlock.stacked([decoder.blocks[k] for decoder in decoders], z)  # type: ignore[misc]
        return side_by_side([decoder.image for decoder in decoders], F.silu(z))


ENCODERS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "cnn1": (PlainEncoder, PlainDecoder),
    "cnn2": (ResidualEncoder, ResidualDecoder),
}
