"""Steps of stage 1 against a plain tree, node by node (tests/reference_tree.py): 28x28x1, `cnn1`, batch 256.

    .venv/bin/python benchmarks/tree.py [--threads 1] [--repeats 5] [--size 2]

A step is loss and gradients, without the optimizer. Variants alternate in one process; medians. `kernels` counts what a
GPU would be sent: the operations of a step that write a tensor. The images are the digits of scikit-learn, enlarged.

1. A split: the plain tree passes every batch through the whole frozen tree; ours reads features computed once. At 10
   leaves; from 2 to 64 leaves with the split leaf at one depth; for one more depth.
2. The whole tree at 2, 10 and 64 leaves: exact, and with a reach threshold on routers as peaked as a trained tree's.
   The error of the threshold is that of the ELBO of the same weights and images, in training and in evaluation mode,
   latents at their means.

Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdiff.tree import losses, stacked
from tdiff.tree.losses import frozen_features, split_elbo, tree_elbo
from tdiff.tree.model import TreeSpec, TreeVAE, evaluating, norms
from tdiff.tree.topology import Topology

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference_tree import Reference

BATCH = 256
THRESHOLD = 1e-3


class Kernels(TorchDispatchMode):
    """Counts the operations that write a tensor: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not view and not any(name in func._schema.name for name in ("empty", "detach", "view"))
        return func(*args, **(kwargs or {}))


def kernels(step: Callable[[], Tensor], model: TreeVAE) -> int:
    model.zero_grad()  # or every parameter's gradient would be added to the last one
    as_on_a_gpu = (mock.patch.object(losses, "LOOP_ABOVE", math.inf), mock.patch.object(stacked, "MAPPED_CHAIN", ()))
    with as_on_a_gpu[0], as_on_a_gpu[1], Kernels() as counted:
        step().backward()
    return counted.count


def medians(steps: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, float]:
    """Seconds of forward and backward of every variant, one after the other, again and again; the first round warms."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step().backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def images(count: int) -> Tensor:
    """[count, 1, 28, 28] in [0, 1]."""
    pixels = torch.from_numpy(load_digits().images[:count]).float()[:, None] / 16
    return F.interpolate(pixels, size=(28, 28), mode="bilinear")


def balanced(leaves: int) -> Topology:
    tree = Topology.root_with_two_leaves("bench")
    while len(tree.leaves) < leaves:
        tree = tree.split(min(tree.leaves, key=lambda leaf: (tree[leaf].depth, leaf)), "bench")
    return tree


def beside(leaves: int) -> Topology:
    """A tree whose node 2 is a leaf of depth 1; all other leaves are below node 1."""
    tree = Topology.root_with_two_leaves("bench")
    while len(tree.leaves) < leaves:
        others = [leaf for leaf in tree.leaves if leaf != 2]
        tree = tree.split(min(others, key=lambda leaf: (tree[leaf].depth, leaf)), "bench")
    return tree


def total(terms: dict[str, Tensor]) -> Tensor:
    return sum(terms.values()).mean()  # type: ignore[union-attr]


# --- splits ------------------------------------------------------------------------------------


def split_steps(
    spec: TreeSpec, topology: Topology, leaf: int, x: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], TreeVAE]:
    model = TreeVAE(spec, topology)
    with evaluating(model):
        frozen = frozen_features(model, leaf, x)
    model.train_only(model.split(leaf, "split"))
    return {
        "reference": lambda: total(Reference(model).split_elbo(leaf, x)),
        "ours": lambda: split_elbo(model, leaf, frozen, x, None).loss(1.0),
    }, model


def splits(spec: TreeSpec, x: Tensor, repeats: int) -> dict[str, object]:
    ten = balanced(10)
    leaf = max(ten.leaves, key=lambda i: ten[i].depth)
    steps, model = split_steps(spec, ten, leaf, x)
    seconds, counts = medians(steps, repeats), {name: kernels(step, model) for name, step in steps.items()}
    print(f"split at 10 leaves, depth {ten[leaf].depth}: " + ", ".join(
        f"{name} {seconds[name] * 1e3:.0f} ms, {counts[name]} kernels" for name in steps), flush=True)  # fmt: skip
    deep = TreeSpec(1, 28, size=spec.size, features=9)
    flat = {f"{n} leaves": split_steps(deep, beside(n), 2, x)[0]["ours"] for n in (2, 10, 64)}
    chain = Topology.root_with_two_leaves("bench")
    for _ in range(5):
        chain = chain.split(chain.leaves[0], "bench")
    at = {chain[i].depth: i for i in chain.leaves}
    depths = {f"depth {d}": split_steps(deep, chain, at[d], x)[0]["ours"] for d in (1, 2, 4, 6)}
    others = medians(flat | depths, 4 * repeats)
    print("split step, ms: " + ", ".join(f"{name} {s * 1e3:.1f}" for name, s in others.items()), flush=True)
    same_depth = [others[name] for name in flat]
    return {
        "reference_ms": round(seconds["reference"] * 1e3, 1),
        "ours_ms": round(seconds["ours"] * 1e3, 1),
        "speedup": round(seconds["reference"] / seconds["ours"], 2),
        "kernels": counts,
        "spread_2_to_64_leaves": round(max(same_depth) / min(same_depth) - 1, 3),
        "ms_per_depth": round((others["depth 6"] - others["depth 1"]) / 5 * 1e3, 2),
    }


# --- whole trees -------------------------------------------------------------------------------


def sharpen(model: TreeVAE, x: Tensor) -> None:
    """Makes the posterior's routers halve the images that reach them, and be sure of nearly all."""
    with torch.no_grad():
        for node in model.topology.choosing:
            walk = model.walk(x)
            here, logit = walk[node].reach > 0.5, walk[node].q_logit
            assert logit is not None
            middle = logit[here].median() if here.any() else logit.median()
            last = model.networks([node], "posterior_router")[0].layers[-1]
            scale = 30 / logit.std().clamp_min(1e-6)
            last.weight.mul_(scale)
            last.bias.copy_((last.bias - middle) * scale)
    for norm in norms(model):
        norm.slots_seen = 0


