"""Finished partitions -> a pool of MDS shards, from which data sets are selected; a job's output appears whole or not at all.

While a job runs, everything is in a work folder beside the output, named after what the job is to produce::

    OUTPUT.tmp-DIGEST/
      items.parquet               the list of what is to be prepared, by partitions
      listing.parquet             that of all inputs, where an earlier output has some of them
      attempts/ID/                what a running task writes
      parts/part-00007/           a finished task: its attempt, renamed
      finished/pool/              all parts together: every clip that was decoded, and tables of items and clips
      finished/stage1/videos/...  the data sets that dataprep/selection.py makes from it

A task that dies leaves an attempt that nobody reads. A job that dies leaves its parts, and the next run goes on from them. The
finished folder becomes the output by one rename.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.scores import Scores
from model.data.schema import COLUMNS

JOB_NAME = "job.json"  # in the output: what made it
PART_NAME = "part.json"  # in a part: its shards, for the index
POOL_VERSION = 5  # of what the pool holds: another one decodes again
POOL_NAME = "pool"  # in the output: every decoded clip
SHARDS_NAME = "shards.parquet"  # in the pool: one row per shard
ITEMS_NAME = "items.parquet"  # in the output: one row per input item; in the pool, as it was before selection
CLIPS_NAME = "clips.parquet"  # likewise: one row per decoded clip
REJECTS_NAME = "rejects.parquet"  # the items that were not kept
BATCH = 1 << 12  # rows of a table in memory
ASIDE = "-aside"  # ends the name of a folder with the shards of clips that did not pass when they were decoded
HASHES = ["xxh64"]  # of every shard, in the index


@dataclasses.dataclass(frozen=True)
class ShardConfig:
    """How the samples are cut into files."""

    size_limit_mb: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.size_limit_mb <= 4000:
            raise ValueError("size_limit_mb must lie between 1 and 4000: a shard stays under 4 GiB")


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of one input item: a row of ``items.parquet``."""

    key: str
    kind: str
    source: str
    fate: str  # "kept", "filtered" (decoded, but none of its clips was selected) or "rejected"
    reason: str = ""  # why it was not kept, one of a few phrases
    detail: str = ""
    clips: int = 0  # decoded
    clips_kept: int = 0  # of these; known after selection
    source_height: int = 0  # pixels, upright
    source_width: int = 0
    seconds: float = 0.0  # decoded
    frame_rate: float = 0.0  # of the source, on average
    fingerprint: str = ""  # of the input as it was listed: with another one it is prepared again


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipRow(Scores):
    """A decoded clip or image, its scores, and where its samples lie."""

    key: str  # of the sample
    item: str  # key of its item
    kind: str
    caption: str
    captioner: str = ""  # the model that wrote the caption; empty where it came with the media
    frames: int  # stored
    start_seconds: float  # in its source
    shot: int = 0  # of its source
    aside: bool = False  # in which series of shards of its part
    part: int = 0
    position: int = 0  # in the series


def schema(row: type) -> pa.Schema:
    """The parquet columns of a dataclass of plain values."""
    types = {str: pa.string(), int: pa.int32(), float: pa.float64(), bool: pa.bool_(), float | None: pa.float64()}
    special = {"phash": pa.uint64()}
    return pa.schema([(field.name, special.get(field.name, types[field.type])) for field in dataclasses.fields(row)])  # type: ignore[index]


@dataclasses.dataclass(frozen=True)
class ShardRow:
    """A shard of the pool."""

    dataset: str  # "stage1/videos"
    series: str  # its folder
    samples: int
    text_width: int
    entry: str  # what an index says of it, as JSON


