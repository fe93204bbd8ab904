"""From the pool to data sets: thresholds, duplicates, shards that are linked or copied, and sums that hold."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from streaming import LocalDataset

from dataprep import selection, shards
from dataprep.encode import StageConfig
from dataprep.scores import Scores
from dataprep.selection import SelectConfig
from dataprep.shards import Account, ClipRow, Outcome, PartWriter, ShardConfig
from model.data.schema import Kind, Manifest, TextManifest
from model.errors import UserError

STAGES = (StageConfig("stage1", 2, 3, "raw"), StageConfig("stage2", 2, 3, "raw"))
GOOD = Scores(motion=0.1, sharpness=0.7, brightness=0.5)
# Item -> the scores of its clips. Three clips a part; stage 2's shards hold a sample each, stage 1's all of a part.
CLIPS: dict[str, list[Scores]] = {
    "good": [GOOD, dataclasses.replace(GOOD, phash=1 << 40)],
    "still": [dataclasses.replace(GOOD, motion=0.0, phash=1 << 20)],
    "copy": [dataclasses.replace(GOOD, phash=0b11)],  # near the first clip of "good"
    "half": [dataclasses.replace(GOOD, brightness=0.01, phash=0xFF00), dataclasses.replace(GOOD, phash=(1 << 30) - 1)],
    "other": [dataclasses.replace(GOOD, phash=(1 << 64) - 1)],
}


def manifest(kind: Kind, stage: StageConfig, samples: int, text_width: int) -> Manifest:
    text = TextManifest("t5", "abc", text_width, "bfloat16", 8)
    return Manifest(kind, stage.height, stage.width, 24.0, 1, stage.frame_format, samples, text)


def sample(key: str, size: int) -> dict[str, Any]:
    return {
        "key": key,
        "caption": f"caption of {key}",
        "frames": key.encode().ljust(size, b"."),
        "frame_ends": np.array([size], np.uint32),
        "start_seconds": 0.5,
        "source_height": 20,
        "source_width": 30,
        "text": np.full((3, 4), len(key), np.uint16),
    }


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A gathered pool of ``CLIPS``, decoded under the default thresholds."""
    workspace = tmp_path / "out.tmp-d"
    workspace.mkdir()
    items = list(CLIPS.items())
    for part in range(2):
        writer = PartWriter(workspace, part, ShardConfig(size_limit_mb=1))
        for item, clips in items[part::2]:
            for number, found in enumerate(clips):
                aside = selection.fault("video", found, SelectConfig()) is not None
                key = f"{item}:{number}"
                values = dataclasses.asdict(found)
                row = ClipRow(key=key, item=item, kind="video", caption="", frames=1, start_seconds=0.0, **values)
                writer.clip(row, aside)
                writer.write("stage1/videos", sample(key, 10), aside)
                writer.write("stage2/videos", sample(key, 700_000), aside)
            writer.account(Account(item, "video", "somewhere", "kept", clips=len(clips)))
        writer.account(Account(f"bad{part}", "video", "somewhere", "rejected", "too short", "1 frame"))
        writer.commit()
    shards.gather(workspace, range(2), lambda: None)
    return workspace / "finished"


def select(finished: Path, config: SelectConfig) -> Outcome:
    return selection.select(finished, config, STAGES, ShardConfig(), manifest, {"digest": "d"})


def keys(finished: Path) -> set[str]:
    """In both stages, each read whole."""
    found = []
    for stage, size in (("stage1", 10), ("stage2", 700_000)):
        rows = list(LocalDataset(str(finished / stage / "videos")))
        for row in rows:
            expected = sample(row["key"], size)
            assert all(np.array_equal(row[name], expected[name]) for name in expected)
        assert Manifest.read(finished / stage / "videos").num_samples == len(rows)
        found.append([row["key"] for row in rows])
    assert sorted(found[0]) == sorted(found[1])
    assert len(set(found[0])) == len(found[0])
    return set(found[0])


