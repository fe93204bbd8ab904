"""``python fuzz.py FOLDER BEGIN END``: mutants of the valid files in FOLDER through the path of a Spark task, one by one.

Mutant N is mutant N anywhere: seed N of a random generator decides file, place and kind of damage. Before each its number and
file are printed; a finding is a line of JSON. A mutant that takes more than ``MOST_SECONDS`` of CPU ends the process by SIGPROF.
"""

import json
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import attempt
import av

from dataprep import ingest, limits, listing, partition
from dataprep.filters import Rejected
from model.errors import UserError

MOST_SECONDS = 20
MOST_MEGABYTES = 2048
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 4, 32))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) + 1 :]


def remove(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 4, 64, 1000))]
    data += b"\0"  # something is left


def insert(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = rng.choice((rng.randbytes(rng.randrange(1, 300)), bytes(rng.randrange(1, 5000))))


def repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randrange(1, 2000)] * rng.randrange(1, 4)


def swap(data: bytearray, rng: random.Random) -> None:
    size = rng.randrange(1, max(2, len(data) // 4))
    first, second = sorted(rng.randrange(len(data)) for _ in range(2))
    first = min(first, max(0, second - size))
    one, other = data[first : first + size], data[second : second + size]
    data[second : second + size], data[first : first + size] = one, other


def field(data: bytearray, rng: random.Random) -> None:
    """A number at the edge of its range, mostly near the beginning or the end, where headers and indices lie."""
    for _ in range(rng.choice((1, 1, 3))):
        near = rng.choice((min(200, len(data)), min(2000, len(data)), len(data)))
        at = rng.randrange(near) if rng.random() < 0.6 else len(data) - 1 - rng.randrange(near)
        kind = rng.choice(("B", ">H", "<H", ">I", "<I"))
        value = rng.choice((*EDGES, rng.getrandbits(32))) & (1 << 8 * struct.calcsize(kind)) - 1
        data[at : at + struct.calcsize(kind)] = struct.pack(kind, value)


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (flip, cut, remove, insert, repeat, swap, field, field)


def mutant(files: list[Path], number: int) -> tuple[Path, bytes]:
    """The file that mutant ``number`` was, and its bytes."""
    rng = random.Random(number)
    file = files[number % len(files)]
    data = bytearray(file.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        rng.choice(MUTATIONS)(data, rng)
    return file, bytes(data)


def prepare_all(folder: Path) -> list[str]:
    """List and prepare what is in ``folder``; what went wrong in a way that is not foreseen."""
    most = limits.memory_in_use() + 1024 * limits.MEGABYTE
    found = []
    try:
        items = list(listing.list_items([str(folder)]))
    except UserError:  # nothing left there
        return []
    for item in items:
        try:
            if not item.reason:
                ingest.read_caption(item)
                partition.prepare_guarded(item, attempt.RECIPE, most, careful=False)
        except Rejected as rejected:
            if not rejected.reason or len(rejected.detail.splitlines()) > 1:
                found.append(f"no reason: {rejected}")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def main(folder: str, begin: str, end: str) -> None:
    av.logging.set_level(av.logging.PANIC)
    files = sorted(path for path in Path(folder).iterdir() if path.suffix != ".txt")
    for number in range(int(begin), int(end)):
        file, data = mutant(files, number)
        print(number, file.name, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            Path(scratch, file.name).write_bytes(data)
            Path(scratch, "caption.txt" if file.suffix == ".tar" else f"{file.stem}.txt").write_text("a caption")
            if file.suffix == ".parquet":
                shutil.copy(file.with_name("still.png"), scratch)
            signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
            try:
                found = prepare_all(Path(scratch))
            except Exception as error:  # listing may not end on what it finds
                found = [f"while listing: {type(error).__name__}: {error}"]
            signal.setitimer(signal.ITIMER_PROF, 0)
        if attempt.most_resident() > MOST_MEGABYTES:
            found.append(f"{attempt.most_resident():.0f} MB")
        if found:
            print(json.dumps({"number": number, "file": file.name, "found": found}), flush=True)
        if attempt.most_resident() > MOST_MEGABYTES:
            break


if __name__ == "__main__":
    main(*sys.argv[1:])
