"""Sets and tables that may outgrow memory: SQLite in a nameless temporary file, which is gone with the process.

It lies in the folder that SQLITE_TMPDIR or TMPDIR names, else in /var/tmp.
"""

import hashlib
import sqlite3

CACHE_KIB = 64 << 10  # of a table, held in memory


def connect() -> sqlite3.Connection:
    """An empty database for this process alone."""
    connection = sqlite3.connect("", isolation_level=None)  # "": a temporary file
    for setting in (f"cache_size = -{CACHE_KIB}", "journal_mode = off", "synchronous = off", "temp_store = file"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute("BEGIN")  # never to be committed: a transaction for each row would take four times as long
    return connection


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
