"""A second run does only what is new or changed, and ends like one that prepared everything at once."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataprep import append, partition
from dataprep import run as job
from dataprep.clips import ClipConfig
from dataprep.encode import StageConfig, TextConfig
from dataprep.fetch import FetchConfig
from dataprep.filters import FilterConfig
from dataprep.run import DataprepConfig, Work
from dataprep.selection import SelectConfig
from dataprep.shards import ShardConfig
from model.data import transfer
from model.errors import UserError
from tests.dataprep.prepared import content, same, tables
from tests.dataprep.servers import web

STAGES = (StageConfig("stage1", 18, 32, "raw"), StageConfig("stage2", 36, 64, "jpeg"))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of the items that were prepared, a list for each run. Tasks run one after the other in this process: no Spark."""
    runs: list[list[str]] = []

    def prepare(c: DataprepConfig, work: Work, missing: list[int]) -> None:
        for part in missing:
            partition.process(
                c.recipe,
                c.select,
                str(work.workspace),
                part,
                part - work.parts.start,
                lambda account: runs[-1].append(account.key),
            )

    monkeypatch.setattr(job, "_prepare", prepare)
    monkeypatch.setattr(job.report, "write", lambda *_, **__: None)  # a second each; it has tests of its own
    return runs


@pytest.fixture
def execute(prepared: list[list[str]], tmp_path: Path, encoder_folder: Path) -> Callable[..., list[str]]:
    """Run a job; returns the keys of what it prepared."""

    def run(output: Path, *inputs: Path | str, **changes: Any) -> list[str]:
        prepared.append([])
        settings: dict[str, Any] = {
            "inputs": tuple(map(str, inputs or (tmp_path / "in",))),
            "output": str(output),
            "stages": STAGES,
            "clips": ClipConfig(frame_rate=24, clip_frames=8, min_frames=4, split_at_cuts=False),
            "text": TextConfig(str(encoder_folder), 12),
            "filters": FilterConfig(),
            "select": SelectConfig(max_letterbox=1, min_sharpness=0),
            "shards": ShardConfig(size_limit_mb=1),
            "items_per_partition": 3,
        }
        job.run(DataprepConfig(**{**settings, **changes}))
        assert [path.name for path in output.parent.iterdir() if path.name.lstrip(".").startswith(output.name)] == [output.name]
        return prepared[-1]

    return run


def picture(path: Path, seed: int, caption: str) -> None:
    """Eight by eight grey squares: no two seeds are near duplicates."""
    squares = np.random.default_rng(seed).integers(30, 255, (6, 8), dtype=np.uint8)
    Image.fromarray(squares).convert("RGB").resize((64, 36), Image.Resampling.NEAREST).save(path)
    path.with_suffix(".txt").write_text(caption)


