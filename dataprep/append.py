"""A second run over the same output: what is new or changed is decoded, and the rest taken from the pool as it is.

Inputs are told apart by their fingerprints (``ingest.fingerprint``). Shards of the pool whose clips are all still wanted are
given second names. From the others the clips that are left are copied into new ones, so that nothing of a removed input stays.
Tables come in the order of the new list, as if everything had been prepared at once: near duplicates are judged in that order.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np

from dataprep import disk, ingest, shards
from dataprep.disk import DiskSet
from dataprep.ingest import Item
from dataprep.shards import PoolIndex, ShardConfig

LISTING_NAME = "listing.parquet"  # in the work folder: all inputs; items.parquet then has those to be prepared


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a new list of inputs differs from the one that a pool was made from."""

    new: int  # items to be prepared: new, or changed
    same: int
    gone: int  # of the pool's items, removed or changed

    @property
    def replaces_most(self) -> bool:
        return self.gone > self.same


def split(listing: Path, pool: Path, todo: Path, items_per_group: int, again: Set[str]) -> Plan:
    """Write those items of ``listing`` that ``pool`` does not have, or rejected for a reason among ``again``, to ``todo``, a list
    of its own."""
    counts = {"same": 0, "new": 0}
    with contextlib.closing(DiskSet()) as known, contextlib.closing(DiskSet()) as met:
        rows = 0
        for row in shards.rows_of(pool / shards.ITEMS_NAME, ["fingerprint", "reason"]):
            if row["reason"] not in again:
                rows += 1
                known.add(row["fingerprint"])

        def missing() -> Iterator[Item]:
            for item in ingest.read_items(listing):
                found = ingest.fingerprint(item)
                if found in known:
                    counts["same"] += met.add(found)
                else:
                    yield item

        counts["new"], _ = ingest.write_items(missing(), todo, items_per_group)
    return Plan(counts["new"], counts["same"], rows - counts["same"])


def first_free_part(pool: Path) -> int:
    """A number from which on no part of ``pool`` is named."""
    rows = shards.rows_of(pool / shards.SHARDS_NAME, ["series"])
    return 1 + max((shards.place_of(row["series"])[0] for row in rows), default=-1)


def merge(workspace: Path, pool: Path, parts: range, config: ShardConfig, progress: Callable[[], object]) -> None:
    """Put the committed ``parts`` and what is still wanted of an output's ``pool`` together in ``finished/pool``.

    Can be interrupted and repeated; ``pool`` stays as it is.
    """
    target = workspace / "finished" / shards.POOL_NAME
    target.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(_Tables(workspace / LISTING_NAME)) as tables:
        for part in parts:
            tables.add(workspace / "parts" / shards.part_name(part))
        stale = tables.add(pool)
        tables.index_clips()
        moved = {part: parts.stop + n for n, part in enumerate(sorted(stale))}
        with shards.TableWriter(target / shards.SHARDS_NAME, shards.SHARD_SCHEMA) as index:
            for dataset in PoolIndex(pool).datasets():
                _reuse(pool, target, dataset, moved, tables, config, index)
            shards.gather_shards(workspace, parts, index, progress)
        for part, number in moved.items():
            tables.move(part, number)
        tables.write(target)


