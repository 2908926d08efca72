"""Protects what runs on object storage: whatever a store does (keys refused, buckets missing, killed and started again,
gone, silent, answers cut off), a call succeeds when waiting may help and fails in bounded time with one sentence when
it does not; and a data set in a bucket is the same as one in a folder.

Real servers and real connections (tests/servers.py); broken ones are broken for real.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import servers
from servers import KEY, SECRET, Server

from tdiff import storage
from tdiff.data.shards import read_manifest
from tdiff.data.sources import Split, digits
from tdiff.data.stream import read_split
from tdiff.errors import ConfigError, DataError
from tdiff.packing import pack
from tdiff.storage import StorageError

CALLS: dict[str, Callable[[str], object]] = {
    "exists": storage.exists,
    "listing": storage.listing,
    "versions": storage.versions,
    "read": storage.read_bytes,
    "write": lambda url: storage.write_bytes(url, b"content"),
    "remove": storage.remove,
}
PARTS = 3 * storage.PART
"""Bytes of a file that is written in parts."""


def lead(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], patience: float | None = None) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if patience is not None:
        monkeypatch.setenv("TDIFF_STORAGE_PATIENCE", str(patience))


def sentence(act: Callable[[], object], *parts: str) -> str:
    """The message of a StorageError of one line that holds all `parts`."""
    with pytest.raises(StorageError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def seconds(act: Callable[[], object]) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


# --- who may, and where ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("key", "secret"), [("other-key", SECRET), (KEY, "other-secret")])
def test_wrong_credentials(call: str, key: str, secret: str, rclone_server: Server, no_aws: None, monkeypatch):
    lead(monkeypatch, rclone_server.environment(key, secret))
    spent = seconds(lambda: sentence(lambda: CALLS[call]("s3://tests/file"), "s3://tests/file", "AWS_ACCESS_KEY_ID"))
    assert spent < 3, "what waiting cannot mend was tried again"


def test_wrong_credentials_for_a_large_write(rclone_server: Server, no_aws: None, monkeypatch):
    lead(monkeypatch, rclone_server.environment("other-key"))
    for size in (storage.PART, PARTS):
        sentence(lambda size=size: storage.write_bytes("s3://tests/file", bytes(size)), "AWS_ACCESS_KEY_ID")


@pytest.mark.parametrize("call", CALLS)
def test_no_credentials(call: str, no_aws: None, monkeypatch):
    sentence(lambda: CALLS[call]("s3://tests/file"), "s3://tests/file", "no complete credentials", "AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    sentence(lambda: CALLS[call]("s3://tests/file"), "nobody", "AWS_PROFILE")


@pytest.mark.parametrize("call", CALLS)
def test_a_bucket_that_does_not_exist(call: str, s3: str):
    url = "s3://no-such-bucket/file"
    assert seconds(lambda: sentence(lambda: CALLS[call](url), url, "there is no bucket no-such-bucket")) < 3
    if call in ("exists", "listing", "versions", "remove"):
        sentence(lambda: CALLS[call]("s3://no-such-bucket"), "there is no bucket no-such-bucket")


@pytest.mark.parametrize(("endpoint", "words"), [("nonsense", "Invalid endpoint"), ("https://127.0.0.1:PORT", "SSL")])
def test_an_endpoint_that_can_never_answer(endpoint: str, words: str, rclone_server: Server, no_aws, monkeypatch):
    lead(monkeypatch, servers.lead_to(endpoint.replace("PORT", str(rclone_server.port))))
    assert seconds(lambda: sentence(lambda: storage.read_bytes("s3://tests/file"), words, "AWS_ENDPOINT_URL_S3")) < 3


def test_bad_names_and_bad_patience_are_refused(s3: str, monkeypatch):
    sentence(lambda: storage.write_bytes("s3://Bad Bucket/x", b""), 'Invalid bucket name "Bad Bucket"')
    for value in ("soon", "-1", "nan", "inf"):
        monkeypatch.setenv("TDIFF_STORAGE_PATIENCE", value)
        with pytest.raises(ConfigError, match=f"TDIFF_STORAGE_PATIENCE={value}"):
            storage.exists(s3)


def test_a_command_says_one_sentence(rclone_server: Server, no_aws, tmp_path: Path):
    environment = {**os.environ, **rclone_server.environment(KEY, "other-secret")}
    line = [sys.executable, "-m", "tdiff.pack", "digits", "s3://tests/pack"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=110, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("tdiff: s3://tests/pack")
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("way", ["AWS_ENDPOINT_URL", "AWS_PROFILE"])
def test_the_other_ways_to_name_endpoint_and_keys(way: str, rclone_server: Server, no_aws, monkeypatch, tmp_path: Path):
    if way == "AWS_PROFILE":
        keys = f"aws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
        config = tmp_path / "config"
        config.write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {rclone_server.endpoint}\n{keys}")
        lead(monkeypatch, {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "lab"})
    else:
        lead(monkeypatch, rclone_server.environment())
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
        monkeypatch.setenv("AWS_ENDPOINT_URL", rclone_server.endpoint)
    storage.write_bytes("s3://tests/ways", way.encode())
    assert storage.read_bytes("s3://tests/ways") == way.encode()
    # Newer clients' checksums are unknown to many stores.
    assert os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION") == (None if way == "AWS_PROFILE" else "when_required")


def test_credentials_that_are_renewed_in_the_environment_are_used(rclone_server: Server, no_aws, monkeypatch):
    lead(monkeypatch, rclone_server.environment(KEY, "old"))
    sentence(lambda: storage.exists("s3://tests/file"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert not storage.exists("s3://tests/never")


# --- what others write -------------------------------------------------------------------------------


def test_what_others_write_and_remove_is_seen_at_once(s3: str):
    storage.write_bytes(f"{s3}/run/a", b"1")
    assert storage.listing(f"{s3}/run") == ["a"]
    assert not storage.finished(f"{s3}/run")
    code = (
        "import sys; from tdiff import storage\n"
        "storage.finish(sys.argv[1]); storage.write_text(sys.argv[1] + '/b', ''); storage.remove(sys.argv[1] + '/a')"
    )
    subprocess.run([sys.executable, "-c", code, f"{s3}/run"], check=True, timeout=60)
    assert storage.finished(f"{s3}/run")
    assert storage.listing(f"{s3}/run") == [storage.COMPLETE, "b"]
    assert list(storage.versions(f"{s3}/run")) == [storage.COMPLETE, "b"]


def test_a_large_file_appears_whole_or_not_at_all(s3: str):
    url = f"{s3}/large"
    contents = [np.random.default_rng(k).bytes(PARTS) for k in range(2)]
    done, seen = threading.Event(), []

    def write() -> None:
        for content in contents:
            storage.write_bytes(url, content)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        if storage.exists(url):
            content = storage.read_bytes(url)
            seen.append(next((k for k in range(2) if content == contents[k]), None))
    writer.join()
    assert storage.read_bytes(url) == contents[1]
    assert seen == sorted(seen, key=str), seen
    assert None not in seen
    assert list(storage.versions(s3)) == ["large"]


def test_objects_that_stand_for_folders_are_none_of_ours(moto_server: Server, no_aws, monkeypatch):
    """Consoles make them when somebody clicks on "new folder"."""
    import boto3

    lead(monkeypatch, moto_server.environment())
    moto_server.make_bucket("clicked")
    client = boto3.client("s3")
    for name in ("run/", "run/sub/", "run/a"):
        client.put_object(Bucket="clicked", Key=name, Body=b"")
    assert storage.listing("s3://clicked/run") == ["a", "sub"]
    assert list(storage.versions("s3://clicked/run")) == ["a"]
    storage.remove("s3://clicked/run")
    assert client.list_objects_v2(Bucket="clicked")["KeyCount"] == 0
    storage.write_bytes("s3://clicked/b", b"")
    storage.remove("s3://clicked")
    assert storage.listing("s3://clicked") == []  # the bucket itself stays


def test_ten_threads_read_at_once(s3: str):
    contents = {f"{s3}/{k}": bytes([k]) * 300_000 for k in range(10)}
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(storage.write_bytes, contents, contents.values()))
        assert list(pool.map(storage.read_bytes, contents)) == list(contents.values())
        assert {name: size for name, (size, _) in storage.versions(s3).items()} == {str(k): 300_000 for k in range(10)}


def _tell(url: str, environment: dict[str, str], answers: multiprocessing.Queue[bytes]) -> None:
    os.environ.update(environment)  # a forkserver keeps the one it was started in
    answers.put(storage.read_bytes(url))


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_processes_make_clients_of_their_own(method: str, rclone_server: Server, no_aws, monkeypatch):
    """A client that crossed a fork would wait for ever for a thread that only its parent has."""
    lead(monkeypatch, rclone_server.environment())
    storage.write_bytes("s3://tests/to-processes", b"here")
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    told = ("s3://tests/to-processes", rclone_server.environment(), answers)
    children = [context.Process(target=_tell, args=told, daemon=True) for _ in range(2)]
    for child in children:
        child.start()
    assert [answers.get(timeout=60) for _ in children] == [b"here", b"here"]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert storage.read_bytes("s3://tests/to-processes") == b"here"


# --- stores that break -------------------------------------------------------------------------------


@pytest.fixture
def mortal(tmp_path: Path, no_aws: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that keeps its data on disk and may be killed; s3://tests leads there."""
    with servers.rclone(tmp_path) as server:
        server.make_bucket("tests")
        lead(monkeypatch, server.environment(), patience=30)
        yield server


