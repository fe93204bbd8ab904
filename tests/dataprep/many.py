"""``python many.py ITEMS FOLDER``: the driver's part of a job of so many items, and of a second one that adds a tenth.

Tasks are replaced by something quicker, that writes what they leave: tables, and shards that are empty files. Prints the most
memory that the driver has held, in megabytes, and the seconds that it took, for each of both jobs, as JSON.
"""

import dataclasses
import json
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataprep import ingest, report, selection, shards
from dataprep import run as job
from dataprep.clips import ClipConfig
from dataprep.encode import StageConfig, TextConfig
from dataprep.run import DataprepConfig, Work
from dataprep.shards import Account, ClipRow

PER_PART = 64
CLIPS = 2  # of an item


class Peak:
    """The most memory that is not a copy of a file, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.megabytes, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
            assert found
            self.megabytes = max(self.megabytes, int(found[1]) / 1024)


def prepare(c: DataprepConfig, work: Work, missing: list[int]) -> None:
    rng = np.random.default_rng(missing[0])
    for part in missing:
        folder = work.workspace / "parts" / shards.part_name(part)
        series = folder / "only/images" / shards.series_name(part, aside=False)
        series.mkdir(parents=True)
        (series / "shard.00000.mds").touch()
        accounts, clips = [], []
        for item in ingest.read_group(work.workspace / shards.ITEMS_NAME, part - work.parts.start):
            mark = ingest.fingerprint(item)
            accounts.append(Account(item.key, "image", item.source, "kept", clips=CLIPS, fingerprint=mark))
            for n in range(CLIPS):
                row = ClipRow(
                    key=f"{item.key}:{n}", item=item.key, kind="image", caption="words " * 12, frames=1, start_seconds=0.0
                )
                scores = {"motion": 1.0, "sharpness": 1.0, "brightness": 0.5, "phash": int(rng.integers(1 << 63))}
                clips.append(dataclasses.replace(row, part=part, position=len(clips), **scores))
        shards.write_rows(folder / shards.ITEMS_NAME, accounts, shards.ACCOUNT_SCHEMA)
        shards.write_rows(folder / shards.CLIPS_NAME, clips, shards.CLIP_SCHEMA)
        raw = {"basename": f"{series.name}/shard.00000.mds", "bytes": 0, "hashes": {"xxh64": "0" * 16}}
        shard = {
            "samples": len(clips),
            "raw_data": raw,
            "zip_data": None,
            "column_names": ["a"] * 8,
            "column_encodings": ["str"] * 8,
        }
        (folder / shards.PART_NAME).write_text(json.dumps({"datasets": {"only/images": [shard]}, "text_width": 4}))


def main(items: int, folder: Path) -> None:
    job._prepare = prepare
    job._text_revision = lambda path: "none"
    report._sheets = lambda *_: []  # there are no samples to show
    for count in (items, items + items // 10):
        with pq.ParquetWriter(folder / "m.parquet", pa.schema([("path", pa.string()), ("caption", pa.string())])) as writer:
            for begin in range(0, count, 10_000):
                rows = range(begin, min(count, begin + 10_000))
                table = {"path": [f"some/folder/image{n:08d}.png" for n in rows], "caption": ["words " * 12 for _ in rows]}
                writer.write_table(pa.table(table))
        config = DataprepConfig(
            inputs=(str(folder / "m.parquet"),),
            output=str(folder / "out"),
            stages=(StageConfig("only", 2, 2, "raw"),),
            clips=ClipConfig(frame_rate=1, clip_frames=1, min_frames=1),
            text=TextConfig("none", 1),
            select=selection.SelectConfig(),
            items_per_partition=PER_PART,
        )
        begin_time = time.monotonic()
        with Peak() as peak:
            job.run(config)
        print(json.dumps({"items": count, "megabytes": peak.megabytes, "seconds": time.monotonic() - begin_time}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
