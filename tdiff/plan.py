"""python -m tdiff.plan [CONFIG] [a.b=c …]: what a run will take, before anything runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

from tdiff import cli, config, storage
from tdiff.cli import console
from tdiff.config import Config
from tdiff.data.known import size_of_known
from tdiff.data.shards import read_manifest
from tdiff.errors import ConfigError
from tdiff.estimates import KINDS
from tdiff.hardware import computes_in_bf16
from tdiff.launch import default_workers
from tdiff.opening import check_size, data_url
from tdiff.planning.expected import Plan, plan_of
from tdiff.planning.given import Data, Machines, asked_for, data_of, schedule
from tdiff.planning.misfits import misfits
from tdiff.planning.speeds import STAGES, Speed, assumed, counted, measured, speeds_of
from tdiff.planning.tables import tables
from tdiff.runs import existing

HELD_OUT = {"digits": 297, "mnist": 10_000, "fashion-mnist": 10_000, "cifar10": 10_000, "celeba": 19_962}
UNLABELLED = ("celeba",)


def size_of_data(chosen: Config) -> tuple[int, tuple[int, int, int]]:
    """How many training images there are and their shape (I, H, H), from the manifest or the source; writes nothing."""
    data = _packed(chosen)
    return (data.images, data.shape) if data else size_of_known(chosen.data.name, chosen.data.source_dir)


def _packed(chosen: Config) -> Data | None:
    """The data where it is packed already. Raises DataError where the config names a folder that holds none."""
    url = data_url(chosen)
    if chosen.data.url is not None or storage.exists(storage.join(url, "manifest.json")):
        return data_of(read_manifest(url))
    return None


def data_to_plan(chosen: Config, arguments: argparse.Namespace) -> Data:
    """Of the size that is asked for, or of the data that the config names. Raises ConfigError."""
    if (arguments.images is None) != (arguments.shape is None):
        raise ConfigError("--images and --shape say together what there is: give both, or neither.")
    if arguments.images is not None:
        data = Data.of_size(arguments.images, 0, _shape(arguments.shape), 0, arguments.shard_samples)
    elif (packed := _packed(chosen)) is not None:
        data = packed
    else:
        name = chosen.data.name
        images, shape = size_of_known(name, chosen.data.source_dir)
        classes = 0 if name in UNLABELLED else 10
        data = Data.of_size(images, HELD_OUT.get(name, 0), shape, classes, chosen.data.shard_samples)
    check_size(chosen, chosen.data.url or chosen.data.name, data.images, data.shape)
    return data


def _shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = (int(part) for part in text.split(","))
        if min(channels, height, width) < 1:
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"--shape {text} cannot be used: write channels,height,width, as 3,64,64.") from error
    return channels, height, width


def machines_of(chosen: Config, arguments: argparse.Namespace) -> Machines:
    """What the plan is for. Raises ConfigError."""
    kind = KINDS[arguments.gpu]
    here = arguments.gpu == "cpu"
    if arguments.gpus is not None:
        count: int = arguments.gpus
    else:
        count = _workers_here(chosen) if here else asked_for(chosen)
    per_node = arguments.per_node if arguments.per_node is not None else count if here else 8
    for option, value in (("--gpus", count), ("--per-node", per_node)):
        if value < 1:
            raise ConfigError(f"{option} {value} cannot be used: take 1 or more.")
    positive = ("price", "efficiency", "node_memory", "network", "storage")
    for option in positive:
        value = getattr(arguments, option)
        if value is not None and not value > 0:
            raise ConfigError(f"--{option.replace('_', '-')} {value:g} cannot be used: take more than 0.")
    if arguments.efficiency is not None:
        kind = replace(kind, efficiency=arguments.efficiency)
    memory = arguments.node_memory or (kind.memory * per_node if here else 1000)
    cores = per_node if here else 12 * per_node
    price = kind.price if arguments.price is None else arguments.price
    network = arguments.network or kind.network
    return Machines(arguments.gpu, kind, count, per_node, memory, cores, network, arguments.storage, price)


def _workers_here(chosen: Config) -> int:
    """How many workers the job would take on this machine's cores. Raises ConfigError if it has too few."""
    try:
        return default_workers(chosen.workers)
    except ConfigError as error:
        raise ConfigError(f"{str(error).rstrip('.')}, or plan for other machines with --gpus.") from error


