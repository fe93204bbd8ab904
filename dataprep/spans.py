"""Bytes of files: whole ones or members of tars, on this machine or another."""

import contextlib
import dataclasses
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO

from dataprep import fetch
from dataprep.fetch import FetchConfig, SizedFile
from dataprep.filters import Rejected


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of a file: all of a plain one, or a member of a tar."""

    path: str  # or an address
    offset: int = 0
    size: int = -1  # bytes; -1: up to the end
    version: str = ""  # of the file: a changed file is another input; empty: not known


class _Window(SizedFile):
    """A stretch of a file as a file of its own."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        super().__init__(size)
        self._file = Path(path).open("rb")  # noqa: SIM115  closed by close()
        self._offset = offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self.size - self.position))
        self._file.seek(self._offset + self.position)
        count = self._file.readinto(memoryview(buffer)[:length]) or 0  # a bytearray's slice would be a copy
        self.position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_span(span: Span, config: FetchConfig = fetch.DEFAULTS) -> BinaryIO:
    """Open the bytes of ``span`` for reading and seeking; those of another machine are fetched first.

    Raises:
        Rejected: no such file, not a plain file, not readable, or not to be had.
    """
    if fetch.is_remote(span.path):
        return fetch.fetch(span.path, config, span.offset, span.size, span.version)
    try:
        if not stat.S_ISREG(os.stat(span.path).st_mode):  # noqa: PTH116  a manifest may name a device or a pipe
            raise Rejected("not readable", f"not a plain file: {span.path}")
        if span.size < 0:
            return Path(span.path).open("rb")
        if span.version and version_of(Path(span.path)) != span.version:  # its members may lie elsewhere
            raise Rejected("not readable", f"changed since it was listed: {span.path}")
        return io.BufferedReader(_Window(span.path, span.offset, span.size))
    except FileNotFoundError as error:
        raise Rejected("no such file", span.path) from error
    except (OSError, ValueError) as error:
        raise Rejected("not readable", str(error)) from error


def version_of(path: Path) -> str:
    """Size and time of last change, as make and rsync tell changed files; empty if it cannot be had, which is met again later."""
    with contextlib.suppress(OSError, ValueError):
        found = path.stat()
        return f"{found.st_size}-{found.st_mtime_ns}"
    return ""