ACCOUNT_SCHEMA, CLIP_SCHEMA, SHARD_SCHEMA = schema(Account), schema(ClipRow), schema(ShardRow)


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """The few numbers that a task returns to the driver."""

    part: int
    items: int
    kept: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished job. Every item is kept, filtered or rejected; every decoded clip kept or filtered."""

    kept: int  # items
    filtered: int
    rejected: int
    reasons: dict[str, int]  # of the rejected items
    clips_kept: int
    clip_reasons: dict[str, int]  # of the clips that were filtered
    samples: dict[str, int]  # by dataset, "stage1/videos"

    @property
    def clips_filtered(self) -> int:
        return sum(self.clip_reasons.values())


class PartWriter:
    """Writes the samples and accounts of one partition into an attempt folder of its own, and commits them by one rename."""

    def __init__(self, workspace: Path, part: int, config: ShardConfig) -> None:
        self._part, self._config = part, config
        self._target = workspace / "parts" / part_name(part)
        self._attempt = workspace / "attempts" / f"{part_name(part)}-{uuid.uuid4().hex}"
        self._attempt.parent.mkdir(exist_ok=True)  # not its parents: a job that was swapped in meanwhile stays gone
        self._attempt.mkdir()
        self._writers: dict[str, Any] = {}
        self._accounts: list[Account] = []
        self._clips: list[ClipRow] = []
        self._positions: Counter[tuple[str, bool]] = Counter()
        self._samples: Counter[str] = Counter()
        self._text_width = 0

    def write(self, dataset: str, sample: dict[str, Any], aside: bool = False) -> None:
        """Add a sample (schema ``COLUMNS``) to ``dataset``, such as "stage1/videos", in the order in which clips are added."""
        folder = f"{dataset}/{series_name(self._part, aside)}"
        if folder not in self._writers:
            self._writers[folder] = mds_writer(self._attempt / folder, self._config)
        self._writers[folder].write(sample)
        self._samples[dataset] += 1
        self._text_width = sample["text"].shape[1]

    def clip(self, row: ClipRow, aside: bool = False) -> None:
        """Note a clip whose samples are written."""
        position = self._positions[row.kind, aside]
        self._positions[row.kind, aside] += 1
        self._clips.append(dataclasses.replace(row, aside=aside, part=self._part, position=position))

    def account(self, row: Account) -> None:
        """Note what became of an item."""
        self._accounts.append(row)

    def commit(self) -> PartSummary:
        """Finish the files and make them the result of the partition, unless another attempt was first."""
        datasets: dict[str, list[dict[str, Any]]] = {}
        for folder, writer in self._writers.items():
            dataset = str(Path(folder).parent)
            datasets.setdefault(dataset, []).extend(finish_series(writer, self._attempt / folder))
        write_rows(self._attempt / ITEMS_NAME, self._accounts, ACCOUNT_SCHEMA)
        write_rows(self._attempt / CLIPS_NAME, self._clips, CLIP_SCHEMA)
        (self._attempt / PART_NAME).write_text(json.dumps({"datasets": datasets, "text_width": self._text_width}))
        self._target.parent.mkdir(exist_ok=True)
        try:
            self._attempt.rename(self._target)
        except OSError:
            if not (self._target / PART_NAME).is_file():
                raise
            shutil.rmtree(self._attempt)  # a speculative or orphaned twin has written the same
        kept = sum(row.fate == "kept" for row in self._accounts)
        return PartSummary(self._part, len(self._accounts), kept, sum(self._samples.values()))

    def abort(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._attempt, ignore_errors=True)


def mds_writer(folder: Path, config: ShardConfig) -> Any:
    """A writer of samples into shards in ``folder``."""
    from streaming import MDSWriter  # takes seconds to import; the driver does without

    return MDSWriter(columns=COLUMNS, out=str(folder), hashes=HASHES, size_limit=config.size_limit_mb << 20, max_workers=1)


def finish_series(writer: Any, folder: Path) -> list[dict[str, Any]]:
    """Finish the shards in ``folder`` and return what an index says of them, their names relative to the dataset's folder."""
    writer.finish()
    index = folder / "index.json"
    shards = json.loads(index.read_text())["shards"]
    index.unlink()  # a series is no dataset: nothing should take it for one
    for shard in shards:
        shard["raw_data"]["basename"] = f"{folder.name}/{shard['raw_data']['basename']}"
    return [shard for shard in shards if shard["samples"]]  # a sample over the limit may leave an empty one


def write_rows(path: Path, rows: Iterable[Any], schema: pa.Schema) -> None:
    """Write dataclasses as a parquet file."""
    pq.write_table(pa.Table.from_pylist([vars(row) for row in rows], schema), path)


