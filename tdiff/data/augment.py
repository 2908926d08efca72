"""Augmented views of a batch of images, for the contrastive term of stage 1 (METHOD, "Contrastive term").

What happens to an image is a pure function of (seed, phase, epoch, view, id of the image): never of the batch it comes
in, the slot, the worker, the device or the order of calls; no random generator is read or moved. Two views of an image
are two view numbers:

    views = [augment(images, RECIPES["cifar10"], uniforms(seed, phase, epoch, view, ids)) for view in (0, 1)]

Sampling and arithmetic are torchvision's (RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale, in
this order, on float tensors), for every sample of the batch at once.

Legend: B batch, I image channels (1 grey, 3 colour), H, W image size, U uniform draws of a sample, T tries of a crop,
G those samples of the batch that take one operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdiff.seeds import seed_of

TRIES = 10
"""Of a crop that fits into the image, as in torchvision."""

DRAWS = 2 * TRIES + 10
"""U: area and ratio of every try, then top, left, flip, jitter, four factors, order and grey."""

ORDERS = np.array(list(permutations(range(4))))
"""[24, 4] every order of brightness 0, contrast 1, saturation 2 and hue 3."""


@dataclass(frozen=True)
class Augmentation:
    """What may happen to an image, in torchvision's terms.

    scale: area of the crop over that of the image, uniform. ratio: width over height of the crop, log-uniform.
    jitter: of brightness, contrast and saturation x, a factor uniform in [max(0, 1 - x), 1 + x]; of hue x <= 0.5, a
    shift uniform in [-x, x] of the whole circle. The probabilities are those of an image to be flipped, to be jittered
    (all four, in random order), and to become grey.
    """

    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip_probability: float
    jitter: tuple[float, float, float, float]
    jitter_probability: float
    grey_probability: float


RECIPES: Mapping[str, Augmentation] = MappingProxyType(
    {
        "cifar10": Augmentation((0.2, 1.0), (3 / 4, 4 / 3), 0.5, (0.4, 0.4, 0.4, 0.1), 0.8, 0.2),
        "celeba": Augmentation((3 / 4, 1.0), (4 / 5, 5 / 4), 0.5, (0.2, 0.2, 0.2, 0.0), 0.8, 0.0),
    }
)
"""METHOD's two, by name; CUBICC takes `cifar10`."""


def uniforms(
    seed: int, phase: str, epoch: int, view: int, ids: NDArray[np.int64], draws: int = DRAWS
) -> NDArray[np.float64]:
    """[B, U] in [0, 1), a multiple of 2^-53: draw k of an image is hash(key, id, k), whatever else is drawn with it.

    ids [B]: of the images in their data set (not positions in a batch); an image comes at most once an epoch.
    """
    # SplitMix64 (Steele, Lea, Flood 2014): a stream per id, whose start is itself the id-th draw of the key's stream.
    key = np.uint64(seed_of("augment", seed, phase, epoch, view))
    start = _splitmix(key, np.asarray(ids).astype(np.uint64))
    bits = _splitmix(start[:, None], np.arange(draws, dtype=np.uint64)) >> np.uint64(11)  # [B, U], 53 bits
    return bits.astype(np.float64) * np.float64(2.0**-53)


