"""Inputs -> the list of items: what there is to prepare, from folders with sidecars, WebDataset tars and parquet manifests.

An item is one video or image with its caption. Listing reads names and headers only; media and sidecars are read where they are
prepared. Keys are names, never paths: nothing is written under a key.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep import captions
from dataprep.disk import DiskSet
from dataprep.filters import Rejected
from model.config import UserError

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
CAPTION_SUFFIXES = (".txt", ".json")  # where both are present the first one counts
TRIED_AGAIN = {"fetch failed"}  # the reasons for which an input that was rejected is prepared again by the next run
INPUT_KINDS = "a folder, a WebDataset .tar or a .parquet manifest"


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes of a file: all of a plain one, or a member of a tar."""

    path: str
    offset: int = 0
    size: int = -1  # bytes; -1: up to the end


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
    version: str = ""  # of the files that hold media and caption: a changed file is another input
    reason: str = ""
    detail: str = ""


_SPAN = pa.struct([("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
ITEM_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),
        ("source", pa.string()),
        ("media", _SPAN),
        ("caption", _SPAN),
        ("caption_is_json", pa.bool_()),
        ("caption_text", pa.string()),
        ("version", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file = Path(path).open("rb")  # noqa: SIM115  closed by close()
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:length]) or 0  # a bytearray's slice would be a copy
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_span(span: Span) -> BinaryIO:
    """Open the bytes of ``span`` for reading and seeking.

    Raises:
        Rejected: no such file, not a plain file, or not readable.
    """
    try:
        if not stat.S_ISREG(os.stat(span.path).st_mode):  # noqa: PTH116  a manifest may name a device or a pipe
            raise Rejected("not readable", f"not a plain file: {span.path}")
        if span.size < 0:
            return Path(span.path).open("rb")
        return io.BufferedReader(_Window(span.path, span.offset, span.size))
    except FileNotFoundError as error:
        raise Rejected("no such file", span.path) from error
    except (OSError, ValueError) as error:
        raise Rejected("not readable", str(error)) from error


def read_caption(item: Item) -> str:
    """The normalised caption of ``item``.

    Raises:
        Rejected: missing, not readable, not UTF-8, empty or too long.
    """
    if item.caption_text is not None:
        return captions.normalise(item.caption_text)
    if item.caption is None:
        raise Rejected("caption missing", f"no {' or '.join(CAPTION_SUFFIXES)} beside it")
    with open_span(item.caption) as file:
        raw = file.read(captions.MAX_BYTES + 1)
    return captions.from_json(raw) if item.caption_is_json else captions.from_text(raw)


def list_items(inputs: Iterable[str]) -> Iterator[Item]:
    """The items of all ``inputs``, each a path, in an order that depends on names alone. Keys are unique among the accepted.

    Raises:
        UserError: a path that does not exist, is of no known kind, or holds no video and no image.
    """
    with contextlib.closing(DiskSet()) as seen:
        for path in inputs:
            accepted = False
            for item in _items_of(Path(path)):
                if not item.reason:
                    accepted = True
                    if not seen.add(item.key):
                        yield dataclasses.replace(item, reason="duplicate key", detail="another item has this key")
                        continue
                yield item
            if not accepted:
                raise UserError(f"inputs: nothing to prepare in {path}: no video or image there")


def fingerprint(item: Item) -> str:
    """Equal for two listings of an input that has not changed: same names, same captions in manifests, same versions of files."""
    return hashlib.blake2b(repr(dataclasses.astuple(item)).encode(), digest_size=16).hexdigest()


def write_items(items: Iterable[Item], path: Path, items_per_group: int) -> tuple[int, str]:
    """Write a parquet file with ``items_per_group`` items in each row group. Returns the number of items and a hash of them."""
    digest, count, group = hashlib.sha256(), 0, []
    with pq.ParquetWriter(path, ITEM_SCHEMA) as writer:
        for item in items:
            group.append(dataclasses.asdict(item))
            digest.update(fingerprint(item).encode())
            count += 1
            if len(group) == items_per_group:
                writer.write_table(pa.Table.from_pylist(group, ITEM_SCHEMA))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, ITEM_SCHEMA))
    return count, digest.hexdigest()


def read_group(path: str | Path, group: int) -> list[Item]:
    """The items of one row group of a file by ``write_items``."""
    with pq.ParquetFile(path) as file:
        return _read_group(file, group)