def _rates(items: list[str]) -> dict[str, float]:
    found = {}
    for item in items:
        stage, _, value = item.partition("=")
        try:
            found[stage] = float(value)
            if stage not in STAGES[:-1] or not 0 < found[stage] < float("inf"):
                raise ValueError
        except ValueError as error:
            known = ", ".join(STAGES[:-1])
            raise ConfigError(f"--measured {item} cannot be used: write STAGE=IMAGES/S, STAGE of {known}.") from error
    return found


def show(plan: Plan, zero: int, speeds: dict[str, Speed], warnings: list[str]) -> None:
    """Prints a plan as tables, where its speeds are from, and what will not fit."""
    cli.show_tables(tables(plan, zero))
    sources: dict[str, list[str]] = {}
    for stage, speed in speeds.items():
        sources.setdefault(speed.source, []).append(f"{stage} {speed.rate / 1e12:,.3g} TFLOP/s")
    for source, told in sources.items():
        console.print(f"speed of a worker: {', '.join(told)}: {source}")
    for warning in warnings or ["nothing that is known here stands against it"]:
        console.print(f"! {warning}")


def main() -> None:
    parser = cli.parser("plan", "Parameters, FLOPs, steps, memory, hours, cost and bandwidth, before anything runs.")
    cli.add_config(parser)
    parser.add_argument("--gpu", choices=sorted(KINDS), default="cpu", help="kind of machine; cpu: one core a worker")
    parser.add_argument("--gpus", type=int, help="how many at most; default: the config's workers, or 2")
    parser.add_argument("--per-node", type=int, help="of them on a node; default: 8, cpu: all")
    parser.add_argument("--price", type=float, help="dollars an hour for one; default: a usual one, which changes")
    parser.add_argument(
        "--efficiency", type=float, help="share of the peak FLOP/s that training reaches; default: 0.25"
    )
    parser.add_argument("--node-memory", type=float, help="GB of a node's memory; default: 1000, cpu: 12 a core")
    parser.add_argument("--network", type=float, help="GB/s from a worker to other nodes; default: the kind's")
    parser.add_argument("--storage", type=float, default=1.0, help="GB/s that object storage gives a node; default: 1")
    parser.add_argument("--images", type=int, help="training images, where there is no data yet (with --shape)")
    parser.add_argument("--shape", help="channels,height,width of an image, in pixels")
    parser.add_argument("--shard-samples", type=int, help="images in a shard, with --images")
    parser.add_argument(
        "--measured", action="append", default=[], metavar="STAGE=IMAGES/S", help="of a worker: tree, split, diffusion"
    )
    parser.add_argument("--from", dest="run", metavar="RUN", help="run whose finished phases say how fast workers are")
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes, seconds")
    arguments = parser.parse_intermixed_args()
    chosen = config.load(*cli.config_and_settings(arguments))
    data, machines = data_to_plan(chosen, arguments), machines_of(chosen, arguments)
    bf16 = chosen.precision == "bf16" or (chosen.precision == "auto" and (machines.kind.together or computes_in_bf16()))
    rates, run = _rates(arguments.measured), existing(arguments.run) if arguments.run else None
    phases = schedule(chosen, data.images)
    costs = counted(chosen, data, phases, bf16)
    speeds = assumed(machines, bf16)
    if run is not None:
        speeds |= speeds_of(run)
    speeds |= measured(rates, costs)
    plan = plan_of(chosen, data, machines, speeds, costs, phases)
    warnings = [*misfits(chosen, plan, costs, phases)]
    if arguments.json:
        print(json.dumps({**asdict(plan), "hours": plan.hours, "cost": plan.cost, "warnings": warnings}))
        return
    show(plan, chosen.diffusion.zero, speeds, warnings)


if __name__ == "__main__":
    cli.run_command(main)