def _splitmix(start: NDArray[np.uint64] | np.uint64, count: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Draw `count` (from 0) of the SplitMix64 stream that begins at `start`, modulo 2^64."""
    z = start + (count + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Drawn:
    """What happens to each image of a batch."""

    crop: NDArray[np.int64]
    """[B, 4] top, left, height, width, inside the image."""
    flip: NDArray[np.bool_]
    """[B]"""
    jitter: NDArray[np.bool_]
    """[B]"""
    factors: NDArray[np.float64]
    """[B, 4] of brightness, contrast, saturation; shift of the hue."""
    order: NDArray[np.int64]
    """[B, 4] which of these comes first, second, ..."""
    grey: NDArray[np.bool_]
    """[B]"""


def drawn(recipe: Augmentation, u: NDArray[np.float64], height: int, width: int) -> Drawn:
    """The uniforms u [B, U] in the recipe's terms, for images of this size."""
    area, ratio = u[:, :TRIES], u[:, TRIES : 2 * TRIES]
    top, left, flip, jitter, *four, order, grey = u[:, 2 * TRIES :].T
    low = np.array([*(max(0.0, 1 - x) for x in recipe.jitter[:3]), -recipe.jitter[3]])
    high = np.array([*(1 + x for x in recipe.jitter[:3]), recipe.jitter[3]])
    return Drawn(
        crop=_crops(recipe, area, ratio, top, left, height, width),
        flip=flip < recipe.flip_probability,
        jitter=jitter < recipe.jitter_probability,
        factors=low + (high - low) * np.stack(four, 1),
        order=ORDERS[(order * len(ORDERS)).astype(np.int64)],
        grey=grey < recipe.grey_probability,
    )


def _crops(
    recipe: Augmentation,
    area: NDArray[np.float64],
    ratio: NDArray[np.float64],
    top: NDArray[np.float64],
    left: NDArray[np.float64],
    height: int,
    width: int,
) -> NDArray[np.int64]:
    """Boxes [B, 4] of RandomResizedCrop.get_params from uniforms: area, ratio [B, T], top, left [B].

    All tries are made at once and the first that fits counts. If none does: the whole image, or, where its shape is
    outside the range of ratios, the largest centred crop within it.
    """
    scale, (narrow, wide) = recipe.scale, recipe.ratio
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    ratio = np.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * ratio)
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # [B, T]; halves to even, as Python's round
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first, some = (np.arange(len(fits)), fits.argmax(1)), fits.any(1)

    last_h = round(width / narrow) if width / height < narrow else height
    last_w = round(height * wide) if width / height > wide else width
    h, w = np.where(some, h[first], last_h), np.where(some, w[first], last_w)  # [B]
    y = np.where(some, top * (height - h + 1), (height - h) // 2)
    x = np.where(some, left * (width - w + 1), (width - w) // 2)
    return np.stack([y.astype(np.int64), x.astype(np.int64), h, w], 1)


def augment(images: Tensor, recipe: Augmentation, u: NDArray[np.float64]) -> Tensor:
    """images float [B, I, H, W] in [0, 1], u [B, U] of `uniforms` -> the same shape, dtype and device, in [0, 1].

    Grey images (I = 1) take crop, flip, brightness and contrast; saturation, hue and grey leave them as they are.
    """
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels: augmentation takes grey (1) or RGB (3)")
    if u.shape != (count, DRAWS):
        raise ValueError(f"uniforms are {u.shape}, but {count} images take {(count, DRAWS)}: see tdiff.data.augment")
    done = drawn(recipe, u, height, width)
    # Half precision is widened: its rounding errors would add up over the operations.
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    x = _cropped(x, done)
    x = _jittered(x, recipe, done)
    if channels == 3 and done.grey.any():
        rows = torch.from_numpy(np.flatnonzero(done.grey)).to(x.device)
        x[rows] = _luma(x[rows]).expand(-1, 3, -1, -1)
    return x.to(images.dtype)


# --- crop --------------------------------------------------------------------------------------------
# From here on only plain sums, products and comparisons of float tensors: fused ones (lerp, addcmul, matmul) may round
# differently from device to device and from place to place, and a view would depend on them by a last bit.


def _cropped(x: Tensor, done: Drawn) -> Tensor:
    """x [B, I, H, W] -> its crops, flipped or not, at the size of x, as a new tensor."""
    top, left, height, width = done.crop.T
    rows, columns = _coordinates(top, height, x.shape[2]), _coordinates(left, width, x.shape[3])
    # A flip is the same pixels read from the right.
    columns = np.where(done.flip[:, None], columns[:, ::-1], columns)
    # Columns are read as rows of the transposed image: whole rows are copied several times faster than single pixels.
    return _rows(_rows(x, rows).mT, columns).mT.contiguous()


def _coordinates(start: NDArray[np.int64], size: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Where `count` pixels over the span [start, start + size) are read, [B, count]: centres, clamped to the span."""
    centres = np.arange(count) + 0.5
    clamped = np.clip(centres * (size / count)[:, None] - 0.5, 0.0, size[:, None] - 1.0)
    return np.asarray(start[:, None] + clamped, np.float64)


def _rows(x: Tensor, at: NDArray[np.float64]) -> Tensor:
    """x [B, I, H, W] at the row coordinates `at` [B, H], linear between neighbouring rows."""
    count, channels, height, width = x.shape
    first = np.arange(0, count * channels * height, height).reshape(count, channels, 1)  # of each plane's rows
    planes = x.reshape(-1, width)  # [B I H, W]

    def row(whole: NDArray[np.float64]) -> Tensor:
        index = (first + whole.astype(np.int64)[:, None]).ravel()
        return planes.index_select(0, torch.from_numpy(index).to(x.device)).view(x.shape)

    above = row(np.floor(at))
    share = torch.from_numpy(at - np.floor(at)).to(x).view(count, 1, height, 1)
    return (row(np.ceil(at)) - above).mul_(share).add_(above)


# --- colour ------------------------------------------------------------------------------------------


def _jittered(x: Tensor, recipe: Augmentation, done: Drawn) -> Tensor:
    """x [B, I, H, W], changed in place: at each place of the order, each operation on those samples whose turn it is.

    So every sample passes each operation once, and those without jitter none.
    """
    operations = (_brightness, _contrast, _saturation, _hue)[: 4 if x.shape[1] == 3 else 2]
    factors = torch.from_numpy(done.factors).to(x)
    for place in range(4):
        for kind, operation in enumerate(operations):
            turn = np.flatnonzero(done.jitter & (done.order[:, place] == kind))
            if recipe.jitter[kind] and len(turn):
                rows = torch.from_numpy(turn).to(x.device)
                x[rows] = operation(x[rows], factors[rows, kind].view(-1, 1, 1, 1))
    return x


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x [G, I, H, W], factor [G, 1, 1, 1]; likewise below."""
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the mean grey of the image."""
    # Summed as integers of 2^-24: floats would depend on the order of summing, which batch and device choose.
    total = (_luma(x) * 2**24).to(torch.int64).sum((1, 2, 3), keepdim=True)  # [G, 1, 1, 1]
    return _blend(x, total.to(x.dtype) / (2**24 * x.shape[2] * x.shape[3]), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Away from or towards the grey of each pixel."""
    return _blend(x, _luma(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """The hue turned by `shift` of the circle, in HSV: largest and smallest channel of a pixel stay as they are."""
    r, g, b = x.split(1, 1)
    high = x.amax(1, keepdim=True)  # [G, 1, H, W]; likewise below
    chroma = high - x.amin(1, keepdim=True)
    span = torch.where(chroma == 0, 1, chroma)
    # In sixths of the circle: red at 0, green at 2, blue at 4.
    hue = torch.where(high == r, (g - b) / span, torch.where(high == g, 2 + (b - r) / span, 4 + (r - g) / span))
    own = torch.tensor([0, 2, 4], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    away = (hue + 6 * shift) - own  # [G, 3, H, W] from each channel's own hue
    away.sub_((away / 6).round_().mul_(6)).abs_()  # the shorter way round: 0..3
    return high - away.sub_(1).clamp_(0, 1).mul_(chroma)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _luma(x: Tensor) -> Tensor:
    """[G, I, H, W] -> grey [G, 1, H, W], with torchvision's weights (ITU-R 601)."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, 1)
    grey: Tensor = r * 0.2989 + g * 0.587 + b * 0.114
    return grey
