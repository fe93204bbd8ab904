"""A journal: records that wait in a folder until somebody is done with them, over kills of the process."""

import json
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

Record = dict[str, Any]

SEGMENT_BYTES = 4 << 20  # of the journal; those that are done with are deleted whole
READ_BYTES = 1 << 18  # of the journal at once


@dataclass(frozen=True, order=True)
class Position:
    """A place in the journal: the number of a segment, and bytes within it."""

    segment: int = 0
    offset: int = 0


class Journal:
    """Records in a folder, in their order, until they are done with. One process at a time writes and reads it.

    A record is on its way to the disk when ``append`` returns: a kill of the process does not lose it, a power cut may.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.files.mkdir(parents=True, exist_ok=True)
        self._sent = folder / "sent.json"
        self._lock = threading.Lock()
        # A segment of its own for each process: the last line of the one before may be cut.
        last = max(self._segments(), default=0)
        self._writing = last + 1
        self._file = self._path(self._writing).open("ab")
        self.position = Position(**json.loads(self._sent.read_text())) if self._sent.exists() else Position()
        self._about = folder / "run.json"
        if not self._about.exists():
            _replace(self._about, {"token": uuid.uuid4().hex})
        self.token: str = json.loads(self._about.read_text())["token"]  # of the run, by which MLflow finds it

    def describe(self, name: str, destination: dict[str, Any]) -> None:
        """Keep whose journal it is and where it goes, for who sends it later."""
        _replace(self._about, {"token": self.token, "name": name, "destination": destination})

    def described(self) -> tuple[str, dict[str, Any]]:
        """What ``describe`` kept."""
        about = json.loads(self._about.read_text())
        return about["name"], about["destination"]

    def append(self, record: Record) -> None:
        """Add a record; from any thread."""
        with self._lock:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            if self._file.tell() > SEGMENT_BYTES:
                self._file.close()
                self._writing += 1
                self._file = self._path(self._writing).open("ab")

    def read(self) -> tuple[list[Record], Position]:
        """The next records that are not done with, and the position behind them; none at the end."""
        for number in sorted(self._segments()):
            if number < self.position.segment:
                continue
            writing = self._writing  # before reading: what is complete then stays so
            offset = self.position.offset if number == self.position.segment else 0
            with self._path(number).open("rb") as file:
                file.seek(offset)
                data = file.read(READ_BYTES)
                while data and b"\n" not in data and (more := file.read(READ_BYTES)):
                    data += more
            whole = data[: data.rfind(b"\n") + 1]
            if whole:
                return list(_parsed(whole)), Position(number, offset + len(whole))
            if number == writing:
                break
        return [], self.position

    def done(self, position: Position) -> None:
        """Everything before ``position`` is done with."""
        _replace(self._sent, vars(position))
        self.position = position
        for number in self._segments():
            if number < position.segment:
                self._path(number).unlink()

    def close(self) -> None:
        """Write no more."""
        self._file.close()

    def _segments(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("[0-9]*.jsonl")]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.jsonl"


def _replace(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(content))
    draft.replace(path)


def _parsed(lines: bytes) -> Iterator[Record]:
    for line in lines.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the disk's fault; the others are whole
            tqdm.write(f"MLflow: a damaged record in the journal is left out: {line[:80]!r}")
