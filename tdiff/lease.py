"""Who works on a folder in object storage, where no file can be locked.

    URL/.lease      names its holder, who writes it anew every RENEWAL seconds, and removes it at the end

Who finds a lease watches it for LAPSE seconds of its own clock: one that changes meanwhile has a living holder, one
that does not was left by a killed one, and is taken over. That keeps out what is started twice; it is no fence: a
holder that was cut off from the store for longer learns only when it is back that another has taken over.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tdiff import storage

log = logging.getLogger(__name__)

FILE = ".lease"

SIGN = re.compile(rb"held by .+ sign \d+\n")
"""A sign of life."""

RENEWAL = 5.0
"""Seconds between two signs of life."""

LAPSE = 60.0
"""Seconds without a sign after which a holder counts as dead: longer than one needs for the next whom the store keeps
waiting for `storage.READ_TIMEOUT` twice, once reading and once writing.
"""

SETTLING = 1.0
"""Seconds after which of two that take a free lease at once the later one's word stands."""


class Lease:
    """One process's hold on a folder."""

    def __init__(self, url: str):
        self._file = storage.join(url, FILE)
        self._holder = f"held by {socket.gethostname()} process {os.getpid()} {secrets.token_hex(8)}".encode()
        self._signs = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def take(self, held: Callable[[], None]) -> None:
        """Waits until nobody else has it. held: called once another is known to live; what it raises is raised."""
        told = False
        while True:
            found = self._found()
            if found is not None and self._changes(found):
                if not told:
                    held()
                told = True
                continue
            self._sign()
            time.sleep(SETTLING)
            if self._ours(self._found()):
                self._thread.start()
                return

    def give_back(self) -> None:
        self._over.set()
        self._thread.join(RENEWAL)  # longer only while the store does not answer
        try:
            if self._ours(self._found()):
                storage.remove(self._file)
        except OSError as error:  # whoever comes next waits for LAPSE seconds
            log.warning("%s cannot be removed now: %s", self._file, error)

    def _found(self) -> bytes | None:
        try:
            return storage.read_bytes(self._file)
        except FileNotFoundError:
            return None

    def _ours(self, found: bytes | None) -> bool:
        return found is not None and found.startswith(self._holder)

    def _changes(self, found: bytes) -> bool:
        """Whether somebody else gives a sign of life within LAPSE seconds."""
        log.warning("%s is there: watching for %g s whether its holder lives", self._file, LAPSE)
        deadline = time.monotonic() + LAPSE
        while time.monotonic() < deadline:
            time.sleep(RENEWAL / 2)
            now = self._found()
            if now != found:
                return now is not None
        return False

    def _sign(self) -> None:
        self._signs += 1
        storage.write_bytes(self._file, self._holder + b" sign %d\n" % self._signs)

    def _renew(self) -> None:
        while not self._over.wait(RENEWAL):
            try:
                found = self._found()
                if found is not None and SIGN.fullmatch(found) and not self._ours(found):
                    log.warning("%s was taken over by another process, so this one stops", self._file)
                    os.kill(os.getpid(), signal.SIGTERM)
                else:  # ours, or what a store that was killed in the midst of a write has left of it
                    self._sign()
            except OSError as error:  # storage has waited already: the next sign may come through
                log.warning("%s cannot be renewed now: %s", self._file, error)


@contextmanager
def leased(url: str, held: Callable[[], None]) -> Iterator[None]:
    """Keeps other processes that ask for it off a folder in object storage.

    held: called if another process has it, before this one waits for it; what it raises is raised instead. A process
    that loses it to another one, having given no sign for too long, sends itself SIGTERM. Raises StorageError.
    """
    lease = Lease(url)
    lease.take(held)
    try:
        yield
    finally:
        lease.give_back()
