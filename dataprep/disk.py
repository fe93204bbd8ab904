"""Sets and tables that may outgrow memory: SQLite in a nameless temporary file, which is gone with the process.

It lies in the folder that SQLITE_TMPDIR or TMPDIR names, else in /var/tmp.
"""

import contextlib
import hashlib
import itertools
import os
import sqlite3
from collections.abc import Iterable, Iterator

CACHE_KIB = 32 << 10  # of a table, held in memory
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
