"""Memory per rank of training stage 2: what lies on each worker under ZeRO 0, 1, 2, 3 with 1, 2 and 4 workers.

    .venv/bin/python benchmarks/memory.py [CONFIG] [--workers 1 2 4]

Worker processes with gloo on this machine's CPUs, no Ray; each takes one step of the product's own objective (a tree
of two leaves in front of the U-Net of configs/fashion-mnist.yaml with two power-function EMAs) with the engine's
DeepSpeed back-end, once per ZeRO stage. What is counted are the bytes of the tensors that are there: of gradients the
most that there is between two backward passes or before the update, of the rest what there is after it. What serves
two purposes counts once, for the first of weights, masters, moments, EMAs, gradients.

    bucket    what DeepSpeed holds besides, then too, to send gradients between workers

Prints the largest rank of every case in MB beside the formula, and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from tdiff import config, estimates
from tdiff.diffusion.condition import Denoiser
from tdiff.diffusion.ema import Ema
from tdiff.engine import DeepSpeedBackend, Task
from tdiff.seeds import generator
from tdiff.tree.model import TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import DiffusionObjective, denoiser_spec, tracks_of

CONFIG = Path(__file__).parent.parent / "configs" / "fashion-mnist.yaml"
SLOTS = 8  # of one image each: two or more for every worker, so that gradients add up
KINDS = ("weights", "masters", "moments", "emas", "gradients", "bucket")


class Counter:
    """Counts bytes of tensors; memory that was counted before counts as 0."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def bytes(self, tensors: Iterable[Tensor | None]) -> int:
        """The numbers themselves, not what else their storages hold."""
        found = {t.data_ptr(): t.nbytes for t in tensors if t is not None and t.numel()}
        new = {place: size for place, size in found.items() if place not in self.seen}
        self.seen |= set(new)
        return sum(new.values())


def gradients_of(backend: DeepSpeedBackend) -> list[Tensor]:
    """Gradients of parameters, and the partitions of them that DeepSpeed keeps."""
    averaged = getattr(backend.engine.optimizer, "averaged_gradients", {})
    adding_up = getattr(backend.engine.optimizer, "all_grad_tensors", {})
    kept = [gradient for groups in (averaged, adding_up) for group in groups.values() for gradient in group or ()]
    return [*(p.grad for p in backend.parameters.values() if p.grad is not None), *kept]


def buckets_of(backend: DeepSpeedBackend) -> list[Tensor]:
    """DeepSpeed's buffers for reducing gradients: a list of them under ZeRO 1 and 2, one under ZeRO 3."""
    found: list[Tensor] = []
    for bucket in getattr(backend.engine.optimizer, "ipg_buckets", {}).values():
        found += bucket.buffer if isinstance(bucket.buffer, list) else [bucket.buffer]
    return [buffer for buffer in found if buffer is not None]


def weights_of(backend: DeepSpeedBackend) -> list[Tensor]:
    """The parameters, or what a rank keeps of them under ZeRO 3."""
    return [getattr(p, "ds_tensor", p).detach() for p in backend.parameters.values()]


def measured(zero: int, rank: int, world: int, chosen: config.Config) -> dict[str, int]:
    """Bytes by kind on this rank, after one step."""
    torch.manual_seed(0)
    tree = TreeVAE(chosen.tree_spec(1, 28), Topology.root_with_two_leaves("00-root"))
    objective = DiffusionObjective(Denoiser(denoiser_spec(chosen, tree)), tree, 0.0)

    def batch(step: int, slot: int) -> dict[str, Tensor]:
        return {"images": torch.rand(1, 1, 28, 28)}

    # A parameter of few numbers would otherwise stay whole on every worker under ZeRO 3.
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero == 3 else {}
    task = Task(
        "memory", objective, batch, 1, SLOTS, SLOTS, 0, lambda step: 1e-4, clip=1.0, zero=zero, deepspeed=settings
    )
    backend = DeepSpeedBackend(task, world)
    averages = [Ema(backend.masters(), decay) for decay in tracks_of(chosen.diffusion)[1].values()]
    found = dict.fromkeys(KINDS, 0)
    for slot in range(rank, SLOTS, world):
        backend.backward(batch(0, slot), 0, generator("loss", 0, "memory", 0, slot))
        counter = Counter()
        counter.bytes([*weights_of(backend), *backend.masters()])
        found["gradients"] = max(found["gradients"], counter.bytes(gradients_of(backend)))
        found["bucket"] = max(found["bucket"], counter.bytes(buckets_of(backend)))
    backend.update(1e-4)
    counter = Counter()
    found["weights"] = counter.bytes(weights_of(backend))
    found["masters"] = counter.bytes(backend.masters())
    optimizer = backend.engine.optimizer if zero == 0 else backend.engine.optimizer.optimizer
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.dim()]
    found["moments"] = counter.bytes(states)
    for average in averages:
        average.update(1)
    found["emas"] = counter.bytes(tensor for average in averages for tensor in average.averages)
    return found


def work(rank: int, world: int, folder: str, chosen: config.Config) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}  # as Ray Train does
    store = dist.FileStore(str(Path(folder, f"store-{world}")), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found = {}
    for zero in range(4):
        found[zero] = measured(zero, rank, world, chosen)
        gc.collect()
    Path(folder, f"{world}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(CONFIG), help="of grey images of 28 pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help=f"divisors of {SLOTS}")
    arguments = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    chosen = config.load(arguments.config, ["diffusion.ema_decay=", "diffusion.ema=0.1"])
    tree = TreeVAE(chosen.tree_spec(1, 28), Topology.root_with_two_leaves("00-root"))
    parameters = sum(p.numel() for p in Denoiser(denoiser_spec(chosen, tree)).parameters())
    emas = len(tracks_of(chosen.diffusion)[1])
    print(
        f"{parameters:,} parameters, {emas} EMAs; MB of the largest rank; formula: (8 + 4 * {emas}) bytes a parameter"
    )
    print(f"{'ZeRO':>4} {'workers':>7}" + "".join(f"{k:>11}" for k in KINDS) + "  moments + EMAs over formula   plan")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for world in arguments.workers:
            torch.multiprocessing.spawn(work, (world, folder, chosen), nprocs=world)
            ranks = [json.loads(Path(folder, f"{world}-{rank}.json").read_text()) for rank in range(world)]
            for zero in range(4):
                of_ranks = [rank[str(zero)] for rank in ranks]
                most = {kind: max(rank[kind] for rank in of_ranks) for kind in KINDS}
                formula = (8 + 4 * emas) * parameters / (world if zero else 1)
                ratio = max(rank["moments"] + rank["emas"] for rank in of_ranks) / formula
                # All but the bucket, which `plan` leaves out.
                total = max(sum(rank[kind] for kind in KINDS if kind != "bucket") for rank in of_ranks)
                planned = total / estimates.bytes_per_rank(parameters, zero, world, emas)
                rows.append({"zero": zero, "workers": world, "ranks": of_ranks, "over_formula": round(ratio, 4)})
                rows[-1]["over_plan"] = round(planned, 4)
                print(
                    f"{zero:4d} {world:7d}"
                    + "".join(f"{most[kind] / 1e6:11.1f}" for kind in KINDS)
                    + f"{ratio:29.4f}{planned:7.3f}",
                    flush=True,
                )
    print(json.dumps({"benchmark": "memory", "parameters": parameters, "emas": emas, "rows": rows}))


if __name__ == "__main__":
    main()