@pytest.fixture
def inputs(tmp_path: Path, media: Any) -> Path:
    """Eight pictures and two videos of two clips; one caption is missing."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(8):
        picture(folder / f"image{n}.png", n, f"picture {n}")
    for n in range(2):
        media.video(folder / f"video{n}.mp4", media.numbered(16))
        (folder / f"video{n}.txt").write_text(f"numbers {n}")
    (folder / "image3.txt").unlink()
    return folder


def test_only_what_is_new_or_changed_is_prepared(tmp_path: Path, inputs: Path, execute: Any, capsys: Any, media: Any) -> None:
    output = tmp_path / "out"
    assert len(execute(output)) == 10
    assert execute(output) == []
    assert "nothing to do" in capsys.readouterr().out
    before = {path: path.stat().st_ino for path in (output / "pool").rglob("*.mds")}

    picture(inputs / "new.png", 100, "a new one")
    (inputs / "image1.txt").write_text("a caption of another length")
    media.video(inputs / "video1.mp4", media.numbered(8))
    (inputs / "image3.txt").write_text("at last a caption")
    (inputs / "image5.png").unlink()
    (inputs / "image5.txt").unlink()
    assert sorted(execute(output)) == ["image1", "image3", "new", "video1"]
    assert "4 new or changed, 6 as before, 4 of the earlier ones gone or changed" in capsys.readouterr().out
    after = {path: path.stat().st_ino for path in (output / "pool").rglob("*.mds")}
    assert any(before.get(path) == number for path, number in after.items())  # a part that nothing was taken from
    execute(tmp_path / "fresh")
    same(output, tmp_path / "fresh")
    assert execute(output) == []


def test_after_any_changes_it_is_as_if_prepared_at_once(tmp_path: Path, inputs: Path, execute: Any) -> None:
    """Four rounds of random changes, with twins of pictures among them, of which only the first that is there may be kept."""
    draw, output = random.Random(5), tmp_path / "out"
    execute(output)
    for generation in range(4):
        for _ in range(draw.randint(1, 4)):
            present = sorted(path for path in inputs.glob("*.png"))
            chosen, name = draw.choice(present), f"image{draw.randint(0, 20)}-{generation}"
            match draw.randrange(5):
                case 0:
                    picture(inputs / f"{name}.png", 100 + draw.randrange(1000), f"new in {generation}")
                case 1:
                    picture(inputs / f"{name}.png", draw.randrange(8), "a twin")
                case 2 if len(present) > 6:
                    chosen.unlink()
                    chosen.with_suffix(".txt").unlink(missing_ok=True)
                case 3:
                    chosen.with_suffix(".txt").write_text(f"changed in {generation}, by {draw.randrange(1000)}")
                case _:
                    os.utime(chosen, ns=(0, draw.randrange(10**18)))
        execute(output, overwrite=True)
        shutil.rmtree(tmp_path / "fresh", ignore_errors=True)
        execute(tmp_path / "fresh")
        same(output, tmp_path / "fresh")
    assert any(row["reason"] == "near duplicate" for row in tables(output)[2])


def test_inputs_join_and_leave(tmp_path: Path, inputs: Path, execute: Any) -> None:
    """A second folder, whose names clash with the first one's until that is in turn left out; a manifest; another order."""
    other, output = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    for n in range(6):
        picture(other / f"image{n + 6}.png", 50 + n, f"other {n}")
    rows = {"path": [f"other/image{n}.png" for n in (6, 7)], "caption": ["a", "b"], "key": ["m6", "m7"]}
    pq.write_table(pa.table(rows), tmp_path / "m.parquet")
    execute(output)
    assert sorted(execute(output, inputs, other)) == ["image10", "image11", "image6", "image7", "image8", "image9"]
    assert execute(output, other, inputs) == ["image6", "image7", "image6", "image7"]  # which of two is the duplicate has changed
    assert execute(output, other, inputs, tmp_path / "m.parquet") == ["m6", "m7"]
    execute(tmp_path / "fresh", other, inputs, tmp_path / "m.parquet")
    same(output, tmp_path / "fresh")
    assert execute(output, other, tmp_path / "m.parquet", overwrite=True) == []
    shutil.rmtree(tmp_path / "fresh")
    execute(tmp_path / "fresh", other, tmp_path / "m.parquet")
    same(output, tmp_path / "fresh")


def test_a_run_that_would_lose_most_asks_first(tmp_path: Path, inputs: Path, execute: Any) -> None:
    """A disk that is not mounted, a folder named by mistake."""
    output = tmp_path / "out"
    execute(output)
    before = content(output)
    other = tmp_path / "other"
    other.mkdir()
    picture(other / "lonely.png", 5, "all alone")
    with pytest.raises(UserError, match=r"10 of the 10 inputs .* gone or changed; .* overwrite=true"):
        execute(output, other)
    assert content(output) == before
    assert execute(output, other, overwrite=True) == ["lonely"]
    assert set(content(output)["stage1/images"]) == {"lonely:0"}