def outage(server: Server, act: Callable[[], object], gone: float) -> float:
    """Kills the server, acts, starts it again after `gone` seconds -> seconds from there to the end of the act."""
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        acting = pool.submit(act)
        time.sleep(gone)
        assert not acting.done(), acting.result()
        server.start()
        back = time.monotonic()
        acting.result(60)
        return time.monotonic() - back


def test_a_server_that_is_killed_and_started_again(mortal: Server, caplog: pytest.LogCaptureFixture):
    """Every call goes on by itself, and one word is said when the server goes and one when it is back."""
    for call in CALLS:
        storage.write_bytes(f"s3://tests/{call}", b"old")

    def all_at_once() -> list[object]:
        with ThreadPoolExecutor(len(CALLS)) as pool:
            return list(pool.map(lambda call: CALLS[call](f"s3://tests/{call}"), CALLS))

    results: list[object] = []
    assert outage(mortal, lambda: results.extend(all_at_once()), 1.5) < storage.LONGEST_PAUSE + 2
    assert dict(zip(CALLS, results, strict=True)) | {"versions": {}} == {
        "exists": True,
        "listing": [],
        "versions": {},
        "read": b"old",
        "write": None,
        "remove": None,
    }
    assert storage.read_bytes("s3://tests/write") == b"content"
    assert not storage.exists("s3://tests/remove")
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 2, said
    assert "trying again for 30 s" in said[0]
    assert said[1] == "s3://tests answers again"


