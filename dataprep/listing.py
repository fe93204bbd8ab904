"""Inputs -> the list of items: what there is to prepare, from folders with sidecars, WebDataset tars and parquet manifests.

Listing reads names and headers only; media and sidecars are read where they are prepared. What is listed is not held: neither the
items nor, in large folders, the names.
"""

import contextlib
import dataclasses
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from dataprep import captions, disk, fetch
from dataprep.disk import DiskSet
from dataprep.fetch import FetchConfig
from dataprep.filters import Rejected
from dataprep.ingest import CAPTION_SUFFIXES, Item
from dataprep.spans import Span, version_of
from model.errors import UserError

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
BATCH = 256  # rows of a manifest in memory; one can be a megabyte
MAX_CAPTION = 4 * captions.MAX_CHARACTERS  # characters, before it is normalised
MAX_NAME = 8192  # characters of a path, an address or a key
INPUT_KINDS = "a folder, a WebDataset .tar or a .parquet manifest"
MAX_FILLING = 1 << 20  # bytes of zeros behind a tar's end; GNU tar fills up to 10,240
REMOTE_KINDS = f"{fetch.PUBLIC_KINDS}, and behind it a WebDataset .tar, a .parquet manifest or, at s3://, a folder"


def list_items(inputs: Iterable[str], config: FetchConfig = fetch.DEFAULTS) -> Iterator[Item]:
    """The items of all ``inputs``, each a path or an address, in an order that depends on names alone. Keys are unique among the
    accepted.

    Raises:
        UserError: an input that does not exist or cannot be had, is of no known kind, or holds no video and no image.
    """
    with contextlib.closing(DiskSet()) as seen:
        for path in inputs:
            accepted = False
            for item in _from_remote(path, config) if fetch.is_remote(path) else _from_local(Path(path)):
                if not item.reason:
                    accepted = True
                    if not seen.add(item.key):
                        yield dataclasses.replace(item, reason="duplicate key", detail="another item has this key")
                        continue
                yield item
            if not accepted:
                raise UserError(f"inputs: nothing to prepare in {path}: no video or image there")


def _from_local(path: Path) -> Iterator[Item]:
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
        return _from_manifest(path, str(path), path.parent.absolute())
    raise UserError(f"inputs: {path} is none of: {INPUT_KINDS}")


def _from_remote(address: str, config: FetchConfig) -> Iterator[Item]:
    """What cannot be listed now ends the job: its items would otherwise seem to be gone."""
    try:
        suffix = Path(fetch.name_of(address)).suffix.lower()
        if suffix == ".tar":
            yield from _from_remote_tar(address, config)
        elif suffix == ".parquet":
            with _fetched(address, config) as path:
                problem = _manifest_problem(path)
                if problem:
                    raise UserError(f"inputs: {address}: {problem}")
                yield from _from_manifest(path, address, address)
        elif address.startswith("s3://"):
            yield from _from_s3(address.rstrip("/"), config)
        else:
            raise UserError(f"inputs: {address} is none of: {REMOTE_KINDS}")
    except (Rejected, ValueError) as error:
        told = error.detail if isinstance(error, Rejected) else f"{address}: {error}"
        raise UserError(f"inputs: {told}") from error


def _from_folder(root: Path) -> Iterator[Item]:
    """Media with sidecars, and the tars and manifests in it. What a manifest names is not taken a second time as plain media."""
    with contextlib.closing(DiskSet()) as claimed:
        for path in root.rglob("*.parquet"):
            _claim(claimed, _manifest_or_reason(path, str(path), str(path), path.parent.absolute()))
        for folder, names in _walk(root):
            files = _Groups(claimed)
            for name in names:
                path = folder / name
                relative = str(path.relative_to(root))
                if name.startswith(".") or not path.is_file():
                    continue
                if not _is_utf8(str(path)):
                    yield _unusable(_printable(relative), _printable(str(path)), "file name is not UTF-8")
                elif path.suffix.lower() == ".tar":
                    yield from _from_tar(path)
                elif path.suffix.lower() == ".parquet":
                    yield from _manifest_or_reason(path, relative, str(path), path.parent.absolute())
                else:
                    yield from files.add(relative, Span(str(path.absolute()), version=version_of(path)), str(path))
            yield from files.rest()