def train(model: TreeVAE, x: Tensor, steps: int) -> None:
    """A few steps, so that leaves draw different images, and running statistics that fit."""
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, foreach=True)
    rng = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        batch = x[torch.randperm(len(x), generator=rng)[:BATCH]]
        tree_elbo(model, model.walk(batch, rng, THRESHOLD), batch).loss(0.1).backward()
        optimizer.step()
        for norm in norms(model):
            norm.move_running_statistics()
    model.zero_grad()


def error(model: TreeVAE, x: Tensor) -> tuple[float, float, float]:
    """Relative difference of the ELBO with a threshold; and leaves per image that the threshold leaves."""
    with torch.no_grad(), mock.patch("tdiff.tree.model.draw", lambda mean, variance, rng: mean):
        exact, walk = tree_elbo(model, model.walk(x), x).loss(1.0), model.walk(x, None, THRESHOLD)
        rows = [model.topology.top_down.index(leaf) for leaf in model.topology.leaves]
        visited = (walk.reach[rows] > 0).sum(0).float().mean()
        taken = sum(level.reach.shape[1] for level in walk.levels for n in level.nodes if model.topology.is_leaf(n))
        return float(tree_elbo(model, walk, x).loss(1.0) / exact - 1), float(visited), taken / len(x)


def whole(spec: TreeSpec, leaves: int, x: Tensor, repeats: int, training: int) -> dict[str, object]:
    model, every = TreeVAE(spec, balanced(leaves)).train(), images(1797)
    sharpen(model, x)
    train(model, every, training)
    steps: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: total(Reference(model).elbo(x)),
        "exact": lambda: tree_elbo(model, model.walk(x), x).loss(1.0),
        "threshold": lambda: tree_elbo(model, model.walk(x, None, THRESHOLD), x).loss(1.0),
    }
    counts = {name: kernels(step, model) for name, step in steps.items()}
    rates = {name: BATCH / s for name, s in medians(steps, repeats).items()}
    in_training, visited, taken = error(model, x)
    in_evaluation, _, _ = error(model.eval(), x)
    faster = rates["threshold"] / rates["exact"]
    print(f"{leaves:3d} leaves: img/s " + ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    print(f"            threshold {faster:.1f} times exact; leaves an image visits {visited:.2f}, takes {taken:.2f}")
    print(f"            ELBO off by {in_training:+.3%} in training, {in_evaluation:+.3%} in evaluation")
    print("            kernels: " + ", ".join(f"{name} {count}" for name, count in counts.items()), flush=True)
    return {
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "kernels": counts,
        "threshold_speedup": round(rates["threshold"] / rates["exact"], 2),
        "exact_speedup": round(rates["exact"] / rates["reference"], 2),
        "leaves_per_image": round(visited, 2),
        "leaf_rows_per_image": round(taken, 2),
        "elbo_error_training": round(in_training, 6),
        "elbo_error_evaluation": round(in_evaluation, 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=2, help="r, feature size: 2 (public configs) or 4 (paper)")
    parser.add_argument("--training", type=int, default=100, help="steps before a whole tree is measured")
    parser.add_argument("--leaves", type=int, nargs="*", default=[2, 10, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    spec, x = TreeSpec(1, 28, size=arguments.size), images(BATCH)
    result = {
        "benchmark": "tree",
        "torch": torch.__version__,
        "threads": arguments.threads,
        "cpus": os.cpu_count(),
        "size": arguments.size,
        "split": splits(spec, x, arguments.repeats),
        "whole": {n: whole(spec, n, x, arguments.repeats, arguments.training) for n in arguments.leaves},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
