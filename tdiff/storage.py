"""Local folders and s3:// as one. The only module that knows the difference.

A file is written whole or not at all, and a folder counts as finished when its COMPLETE marker,
written last, is there.

S3 takes the ordinary variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE;
AWS_REGION; and AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL for a store that is not Amazon's. Where a store does not
answer, or says that it cannot just now, every function here tries again for PATIENCE seconds (the variable
TDIFF_STORAGE_PATIENCE sets another time; one more READ_TIMEOUT may pass until the last try is given up, longer where
the connection broke down in the middle of a large write). What then still fails, or cannot be mended by waiting
(credentials, a bucket that does not exist), is a StorageError, and so is a full local disk; a file that does not exist
is a FileNotFoundError, here as in local folders.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import os
import posixpath
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential
from torch import Tensor, nn

from tdiff.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:  # importing it takes half a second, which local runs need not wait
    from s3fs import S3FileSystem

log = logging.getLogger(__name__)

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

COMPLETE = "COMPLETE"

PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial$")
"""The end of a local file's name while it is written; one that lies about was left by a writer that was killed."""

PATIENCE = 60.0
"""Seconds for which a store that does not answer is tried again, unless TDIFF_STORAGE_PATIENCE says otherwise."""

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 20.0
"""Seconds without a byte after which a connection counts as dead; never longer than the patience."""

SLOWEST = 512 * 1024
"""Bytes per second that a connection must take of what is written, beyond the READ_TIMEOUT."""

PART = 8 * 1024**2
"""Bytes of a part of a large write; what is smaller than two goes by one request."""

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What file systems answer that know no locks."""

LONGEST_PAUSE = 5.0
"""Seconds between two tries, at most: how late a store that is back may be noticed."""


class StorageError(Problem, OSError):
    """Storage that cannot be used, a store or a full disk: url, reason, remedy."""


def join(url: str, *parts: str) -> str:
    """`url/part/…`, for local paths and s3:// alike."""
    return posixpath.join(url, *parts)


def is_local(url: str) -> bool:
    return "://" not in url


def absolute(url: str) -> str:
    """Local paths made absolute, so that every process means the same folder; URLs as they are."""
    url = url.removeprefix("file://")
    # Not by pathlib, which would swallow one slash of s3://.
    return os.path.abspath(os.path.expanduser(url)) if is_local(url) else url  # noqa: PTH100, PTH111


def exists(url: str) -> bool:
    """Whether there is such a file or folder. Raises StorageError."""
    if (path := _local(url)) is not None:
        return path.exists()
    try:
        _on_s3(url, "looked up", lambda fs, path: fs.info(path))
    except FileNotFoundError:
        return False
    return True


def read_bytes(url: str) -> bytes:
    """A file, by one request. Raises FileNotFoundError if there is no such file, StorageError."""
    if (path := _local(url)) is not None:
        return path.read_bytes()
    return _on_s3(url, "read", lambda fs, path: bytes(fs.cat_file(path)))


def read_text(url: str) -> str:
    return read_bytes(url).decode()


def read_json(url: str) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError if there is none, DataError if it is damaged, StorageError."""
    content = read_bytes(url)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is damaged: it is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{url} is damaged: it holds no JSON object")
    return value


def read_as(url: str, parse: Callable[[str], T]) -> T:
    """What `parse` makes of a text. Raises FileNotFoundError, DataError if it is damaged, StorageError."""
    content = read_bytes(url)
    try:
        return parse(content.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url} is damaged: {error}") from error


def read_module(url: str, build: Callable[[], M]) -> M:
    """The module that `build` makes, with the tensors of a safetensors file.

    Raises DataError if it is missing or damaged or holds another module's, however large `build` would be: its shapes
    are compared before it takes memory. Raises StorageError.
    """
    tensors = read_tensors(url)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if found != shapes:
        name = next(name for name in [*shapes, *found] if shapes.get(name) != found.get(name))
        has, needs = (None if s is None else list(s) for s in (found.get(name), shapes.get(name)))
        raise DataError(f"{url} is damaged: {name} is {has or 'missing'}, but should be {needs or 'missing'}")
    module = build()
    module.load_state_dict(tensors)
    return module


def read_tensors(url: str) -> dict[str, Tensor]:
    """A safetensors file. Raises DataError if it is missing or damaged, StorageError."""
    try:
        return as_tensors(url, read_bytes(url))
    except FileNotFoundError as error:
        raise DataError(f"{url} is missing") from error


def as_tensors(url: str, content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file that was read from there. Raises DataError if it is damaged."""
    try:
        return load(content)
    except SafetensorError as error:
        raise DataError(f"{url} is damaged: {error}") from error


