"""The networks of many nodes as one: every layer is a few kernels, however many nodes pass it together.

A node keeps its own parameters under its own names (`nodes.ID...`); they are stacked anew in every forward pass, and
autograd hands each its gradient. All nodes that pass together have the same number of rows. Written for latents and
features, whose maps are tiny, in a layout with the batch LAST, [n, C, r, r, B]:

- a padded 3x3 conv on maps of 2x2 places reaches from every place to every place. It is a full linear map, and that
  of n nodes one bmm, [n, O P, C P] @ [n, C P, B]. On 4x4 maps most of such a map would be zeros: there, grouped convs.
- seen as [1, n C, P B], the norms of n nodes are one batch norm of n C channels, and nothing moves in memory.

Forward and backward of conv, norm and SiLU with 32 channels, 10 nodes, 256 rows, one CPU thread: on 2x2 maps 9.2 ms so,
12.9 as grouped convs, 13.8 node by node; on 4x4 maps 26.6 as grouped convs, 24.6 node by node, 75.5 as linear maps.
Decoders, with maps as large as the image, stack in `layers.py`.

Legend: n nodes, B rows of the batch, C and O channels in and out, D latent channels, r map size, P = r r places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdiff.tree.layers import (
    DENSE_SIZE,
    ConvBlock,
    GaussianHeads,
    Router,
    SlotBatchNorm,
    Transformation,
    linear_map,
    normed,
)


def batch_last(x: Tensor) -> Tensor:
    """[B, C, r, r] -> [C, r, r, B]."""
    return x.permute(1, 2, 3, 0).contiguous()


def batch_first(x: Tensor) -> Tensor:
    """[C, r, r, B] -> [B, C, r, r], a view."""
    return x.permute(3, 0, 1, 2)


def stack(parameters: Sequence[Tensor]) -> Tensor:
    """n tensors of one shape -> [n, ...]."""
    return torch.stack(tuple(parameters))


def _enter(x: Tensor) -> Tensor:
    """[n, C, r, r, B], as it is where convs are dense maps; [B, n C, r, r] for grouped convs."""
    return x if x.shape[-2] <= DENSE_SIZE else x.permute(4, 0, 1, 2, 3).flatten(1, 2)


def _leave(y: Tensor, nodes: int) -> Tensor:
    """Back to [n, C, r, r, B]."""
    return y if y.ndim == 5 else y.unflatten(1, (nodes, -1)).permute(1, 2, 3, 4, 0)


def convs(weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """A padded 3x3 conv per node, weight [n, O, C, 3, 3], bias [n, O], on what `_enter` made.

    An input of ONE node serves all n nodes.
    """
    nodes, outputs, inputs = weight.shape[:3]
    shared = nodes > 1 and y.shape[0 if y.ndim == 5 else 1] == (1 if y.ndim == 5 else inputs)
    if y.ndim == 4:
        return F.conv2d(
            y, weight.flatten(0, 1), None if bias is None else bias.flatten(), 1, 1, groups=1 if shared else nodes
        )
    size, rows = y.shape[-2:]
    places = size * size
    batches = 1 if shared else nodes
    maps = linear_map(weight.flatten(0, 1), size, size).reshape(batches, -1, inputs * places)  # from [n O, P, C, P]
    x = y.reshape(batches, inputs * places, rows)
    if bias is None:
        y = torch.bmm(maps, x)
    else:
        y = torch.baddbmm(bias.repeat_interleave(places).view(batches, -1, 1), maps, x)
    return y.view(nodes, outputs, size, size, rows)


def _norm_silu(norms: Sequence[SlotBatchNorm], y: Tensor) -> Tensor:
    """The batch norm of every node on its own channels, then SiLU; y as `convs` gives it, or [n, C, B]."""
    flat = y.flatten(2) if y.ndim == 4 else y.reshape(1, y.shape[0] * y.shape[1], -1)
    return F.silu(normed(norms, flat)).view(y.shape)


def heads(modules: Sequence[GaussianHeads], y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [n, D, r, r, B] of every node, from what `_enter` made."""
    both = [[m.mean for m in modules], [m.variance for m in modules]]
    weight = torch.cat([stack([conv.weight for conv in part]) for part in both], 1)  # [n, 2D, C, 3, 3]
    bias = torch.cat([stack([_bias(conv) for conv in part]) for part in both], 1)
    mean, raw = _leave(convs(weight, bias, y), len(modules)).chunk(2, 1)
    return mean, F.softplus(raw) + 1e-6


