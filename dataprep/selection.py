"""The pool -> data sets: which of the decoded clips are trained on. Thresholds can change without decoding anything again.

    OUTPUT/pool/     every decoded clip: shards, and the tables of items and clips as they came out of decoding
    OUTPUT/          the selection: items.parquet, rejects.parquet, clips.parquet, job.json, stage1/videos/ ...

A shard whose clips are all selected appears in its data set as a second name of the same file. From a shard with some of them
only, these are copied into a new one. Clips that fail a threshold when they are decoded go into shards of their own, so that this
is rare.
"""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dataprep import disk, shards
from dataprep.duplicates import MAX_DISTANCE, near_duplicates
from dataprep.encode import StageConfig
from dataprep.scores import Scores
from dataprep.shards import Outcome, ShardConfig
from model import config
from model.data.schema import Kind, Manifest
from model.errors import UserError

INDEX_VERSION = 2  # of the MDS format
KINDS: tuple[Kind, ...] = ("videos", "images")
PICKED = "-picked"  # ends the name of a folder with shards copied clip by clip
BATCH = 1 << 12  # rows
JUDGED_SCHEMA = pa.schema([*shards.CLIP_SCHEMA, *(pa.field(name, pa.string()) for name in ("fate", "reason", "detail"))])
KEPT = {"fate": "kept", "reason": "", "detail": ""}
SCORES = [field.name for field in dataclasses.fields(Scores)]


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
    max_text_area: float | None = None  # null: whatever looks.text_area found
    min_aesthetic: float | None = None  # on the scale of the classifier looks.aesthetic

    def __post_init__(self) -> None:
        limits = (self.min_brightness, self.min_motion, self.min_sharpness, self.max_letterbox, self.max_text_area or 0)
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
    if select.max_text_area is not None and scores.text_area is not None and scores.text_area > select.max_text_area:
        return Fault("text", f"text takes {scores.text_area:.3f} of the picture, more than {select.max_text_area:g}")
    if select.min_aesthetic is not None and scores.aesthetic is not None and scores.aesthetic < select.min_aesthetic:
        return Fault("unaesthetic", f"score {scores.aesthetic:.3f} is less than {select.min_aesthetic:g}")
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
    pool_index = shards.PoolIndex(pool)
    wanted = _Wanted(pool_index)
    outcome = _judge(finished, select_config, wanted)
    if not outcome.kept:
        reasons = Counter(outcome.reasons) + Counter(outcome.clip_reasons)
        told = ", ".join(f"{reason} ({count})" for reason, count in sorted(reasons.items()))
        inputs = outcome.filtered + outcome.rejected
        raise UserError(f"nothing was kept of {inputs} inputs: {told}; {finished / shards.REJECTS_NAME} has the details")

    samples: dict[str, int] = {}
    with _bar("select", len(stages) * wanted.counts.total(), "samples") as bar:
        for stage in stages:
            for kind in KINDS:
                dataset = f"{stage.name}/{kind}"
                found = _pick(finished, dataset, pool_index.series(dataset), wanted, shard_config, bar.update)
                if found != wanted.counts[kind]:
                    raise RuntimeError(f"{dataset}: {found} samples of {wanted.counts[kind]} clips")
                if found:
                    samples[dataset] = found
                    manifest(kind, stage, found, pool_index.text_width()).write(finished / dataset)
    outcome = dataclasses.replace(outcome, samples=samples)
    tree = {**job, "select": config.to_tree(select_config), "outcome": dataclasses.asdict(outcome)}
    (finished / shards.JOB_NAME).write_text(json.dumps(tree, indent=2) + "\n")
    return outcome


def _bar(title: str, total: int, unit: str) -> "tqdm[Any]":
    """A progress bar of what is over in a second where there are few."""
    return tqdm(total=total, desc=title, unit=f" {unit}", leave=False, delay=1)


