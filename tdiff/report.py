"""python -m tdiff.report RUN: one self-contained HTML page of a run, as far as it has come, and its figures as PNG."""

from __future__ import annotations

from tdiff import cli, results
from tdiff.cli import console
from tdiff.mirroring import add_result
from tdiff.runs import existing


def main() -> None:
    parser = cli.parser("report", "Draws the figures of a run anew, as far as it has come, and its one-file report.")
    parser.add_argument("run", metavar="RUN", help="run folder, local or s3://")
    run = existing(parser.parse_args().run)
    results.figures(run)
    console.print(results.report(run))
    cli.show_warning(add_result(run, {}, results.shown(run)))


if __name__ == "__main__":
    cli.run_command(main)
