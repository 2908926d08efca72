"""python -m tdiff.generate RUN: distributed sampling into shards and a picture grid."""

from __future__ import annotations

import argparse
import time

from tdiff import cli, launch, results, storage
from tdiff.cli import console
from tdiff.config import FOLDER_NAME
from tdiff.diffusion.samplers import GRIDS, SAMPLERS, STARTS
from tdiff.errors import ConfigError
from tdiff.mirroring import add_result
from tdiff.runs import Run, existing
from tdiff.work.jobs import sample_job
from tdiff.work.judging import KINDS
from tdiff.work.sampling import MODELS, MODES, SampleJob


def _plain(value: object) -> str:
    """A value as part of a folder's name."""
    return "_".join(map(str, value)) if isinstance(value, list) else str(value)


NO_SETTINGS = ("run", "workers", "out", "fid", "reference")
"""Options on which the images do not depend."""


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("generate", "Draws samples of a trained run. Started again, it draws only what is missing.")
    parser.add_argument("run", metavar="RUN", help="run folder, local or s3://")
    parser.add_argument("--mode", default="sample", help=f"one of: {', '.join(MODES)} (default: sample)")
    parser.add_argument("--model", choices=MODELS, help="treevae: the tree's own images (default: treediffusion)")
    parser.add_argument("--num", type=int, help="draws, or test images to reconstruct (default: samples.per_leaf)")
    parser.add_argument("--leaf", type=int, help="index of the leaf to draw (default: by the tree's probabilities)")
    parser.add_argument("--node", type=int, help="id of a node: draw below it, or go on below it from an image's path")
    parser.add_argument("--steps", type=int, help="times of the sampler's grid")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the run's samples.sampler")
    parser.add_argument("--eta", type=float, help="noise that ddim adds, from 0 (none) to 1 (as much as ddpm)")
    parser.add_argument("--grid", choices=GRIDS, help="default: the run's samples.grid")
    parser.add_argument("--start", choices=STARTS, help="noise, or the leaf's noised reconstruction")
    parser.add_argument("--guidance", type=float, help="weight of classifier-free guidance; 0: none")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels where it is active"
    )
    parser.add_argument("--ema", type=float, help="width of the EMA to draw from, such as 0.07 (default: the run's)")
    parser.add_argument("--seed", type=int, help="default: the run's")
    parser.add_argument("--batch", type=int, help="images per shard; part of what a sample depends on")
    parser.add_argument("--workers", type=int, help="Ray workers (default: 2, or fewer CPUs)")
    parser.add_argument(
        "--fid",
        nargs="?",
        choices=KINDS,
        const=True,
        help="compare with real images while drawing, in the features of this network (default: the run's first)",
    )
    parser.add_argument(
        "--reference", choices=("train", "test"), help="with --fid: these real images (default: evaluation.reference)"
    )
    parser.add_argument("--out", default=None, help="name below RUN/samples (default: from the options)")
    return parser


def _asked_for(arguments: argparse.Namespace, run: Run) -> tuple[str, SampleJob]:
    """The folder's name and what is to be drawn into it. Raises ConfigError."""
    settings = {key: value for key, value in vars(arguments).items() if key not in NO_SETTINGS}
    given = {key: value for key, value in settings.items() if value is not None}
    name = arguments.out or "-".join(f"{k}={_plain(v)}" for k, v in given.items())
    if not FOLDER_NAME.fullmatch(name):
        raise ConfigError(f"--out={name} is no plain name: it becomes a folder below RUN/samples.")
    if results.STANDARD.fullmatch(name):
        raise ConfigError(f"--out={name} is where the run's own samples lie: take another name.")
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers={arguments.workers} cannot be used: take 1 or more.")
    job = sample_job(run, name, **settings)
    if arguments.reference is not None and (not arguments.fid or job.mode != "sample"):
        raise ConfigError(
            f"--reference={arguments.reference} has an effect only with --fid and --mode sample: leave it out."
        )
    if arguments.fid and (job.images_per_draw > 1 or job.leaf is not None or job.node is not None):
        raise ConfigError(
            "--fid compares what the whole model draws: leave --leaf and --node out, and take --mode sample or "
            "reconstruct."
        )
    return name, job


def main() -> None:
    arguments = _parser().parse_args()
    run = existing(arguments.run)
    name, job = _asked_for(arguments, run)
    workers = launch.default_workers(arguments.workers)
    missing = results.unfinished({name: job})
    there = sum(file.endswith(".tar") for file in storage.listing(job.url)) if missing else 0
    numbers, started = None, time.monotonic()

    def progress(done: int, total: int) -> None:
        """Of a job gone on with, the shards that were there come first, and took no time."""
        seconds, new = time.monotonic() - started, done - there
        if new <= 0:
            return
        rate = new * job.draws_per_shard * job.images_per_draw / seconds
        console.print(f"shard {done}/{total}  {rate:.1f} images/s  {seconds / new * (total - done):.0f} s left")

    if arguments.fid or missing:
        launch.connect(workers)
        at_once = launch.at_once(workers)
        try:
            if arguments.fid:
                kind = run.config().evaluation.features[0] if arguments.fid is True else arguments.fid
                extractor = results.judge(run, kind, at_once)
                started = time.monotonic()  # what is drawn is what takes so long, not the training of a judge
                numbers = results.draw_and_compare(run, name, job, extractor, at_once, progress, arguments.reference)
            else:
                results.draw({name: job}, at_once, progress)
        finally:
            launch.disconnect()
    count = job.num * job.images_per_draw
    console.print(f"{count} images in {job.url}  (grid.png; {time.monotonic() - started:.1f} s)")
    if numbers is not None:
        console.print_json(data=numbers)
        kept = f"samples/{name}/{results.quality_file(numbers)}"
        told = {"generated": {name: {numbers["reference"]["split"]: numbers}}}
        cli.show_warning(add_result(run, told, {kept: storage.read_bytes(run.at(kept))}))


if __name__ == "__main__":
    cli.run_command(main)