def test_another_recipe_or_a_pool_that_is_gone_decodes_everything_if_asked(tmp_path: Path, inputs: Path, execute: Any) -> None:
    output = tmp_path / "out"
    execute(output)
    other = {"clips": ClipConfig(frame_rate=24, clip_frames=16, min_frames=4, split_at_cuts=False)}
    with pytest.raises(UserError, match=r"made by another config: everything .* overwrite=true"):
        execute(output, **other)
    assert len(execute(output, **other, overwrite=True)) == 10
    shutil.rmtree(output / "pool")
    assert execute(output, **other) == []  # complete as it is
    picture(inputs / "new.png", 100, "a new one")
    with pytest.raises(UserError, match=r"no pool any more: everything .* overwrite=true"):
        execute(output, **other)
    assert len(execute(output, **other, overwrite=True)) == 11


def test_partitions_of_another_size_are_no_other_job(tmp_path: Path, inputs: Path, execute: Any) -> None:
    output = tmp_path / "out"
    execute(output)
    assert execute(output, items_per_partition=5) == []
    picture(inputs / "new.png", 100, "a new one")
    assert execute(output, items_per_partition=5) == ["new"]


def test_it_can_be_interrupted_anywhere(tmp_path: Path, inputs: Path, execute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each step of putting the pools together, and again before each later one: the end is the same."""
    output = tmp_path / "out"
    execute(output)
    before = content(output)
    (inputs / "image1.txt").write_text("a caption of another length")
    for n in range(4):
        picture(inputs / f"new{n}.png", 100 + n, f"new {n}")
    steps = [(append.shards, "gather_shards"), (append, "_reuse"), (append._Tables, "write"), (job.selection, "_pick")]
    steps += [(job.report, "write"), (job.outputs, "swap_in")]
    for number, (place, name) in enumerate(steps):

        def die(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(place, name, die)
            with pytest.raises(KeyboardInterrupt):
                execute(output)
        assert content(output) == before
        assert len(list(tmp_path.glob("out.tmp-*"))) == 1, number
    assert execute(output) == []  # all were prepared in the first run
    execute(tmp_path / "fresh")
    same(output, tmp_path / "fresh")


def test_remote_inputs_are_added_changed_and_tried_again(tmp_path: Path, inputs: Path, execute: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    output = tmp_path / "out"
    with web() as site:

        def put(*keys: str) -> None:
            """A manifest of these."""
            rows = {"path": [f"{key}.png" for key in keys], "caption": [f"far {key}" for key in keys], "key": list(keys)}
            table = pa.BufferOutputStream()
            pq.write_table(pa.table(rows), table)
            site.files["m.parquet"] = table.getvalue().to_pybytes()

        for n in range(4):
            site.files[f"far{n}.png"] = (inputs / f"image{n}.png").read_bytes()
        put("far0", "far1", "far2", "gone")
        address = site.address("m.parquet")
        site.faults["far1.png"] = [503] * 3
        assert sorted(execute(output, inputs, address))[:4] == ["far0", "far1", "far2", "gone"]
        assert fates(output, "far1", "gone") == ["fetch failed", "fetch refused"]
        assert execute(output, inputs, address) == ["far1"]
        assert execute(output, inputs, address) == []
        site.files["gone.png"] = site.files["far3.png"]
        assert execute(output, inputs, address) == []  # it was said to be gone
        assert execute(output, inputs, address, fetch=FetchConfig(attempts=2)) == ["gone"]
        put("far0", "far2", "gone", "far3")
        assert execute(output, inputs, address, fetch=FetchConfig(attempts=2)) == ["far3"]
        execute(tmp_path / "fresh", inputs, address, fetch=FetchConfig(attempts=2))
        same(output, tmp_path / "fresh")
        site.faults["m.parquet"] = [503] * 3
        before = content(output)
        with pytest.raises(UserError, match="HTTP 503"):
            execute(output, inputs, address)
        assert content(output) == before


def fates(output: Path, *keys: str) -> list[str]:
    rows = {row["key"]: row for row in pq.read_table(output / "items.parquet").to_pylist()}
    return [rows[key]["reason"] for key in keys]
