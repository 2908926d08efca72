"""A TreeVAE written plainly from METHOD.md, stage 1: one node after the other, one operation after the other.

What `tdiff.tree` is tested against, and what `benchmarks/tree.py` measures it against. It shares with the real model
its tensors, by name, and nothing of its code but the sizes of the maps (`layers.stage_sizes`, `residual_widths`).
Batch norms use the batch's statistics in training, the running ones in evaluation, and note the former.

Legend: B batch, D latent channels, C feature channels, r feature size, I image channels, H image size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tdiff.tree.layers import residual_widths, stage_sizes
from tdiff.tree.model import TreeVAE


class Reference:
    """The networks of `model` by hand. `noise` gives the standard normal draws of a node, [B, D, r, r]."""

    def __init__(self, model: TreeVAE, noise=None):
        self.spec, self.tree = model.spec, model.topology
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.training = {name: module.training for name, module in model.named_modules()}
        self.strides = [stage[0].stride for stage in model.encoder.stages] if model.spec.encoder == "cnn1" else []
        self.noise = noise or (lambda node, like: torch.randn_like(like))
        self.statistics: dict[str, tuple[Tensor, Tensor]] = {}  # of every batch norm passed in training

    # --- layers --------------------------------------------------------------------------------

    def conv(self, x, name, stride=1):
        weight = self.tensors[f"{name}.weight"]
        padding = 0 if weight.shape[-1] == 1 else 1
        return F.conv2d(x, weight, self.tensors.get(f"{name}.bias"), stride, padding)

    def linear(self, x, name):
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, x, name):
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        if not self.training[name]:
            mean, variance = self.tensors[f"{name}.running_mean"], self.tensors[f"{name}.running_var"]
            return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, 1e-5)
        mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
        y = F.batch_norm(x, mean, variance, weight, bias, True, 1.0, 1e-5)
        self.statistics[name] = (mean, variance)
        return y

    def block(self, x, name):
        """Three conv-BN-SiLU, around a shortcut if residual."""
        y = x
        for k in range(3):
            y = F.silu(self.norm(self.conv(y, f"{name}.body.{k}.0"), f"{name}.body.{k}.1"))
        if not self.spec.residual:
            return y
        return y + (self.conv(x, f"{name}.shortcut") if f"{name}.shortcut.weight" in self.tensors else x)

    def heads(self, x, name):
        return self.conv(x, f"{name}.mean"), F.softplus(self.conv(x, f"{name}.variance")) + 1e-6

    def router(self, x, name):
        y = self.conv(x, f"{name}.squeeze").flatten(1)
        for k in (0, 3):
            y = F.silu(self.norm(self.linear(y, f"{name}.layers.{k}"), f"{name}.layers.{k + 1}"))
        return self.linear(y, f"{name}.layers.6").squeeze(1)

    def residual_block(self, x, name):
        """cnn2: shortcut + 0.1 * (three BN-SiLU-conv)."""
        y = x
        for k in (0, 3, 6):
            y = self.conv(F.silu(self.norm(y, f"{name}.branch.{k}")), f"{name}.branch.{k + 2}")
        return (self.conv(x, f"{name}.shortcut") if f"{name}.shortcut.weight" in self.tensors else x) + 0.1 * y

    def encoder(self, x):
        size = self.spec.size
        if self.spec.encoder == "cnn1":
            for k, stride in enumerate(self.strides):
                x = F.silu(self.norm(self.conv(x, f"encoder.stages.{k}.0", stride), f"encoder.stages.{k}.1"))
            return x if x.shape[-1] == size else F.adaptive_avg_pool2d(x, size)
        x = self.conv(x, "encoder.stem")
        for k, s in enumerate(residual_widths(self.spec.image_size, self.spec.feature_channels, size)[0]):
            x = self.residual_block(x if x.shape[-1] == s else F.adaptive_avg_pool2d(x, s), f"encoder.blocks.{k}")
        return F.silu(x)

    def decoder(self, z, name):
        """Logits or means of the image: maps grow by repeating places, before each conv."""
        plain = self.spec.encoder == "cnn1"
        if plain:
            *sizes, last = stage_sizes(self.spec.image_size, self.spec.size)[-2::-1]
        else:
            sizes = residual_widths(self.spec.image_size, self.spec.feature_channels, self.spec.size)[0][::-1]
            z = self.conv(z, f"{name}.stem")
        for k, size in enumerate(sizes):
            z = z if z.shape[-1] == size else F.interpolate(z, size=(size, size))
            if plain:
                z = F.silu(self.norm(self.conv(z, f"{name}.stages.{k}.0"), f"{name}.stages.{k}.1"))
            else:
                z = self.residual_block(z, f"{name}.blocks.{k}")
        if plain and last == 2 * z.shape[-1]:
            return F.pixel_shuffle(self.conv(z, f"{name}.image"), 2)
        if plain and last != z.shape[-1]:
            z = F.interpolate(z, size=(last, last))
        return self.conv(z if plain else F.silu(z), f"{name}.image")

    # --- the model -----------------------------------------------------------------------------

    def features(self, x):
        """Item k serves the nodes of depth k."""
        chain = [self.encoder(x)]
        for k in range(self.spec.features - 1):
            chain.append(self.block(chain[-1], f"bottom_up.{k}"))
        return chain[::-1]

    def posterior(self, node, feature, z_parent):
        """(q mean, q variance, p mean, p variance) of a node; the prior's moments are 0 and 1 at the root."""
        mean, variance = self.heads(feature, f"nodes.{node}.dense")
        if z_parent is None:
            return mean, variance, torch.zeros_like(mean), torch.ones_like(mean)
        block = self.block(z_parent, f"nodes.{node}.transformation.block")
        p_mean, p_variance = self.heads(block, f"nodes.{node}.transformation.heads")
        q_variance = 1 / (1 / variance + 1 / p_variance)
        return (mean / variance + p_mean / p_variance) * q_variance, q_variance, p_mean, p_variance

    def draw(self, node, mean, variance):
        return mean + variance.sqrt() * self.noise(node, mean)

    def nll(self, decoded, x):
        if self.spec.likelihood == "bernoulli":
            return F.binary_cross_entropy_with_logits(decoded, x, reduction="none").sum((1, 2, 3))
        return (x - decoded).square().sum((1, 2, 3))

    def elbo(self, x) -> dict[str, Tensor]:
        """The terms of the negative ELBO for every sample, [B] each."""
        features, zero = self.features(x), x.new_zeros(len(x))
        terms = dict.fromkeys(("reconstruction", "kl_root", "kl_nodes", "kl_decisions"), zero)
        z, reach = {}, {0: torch.ones_like(zero)}
        for node in self.tree.top_down:
            parent = self.tree[node].parent
            feature = features[self.tree[node].depth]
            q_mean, q_variance, p_mean, p_variance = self.posterior(node, feature, z.get(parent))
            z[node] = self.draw(node, q_mean, q_variance)
            kl = kl_normal(q_mean, q_variance, p_mean, p_variance)
            term = "kl_root" if parent is None else "kl_nodes"
            terms[term] = terms[term] + reach[node] * kl
            left, right = self.tree.children(node)
            if left is not None and right is not None:
                q = self.router(feature, f"nodes.{node}.posterior_router")
                p = self.router(z[node], f"nodes.{node}.prior_router")
                terms["kl_decisions"] = terms["kl_decisions"] + reach[node] * kl_decision(q, p)
                reach[left], reach[right] = reach[node] * q.sigmoid(), reach[node] * (-q).sigmoid()
            elif left is not None or right is not None:
                reach[left if left is not None else right] = reach[node]
            else:
                nll = self.nll(self.decoder(z[node], f"nodes.{node}.decoder"), x)
                terms["reconstruction"] = terms["reconstruction"] + reach[node] * nll
        self.reach = reach
        return terms

    def split_elbo(self, node, x) -> dict[str, Tensor]:
        """What the two new leaves below `node` add, every batch passed through the whole frozen tree first."""
        zero = x.new_zeros(len(x))
        z, reach = {}, {0: torch.ones_like(zero)}
        with torch.no_grad():
            features = self.features(x)
            for i in self.tree.top_down:
                parent, (left, right) = self.tree[i].parent, self.tree.children(i)
                if i in self.tree.children(node):
                    continue
                feature = features[self.tree[i].depth]
                q_mean, q_variance, _, _ = self.posterior(i, feature, z.get(parent))
                z[i] = self.draw(i, q_mean, q_variance)
                if left is not None and right is not None and i != node:
                    q = self.router(feature, f"nodes.{i}.posterior_router")
                    self.router(z[i], f"nodes.{i}.prior_router")
                    reach[left], reach[right] = reach[i] * q.sigmoid(), reach[i] * (-q).sigmoid()
                elif i != node and (left is not None or right is not None):
                    reach[left if left is not None else right] = reach[i]
                elif i != node:
                    self.decoder(z[i], f"nodes.{i}.decoder")
        depth = self.tree[node].depth
        q = self.router(features[depth], f"nodes.{node}.posterior_router")
        p = self.router(z[node], f"nodes.{node}.prior_router")
        terms = {"reconstruction": zero, "kl_root": zero, "kl_nodes": zero}
        for child, own in zip(self.tree.children(node), (q.sigmoid(), (-q).sigmoid()), strict=True):
            moments = self.posterior(child, features[depth + 1], z[node])
            decoded = self.decoder(self.draw(child, *moments[:2]), f"nodes.{child}.decoder")
            terms["reconstruction"] = terms["reconstruction"] + reach[node] * own * self.nll(decoded, x)
            terms["kl_nodes"] = terms["kl_nodes"] + reach[node] * own * kl_normal(*moments)
        return {**terms, "kl_decisions": reach[node] * kl_decision(q, p)}


def kl_normal(q_mean, q_variance, p_mean, p_variance) -> Tensor:
    """KL(N(q) || N(p)) summed over the latent, [B]."""
    kl = p_variance.log() - q_variance.log() + (q_variance + (q_mean - p_mean).square()) / p_variance - 1
    return 0.5 * kl.sum((1, 2, 3))


def kl_decision(q, p) -> Tensor:
    """KL(Ber(sigmoid(q)) || Ber(sigmoid(p))), [B]."""
    left = q.sigmoid() * (F.logsigmoid(q) - F.logsigmoid(p))
    return left + (-q).sigmoid() * (F.logsigmoid(-q) - F.logsigmoid(-p))
