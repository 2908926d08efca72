"""What the commands share: arguments that explain themselves, one clear sentence on failure, tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from tdiff.config import ConfigError
from tdiff.data.shards import DataError
from tdiff.engine import NonFiniteError
from tdiff.launch import WorkersLostError

console = Console(highlight=False, soft_wrap=True)


def parser(command: str, about: str) -> argparse.ArgumentParser:
    """A parser for `python -m tdiff.COMMAND`."""
    return argparse.ArgumentParser(
        prog=f"python -m tdiff.{command}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_command(main: Callable[[], None]) -> None:
    """Runs a command; a known problem becomes one sentence on stderr and exit code 2, an interruption 130."""
    try:
        main()
    except (ConfigError, DataError, NonFiniteError, WorkersLostError) as error:
        print(f"tdiff: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("tdiff: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


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
