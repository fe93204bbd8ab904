"""What the tests of whole jobs share: reading an output back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from streaming import LocalDataset
from streaming.base.hashing import get_hash

from dataprep import shards
from dataprep.shards import PoolIndex
from model.data.schema import COLUMNS, Manifest


def content(output: Path) -> dict[str, dict[str, bytes]]:
    """dataset -> key -> everything in the sample; nothing may be there twice."""
    found: dict[str, dict[str, bytes]] = {}
    for index in output.rglob("index.json"):
        rows = LocalDataset(str(index.parent))
        samples = {row["key"]: _bytes(row) for row in rows}
        assert len(samples) == len(rows) == Manifest.read(index.parent).num_samples
        found[str(index.parent.relative_to(output))] = samples
    return found


def pool(output: Path) -> dict[str, dict[str, bytes]]:
    """The same of the pool, each sample read where the table of clips says that it is; nothing else may lie there."""
    folder = output / "pool"
    index, rows = PoolIndex(folder), pq.read_table(folder / "clips.parquet").to_pylist()
    found: dict[str, dict[str, bytes]] = {}
    files = {folder / name for name in ("items.parquet", "clips.parquet", shards.SHARDS_NAME)}
    for dataset in index.datasets():
        series = dict(index.series(dataset))
        entries = [entry for shards_of_it in series.values() for entry in shards_of_it]
        kind = dataset.rpartition("/")[2].removesuffix("s")
        samples = {}
        for row in rows:
            if row["kind"] == kind:
                own = series[shards.series_name(row["part"], row["aside"])]
                samples[row["key"]] = _bytes(shards.read_sample(folder, dataset, own, row))
        assert len(samples) == sum(row["kind"] == kind for row in rows) == sum(entry["samples"] for entry in entries)
        assert all(key.encode() in data for key, data in samples.items())
        found[dataset] = samples
        for entry in entries:
            path = folder / dataset / entry["raw_data"]["basename"]
            assert get_hash("xxh64", path.read_bytes()) == entry["raw_data"]["hashes"]["xxh64"]
            files.add(path)
    assert {path for path in folder.rglob("*") if path.is_file()} == files
    return {dataset: samples for dataset, samples in found.items() if samples}


def tables(output: Path) -> tuple[list[dict[str, Any]], ...]:
    """Items, rejects and clips, but for where in the pool they lie."""
    places = {"part", "position", "aside"}
    found = [pq.read_table(output / f"{name}.parquet") for name in ("items", "rejects", "clips")]
    return tuple([{name: row[name] for name in row.keys() - places} for row in table.to_pylist()] for table in found)


def made_by(output: Path) -> dict[str, Any]:
    """job.json, but for the work folder, and how it was asked for."""
    job = json.loads((output / "job.json").read_text())
    return {name: value for name, value in job.items() if name not in ("workspace", "config")}


def same(one: Path, other: Path) -> None:
    """Both hold the same samples, made by the same, and the same accounts in the same order."""
    assert content(one) == content(other)
    assert pool(one) == pool(other)
    assert tables(one) == tables(other)
    assert made_by(one) == made_by(other)


def _bytes(row: dict[str, Any]) -> bytes:
    return b"|".join(np.asarray(row[name]).tobytes() for name in sorted(COLUMNS)) + row["key"].encode()
