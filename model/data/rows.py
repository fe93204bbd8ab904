"""Rows of MDS shards, of which only what is used is read: a window of 16 frames is a third of a stored clip or less."""

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.format import Reader
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader

LAZY = "frames"  # the column that is read by parts
OPEN_SHARDS = 32  # in a process: opening one for every row takes as long as reading it


class Shard:
    """An open file."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, begin: int, end: int) -> np.ndarray:
        """Bytes ``begin`` to ``end``, uint8, the caller's own.

        Raises:
            ValueError: the shard does not hold them; nothing was allocated for them.
        """
        if not 0 <= begin <= end <= self.size:
            raise ValueError(f"bytes {begin} to {end} are asked of a shard of {self.size}")
        found = np.empty(end - begin, np.uint8)
        if os.preadv(self._descriptor, [found], begin) != len(found):  # type: ignore[list-item]
            raise ValueError("the shard has become shorter")
        return found


class StoredFrames:
    """The column ``frames`` of a row. Slices of it are read when asked for."""

    def __init__(self, shard: Shard, begin: int, size: int) -> None:
        self._shard, self._begin, self._size = shard, begin, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> np.ndarray:
        """(bytes,) uint8, the caller's own."""
        start, stop, step = part.indices(self._size)
        return self._shard.read(self._begin + start, self._begin + max(start, stop))[::step]


class RowReader(MDSReader):
    """Gives rows whose frames are ``StoredFrames``. Takes uncompressed shards of ``schema.COLUMNS``."""

    _number: int | None = None

    @classmethod
    def of(cls, r: Reader, stays_open: bool) -> "RowReader":
        """The same shard, read so. One that stays open takes its room on the disk even if it is removed meanwhile."""
        assert isinstance(r, MDSReader)  # as the index was found to say
        columns = (r.column_encodings, r.column_names, r.column_sizes)
        reader = cls(r.dirname, r.split, *columns, r.compression, r.hashes, r.raw_data, r.samples, r.size_limit, r.zip_data)
        if stays_open:
            reader._number = next(_numbers)
        return reader

    def get_item(self, idx: int) -> dict[str, Any]:
        """Row ``idx``.

        Raises:
            ValueError: the shard is damaged there. Nothing is allocated that the file does not hold.
            FileNotFoundError: it is not here.
        """
        path = Path(self.dirname, self.split, self.raw_data.basename)
        shard = Shard(path) if self._number is None else _opened(path, self._number)
        begin, end = shard.read(4 * (1 + idx), 4 * (3 + idx)).view(np.uint32).tolist()
        # The sizes of the columns that vary, then the columns.
        header = 4 * sum(not size for size in self.column_sizes)
        said = iter(shard.read(begin, min(begin + header, end)).view(np.uint32).tolist())
        sizes = [size or next(said, 0) for size in self.column_sizes]
        if begin + header + sum(sizes) != end:
            raise ValueError(f"sample {idx} says that it has {header + sum(sizes)} bytes, the shard says {end - begin}")
        starts = list(itertools.accumulate(sizes, initial=begin + header))
        lazy, row = self.column_names.index(LAZY), dict[str, Any]()
        for part in (slice(0, lazy), slice(lazy + 1, len(sizes))):  # what lies before the frames, and what behind them
            data, at = shard.read(starts[part.start], starts[part.stop]).tobytes(), 0
            for name, encoding, size in zip(self.column_names[part], self.column_encodings[part], sizes[part], strict=True):
                row[name] = mds_decode(encoding, data[at : at + size])
                at += size
        row[LAZY] = StoredFrames(shard, starts[lazy], sizes[lazy])
        return row


_numbers = itertools.count()  # of readers: another data set at the same path is not the one that was opened


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _opened(path: Path, reader: int) -> Shard:
    del reader
    return Shard(path)
