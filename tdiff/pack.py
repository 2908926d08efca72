"""python -m tdiff.pack SOURCE DEST: images -> WebDataset shards and a manifest, local or s3://."""

from __future__ import annotations

from tdiff import cli, storage
from tdiff.cli import console
from tdiff.data.shards import pack
from tdiff.data.sources import SOURCES
from tdiff.errors import ConfigError


def main() -> None:
    parser = cli.parser("pack", "Packs a data set into WebDataset shards with a manifest.")
    parser.add_argument("source", metavar="SOURCE", help=f"one of: {', '.join(SOURCES)}")
    parser.add_argument("dest", metavar="DEST", help="folder for the shards, local or s3://; must not hold any yet")
    parser.add_argument("--shard-samples", type=int, default=500, help="images per shard (default: 500)")
    arguments = parser.parse_args()
    if arguments.source not in SOURCES:
        raise ConfigError(f"SOURCE {arguments.source} is not known: take one of {', '.join(SOURCES)}.")
    if arguments.shard_samples < 1:
        raise ConfigError(f"--shard-samples={arguments.shard_samples} cannot be used: take 1 or more.")
    dest = storage.absolute(arguments.dest)
    if storage.listing(dest):
        raise ConfigError(f"DEST {arguments.dest} is not empty: take a new folder.")
    manifest = pack(SOURCES[arguments.source](), dest, arguments.shard_samples)
    for split, shards in manifest.splits.items():
        size = sum(shard.bytes for shard in shards)
        console.print(f"{split:<6} {manifest.samples(split):>8} images  {len(shards):>4} shards  {size / 1e6:.1f} MB")
    console.print(f"digest {manifest.digest}")


if __name__ == "__main__":
    cli.run_command(main)
