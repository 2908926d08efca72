"""python -m tdiff.pack SOURCE DEST: images -> WebDataset shards and a manifest, local or s3://."""

from __future__ import annotations

import argparse
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tdiff import cli, launch, storage
from tdiff.cli import console
from tdiff.data.folder import TEST_SHARE
from tdiff.data.known import NAMES
from tdiff.data.shards import Manifest
from tdiff.data.tars import Tars
from tdiff.errors import ConfigError
from tdiff.packing import open_source, pack

ABOUT = f"""Packs images into WebDataset shards with a manifest. The same command again goes on where one was stopped.

SOURCE is one of {", ".join(NAMES)};
or a folder of images (labels from its sub-folders, splits from train/ and test/), local or s3://;
or a folder of .tar files, an existing WebDataset, which is checked and taken as it is (DEST may be the same folder)."""


def arguments_of() -> argparse.Namespace:
    """The command line. Raises ConfigError for an option that cannot be used, or has no effect for this SOURCE."""
    parser = cli.parser("pack", ABOUT)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what to pack; a folder that has a data set's name: ./NAME")
    add("dest", metavar="DEST", help="folder for the shards, local or s3://; new, or where this command was stopped")
    add("--source-dir", metavar="DIR", help="folder of a data set's original files (default: they are downloaded)")
    add("--shard-samples", type=int, metavar="N", help="images per shard (default: about 16 MiB of pixels, 50 to 5000)")
    add("--workers", type=int, metavar="N", help="1: this process, more: Ray workers (default: by the files' bytes)")
    images = parser.add_argument_group("for a folder of images")
    add = images.add_argument
    add("--size", type=int, metavar="N", help="cut to the middle square and resize to N x N pixels (default: as is)")
    add("--mode", choices=("grey", "rgb"), help="channels (default: those of the first image)")
    add("--no-labels", action="store_true", help="sub-folders are no classes")
    add("--test-share", type=float, metavar="P", help=f"share of images held out, 0 to 1 (default: {TEST_SHARE})")
    add("--max-bad-samples", type=int, metavar="N", help="damaged images left out before it is an error (default: 0)")
    arguments = parser.parse_args()

    for name, least in (("shard_samples", 1), ("workers", 1), ("size", 1), ("max_bad_samples", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}={value} cannot be used: take {least} or more.")
    share = arguments.test_share
    if share is not None and not 0 <= share < 1:
        raise ConfigError(f"--test-share={share} cannot be used: take 0 or more, but less than 1.")
    known = arguments.source in NAMES
    without_effect = ["size", "mode", "no_labels", "test_share"] if known else ["source_dir"]
    if known and arguments.source != "celeba":
        without_effect.append("max_bad_samples")
    for name in without_effect:
        if getattr(arguments, name) not in (None, False):
            option, kind = f"--{name.replace('_', '-')}", arguments.source if known else "a folder"
            raise ConfigError(f"{option} has no effect for {kind}: leave it out.")
    return arguments


def main() -> None:
    arguments = arguments_of()
    folder = {key: getattr(arguments, key) for key in ("size", "mode", "test_share")}
    source = open_source(arguments.source, arguments.source_dir, labels=not arguments.no_labels, **folder)
    if isinstance(source, Tars):
        for option in ("shard_samples", "max_bad_samples"):
            if getattr(arguments, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} has no effect for a WebDataset: leave it out.")
    else:
        for note in source.notes:
            console.print(note)
    shown = (TextColumn("shard"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*shown, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task, started, told = bar.add_task("", total=None, rate=""), time.monotonic(), time.monotonic()

        def progress(done: int, total: int, images: int) -> None:
            nonlocal told
            if not images:  # the speed is that of the shards packed now, not of those there already
                bar.reset(task, completed=done, total=total)
                return
            rate = f"{images / (time.monotonic() - started):.0f} images/s"
            bar.update(task, completed=done, rate=rate)
            if not console.is_terminal and time.monotonic() - told > 10:  # a log wants lines, and not too many
                told, left = time.monotonic(), bar.tasks[task].time_remaining
                console.print(f"shard {done}/{total}  {rate}" + ("" if left is None else f"  {left:.0f} s left"))

        try:
            manifest = pack(
                source,
                storage.absolute(arguments.dest),
                arguments.shard_samples,
                workers=arguments.workers,
                max_bad=arguments.max_bad_samples or 0,
                say=console.print,
                progress=progress,
            )
        finally:
            launch.disconnect()
    show(manifest)


def show(manifest: Manifest) -> None:
    """Prints what is in a data set."""
    rows = [("split", "images", "shards", "MB")]
    for split, shards in manifest.splits.items():
        size = sum(shard.bytes for shard in shards) / 1e6
        rows.append((split, f"{manifest.samples(split):,}", f"{len(shards):,}", f"{size:.1f}"))
    channels, height, width = manifest.shape
    classes = "no labels" if manifest.classes is None else f"{len(manifest.classes)} classes"
    cli.show_tables([(f"{manifest.name}, {height}x{width}x{channels}, {classes}", rows)])
    console.print(f"digest {manifest.digest}")


if __name__ == "__main__":
    cli.run_command(main)
