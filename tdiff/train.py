"""python -m tdiff.train [CONFIG] [a.b=c …]: the whole pipeline, from images to a tree, a diffusion model, a report."""

from __future__ import annotations

import time

from tdiff import cli, config
from tdiff.cli import console
from tdiff.pipeline import NEXT, STAGES, Outcome, train
from tdiff.results import pictures, table


def settings_help() -> str:
    """Every setting with its default, as shown by --help."""
    lines = []
    for name, value in config.flat(config.Config()).items():
        about = config.description(name)
        lines.append(f"  {name}={value}" + (f"  ({about})" if about else ""))
    return "settings and their defaults:\n" + "\n".join(lines)


def main() -> None:
    parser = cli.parser("train", "Carries a run on from where it is. Without CONFIG: the embedded digits demo.")
    parser.epilog = settings_help()
    cli.add_config(parser)
    parser.add_argument(
        "--until",
        metavar="STAGE",
        help=f"stop after {', '.join(STAGES)}, a phase (03-split-4), or whatever comes {NEXT}",
    )
    parser.add_argument("--fresh", action="store_true", help="start the run over, deleting its folder")
    arguments = parser.parse_intermixed_args()  # settings may stand after options too
    path, settings = cli.config_and_settings(arguments)
    started = time.monotonic()
    outcome = train(config.load(path, settings), arguments.until, arguments.fresh, console.print)
    _show(outcome, time.monotonic() - started)


def _show(outcome: Outcome, seconds: float) -> None:
    run = outcome.run
    if outcome.numbers is not None:
        console.print()
        cli.show_tables(table(outcome.numbers))
        console.print(f"pictures  {run.at('figures')}/{'  '.join(pictures(run))}")
        console.print(f"report    {run.at('report', 'index.html')}")
    console.print(f"run       {run.url}")
    console.print(f"MLflow    {outcome.tracking}  (make ui)")
    cli.show_warning(outcome.warning)
    console.print(f"{seconds:.0f} s in all")
    console.print(f"next: {outcome.upcoming or 'nothing'}")


if __name__ == "__main__":
    cli.run_command(main)
