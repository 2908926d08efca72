"""python -m tdiff.report RUN: one self-contained HTML page of a trained run, and its figures as PNG."""

from __future__ import annotations

from tdiff import cli, results
from tdiff.cli import console
from tdiff.errors import ConfigError
from tdiff.runs import existing


def main() -> None:
    parser = cli.parser("report", "Draws a trained run's figures anew and writes its report.")
    parser.add_argument("run", metavar="RUN", help="run folder, local or s3://")
    run = existing(parser.parse_args().run)
    if results.evaluation(run) is None:
        raise ConfigError(f"RUN {run.url} is not evaluated yet: finish it with python -m tdiff.train.")
    results.figures(run)
    console.print(results.report(run))


if __name__ == "__main__":
    cli.run_command(main)