class _Tables:
    """Accounts and clips of several sources, put in the order of a list."""

    def __init__(self, listing: Path) -> None:
        self._database = disk.connect()
        for table in (
            "listing (number INTEGER PRIMARY KEY, fingerprint TEXT)",
            "accounts (number INTEGER PRIMARY KEY, row TEXT)",
            "clips (number INTEGER, clip INTEGER, kind TEXT, aside INTEGER, part INTEGER, position INTEGER, row TEXT)",
        ):
            self._database.execute(f"CREATE TABLE {table}")
        rows = ((number, ingest.fingerprint(item)) for number, item in enumerate(ingest.read_items(listing)))
        self._database.executemany("INSERT INTO listing VALUES (?, ?)", rows)
        self._database.execute("CREATE INDEX by_fingerprint ON listing (fingerprint)")

    def add(self, folder: Path) -> set[int]:
        """Take the accounts, and their clips, that the list names and that no earlier folder had.

        Returns:
            the parts with clips that were not taken.
        """
        stale: set[int] = set()
        clips = shards.rows_of(folder / shards.CLIPS_NAME)
        for account in shards.rows_of(folder / shards.ITEMS_NAME):
            own = [next(clips) for _ in range(account["clips"])]
            if any(clip["item"] != account["key"] for clip in own):
                raise RuntimeError(f"{folder}: the clips are not in the order of the items, at {account['key']}")
            number = self._take(account)
            if number is None:
                stale |= {clip["part"] for clip in own}
            else:
                self._database.executemany(
                    "INSERT INTO clips VALUES (?, ?, ?, ?, ?, ?, ?)",
                    [(number, n, c["kind"], c["aside"], c["part"], c["position"], json.dumps(c)) for n, c in enumerate(own)],
                )
        return stale

    def _take(self, account: dict[str, Any]) -> int | None:
        """Enter an account where the list has it; None if nothing is to be taken of it."""
        numbers = self._database.execute("SELECT number FROM listing WHERE fingerprint = ?", (account["fingerprint"],)).fetchall()
        taken = None
        for (number,) in numbers:  # several only if an input is named several times: no more than its account is taken then
            row = (number, json.dumps(account))
            if self._database.execute("INSERT OR IGNORE INTO accounts VALUES (?, ?)", row).rowcount and taken is None:
                taken = number
        return taken

    def positions(self, part: int, kind: str, aside: bool) -> np.ndarray:
        """Positions in a series of shards that were taken, ascending."""
        query = "SELECT position FROM clips WHERE part = ? AND kind = ? AND aside = ? ORDER BY position"
        return np.array([row[0] for row in self._database.execute(query, (part, kind, aside))], np.int64)

    def index_clips(self) -> None:
        """Before ``positions`` and ``move``."""
        self._database.execute("CREATE INDEX IF NOT EXISTS by_part ON clips (part, kind, aside, position)")

    def move(self, part: int, number: int) -> None:
        """The clips of ``part`` lie in the part ``number`` now, one behind the other."""
        for kind in ("video", "image"):
            for aside in (False, True):
                found = self.positions(part, kind, aside).tolist()
                self._database.executemany(
                    "UPDATE clips SET part = ?, position = ? WHERE part = ? AND kind = ? AND aside = ? AND position = ?",
                    [(number, new, part, kind, aside, old) for new, old in enumerate(found)],
                )

    def write(self, folder: Path) -> None:
        """Write both tables in the order of the list, which must be complete."""
        count = "SELECT (SELECT COUNT(*) FROM listing), (SELECT COUNT(*) FROM accounts)"
        listed, found = self._database.execute(count).fetchone()
        if listed != found:
            raise RuntimeError(f"{listed} items in the list, but {found} accounts")
        accounts = self._database.execute("SELECT row FROM accounts ORDER BY number")
        with shards.TableWriter(folder / shards.ITEMS_NAME, shards.ACCOUNT_SCHEMA) as writer:
            for (row,) in accounts:
                writer.add(json.loads(row))
        clips = self._database.execute("SELECT row, part, position FROM clips ORDER BY number, clip")
        with shards.TableWriter(folder / shards.CLIPS_NAME, shards.CLIP_SCHEMA) as writer:
            for row, part, position in clips:
                writer.add({**json.loads(row), "part": part, "position": position})

    def close(self) -> None:
        self._database.close()


def _reuse(
    pool: Path,
    target: Path,
    dataset: str,
    moved: dict[int, int],
    tables: _Tables,
    config: ShardConfig,
    index: shards.TableWriter,
) -> None:
    """Link or copy the shards of a data set of ``pool`` to ``target``, and note them in its ``index``."""
    kind, text_width = dataset.rpartition("/")[2].removesuffix("s"), PoolIndex(pool).text_width()
    for series, found in PoolIndex(pool).series(dataset):
        part, aside = shards.place_of(series)
        if part not in moved:
            (target / dataset / series).mkdir(parents=True, exist_ok=True)
            for shard in found:
                name = Path(dataset, shard["raw_data"]["basename"])
                if not (target / name).exists():
                    shards.link(pool / name, target / name)
            shards.add_shards(index, dataset, found, text_width)
            continue
        positions = tables.positions(part, kind, aside)
        if len(positions):
            folder = target / dataset / shards.series_name(moved[part], aside)
            shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
            copied = shards.copy_samples(pool / dataset, found, positions, folder, config)
            shards.add_shards(index, dataset, copied, text_width)
