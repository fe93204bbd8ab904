"""What outgrows memory: sets, sorted names and arrays in temporary files."""

import errno
import os
import random
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from dataprep import disk
from model.errors import UserError


def test_a_set_on_disk_is_a_set() -> None:
    draw, known = random.Random(0), set[str]()
    found = disk.DiskSet()
    for _ in range(5000):
        text = f"\N{SNOWMAN}/{draw.randrange(2000)}"
        assert (text in found) == (text in known)
        assert found.add(text) == (text not in known)
        known.add(text)
    found.close()


@pytest.mark.parametrize("held", [10, 100_000])
def test_names_in_order_whether_they_fit_or_not(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(disk, "HELD", held)
    names = [f"{n}" for n in range(50)] + ["a.b", "a-b", "a", "\N{SNOWMAN}", os.fsdecode(b"caf\xe9"), "Z", "z"]
    assert list(disk.in_order(random.Random(1).sample(names, len(names)))) == sorted(names, key=os.fsencode)
    assert list(disk.in_order([])) == []


def test_arrays_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.tempfile, "tempdir", str(tmp_path))
    found = disk.array(200_000, np.int64, fill=-1)
    assert found.shape == (200_000,)
    assert (found == -1).all()
    found[123_456] = 7
    assert found.sum() == 8 - 200_000
    assert disk.array(0, np.bool_).shape == (0,)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_a_full_disk_is_one_line(error: Exception) -> None:
    with (
        pytest.raises(UserError, match=r"no space left for /data, .* make room and run again"),
        disk.told_when_full(Path("/data/out")),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), sqlite3.OperationalError("no such table"), ValueError("full")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])), disk.told_when_full(Path("/data/out")):
        raise error
