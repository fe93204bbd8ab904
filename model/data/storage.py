"""Downloads of shards from object storage. Waits for what may pass, names what does not."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from streaming.base.storage import CloudDownloader

from model.data.transfer import CHUNK, S3, PassingError, one_line, persist, receive
from model.errors import UserError

STALE_SECONDS = 600.0  # a running download writes more often than that


class Storage:
    """A folder in object storage: at ``s3://`` through ``S3``; other kinds of addresses go to mosaicml-streaming's clients."""

    def __init__(self, address: str) -> None:
        """Connects at the first download, in the process that needs it.

        Raises:
            UserError: no client knows this kind of address.
        """
        self.address = address
        self._s3 = S3()
        url = urlparse(address)
        self._bucket, self._prefix = url.netloc, url.path.strip("/")
        try:
            self._other = None if url.scheme == "s3" else CloudDownloader.get(address)
        except ValueError as error:
            raise UserError(one_line(error)) from error
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
        address = f"{self.address}/{name}"

        def attempt() -> None:
            try:
                self._download(name, partial, num_bytes)
                fault = check(partial) if check else None
                if fault:
                    raise PassingError(f"damaged: {fault}")
                partial.replace(path)
            except OSError as error:
                raise UserError(f"{path}: {one_line(error)}") from error  # of the disk
            finally:
                partial.unlink(missing_ok=True)

        persist(attempt, self._s3.where(address) if self._other is None else address, abandoned=self._abandoned)

    def abandon(self) -> None:
        """Attempts under way are the last: the run ends, and must not wait for them."""
        self._abandoned.set()

    def _download(self, name: str, path: Path, num_bytes: int | None) -> None:
        address = f"{self.address}/{name}"
        if self._other is not None:
            try:
                self._other.download(address, str(path))
            except Exception as error:  # each client has its own, and none says what may pass
                raise PassingError(one_line(error)) from error
            return
        with self._s3.told(address):
            self._get(f"{self._prefix}/{name}".lstrip("/"), path, num_bytes)

    def _get(self, key: str, path: Path, num_bytes: int | None) -> None:
        answer = self._s3.client.get_object(Bucket=self._bucket, Key=key)
        length = answer["ContentLength"]
        if num_bytes not in (None, length):
            raise PassingError(f"damaged: {length} bytes long, the index says {num_bytes}")
        with path.open("wb") as file:
            receive(answer["Body"].iter_chunks(CHUNK), file)


def remove_stale(folder: Path) -> None:
    """Remove what killed downloads left in ``folder``; those of runs that go on stay."""
    for partial in folder.rglob("*.partial"):
        try:
            if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                partial.unlink()
        except FileNotFoundError:  # another process was first
            continue