def test_a_large_write_in_the_middle_of_which_the_server_is_killed(mortal: Server):
    content = np.random.default_rng(0).bytes(12 * storage.PART)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(storage.write_bytes, "s3://tests/file", content)
        time.sleep(0.15)
        assert not writing.done()
        mortal.stop()
        time.sleep(1)
        mortal.start()
        assert not storage.exists("s3://tests/file") or storage.read_bytes("s3://tests/file") == content
        writing.result(60)
    assert storage.read_bytes("s3://tests/file") == content


@pytest.mark.slow
def test_twenty_seconds_without_a_server_at_the_default_patience(mortal: Server, monkeypatch):
    monkeypatch.delenv("TDIFF_STORAGE_PATIENCE")
    storage.write_bytes("s3://tests/file", b"content")
    for call in ("read", "write"):
        assert outage(mortal, lambda call=call: CALLS[call]("s3://tests/file"), 20) < storage.LONGEST_PAUSE + 2


@pytest.mark.slow
@pytest.mark.parametrize("way", ["refuses", "silent"])
def test_a_server_that_is_gone_for_good_at_the_default_patience(way: str, no_aws, monkeypatch):
    with servers.silent_server() as endpoint, ThreadPoolExecutor(2) as pool:
        lead(monkeypatch, servers.lead_to(endpoint if way == "silent" else f"http://127.0.0.1:{servers.free_port()}"))

        def fail(call: str) -> float:
            return seconds(lambda: sentence(lambda: CALLS[call]("s3://tests/file"), "60 s"))

        for spent in pool.map(fail, ("read", "write")):
            assert 59 < spent < 60 + storage.READ_TIMEOUT + storage.CONNECT_TIMEOUT + 3


