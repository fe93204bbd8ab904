"""UCF-101 and MSR-VTT in the layouts that they are handed out in."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from model.errors import UserError
from pipelines import benchmarks

CLASSES = yaml.safe_load(benchmarks.CLASSES.read_text())


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    for number, name in enumerate(CLASSES):
        folder = tmp_path / "UCF-101" / name
        folder.mkdir(parents=True)
        for clip in range(1 + number % 3):
            (folder / f"v_{name}_g01_c0{clip}.avi").touch()
    return tmp_path / "UCF-101"


def test_every_class_has_the_papers_prompt(ucf: Path, tmp_path: Path) -> None:
    assert len(CLASSES) == 101 and len(set(CLASSES.values())) == 101 and list(CLASSES) == sorted(CLASSES, key=str.lower)
    benchmarks.main(["ucf101", str(ucf), "--output", str(tmp_path / "out")])
    rows = pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()
    assert len(rows) == sum(1 + number % 3 for number in range(101)) and len({row["key"] for row in rows}) == len(rows)
    for row in rows:
        assert row["caption"] == CLASSES[Path(row["path"]).parent.name] and Path(row["path"]).is_file()


def test_a_part_of_ucf101_is_refused(ucf: Path, tmp_path: Path) -> None:
    (ucf / "YoYo").rename(ucf / "Yoyo2")
    with pytest.raises(UserError, match=r"1 classes are missing \['YoYo'\], 1 are none \['Yoyo2'\]"):
        benchmarks.ucf101(ucf, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="101 classes are missing"):
        benchmarks.ucf101(tmp_path / "nowhere", tmp_path / "out")


def test_msrvtt_gives_all_captions_and_each_video_once(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    sentences = [{"video_id": f"video{n % 2}", "caption": f"caption\n {n}", "sen_id": n} for n in range(6)]
    (tmp_path / "info.json").write_text(json.dumps({"sentences": sentences}))
    (videos / "video0.mp4").touch()
    with pytest.raises(UserError, match=r"1 of 2 videos are missing \['video1'\]"):
        benchmarks.msrvtt(tmp_path / "info.json", videos, tmp_path / "out")
    (videos / "video1.mp4").touch()
    told = benchmarks.msrvtt(tmp_path / "info.json", videos, tmp_path / "out")
    assert "2 videos" in told and "6 captions" in told
    assert (tmp_path / "out/captions.txt").read_text().splitlines() == [f"caption {n}" for n in range(6)]
    rows = pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()
    assert [(row["key"], row["caption"]) for row in rows] == [("video0", "caption 0"), ("video1", "caption 1")]


@pytest.mark.parametrize("text", ["", "[]", '{"sentences": [{"caption": "a"}]}'])
def test_other_annotations_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "info.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        benchmarks.main(["msrvtt", str(tmp_path / "info.json"), "--videos", str(tmp_path), "--output", str(tmp_path / "out")])
    assert end.value.code == 2 and "not MSR-VTT's annotations" in capsys.readouterr().err
