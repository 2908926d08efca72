"""Cluster specificity: does each leaf draw images of one class? A classifier looks at the samples and says.

The papers take a ResNet-50; beside it there is a small CNN that learns digits in seconds on one core. Its features
also serve a Fréchet distance where Inception's make no sense, as at 8x8 pixels.

Legend: M training images, B batch, K samples, I channels, H image size, F features, C classes, L leaves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from tdiff.tree.layers import SlotBatchNorm, conv_bn_silu

AnyArray = Tensor | NDArray[np.floating] | NDArray[np.integer]

LARGEST_SMALL = 64
"""Images up to this size, in pixels, come into a ResNet-50 at full resolution."""


class Network(nn.Module):
    """Images [B, I, H, H] in [0, 1] -> logits [B, C], by a linear `head` over the features that `body` finds."""

    def __init__(self, channels: int, image_size: int, classes: int, body: nn.Module, features: int):
        super().__init__()
        self.channels, self.image_size, self.classes = channels, image_size, classes
        self.body = body
        self.head = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        """[B, I, H, H] in [0, 1] -> [B, F], the penultimate features."""
        if x.shape[1:] != (self.channels, self.image_size, self.image_size):
            expected = [self.channels, self.image_size, self.image_size]
            raise ValueError(f"this classifier takes images of {expected}, not {list(x.shape[1:])}")
        found: Tensor = self.body(2 * x - 1)
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class Classifier(Network):
    """The small one: convs that halve the image down to 4x4 or less, then a linear layer to `features` numbers."""

    def __init__(self, channels: int, image_size: int, classes: int, features: int = 64):
        layers, width, size = [conv_bn_silu(channels, 16)], 16, image_size
        while size > 4:  # 8 px takes one step, 64 px four
            layers.append(conv_bn_silu(width, min(2 * width, 128), 2))
            width, size = min(2 * width, 128), (size + 1) // 2
        body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, features), nn.SiLU())
        super().__init__(channels, image_size, classes, body, features)


class ResNet50(Network):
    """The papers' ResNet-50 (He et al., 2016), not pretrained, F = 2048. Up to 64 px its stem, which would leave a
    quarter of the resolution, is one conv of stride 1, as is usual for CIFAR-10.
    """

    def __init__(self, channels: int, image_size: int, classes: int):
        from torchvision.models import resnet50  # a second of imports, which the small one does without

        body = resnet50(weights=None, norm_layer=SlotBatchNorm)
        if image_size <= LARGEST_SMALL:
            body.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            body.maxpool = nn.Identity()
        else:
            body.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
        features = body.fc.in_features
        body.fc = nn.Identity()
        super().__init__(channels, image_size, classes, body, features)


NETWORKS: Mapping[str, Callable[[int, int, int], Network]] = MappingProxyType(
    {"small": Classifier, "resnet50": ResNet50}
)
"""By the name that `evaluation.classifier.network` gives them: (channels, image size, classes) -> network."""


@dataclass(frozen=True)
class ClassifierSpec:
    """All that a classifier's shape depends on. network: a key of NETWORKS. Raises ValueError for any other."""

    network: str
    channels: int
    image_size: int
    classes: int

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network is {self.network!r}: choose one of {', '.join(NETWORKS)}")

    def build(self) -> Network:
        """The network, freshly initialised."""
        return NETWORKS[self.network](self.channels, self.image_size, self.classes)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> ClassifierSpec:
        """The inverse of `to_json`; further entries may stand beside its own. Raises ValueError if the text is none."""
        try:
            values = json.loads(text)
            return ClassifierSpec(**{field.name: values[field.name] for field in fields(ClassifierSpec)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a classifier.json: {error}") from error


def shift(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, its border repeated: [B, I, H, H]."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    device = images.device
    down, right = torch.randint(0, 3, (2, batch, 1), generator=rng, device=device)
    rows = (down + torch.arange(height, device=device))[:, :, None]  # [B, H, 1]
    columns = (right + torch.arange(width, device=device))[:, None, :]  # [B, 1, H]
    image = torch.arange(batch, device=device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[image, rows, columns]  # [B, H, H, I]
    return moved.permute(0, 3, 1, 2).contiguous()


def flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Every other image, by chance, mirrored left to right: [B, I, H, H]."""
    mirrored = torch.rand(len(images), 1, 1, 1, generator=rng, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def class_histograms(predictions: ArrayLike, leaf: ArrayLike, classes: int, leaves: int) -> NDArray[np.int64]:
    """How many samples of each leaf were taken for each class: predictions [K] and leaf indices [K] -> [L, C]."""
    predicted, row = np.asarray(predictions, dtype=np.int64), np.asarray(leaf, dtype=np.int64)
    if predicted.shape != row.shape:
        raise ValueError(f"predictions and leaf indices differ in length: {predicted.shape} and {row.shape}")
    for name, values, bound in (("prediction", predicted, classes), ("leaf index", row, leaves)):
        if len(values) and (values.min() < 0 or values.max() >= bound):
            raise ValueError(f"a {name} lies outside 0..{bound - 1}")
    table = np.zeros((leaves, classes), dtype=np.int64)
    np.add.at(table, (row, predicted), 1)
    return table


def mean_entropy(histograms: ArrayLike, minimum_share: float = 0.01, shares: ArrayLike | None = None) -> float:
    """Mean entropy (natural log) of the leaves' class histograms [L, C]: 0 where each leaf draws one class.

    Only leaves that hold at least `minimum_share` count. A leaf's share is its row's, or shares[leaf] where
    the histograms hold as many samples of every leaf. Raises ValueError if no leaf is that large.
    """
    table = np.asarray(histograms, dtype=np.float64)
    mass = table.sum(1)
    held = mass if shares is None else np.asarray(shares, dtype=np.float64)
    # A leaf of exactly 1% counts, whatever rounding does to the quotient.
    kept = (mass > 0) & (held >= minimum_share * held.sum() * (1 - 1e-9))
    if not kept.any():
        raise ValueError(f"no leaf holds {minimum_share:.1%} of the samples: lower minimum_share")
    p = table[kept] / mass[kept, None]
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum(1).mean())