def read_items(path: str | Path) -> Iterator[Item]:
    """All items of a file by ``write_items``, a row group in memory."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            yield from _read_group(file, group)


def _read_group(file: pq.ParquetFile, group: int) -> list[Item]:
    rows = file.read_row_group(group).to_pylist()
    return [Item(**{**row, **{name: Span(**row[name]) if row[name] else None for name in ("media", "caption")}}) for row in rows]


def _items_of(path: Path) -> Iterator[Item]:
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise UserError(f"inputs: no such file or folder: {path}")
    if path.suffix.lower() == ".tar":
        return _from_tar(path)
    if path.suffix.lower() == ".parquet":
        problem = _manifest_problem(path)
        if problem:
            raise UserError(f"inputs: {path}: {problem}")
        return _from_manifest(path)
    raise UserError(f"inputs: {path} is none of: {INPUT_KINDS}")


def _from_folder(root: Path) -> Iterator[Item]:
    """Media with sidecars, and the tars and manifests in it. What a manifest names is not taken a second time as plain media."""
    manifests = [path for path in sorted(root.rglob("*.parquet")) if not _manifest_problem(path)]
    claimed = {item.media.path for path in manifests for item in _from_manifest(path) if item.media}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        groups: dict[str, dict[str, Path]] = {}
        for name in sorted(files):
            path = Path(folder, name)
            relative = str(path.relative_to(root))
            if name.startswith(".") or not path.is_file():
                continue
            if not _is_utf8(str(path)):
                yield _unusable(_printable(relative), _printable(str(path)), "file name is not UTF-8")
            elif path.suffix.lower() == ".tar":
                yield from _from_tar(path)
            elif path.suffix.lower() == ".parquet":
                problem = _manifest_problem(path)
                yield from [_unusable(relative, str(path), "not a manifest", problem)] if problem else _from_manifest(path)
            else:
                groups.setdefault(str(Path(relative).with_suffix("")), {})[path.suffix] = path
        for key, paths in groups.items():
            spans = {suffix: Span(str(path.absolute())) for suffix, path in paths.items()}
            if not any(span.path in claimed for span in spans.values()):
                yield from _grouped(key, spans, str(next(iter(paths.values())).with_suffix("")), None)


def _from_tar(path: Path) -> Iterator[Item]:
    """Members that share their name up to the last dot are one item, wherever in the tar they are."""
    groups: dict[str, dict[str, Span]] = {}
    version = _version(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or member.sparse is not None or Path(member.name).name.startswith("."):
                    continue
                key, suffix = os.path.splitext(member.name.removeprefix("./"))  # noqa: PTH122  a name, not a path
                if not _is_utf8(member.name):
                    yield _unusable(_printable(key), f"{path}::{_printable(member.name)}", "file name is not UTF-8")
                elif suffix in groups.setdefault(key, {}):
                    yield _unusable(key, f"{path}::{member.name}", "duplicate key", "twice in one tar")
                else:
                    groups[key][suffix] = Span(str(path.absolute()), member.offset_data, member.size)
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # where tarfile just stops
                raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}; nothing behind it was read")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield _unusable(str(path), str(path), "broken tar", str(error))
    for key, spans in groups.items():
        yield from _grouped(key, spans, f"{path}::{key}", version)


def _from_manifest(path: Path) -> Iterator[Item]:
    try:
        yield from _rows(path)
    except (OSError, ValueError, pa.ArrowException) as error:  # damage behind the schema, strings that are not UTF-8
        yield _unusable(str(path), str(path), "broken manifest", _first_line(error))


def _rows(path: Path) -> Iterator[Item]:
    """Columns ``path`` (relative ones start at the manifest's folder), ``caption`` and, if there, ``key``."""
    folder = path.parent.absolute()
    with pq.ParquetFile(path) as file:
        columns = [name for name in ("path", "caption", "key") if name in file.schema_arrow.names]
        number = 0
        for batch in file.iter_batches(batch_size=4096, columns=columns):
            for row in batch.to_pylist():
                source = f"{path}::row {number}"
                number += 1
                if not row["path"]:
                    yield _unusable(row.get("key") or source, source, "path missing")
                    continue
                media = folder / row["path"]
                kind = _kind(media.suffix)
                if not kind:
                    yield _unusable(row.get("key") or row["path"], source, "not a video or image", f"suffix '{media.suffix}'")
                    continue
                key = row.get("key") or str(_relative(media, folder).with_suffix(""))
                yield Item(key, kind, str(media), Span(str(media)), caption_text=row["caption"] or "", version=_version(media))


def _manifest_problem(path: Path) -> str:
    """Why ``path`` is no manifest; empty if it is one."""
    try:
        schema = pq.read_schema(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        return f"not a parquet file: {_first_line(error)}"
    for name in ("path", "caption"):
        if name not in schema.names:
            return f"a manifest needs a column '{name}', this file has: {', '.join(schema.names)}"
    for name in {"path", "caption", "key"} & set(schema.names):
        if not (pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)):
            return f"column '{name}' must hold strings, not {schema.field(name).type}"
    return ""


def _grouped(key: str, spans: dict[str, Span], source: str, version: str | None) -> Iterator[Item]:
    """The item among files that share a name, by suffix; a second picture of that name is refused."""
    by_suffix = {suffix.lower(): span for suffix, span in spans.items()}
    media = [suffix for suffix in sorted(spans) if _kind(suffix)]
    caption = next((suffix for suffix in CAPTION_SUFFIXES if suffix in by_suffix), None)
    if not media:
        reason = "caption without media" if caption else "not a video or image"
        yield _unusable(key, source, reason, f"only {' '.join(sorted(spans))}" if any(spans) else "")
        return
    span = spans[media[0]]
    if version is None:
        version = " ".join(_version(Path(part.path)) for part in (span, by_suffix.get(caption or "")) if part)
    yield Item(
        key=key,
        kind=_kind(media[0]),
        source=source + media[0],
        media=span,
        caption=by_suffix[caption] if caption else None,
        caption_is_json=caption == ".json",
        version=version,
    )
    for suffix in media[1:]:
        yield _unusable(key, source + suffix, "duplicate key", f"{media[0]} has the same name")


def _version(path: Path) -> str:
    """Size and time of last change, as make and rsync tell changed files; empty if it cannot be had, which is met again later."""
    with contextlib.suppress(OSError, ValueError):
        found = path.stat()
        return f"{found.st_size}-{found.st_mtime_ns}"
    return ""


def _kind(suffix: str) -> str:
    lower = suffix.lower()
    return "video" if lower in VIDEO_SUFFIXES else "image" if lower in IMAGE_SUFFIXES else ""


def _unusable(key: str, source: str, reason: str, detail: str = "") -> Item:
    return Item(key=key, kind="", source=source, reason=reason, detail=detail)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _relative(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
