"""The demo on own data: every stage is the real command."""

import subprocess
import sys
from pathlib import Path

import pytest

from dataprep import scene_files
from model import command, media
from model.config import UserError
from pipelines.demo import DemoConfig, demo

REPOSITORY = Path(__file__).parents[2]
SHORT = ["schedule.steps=6", "schedule.warmup=1", "checkpoints.every=3", "samples.every=6", "samples.sampler.steps=2"]


def run(data: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    overrides = "overrides=[" + ",".join(f"'{value}'" for value in SHORT) + "]"
    words = [sys.executable, "-m", "pipelines.demo", "yamls/demo/demo.yaml", f"data={data}", f"folder={folder}/demo", overrides]
    return subprocess.run(words, capture_output=True, text=True, timeout=900, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_own_videos_become_clips_and_a_second_start_runs_nothing_again(tmp_path: Path) -> None:
    # Fewer videos than the demo's batch takes, and no images at all.
    scene_files.make(
        scene_files.SceneFilesConfig(output=str(tmp_path / "made"), num_videos=6, num_images=0, layouts=("folder",), processes=1)
    )
    data = tmp_path / "made" / "folder"
    done = run(data, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = tmp_path.glob("demo-*")
    clips = sorted((folder / "samples").glob("*.mp4"))
    assert len(clips) == 4
    assert media.read_video(clips[0], 100).frames.shape == (8, 36, 64, 3)
    captions = {path.read_text().strip() for path in data.glob("*.txt")}
    assert captions and (folder / "samples" / "sheet.png").is_file()

    again = run(data, tmp_path)
    assert again.returncode == 0 and again.stdout.count("done before") == 5


def test_a_missing_or_empty_folder_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for data, told in (("none", "no such folder"), ("empty", "nothing in")):
        with pytest.raises(SystemExit) as end:
            command.guard(lambda data=data: demo(DemoConfig(str(tmp_path / data), str(tmp_path / "demo"))), debug=False)
        assert end.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.glob("demo*"))


def test_a_stage_that_fails_ends_the_demo(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "readme.md").write_text("no media")
    with pytest.raises(UserError, match="stopped at"):
        demo(DemoConfig(str(tmp_path / "data"), str(tmp_path / "demo")))
