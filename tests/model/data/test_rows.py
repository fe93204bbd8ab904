"""Rows read by parts are the rows that streaming reads whole; damage is told."""

from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset
from streaming.base.format.mds.reader import MDSReader

from model.data.rows import OPEN_SHARDS, RowReader


@pytest.fixture
def whole(tmp_path: Path, write_dataset) -> MDSReader:
    """A shard of five samples, read by streaming itself."""
    return LocalDataset(str(write_dataset(tmp_path / "videos", "videos", 5, shard_bytes=1 << 20))).shards[0]


def shard(reader: MDSReader) -> Path:
    return Path(reader.dirname, reader.raw_data.basename)


def rewrite(reader: MDSReader, place: int, *values: int) -> None:
    """Put 32-bit numbers into the shard."""
    data = bytearray(shard(reader).read_bytes())
    data[place : place + 4 * len(values)] = np.array(values, np.uint32).tobytes()
    shard(reader).write_bytes(data)


def test_rows_are_those_of_streaming(whole: MDSReader) -> None:
    parts = RowReader.of(whole, stays_open=True)
    assert len(parts) == len(whole) == 5
    for number in range(5):
        expected, found = whole[number], parts[number]
        frames = found.pop("frames")
        data = expected.pop("frames")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, strict=isinstance(value, np.ndarray))
        assert len(frames) == len(data)
        for part in (slice(None), slice(7, 40), slice(-3, None), slice(1, 30, 4), slice(5, 5), slice(9, 2)):
            assert frames[part].tobytes() == data[part]
        frames[0:3].fill(0)  # the caller's own
        assert frames[0:3].tobytes() == data[0:3]


@pytest.mark.parametrize("place", [(9_000_000, 9_000_100), (400, 300), (40, 2**32 - 1)])
def test_a_place_outside_of_the_shard_is_refused_before_anything_is_allocated(whole: MDSReader, place: tuple[int, int]) -> None:
    rewrite(whole, 8, *place)  # where sample 1 begins and ends
    with pytest.raises(ValueError, match=r"asked of a shard of 10055$|the shard says 4294967255$"):
        RowReader.of(whole, stays_open=True)[1]


def test_sizes_that_do_not_add_up_are_refused(whole: MDSReader) -> None:
    begin = int(np.frombuffer(shard(whole).read_bytes()[8:12], np.uint32)[0])
    rewrite(whole, begin, 2**32 - 1)
    with pytest.raises(ValueError, match=r"sample 1 says that it has 4294\d+ bytes, the shard says \d+$"):
        RowReader.of(whole, stays_open=True)[1]


def test_a_shard_that_ends_early_is_refused(whole: MDSReader) -> None:
    shard(whole).write_bytes(shard(whole).read_bytes()[:-50])
    with pytest.raises(ValueError, match="are asked of a shard of"):
        RowReader.of(whole, stays_open=True)[4]


def test_a_caption_longer_than_what_is_read_at_once(tmp_path: Path, write_dataset) -> None:
    folder = write_dataset(tmp_path / "long", "videos", 2, edit=lambda sample: sample.update(caption="long " * 1000))
    row = RowReader.of(LocalDataset(str(folder)).shards[0], stays_open=False)[0]
    assert row["caption"] == "long " * 1000
    assert row["key"] == "videos-0"
    assert row["frames"][:9].tolist() == [0] * 9


@pytest.mark.parametrize("stays_open", [True, False])
def test_no_more_shards_stay_open_than_said(tmp_path: Path, write_dataset, stays_open: bool) -> None:
    folder = write_dataset(tmp_path / "many", "videos", OPEN_SHARDS + 20, shard_bytes=2_500)
    readers = [RowReader.of(reader, stays_open) for reader in LocalDataset(str(folder)).shards]
    assert len(readers) == OPEN_SHARDS + 20
    kept = OPEN_SHARDS if stays_open else 0

    def opened() -> int:
        here = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return sum(path.is_relative_to(folder) for path in here)

    first = readers[0][0]["frames"]
    for reader in readers[1:]:
        reader[0]
    assert opened() == kept + 1  # whoever holds frames can still read them
    assert len(first[:]) == len(first)
    del first
    assert opened() == kept


def test_another_data_set_at_the_same_place_is_read_anew(tmp_path: Path, write_dataset) -> None:
    for caption in ("before", "after"):
        folder = write_dataset(tmp_path / "videos", "videos", 1, edit=lambda sample, said=caption: sample.update(caption=said))
        assert RowReader.of(LocalDataset(str(folder)).shards[0], stays_open=True)[0]["caption"] == caption
        folder.rename(tmp_path / caption)


def test_a_shard_that_is_not_here(whole: MDSReader) -> None:
    shard(whole).unlink()
    with pytest.raises(FileNotFoundError):
        RowReader.of(whole, stays_open=True)[0]
