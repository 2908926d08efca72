"""Commands as processes, and many of them in less time than one after the other: most of it is importing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

Done = subprocess.CompletedProcess[str]


def python(*arguments: str, cwd: Path, timeout: float = 400) -> Done:
    """`python ARGUMENTS …` in a folder, ended."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, text=True, capture_output=True, timeout=timeout, check=False
    )


def together(lines: Sequence[Sequence[str]], cwd: Path) -> list[Done]:
    """`python` with each of these lines of arguments, two at a time, in one folder."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda line: python(*line, cwd=cwd), lines))
