"""Inputs on other machines: bytes behind ``http://``, ``https://`` and ``s3://`` addresses.

Addresses in manifests are anyone's words. Only these three kinds are asked, redirects lead only to the first two, and a host that
resolves to a private, local or reserved address is not connected to unless ``fetch.private_hosts`` names it: otherwise a manifest
could make this machine ask its neighbours. Objects in S3 are read with the job's own credentials: what these may read, a manifest
may name. Answers are taken as they are, never unpacked, and no longer than ``fetch.max_file_mb``.
"""

import contextlib
import dataclasses
import functools
import io
import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, LocationParseError, LocationValueError

from dataprep.filters import Rejected
from model.data import transfer
from model.data.transfer import MissingError, PassingError
from model.errors import UserError

SCHEMES = ("http", "https", "s3")
FAILED = "fetch failed"  # may pass, or is for the operator to put right: the next run tries again
REFUSED = "fetch refused"  # the server says no, or we do
REDIRECTS = 5
PUBLIC_KINDS = "http://, https:// or s3://"
BLOCK = 1 << 16  # bytes asked for at once where single headers are read

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """How inputs are fetched from other machines."""

    max_file_mb: int = 4096  # longer ones are refused
    attempts: int = 3  # behind what may pass: no answer, an answer of 5xx
    private_hosts: tuple[str, ...] = ()  # names or names:port that may be asked although their addresses are private

    def __post_init__(self) -> None:
        if self.max_file_mb < 1 or self.attempts < 1:
            raise ValueError("max_file_mb and attempts must be at least 1")


DEFAULTS = FetchConfig()


@dataclasses.dataclass(frozen=True)
class Found:
    """What an address leads to."""

    size: int  # bytes
    version: str  # ETag, or date of change, and size: another one means other contents


@dataclasses.dataclass(frozen=True)
class _Answer:
    """To a request for some bytes of an object."""

    length: int | None  # of what comes
    size: int | None  # of the whole object
    version: str
    is_part: bool
    chunks: Iterable[bytes]


def is_remote(path: str) -> bool:
    """Whether ``path`` is an address, of a kind that can be asked or not."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def name_of(address: str) -> str:
    """What stands behind the host or bucket, for a suffix or a key; of HTTP addresses unquoted and without the query."""
    parts = urlsplit(address)
    return address.split("://", 1)[1].partition("/")[2] if parts.scheme == "s3" else unquote(parts.path).lstrip("/")


def shown(address: str) -> str:
    """``address`` for people and tables, without what may be a secret: user and password, and the query."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")) if parts.scheme != "s3" else address


def hosts(addresses: Iterable[str]) -> tuple[str, ...]:
    """The hosts of those that are HTTP addresses, as ``private_hosts`` has them."""
    parts = [urlsplit(address) for address in addresses if address.startswith(("http://", "https://"))]
    return tuple(f"{part.hostname}:{part.port or {'http': 80, 'https': 443}[part.scheme]}" for part in parts)


def beside(address: str, name: str) -> str:
    """``name`` if it is an address itself, else relative to the folder of the object at ``address``: same host, same bucket."""
    if is_remote(name):
        return name
    if urlsplit(address).scheme != "s3":
        return urljoin(address, quote(re.sub("^/+", "/", name)))
    bucket, _, key = address.removeprefix("s3://").partition("/")
    parts: list[str] = [] if name.startswith("/") else key.split("/")[:-1]
    for part in name.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return f"s3://{bucket}/{'/'.join(parts)}"


def look(address: str, config: FetchConfig) -> Found:
    """Ask for the first byte only.

    Raises:
        Rejected: it cannot be had.
    """

    def ask() -> Found:
        with _ask(address, config, 0, 1) as answer:
            if answer.size is None:
                raise Rejected(REFUSED, f"{shown(address)}: the server does not say how long it is")
            return Found(answer.size, answer.version)

    return _persist(ask, address, config)