def write_bytes(url: str, data: bytes) -> None:
    """Writes a file whole or not at all: a reader sees the old bytes or the new ones, never a part.

    On S3 an object appears when its last part has arrived (parts of an upload that was killed stay unseen until the
    bucket's rules expire them); locally a temporary file is flushed to disk and renamed. Raises OSError, StorageError.
    """
    if (path := _local(url)) is None:
        parts = memoryview(data).nbytes >= 2 * PART
        _on_s3(url, "written", lambda fs, path: fs.pipe_file(path, data, chunksize=PART), parts)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut could forget the new name, but not one that was given later
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StorageError(
            f"{url} cannot be written: {error.strerror}; make room there, and the same command goes on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(url: str, text: str) -> None:
    write_bytes(url, text.encode())


def listing(url: str) -> list[str]:
    """Names in a folder, sorted; empty if there is no such folder. Raises StorageError."""
    if (path := _local(url)) is not None:
        return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []

    def names(fs: S3FileSystem, path: str) -> set[str]:
        path = path.rstrip("/")
        # Asked first, for s3fs answers `ls` of a folder that does not exist by listing all that is beside it.
        if fs.info(path)["type"] != "directory":
            return set()
        found = (name.rstrip("/") for name in fs.ls(path, detail=False))
        return {posixpath.basename(name) for name in found if name != path}

    try:
        return sorted(_on_s3(url, "listed", names))
    except FileNotFoundError:
        return []


def versions(url: str) -> dict[str, tuple[int, str]]:
    """Every file below a folder, at any depth: path from there -> (bytes, a text that changes when the file does).

    Hidden files too, and what links point to; sorted by path, empty if there is no such folder. Raises OSError,
    StorageError.
    """
    if (path := _local(url)) is not None:
        return dict(sorted(_local_versions(path)))

    def found(fs: S3FileSystem, path: str) -> dict[str, tuple[int, str]]:
        path = path.rstrip("/")
        objects: dict[str, dict[str, Any]] = fs.find(path, detail=True)
        return {
            name[len(path) + 1 :]: (int(entry["size"]), str(entry.get("ETag") or entry["LastModified"]).strip('"'))
            for name, entry in sorted(objects.items())
            if name != path and not name.endswith("/")  # consoles make objects named as folders
        }

    return _on_s3(url, "listed", found)


def remove(url: str) -> None:
    """Removes a file or a folder with all it holds; nothing happens if it is not there.

    Raises OSError, StorageError.
    """
    if (path := _local(url)) is not None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return

    def names(fs: S3FileSystem, path: str) -> list[str]:
        path = path.rstrip("/")
        own = [path] if fs.info(path)["type"] == "file" else []
        return own + [name for name in fs.find(path) if name != path]

    try:
        found = _on_s3(url, "listed", names)
    except FileNotFoundError:
        return
    with ThreadPoolExecutor(8) as pool:
        # One request each: of those that take many names s3fs ignores the errors, and some stores know none.
        jobs = [pool.submit(_on_s3, f"s3://{name}", "removed", lambda fs, path: fs.rm_file(path)) for name in found]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)


def copy(source: str, destination: str) -> None:
    """Copies a folder that is complete, its marker last. Raises OSError, StorageError."""
    for name in versions(source):
        if name != COMPLETE:
            write_bytes(join(destination, name), read_bytes(join(source, name)))
    finish(destination)


def finish(url: str) -> None:
    """Marks a folder as complete."""
    write_text(join(url, COMPLETE), "")


def finished(url: str) -> bool:
    """Whether a folder was marked as complete."""
    return exists(join(url, COMPLETE))


