"""Protects what a user is trusted with: keys, tokens and passwords reach the stores and nothing else.

They are planted in the environment of real commands, used by them (S3 for the data, an MLflow that wants a password,
Ray's token), and then looked for in every file and line that the commands leave.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import servers
from test_end_to_end import TINY

from tdiff import config as configs
from tdiff.errors import ConfigError, without_passwords
from tdiff.tracking import Mirror

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "planted-5ecret-access-key",
    "AWS_SESSION_TOKEN": "planted-5ession-token",
    "RAY_AUTH_TOKEN": "7f" * 31 + "0a",
    "MLFLOW_TRACKING_PASSWORD": "planted-tracking-pa55word",
    "PGPASSWORD": "planted-p0stgres-password",
}


def traces(content: bytes) -> list[str]:
    """Which of the planted secrets are in a file, as they are or in base64."""
    login = f"somebody:{PLANTED['MLFLOW_TRACKING_PASSWORD']}"
    # The last characters of a piece in base64 depend on what follows.
    basic = base64.b64encode(login.encode())[:-4]
    return [name for name, value in PLANTED.items() if value.encode() in content] + ["login"] * (basic in content)


def test_the_search_finds_what_it_looks_for() -> None:
    login = base64.b64encode(b"somebody:planted-tracking-pa55word")
    assert traces(b"Authorization: Basic " + login) == ["login"]
    assert traces(b"\x00planted-5ession-token\xff") == ["AWS_SESSION_TOKEN"]
    assert traces(b"AWS_SESSION_TOKEN") == []


class Refusing(BaseHTTPRequestHandler):
    """An MLflow that knows no password, and says what it was given."""

    given: list[str]

    def do_GET(self) -> None:
        self.given.append(str(self.headers.get("Authorization")))
        text = b"wrong password"
        self.send_response(401)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def session() -> Iterator[Path]:
    """A folder for Ray's logs; pytest's own have names too long for its sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_planted_secrets_are_nowhere(
    tmp_path: Path, session: Path, moto_server: servers.Server, no_aws: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        **os.environ,
        **moto_server.environment(),
        **PLANTED,
        "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": str(session),
        "MLFLOW_TRACKING_USERNAME": "somebody",
    }
    said: list[bytes] = []

    def command(module: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        line = [sys.executable, "-m", f"tdiff.{module}", *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, timeout=400)
        said.extend((done.stdout, done.stderr))
        return done

    data = "s3://tests/secrets/digits"
    assert command("pack", "digits", data).returncode == 0, said[-1]
    settings = [*TINY, f"data.url={data}", "tree.max_leaves=2", "tree.epochs.initial=1", "diffusion.images=256"]
    done = command("train", *settings, "--until", "diffusion")
    assert done.returncode == 0, done.stderr
    Refusing.given = []
    with servers.http_server(Refusing) as uri:
        done = command("train", *settings, "--until", "diffusion", f"tracking={uri}")
        assert done.returncode == 0, done.stderr
        assert b"the next start catches up" in done.stdout
        assert traces(Refusing.given[0].encode()) == ["login"], "the password is not used"
        refused = command("train", *settings, f"tracking={uri.replace('//', '//somebody:planted-5ession-token@')}")
        assert refused.returncode == 2
        assert b"tracking holds a password" in refused.stderr
        refused = command("train", *settings, "data.url=s3://key:planted-5ecret-access-key@tests/digits")
        assert refused.returncode == 2
        assert b"data.url holds a password" in refused.stderr
    assert command("generate", "runs/tiny", "--num", "12", "--steps", "2").returncode == 0, said[-1]
    environment["AWS_SECRET_ACCESS_KEY"] = "wrong"  # which moto does not mind; then a store that is not there
    environment["AWS_ENDPOINT_URL_S3"] = f"http://127.0.0.1:{servers.free_port()}"
    environment["TDIFF_STORAGE_PATIENCE"] = "2"
    assert command("generate", "runs/tiny", "--num", "9", "--mode", "reconstruct").returncode == 2

    looked: dict[str, list[str]] = {f"output {k}": traces(text) for k, text in enumerate(said)}
    for folder in (tmp_path, session):
        for file in folder.rglob("*"):
            if file.is_file() and not file.is_symlink():
                looked[str(file)] = traces(file.read_bytes())
    assert {file: found for file, found in looked.items() if found} == {}
    names = {Path(file).name for file in looked}
    assert {"config.yaml", "run.json", "mlflow.db", "manifest.json", "raylet.out", "gcs_server.out"} <= names
    assert any(name.startswith("worker-") for name in names), "the workers' own logs"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("tracking=http://somebody:pa55word@host:5000", "tracking holds a password"),
        ("tracking=postgresql://somebody:pa55word@host/db", "tracking holds a password"),
        ("tracking=postgresql://host/db?user=somebody&password=pa55word", "tracking holds a password"),
        ("tracking=http://somebody:pa5@5word@host", "tracking holds a password"),
        ("data.url=s3://key:pa55word@bucket/folder", "data.url holds a password"),
        ("runs=s3://key:pa55word@bucket", "runs holds a password"),
        ("evaluation.inception=https://somebody:pa55word@host/weights", "evaluation.inception holds a password"),
        ("data.name=http://somebody:pa55word@host", "data.name holds a password"),
        ("tree=http://somebody:pa55word@host", "tree holds a password"),
        ("tracing=http://somebody:pa55word@host", "tracing is not a known setting"),
        ('tracking="http://somebody:pa55word@host', "cannot be read as a value"),
        ("http://somebody:pa55word@host", "neither a CONFIG file nor a setting"),
        ("data.shard_samples=http://somebody:pa55word@host", "data.shard_samples holds a password"),
        ("tracking=https://pa55word@host", "tracking holds a password"),
        ("tracking=http://pa5@5word@host:5000/path", "tracking holds a password"),
        ("tracking=http://some@body:pa55word@host", "tracking holds a password"),
        ("tracking=postgresql://some@body:pa55word@host/db", "tracking holds a password"),
        ("tracking=https://pa55word:@host", "tracking holds a password"),
        ("tracking=http://somebody:pa/55word@host", "tracking holds a password"),
        ("tracking=postgresql://somebody:123/pa55word@host/db", "tracking holds a password"),
        *(
            (f"data.url=https://bucket.host/folder?a=1&{option}=pa55word&b=2", "data.url holds a password")
            for option in (
                "X-Amz-Signature",
                "X-Amz-Credential",
                "X-Amz-Security-Token",
                "sig",
                "pwd",
                "passwd",
                "api_key",
                "apikey",
                "Signature",
                "access_key",
            )
        ),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(setting: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(None, [setting])
    assert told in str(caught.value)
    error: BaseException | None = caught.value
    while error is not None:  # whatever a traceback would show
        assert "5word" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:5000/path",
        "postgresql://somebody@host:5432/db",
        "sqlite:////tmp/a@b.db",
        "s3://bucket/a:b",
        "s3://bucket/key",
        "sqlite:///runs/mlflow.db",
        "http://host:5000/a@b?x=1",
        "https://host/a@b:c@d",
        "http://[::1]:5000/a@b",
        "http://host:5000?owner=a@b",
        "http://host/path?design=1&signal=2&key=3",
        "databricks://profile",
        "/a:b@c",
    ],
)
def test_what_holds_no_password_is_taken(uri: str) -> None:
    assert without_passwords(uri) == uri
    assert configs.load(None, [f"tracking={uri}"]).tracking == uri


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://pa55word@host/a and http://b@c", "https://…@host/a and http://…@c"),
        ("https://pa55word:@host", "https://…@host"),
        ("git+https://pa55word@host:5000/a@b", "git+https://…@host:5000/a@b"),
        ("http://a:pa5@5word@host:5000/", "http://a:…@host:5000/"),
        ("http://a@b:pa5@5word@host:5000/", "http://a@b:…@host:5000/"),
        (
            "s3://b/k?X-Amz-Credential=AK/1/s3&X-Amz-Date=2&X-Amz-Signature=0f",
            "s3://b/k?X-Amz-Credential=…&X-Amz-Date=2&X-Amz-Signature=…",
        ),
        ("https://h/c?sv=1&sig=a%2Fb is gone", "https://h/c?sv=1&sig=… is gone"),
    ],
)
def test_what_stays_of_a_url(text: str, told: str) -> None:
    assert without_passwords(text) == told


def test_what_mlflow_says_is_repeated_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no route to http://somebody:pa55word@host/api or postgresql://b:pa55word@c/d")

    monkeypatch.setattr("tdiff.tracking._connected", broken)
    mirror = Mirror("http://host", "digits", "mine", "id", None)
    mirror.open({}, {}, {})
    told = mirror.close()
    assert told is not None
    assert "http://somebody:…@host/api or postgresql://b:…@c/d" in told