def fetch(address: str, config: FetchConfig, offset: int = 0, size: int = -1, version: str = "") -> BinaryIO:
    """Bytes behind an address, in a nameless temporary file.

    Args:
        offset: of the first byte.
        size: number of bytes; -1: all that follow.
        version: what the object must still be; empty: any.

    Raises:
        Rejected: it cannot be had, is too long, or has changed.
    """
    most, too_much = config.max_file_mb << 20, f"more than fetch.max_file_mb={config.max_file_mb}"
    if size > most:
        raise Rejected(REFUSED, f"{shown(address)}: {size} bytes, {too_much}")
    file = tempfile.TemporaryFile()  # noqa: SIM115  the caller's to close

    def download() -> None:
        file.seek(0)
        file.truncate()
        if size == 0:
            return
        with _ask(address, config, offset, size) as answer:
            if version and answer.version and answer.version != version:
                raise Rejected(FAILED, f"{shown(address)}: changed since it was listed")
            if (offset or size >= 0) and not answer.is_part and answer.size != size:
                raise Rejected(REFUSED, f"{shown(address)}: the server answers no ranges, so members of a tar cannot be read")
            if answer.length is not None and answer.length > most:
                raise Rejected(REFUSED, f"{shown(address)}: {answer.length} bytes, {too_much}")
            received = transfer.receive(_at_most(answer.chunks, most, address, config), file)
            expected = answer.length if size < 0 else size
            if expected is not None and received != expected:
                raise PassingError(f"{received} bytes came of {expected}")

    try:
        _persist(download, address, config)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def list_s3(address: str) -> Iterator[tuple[str, Found]]:
    """(name relative to the folder at ``address``, what it is) of all objects in it, in the order of their names' bytes.

    Raises:
        UserError: the bucket cannot be listed.
    """
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    prefix = prefix.rstrip("/") + "/" if prefix.strip("/") else ""
    token: dict[str, str] = {}
    while True:

        def page(token: dict[str, str] = token) -> dict[str, Any]:
            with _s3().told(address):
                return _s3().client.list_objects_v2(Bucket=bucket, Prefix=prefix, **token)

        found = transfer.persist(page, _s3().where(address))
        for entry in found.get("Contents", []):
            size = entry["Size"]
            yield entry["Key"].removeprefix(prefix), Found(size, _version(entry.get("ETag"), size))
        if not found.get("IsTruncated"):
            return
        token = {"ContinuationToken": str(found["NextContinuationToken"])}


class SizedFile(io.RawIOBase):
    """Something of known ``size`` that is read at a ``position``; ``readinto`` is left to those who know where the bytes are."""

    def __init__(self, size: int) -> None:
        self.size, self.position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position