class _Wanted:
    """Which samples of the series of shards are selected."""

    def __init__(self, index: shards.PoolIndex) -> None:
        first = {dataset.rpartition("/")[2]: dataset for dataset in reversed(index.datasets())}  # all stages have the same
        parts = 1 + max((shards.place_of(name)[0] for dataset in first.values() for name, _ in index.series(dataset)), default=-1)
        self._begins, self._samples = (disk.array(parts * len(KINDS) * 2, np.int64) for _ in range(2))
        self.counts: Counter[str] = Counter()
        total = 0
        for kind, dataset in first.items():
            for name, found in index.series(dataset):
                place, samples = self._place(kind, *shards.place_of(name)), sum(shard["samples"] for shard in found)
                self._begins[place], self._samples[place] = total, samples
                total += samples
        self._selected = disk.array(total, np.bool_)

    @staticmethod
    def _place(kind: str, part: int, aside: bool) -> int:
        return (part * len(KINDS) + KINDS.index(kind)) * 2 + aside

    def add(self, clip: dict[str, Any]) -> None:
        """Select a clip (a row of ``clips.parquet``)."""
        kind = f"{clip['kind']}s"
        place = self._place(kind, clip["part"], clip["aside"])
        if not 0 <= clip["position"] < self._samples[place]:
            raise RuntimeError(f"{clip['key']}: no sample {clip['position']} in its shards")
        self._selected[self._begins[place] + clip["position"]] = True
        self.counts[kind] += 1

    def positions(self, kind: str, series: str) -> np.ndarray:
        """The selected ones of a series, ascending."""
        place = self._place(kind, *shards.place_of(series))
        begin = self._begins[place]
        return np.flatnonzero(self._selected[begin : begin + self._samples[place]])


