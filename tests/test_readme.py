"""The README says what is there: its commands exist, its paths exist, its settings are known."""

from __future__ import annotations

import re
from pathlib import Path

from commands import together

from tdiff import config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_commands_explain_themselves() -> None:
    modules = sorted(set(re.findall(r"python -m (tdiff\.\w+)", README)))
    assert len(modules) >= 7
    for module, done in zip(modules, together([["-m", module, "--help"] for module in modules], ROOT), strict=True):
        assert done.returncode == 0, done.stderr
        assert f"python -m {module}" in done.stdout
        for option in re.findall(rf"python -m {module}.*", README):
            for flag in re.findall(r"--[a-z]+", option.split(";")[-1] if ";" in option else option):
                assert flag in done.stdout, f"{module} has no {flag}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"


def test_paths_exist() -> None:
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    block = README.split("## Where things are")[1].split("##")[0]
    first = ["tdiff/" + name for name in re.findall(r"(?<![/\w])(\w+\.py)", block)]
    for path in {*re.findall(r"(?<!\w)(?:tdiff/|cluster/|jobs/|benchmarks/)[\w./]*", block), *first}:
        path = path.replace("tdiff/tdiff/", "tdiff/")
        assert (ROOT / path).exists(), path


def test_settings_are_known() -> None:
    config.load(str(ROOT / "configs" / "digits.yaml"), re.findall(r"\((tree\.\w+=\w+)\)", README.replace("`", "")))


def test_the_written_out_demo_is_the_default() -> None:
    assert config.load(str(ROOT / "configs" / "digits.yaml")) == config.load()


def test_nothing_is_left_to_fill_in() -> None:
    files = [file for folder in (".", "docs", "cluster", "jobs") for file in sorted((ROOT / folder).glob("*.md"))]
    assert {"README.md", "BENCHMARKS.md", "scale.md", "mlflow.md"} <= {file.name for file in files}
    assert [str(file.relative_to(ROOT)) for file in files if "@@" in file.read_text()] == []
    assert not re.findall(r"@[A-Z_]+@", README)
