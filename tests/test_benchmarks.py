"""Protects the benchmarks from the code they measure moving on without them: each can at least say what it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.stem)
def test_a_benchmark_starts(file: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(file), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {file.name}")


@pytest.mark.parametrize("name", ["diffusion", "tree"])
def test_those_of_the_models_need_torch_alone(name: str, tmp_path: Path) -> None:
    """Machines with a GPU often have nothing else (but scikit-learn, whose digits are grown on)."""
    missing = ("ray", "deepspeed", "webdataset", "mlflow", "pydantic", "fsspec", "s3fs")
    without = f"import runpy, sys; sys.modules.update(dict.fromkeys({missing})); "
    without += (
        f"sys.argv[1:] = ['--help']; runpy.run_path({str(BENCHMARKS[0].parent / name)!r} + '.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", without], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