def _from_s3(address: str, config: FetchConfig) -> Iterator[Item]:
    """The same of a folder in object storage; it is listed twice, first for its manifests."""
    with contextlib.closing(DiskSet()) as claimed:
        for name, _ in fetch.list_s3(address):
            if name.lower().endswith(".parquet"):
                whole = f"{address}/{name}"
                with _fetched(whole, config) as path:
                    _claim(claimed, _manifest_or_reason(path, name, whole, whole))
        files = _Groups(claimed)
        for name, found in fetch.list_s3(address):
            whole = f"{address}/{name}"
            if name.endswith("/") or any(part.startswith(".") and part != ".." for part in name.split("/")):
                continue
            suffix = Path(name).suffix.lower()
            if suffix == ".tar":
                yield from _from_remote_tar(whole, config)
            elif suffix == ".parquet":
                with _fetched(whole, config) as path:
                    yield from _manifest_or_reason(path, name, whole, whole)
            else:
                yield from files.add(name, Span(whole, version=found.version), whole)
        yield from files.rest()


class _Groups:
    """Files that share their name up to the last dot, from names that come in order: only those that may still grow are held."""

    def __init__(self, claimed: DiskSet) -> None:
        self._claimed = claimed
        self._open: dict[str, dict[str, Span]] = {}  # name without suffix -> suffix -> file
        self._sources: dict[str, str] = {}

    def add(self, name: str, span: Span, source: str) -> Iterator[Item]:
        """Take a file; yields the items that cannot grow any more: names with a common beginning follow each other."""
        stem, suffix = os.path.splitext(name)  # noqa: PTH122  an object's name may end in anything
        for other in [other for other in self._open if not name.startswith(f"{other}.")]:
            yield from self._close(other)
        self._open.setdefault(stem, {})[suffix] = span
        self._sources.setdefault(stem, source.removesuffix(suffix))

    def rest(self) -> Iterator[Item]:
        for stem in list(self._open):
            yield from self._close(stem)

    def _close(self, stem: str) -> Iterator[Item]:
        spans, source = self._open.pop(stem), self._sources.pop(stem)
        if not any(span.path in self._claimed for span in spans.values()):
            yield from _grouped(stem, spans, source)


def _walk(folder: Path) -> Iterator[tuple[Path, Iterator[str]]]:
    """Each folder in depth, and the names in it that are no folders, in order; without hidden folders and links to folders."""

    def entries() -> Iterator[str]:
        try:
            with os.scandir(folder) as found:
                for entry in found:
                    yield ("1" if entry.is_dir(follow_symlinks=False) else "0") + entry.name
        except OSError as error:  # its items would otherwise seem to be gone
            raise UserError(f"inputs: cannot list {folder}: {error.strerror}") from error

    names = disk.in_order(entries())
    first: list[str] = []

    def files() -> Iterator[str]:
        for name in names:
            if name[0] == "1":
                first.append(name)
                return
            yield name[1:]

    yield folder, files()
    for name in [*first, *names]:
        if not name[1:].startswith("."):
            yield from _walk(folder / name[1:])


def _from_tar(path: Path) -> Iterator[Item]:
    try:
        with path.open("rb") as file:
            yield from _members(str(path), file, str(path.absolute()), version_of(path))
    except OSError as error:
        yield _unusable(str(path), str(path), "broken tar", str(error))


def _from_remote_tar(address: str, config: FetchConfig) -> Iterator[Item]:
    found = fetch.look(address, config)
    yield from _members(address, fetch.RemoteFile(address, config, found), address, found.version)  # type: ignore[arg-type]