def test_every_clip_and_item_has_a_fate_and_a_reason(finished: Path) -> None:
    outcome = select(finished, SelectConfig())
    assert keys(finished) == {"good:0", "good:1", "half:1", "other:0"}
    assert (outcome.kept, outcome.filtered, outcome.rejected) == (3, 2, 2)
    assert (outcome.clips_kept, outcome.clip_reasons) == (4, {"still": 1, "dark": 1, "near duplicate": 1})
    clips = {row["key"]: row for row in pq.read_table(finished / "clips.parquet").to_pylist()}
    assert len(clips) == 7
    assert {key: row["reason"] for key, row in clips.items() if row["fate"] == "filtered"} == {
        "still:0": "still",
        "half:0": "dark",
        "copy:0": "near duplicate",
    }
    assert clips["copy:0"]["detail"] == "of good:0, 2 bits apart"
    assert all(row["reason"] == row["detail"] == "" for row in clips.values() if row["fate"] == "kept")
    items = {row["key"]: row for row in pq.read_table(finished / "items.parquet").to_pylist()}
    assert {key: (row["fate"], row["reason"], row["clips_kept"]) for key, row in items.items()} == {
        "good": ("kept", "", 2),
        "still": ("filtered", "still", 0),
        "half": ("kept", "", 1),
        "copy": ("filtered", "near duplicate", 0),
        "other": ("kept", "", 1),
        "bad0": ("rejected", "too short", 0),
        "bad1": ("rejected", "too short", 0),
    }
    rejects = pq.read_table(finished / "rejects.parquet").to_pylist()
    assert rejects == [row for row in items.values() if row["fate"] != "kept"]


def test_wholly_selected_shards_are_the_same_files_and_the_rest_is_copied(finished: Path) -> None:
    select(finished, SelectConfig(duplicate_bits=None))
    names = {path.name for path in (finished / "stage1/videos").iterdir()}
    assert names == {"index.json", "manifest.json", "part-00000", "part-00001"}  # what failed lies aside
    for path in (finished / "stage1/videos").glob("part-*/*.mds"):
        assert path.samefile(finished / "pool" / path.relative_to(finished))
    outcome = select(finished, SelectConfig(min_brightness=0.0))
    assert outcome.samples == {"stage1/videos": 5, "stage2/videos": 5}
    assert keys(finished) == {"good:0", "good:1", "half:0", "half:1", "other:0"}
    # "copy" shares a shard with "good" in stage 1: what is left of it is copied. "half" shares none with "still".
    names = {path.name for path in (finished / "stage1/videos").iterdir() if path.is_dir()}
    assert names == {"part-00000-picked", "part-00001", "part-00001-aside-picked"}
    assert not list((finished / "stage1/videos").glob("*/index.json"))


def test_thresholds_go_back_and_forth_without_losing_anything(finished: Path) -> None:
    lax = SelectConfig(0, 0, 0, 1, None)
    everything = {f"{item}:{n}" for item, clips in CLIPS.items() for n in range(len(clips))}
    for config, expected in ((SelectConfig(), 4), (lax, 7), (SelectConfig(), 4), (lax, 7)):
        outcome = select(finished, config)
        found = keys(finished)
        assert (outcome.clips_kept, len(found)) == (expected, expected)
        assert found <= everything


def test_nothing_selected_is_the_users_error(finished: Path) -> None:
    with pytest.raises(UserError, match=r"nothing was kept of 7 inputs: dark \(7\), too short \(2\)"):
        select(finished, SelectConfig(min_brightness=1.0))


@pytest.mark.parametrize("values", [{"min_motion": -0.1}, {"max_letterbox": 1.5}, {"duplicate_bits": 9}])
def test_thresholds_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        SelectConfig(**values)


@pytest.mark.parametrize(
    ("found", "limits", "reason"),
    [
        ({"text_area": 0.2}, {"max_text_area": 0.1}, "text"),
        ({"text_area": 0.1}, {"max_text_area": 0.1}, None),
        ({"text_area": 0.9}, {}, None),
        ({"aesthetic": -1.5}, {"min_aesthetic": -1.0}, "unaesthetic"),
        ({"aesthetic": -1.0}, {"min_aesthetic": -1.0}, None),
        ({"aesthetic": -9.0}, {}, None),
    ],
)
def test_scores_by_models_count_where_a_threshold_is_set(found: dict[str, float], limits: dict[str, float], reason: str) -> None:
    scores = dataclasses.replace(GOOD, **found)
    fault = selection.fault("video", scores, SelectConfig(**limits))  # type: ignore[arg-type]
    assert (fault and fault.reason) == reason
