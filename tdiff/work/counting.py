"""What one pass over a batch costs: operations on numbers, kernels, memory for the backward pass. Counted, not timed.

The stages' own objectives and networks run on tensors that have a shape and no content, so that a network of any size
is counted in a second or two and in no memory. The tree is counted as a GPU runs it (a CPU takes its bottom-up chain as
linear maps and its leaves one by one), without the contrastive terms; the denoiser as a CPU runs it (on a GPU attention
in bf16 keeps less for the backward pass).

Legend: P nodes on a path, L leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from tdiff.config import Config
from tdiff.data.order import Order
from tdiff.diffusion.condition import CONTROLS, Denoiser, label_path
from tdiff.evaluation.classifier import ClassifierSpec
from tdiff.tree.losses import frozen_features
from tdiff.tree.model import Path, TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import denoiser_spec
from tdiff.work.growing import Annealing, SplitObjective, TreeObjective, packed

Shape = tuple[int, int, int]


class Cost(NamedTuple):
    """What a pass costs."""

    flops: float
    """Of one image: a multiplication and its addition are two; convolutions and matrix products alone."""
    kernels: float
    """Operations that write a tensor, of one pass over however many images."""
    saved_bytes: float
    """What one image leaves in memory for the backward pass."""

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        """Of both passes, one after the other."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))

    def towards(self, other: Cost, share: float) -> Cost:
        """So far on the straight line to another cost: 0 is here, 1 is there."""
        return Cost(*(a + share * (b - a) for a, b in zip(self, other, strict=True)))


NOTHING = Cost(0.0, 0.0, 0.0)


class _Kernels(TorchDispatchMode):
    """Counts the operations that write a tensor: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        idle = ("prim::", "empty", "detach", "view")
        self.count += not view and not any(name in func._schema.name for name in idle)
        return func(*args, **(kwargs or {}))


def _conv_backward(grad_shape: Any, x_shape: Any, w_shape: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of a convolution's gradients: as many as it took itself for each that is wanted.

    PyTorch's own formula leaves the groups out of account, and the tree's leaves are groups.
    """
    transposed, wanted = rest[4], rest[7]
    gradients: int = sum(wanted[:2])
    return gradients * int(conv_flop_count(x_shape, w_shape, grad_shape, transposed))


