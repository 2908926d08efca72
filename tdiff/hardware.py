"""Where this process computes, and how. Plain torch is enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def device() -> torch.device:
    """Where this process computes: its GPU, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def computes_in_bf16(on: torch.device | None = None) -> bool:
    """Whether a device (default: where this process computes) has bf16 in hardware; a GPU may also only emulate it."""
    if (on or device()).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: numbers must not depend on how many cores this machine has."""
    from threadpoolctl import threadpool_limits  # not there where torch is alone

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
