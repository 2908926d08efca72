"""The image of the Dockerfile: linted, built for real on a base that debootstrap makes, and used as its user.

No Docker engine is needed: buildah takes the same steps in a changed root. Not seen: the official Python base, GPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UID = 10001

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def test_dockerfile() -> None:
    version = re.search(r"^FROM python:(\d+\.\d+)\.\d+-slim-bookworm$", DOCKERFILE, re.M)
    assert version is not None, "a base of one patch release"
    assert f">={version[1]}" == PROJECT["requires-python"]
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.M)[-1] == f"{UID}:{UID}"
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.M):
        for source in line.split()[:-1]:
            assert {f"!{source}", f"!{source}/"} & set(ignored), f"{source} is kept from the build"
            assert "*" in source or (ROOT / source).exists()


def test_the_layer_of_torch_is_the_project_s() -> None:
    """Installed first, and not again: what pyproject.toml wants of the two must be what the layer asks for."""
    wanted = [r for r in PROJECT["dependencies"] if re.match(r"(torch|torchvision)\b[<>=]", r)]
    assert " ".join(f'"{requirement}"' for requirement in wanted) in DOCKERFILE


def test_hadolint() -> None:
    """No warning, and none switched off."""
    linter = Path(sys.executable).parent / "hadolint"
    linted = subprocess.run(
        [linter, "--no-fail", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert linted.stdout == ""
    assert "hadolint ignore" not in DOCKERFILE


# --- built and used ----------------------------------------------------------------------------------


Inside = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def inside() -> Iterator[Inside]:
    """Runs a command in a container of the image, as its user and in its folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a root file system")
    for tool in ("debootstrap", "buildah"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not there (Debian's package): the image is not built")
    base = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.M)[0]
    with tempfile.TemporaryDirectory(prefix="tdiff-image-") as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 40e9:
            pytest.skip("the image, its container and what lies between take up to 25 GB")

        def places(driver: str) -> list[str]:
            return ["buildah", "--root", f"{name}/store", "--runroot", f"{name}/run", "--storage-driver", driver]

        def run(*command: str | Path, timeout: float = 540) -> str:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            return done.stdout.strip()

        # Where the kernel lays no folder over another, every step copies all before it.
        overlay = subprocess.run([*places("overlay"), "from", "scratch"], capture_output=True, check=False, timeout=60)
        buildah = places("vfs" if overlay.returncode else "overlay")
        try:
            # Debian with its own Python stands for the official base, which comes from a registry of images.
            packages = "python3,python3-pip,ca-certificates"
            run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", folder / "debian")
            (folder / "debian/usr/bin/python").symlink_to("python3")
            next((folder / "debian/usr/lib").glob("python3.*/EXTERNALLY-MANAGED")).unlink()
            # Whom this machine trusts, should its way to the packages be through somebody else's certificate.
            shutil.copy(CERTIFICATES, f"{name}/debian{CERTIFICATES}")
            container = run(*buildah, "from", "scratch")
            run(*buildah, "add", "-q", container, folder / "debian", "/")
            path = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
            environment = {"PATH": path, "SSL_CERT_FILE": CERTIFICATES, "PIP_CERT": CERTIFICATES}
            run(*buildah, "config", *(f"--env={key}={value}" for key, value in environment.items()), container)
            run(*buildah, "commit", "-q", "--rm", container, f"docker.io/library/{base}")

            started = time.monotonic()
            isolation = ("--isolation", "chroot")
            run(*buildah, "build", *isolation, "--format=docker", "--layers=false", "--pull=never", "-t", "tdiff", ROOT)
            print(f"built in {time.monotonic() - started:.0f} s")
            container = run(*buildah, "from", "--pull-never", "localhost/tdiff")

            def command_inside(*command: str) -> subprocess.CompletedProcess[str]:
                full = [*buildah, "run", *isolation, container, "--", *command]
                return subprocess.run(full, capture_output=True, text=True, check=False, timeout=540)

            yield command_inside
        finally:
            subprocess.run([*buildah, "rm", "--all"], check=False, capture_output=True)
            subprocess.run(["umount", folder / "store/overlay"], check=False, capture_output=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_image_holds_what_pods_need_and_no_more(inside: Inside) -> None:
    script = """
set -e
id --user; pwd; ls
ray --version
python -c "import boto3, deepspeed, psycopg2, s3fs, tdiff.train; print(tdiff.__file__)" | tail -n 1
mlflow server --help | grep -q -e --allowed-hosts
! touch /app/file 2>/dev/null && ! touch /usr/file 2>/dev/null && touch /tmp/file
ls -d /src /app/tdiff 2>/dev/null || true
find / -xdev -name .git 2>/dev/null || true
"""
    done = inside("bash", "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    ray = re.search(r"^ARG RAY_VERSION=(.*)$", DOCKERFILE, re.M)
    assert ray is not None
    uid, folder, *rest = done.stdout.splitlines()
    assert (uid, folder) == (str(UID), "/app")
    assert rest[:2] == ["configs", f"ray, version {ray[1]}"]
    assert rest[2].endswith("-packages/tdiff/__init__.py")
    assert rest[3:] == [], "the code lies in one place, and nothing of a checkout beside it"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_image_trains_as_its_user(inside: Inside) -> None:
    """Ray, DeepSpeed and MLflow start without a compiler, a home folder or a place to write but /tmp."""
    tiny = [
        "tree.features=3",
        "tree.max_leaves=2",
        *(f"tree.epochs.{phase}=1" for phase in ("initial", "split", "final")),
    ]
    done = inside("python", "-m", "tdiff.train", "name=tiny", "runs=/tmp/runs", *tiny, "--until", "tree")
    assert done.returncode == 0, done.stdout + done.stderr
    done = inside("ls", "/tmp/runs/tiny/tree")
    assert "00-root" in done.stdout.split()