def cost_of(run: Callable[[], Tensor], images: int, parameters: list[nn.Parameter], bf16: bool = False) -> Cost:
    """The cost of `run` on so many images: of its backward pass too, where its result wants one."""
    weights = {p.untyped_storage()._cdata for p in parameters}
    saved: dict[int, tuple[int, Tensor]] = {}  # the tensors are kept, so that no storage takes another's place

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved.setdefault(storage._cdata, (storage.nbytes(), tensor))
        return tensor

    formulas = {torch.ops.aten.convolution_backward: _conv_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as flops, _Kernels() as kernels:
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
            result = run()
        kept = sum(size for size, _ in saved.values())
        if result.requires_grad:
            result.sum().backward()
    return Cost(flops.get_total_flops() / images, kernels.count, kept / images)


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


class TreeCosts(NamedTuple):
    """Of a tree with a given topology."""

    whole: Cost
    """A training step of the whole network."""
    routing: Cost
    """Its decisions alone, in evaluation mode."""
    visit: Cost
    """A pass through all nodes without gradients: what tells the denoiser of an image's path."""
    parameters: int


class SplitCosts(NamedTuple):
    """Of splitting a leaf."""

    step: Cost
    """A training step, the features of the frozen part known."""
    frozen: Cost
    """Those features."""
    frozen_numbers: int
    """How many numbers they are, for one image."""
    parameters: int
    """That train."""


def tree_costs(config: Config, shape: Shape, topology: Topology, rows: int) -> TreeCosts:
    """rows: images (or views) that pass at once."""
    channels, size, _ = shape
    with torch.device("meta"):
        model = TreeVAE(config.tree_spec(channels, size), topology)
        weights, images = list(model.parameters()), torch.rand(rows, *shape)
        objective = TreeObjective(model, _alpha(), 0.0, 0.0)
        whole = cost_of(lambda: objective({"images": images}, 0, None)[0], rows, weights)
        model.eval()
        with torch.no_grad():
            routing = cost_of(lambda: model.routing(images), rows, weights)
            visit = cost_of(lambda: model.walk(images).reach, rows, weights)
        return TreeCosts(whole, routing, visit, parameters_of(model))


def split_costs(config: Config, shape: Shape, depth: int, rows: int) -> SplitCosts:
    """Of a leaf at a depth, from 1. rows: images (or views) that pass at once."""
    channels, size, _ = shape
    topology = Topology.root_with_two_leaves("plan")
    while topology.depth < depth:
        topology = topology.split(topology.leaves[-1], "plan")
    leaf = topology.leaves[-1]
    with torch.device("meta"):
        model = TreeVAE(config.tree_spec(channels, size), topology)
        weights, images = list(model.parameters()), torch.rand(rows, *shape)
        model.eval()
        with torch.no_grad():
            frozen = cost_of(lambda: packed(frozen_features(model, leaf, images)), rows, weights)
            features = packed(frozen_features(model, leaf, images))
        new = model.split(leaf, "plan")
        model.train_only(new)
        objective = SplitObjective(model, leaf, new, _alpha(), 0.0).train()
        batch = {"images": images, "frozen": features}
        weights = list(model.parameters())
        step = cost_of(lambda: objective(batch, 0, None)[0], rows, weights)
        return SplitCosts(step, frozen, features.shape[1], sum(parameters_of(module) for module in new))


class DenoiserCosts(NamedTuple):
    step: Cost
    """A training step, without the tree's part in it."""
    evaluation: Cost
    """The network asked once."""
    parameters: int


def denoiser_costs(config: Config, shape: Shape, leaves: int, path: int, rows: int, bf16: bool) -> DenoiserCosts:
    """Of the denoiser of a tree with so many leaves. path: P; rows: images that pass at once."""
    channels, size, _ = shape
    topology = grown(leaves)
    with FakeTensorMode():
        tree = TreeVAE(config.tree_spec(channels, size), topology)
        denoiser = Denoiser(denoiser_spec(config, tree))
        denoiser.unet.recompute = config.diffusion.recompute
        spec, weights = tree.spec, list(denoiser.parameters())
        images, times = torch.rand(rows, *shape), torch.rand(rows)
        labels, nodes = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, path, dtype=torch.long)
        z = torch.rand(rows, path, spec.latent_channels, spec.size, spec.size)
        told = Path(z, nodes, labels, torch.rand(rows, leaves))
        if config.diffusion.condition in CONTROLS:
            told = label_path(labels)
        beside = images if denoiser.spec.told.recon else None
        step = cost_of(lambda: denoiser(images, times, told, beside).square().mean(), rows, weights, bf16)
        denoiser.eval()
        with torch.no_grad():
            evaluation = cost_of(lambda: denoiser(images, times, told, beside), rows, weights, bf16)
        return DenoiserCosts(step, evaluation, parameters_of(denoiser))


def classifier_costs(network: Any, shape: Shape, classes: int, rows: int) -> tuple[Cost, Cost]:
    """Of a training step of the classifier that judges samples, and of looking at an image with it."""
    channels, size, _ = shape
    with FakeTensorMode():
        model = ClassifierSpec(network, channels, size, classes).build()
        weights, images = list(model.parameters()), torch.rand(rows, *shape)
        labels = torch.zeros(rows, dtype=torch.long)

        def loss() -> Tensor:
            return nn.functional.cross_entropy(model(images), labels)

        step = cost_of(loss, rows, weights)
        model.eval()
        with torch.no_grad():
            return step, cost_of(lambda: model(images), rows, weights)


def grown(leaves: int) -> Topology:
    """A tree of so many leaves, as shallow as it can be."""
    topology = Topology.root_with_two_leaves("plan")
    while len(topology.leaves) < leaves:
        shallowest = min(topology.leaves, key=lambda leaf: topology[leaf].depth)
        topology = topology.split(shallowest, "plan")
    return topology


def _alpha() -> Annealing:
    """Of any steps: what it says changes no cost."""
    return Annealing(Order([1], 1, 1, 0, "plan", 1), 1.0, 0.0)


def inception_cost() -> Cost:
    """Of looking at an image, scaled to 299 pixels, with InceptionV3."""
    from torchvision.models import inception_v3

    with torch.device("meta"), torch.no_grad():
        model = inception_v3(weights=None, init_weights=False, aux_logits=False).eval()
        return cost_of(lambda: model(torch.rand(1, 3, 299, 299)), 1, [])
