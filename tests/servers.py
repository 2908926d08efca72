"""Real S3 servers on loopback, for tests: moto's (breadth; any keys, in memory), rclone's (keys, data on disk).

Each is a process of its own that dies with the test process, however that ends; and a few servers of our own that do
what broken ones do.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
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
    """A program that serves S3 on a port of its own; `stop` and `start` it (in the main thread) at the same address."""

    arguments: list[str]
    log: Path
    port: int = field(default_factory=free_port)
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

    def start(self) -> None:
        arguments = [argument.replace("PORT", str(self.port)) for argument in self.arguments]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", MORTAL, *arguments], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"{arguments} does not serve:\n{self.log.read_text()}")

    def stop(self) -> None:
        """Kills it, as a power cut would."""
        if self._process is not None:
            self._process.kill()
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