class RemoteFile(SizedFile):
    """An object as a file, of which only the blocks that are read are fetched; for headers, not for contents."""

    def __init__(self, address: str, config: FetchConfig, found: Found) -> None:
        super().__init__(found.size)
        self._address, self._config, self._version = address, config, found.version
        self._begin, self._block = 0, b""

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.position >= self.size:
            return 0
        if not self._begin <= self.position < self._begin + len(self._block):
            length = min(BLOCK, self.size - self.position)
            try:
                with fetch(self._address, self._config, self.position, length, self._version) as file:
                    self._begin, self._block = self.position, file.read()
            except OSError as error:  # of this machine's disk, not the tar's fault
                raise Rejected(FAILED, f"{shown(self._address)}: {transfer.one_line(error)}") from error
        data = self._block[self.position - self._begin :][: len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def _persist(action: Callable[[], Result], address: str, config: FetchConfig) -> Result:
    try:
        return transfer.persist(action, shown(address), config.attempts)
    except MissingError as error:
        raise Rejected(REFUSED, str(error)) from error
    except UserError as error:
        raise Rejected(FAILED, str(error)) from error


def _at_most(chunks: Iterable[bytes], most: int, address: str, config: FetchConfig) -> Iterator[bytes]:
    received = 0
    for chunk in chunks:
        received += len(chunk)
        if received > most:
            raise Rejected(REFUSED, f"{shown(address)}: more than fetch.max_file_mb={config.max_file_mb}")
        yield chunk


@contextlib.contextmanager
def _ask(address: str, config: FetchConfig, offset: int, size: int) -> Iterator[_Answer]:
    """Ask for some bytes (``size`` -1: all from ``offset`` on)."""
    if not address.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise Rejected(REFUSED, f"{shown(address)}: only {PUBLIC_KINDS} can be asked")
    wanted = f"bytes={offset}-{offset + size - 1 if size >= 0 else ''}" if offset or size >= 0 else None
    with _ask_s3(address, wanted) if address.startswith("s3://") else _ask_http(address, wanted, config) as answer:
        yield answer


@contextlib.contextmanager
def _ask_s3(address: str, wanted: str | None) -> Iterator[_Answer]:
    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket or not key:
        raise Rejected(REFUSED, f"{address}: names no object")
    with _s3().told(address):
        answer = _s3().client.get_object(Bucket=bucket, Key=key, **({"Range": wanted} if wanted else {}))
        with contextlib.closing(answer["Body"]) as body:
            part = answer.get("ContentRange")
            length = answer["ContentLength"]
            size = int(part.rpartition("/")[2]) if part else length
            yield _Answer(length, size, _version(answer.get("ETag"), size), part is not None, body.iter_chunks(transfer.CHUNK))


@contextlib.contextmanager
def _ask_http(address: str, wanted: str | None, config: FetchConfig) -> Iterator[_Answer]:
    headers = {"User-Agent": "snapvideo-dataprep", "Accept-Encoding": "identity"} | ({"Range": wanted} if wanted else {})
    url = address
    for _ in range(REDIRECTS + 1):
        if not url.startswith(("http://", "https://")):
            raise Rejected(REFUSED, f"{shown(address)}: redirected to {shown(url)}")
        try:
            response = _http(config.private_hosts, os.getpid()).request(
                "GET", url, headers=headers, redirect=False, retries=False, preload_content=False, decode_content=False
            )
        except (LocationParseError, LocationValueError, UnicodeError) as error:
            raise Rejected(REFUSED, f"{shown(address)}: no address: {transfer.one_line(error)}") from error
        except (HTTPError, OSError) as error:
            raise PassingError(transfer.one_line(error)) from error
        with contextlib.closing(response):
            if response.status in (301, 302, 303, 307, 308) and response.headers.get("Location"):
                with contextlib.suppress(ValueError):  # an address that is none
                    url = urljoin(url, response.headers["Location"])
                    continue
                raise Rejected(REFUSED, f"{shown(address)}: redirected to no address")
            try:
                yield _http_answer(address, response, wanted or "bytes=0-")
            except (HTTPError, ConnectionError, TimeoutError) as error:  # not those of the disk
                raise PassingError(transfer.one_line(error)) from error
            return
    raise Rejected(REFUSED, f"{shown(address)}: redirected more than {REDIRECTS} times")


def _http_answer(address: str, response: urllib3.BaseHTTPResponse, wanted: str) -> _Answer:
    status, headers = response.status, response.headers
    if status >= 500 or status in transfer.PASSING_STATUS:
        raise PassingError(f"HTTP {status}")
    part = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", "")) if status == 206 else None
    if status == 416 and headers.get("Content-Range") == "bytes */0":
        return _Answer(0, 0, _version(headers.get("ETag") or headers.get("Last-Modified"), 0), True, [])
    if status != 200 and not (part and wanted.startswith(f"bytes={part[1]}-")):
        raise Rejected(REFUSED, f"{shown(address)}: HTTP {status}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Rejected(REFUSED, f"{shown(address)}: packed as {headers['Content-Encoding']}, although asked for as it is")
    length = int(headers["Content-Length"]) if headers.get("Content-Length", "").isdecimal() else None
    size = int(part[3]) if part else length
    version = _version(headers.get("ETag") or headers.get("Last-Modified"), size)
    return _Answer(length, size, version, part is not None, response.stream(transfer.CHUNK, decode_content=False))


def _version(mark: str | None, size: int | None) -> str:
    return f"{mark} {size}" if mark else ""


@functools.lru_cache(maxsize=1)
def _s3() -> transfer.S3:
    return transfer.S3()


@functools.lru_cache(maxsize=1)
def _http(private_hosts: tuple[str, ...], process: int) -> urllib3.PoolManager:  # a forked process gets its own
    """Connections that lead nowhere but to public addresses, and to ``private_hosts``."""
    allowed = {host.lower() for host in private_hosts}

    class Guarded:
        host: str
        port: int
        timeout: float | None

        def _new_conn(self) -> socket.socket:
            """In place of urllib3's: what is checked is what is connected to, whatever the name means a moment later."""
            known = self.host.lower() in allowed or f"{self.host.lower()}:{self.port}" in allowed
            try:
                found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                raise PassingError(f"{self.host}: {transfer.one_line(error)}") from error
            refused, trouble = [], ""
            for *_, place in found:
                if not known and not _is_public(str(place[0])):
                    refused.append(str(place[0]))
                    continue
                try:
                    return socket.create_connection((str(place[0]), self.port), transfer.CONNECT_SECONDS)
                except OSError as error:
                    trouble = transfer.one_line(error)
            if trouble:
                raise PassingError(f"{self.host}: {trouble}")
            where = f"{self.host} is {refused[0]}" if refused and refused[0] != self.host else self.host
            raise Rejected(REFUSED, f"{where}, which is no public address; fetch.private_hosts names those that may be asked")

    class Http(Guarded, HTTPConnection):
        pass

    class Https(Guarded, HTTPSConnection):
        pass

    class HttpPool(HTTPConnectionPool):
        ConnectionCls = Http

    class HttpsPool(HTTPSConnectionPool):
        ConnectionCls = Https

    timeout = urllib3.Timeout(connect=transfer.CONNECT_SECONDS, read=transfer.READ_SECONDS)
    manager = urllib3.PoolManager(num_pools=16, timeout=timeout)
    manager.pool_classes_by_scheme = {"http": HttpPool, "https": HttpsPool}
    return manager


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    return found.is_global and not found.is_multicast
