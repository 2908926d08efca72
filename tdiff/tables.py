"""python -m tdiff.tables RUN [RUN …]: the papers' tables over runs, with the papers' numbers beside ours."""

from __future__ import annotations

from tdiff import cli, comparison, storage
from tdiff.cli import console
from tdiff.evaluation.tables import as_csv, markdown, tables
from tdiff.runs import existing

ABOUT = """\
Prints Tables 1, 2 and 3 of the TreeDiffusion papers over evaluated runs, as Markdown, with the papers' numbers beside
ours. Runs that differ in their seed alone are averaged; others, or those measured in another way, stand apart.
ACC, NMI, ARI, purities and accuracies in percent, entropies in nats."""


def main() -> None:
    parser = cli.parser("tables", ABOUT)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders with an evaluation.json, local or s3://")
    parser.add_argument("--out", metavar="DIR", help="folder for tables.md, tables.csv and, on one tree, samples.png")
    parser.add_argument(
        "--tracking",
        metavar="URI",
        help="MLflow that keeps both files, in a run named tables; none: it does not; default: the first run's own",
    )
    arguments = parser.parse_args()
    runs = [existing(url) for url in arguments.runs]
    entries = comparison.entries(runs)
    address = None if arguments.tracking == "none" else comparison.store(runs[0], arguments.tracking)
    found = tables(entries)
    files = {"tables.md": markdown(found), "tables.csv": as_csv(found)}
    console.print(files["tables.md"])
    if arguments.out is not None:
        contents = {name: text.encode() for name, text in files.items()}
        if (picture := comparison.samples_side_by_side(runs)) is not None:
            contents["samples.png"] = picture
        for name, content in contents.items():
            url = storage.join(storage.absolute(arguments.out), name)
            storage.write_bytes(url, content)
            console.print(url)
    if address is not None:
        comparison.log(runs, [entry.data for entry in entries], address, files)
        console.print(f"MLflow    {address[0]}")


if __name__ == "__main__":
    cli.run_command(main)
