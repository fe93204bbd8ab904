"""Parts that are committed once, outputs that appear whole, and a reader that finds every sample in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from streaming import LocalDataset
from streaming.base.hashing import get_hash

from dataprep import outputs, selection, shards
from dataprep.encode import StageConfig
from dataprep.selection import SelectConfig
from dataprep.shards import Account, ClipRow, Outcome, PartWriter, ShardConfig
from model.data.schema import Kind, Manifest, TextManifest
from model.errors import UserError

STAGE = StageConfig("stage1", 2, 3, "raw")
TEXT = TextManifest("t5", "abc", 4, "bfloat16", 8)


OUTCOME = Outcome(7, 0, 3, {"too short": 3}, 7, {}, {"stage1/videos": 6, "stage1/images": 1})  # of three parts by ``fill``


def sample(key: str, size: int = 100) -> dict[str, Any]:
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


def clip(key: str, kind: str = "video") -> ClipRow:
    """Passes every threshold; no two hashes are near."""
    return ClipRow(
        key=key, item=key, kind=kind, caption="", frames=1, start_seconds=0.5, motion=0.1, sharpness=0.7, brightness=0.5
    )


def fill(writer: PartWriter, part: int, sizes: tuple[int, ...] = (100, 200)) -> PartWriter:
    """Samples part-0, part-1, ...; a rejected item; and in odd parts an image."""
    for n, size in enumerate(sizes):
        writer.write("stage1/videos", sample(f"{part}-{n}", size))
        writer.clip(clip(f"{part}-{n}"))
        writer.account(Account(f"{part}-{n}", "video", "somewhere", "kept", clips=1))
    if part % 2:
        writer.write("stage1/images", sample(f"image-{part}"))
        writer.clip(clip(f"image-{part}", "image"))
        writer.account(Account(f"image-{part}", "image", "somewhere", "kept", clips=1))
    writer.account(Account(f"bad-{part}", "video", "somewhere", "rejected", "too short", "1 frame"))
    return writer


def manifest(kind: Kind, stage: StageConfig, samples: int, text_width: int) -> Manifest:
    assert text_width == TEXT.width
    return Manifest(kind, stage.height, stage.width, 24.0, 1, stage.frame_format, samples, TEXT)


def assemble(workspace: Path, parts: int) -> Outcome:
    shards.gather(workspace, range(parts), lambda: None)
    select = SelectConfig(duplicate_bits=None)
    return selection.select(workspace / "finished", select, (STAGE,), ShardConfig(), manifest, {"digest": "d"})


def read(folder: Path) -> dict[str, dict[str, Any]]:
    dataset = LocalDataset(str(folder))
    samples = [dataset[index] for index in range(len(dataset))]
    assert len({s["key"] for s in samples}) == len(samples)
    return {s["key"]: s for s in samples}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "out.tmp-d"
    folder.mkdir()
    return folder


def test_parts_become_one_dataset_that_streaming_reads(tmp_path: Path, workspace: Path) -> None:
    for part in range(3):
        summary = fill(PartWriter(workspace, part, ShardConfig()), part).commit()
        assert (summary.items, summary.kept) == ((4, 3) if part % 2 else (3, 2))
    outcome = assemble(workspace, 3)
    assert outcome == OUTCOME
    output = tmp_path / "out"
    outputs.swap_in(workspace, output)
    assert not workspace.exists()

    found = read(output / "stage1/videos")
    assert set(found) == {f"{part}-{n}" for part in range(3) for n in range(2)}
    for key, row in found.items():
        expected = sample(key, len(row["frames"]))
        assert {name: row[name] for name in ("caption", "frames", "start_seconds", "source_height")} == {
            name: expected[name] for name in ("caption", "frames", "start_seconds", "source_height")
        }
        assert (row["text"] == expected["text"]).all()
    assert set(read(output / "stage1/images")) == {"image-1"}
    assert Manifest.read(output / "stage1/videos").num_samples == 6

    for index in output.rglob("index.json"):
        for shard in json.loads(index.read_text())["shards"]:
            raw = shard["raw_data"]
            data = (index.parent / raw["basename"]).read_bytes()
            assert (len(data), get_hash("xxh64", data)) == (raw["bytes"], raw["hashes"]["xxh64"])
    fates = pq.read_table(output / "items.parquet").to_pylist()
    assert len(fates) == 10
    rejects = pq.read_table(output / "rejects.parquet").to_pylist()
    assert [(row["key"], row["reason"], row["detail"]) for row in rejects] == [
        (f"bad-{part}", "too short", "1 frame") for part in range(3)
    ]


def test_shards_are_cut_at_the_limit_and_none_is_empty(tmp_path: Path, workspace: Path) -> None:
    megabyte = 1 << 20
    fill(PartWriter(workspace, 0, ShardConfig(size_limit_mb=1)), 0, (2 * megabyte, 100, megabyte, 100)).commit()
    assemble(workspace, 1)
    index = json.loads((workspace / "finished/stage1/videos/index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [1, 1, 1, 1]
    assert set(read(workspace / "finished/stage1/videos")) == {"0-0", "0-1", "0-2", "0-3"}


def test_only_committed_parts_count(workspace: Path) -> None:
    fill(PartWriter(workspace, 0, ShardConfig()), 0).commit()
    fill(PartWriter(workspace, 1, ShardConfig()), 1)  # its process dies here
    aborted = fill(PartWriter(workspace, 2, ShardConfig()), 2)
    aborted.abort()
    assert shards.missing_parts(workspace, range(3)) == [1, 2]
    assert len(list((workspace / "attempts").iterdir())) == 1  # what died left something, what was aborted did not


def test_of_two_attempts_one_counts(workspace: Path) -> None:
    first, second = (fill(PartWriter(workspace, 0, ShardConfig()), 0) for _ in range(2))
    assert first.commit() == second.commit()
    assert list((workspace / "attempts").iterdir()) == []
    assert assemble(workspace, 1).samples == {"stage1/videos": 2}


def test_assembly_can_be_interrupted_anywhere(workspace: Path) -> None:
    for part in range(3):
        fill(PartWriter(workspace, part, ShardConfig()), part).commit()
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.gather(workspace, range(3), interrupt)
    assert shards.missing_parts(workspace, range(3)) == []
    assert assemble(workspace, 3) == assemble(workspace, 3) == OUTCOME
    assert len(read(workspace / "finished/stage1/videos")) == 6


def test_nothing_kept_is_the_users_error(tmp_path: Path, workspace: Path) -> None:
    writer = PartWriter(workspace, 0, ShardConfig())
    for n in range(3):
        writer.account(Account(str(n), "video", "somewhere", "rejected", "corrupt" if n else "too short"))
    writer.commit()
    with pytest.raises(UserError, match=r"nothing was kept of 3 inputs: corrupt \(2\), too short \(1\)"):
        assemble(workspace, 1)


def test_an_output_is_replaced_whole(tmp_path: Path, workspace: Path) -> None:
    output = tmp_path / "out"
    assert outputs.describe(output) is None
    for generation in range(2):
        workspace.mkdir(exist_ok=True)
        fill(PartWriter(workspace, 0, ShardConfig()), generation).commit()
        outcome = assemble(workspace, 1)
        outputs.swap_in(workspace, output)
        found = outputs.describe(output)
        assert found is not None
        assert (found.digest, found.outcome) == ("d", outcome)
    assert set(read(output / "stage1/videos")) == {"1-0", "1-1"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