def rows_of(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, some thousands in memory."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH, columns=columns):
            yield from batch.to_pylist()


class TableWriter:
    """A parquet file that grows by rows; some thousands wait in memory, and become a row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema, self._rows = schema, list[dict[str, Any]]()
        self._writer = pq.ParquetWriter(path, schema)

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._flush()
        finally:
            self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows.clear()


def place_of(series: str) -> tuple[int, bool]:
    """(part, whether it was set aside) of a series, by the name of its folder."""
    found = re.fullmatch(rf"part-(\d+)({ASIDE})?", series)
    if not found:
        raise RuntimeError(f"no folder of ours: {series}")
    return int(found[1]), found[2] is not None


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def series_name(part: int, aside: bool) -> str:
    """The folder of a part's shards in a dataset."""
    return part_name(part) + (ASIDE if aside else "")


def missing_parts(workspace: Path, parts: range) -> list[int]:
    """The partitions that no earlier run has committed."""
    return [part for part in parts if not (workspace / "parts" / part_name(part) / PART_NAME).is_file()]


def drop_attempts(workspace: Path) -> None:
    """Remove what tasks of an earlier run have left.

    Some may still be at it: first everything is moved away, so that none can commit what is being removed around it.
    """
    doomed = workspace / f"doomed-{uuid.uuid4().hex}"
    with contextlib.suppress(FileNotFoundError):
        (workspace / "attempts").rename(doomed)
    for folder in workspace.glob("doomed-*"):
        shutil.rmtree(folder, ignore_errors=True)


def gather(workspace: Path, parts: range, progress: Callable[[], object]) -> None:
    """Put the committed parts together in ``finished/pool``, calling ``progress`` for each. Can be interrupted and repeated."""
    pool = workspace / "finished" / POOL_NAME
    pool.mkdir(parents=True, exist_ok=True)
    with TableWriter(pool / SHARDS_NAME, SHARD_SCHEMA) as index:
        gather_shards(workspace, parts, index, progress)
    for name, columns in ((ITEMS_NAME, ACCOUNT_SCHEMA), (CLIPS_NAME, CLIP_SCHEMA)):
        with TableWriter(pool / name, columns) as writer:
            for part in parts:
                for row in rows_of(workspace / "parts" / part_name(part) / name):
                    writer.add(row)


def gather_shards(workspace: Path, parts: range, index: "TableWriter", progress: Callable[[], object]) -> None:
    """Move the shards of the committed parts, not their tables, to ``finished/pool``. Can be interrupted and repeated."""
    pool = workspace / "finished" / POOL_NAME
    for part in parts:
        folder = workspace / "parts" / part_name(part)
        summary = json.loads((folder / PART_NAME).read_text())
        for dataset, shards in summary["datasets"].items():
            add_shards(index, dataset, shards, summary["text_width"])
            (pool / dataset).mkdir(parents=True, exist_ok=True)
            for aside in (False, True):
                series = folder / dataset / series_name(part, aside)
                if series.exists():
                    series.rename(pool / dataset / series.name)
        progress()


def add_shards(index: "TableWriter", dataset: str, shards: list[dict[str, Any]], text_width: int) -> None:
    """Note shards of a series in the pool's table; ``shards`` as an index has them."""
    for shard in shards:
        series = Path(shard["raw_data"]["basename"]).parent.name
        index.add(vars(ShardRow(dataset, series, shard["samples"], text_width, json.dumps(shard))))


@dataclasses.dataclass(frozen=True)
class PoolIndex:
    """What a pool's table of shards says. Nothing of it is held in memory."""

    pool: Path

    def datasets(self) -> list[str]:
        return sorted({row["dataset"] for row in rows_of(self.pool / SHARDS_NAME, ["dataset"])})

    def text_width(self) -> int:
        """0 where no sample is."""
        return next((row["text_width"] for row in rows_of(self.pool / SHARDS_NAME, ["text_width"])), 0)

    def series(self, dataset: str, wanted: Container[str] | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(folder of a series, its shards in order) of the wanted ones, or of all."""
        own = (row for row in rows_of(self.pool / SHARDS_NAME) if row["dataset"] == dataset)
        for series, rows in itertools.groupby(own, lambda row: row["series"]):
            if wanted is None or series in wanted:
                yield series, [json.loads(row["entry"]) for row in rows]


def copy_samples(
    source: Path, series: list[dict[str, Any]], positions: np.ndarray, folder: Path, config: ShardConfig
) -> list[dict[str, Any]]:
    """Copy the samples at ``positions`` (ascending) of a series of shards in ``source`` into new shards in ``folder``.

    Returns:
        what an index says of the new ones.
    """
    from streaming.base.format import reader_from_json

    begin, writer = 0, mds_writer(folder, config)
    for shard in series:
        end = begin + shard["samples"]
        chosen = positions[(positions >= begin) & (positions < end)] - begin
        if len(chosen):
            reader = reader_from_json(str(source), "", shard)
            for position in chosen.tolist():
                writer.write(reader.get_item(position))
        begin = end
    return finish_series(writer, folder)


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system has none. The copy appears whole."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    partial = f"{target}.partial"
    shutil.copy2(source, partial)
    os.replace(partial, target)  # noqa: PTH105


def read_sample(pool: Path, dataset: str, series: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """The sample of a clip (a row of ``clips.parquet``) in a data set such as "stage1/videos", from the pool.

    Args:
        series: the shards of its series.
    """
    from streaming.base.format import reader_from_json

    position = row["position"]
    for shard in series:
        if position < shard["samples"]:
            return reader_from_json(str(pool / dataset), "", shard).get_item(position)
        position -= shard["samples"]
    raise ValueError(f"{dataset} has no sample {row['position']} in {series_name(row['part'], row['aside'])}")
