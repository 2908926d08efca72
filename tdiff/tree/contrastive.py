"""The contrastive terms of training on colour images: what two augmented views of an image must agree on.

METHOD.md, stage 1 (TreeDiffusion paper, section 3.1 and appendix; TreeVAE paper, appendix). A batch holds every
image twice: rows [0, B) are the first views, rows [B, 2B) the second views of the same images in the same order.
With u_a the L2-normalised vector of row a and a' the row of the other view, InfoNCE (NT-Xent) is

    loss_a = -log [ exp(u_a . u_a' / tau) / sum_{b != a} exp(u_a . u_b / tau) ]

whose negatives are the rest of the batch, both views (the sum holds the positive, too). Two uses of it:

    (a) decisions: at every inner node on [r_q, 1 - r_q], tau = 1, weighted by the reach of the node; summed over
        the nodes, as the public code does;
    (b) features: on a projection of every bottom-up feature, tau = 0.5; averaged over the features.

The loss adds lambda * ((a) + (b)); a split phase has (a) of its one new router alone. Rows of one call are one slot's:
negatives never come from another worker.

Legend: B images of a batch, each in two rows; R nodes with routers, F bottom-up features, G vectors a row (R or F),
C feature channels, r feature size, M hidden units, E dimensions of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdiff.tree.layers import SlotBatchNorm

DECISION_TEMPERATURE = 1.0
FEATURE_TEMPERATURE = 0.5


def info_nce(vectors: Tensor, temperature: float) -> Tensor:
    """InfoNCE of every row against the others, for G unrelated sets of vectors [G, 2B, E] at once: [G, 2B], >= 0."""
    rows = vectors.shape[1]
    assert rows % 2 == 0, "two views of every image"
    # Cosines in bf16 would have 2 to 3 digits, and most of them lie near 1.
    with torch.autocast(vectors.device.type, enabled=False):
        unit = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=2)
        similarity = unit @ unit.mT / temperature  # [G, 2B, 2B]
        positive = similarity.diagonal(rows // 2, dim1=1, dim2=2).repeat(1, 2)  # [G, 2B], the same for both views
        itself = torch.eye(rows, dtype=torch.bool, device=vectors.device)
        return similarity.masked_fill(itself, -math.inf).logsumexp(2) - positive


def decision_loss(left: Tensor, reach: Tensor) -> Tensor:
    """Term (a), a scalar: the sum over R nodes of their InfoNCE, each row weighted by its share of the node's reach.

    left: [2B, R] posterior probabilities of going left, in [0, 1]; reach: [2B, R] posterior probabilities of coming to
    those nodes, in [0, 1], no gradient flows into them. A node that no row reaches adds 0.
    """
    losses = info_nce(torch.stack([left, 1 - left], 2).transpose(0, 1), DECISION_TEMPERATURE)  # [R, 2B]
    reach = reach.detach().T.to(losses)
    total = reach.sum(1, keepdim=True).clamp_min(torch.finfo(reach.dtype).tiny)
    return (reach / total * losses).sum()


def feature_loss(projections: Tensor) -> Tensor:
    """Term (b), a scalar: the mean over F features and 2B rows of InfoNCE on projections [F, 2B, E]."""
    return info_nce(projections, FEATURE_TEMPERATURE).mean()


class ProjectionHeads(nn.Module):
    """The projections of (b), one head per bottom-up feature: F features [2B, C, r, r] -> [F, 2B, 10].

    A head flattens a feature to C r r numbers, then linear - batch norm - SiLU - linear: M hidden units, 10 outputs.
    Not linear, because InfoNCE makes what it acts on forget all that the augmentation changes (colour, place), and the
    layers before a head with a hidden layer keep it, which reconstruction needs (Chen et al. 2020, "A simple framework
    for contrastive learning", section 4.2). M = 128 and the norm are the public code's; it squeezes the C channels to
    one by a 3x3 conv before, which would leave a head 16 of the 2,048 numbers. Nothing but the contrastive loss uses
    the heads. The weights of all heads lie in one tensor a layer, so that a layer is one kernel.
    """

    def __init__(self, features: int, channels: int, size: int, hidden: int = 128, outputs: int = 10):
        super().__init__()
        inputs = channels * size * size
        # No bias before the batch norm, as everywhere (`layers.conv_bn_silu` says why).
        self.inward = nn.Parameter(torch.empty(features, inputs, hidden))
        self.norm = SlotBatchNorm(features * hidden)
        self.outward = nn.Parameter(torch.empty(features, hidden, outputs))
        self.bias = nn.Parameter(torch.empty(features, 1, outputs))
        for parameter, fan_in in ((self.inward, inputs), (self.outward, hidden), (self.bias, hidden)):
            nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))  # nn.Linear's

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = torch.stack([feature.flatten(1) for feature in features])  # [F, 2B, C r r]
        x = (x @ self.inward).transpose(0, 1)  # [2B, F, M]
        x = F.silu(self.norm(x.flatten(1))).reshape(x.shape).transpose(0, 1)  # [F, 2B, M]
        return torch.baddbmm(self.bias, x, self.outward)  # [F, 2B, 10]
