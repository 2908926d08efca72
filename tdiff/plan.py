"""python -m tdiff.plan [CONFIG] [a.b=c …]: what a run will train, before anything runs."""

from __future__ import annotations

from tdiff import cli, config, storage
from tdiff.cli import console
from tdiff.config import Config
from tdiff.data.known import size_of_known
from tdiff.data.shards import read_manifest
from tdiff.diffusion.condition import Denoiser
from tdiff.launch import default_workers, workers_for
from tdiff.opening import check_size, data_url
from tdiff.tree.model import TreeVAE
from tdiff.tree.topology import Topology
from tdiff.work.diffusing import denoiser_spec, steps_of, tracks_of


def bytes_per_rank(parameters: int, zero: int, workers: int, emas: int = 0) -> int:
    """Bytes of fp32 weights, gradients, Adam's two moments and EMAs on one worker under a ZeRO stage.

    ZeRO 1 shares moments, masters and EMAs among the workers, 2 the gradients too, 3 the weights too. fp32 masters
    beside the weights exist from ZeRO 1 on.
    """
    weights = gradients = 4 * parameters
    moments_and_emas = (8 + 4 * emas) * parameters
    if zero == 0:
        return weights + gradients + moments_and_emas
    partitioned = (moments_and_emas + 4 * parameters) / workers
    gradients_kept = gradients / workers if zero >= 2 else gradients
    weights_kept = weights / workers if zero == 3 else weights
    return int(weights_kept + gradients_kept + partitioned)


def size_of_data(chosen: Config) -> tuple[int, tuple[int, int, int]]:
    """How many training images there are and their shape (I, H, H), from the manifest or the source; writes nothing."""
    url = data_url(chosen)
    if chosen.data.url is not None or storage.exists(storage.join(url, "manifest.json")):
        manifest = read_manifest(url)
        return manifest.samples("train"), manifest.shape
    return size_of_known(chosen.data.name, chosen.data.source_dir)


def main() -> None:
    parser = cli.parser("plan", "Parameters, steps and memory of a run, before anything runs.")
    cli.add_config(parser)
    chosen = config.load(*cli.config_and_settings(parser.parse_intermixed_args()))
    images, shape = size_of_data(chosen)
    check_size(chosen, chosen.data.url or chosen.data.name, images, shape)
    channels, image_size, _ = shape

    topology = Topology.root_with_two_leaves("00-root")
    while len(topology.leaves) < chosen.tree.max_leaves:
        shallowest = min(topology.leaves, key=lambda leaf: topology[leaf].depth)
        topology = topology.split(shallowest, "plan")
    tree = TreeVAE(chosen.tree_spec(channels, image_size), topology)
    denoiser = Denoiser(denoiser_spec(chosen, tree))
    epochs, section = chosen.tree.epochs, chosen.diffusion
    per_epoch = images // chosen.tree.images_per_step
    splits = chosen.tree.max_leaves - 2
    refits = max(0, splits - 1) // chosen.tree.refit_every if epochs.refit else 0
    whole = epochs.initial + refits * epochs.refit + epochs.final
    workers = workers_for(section.slots, default_workers(chosen.workers))
    rows = []
    emas = len(tracks_of(section)[1])
    stages = (("tree", tree, 0, 1, 0), ("diffusion", denoiser, section.zero, workers, emas))
    for name, model, zero, parts, averages in stages:
        count = sum(p.numel() for p in model.parameters())
        memory = bytes_per_rank(count, zero, parts, averages) / 1e6
        steps = whole * per_epoch if name == "tree" else steps_of(section, images)
        rows.append((name, f"{count:,}", f"{steps:,}", f"{memory:.1f}", str(zero), str(parts)))
    header = ("stage", "parameters", "steps of the whole network", "MB per worker but activations", "ZeRO", "workers")
    cli.show_tables([(f"{images:,} images, {chosen.tree.max_leaves} leaves", [header, *rows])])
    console.print(f"and {splits} splits of {epochs.split} epochs each, on one leaf's images")


if __name__ == "__main__":
    cli.run_command(main)
