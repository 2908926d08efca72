"""Protects the benchmarks from the code they measure moving on without them: each can at least say what it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import python, together

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))


def test_benchmarks_start(tmp_path: Path) -> None:
    assert len(BENCHMARKS) >= 8
    for file, done in zip(BENCHMARKS, together([[str(file), "--help"] for file in BENCHMARKS], tmp_path), strict=True):
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
    done = python("-c", without, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