@pytest.mark.parametrize("way", ["refuses", "silent"])
def test_a_server_that_is_gone_for_good(way: str, no_aws, monkeypatch):
    """Silent: it accepts connections and never answers; a write waits for "100 Continue" then, for ever if let."""
    with servers.silent_server() as silent, ThreadPoolExecutor(len(CALLS)) as pool:
        endpoint = silent if way == "silent" else f"http://127.0.0.1:{servers.free_port()}"
        lead(monkeypatch, servers.lead_to(endpoint), patience=1)
        words = ("s3://tests/file", endpoint, "still after 1 s", "TDIFF_STORAGE_PATIENCE")

        def fail(call: str) -> float:
            return seconds(lambda: sentence(lambda: CALLS[call]("s3://tests/file"), *words))

        spent = dict(zip(CALLS, pool.map(fail, CALLS), strict=True))
    assert all(0.9 < time < 1 + 1 + storage.CONNECT_TIMEOUT for time in spent.values()), spent


def test_a_server_that_stops_reading_in_the_middle_of_a_write(no_aws, monkeypatch):
    monkeypatch.setattr(storage, "SLOWEST", 8 * 1024**2)
    with servers.silent_server() as endpoint:
        lead(monkeypatch, servers.lead_to(endpoint), patience=1)
        assert seconds(lambda: sentence(lambda: storage.write_bytes("s3://tests/file", bytes(PARTS // 2)))) < 10


class Scripted(BaseHTTPRequestHandler):
    """Answers GETs with what `script` says, one after the other (the last one again and again), and counts them."""

    protocol_version = "HTTP/1.1"
    script: ClassVar[list[bytes]] = []
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        script = type(self).script
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Range')}")
        reply = script.pop(0) if len(script) > 1 else script[0]
        head, end, _ = reply.partition(b"\r\n\r\n")
        self.wfile.write(reply if self.command == "GET" else head + end)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def answer(status: str, body: bytes = b"", length: int | None = None, chunked: bool = False) -> bytes:
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body) if length is None else length}"
    return f"HTTP/1.1 {status}\r\n{framing}\r\nConnection: close\r\n\r\n".encode() + body


def refusal(status: str, code: str) -> bytes:
    return answer(status, f"<Error><Code>{code}</Code><Message>Because.</Message></Error>".encode())


WHOLE = answer("200 OK", b"content")


@pytest.fixture
def scripted(no_aws: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Scripted]]:
    handler = type("Handler", (Scripted,), {"script": [], "asked": []})
    with servers.http_server(handler) as endpoint:
        lead(monkeypatch, servers.lead_to(endpoint), patience=20)
        yield handler


PASSING = {
    "cut off": answer("200 OK", b"con", length=7),
    "cut off in a chunk": answer("200 OK", b"7\r\ncon", chunked=True),
    "no answer": b"",
    "half a header": b"HTTP/1.1 200 OK\r\nContent-Le",
    "not HTTP": b"\x16\x03\x01 hello",
    "500": refusal("500 Internal Server Error", "InternalError"),
    "502, no XML": answer("502 Bad Gateway", b"<html>nginx</html>"),
    "503": refusal("503 Slow Down", "SlowDown"),
    "503, no body": answer("503 Service Unavailable"),
    "429": refusal("429 Too Many Requests", "TooManyRequests"),
    "400 RequestTimeout": refusal("400 Bad Request", "RequestTimeout"),
}


@pytest.mark.parametrize("name", PASSING)
def test_answers_that_pass_are_asked_for_again(name: str, scripted: type[Scripted]):
    scripted.script = [PASSING[name], PASSING[name], WHOLE]
    assert storage.read_bytes("s3://tests/file") == b"content"
    assert scripted.asked == ["GET /tests/file None"] * 3


@pytest.mark.parametrize("name", ["cut off", "not HTTP", "500", "503, no body"])
def test_answers_that_pass_but_do_not(name: str, scripted: type[Scripted], monkeypatch):
    monkeypatch.setenv("TDIFF_STORAGE_PATIENCE", "2")
    scripted.script = [PASSING[name]]
    assert seconds(lambda: sentence(lambda: storage.read_bytes("s3://tests/file"), "still after 2 s")) < 7
    assert len(scripted.asked) > 1


def test_a_page_of_another_server_is_no_listing(scripted: type[Scripted], monkeypatch):
    monkeypatch.setenv("TDIFF_STORAGE_PATIENCE", "2")
    scripted.script = [answer("200 OK", b"<html><body>Sign in to the network<br></body>")]
    sentence(lambda: storage.versions("s3://tests/folder"), "s3://tests/folder cannot be listed", "still after 2 s")
    assert len(scripted.asked) > 1


def test_a_listing_without_its_next_page_is_no_listing(scripted: type[Scripted]):
    scripted.script = [answer("200 OK", b"<R><IsTruncated>true</IsTruncated></R>")]
    sentence(lambda: storage.versions("s3://tests/folder"), "its answer lacks 'NextContinuationToken'")


@pytest.mark.parametrize("name", ["cut off", "500", "503", "503, no body"])
def test_without_patience_one_request_is_made(name: str, scripted: type[Scripted], monkeypatch):
    """The clients below have retries of their own, which would multiply with ours."""
    monkeypatch.setenv("TDIFF_STORAGE_PATIENCE", "0")
    scripted.script = [PASSING[name], WHOLE]
    sentence(lambda: storage.read_bytes("s3://tests/file"), "still after 0 s")
    assert len(scripted.asked) == 1
    assert storage.read_bytes("s3://tests/file") == b"content"


class Forgetful(BaseHTTPRequestHandler):
    """Takes large writes, but was started again in the midst of the first, and knows nothing of it."""

    protocol_version = "HTTP/1.1"
    uploads: ClassVar[list[str]] = []
    finished: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if "uploadId=upload-1" in self.path:
            self.wfile.write(refusal("404 Not Found", "NoSuchUpload"))
        else:
            self.wfile.write(b'HTTP/1.1 200 OK\r\nETag: "part"\r\nContent-Length: 0\r\n\r\n')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "?uploads" in self.path:
            self.uploads.append(f"upload-{len(self.uploads) + 1}")
            inside = f"<UploadId>{self.uploads[-1]}</UploadId>"
            self.wfile.write(answer("200 OK", f"<R>{inside}</R>".encode()))
        else:
            self.finished.append(self.path.partition("uploadId=")[2])
            self.wfile.write(answer("200 OK", b'<R><ETag>"whole"</ETag></R>'))

    def do_DELETE(self) -> None:
        self.wfile.write(refusal("404 Not Found", "NoSuchUpload"))

    def log_message(self, *_: object) -> None:
        pass


def test_a_large_write_begins_again_where_the_store_forgot_it(no_aws, monkeypatch):
    with servers.http_server(Forgetful) as endpoint:
        lead(monkeypatch, servers.lead_to(endpoint), patience=20)
        storage.write_bytes("s3://tests/file", bytes(PARTS))
    assert Forgetful.uploads == ["upload-1", "upload-2"]
    assert Forgetful.finished == ["upload-2"]


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (refusal("403 Forbidden", "AccessDenied"), "AWS_ACCESS_KEY_ID"),
        (refusal("403 Forbidden", "SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY"),
        (refusal("400 Bad Request", "ExpiredToken"), "AWS_SESSION_TOKEN"),
        (refusal("401 Unauthorized", "Unauthorized"), "AWS_PROFILE"),
        (refusal("404 Not Found", "NoSuchBucket"), "there is no bucket tests"),
        (refusal("400 Bad Request", "InvalidRequest"), "InvalidRequest: Because"),
        (refusal("501 Not Implemented", "NotImplemented"), "NotImplemented"),
    ],
)
def test_answers_that_do_not_pass_are_believed(reply: bytes, words: str, scripted: type[Scripted]):
    scripted.script = [reply]
    sentence(lambda: storage.read_bytes("s3://tests/file"), "s3://tests/file cannot be read", words)
    assert len(scripted.asked) == 1


