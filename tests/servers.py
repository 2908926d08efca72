"""Real servers on loopback, for tests: of S3, moto's (breadth; any keys, in memory) and rclone's (keys, data on disk);
PostgreSQL; MLflow's.

Each is a process of its own that dies with the test process, however that ends; and a few servers of our own that do
what broken ones do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY, SECRET = "tdiff-test-key", "tdiff-test-secret"


def lead_to(endpoint: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """The variables that lead a client to a server."""
    return {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL_S3": endpoint,
        "AWS_REGION": "us-east-1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


MORTAL = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
"""Becomes the program named after it; the kernel kills it when the thread that started it ends (PR_SET_PDEATHSIG)."""


@dataclass
class Server:
    """A program that serves on a port of its own; `stop` and `start` it (in the main thread) at the same address.

    variables: added to its environment.
    """

    arguments: list[str]
    log: Path
    port: int = field(default_factory=free_port)
    variables: dict[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
        """The variables that lead a client here."""
        return lead_to(self.endpoint, key, secret)

    def make_bucket(self, name: str) -> None:
        import boto3  # slow, and few tests need it

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)

    def start(self, patience: float = 60) -> None:
        arguments = [argument.replace("PORT", str(self.port)) for argument in self.arguments]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", MORTAL, *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **self.variables},
                start_new_session=True,
            )
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"{arguments} does not serve:\n{self.log.read_text()}")

    def stop(self) -> None:
        """Kills it and the processes that it started, as a power cut would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def program(name: str) -> str:
    """A program that was installed beside Python."""
    return str(Path(sys.executable).parent / name)


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[Server]:
    """moto's server: every call of S3, but takes any keys and forgets everything when it stops."""
    server = Server([program("moto_server"), "-H", "127.0.0.1", "-p", "PORT"], folder / "moto.log")
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    """rclone's server over folder/data, each folder in it a bucket: refuses wrong keys, keeps data when killed."""
    (folder / "data").mkdir()
    options = ["--addr", "127.0.0.1:PORT", "--auth-key", f"{KEY},{SECRET}", "--config", str(folder / "none.conf")]
    server = Server([program("rclone"), "serve", "s3", str(folder / "data"), *options], folder / "rclone.log")
    server.start()
    try:
        yield server
    finally:
        server.stop()


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's programs, which Debian keeps out of PATH; None if it is not installed."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@contextlib.contextmanager
def postgres() -> Iterator[Server]:
    """PostgreSQL: database `postgres` of the user KEY with the password SECRET; keeps data when killed."""
    programs = postgres_programs()
    assert programs is not None
    setpriv = shutil.which("setpriv")
    assert setpriv is not None, "util-linux brings it"
    become = [setpriv, "--pdeathsig", "KILL"]
    # Not in pytest's folders: root alone may enter these, and PostgreSQL refuses to be root.
    with tempfile.TemporaryDirectory(prefix="tdiff-postgres-") as name:
        folder = Path(name)
        if os.getuid() == 0:
            become += ["--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
            shutil.chown(folder, "nobody", "nogroup")
        password = folder / "password"
        password.write_text(SECRET)
        password.chmod(0o644)
        made = [programs / "initdb", "-D", folder / "data", "-U", KEY, "-A", "scram-sha-256", "--pwfile", password]
        subprocess.run([*become, *made], check=True, capture_output=True, cwd=folder)
        options = ["-D", str(folder / "data"), "-p", "PORT", "-c", "listen_addresses=127.0.0.1"]
        arguments = [*become, str(programs / "postgres"), *options, "-c", "unix_socket_directories="]
        server = Server(arguments, folder / "postgres.log")
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextlib.contextmanager
def mlflow_server(folder: Path, store: Server, artifacts: str, s3: Server) -> Iterator[Server]:
    """MLflow's own server over PostgreSQL and a folder s3://…, which alone knows their passwords."""
    # SQLAlchemy 2.1 takes postgresql:// to mean psycopg 3, 2.0 took it to mean this one.
    uri = f"postgresql+psycopg2://{KEY}@127.0.0.1:{store.port}/postgres"
    where = ["--backend-store-uri", uri, "--artifacts-destination", artifacts]
    listen = ["--host", "127.0.0.1", "--port", "PORT", "--allowed-hosts", "127.0.0.1:*", "--workers", "1"]
    # Its jobs judge language models.
    variables = {"PGPASSWORD": SECRET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **s3.environment()}
    server = Server([program("mlflow"), "server", *where, *listen], folder / "mlflow.log", variables=variables)
    server.start(180)  # it makes the tables first
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of our own; yields its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers; yields its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
