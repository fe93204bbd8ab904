"""Sets, tables and arrays that may outgrow memory, in nameless temporary files; and a disk that is full.

The files lie in the folder that TMPDIR names (SQLite's, SQLITE_TMPDIR), and are gone with the process.
"""

import contextlib
import errno
import hashlib
import itertools
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from model.errors import UserError

CACHE_KIB = 16 << 10  # of a table, held in memory
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
HELD = 1 << 16  # names that are sorted in memory


def connect() -> sqlite3.Connection:
    """An empty database for this process alone."""
    connection = sqlite3.connect("", isolation_level=None)  # "": a temporary file
    for setting in (f"cache_size = -{CACHE_KIB}", "journal_mode = off", "synchronous = off", "temp_store = file"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute("BEGIN")  # never to be committed: a transaction for each row would take four times as long
    return connection


def in_order(names: Iterable[str]) -> Iterator[str]:
    """``names`` in the order of their bytes, whatever those are; beyond a number they wait on disk."""
    names = iter(names)
    first = list(itertools.islice(names, HELD))
    if len(first) < HELD:
        yield from sorted(first, key=os.fsencode)
        return
    with contextlib.closing(connect()) as database:
        database.execute("CREATE TABLE names (name BLOB PRIMARY KEY) WITHOUT ROWID")
        rows = ((os.fsencode(name),) for name in itertools.chain(first, names))
        database.executemany("INSERT OR IGNORE INTO names VALUES (?)", rows)
        del first
        for (name,) in database.execute("SELECT name FROM names ORDER BY name"):
            yield os.fsdecode(name)


def array(length: int, dtype: type, fill: int = 0) -> np.ndarray:
    """(length,) numbers in a nameless temporary file, which the system keeps in memory only as long as it has room."""
    with tempfile.TemporaryFile() as file:
        file.truncate(max(1, length) * np.dtype(dtype).itemsize)
        found = np.memmap(file, dtype, "r+", shape=(max(1, length),))[:length].view(np.ndarray)
    for begin in range(0, length if fill else 0, HELD):
        found[begin : begin + HELD] = fill
    return found


class DiskSet:
    """A set of strings; 12 bytes of each, however long."""

    def __init__(self) -> None:
        self._database = connect()
        self._database.execute("CREATE TABLE found (digest BLOB PRIMARY KEY) WITHOUT ROWID")

    def add(self, text: str) -> bool:
        """Add ``text``; False if it was there."""
        return self._database.execute("INSERT OR IGNORE INTO found VALUES (?)", (_digest(text),)).rowcount == 1

    def __contains__(self, text: str) -> bool:
        return self._database.execute("SELECT 1 FROM found WHERE digest = ?", (_digest(text),)).fetchone() is not None

    def close(self) -> None:
        self._database.close()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


@contextlib.contextmanager
def told_when_full(output: Path) -> Iterator[None]:
    """A full disk in one line.

    Raises:
        UserError: in place of the error that says so.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        full = error.errno in NO_SPACE if isinstance(error, OSError) else "full" in str(error)
        if not full:
            raise
        where = f"{output.parent}, or for temporary files in {tempfile.gettempdir()}"
        raise UserError(f"no space left for {where} ({error}); make room and run again to go on") from error
