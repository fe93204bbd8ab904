"""Finished partitions -> datasets: MDS shards that appear whole or not at all.

While a job runs, everything is in a work folder beside the output, named after what the job is to produce::

    OUTPUT.tmp-DIGEST/
      items.parquet               the list of inputs, one row group per partition
      attempts/ID/                what a running task writes
      parts/part-00007/           a finished task: its attempt, renamed
      finished/stage1/videos/...  the datasets as they are put together

A task that dies leaves an attempt that nobody reads. A job that dies leaves its parts, and the next run goes on from them. The
finished folder becomes the output by one rename.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep.encode import StageConfig
from model.config import UserError
from model.data.schema import COLUMNS, Kind, Manifest

JOB_NAME = "job.json"  # in the output: what made it
PART_NAME = "part.json"  # in a part: its shards, for the index
ITEMS_NAME = "items.parquet"  # in the output: one row per input item
REJECTS_NAME = "rejects.parquet"  # the rejected rows of it
HASHES = ["xxh64"]  # of every shard, in the index
INDEX_VERSION = 2  # of the MDS format
KINDS: tuple[Kind, ...] = ("videos", "images")


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
    fate: str  # "kept" or "rejected"
    reason: str = ""  # of a rejection, one of a few phrases
    detail: str = ""
    clips: int = 0
    source_height: int = 0  # pixels, upright
    source_width: int = 0
    seconds: float = 0.0  # decoded
    frame_rate: float = 0.0  # of the source, on average


ACCOUNT_SCHEMA = pa.schema(
    [
        (field.name, {str: pa.string(), int: pa.int32(), float: pa.float64()}[field.type])  # type: ignore[index]
        for field in dataclasses.fields(Account)
    ]
)


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """The few numbers that a task returns to the driver."""

    part: int
    items: int
    kept: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished job."""

    kept: int  # items
    reasons: dict[str, int]  # of the rejected items
    samples: dict[str, int]  # by dataset, "stage1/videos"

    @property
    def rejected(self) -> int:
        return sum(self.reasons.values())


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
        self._samples: Counter[str] = Counter()
        self._text_width = 0

    def write(self, dataset: str, sample: dict[str, Any]) -> None:
        """Add a sample (schema ``COLUMNS``) to ``dataset``, such as "stage1/videos"."""
        if dataset not in self._writers:
            from streaming import MDSWriter  # takes seconds to import; the driver does without

            folder = self._attempt / dataset
            self._writers[dataset] = MDSWriter(
                columns=COLUMNS, out=str(folder), hashes=HASHES, size_limit=self._config.size_limit_mb << 20, max_workers=1
            )
        self._writers[dataset].write(sample)
        self._samples[dataset] += 1
        self._text_width = sample["text"].shape[1]

    def account(self, row: Account) -> None:
        """Note what became of an item."""
        self._accounts.append(row)

    def commit(self) -> PartSummary:
        """Finish the files and make them the result of the partition, unless another attempt was first."""
        datasets = {}
        for dataset, writer in self._writers.items():
            writer.finish()
            index = self._attempt / dataset / "index.json"
            shards = json.loads(index.read_text())["shards"]
            index.unlink()  # a part is no dataset: nothing should take it for one
            for shard in shards:
                shard["raw_data"]["basename"] = f"{part_name(self._part)}/{shard['raw_data']['basename']}"
            datasets[dataset] = [shard for shard in shards if shard["samples"]]  # a sample over the limit may leave an empty one
        rows = [dataclasses.asdict(row) for row in self._accounts]
        pq.write_table(pa.Table.from_pylist(rows, ACCOUNT_SCHEMA), self._attempt / ITEMS_NAME)
        (self._attempt / PART_NAME).write_text(json.dumps({"datasets": datasets, "text_width": self._text_width}))
        self._target.parent.mkdir(exist_ok=True)
        try:
            self._attempt.rename(self._target)
        except OSError:
            if not (self._target / PART_NAME).is_file():
                raise
            shutil.rmtree(self._attempt)  # a speculative or orphaned twin has written the same
        kept = sum(row.fate == "kept" for row in self._accounts)
        return PartSummary(self._part, len(rows), kept, sum(self._samples.values()))

    def abort(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._attempt, ignore_errors=True)


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def workspace_of(output: Path, digest: str) -> Path:
    """The work folder of a job, on the file system of its output."""
    return output.with_name(f"{output.name}.tmp-{digest[:16]}")