def _bias(conv: nn.Conv2d | nn.Linear) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def denses(modules: Sequence[GaussianHeads], feature: Tensor) -> tuple[Tensor, Tensor]:
    """q-hat of n nodes, [n, D, r, r, B] each, from features [n, C, r, r, B], or [1, C, r, r, B] for all."""
    return heads(modules, _enter(feature))


def transformations(modules: Sequence[Transformation], z: Tensor) -> tuple[Tensor, Tensor]:
    """Prior mean and variance of n nodes given their parents' latents [n, D, r, r, B], or [1, ...] for all."""
    return heads([m.heads for m in modules], _blocks([m.block for m in modules], _enter(z)))


MAPPED_CHAIN = ("cpu",)
"""Devices where the bottom-up chain, too, passes as linear maps.

Its six blocks take 9.9 ms so, 16.4 as convs (256 rows, 32 channels, forward and backward, one CPU thread); but a GPU
would be sent some 150 kernels more.
"""


def chain(blocks: Sequence[ConvBlock], x: Tensor) -> list[Tensor]:
    """x and what block after block makes of it, [B, C, r, r] each."""
    features = [x]
    if x.device.type not in MAPPED_CHAIN or x.shape[-1] > DENSE_SIZE:
        for block in blocks:
            features.append(block(features[-1]))
        return features
    y = batch_last(x)[None]
    for block in blocks:
        y = _blocks([block], y)
        features.append(batch_first(y[0]))
    return features


def _blocks(blocks: Sequence[ConvBlock], y: Tensor) -> Tensor:
    x = y
    for k in range(len(blocks[0].body)):
        layers = [block.body[k] for block in blocks]
        y = convs(stack([layer[0].weight for layer in layers]), None, y)  # type: ignore[index]
        y = _norm_silu([layer[1] for layer in layers], y)  # type: ignore[index]
    return y + _shortcuts(blocks, x) if blocks[0].residual else y


def _shortcuts(blocks: Sequence[ConvBlock], x: Tensor) -> Tensor:
    """The 1x1 convs where a block changes the channels, else x itself."""
    shortcuts = [block.shortcut for block in blocks]
    if not isinstance(shortcuts[0], nn.Conv2d):
        shared = x.ndim == 4 and x.shape[1] == blocks[0].body[0][0].in_channels  # type: ignore[index]
        return x.repeat(1, len(blocks), 1, 1) if shared else x
    weight = torch.cat([s.weight for s in shortcuts])  # type: ignore[misc]  # [n O, C, 1, 1]
    bias = torch.cat([_bias(s) for s in shortcuts])  # type: ignore[arg-type]
    nodes, inputs = len(blocks), weight.shape[1]
    if x.ndim == 4:
        return F.conv2d(x, weight, bias, groups=x.shape[1] // inputs)
    batches = len(x)
    y = torch.baddbmm(
        bias.view(batches, -1, 1), weight.view(batches, -1, inputs), x.reshape(batches, inputs, -1)
    )  # [n, O, P B], or [1, n O, P B] where one input serves all
    return y.view(nodes, -1, *x.shape[2:])


def routers(modules: Sequence[Router], x: Tensor) -> Tensor:
    """Logits [n, B] of going left at n nodes, from [n, C, r, r, B], or [1, C, r, r, B] for all."""
    nodes = len(modules)
    y = _leave(convs(stack([m.squeeze.weight for m in modules]), None, _enter(x)), nodes)
    y = y.reshape(nodes, -1, x.shape[-1])  # [n, P, B]
    for k in (0, 3):
        y = torch.bmm(stack([m.layers[k].weight for m in modules]), y)  # type: ignore[misc]  # [n, hidden, B]
        y = _norm_silu([m.layers[k + 1] for m in modules], y)  # type: ignore[misc]
    last = [m.layers[6] for m in modules]
    weight, bias = stack([m.weight for m in last]), stack([m.bias for m in last])  # type: ignore[misc]
    return torch.baddbmm(bias[:, :, None], weight, y).squeeze(1)