def test_a_missing_object_is_asked_for_once(scripted: type[Scripted]):
    scripted.script = [refusal("404 Not Found", "NoSuchKey")]
    with pytest.raises(FileNotFoundError, match="s3://tests/file"):
        storage.read_bytes("s3://tests/file")
    assert len(scripted.asked) == 1


def test_a_whole_object_is_one_request_however_large(scripted: type[Scripted]):
    content = bytes(60 * 1024**2)
    scripted.script = [answer("200 OK", content)]
    assert storage.read_bytes("s3://tests/file") == content
    assert scripted.asked == ["GET /tests/file None"]


# --- data sets ---------------------------------------------------------------------------------------


@pytest.fixture
def packed(s3: str) -> str:
    pack(digits(), f"{s3}/digits", 400)
    return f"{s3}/digits"


def test_a_data_set_in_a_bucket_is_the_same_as_its_source(packed: str, tmp_path: Path):
    manifest = read_manifest(packed)
    for split, source in digits().splits.items():
        assert isinstance(source, Split)
        images = read_split(packed, manifest, split)
        np.testing.assert_array_equal(images.images, source.images)
        np.testing.assert_array_equal(images.labels, source.labels)
    assert manifest == pack(digits(), str(tmp_path), 400)
    assert set(storage.versions(packed)) == {"manifest.json"} | {
        shard.name for shards in manifest.splits.values() for shard in shards
    }


