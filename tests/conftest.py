"""What all tests share: one thread (numbers must not depend on the machine's cores), no memory between tests, and two
S3 servers that start when a test first wants them.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import servers
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.moto(tmp_path_factory.mktemp("moto")) as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    with servers.rclone(tmp_path_factory.mktemp("rclone")) as server:
        server.make_bucket("tests")
        yield server


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that leads to no store, nor asks this machine for credentials."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "TDIFF_STORAGE")):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # What storage.py sets by default is forgotten after the test, too.
    for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(params=["moto", "rclone"])
def s3(request: pytest.FixtureRequest, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty folder s3://tests/… on each of the servers, which the AWS variables lead to."""
    server: servers.Server = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://tests/{uuid.uuid4().hex}"
