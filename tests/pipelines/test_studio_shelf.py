"""The look into shards: pages, filters, clips to the bit, rejects, and what is damaged or replaced meanwhile."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset
from studio_app import HOSTILE, write_shards

from model.errors import UserError
from pipelines.studio import render, shelf
from pipelines.studio.scratch import Scratch
from pipelines.studio.shelf import Shelf

VIDEOS = "stage1/videos"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_pages_go_through_a_data_set_once(folder: Path) -> None:
    found = Shelf(folder)
    assert found.datasets() == ["stage1/images", VIDEOS]
    seen: list[str] = []
    start: int | None = 0
    while start is not None:
        page = found.page(VIDEOS, start, 7)
        seen += [row.key for row in page.rows]
        start = page.next
    assert seen == [f"item{n}:0" for n in range(20)]
    row = found.page(VIDEOS, 3, 1).rows[0]
    assert (row.index, row.frames, row.start_seconds, row.source_height, row.source_width) == (3, 6, 4.5, 120, 160)
    assert found.page(VIDEOS, 20, 7).rows == () and found.page(VIDEOS, -5, 1).rows[0].index == 0


def test_words_filter_captions_and_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Shelf(folder)
    assert [row.index for row in found.page(VIDEOS, 0, 3, "RED").rows] == [3, 5, 7]
    assert found.page(VIDEOS, 0, 3, "RED").next == 8
    assert [row.index for row in found.page(VIDEOS, 0, 3, "item11").rows] == [11]
    # A filter that finds little ends after so many samples, and says where to go on.
    monkeypatch.setattr(shelf, "SCANNED", 5)
    page = found.page(VIDEOS, 0, 3, "item11")
    assert (page.rows, page.next, page.looked) == ((), 5, 5)


def test_clips_are_what_is_stored(folder: Path) -> None:
    found = Shelf(folder)
    for dataset, rate in ((VIDEOS, 12.0), ("stage1/images", 0.0)):
        stored = LocalDataset(str(folder / dataset))[2]["frames"]
        frames, told = found.clip(dataset, 2)
        assert told == rate and frames.shape[1:] == (12, 16, 3)
        assert frames.tobytes() == stored
    for dataset, index in ((VIDEOS, 20), (VIDEOS, -1), ("../stage1/videos", 0), ("stage9/videos", 0)):
        with pytest.raises(UserError):
            found.clip(dataset, index)


def test_what_was_lost_by_reason(folder: Path) -> None:
    found = Shelf(folder)
    assert found.reasons("inputs") == {"truncated": 60, "dark": 1}
    first, rest = found.lost("inputs", "truncated", 0, 50), found.lost("inputs", "truncated", 50, 50)
    assert (len(first.rows), len(rest.rows), rest.total) == (50, 10, 60)
    assert first.rows[0] == ("lost0", "rejected", "truncated", HOSTILE, "lost0.mp4")
    assert [row[0] for row in found.lost("inputs", None, 60, 50).rows] == ["dim"]
    with pytest.raises(UserError, match="clips.parquet"):
        found.lost("clips", None, 0, 50)


def test_nothing_of_the_data_becomes_a_tag(folder: Path) -> None:
    found = Shelf(folder)
    for shown in (render.samples(found.page(VIDEOS, 0, 3), "shards/0"), render.lost(found.lost("inputs", None, 0, 2), 0)):
        assert "&lt;img src=x" in shown and "<img src=x" not in shown and "<script" not in shown


def test_a_damaged_or_missing_output_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data sets"):
        Shelf(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    shard = sorted((damaged / VIDEOS).glob("*.mds"))[0]
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match="stage1/videos: sample 0"):
        Shelf(damaged).page(VIDEOS, 0, 3)
    (damaged / "rejects.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="rejects.parquet"):
        Shelf(damaged).reasons("inputs")


def test_a_data_set_that_is_replaced_is_opened_anew(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "now", 4)
    found = Shelf(root)
    assert found.page(VIDEOS, 0, 1).manifest.num_samples == 4
    other = write_shards(tmp_path / "next", 6)
    shutil.rmtree(root)
    other.rename(root)
    assert found.page(VIDEOS, 5, 1).rows[0].key == "item5:0"
    assert np.array_equal(found.clip(VIDEOS, 5)[0], Shelf(root).clip(VIDEOS, 5)[0])


def test_scratch_files_are_made_once_and_the_oldest_go() -> None:
    scratch, made = Scratch(limit=2), []

    def make(path: Path) -> None:
        made.append(path)
        path.write_text("clip")

    try:
        first = scratch.file("a", ".mp4", make)
        assert scratch.file("a", ".mp4", make) == first and len(made) == 1
        assert scratch.path(first.name) == first and first.stem != "a"
        scratch.file("b", ".mp4", make)
        scratch.file("a", ".mp4", make)
        third = scratch.file("c", ".png", make)
        assert first.exists() and third.exists() and len(made) == 3
        assert scratch.file("b", ".mp4", make).exists() and len(made) == 4, "it had to go, and is made again"
        for name in ("../etc", "/etc/passwd", "0" * 32 + ".mp4", ""):
            assert scratch.path(name) is None
        assert Scratch(limit=2).file("a", ".mp4", make).name != first.name, "names tell nothing"
    finally:
        scratch.close()
    assert not first.parent.exists()
