"""What all downloads share: waiting for what may pass, and a client for S3 and whatever speaks its protocol."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

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
from urllib3.exceptions import HTTPError

from model.errors import UserError

ATTEMPTS = 6
BACKOFF_SECONDS = 1.0  # behind the first failed attempt; doubled behind each: half a minute in all
CONNECT_SECONDS = 10.0
READ_SECONDS = 20.0  # without a byte
SLOWEST = 2**16  # bytes per second over a whole download: below, another connection may do better
CHUNK = 2**14  # bytes between two looks at the clock

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

Result = TypeVar("Result")


class PassingError(Exception):
    """A download failed in a way that another attempt may not."""


class MissingError(UserError):
    """The server answers, and says that there is no such thing."""


def persist(
    action: Callable[[], Result], what: str, attempts: int | None = None, abandoned: threading.Event | None = None
) -> Result:
    """The result of ``action``, which is called again, with pauses, while it raises PassingError.

    Args:
        what: is downloaded; for the message.
        attempts: at most so many; None: ``ATTEMPTS``.
        abandoned: once it is set, the attempt under way is the last.

    Raises:
        UserError: the last attempt failed, too.
    """
    attempts, abandoned = attempts or ATTEMPTS, abandoned or threading.Event()
    for attempt in range(attempts):
        try:
            return action()
        except PassingError as error:
            if attempt + 1 == attempts or abandoned.is_set():
                raise UserError(f"{what}: {error} (attempt {attempt + 1} of {attempts})") from error
        # Not in step with the other processes that the same server turned down.
        abandoned.wait(BACKOFF_SECONDS * 2**attempt * random.Random().uniform(0.5, 1))
    raise ValueError("attempts must be positive")


def receive(chunks: Iterable[bytes], file: BinaryIO) -> int:
    """Write what comes to ``file``. Returns the number of bytes.

    Raises:
        PassingError: it comes too slowly.
    """
    begin, received = time.monotonic(), 0
    for chunk in chunks:
        file.write(chunk)
        received += len(chunk)
        if time.monotonic() - begin > READ_SECONDS + received / SLOWEST:
            raise PassingError(f"slower than {SLOWEST} bytes per second")
    return received


class S3:
    """A connection to AWS, or to the server that ``S3_ENDPOINT_URL`` names, where buckets are part of the path.

    Credentials and region come from where every AWS client finds them.
    """

    def __init__(self) -> None:
        """Connects at the first use, in the process that needs it."""
        self.endpoint = os.environ.get("S3_ENDPOINT_URL") or None
        self._client: Any = None
        self._client_owner = 0  # a forked process must not share its parent's connections

    @property
    def client(self) -> Any:
        """boto3's, for this process; to be used within ``told``."""
        if self._client_owner != os.getpid():
            config = Config(
                connect_timeout=CONNECT_SECONDS,
                read_timeout=READ_SECONDS,
                retries={"mode": "standard", "total_max_attempts": 1},  # ``persist`` does it
                s3={"addressing_style": "path"} if self.endpoint else None,
            )
            self._client = Session().client("s3", config=config, endpoint_url=self.endpoint)
            self._client_owner = os.getpid()
        return self._client

    def where(self, address: str) -> str:
        """``address`` and its server, for messages."""
        return f"{address} at {self.endpoint}" if self.endpoint else address

    @contextlib.contextmanager
    def told(self, address: str) -> Iterator[None]:
        """The client's errors as ours.

        Raises:
            PassingError: another attempt may do better.
            MissingError: no such bucket or object.
            UserError: everything else; names the object, the server and why.
        """
        try:
            yield
        except ClientError as error:
            why = _refusal(error)
            if _may_pass(error):
                raise PassingError(why) from error
            kind = MissingError if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404 else UserError
            raise kind(f"{self.where(address)}: {why}") from error
        except NoCredentialsError as error:
            told = "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            raise UserError(f"{self.where(address)}: {told}") from error
        except PASSING_ERRORS as error:
            raise PassingError(one_line(error)) from error
        except (BotoCoreError, ValueError) as error:  # the configuration, or no S3 server at this address
            raise UserError(f"{self.where(address)}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error that another library raised, without its line breaks."""
    text = " ".join(str(error).split())
    return text if text else type(error).__name__


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
