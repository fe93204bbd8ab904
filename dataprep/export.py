"""A prepared data set -> WebDataset tars: ``python -m dataprep.export OUTPUT/stage1/videos --to FOLDER``.

For programs that do not read MDS. A sample of the tars is a group of files that share a name::

    00000042-my_clip_0-1f0c5a9e2b77.json      key, frame rate, start, source size, number of frames
    00000042-my_clip_0-1f0c5a9e2b77.txt       the caption
    00000042-my_clip_0-1f0c5a9e2b77.000.jpg   frames that are stored as JPEG, byte for byte
    00000042-my_clip_0-1f0c5a9e2b77.npy       or raw frames: (T, H, W, 3) uint8

Keys are anyone's words, so names are made of them that are safe in any file system; the key itself stands in the json. Text
states stay behind: they are of use only to a model with the same text encoder.
"""

import argparse
import hashlib
import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from model import command
from model.data.schema import Manifest
from model.errors import UserError

READABLE = 60  # characters of the key that stay readable in the name
BYTES_PER_TAR = 1 << 30
SAMPLES_PER_TAR = 10_000


def safe_name(number: int, key: str) -> str:
    """A name for the sample ``number`` of a data set: ASCII letters, digits, - and _ alone, another for each key.

    WebDataset ends the name of a sample at its first dot and takes slashes for folders; tars on some systems fold case.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[:READABLE]
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return f"{number:08d}-{readable}-{digest}"


def export(dataset: Path, target: Path, bytes_per_tar: int = BYTES_PER_TAR, samples_per_tar: int = SAMPLES_PER_TAR) -> int:
    """Write the samples of ``dataset`` into tars in ``target``, which appears whole or not at all; return their number.

    Raises:
        UserError: ``dataset`` is none or damaged, or ``target`` exists.
    """
    import webdataset
    from streaming import LocalDataset

    from model.data.shards import find_fault, open_source

    if target.exists():
        raise UserError(f"{target} exists; choose another folder, or delete it")
    source = open_source(str(dataset), cache=None)
    fault = find_fault(source, 0, 1, hashes=True)
    if fault:
        raise UserError(fault)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    partial.mkdir()
    rows = LocalDataset(str(source.folder))
    pattern = f"{str(partial).replace('%', '%%')}/shard-%05d.tar"
    limits = {"maxsize": bytes_per_tar, "maxcount": samples_per_tar}
    with webdataset.ShardWriter(pattern, **limits, verbose=0, mtime=0) as writer:
        for number in tqdm(range(len(rows)), "export", unit=" samples", delay=1):
            writer.write(_files(number, rows[number], source.manifest))
    partial.rename(target)
    return len(rows)


def _files(number: int, row: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    """A sample as WebDataset writes it: suffix -> content."""
    ends = row["frame_ends"].tolist()
    facts = {
        "key": row["key"],
        "caption": row["caption"],
        "frames": len(ends),
        "frame_rate": manifest.frame_rate,
        "height": manifest.height,
        "width": manifest.width,
        "start_seconds": row["start_seconds"],
        "source_height": row["source_height"],
        "source_width": row["source_width"],
    }
    files: dict[str, Any] = {"__key__": safe_name(number, row["key"]), "json": facts, "txt": row["caption"]}
    if manifest.frame_format == "raw":
        shape = (len(ends), manifest.height, manifest.width, 3)
        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(row["frames"], np.uint8).reshape(shape), allow_pickle=False)
        return {**files, "npy": buffer.getvalue()}
    starts = [0, *ends[:-1]]
    jpegs = [row["frames"][start:end] for start, end in zip(starts, ends, strict=True)]
    return {**files, **{f"{frame:03d}.jpg": data for frame, data in enumerate(jpegs)}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a prepared data set as WebDataset tars.")
    parser.add_argument("dataset", help="a folder with manifest.json, such as OUTPUT/stage1/videos")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where the tars go; must not exist yet")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    options = parser.parse_args(arguments)

    def body() -> None:
        target = Path(options.to).absolute()
        print(f"export: {export(Path(options.dataset), target)} samples in {target}", flush=True)

    command.guard(body, options.debug)


if __name__ == "__main__":
    main()
