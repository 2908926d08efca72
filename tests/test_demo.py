"""The demo itself, at full length, as `make demo` runs it: what the project promises on the digits.

Bounds per seed; the mean of four seeds and the seconds are what benchmarks/digits.py measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo(tmp_path: Path) -> None:
    demo = [sys.executable, "-m", "tdiff.train", "name=demo", "seed=1"]
    started = time.monotonic()
    subprocess.run(demo, cwd=tmp_path, check=True, timeout=1400)
    print(f"the demo took {time.monotonic() - started:.0f} s")
    numbers = json.loads((tmp_path / "runs" / "demo" / "evaluation.json").read_text())
    tree = numbers["clustering"]["tree_test"]
    assert 8 <= numbers["leaves"] <= 10
    assert tree["nmi"] >= 0.65
    assert tree["acc"] >= 0.60
    samples = numbers["samples"]
    assert samples["treediffusion"]["classifier_frechet_gen"] <= samples["treevae"]["classifier_frechet_gen"] / 2
    assert samples["classifier"]["test_accuracy"] >= 0.95
    started = time.monotonic()
    subprocess.run(demo, cwd=tmp_path, check=True, timeout=60)
    assert time.monotonic() - started < 15
