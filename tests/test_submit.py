"""jobs/submit.sh --per-phase: one Ray job a phase, until a job says that nothing is next.

With a `ray` of our own that keeps its jobs in a folder; the real one is in tests/test_cluster.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PHASES = ["00-root", "01-split-2", "diffusion", "report"]
# Every job does the next of the phases; what breaks is named by a file.
FAKE = """#!{python}
import sys
from pathlib import Path

folder, phases = Path({folder!r}), {phases!r}
_, verb, *arguments = sys.argv[1:]
if verb == "submit":
    with (folder / "submitted").open("a") as file:
        print(Path.cwd(), *arguments, sep="|", file=file)
    if "--submission-id" not in arguments:
        sys.exit()
    identity = arguments[arguments.index("--submission-id") + 1]
    done = len((folder / "done").read_text().split())
    (folder / "asked").unlink(missing_ok=True)
    log = "Running entrypoint\\nnext: from an older line\\n" + phases[done] + " 1.0 s\\n"
    if (folder / "fails").exists() and phases[done] == (folder / "fails").read_text():
        (folder / identity).write_text((folder / "how").read_text() + "\\n" + log)
    else:
        with (folder / "done").open("a") as file:
            print(phases[done], file=file)
        upcoming = "" if (folder / "silent").exists() else "next: " + [*phases, "nothing"][done + 1] + "\\n"
        (folder / identity).write_text("succeeded\\n" + log.replace("next: from an older line\\n", "") + upcoming)
    sys.exit()
identity = arguments[-1]
outcome, _, log = (folder / identity).read_text().partition("\\n")
if (folder / "gone").exists():
    print("Connection refused", file=sys.stderr)
    sys.exit(1)
if verb == "status":
    asked = (folder / "asked").exists()
    (folder / "asked").touch()
    if asked:
        print("Job '" + identity + "' " + outcome)
        print("Status message: the end")
    else:
        print("Status for job '" + identity + "': RUNNING")
elif "--follow" in arguments and not (folder / "broken once").exists():
    (folder / "broken once").touch()
    sys.exit("WebSocket connection closed unexpectedly")
else:
    print(log, end="")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fake = tmp_path / "bin" / "ray"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(python=sys.executable, folder=str(tmp_path), phases=PHASES))
    fake.chmod(0o755)
    sleep = tmp_path / "bin" / "sleep"
    sleep.write_text("#!/bin/sh\n")
    sleep.chmod(0o755)
    (tmp_path / "done").touch()
    return tmp_path


def submit(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "jobs" / "submit.sh", *arguments],
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


def submitted(folder: Path) -> list[list[str]]:
    """Submission id, and what follows `--`, of every job."""
    jobs = []
    for line in (folder / "submitted").read_text().splitlines():
        cwd, *arguments = line.split("|")
        assert cwd == str(ROOT.resolve())
        assert arguments[arguments.index("--working-dir") + 1] == "."
        environment = json.loads(arguments[arguments.index("--runtime-env-json") + 1])
        assert set(environment) == {"env_vars"}
        assert set(environment["env_vars"]) == {"TDIFF_COMMIT"}
        where = arguments.index("--")
        jobs.append([arguments[arguments.index("--submission-id") + 1], *arguments[where + 1 :]])
    return jobs


def test_a_job_for_every_phase(folder: Path) -> None:
    done = submit(folder, "--per-phase", "configs/digits.yaml", "name=a b/c")
    assert done.returncode == 0, done.stderr
    assert (folder / "done").read_text().split() == PHASES
    jobs = submitted(folder)
    for _, *command in jobs:
        assert command == ["python", "-m", "tdiff.train", "configs/digits.yaml", "name=a b/c", "--until", "next"]
    names = [name for name, *_ in jobs]
    assert len(set(names)) == len(PHASES)
    assert all(name.startswith("a-b-c-") for name in names)
    assert [name.split("-", 6)[-1] for name in names] == ["first", *PHASES[1:]]
    assert "diffusion 1.0 s" in done.stdout  # a person sees what the jobs print
    assert (folder / "broken once").exists()  # and a connection that breaks costs nothing