@contextlib.contextmanager
def locked(workspace: Path) -> Iterator[None]:
    """Hold the work folder for this job alone; the lock goes with the process.

    Raises:
        UserError: another job is running there.
    """
    workspace.mkdir(parents=True, exist_ok=True)
    with (workspace / "lock").open("w") as lock:
        _lock_or_refuse(lock, workspace)
        yield


def missing_parts(workspace: Path, parts: int) -> list[int]:
    """The partitions that no earlier run has committed."""
    return [part for part in range(parts) if not (workspace / "parts" / part_name(part) / PART_NAME).is_file()]


def describe_output(output: Path) -> dict[str, Any] | None:
    """What made ``output``; None if nothing is there.

    Raises:
        UserError: something is there that dataprep did not write.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        job = json.loads((output / JOB_NAME).read_text(encoding="utf-8"))
        return {"digest": str(job["digest"]), "outcome": Outcome(**job["outcome"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"output: {output} exists and was not written by dataprep; choose another folder") from error


def assemble(
    workspace: Path,
    parts: int,
    stages: tuple[StageConfig, ...],
    manifest: Callable[[Kind, StageConfig, int, int], Manifest],
    job: dict[str, Any],
    progress: Callable[[], object],
) -> Outcome:
    """Put the datasets together in ``finished`` from the committed parts. Can be interrupted and repeated.

    Args:
        manifest: (kind, stage, samples, text width) -> the manifest of a dataset.
        job: what made the output, for ``job.json``.
        progress: called once per part.

    Raises:
        UserError: nothing was kept.
    """
    finished = workspace / "finished"
    finished.mkdir(exist_ok=True)
    indices: dict[str, list[dict[str, Any]]] = {f"{stage.name}/{kind}": [] for stage in stages for kind in KINDS}
    text_width, counts, outcome = 0, dict[str, int](), _merge_accounts(workspace, parts, finished)
    if not outcome.kept:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in sorted(outcome.reasons.items()))
        raise UserError(f"nothing was kept of {outcome.rejected} inputs: {reasons}; {finished / REJECTS_NAME} has the details")
    for part in range(parts):
        folder = workspace / "parts" / part_name(part)
        summary = json.loads((folder / PART_NAME).read_text())
        text_width = summary["text_width"] or text_width
        for dataset, shards in summary["datasets"].items():
            indices[dataset] += shards
            target = finished / dataset / part_name(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            if (folder / dataset).exists():
                (folder / dataset).rename(target)
        progress()
    for stage in stages:
        for kind in KINDS:
            dataset = f"{stage.name}/{kind}"
            samples = sum(shard["samples"] for shard in indices[dataset])
            if samples:
                counts[dataset] = samples
                manifest(kind, stage, samples, text_width).write(finished / dataset)
                index = {"version": INDEX_VERSION, "shards": indices[dataset]}
                (finished / dataset / "index.json").write_text(json.dumps(index, sort_keys=True))
    outcome = dataclasses.replace(outcome, samples=counts)
    (finished / JOB_NAME).write_text(json.dumps({**job, "outcome": dataclasses.asdict(outcome)}, indent=2) + "\n")
    return outcome


def swap_in(workspace: Path, output: Path) -> None:
    """Make ``finished`` the output. What was there before is replaced; the work folder goes."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        replaced = workspace / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    (workspace / "finished").rename(output)
    shutil.rmtree(workspace, ignore_errors=True)


def _merge_accounts(workspace: Path, parts: int, finished: Path) -> Outcome:
    kept, reasons = 0, Counter[str]()
    with (
        pq.ParquetWriter(finished / ITEMS_NAME, ACCOUNT_SCHEMA) as items,
        pq.ParquetWriter(finished / REJECTS_NAME, ACCOUNT_SCHEMA) as rejects,
    ):
        for part in range(parts):
            table = pq.read_table(workspace / "parts" / part_name(part) / ITEMS_NAME)
            rejected = table.filter(pa.compute.equal(table["fate"], "rejected"))
            items.write_table(table)
            rejects.write_table(rejected)
            kept += len(table) - len(rejected)
            reasons.update(rejected["reason"].to_pylist())
    return Outcome(kept, dict(reasons), {})


def _lock_or_refuse(lock: TextIO, workspace: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another dataprep job is writing to {workspace}") from error
    lock.write(f"{os.getpid()}\n")
    lock.flush()
