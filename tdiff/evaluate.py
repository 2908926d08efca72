"""python -m tdiff.evaluate RUN: clustering and sample quality of a trained run, into evaluation.json."""

from __future__ import annotations

from tdiff import cli, results
from tdiff.cli import console
from tdiff.runs import existing


def main() -> None:
    parser = cli.parser("evaluate", "Scores a trained run's clusters and samples anew.")
    parser.add_argument("run", metavar="RUN", help="run folder, local or s3://")
    run = existing(parser.parse_args().run)
    cli.show_tables(results.table(results.evaluate(run)))
    console.print(run.at("evaluation.json"))


if __name__ == "__main__":
    cli.run_command(main)
