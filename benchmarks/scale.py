"""What does not fit on the way to a billion images, simulated on one machine: the order of training, the manifest, and
the decisions on all images, at rising numbers of images.

    .venv/bin/python benchmarks/scale.py [--images 10000000 100000000] [--orders 1000000000]

Nothing is read from disk but a manifest, and nothing is trained: the product's own functions run on made-up numbers,
each in a process of its own, whose time and peak memory beyond its imports are told. Images are 64x64 colour ones in
shards of 1,350, as `tdiff.pack` makes them; the tree has ten leaves.

    order       an Order over all shards, the tape of an epoch and the first block of one slot
    manifest    manifest.json written, read and checked
    at once     the ids of a leaf's members from the reach of all images at once, as it was before (up to 2e7 images)
    members     the ids of a leaf's members in chunks, from routing probabilities [M, R] in memory (not counted)
    split       the next leaf to split, from the same
    routing     routing probabilities written as routing.safetensors and read again

Prints a table and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tdiff.data.order import Order
from tdiff.data.shards import Manifest, Shard, default_shard_samples, read_manifest
from tdiff.tree.growth import leaf_members, leaf_reach, leaf_to_split, members
from tdiff.work.counting import grown
from tdiff.work.growing import Decisions, decisions_bytes, load_decisions

SHAPE = (3, 64, 64)
LEAVES = 10
BATCH = 2048
KINDS = ("order", "manifest", "at once", "members", "split", "routing")


def routing_of(images: int) -> np.ndarray:
    """[M, R] in [0, 1]: every node sends about half of its images each way, more or less surely."""
    rng = np.random.default_rng(0)
    left = np.empty((images, LEAVES - 1), np.float32)
    for k in range(0, images, 2**20):  # in parts, as random() makes float32 anew
        left[k : k + 2**20] = rng.random(left[k : k + 2**20].shape, np.float32)
    return left


def prepared(kind: str, images: int, folder: str) -> tuple[Callable[[], Any], int]:
    """What is to be measured, and the bytes that it works on."""
    size = default_shard_samples(SHAPE)
    shards = -(-images // size)
    if kind == "order":
        counts = [size] * (shards - 1) + [images - size * (shards - 1)]

        def order() -> None:
            made = Order(counts, BATCH, 8, 0, "00-root", 8192)
            made.block(made.block_of(0), 0)

        return order, 8 * shards
    if kind == "manifest":
        listed = tuple(Shard(f"train/shard-{k:06d}.tar", size, 12_000_000, f"{k:064x}") for k in range(shards))
        text = Manifest("scale", SHAPE, None, {"train": listed}).to_json()
        Path(folder, "manifest.json").write_text(text)
        return lambda: read_manifest(folder), len(text)
    left, topology = routing_of(images), grown(LEAVES)
    if kind == "at once":
        return lambda: members(leaf_reach(topology, left), 0), left.nbytes
    if kind == "members":
        return lambda: leaf_members(topology, left, 0), left.nbytes
    if kind == "split":
        return lambda: leaf_to_split(topology, left, 32, 6, BATCH), left.nbytes

    def routing() -> None:
        Path(folder, "routing.safetensors").write_bytes(decisions_bytes({"train": Decisions(left, None)}))
        load_decisions(folder)

    return routing, left.nbytes


def measure(kind: str, images: int, sender: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, size = prepared(kind, images, folder)
        before, started = resident(), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        run()
        seconds = time.perf_counter() - started
        sender.send({"seconds": round(seconds, 2), "bytes": size, "peak_bytes": peak() - before})


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10**7, 10**8], help="for decisions")
    parser.add_argument("--orders", type=int, nargs="+", default=[10**8, 10**9], help="for the order and the manifest")
    arguments = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    print(f"{'':10} {'images':>14} {'of GB':>8} {'seconds':>9} {'peak GB beside':>15}")
    for kind in KINDS:
        for images in arguments.orders if kind in ("order", "manifest") else arguments.images:
            if kind == "at once" and images > 2 * 10**7:
                continue
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(kind, images, sender))
            process.start()
            sender.close()
            found = receiver.recv()
            process.join()
            rows.append({"kind": kind, "images": images, **found})
            sizes = f"{found['bytes'] / 1e9:8.2f} {found['seconds']:9.2f} {found['peak_bytes'] / 1e9:15.3f}"
            print(f"{kind:10} {images:14,} {sizes}", flush=True)
    print(json.dumps({"benchmark": "scale", "leaves": LEAVES, "rows": rows}))


if __name__ == "__main__":
    main()
