"""Problems that a user can understand and mend: each message is one sentence, and the commands print nothing else."""

from __future__ import annotations

import re

PASSWORD = re.compile(
    r"""
    (https?://)[^/?#\s:]+:(?=@)  # a token as the user, with an empty password
    | (https?://[^/?#\s:\[]*:)(?!\d{1,5}[/?#])\S*(?=@)  # a password; a port before a path with an @ is none
    | (https?://)[^/?#\s:]+(?=@)  # a token alone
    | ((?<!http)(?<!https)://[^/\s:]*:)\S*(?=@)  # of other schemes a password: a user alone may stand there
    | ([?&](?:sig|[^=&\s]*(?:
        password|passwd|pwd|secret|token|signature|x-amz-credential|api[_-]?key|access[_-]?key
      )[^=&\s]*)=)[^&\s]+
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Within a URL: what stands before its host, but for the user's name, or what an option of such a name says."""


def without_passwords(text: str) -> str:
    """The text with … in the place of every password, token, key or signature within a URL."""
    return PASSWORD.sub(r"\1\2\3\4\5…", text)


class Problem(Exception):
    """What the commands turn into one sentence and exit code 2."""


class ConfigError(Problem, ValueError):
    """A setting, argument or run that cannot be used: field, value, remedy."""


class DataError(Problem, ValueError):
    """A file that cannot be used: missing, damaged, or not what it should be; the message names it."""


class NonFiniteError(Problem, FloatingPointError):
    """A loss or gradient that is not finite: phase, step, worker and term."""


class RolledBack(NonFiniteError):
    """The same, and training is to go on from the last checkpoint."""


class Stopped(Problem):
    """Work that was told to stop, and can be gone on with."""


class WorkersLostError(Problem, RuntimeError):
    """Workers died again and again: where, and the last reason."""
