"""Downloads from object storage: S3 and whatever speaks its protocol. Waits for what may pass, names what does not."""

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from streaming.base.storage import CloudDownloader
from urllib3.exceptions import HTTPError

from model.config import UserError

ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # behind the first failed attempt; doubled behind each: half a minute in all
CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0  # without a byte
SLOWEST = 2**16  # bytes per second over a whole download: below, another connection may do better
CHUNK = 2**14  # bytes between two looks at the clock
STALE_SECONDS = 600.0  # a running download writes more often than that

# What another attempt may change, beside every status from 500 on.
PASSING_ERRORS = (
    NoConnectionError,
    HTTPClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    HTTPError,
    ConnectionError,
    TimeoutError,
)
PASSING_STATUS = {408, 425, 429}
PASSING_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException"}


class PassingError(Exception):
    """A download failed in a way that another attempt may not."""


class Storage:
    """A folder in object storage.

    Credentials and region come from where every AWS client finds them. ``S3_ENDPOINT_URL`` names another server than AWS; buckets
    are then part of the path, not of the host's name. Addresses of other kinds than ``s3://`` go to mosaicml-streaming's clients.
    """

    def __init__(self, address: str) -> None:
        """Connects at the first download, in the process that needs it.

        Raises:
            UserError: no client knows this kind of address.
        """
        self.address = address
        self.endpoint = os.environ.get("S3_ENDPOINT_URL") or None
        url = urlparse(address)
        self._bucket, self._prefix = url.netloc, url.path.strip("/")
        try:
            self._other = None if url.scheme == "s3" else CloudDownloader.get(address)
        except ValueError as error:
            raise UserError(one_line(error)) from error
        self._client: Any = None
        self._client_owner = 0  # a forked process must not share its parent's connections
        self._abandoned = threading.Event()

    def fetch(
        self, name: str, path: Path, num_bytes: int | None = None, check: Callable[[Path], str | None] | None = None
    ) -> None:
        """Download the object ``name`` to ``path``, where it appears only when it is whole, even after a kill.

        Args:
            name: relative to the folder.
            path: file to write.
            num_bytes: how long the object must be.
            check: says what is wrong with a downloaded file; None if nothing is.

        Raises:
            UserError: it cannot be had; names the object, the server and why.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        for attempt in range(ATTEMPTS):
            try:
                self._download(name, partial, num_bytes)
                fault = check(partial) if check else None
                if fault:
                    raise PassingError(f"damaged: {fault}")
                partial.replace(path)
                return
            except PassingError as error:
                if attempt + 1 == ATTEMPTS or self._abandoned.is_set():
                    raise UserError(f"{self._where(name)}: {error} (attempt {attempt + 1} of {ATTEMPTS})") from error
            except OSError as error:
                raise UserError(f"{path}: {one_line(error)}") from error  # of the disk
            finally:
                partial.unlink(missing_ok=True)
            # Not in step with the other processes that the same server turned down.
            self._abandoned.wait(BACKOFF_SECONDS * 2**attempt * random.Random().uniform(0.5, 1))

    def abandon(self) -> None:
        """Attempts under way are the last: the run ends, and must not wait for them."""
        self._abandoned.set()

    def _download(self, name: str, path: Path, num_bytes: int | None) -> None:
        if self._other is not None:
            try:
                self._other.download(f"{self.address}/{name}", str(path))
            except Exception as error:  # each client has its own, and none says what may pass
                raise PassingError(one_line(error)) from error
            return
        try:
            self._get(f"{self._prefix}/{name}".lstrip("/"), path, num_bytes)
        except ClientError as error:
            why = _refusal(error)
            if _may_pass(error):
                raise PassingError(why) from error
            raise UserError(f"{self._where(name)}: {why}") from error
        except NoCredentialsError as error:
            raise UserError(f"{self._where(name)}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
        except PASSING_ERRORS as error:
            raise PassingError(one_line(error)) from error
        except (BotoCoreError, ValueError) as error:  # the configuration, or no S3 server at this address
            raise UserError(f"{self._where(name)}: {one_line(error)}") from error

    def _get(self, key: str, path: Path, num_bytes: int | None) -> None:
        answer = self._s3().get_object(Bucket=self._bucket, Key=key)
        length = answer["ContentLength"]
        if num_bytes not in (None, length):
            raise PassingError(f"damaged: {length} bytes long, the index says {num_bytes}")
        deadline = time.monotonic() + READ_SECONDS + length / SLOWEST
        with path.open("wb") as file:
            for chunk in answer["Body"].iter_chunks(CHUNK):
                file.write(chunk)
                if time.monotonic() > deadline:
                    raise PassingError(f"slower than {SLOWEST} bytes per second")

    def _s3(self) -> Any:
        if self._client_owner != os.getpid():
            config = Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": 1},  # ``fetch`` does it
                s3={"addressing_style": "path"} if self.endpoint else None,
            )
            self._client = Session().client("s3", config=config, endpoint_url=self.endpoint)
            self._client_owner = os.getpid()
        return self._client

    def _where(self, name: str) -> str:
        return f"{self.address}/{name}" + (f" at {self.endpoint}" if self.endpoint and self._other is None else "")


def remove_stale(folder: Path) -> None:
    """Remove what killed downloads left in ``folder``; those of runs that go on stay."""
    for partial in folder.rglob("*.partial"):
        try:
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                partial.unlink()
        except FileNotFoundError:  # another process was first
            continue


def _may_pass(error: ClientError) -> bool:
    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
    return status >= 500 or status in PASSING_STATUS or error.response["Error"]["Code"] in PASSING_CODES


def _refusal(error: ClientError) -> str:
    """What the server answered, and for refused access what to look at."""
    status, answer = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]
    why = " ".join(f"{answer.get('Message', '')} ({answer['Code']}, HTTP {status})".split())
    if status in (401, 403):  # AWS says so of an object that is not there, too, to those who may not list the bucket
        why += ": check the credentials and what they may read, and that the object exists"
    return why


def one_line(error: BaseException) -> str:
    """The message of an error that another library raised, without its line breaks."""
    text = " ".join(str(error).split())
    return text if text else type(error).__name__