def _files_of(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar, and of those behind it: ``cat`` of two tars is one with an end in the middle.

    Raises:
        tarfile.TarError: something that is neither a member nor an end.
    """
    begin: int | None = 0
    while begin is not None:
        file.seek(begin)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                if member.isfile() and member.sparse is None:
                    yield member
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # where tarfile just stops
                raise tarfile.ReadError(f"neither a member nor the end at byte {tar.offset}; nothing behind it was read")
            begin = _behind_zeros(file, tar.offset + tarfile.BLOCKSIZE)


def _behind_zeros(file: BinaryIO, begin: int) -> int | None:
    """Where the first block begins that is not all zeros; None if there is none within what tars are filled up with."""
    file.seek(begin)
    filling = file.read(MAX_FILLING)
    rest = filling.lstrip(b"\0")
    return begin + (len(filling) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE if rest else None


def _members(source: str, file: BinaryIO, path: str, version: str) -> Iterator[Item]:
    """Members that share their name up to the last dot are one item, wherever in the tar they are."""
    groups: dict[str, dict[str, Span]] = {}
    try:
        for member in _files_of(file):
            if Path(member.name).name.startswith("."):
                continue
            key, suffix = os.path.splitext(member.name.removeprefix("./"))  # noqa: PTH122  a name, not a path
            if not _is_utf8(member.name):
                yield _unusable(_printable(key), f"{source}::{_printable(member.name)}", "file name is not UTF-8")
            elif suffix in groups.setdefault(key, {}):
                yield _unusable(key, f"{source}::{member.name}", "duplicate key", "twice in one tar")
            else:
                groups[key][suffix] = Span(path, member.offset_data, member.size, version)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield _unusable(source, source, "broken tar", str(error))
    for key, spans in groups.items():
        yield from _grouped(key, spans, f"{source}::{key}")


def _from_manifest(path: Path, source: str, base: Path | str) -> Iterator[Item]:
    """The rows of the manifest at ``path``, whose relative paths start at ``base``: its folder, or its own address."""
    try:
        yield from _rows(path, source, base)
    except (OSError, ValueError, pa.ArrowException) as error:  # damage behind the schema, strings that are not UTF-8
        yield _unusable(source, source, "broken manifest", _first_line(error))


def _rows(path: Path, source: str, base: Path | str) -> Iterator[Item]:
    """Columns ``path``, ``caption`` and, if there, ``key``."""
    columns = sorted({"path", "caption", "key"} & set(pq.read_schema(path).names))
    # As dictionaries: a caption of a megabyte that all rows share is there once, as it is in the file.
    with pq.ParquetFile(path, read_dictionary=columns) as file:
        number = 0
        for batch in file.iter_batches(batch_size=BATCH, columns=columns):
            for row in batch.to_pylist():
                yield _row(row, f"{source}::row {number}", base)
                number += 1


def _row(row: dict[str, str | None], source: str, base: Path | str) -> Item:
    path, key = row["path"], row.get("key")
    if max(len(path or ""), len(key or "")) > MAX_NAME:
        return _unusable(source, source, "name too long", f"a path or key of more than {MAX_NAME} characters")
    if not path:
        return _unusable(key or source, source, "path missing")
    if isinstance(base, Path) and not fetch.is_remote(path):
        media = base / path
        name, span, shown = str(_relative(media, base)), Span(str(media), version=version_of(media)), str(media)
    else:
        try:
            address = fetch.beside(str(base), path)
            name = f"{urlsplit(address).netloc}/{fetch.name_of(address)}" if fetch.is_remote(path) else path
            if not address.startswith(tuple(f"{scheme}://" for scheme in fetch.SCHEMES)):
                raise ValueError(f"only {fetch.PUBLIC_KINDS} can be asked")
        except ValueError as error:
            return _unusable(key or path, source, fetch.REFUSED, f"{path}: {error}")
        span = Span(address)
        shown = fetch.shown(address)
    kind, caption = _kind(Path(name).suffix), row["caption"] or ""
    if len(caption) > MAX_CAPTION:
        return _unusable(key or path, source, "caption too long", f"{len(caption)} characters")
    if not kind:
        return _unusable(key or path, source, "not a video or image", f"suffix '{Path(name).suffix}'")
    return Item(key or str(Path(name).with_suffix("")), kind, shown, span, caption_text=caption)


@contextlib.contextmanager
def _fetched(address: str, config: FetchConfig) -> Iterator[Path]:
    """A copy of the object at ``address``, for as long as it is needed."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        with fetch.fetch(address, config) as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        yield Path(copy.name)


def _manifest_or_reason(path: Path, name: str, source: str, base: Path | str) -> Iterator[Item]:
    """What a manifest among other files names, or the one row that says what is wrong with it."""
    problem = _manifest_problem(path)
    if problem:
        yield _unusable(name, source, "not a manifest", problem)
    else:
        yield from _from_manifest(path, source, base)


def _claim(claimed: DiskSet, items: Iterable[Item]) -> None:
    """Note which media are named already."""
    for item in items:
        if item.media:
            claimed.add(item.media.path)


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


def _grouped(key: str, spans: dict[str, Span], source: str) -> Iterator[Item]:
    """The item among files that share a name, by suffix; a second picture of that name is refused."""
    by_suffix = {suffix.lower(): span for suffix, span in spans.items()}
    media = [suffix for suffix in sorted(spans) if _kind(suffix)]
    caption = next((suffix for suffix in CAPTION_SUFFIXES if suffix in by_suffix), None)
    if not media:
        reason = "caption without media" if caption else "not a video or image"
        yield _unusable(key, source, reason, f"only {' '.join(sorted(spans))}" if any(spans) else "")
        return
    yield Item(
        key=key,
        kind=_kind(media[0]),
        source=source + media[0],
        media=spans[media[0]],
        caption=by_suffix[caption] if caption else None,
        caption_is_json=caption == ".json",
    )
    for suffix in media[1:]:
        yield _unusable(key, source + suffix, "duplicate key", f"{media[0]} has the same name")


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
