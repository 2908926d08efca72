"""Problems that a user can understand and mend: each message is one sentence, and the commands print nothing else."""

from __future__ import annotations


class Problem(Exception):
    """What the commands turn into one sentence and exit code 2."""


class ConfigError(Problem, ValueError):
    """A setting, argument or run that cannot be used: field, value, remedy."""


class DataError(Problem, ValueError):
    """A file that cannot be used: missing, damaged, or not what it should be; the message names it."""


class NonFiniteError(Problem, FloatingPointError):
    """A loss or gradient that is not finite: phase, step and term."""


class WorkersLostError(Problem, RuntimeError):
    """Workers died again and again: where, and the last reason."""
