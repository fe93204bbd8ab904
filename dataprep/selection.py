"""The pool -> data sets: which of the decoded clips are trained on. Thresholds can change without decoding anything again.

    OUTPUT/pool/     every decoded clip: shards, and the tables of items and clips as they came out of decoding
    OUTPUT/          the selection: items.parquet, rejects.parquet, clips.parquet, job.json, stage1/videos/ ...

A shard whose clips are all selected appears in its data set as a second name of the same file. From a shard with some of them
only, these are copied into a new one. Clips that fail a threshold when they are decoded go into shards of their own, so that this
is rare.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataprep import shards
from dataprep.duplicates import MAX_DISTANCE, near_duplicates
from dataprep.encode import StageConfig
from dataprep.scores import Scores
from dataprep.shards import Outcome, ShardConfig
from model import config
from model.config import UserError
from model.data.schema import Kind, Manifest

INDEX_VERSION = 2  # of the MDS format
KINDS: tuple[Kind, ...] = ("videos", "images")
PICKED = "-picked"  # ends the name of a folder with shards copied clip by clip
BATCH = 1 << 16  # rows


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Thresholds on the scores of clips and images (``dataprep/scores.py``); docs/data.md has the reason for each."""

    min_brightness: float = 0.03
    min_motion: float = 0.001  # of videos
    min_sharpness: float = 0.6
    max_letterbox: float = 0.1
    duplicate_bits: int | None = (
        3  # hashes that differ in so many of 64 bits, or fewer, are of the same picture; null: not looked for
    )

    def __post_init__(self) -> None:
        limits = (self.min_brightness, self.min_motion, self.min_sharpness, self.max_letterbox)
        if not all(0 <= limit <= 1 for limit in limits):
            raise ValueError("thresholds are shares between 0 and 1")
        if self.duplicate_bits is not None and not 0 <= self.duplicate_bits <= MAX_DISTANCE:
            raise ValueError(f"duplicate_bits must lie between 0 and {MAX_DISTANCE}, or be null")


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a clip is not selected."""

    reason: str  # one of a few words, counted in the report
    detail: str


def fault(kind: str, scores: Scores, select: SelectConfig) -> Fault | None:
    """The first threshold that a "video" or "image" fails; None if it passes them all."""
    if scores.brightness < select.min_brightness:
        return Fault("dark", f"brightness {scores.brightness:.4f} is less than {select.min_brightness:g}")
    if kind == "video" and scores.motion < select.min_motion:
        return Fault("still", f"motion {scores.motion:.5f} is less than {select.min_motion:g}")
    if scores.sharpness < select.min_sharpness:
        return Fault("blurred", f"sharpness {scores.sharpness:.3f} is less than {select.min_sharpness:g}")
    if scores.letterbox > select.max_letterbox:
        return Fault("letterboxed", f"black bars take {scores.letterbox:.3f} of a side, more than {select.max_letterbox:g}")
    return None


def select(
    finished: Path,
    select_config: SelectConfig,
    stages: tuple[StageConfig, ...],
    shard_config: ShardConfig,
    manifest: Callable[[Kind, StageConfig, int, int], Manifest],
    job: dict[str, Any],
) -> Outcome:
    """Make the data sets and tables of ``finished`` from its pool. Can be interrupted and repeated.

    Args:
        manifest: (kind, stage, samples, text width) -> the manifest of a data set.
        job: what made the pool, for ``job.json``.

    Raises:
        UserError: nothing was kept.
    """
    pool = finished / shards.POOL_NAME
    for path in finished.iterdir():  # of an interrupted run
        if path != pool:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    rows = pq.read_table(pool / shards.CLIPS_NAME)
    faults = _judge(rows, select_config)
    kept = np.array([fault is None for fault in faults], bool)
    _write_clips(rows, faults, finished)
    outcome = _write_items(rows, faults, finished)
    if not outcome.kept:
        reasons = Counter(outcome.reasons) + Counter(outcome.clip_reasons)
        told = ", ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        inputs = outcome.filtered + outcome.rejected
        raise UserError(f"nothing was kept of {inputs} inputs: {told}; {finished / shards.REJECTS_NAME} has the details")

    pool_index = shards.PoolIndex.read(pool)
    wanted = _wanted(rows, kept)
    samples: dict[str, int] = {}
    for stage in stages:
        for kind in KINDS:
            dataset = f"{stage.name}/{kind}"
            index = _pick(finished, dataset, pool_index.series(dataset), wanted, shard_config)
            if index:
                samples[dataset] = sum(shard["samples"] for shard in index)
                manifest(kind, stage, samples[dataset], pool_index.text_width).write(finished / dataset)
                (finished / dataset / "index.json").write_text(
                    json.dumps({"version": INDEX_VERSION, "shards": index}, sort_keys=True)
                )
    outcome = dataclasses.replace(outcome, samples=samples)
    _check(outcome, rows, kept, stages)
    tree = {**job, "select": config.to_tree(select_config), "outcome": dataclasses.asdict(outcome)}
    (finished / shards.JOB_NAME).write_text(json.dumps(tree, indent=2) + "\n")
    return outcome


def _judge(rows: pa.Table, select_config: SelectConfig) -> list[Fault | None]:
    """What is wrong with each clip. Duplicates are looked for among those that pass everything else."""
    names = [field.name for field in dataclasses.fields(Scores)]
    faults: list[Fault | None] = []
    for batch in rows.select(["kind", *names]).to_batches(max_chunksize=BATCH):
        for row in batch.to_pylist():
            faults.append(fault(row.pop("kind"), Scores(**row), select_config))
    if select_config.duplicate_bits is None:
        return faults
    kinds, keys = rows["kind"].to_numpy(zero_copy_only=False), rows["key"]
    hashes = rows["phash"].to_numpy()
    sources = rows["item"].combine_chunks().dictionary_encode().indices.to_numpy() if len(rows) else np.zeros(0, np.int32)
    for kind in ("video", "image"):  # a video is not the duplicate of its cover picture
        chosen = np.array([n for n, found in enumerate(faults) if found is None and kinds[n] == kind], np.int64)
        originals = near_duplicates(hashes[chosen], sources[chosen], select_config.duplicate_bits)
        for n in np.flatnonzero(originals >= 0):
            first = int(chosen[originals[n]])
            bits = int(np.bitwise_count(hashes[chosen[n]] ^ hashes[first]))
            faults[int(chosen[n])] = Fault("near duplicate", f"of {keys[first].as_py()}, {bits} bits apart")
    return faults


def _write_clips(rows: pa.Table, faults: list[Fault | None], finished: Path) -> None:
    fates = pa.array(["filtered" if found else "kept" for found in faults], pa.string())
    reasons = pa.array([found.reason if found else "" for found in faults], pa.string())
    details = pa.array([found.detail if found else "" for found in faults], pa.string())
    table = rows.append_column("fate", fates).append_column("reason", reasons).append_column("detail", details)
    pq.write_table(table, finished / shards.CLIPS_NAME)


def _write_items(rows: pa.Table, faults: list[Fault | None], finished: Path) -> Outcome:
    """Write what became of each item; the number of samples is not known yet."""
    items = rows["item"].to_pylist()
    kept = Counter(item for item, found in zip(items, faults, strict=True) if found is None)
    first_fault: dict[str, Fault] = {}
    for item, found in zip(items, faults, strict=True):
        if found is not None:
            first_fault.setdefault(item, found)
    fates, reasons = Counter[str](), Counter[str]()
    path = finished / shards.POOL_NAME / shards.ITEMS_NAME
    with (
        pq.ParquetFile(path) as source,
        pq.ParquetWriter(finished / shards.ITEMS_NAME, shards.ACCOUNT_SCHEMA) as all_items,
        pq.ParquetWriter(finished / shards.REJECTS_NAME, shards.ACCOUNT_SCHEMA) as rejects,
    ):
        for batch in source.iter_batches(batch_size=BATCH):
            judged = []
            for row in batch.to_pylist():
                if row["fate"] == "kept":
                    row["clips_kept"] = kept[row["key"]]
                    if not row["clips_kept"]:
                        found = first_fault[row["key"]]
                        row |= {"fate": "filtered", "reason": found.reason, "detail": found.detail}
                else:
                    reasons[row["reason"]] += 1
                fates[row["fate"]] += 1
                judged.append(row)
            all_items.write_table(pa.Table.from_pylist(judged, shards.ACCOUNT_SCHEMA))
            lost = [row for row in judged if row["fate"] != "kept"]
            rejects.write_table(pa.Table.from_pylist(lost, shards.ACCOUNT_SCHEMA))
    clip_reasons = Counter(found.reason for found in faults if found is not None)
    return Outcome(fates["kept"], fates["filtered"], fates["rejected"], dict(reasons), sum(kept.values()), dict(clip_reasons), {})


def _wanted(rows: pa.Table, kept: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """(kind, folder of a series) -> the positions in it that are selected, ascending."""
    found: dict[tuple[str, str], list[int]] = {}
    columns = [rows[name].to_pylist() for name in ("kind", "part", "aside", "position")]
    for kind, part, aside, position, wanted in zip(*columns, kept.tolist(), strict=True):
        if wanted:
            found.setdefault((f"{kind}s", shards.series_name(part, aside)), []).append(position)
    return {series: np.array(positions) for series, positions in found.items()}


def _pick(
    finished: Path,
    dataset: str,
    pool_series: dict[str, list[dict[str, Any]]],
    wanted: dict[tuple[str, str], np.ndarray],
    shard_config: ShardConfig,
) -> list[dict[str, Any]]:
    """Fill the folder of ``dataset`` with the selected samples, and return its index."""
    source, target, kind = finished / shards.POOL_NAME / dataset, finished / dataset, dataset.rpartition("/")[2]
    index: list[dict[str, Any]] = []
    for series, series_shards in pool_series.items():
        positions = wanted.get((kind, series), np.zeros(0, np.int64))
        begin, picked = 0, []
        for shard in series_shards:
            end = begin + shard["samples"]
            chosen = positions[(positions >= begin) & (positions < end)]
            if len(chosen) == shard["samples"]:
                (target / series).mkdir(parents=True, exist_ok=True)
                shards.link(source / shard["raw_data"]["basename"], target / shard["raw_data"]["basename"])
                index.append(shard)
            else:
                picked.append(chosen)
            begin = end
        if any(map(len, picked)):
            index += shards.copy_samples(source, series_shards, np.concatenate(picked), target / (series + PICKED), shard_config)
    return index


def _check(outcome: Outcome, rows: pa.Table, kept: np.ndarray, stages: tuple[StageConfig, ...]) -> None:
    """Nothing may be lost on the way, and nothing counted twice."""
    if outcome.clips_kept + outcome.clips_filtered != len(rows):
        raise RuntimeError(f"{len(rows)} clips, but {outcome.clips_kept} kept and {outcome.clips_filtered} filtered")
    kinds = Counter(kind for kind, keep in zip(rows["kind"].to_pylist(), kept.tolist(), strict=True) if keep)
    for stage in stages:
        for kind in KINDS:
            found, expected = outcome.samples.get(f"{stage.name}/{kind}", 0), kinds[kind.removesuffix("s")]
            if found != expected:
                raise RuntimeError(f"{stage.name}/{kind}: {found} samples of {expected} clips")
