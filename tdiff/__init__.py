"""TreeDiffusion at scale: the hierarchy of groups in unlabelled images, and sharp new images of every group.

import tdiff
run = tdiff.load("runs/demo")      # what notebooks use: tdiff/api.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdiff.api import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load`, imported when it is first asked for: every command imports this package, and few need all of torch."""
    if name == "load":
        from tdiff.api import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load"]