class _IndexWriter:
    """Writes the index of a data set, shard by shard; none is left where there is no shard."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "index.json"
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.samples = 0

    def add(self, found: list[dict[str, Any]]) -> None:
        for shard in found:
            self._file.write((", " if self.samples else "") + json.dumps(shard, sort_keys=True))
            self.samples += shard["samples"]

    def close(self) -> None:
        with self._file:
            if self.samples:
                self._file.seek(0)
                with self._path.open("w", encoding="utf-8") as index:
                    index.write('{"shards": [')
                    shutil.copyfileobj(self._file, index)
                    index.write(f'], "version": {INDEX_VERSION}}}')


def _judge(finished: Path, select_config: SelectConfig, wanted: _Wanted) -> Outcome:
    """Write what becomes of each item and each clip, and select clips; the number of samples is not known yet.

    The clips of the pool come in the order of its items, so both tables are gone through side by side, twice: for the thresholds,
    and when it is known which clips are near duplicates."""
    pool = finished / shards.POOL_NAME
    duplicates = _duplicates(pool / shards.CLIPS_NAME, select_config)
    fates, reasons, clip_reasons, clips_kept = Counter[str](), Counter[str](), Counter[str](), 0
    clip_rows = enumerate(shards.rows_of(pool / shards.CLIPS_NAME))
    with (
        _bar("judge", pq.read_metadata(pool / shards.CLIPS_NAME).num_rows, "clips") as bar,
        shards.TableWriter(finished / shards.ITEMS_NAME, shards.ACCOUNT_SCHEMA) as items,
        shards.TableWriter(finished / shards.REJECTS_NAME, shards.ACCOUNT_SCHEMA) as rejects,
        shards.TableWriter(finished / shards.CLIPS_NAME, JUDGED_SCHEMA) as clips,
    ):
        for account in shards.rows_of(pool / shards.ITEMS_NAME):
            first: Fault | None = None
            for _ in range(account["clips"]):
                number, clip = next(clip_rows)
                if clip["item"] != account["key"]:
                    raise RuntimeError(f"the clips are not in the order of the items, at {account['key']}")
                found = (duplicates and duplicates.fault(number, clip)) or _fault(clip, select_config)
                if found is None:
                    wanted.add(clip)
                    account["clips_kept"] += 1
                else:
                    first = first or found
                    clip_reasons[found.reason] += 1
                told = {"fate": "filtered", "reason": found.reason, "detail": found.detail} if found else KEPT
                clips.add({**clip, **told})
            bar.update(account["clips"])
            clips_kept += account["clips_kept"]
            if account["fate"] != "kept":
                reasons[account["reason"]] += 1
            elif first is not None and not account["clips_kept"]:
                account |= {"fate": "filtered", "reason": first.reason, "detail": first.detail}
            fates[account["fate"]] += 1
            items.add(account)
            if account["fate"] != "kept":
                rejects.add(account)
    if next(clip_rows, None):
        raise RuntimeError("there are clips of no item")
    return Outcome(fates["kept"], fates["filtered"], fates["rejected"], dict(reasons), clips_kept, dict(clip_reasons), {})


class _Duplicates:
    """The clips that are near duplicates of earlier ones. Asked for in order, each can name its original."""

    def __init__(self, hashes: np.ndarray, originals: np.ndarray) -> None:
        self._hashes, self._originals = hashes, originals
        self._is_named = disk.array(len(originals), np.bool_)
        for begin in range(0, len(originals), BATCH):
            found = originals[begin : begin + BATCH]
            self._is_named[found[found >= 0]] = True
        self._keys = disk.connect()
        self._keys.execute("CREATE TABLE keys (number INTEGER PRIMARY KEY, key TEXT)")

    def fault(self, number: int, clip: dict[str, Any]) -> Fault | None:
        if self._is_named[number]:
            self._keys.execute("INSERT INTO keys VALUES (?, ?)", (number, clip["key"]))
        original = int(self._originals[number])
        if original < 0:
            return None
        ((key,),) = self._keys.execute("SELECT key FROM keys WHERE number = ?", (original,))
        bits = int(np.bitwise_count(self._hashes[number] ^ self._hashes[original]))
        return Fault("near duplicate", f"of {key}, {bits} bits apart")


def _duplicates(clips: Path, select_config: SelectConfig) -> _Duplicates | None:
    """Near duplicates among the clips that pass everything else; a video is not the duplicate of its cover picture. None: not
    looked for."""
    if select_config.duplicate_bits is None:
        return None
    with pq.ParquetFile(clips) as file:
        count = file.metadata.num_rows
    hashes, originals = disk.array(count, np.uint64), disk.array(count, np.int64, fill=-1)
    sources, passed = disk.array(count, np.int64), disk.array(count, np.int8)
    source, item = 0, None
    rows = tqdm(shards.rows_of(clips), "look for duplicates", total=count, unit=" clips", leave=False, delay=1)
    for number, clip in enumerate(rows):
        source, item = source + (clip["item"] != item), clip["item"]
        hashes[number], sources[number] = clip["phash"], source
        if _fault(clip, select_config) is None:
            passed[number] = 1 + KINDS.index(f"{clip['kind']}s")
    for kind in range(len(KINDS)):
        places, chosen = disk.array(count, np.int64), 0
        for begin in range(0, count, BATCH):
            found = begin + np.flatnonzero(passed[begin : begin + BATCH] == 1 + kind)
            places[chosen : chosen + len(found)] = found
            chosen += len(found)
        own, whose = disk.array(chosen, np.uint64), disk.array(chosen, np.int64)
        for begin in range(0, chosen, BATCH):
            part = slice(begin, min(chosen, begin + BATCH))
            own[part], whose[part] = hashes[places[part]], sources[places[part]]
        near = near_duplicates(own, whose, select_config.duplicate_bits)
        for begin in range(0, chosen, BATCH):
            found = begin + np.flatnonzero(near[begin : begin + BATCH] >= 0)
            originals[places[found]] = places[near[found]]
    return _Duplicates(hashes, originals)


def _fault(clip: dict[str, Any], select_config: SelectConfig) -> Fault | None:
    return fault(clip["kind"], Scores(**{name: clip[name] for name in SCORES}), select_config)


def _pick(
    finished: Path,
    dataset: str,
    pool_series: Iterator[tuple[str, list[dict[str, Any]]]],
    wanted: _Wanted,
    shard_config: ShardConfig,
    advance: Callable[[int], object],
) -> int:
    """Fill the folder of ``dataset`` with the selected samples and their index, and return their number; ``advance`` is told
    how many more there are."""
    source, target, kind = finished / shards.POOL_NAME / dataset, finished / dataset, dataset.rpartition("/")[2]
    with contextlib.closing(_IndexWriter(target)) as index:
        for series, series_shards in pool_series:
            positions = wanted.positions(kind, series)
            begin, picked = 0, []
            for shard in series_shards:
                end = begin + shard["samples"]
                chosen = positions[(positions >= begin) & (positions < end)]
                if len(chosen) == shard["samples"]:
                    (target / series).mkdir(parents=True, exist_ok=True)
                    shards.link(source / shard["raw_data"]["basename"], target / shard["raw_data"]["basename"])
                    index.add([shard])
                else:
                    picked.append(chosen)
                begin = end
            if any(map(len, picked)):
                found = shards.copy_samples(
                    source, series_shards, np.concatenate(picked), target / (series + PICKED), shard_config
                )
                index.add(found)
            advance(len(positions))
        return index.samples
