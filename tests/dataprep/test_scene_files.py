"""The sample files: every one is opened and compared with the scene that it shows."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataprep import scene_files
from dataprep.scene_files import Item, SceneFilesConfig, make, plan_items
from dataprep.scenes import render
from model.config import load
from model.errors import UserError

CODECS = {"libx264": "h264", "libx265": "hevc", "libvpx-vp9": "vp9", "libsvtav1": "av1"}
CONTAINERS = {"mp4": "mp4", "mkv": "matroska", "webm": "webm"}
YAML = str(Path(__file__).parents[2] / "yamls" / "scenes.yaml")
TINY = ((128, 72), (72, 128))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SceneFilesConfig:
    """40 videos: all pairs of format and frame rate."""
    output = str(tmp_path_factory.mktemp("scenes") / "set")
    return SceneFilesConfig(output, 40, 6, min_seconds=0.6, max_seconds=0.9, sizes=TINY, samples_per_tar=6)


@pytest.fixture(scope="module")
def made(config: SceneFilesConfig) -> dict[str, tuple[bytes, str]]:
    """Key -> (bytes of the media file, caption), gathered from the three layouts as a reader would."""
    output = make(config)
    found: dict[str, tuple[bytes, str]] = {}
    for path in sorted((output / "folder").iterdir()):
        if path.suffix not in (".txt", ".json"):
            found[path.stem] = (path.read_bytes(), caption_beside({p.suffix: p.read_bytes() for p in siblings(path)}))
    for shard in sorted((output / "webdataset").glob("*.tar")):
        with tarfile.open(shard) as tar:
            members: dict[str, dict[str, bytes]] = {}
            for member in tar:
                key, dot, suffix = member.name.partition(".")
                members.setdefault(key, {})[dot + suffix] = tar.extractfile(member).read()
        for key, parts in members.items():
            media = [data for suffix, data in parts.items() if suffix not in (".txt", ".json")]
            assert len(media) == 1
            found[key] = (media[0], caption_beside(parts))
    for row in pq.read_table(output / "parquet" / "manifest.parquet").to_pylist():
        path = output / "parquet" / row["path"]
        found[path.stem] = (path.read_bytes(), row["caption"])
    return found


def siblings(path: Path) -> list[Path]:
    return [other for other in path.parent.iterdir() if other.stem == path.stem]


def caption_beside(parts: dict[str, bytes]) -> str:
    assert (".txt" in parts) != (".json" in parts)
    return parts[".txt"].decode().strip() if ".txt" in parts else json.loads(parts[".json"])["caption"]


def test_the_layouts_hold_each_item_once(config: SceneFilesConfig, made: dict[str, tuple[bytes, str]]) -> None:
    items = plan_items(config)
    assert set(made) == {item.key for item in items}
    assert len(items) == 46
    for layout in config.layouts:
        assert sum(item.layout == layout for item in items) in (15, 16)
    for item in items:
        expected = item.scene.caption() if item.encoder else item.scene.still_caption()
        assert made[item.key][1] == item.caption == expected
    assert {item.sidecar for item in items if item.layout == "folder"} == {"txt", "json"}


def test_videos_are_what_they_claim(config: SceneFilesConfig, made: dict[str, tuple[bytes, str]]) -> None:
    seen = set()
    for item in plan_items(config)[: config.num_videos]:
        with av.open(io.BytesIO(made[item.key][0])) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.codec.canonical_name == CODECS[item.encoder]
            assert CONTAINERS[item.suffix] in container.format.name
            assert (stream.width, stream.height) == (item.width, item.height)
            frames = list(container.decode(stream))
            if item.frame_rate:
                assert float(stream.average_rate) == pytest.approx(item.frame_rate, rel=0.02)
            assert container.duration / av.time_base == pytest.approx(item.times[-1], abs=0.15)
        shown = [frame.time - frames[0].time for frame in frames]
        np.testing.assert_allclose(shown, item.times, atol=0.0011)  # mkv and webm count milliseconds
        intervals = np.diff(item.times)
        if item.frame_rate:
            np.testing.assert_allclose(intervals, 1 / item.frame_rate)
        else:
            assert intervals.max() > 2 * intervals.min()
        seen.add((item.encoder, item.suffix, item.frame_rate))
    assert len(seen) == 40


def test_frames_show_the_scene_at_their_time(config: SceneFilesConfig, made: dict[str, tuple[bytes, str]]) -> None:
    for item in plan_items(config)[: config.num_videos]:
        with av.open(io.BytesIO(made[item.key][0])) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for index in (0, len(frames) // 2, len(frames) - 1):
            expected = render(item.scene, item.times[index], item.height, item.width)
            difference = np.abs(frames[index].astype(int) - expected)
            assert np.median(difference) <= 8, item
            assert difference.mean() < 12, item
        middle = frames[len(frames) // 2].astype(int)
        if any(figure.velocity != (0.0, 0.0) for figure in item.scene.figures) or item.scene.pan != (0.0, 0.0):
            # Closer to its own instant than to another: the timestamps are the truth's.
            other = np.abs(middle - render(item.scene, item.times[0], item.height, item.width)).mean()
            own = np.abs(middle - render(item.scene, item.times[len(frames) // 2], item.height, item.width)).mean()
            assert own < other, item


def test_images(config: SceneFilesConfig, made: dict[str, tuple[bytes, str]]) -> None:
    formats = set()
    for item in plan_items(config)[config.num_videos :]:
        with Image.open(io.BytesIO(made[item.key][0])) as image:
            formats.add(image.format)
            assert {"JPEG": "jpg", "PNG": "png"}[image.format] == item.suffix
            shown = np.asarray(image.convert("RGB")).astype(int)
        difference = np.abs(shown - render(item.scene, item.times[0], item.height, item.width))
        assert difference.max() == 0 if item.suffix == "png" else difference.mean() < 12
    assert formats == {"JPEG", "PNG"}


def test_truth_names_every_file(config: SceneFilesConfig, made: dict[str, tuple[bytes, str]]) -> None:
    output = Path(config.output)
    rows = [json.loads(line) for line in (output / scene_files.TRUTH_NAME).read_text().splitlines()]
    assert [row["key"] for row in rows] == [item.key for item in plan_items(config)]
    assert all((output / row["file"]).is_file() for row in rows)
    assert rows[0]["scene"]["figures"][0]["colour"] in rows[0]["caption"]


def test_goes_on_after_an_interrupt(config: SceneFilesConfig, made: dict[str, tuple[bytes, str]]) -> None:
    output = Path(config.output)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*") if path.is_file()}
    media = sorted(path for path in files if path.parent.name in ("folder", "media") and path.suffix not in (".txt", ".json"))
    lost = [media[0], media[-1], sorted((output / "webdataset").glob("*.tar"))[1]]
    for path in lost:
        path.unlink()
    (output / "folder" / ".video-00000.mp4.partial").write_bytes(b"half")
    marker = output / scene_files.MARKER_NAME
    marker.write_text(marker.read_text().replace('"finished": true', '"finished": false'))
    make(dataclasses.replace(config, processes=1))
    again = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.rglob("*") if path.is_file()}
    assert {path: data for path, (data, _) in again.items()} == {path: data for path, (data, _) in files.items()}
    tables = {marker, output / scene_files.TRUTH_NAME, output / "parquet" / scene_files.MANIFEST_NAME}
    assert {path for path in files if files[path][1] != again[path][1]} == {*lost, *tables} | {
        path for gone in lost for path in siblings(gone) if path.parent.name == "folder"
    }


def test_a_finished_set_is_left_alone(config: SceneFilesConfig, made: dict[str, tuple[bytes, str]]) -> None:
    output = Path(config.output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    make(dataclasses.replace(config, processes=1))
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    with pytest.raises(UserError, match="another config"):
        make(dataclasses.replace(config, seed=1))


def test_a_set_from_before_a_setting_existed_counts_as_of_its_default(tmp_path: Path) -> None:
    config = SceneFilesConfig(str(tmp_path / "set"), 1, 0, layouts=("folder",), processes=1)
    marker = make(config) / scene_files.MARKER_NAME
    state = json.loads(marker.read_text())
    del state["config"]["prefix"]
    marker.write_text(json.dumps(state))
    assert make(config) == marker.parent
    with pytest.raises(UserError, match="another config"):
        make(dataclasses.replace(config, prefix="new-"))


def test_refuses_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").write_bytes(b"precious")
    with pytest.raises(UserError, match="not made by this command"):
        make(SceneFilesConfig(str(tmp_path), 1, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.mp4"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sizes=[[321,180]]", "even"),
        ("num_videos=-1", "at least 0"),
        ("min_seconds=3", "min_seconds <= max_seconds"),
        ("layouts=[folder,folder]", "each once"),
        ("layouts=[zip]", "folder"),
        ("prefix=../", "prefix must be at most 32 lower-case letters"),
    ],
)
def test_wrong_configs_are_told_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(SceneFilesConfig, YAML, [override])


def test_sets_with_other_prefixes_share_no_name(config: SceneFilesConfig) -> None:
    names = [{item.file_name for item in plan_items(dataclasses.replace(config, prefix=prefix))} for prefix in ("", "new-")]
    assert not names[0] & names[1] and {f"new-{name}" for name in names[0]} == names[1]


def test_shipped_yaml_covers_every_pair() -> None:
    items = plan_items(load(SceneFilesConfig, YAML))
    videos: list[Item] = [item for item in items if item.encoder]
    assert len({(item.encoder, item.suffix, item.frame_rate) for item in videos}) == 40
    for layout in ("folder", "webdataset", "parquet"):
        here = [item for item in videos if item.layout == layout]
        assert {item.encoder for item in here} == set(CODECS)
        assert {item.frame_rate for item in here} == set(scene_files.FRAME_RATES)
        assert any(item.height > item.width for item in here)


def test_command(tmp_path: Path) -> None:
    overrides = [f"output={tmp_path}/new/set", "num_videos=1", "num_images=1", "sizes=[[64,64]]", "max_seconds=2"]
    arguments = [sys.executable, "-m", "dataprep.scene_files", YAML]
    done = subprocess.run([*arguments, *overrides], capture_output=True, text=True, check=True)
    assert f"{tmp_path}/new/set/truth.jsonl" in done.stdout
    assert (tmp_path / "new/set/folder/video-00000.mp4").is_file()
    wrong = subprocess.run([*arguments, "num_video=1"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "did you mean 'num_videos'?" in wrong.stderr


def test_a_scene_that_the_av1_encoder_once_spoilt_decodes() -> None:
    item = scene_files.plan_items(SceneFilesConfig(output="unused", difficulty="simple"))[95]
    assert item.encoder == "libsvtav1"
    with av.open(io.BytesIO(scene_files.encode_video(item))) as container:
        assert len(list(container.decode(video=0))) == len(item.times)


def test_the_av1_encoder_leaves_the_process_at_its_scheduling(config: SceneFilesConfig) -> None:
    item = next(item for item in plan_items(config) if item.encoder == "libsvtav1")
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    scene_files.encode_video(item)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