@contextmanager
def locked(url: str, held: Callable[[], None]) -> Iterator[None]:
    """Keeps other processes that ask for it out of a local folder, which is made if it is missing.

    held: called if another process has it, before this one waits for it; what it raises is raised instead. In object
    storage nobody is kept out: ask for it only where two at once write the same bytes.
    """
    if not is_local(url):
        yield
        return
    Path(url).mkdir(parents=True, exist_ok=True)
    folder = os.open(url, os.O_RDONLY)  # the folder itself is locked: no lock stays in it
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held()
            fcntl.flock(folder, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning("%s lies on a file system without locks: let no two processes work there at once", url)
        yield
    finally:
        os.close(folder)


# --- local folders -----------------------------------------------------------------------------------


def _local(url: str) -> Path | None:
    """The path that a URL names; None for s3://. Raises ConfigError if it is neither."""
    url = absolute(url)
    if is_local(url):
        return Path(url)
    if not re.match(r"s3://[^/]", url):
        raise ConfigError(f"{url} cannot be used: give a local folder or s3://BUCKET/FOLDER")
    return None


def _local_versions(folder: Path) -> Iterator[tuple[str, tuple[int, str]]]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a folder that went while its parent was listed
            raise error

    seen = set()
    if not folder.is_dir():
        return
    for place, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        there = os.stat(place)  # noqa: PTH116
        if (there.st_dev, there.st_ino) in seen:  # a link to a folder above it
            subfolders.clear()
            continue
        seen.add((there.st_dev, there.st_ino))
        for name in names:
            file = Path(place, name)
            try:
                entry = file.stat()
            except FileNotFoundError:
                if file.is_symlink():
                    raise
                continue  # it went while the folder was listed, as what is written under another name first does
            yield file.relative_to(folder).as_posix(), (entry.st_size, f"{entry.st_mtime_ns}-{entry.st_ino}")


# --- S3 ----------------------------------------------------------------------------------------------


def patience() -> float:
    """Seconds for which a store that does not answer is tried again. Raises ConfigError."""
    text = os.environ.get("TDIFF_STORAGE_PATIENCE", "")
    try:
        seconds = float(text or PATIENCE)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise ConfigError(f"TDIFF_STORAGE_PATIENCE={text} is no time to wait: give seconds, such as {PATIENCE:g}")
    return seconds


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _store() -> str:
    return _endpoint() or "Amazon S3"


def _on_s3(url: str, verb: str, operation: Callable[[S3FileSystem, str], T], parts: bool = False) -> T:
    """operation(file system, path), tried again while waiting may help.

    verb: what the file was to be; parts: by many requests, and big ones.

    Raises FileNotFoundError, or StorageError for whatever else a store or its client may answer.
    """
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    if _endpoint():
        # Newer clients send and want checksums that other stores than Amazon's do not know.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    seconds = patience()
    read_timeout = min(READ_TIMEOUT, max(1.0, seconds))
    bucket, _, key = url.removeprefix("s3://").partition("/")
    backoff = wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE, min=0.1)
    tries = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=lambda state: min(backoff(state), max(0.0, seconds - (state.seconds_since_start or 0.0))),
        stop=stop_after_delay(seconds),
        before_sleep=lambda state: _OUTAGES.begin(bucket, url, verb, state, seconds),
        reraise=True,
    )

    def attempt() -> T:
        settings = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        return operation(_file_system(os.getpid(), settings, read_timeout, parts), f"{bucket}/{key}")

    try:
        result = tries(attempt)
    except (BotoCoreError, ClientError, ResponseParserError, aiohttp.ClientError) as error:
        failed: Exception = error
    except (OSError, ValueError, EOFError, KeyError) as error:  # KeyError: s3fs, of an answer that lacks something
        failed = error
    else:
        _OUTAGES.end(bucket)
        return result
    if not _may_pass(failed):
        _OUTAGES.end(bucket)
    if isinstance(failed, FileNotFoundError):
        if key and _answer(failed)[0] != "NoSuchBucket":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from failed
        reason = f"there is no bucket {bucket} at {_store()}; make it, or correct the URL or AWS_ENDPOINT_URL_S3"
    else:
        reason = _why(failed, bucket, seconds)
    raise StorageError(f"{url} cannot be {verb}: {reason}") from failed


@lru_cache(maxsize=1)
def _bounded_session() -> Any:
    """aiobotocore's HTTP session, which has no time limit of its own for what it writes.

    Before a body it waits for "100 Continue" for ever, and in the midst of one for a server that stopped reading.
    """
    from aiobotocore.httpsession import AIOHTTPSession
    from botocore.exceptions import ReadTimeoutError

    class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
        async def send(self, request: Any) -> Any:
            seconds = self._timeout.sock_connect + self._timeout.sock_read
            try:
                async with asyncio.timeout(seconds + int(request.headers.get("Content-Length", 0)) / SLOWEST):
                    return await super().send(request)
            except TimeoutError as error:
                raise ReadTimeoutError(endpoint_url=request.url, error=error) from error

    return BoundedSession


