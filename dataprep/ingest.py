"""Items: one video or image with its caption each, their bytes, and the file that lists them for the tasks.

Keys are names, never paths: nothing is written under a key.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep import captions, fetch
from dataprep.fetch import FetchConfig
from dataprep.filters import Rejected
from dataprep.spans import Span, open_span

ROWS = 1 << 12  # of a row group of the list: with one for each partition, its footer would outgrow memory
GROUP, GROUPS = b"items_per_group", b"groups_per_row_group"  # in its metadata
CAPTION_SUFFIXES = (".txt", ".json")  # where both are present the first one counts


@dataclasses.dataclass(frozen=True)
class Item:
    """One input, or something among the inputs that cannot be one; then ``reason`` says why."""

    key: str
    kind: str  # "video", "image" or "" where it is neither
    source: str  # where it comes from, for people
    media: Span | None = None
    caption: Span | None = None
    caption_is_json: bool = False
    caption_text: str | None = None  # from a manifest, in place of ``caption``
    reason: str = ""
    detail: str = ""


_SPAN = pa.struct([("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("version", pa.string())])
ITEM_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("source", pa.string()),
        ("media", _SPAN),
        ("caption", _SPAN),
        ("caption_is_json", pa.bool_()),
        ("caption_text", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


def read_caption(item: Item, config: FetchConfig = fetch.DEFAULTS) -> str:
    """The normalised caption of ``item``.

    Raises:
        Rejected: missing, not readable, not UTF-8, empty, too long, or not to be had.
    """
    if item.caption_text is not None:
        return captions.normalise(item.caption_text)
    if item.caption is None:
        raise Rejected(captions.MISSING, f"no {' or '.join(CAPTION_SUFFIXES)} beside it")
    with open_span(item.caption, config) as file:
        raw = file.read(captions.MAX_BYTES + 1)
    return captions.from_json(raw) if item.caption_is_json else captions.from_text(raw)


def fingerprint(item: Item) -> str:
    """Equal for two listings of an input that has not changed: same names, same captions in manifests, same versions of files."""
    return hashlib.blake2b(repr(item).encode(), digest_size=16).hexdigest()


def write_items(items: Iterable[Item], path: Path, items_per_group: int) -> tuple[int, str]:
    """Write a parquet file, for ``read_group`` in groups of so many items. Returns the number of items and a hash of them."""
    digest, count, group = hashlib.sha256(), 0, []
    rows = items_per_group * max(1, ROWS // items_per_group)
    schema = ITEM_SCHEMA.with_metadata({GROUP: str(items_per_group), GROUPS: str(rows // items_per_group)})
    with pq.ParquetWriter(path, schema) as writer:
        for item in items:
            group.append({**vars(item), "media": item.media and vars(item.media), "caption": item.caption and vars(item.caption)})
            digest.update(fingerprint(item).encode())
            count += 1
            if len(group) == rows:
                writer.write_table(pa.Table.from_pylist(group, schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema))
    return count, digest.hexdigest()


def read_group(path: str | Path, group: int) -> list[Item]:
    """The items of one group of a file by ``write_items``."""
    with pq.ParquetFile(path) as file:
        size, groups = (int(file.schema_arrow.metadata[name]) for name in (GROUP, GROUPS))
        rows = file.read_row_group(group // groups).slice(group % groups * size, size)
    return _items(rows)


def read_items(path: str | Path) -> Iterator[Item]:
    """All items of a file by ``write_items``; some thousands at a time are in memory."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield from _items(file.read_row_group(number))


def _items(table: pa.Table) -> list[Item]:
    rows = table.to_pylist()
    return [Item(**{**row, **{name: Span(**row[name]) if row[name] else None for name in ("media", "caption")}}) for row in rows]