def test_shards_that_are_missing_or_swapped_are_named(packed: str):
    manifest = read_manifest(packed)
    first, second, third = (f"{packed}/{shard.name}" for shard in manifest.splits["train"][:3])
    contents = storage.read_bytes(first), storage.read_bytes(second)
    storage.write_bytes(first, contents[1])
    storage.write_bytes(second, contents[0])
    with pytest.raises(DataError, match=r"shard train/shard-00000[01]\.tar is damaged"):
        read_split(packed, manifest, "train")
    storage.write_bytes(first, contents[0])
    storage.write_bytes(second, contents[1])
    assert len(read_split(packed, manifest, "train")) == 1500
    storage.remove(third)
    with pytest.raises(DataError, match=r"shard train/shard-000002\.tar is missing"):
        read_split(packed, manifest, "train")


def test_a_data_set_that_may_not_be_read(rclone_server: Server, no_aws, monkeypatch):
    lead(monkeypatch, rclone_server.environment())
    pack(digits(), "s3://tests/secret", 1000)
    manifest = read_manifest("s3://tests/secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other-secret")
    sentence(lambda: read_manifest("s3://tests/secret"), "manifest.json", "AWS_SECRET_ACCESS_KEY")
    sentence(lambda: read_split("s3://tests/secret", manifest, "train"), "s3://tests/secret", "AWS_SECRET_ACCESS_KEY")


def test_a_reader_outlives_an_outage(mortal: Server):
    pack(digits(), "s3://tests/digits", 200)
    manifest = read_manifest("s3://tests/digits")
    outage(mortal, lambda: read_split("s3://tests/digits", manifest, "train"), 1.5)


@pytest.mark.slow
def test_a_run_on_data_in_a_bucket(moto_server: Server, no_aws, monkeypatch, tmp_path: Path):
    lead(monkeypatch, moto_server.environment())
    pack(digits(), "s3://tests/for-a-run", 400)
    tiny = [
        "name=tiny",
        "data.url=s3://tests/for-a-run",
        "tree.features=3",
        "tree.max_leaves=2",
        "tree.epochs.initial=1",
        "tree.epochs.final=1",
    ]
    line = [sys.executable, "-m", "tdiff.train", *tiny, "--until", "tree"]
    done = subprocess.run(line, cwd=tmp_path, text=True, capture_output=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert list((tmp_path / "runs" / "tiny" / "tree").glob("*/COMPLETE"))