@lru_cache(maxsize=8)
def _file_system(pid: int, settings: tuple[tuple[str, str], ...], read_timeout: float, parts: bool) -> S3FileSystem:
    """A client of this process (`pid`: one made before a fork would hang) and these AWS_… variables.

    It tries once, or twice each part of a large write; the rest is up to `_on_s3`, for tries inside tries multiply.
    """
    from s3fs import S3FileSystem

    fs = S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,  # else what others write stays unseen
        # Reading by one stream is reading by one request: one whole version of the object.
        max_concurrency=2 if parts else 1,
        config_kwargs={
            "connect_timeout": min(CONNECT_TIMEOUT, read_timeout),
            "read_timeout": read_timeout,
            "retries": {"total_max_attempts": 2 if parts else 1, "mode": "standard"},
            "max_pool_connections": 32,
            "http_session_cls": _bounded_session(),
        },
    )
    fs.retries = 1
    return fs


def _answer(error: BaseException | None) -> tuple[str, int]:
    """The code and HTTP status of S3's answer behind an error; ("", 0) if there was none."""
    from botocore.exceptions import ClientError

    while error is not None:
        if isinstance(error, ClientError):
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(error.response.get("Error", {}).get("Code", "")), int(status)
        error = error.__cause__
    return "", 0


PASSING = re.compile(
    r"SlowDown|Throttl|TooManyRequests|RequestLimit|RequestTimeout$|InternalError|ServiceUnavailable|OperationAborted"
    r"|IncompleteBody|BadDigest|ContentSHA256Mismatch"  # damaged on the way
    r"|NoSuchUpload|InvalidPart$"  # of a store that was started again in the middle of a large write
)
NO_ACCESS = re.compile(r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|Token|TooSkewed|Forbidden|Unauthorized")
"""Of the codes that S3 answers with: those that pass, and those that do not before somebody gives other credentials."""


def _may_pass(error: BaseException) -> bool:
    """Whether waiting may help: no answer, half an answer, or one that says so."""
    import aiohttp
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from s3fs.utils import FileExpired

    if isinstance(error, boto.SSLError | aiohttp.ClientSSLError):
        return False
    code, status = _answer(error)
    if code or status:
        return bool(PASSING.search(code)) or status in (408, 429) or 500 <= status != 501
    no_answer = (boto.ConnectionError, boto.HTTPClientError, aiohttp.ClientError, ConnectionError, TimeoutError)
    half_an_answer = (boto.IncompleteReadError, ResponseParserError, EOFError, FileExpired)
    return isinstance(error, no_answer + half_an_answer)


def _why(error: Exception, bucket: str, patience: float) -> str:
    """Reason and remedy, without the URL."""
    from botocore import exceptions as boto

    code, status = _answer(error)
    store = _store()
    reason = _reason(error)
    variables = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and AWS_PROFILE"
    if _may_pass(error):
        return (
            f"{reason}, still after {patience:g} s of trying; check that {store} is up, and run the same command "
            "again (TDIFF_STORAGE_PATIENCE: how many seconds to try)"
        )
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return f"no complete credentials were found ({reason}); set {variables}"
    if isinstance(error, boto.ProfileNotFound | boto.TokenRetrievalError | boto.UnauthorizedSSOTokenError):
        return f"its credentials cannot be had ({reason}); check {variables}"
    if status in (401, 403) or NO_ACCESS.search(code):
        return f"{store} refuses access ({reason}); check {variables}, and what they may do in bucket {bucket}"
    return f"{reason}; check the URL, AWS_REGION and AWS_ENDPOINT_URL_S3"


def _reason(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    code, _ = _answer(error)
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, KeyError):
        text = f"its answer lacks {text}"
    text = " ".join(text.split()).rstrip(". ") or type(error).__name__
    return (text if not code or code in text or code.isdigit() else f"{code}: {text}")[:200]


class _Outages:
    """Says once when a bucket stops answering, however many threads ask it, and once when it is back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._buckets: set[str] = set()

    def begin(self, bucket: str, url: str, verb: str, state: RetryCallState, patience: float) -> None:
        with self._lock:
            if bucket in self._buckets:
                return
            self._buckets.add(bucket)
        error = state.outcome.exception() if state.outcome else None
        reason = _reason(error) if isinstance(error, Exception) else "no answer"
        log.warning("%s could not be %s (%s): trying again for %g s", url, verb, reason, patience)

    def end(self, bucket: str) -> None:
        with self._lock:
            if bucket not in self._buckets:
                return
            self._buckets.discard(bucket)
        log.warning("s3://%s answers again", bucket)


_OUTAGES = _Outages()
