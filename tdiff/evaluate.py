"""python -m tdiff.evaluate RUN: a run's clusters, likelihood and samples, as far as it has come, in numbers."""

from __future__ import annotations

from tdiff import cli, launch, results, storage
from tdiff.cli import console
from tdiff.errors import ConfigError
from tdiff.mirroring import add_result
from tdiff.runs import existing


def main() -> None:
    parser = cli.parser("evaluate", "Scores anew a run's clusters, their likelihood, and its samples if it has any.")
    parser.add_argument("run", metavar="RUN", help="run folder, local or s3://")
    parser.add_argument("--features", help="networks that judge samples: classifier, inception or classifier,inception")
    parser.add_argument("--inception", metavar="FILE", help="InceptionV3's weights, as torch-fidelity has them")
    parser.add_argument("--reference", choices=("train", "test"), help="real images that samples are held against")
    parser.add_argument("--workers", type=int, help="Ray actors at most; default: the run's number of workers")
    arguments = parser.parse_args()
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers={arguments.workers} cannot be used: take 1 or more.")
    run = existing(arguments.run)
    given = {name: getattr(arguments, name) for name in ("features", "inception", "reference")}
    if given["features"] is not None:
        given["features"] = given["features"].split(",")
    results.settle(run, {name: value for name, value in given.items() if value is not None})
    workers = launch.crew_of(arguments.workers or run.config().workers).most
    launch.connect(workers)
    try:
        numbers = results.evaluate(run, launch.at_once(workers))
    finally:
        launch.disconnect()
    cli.show_tables(results.table(numbers))
    console.print(run.at("evaluation.json"))
    if storage.exists(run.at("report", "index.html")):  # it tells these numbers
        results.figures(run)
        results.report(run)
    cli.show_warning(add_result(run, numbers, results.shown(run)))


if __name__ == "__main__":
    cli.run_command(main)
