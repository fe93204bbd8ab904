"""A look into what data preparation has written: clips with their captions, and what was not kept, with the reasons."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from streaming import LocalDataset

from model.data.samples import View, decode_sample
from model.data.schema import MANIFEST_NAME, Manifest
from model.data.shards import INDEX_NAME, open_source
from model.data.transfer import one_line
from model.errors import UserError

SCANNED = 5000  # samples that one page looks through: MDS reads whole samples, and a filter may find nothing
# Tables of what was lost, as a page calls them: the file, and the columns that are shown.
LOST = {
    "inputs": ("rejects.parquet", ("key", "fate", "reason", "detail", "source")),
    "clips": ("clips.parquet", ("key", "fate", "reason", "detail", "caption")),
}


@dataclass(frozen=True)
class Row:
    """One sample as it lies in a data set."""

    index: int
    key: str
    caption: str
    frames: int
    start_seconds: float  # in its source
    source_height: int
    source_width: int


@dataclass(frozen=True)
class Page:
    """Some samples of a data set."""

    rows: tuple[Row, ...]
    next: int | None  # index from which to go on; None at the end
    looked: int  # samples looked through for this page
    manifest: Manifest


@dataclass(frozen=True)
class Lost:
    """Rows of a table of what was not kept."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    total: int  # that have the reason


class Shelf:
    """The output folder of a data preparation. It may be replaced by another run's while this looks at it."""

    def __init__(self, folder: Path) -> None:
        """Open it.

        Raises:
            UserError: no data set in it.
        """
        self.folder = folder
        self._opened: dict[str, tuple[tuple[int, int], Manifest, LocalDataset]] = {}
        if not self.datasets():
            raise UserError(f"{folder}: no data sets; name the output folder of dataprep.run")

    def datasets(self) -> list[str]:
        """Names of the data sets, such as "stage1/videos"."""
        found = self.folder.glob(f"stage*/*/{MANIFEST_NAME}")
        return sorted(str(path.parent.relative_to(self.folder)) for path in found)

    def page(self, dataset: str, start: int, count: int, words: str = "") -> Page:
        """Up to ``count`` samples from ``start`` on whose captions or keys hold ``words``, in whichever case.

        Raises:
            UserError: no such data set, or a damaged one.
        """
        manifest, samples = self._open(dataset)
        rows: list[Row] = []
        end = min(len(samples), max(0, start) + SCANNED)
        index = max(0, start)
        while index < end and len(rows) < count:
            row = self._read(dataset, samples, index)
            if words.lower() in row["caption"].lower() or words.lower() in row["key"].lower():
                size = (row["source_height"], row["source_width"])
                rows.append(Row(index, row["key"], row["caption"], len(row["frame_ends"]), row["start_seconds"], *size))
            index += 1
        return Page(tuple(rows), index if index < len(samples) else None, index - max(0, start), manifest)

    def clip(self, dataset: str, index: int) -> tuple[np.ndarray, float]:
        """All stored frames of a sample, (T, H, W, 3) uint8, and their rate per second, 0 of an image.

        Raises:
            UserError: no such sample, or a damaged one.
        """
        manifest, samples = self._open(dataset)
        if not 0 <= index < len(samples):
            raise UserError(f"{self.folder / dataset}: has {len(samples)} samples, none of the number {index}")
        row = self._read(dataset, samples, index)
        view = View(len(row["frame_ends"]), (manifest.frame_rate,), manifest.text.width, manifest.text.max_tokens, 0)
        try:
            return decode_sample(row, manifest, view, 0).frames.numpy(), manifest.frame_rate
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self.folder / dataset}: sample {index}: {one_line(error)}") from error

    def reasons(self, what: str) -> dict[str, int]:
        """Why inputs or clips were not kept, and how many for each reason, the commonest first.

        Raises:
            UserError: no such table, or a damaged one.
        """
        table = self._table(what, ["reason", "fate"])
        lost = table.filter(pc.not_equal(table["fate"], "kept"))
        return dict(Counter(lost["reason"].to_pylist()).most_common())

    def lost(self, what: str, reason: str | None, start: int, count: int) -> Lost:
        """Up to ``count`` rows from ``start`` on of what was not kept for that reason, or for any.

        Raises:
            UserError: no such table, or a damaged one.
        """
        columns = LOST[what][1]
        table = self._table(what, list(columns))
        chosen = pc.not_equal(table["fate"], "kept")
        if reason is not None:
            chosen = pc.and_(chosen, pc.equal(table["reason"], reason))
        found = table.filter(chosen)
        rows = found.slice(max(0, start), count).to_pylist()
        return Lost(columns, tuple(tuple(str(row[name]) for name in columns) for row in rows), len(found))

    def _table(self, what: str, columns: list[str]) -> pa.Table:
        path = self.folder / LOST[what][0]
        try:
            return pq.read_table(path, columns=columns)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{path}: {one_line(error)}") from error

    def _open(self, dataset: str) -> tuple[Manifest, LocalDataset]:
        if dataset not in self.datasets():
            raise UserError(f"{self.folder}: no data set {dataset!r}")
        folder = self.folder / dataset
        try:
            stat = (folder / INDEX_NAME).stat()
            state = (stat.st_ino, stat.st_mtime_ns)
            if dataset not in self._opened or self._opened[dataset][0] != state:
                source = open_source(str(folder), None)
                self._opened[dataset] = (state, source.manifest, LocalDataset(str(folder)))
        except OSError as error:
            raise UserError(f"{folder}: {one_line(error)}") from error
        return self._opened[dataset][1:]

    def _read(self, dataset: str, samples: LocalDataset, index: int) -> dict[str, Any]:
        try:
            return samples[index]
        except Exception as error:  # whatever a damaged shard makes the MDS reader raise
            raise UserError(f"{self.folder / dataset}: sample {index}: {one_line(error)}") from error