def test_a_run_without_a_name_is_called_after_its_config(folder: Path) -> None:
    assert submit(folder, "configs/digits.yaml", "--per-phase").returncode == 0
    assert all(name.startswith("digits-") for name, *_ in submitted(folder))


@pytest.mark.parametrize("how", ["failed", "was stopped"])
def test_a_job_that_fails_ends_it_and_the_same_command_goes_on(folder: Path, how: str) -> None:
    (folder / "fails").write_text(PHASES[1])
    (folder / "how").write_text(how)
    failed = submit(folder, "--per-phase", "name=failed")
    assert failed.returncode == 1
    assert f"01-split-2 {how}" in failed.stderr
    assert len(submitted(folder)) == 2
    (folder / "fails").unlink()
    assert submit(folder, "--per-phase", "name=failed").returncode == 0
    assert (folder / "done").read_text().split() == PHASES
    assert len({name for name, *_ in submitted(folder)}) == 5


def test_only_the_first_job_starts_the_run_over(folder: Path) -> None:
    assert submit(folder, "--fresh", "name=a", "--per-phase").returncode == 0
    assert [command[-1] for _, *command in submitted(folder)] == ["--fresh", "next", "next", "next"]


def test_a_job_that_does_not_say_what_is_next_ends_it(folder: Path) -> None:
    (folder / "silent").touch()
    done = submit(folder, "--per-phase", "name=a")
    assert done.returncode == 1
    assert "does not say what is next" in done.stderr
    assert len(submitted(folder)) == 1


def test_a_cluster_that_no_longer_answers_ends_it(folder: Path) -> None:
    (folder / "gone").touch()
    done = submit(folder, "--per-phase", "name=a", SUBMIT_TRIES="3")
    assert done.returncode == 1
    assert "may still run there" in done.stderr


@pytest.mark.parametrize("form", [[], ["--per-phase"]], ids=["one job", "a job a phase"])
def test_jobs_are_told_the_commit_of_the_code(folder: Path, form: list[str]) -> None:
    """With a + where the work tree differs in tdiff/; nothing where the code is in no repository of its own."""
    copy = folder / "repository" / "tdiff-copy"
    for name in ("jobs/submit.sh", "tdiff/__init__.py"):
        (copy / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, copy / name)

    def git(*arguments: str) -> str:
        names = ["-c", "user.name=test", "-c", "user.email=test"]
        done = subprocess.run(
            ["git", "-C", copy.parent, *names, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def told() -> str:
        (folder / "done").write_text("")
        (folder / "submitted").unlink(missing_ok=True)
        environment = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
        command = [copy / "jobs" / "submit.sh", *form, "name=a"]
        subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
        lines = (folder / "submitted").read_text().splitlines()
        assert len(lines) == (len(PHASES) if form else 1)
        (given,) = {line.split("|--runtime-env-json|")[1].split("|")[0] for line in lines}
        return str(json.loads(given)["env_vars"]["TDIFF_COMMIT"])

    assert told() == ""
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=theirs")
    assert told() == "", "somebody else's repository"
    git("add", ".")
    git("commit", "--quiet", "--message=ours")
    assert told() == git("rev-parse", "HEAD")
    (copy / "file").touch()
    assert told() == git("rev-parse", "HEAD")
    (copy / "tdiff" / "__init__.py").write_text("changed")
    assert told() == git("rev-parse", "HEAD") + "+"


def test_it_goes_to_the_end_only(folder: Path) -> None:
    done = submit(folder, "--per-phase", "--until", "tree")
    assert done.returncode == 2
    assert "leave --until out" in done.stderr
    assert not (folder / "submitted").exists()
