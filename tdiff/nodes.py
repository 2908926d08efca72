"""What a machine is busy with: processors, memory, disk, network, GPUs."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil
import pynvml

INTERVAL = 10.0
"""Seconds between two samples."""

KEPT = 360
"""Samples that wait to be fetched, at most: an hour's."""

CGROUP = Path("/sys/fs/cgroup")
"""Where a process in a container finds what the container may use and uses (cgroup v2)."""


class NodeSampler:
    """Samples the machine it is made on, every `interval` seconds in a thread of its own, until its process ends."""

    def __init__(self, interval: float = INTERVAL):
        self._interval = interval
        self._samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=KEPT)
        threading.Thread(target=self._watch, name="node-sampler", daemon=True).start()

    def take(self) -> list[tuple[float, dict[str, float]]]:
        """The samples since the last call: (Unix time in seconds, values by name). Names say their units:

        cpu_utilization_percentage, system_memory_usage_{percentage, megabytes} (of the container, if it has a limit),
        disk_usage_percentage (of the temporary folder's disk), {disk_read, disk_write, network_receive,
        network_transmit}_megabytes_per_second, gpu_I_{utilization, memory_usage}_percentage. Megabytes are 10^6 bytes.
        """
        return [self._samples.popleft() for _ in range(len(self._samples))]

    def _watch(self) -> None:
        gpus = gpu_handles()
        psutil.cpu_percent()  # percentages are of the time since the last call
        before, counted = time.monotonic(), moved_bytes()
        while True:
            time.sleep(self._interval)
            now, counts = time.monotonic(), moved_bytes()
            megabytes = {name: (counts[name] - counted[name]) / 1e6 for name in counts}
            rates = {f"{name}_megabytes_per_second": moved / (now - before) for name, moved in megabytes.items()}
            self._samples.append((time.time(), present_use() | rates | gpu_use(gpus)))
            before, counted = now, counts


def present_use() -> dict[str, float]:
    """Processors since the last call, memory and disk now, by MLflow's own names."""
    used, percentage = memory_use()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": percentage,
        "system_memory_usage_megabytes": used / 1e6,
        "disk_usage_percentage": psutil.disk_usage(tempfile.gettempdir()).percent,
    }


def memory_use() -> tuple[int, float]:
    """Bytes of memory that are taken, and the share in percent: of a container's limit, or of the machine without one.

    Beyond its limit a container is killed, however much the machine has left. What caches hold and would give back at
    once is not counted as taken.
    """
    machine = psutil.virtual_memory()
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or the whole machine: nothing of it is there
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max" and int(limit) < machine.total:
            taken = int((CGROUP / "memory.current").read_text())
            taken = max(taken - _idle_cache(), 0)
            return taken, 100 * taken / int(limit)
    return machine.used, machine.percent


def _idle_cache() -> int:
    """Bytes of a container's memory that hold files nobody has read lately; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in (CGROUP / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0


def moved_bytes() -> dict[str, int]:
    """Bytes read, written, received and sent by the machine since it started; what it does not tell is left out."""
    disk, network = psutil.disk_io_counters(), psutil.net_io_counters()
    found = {} if disk is None else {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
    return found | {"network_receive": network.bytes_recv, "network_transmit": network.bytes_sent}


def gpu_handles() -> list[Any]:
    """NVML's handles of the machine's GPUs, whichever of them this process may compute on; none without a driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]


def gpu_use(handles: list[Any]) -> dict[str, float]:
    """How busy each GPU is and how full its memory, in percent. A part of a GPU (MIG) does not tell the first."""
    found = {}
    for i, handle in enumerate(handles):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        found[f"gpu_{i}_memory_usage_percentage"] = 100 * memory.used / memory.total
        with contextlib.suppress(pynvml.NVMLError):
            found[f"gpu_{i}_utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    return found
