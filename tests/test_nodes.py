"""Protects the record of what a run's machines were busy with: real numbers, in the units that their names say."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest

from tdiff import nodes
from tdiff.nodes import NodeSampler, gpu_handles, gpu_use


def test_samples_of_this_machine() -> None:
    started, sampler = time.time(), NodeSampler(0.2)
    found: list[tuple[float, dict[str, float]]] = []
    deadline = time.monotonic() + 60
    while len(found) < 3 and time.monotonic() < deadline:
        sum(range(200_000))  # keeps a processor busy
        found += sampler.take()
    times = [at for at, _ in found]
    assert started < times[0]
    assert times == sorted(set(times))
    for _, values in found:
        assert 0 <= values["cpu_utilization_percentage"] <= 100
        assert 0 < values["system_memory_usage_percentage"] < 100
        assert 0 < values["system_memory_usage_megabytes"] < psutil.virtual_memory().total / 1e6
        assert 0 < values["disk_usage_percentage"] <= 100
        assert values["network_receive_megabytes_per_second"] >= 0
    assert max(values["cpu_utilization_percentage"] for _, values in found) > 0
    assert all(at not in times for at, _ in sampler.take())


def cgroup(folder: Path, limit: str, stat: str | None = None) -> None:
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text("300000000\n")
    if stat is not None:
        (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize(
    ("stat", "megabytes"),
    [(None, 300), ("anon 1\ninactive_file 100000000\nactive_file 7\n", 200), ("inactive_file 900000000\n", 0)],
    ids=["all of it", "without idle caches", "never less than nothing"],
)
def test_memory_in_a_container_is_the_containers(
    stat: str | None, megabytes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "CGROUP", tmp_path)
    cgroup(tmp_path, "400000000", stat)
    found = nodes.present_use()
    assert found["system_memory_usage_megabytes"] == megabytes
    assert found["system_memory_usage_percentage"] == megabytes / 4


@pytest.mark.parametrize("limit", [None, "max", str(2**62), "nonsense"])
def test_without_a_limit_memory_is_the_machines(
    limit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "CGROUP", tmp_path)
    if limit is not None:
        cgroup(tmp_path, limit)
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    found = nodes.present_use()
    assert found["system_memory_usage_megabytes"] == machine.used / 1e6
    assert found["system_memory_usage_percentage"] == machine.percent


def test_rates_are_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    started, others = time.monotonic(), dict.fromkeys(nodes.moved_bytes(), 0)
    monkeypatch.setattr(nodes, "moved_bytes", lambda: others | {"disk_read": int(3e6 * (time.monotonic() - started))})
    sampler = NodeSampler(0.3)
    deadline = time.monotonic() + 60
    while not (found := sampler.take()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found[0][1]["disk_read_megabytes_per_second"] == pytest.approx(3, rel=0.05)


def test_what_nobody_fetches_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "KEPT", 4)
    sampler = NodeSampler(0.02)
    time.sleep(0.5)
    assert len(sampler.take()) <= 4


def test_gpus_as_nvml_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML is replaced: where there is a GPU, other numbers than these would come."""

    def rates(handle: int) -> SimpleNamespace:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)  # a part of a GPU
        return SimpleNamespace(gpu=37, memory=5)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: SimpleNamespace(used=2**30, total=2**32))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", rates)
    assert gpu_use(gpu_handles()) == {
        "gpu_0_memory_usage_percentage": 25.0,
        "gpu_0_utilization_percentage": 37.0,
        "gpu_1_memory_usage_percentage": 25.0,
    }


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert gpu_use(gpu_handles()) == {}
