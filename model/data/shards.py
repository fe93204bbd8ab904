"""Where a dataset's shards are, what they hold, and whether they are whole."""

import dataclasses
import hashlib
import json
import tempfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from streaming import Stream
from streaming.base.format import Reader
from streaming.base.hashing import get_hash, is_hash
from streaming.base.world import World
from tqdm import tqdm

from model import config
from model.data import schema
from model.data.rows import RowReader
from model.data.schema import Manifest, SchemaError
from model.data.storage import Storage, remove_stale
from model.data.transfer import one_line
from model.errors import UserError

INDEX_NAME = "index.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard file, as the index describes it."""

    name: str  # path relative to the dataset's folder
    num_bytes: int
    num_samples: int
    hashes: dict[str, str]  # algorithm -> hex digest


@dataclasses.dataclass(frozen=True)
class Source:
    """One dataset whose manifest and index were read and found consistent; its shards may still have to be downloaded."""

    location: str  # as the config names it
    folder: Path  # holds the shards; for a remote location, the cache that they are downloaded to
    remote: str | None
    manifest: Manifest
    shards: tuple[Shard, ...]


def open_source(location: str, cache: str | None) -> Source:
    """Read the manifest and the index of the dataset at ``location``: a folder, or an address such as ``s3://bucket/folder``.

    Every process may call this on its own; for a remote location it downloads the two small files into ``cache``.

    Raises:
        UserError: nothing there, no manifest or index, not valid, not of this schema, or a remote location without a cache.
    """
    remote = location.rstrip("/") if "://" in location else None
    if remote is None:
        folder = Path(location).expanduser()
        if not folder.is_dir():
            raise UserError(f"no such dataset folder: {location}")
    elif cache is None:
        raise UserError(f"{location} is remote: name a folder for its local copies (key 'local')")
    else:
        folder = _fetch_descriptions(remote, Path(cache).expanduser())
    try:
        manifest, shards = _read_descriptions(folder)
    except (UserError, SchemaError) as error:
        raise UserError(f"{location}: {error}" if remote else str(error)) from error
    return Source(location, folder, remote, manifest, shards)


def find_fault(source: Source, part: int, parts: int, hashes: bool) -> str | None:
    """Check that the shards of ``source`` are here and whole; return what is wrong with the first that is not.

    Sizes are always compared, contents only with ``hashes``. Of a remote dataset the local copies are checked, and a damaged
    one is removed: it will be downloaded again.

    Args:
        source: the dataset.
        part: which of ``parts`` equal parts of the shards to check, so that the processes of a node share the work.
        parts: how many processes share it.
        hashes: whether to read and hash the shards (about a second per gigabyte).
    """
    if source.remote and part == 0:
        remove_stale(source.folder)
    bar = tqdm(source.shards[part::parts], f"checking {source.location}", unit="shard", disable=part > 0, delay=2)
    for shard in bar:
        path = source.folder / shard.name
        if not path.is_file():
            fault = None if source.remote else "no such file, but the index names it"
        else:
            fault = _damage(path, shard, hashes)
            if fault and source.remote:
                path.unlink(missing_ok=True)
                fault = None
        if fault:
            return f"{path}: {fault}; run dataprep again or copy the dataset again"
    return None


