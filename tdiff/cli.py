"""What the commands share: arguments that explain themselves, one clear sentence on failure, tables."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from tdiff.errors import Problem, Stopped, without_passwords

# In a job's log, which has no width of its own, tables would be cut at 80 columns.
_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140
console = Console(highlight=False, soft_wrap=True, markup=False, width=_WIDTH)
"""Prints text as it is: errors and paths may hold [brackets]."""


def parser(command: str, about: str) -> argparse.ArgumentParser:
    """A parser for `python -m tdiff.COMMAND`."""
    return argparse.ArgumentParser(
        prog=f"python -m tdiff.{command}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """The arguments [CONFIG] [a.b=c …], in any order among the options; read them with `config_and_settings`."""
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; without one: the digits demo")
    parser.add_argument("settings", nargs="*", metavar="a.b=c", help="settings over it, such as tree.max_leaves=8")


def config_and_settings(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """CONFIG, if one is named, and the settings."""
    path, settings = arguments.config, arguments.settings
    if path is not None and "=" in path and not os.path.isfile(path):  # noqa: PTH113
        return None, [path, *settings]
    return path, settings


_terminated = False
"""Whether SIGTERM came where no workers train."""


def _stop(signum: int, frame: object) -> None:
    """What SIGTERM does where no workers train (`tdiff.launch.fit`): whatever is finished is kept."""
    global _terminated
    _terminated = True
    raise KeyboardInterrupt  # the one exception that ends Ray's waiting


def run_command(main: Callable[[], None]) -> None:
    """Runs a command; a known problem becomes one sentence on stderr and exit code 2, an interruption 130 or 143."""
    try:
        signal.signal(signal.SIGTERM, _stop)
        main()
    except Stopped as stopped:
        print(f"tdiff: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except (Problem, OSError) as error:
        print(f"tdiff: {without_passwords(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if _terminated:
            print("tdiff: told to stop by SIGTERM; the same command goes on from here.", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
        print("tdiff: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def show_warning(sentence: str | None) -> None:
    """Prints what went wrong but costs nothing, if there is something."""
    if sentence:
        console.print(sentence, style="yellow")


def show_tables(tables: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> None:
    """Prints titled tables whose first row is the header."""
    for title, (header, *rows) in tables:
        shown = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
        for k, name in enumerate(header):
            shown.add_column(name, justify="left" if k == 0 else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        console.print()