class ShardStream(Stream):
    """Gives StreamingDataset the shards of a ``Source``.

    It sees a local dataset: its own handling of remote ones keeps damaged downloads, and after a ``kill -9`` refuses the cache
    folder because of shared memory that nobody removed.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(local=str(source.folder))
        self.source = source
        self.faults: dict[str, str] = {}  # shard name -> why it could not be fetched, in this process
        self.storage = Storage(source.remote) if source.remote else None
        self._shards = {shard.name: shard for shard in source.shards}

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Readers that read by parts (``model/data/rows.py``)."""
        whole = super().get_shards(world, allow_unsafe_types)
        return [RowReader.of(shard, stays_open=self.storage is None) for shard in whole]

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch ``shard`` unless it is here; return how many bytes that added.

        It notes a failure in ``faults`` and does not raise: StreamingDataset calls it in background threads, whose death would
        end the epoch early without an error and leave other workers waiting. Who needs the shard's samples raises.
        """
        known = self._shards[shard.file_pairs[0][0].basename]
        path = self.source.folder / known.name
        self.faults.pop(known.name, None)
        if path.is_file():
            return 0
        if self.storage is None:
            self.faults[known.name] = f"{path}: no such file, but the index names it"
            return 0
        try:
            self.storage.fetch(known.name, path, known.num_bytes, partial(_damage, shard=known, hashes=True))
        except Exception as error:  # whatever it is, the shard is not here
            self.faults[known.name] = str(error) if isinstance(error, UserError) else f"{path}: {one_line(error)}"
            return 0
        return known.num_bytes


def _fetch_descriptions(remote: str, cache: Path) -> Path:
    """Download manifest and index; return the cache folder of this version of the dataset."""
    storage = Storage(remote)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        files = [Path(scratch, name) for name in (schema.MANIFEST_NAME, INDEX_NAME)]
        for file in files:
            storage.fetch(file.name, file)
        # Named after the contents: shards of an earlier version at the same address are never mistaken for this one's.
        version = hashlib.sha256(b"\0".join([remote.encode(), *(file.read_bytes() for file in files)])).hexdigest()[:16]
        folder = cache / version
        folder.mkdir(exist_ok=True)
        for file in files:
            file.replace(folder / file.name)
    return folder


def _read_descriptions(folder: Path) -> tuple[Manifest, tuple[Shard, ...]]:
    manifest = Manifest.read(folder)
    config.build(Manifest, dataclasses.asdict(manifest), where=str(folder / schema.MANIFEST_NAME))  # the types of its values
    shards = _read_index(folder / INDEX_NAME)
    found = sum(shard.num_samples for shard in shards)
    if found != manifest.num_samples:
        raise UserError(f"{folder}: the index holds {found} samples, the manifest {manifest.num_samples}; run dataprep again")
    if not found:
        raise UserError(f"{folder}: the dataset holds no samples")
    return manifest, shards


def _read_index(path: Path) -> tuple[Shard, ...]:
    """Read the index and refuse what this reader does not expect; the index is data, it may be hostile."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}; is this a dataset that dataprep finished?") from error
    try:
        return tuple(_read_shard(entry, path) for entry in tree["shards"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not an index of MDS shards: {one_line(error)}") from error


def _read_shard(entry: dict[str, Any], where: Path) -> Shard:
    raw = entry["raw_data"]
    name, num_bytes, num_samples, hashes = raw["basename"], int(raw["bytes"]), int(entry["samples"]), dict(raw["hashes"])
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{where}: shard {name!r} lies outside of the dataset's folder")
    columns = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    if entry["format"] != "mds" or columns != schema.COLUMNS:
        raise UserError(f"{where}: shard {name!r} does not have the columns of schema version {schema.SCHEMA_VERSION}")
    if entry["compression"] is not None:
        raise UserError(f"{where}: shard {name!r} is compressed; this reader takes uncompressed shards")
    if not 0 < num_samples <= num_bytes // 4:  # a shard begins with 4 bytes per sample
        raise UserError(f"{where}: shard {name!r} of {num_bytes} bytes cannot hold {num_samples} samples")
    if not any(is_hash(algorithm) for algorithm in hashes):
        raise UserError(f"{where}: shard {name!r} has no hash, so that damage to it could not be told")
    return Shard(name, num_bytes, num_samples, hashes)


def _damage(path: Path, shard: Shard, hashes: bool) -> str | None:
    size = path.stat().st_size
    if size != shard.num_bytes:
        return f"{size} bytes long, the index says {shard.num_bytes}"
    if hashes:
        algorithm = next(name for name in shard.hashes if is_hash(name))
        if get_hash(algorithm, path.read_bytes()) != shard.hashes[algorithm]:
            return f"its contents do not have the {algorithm} that the index says"
    return None
