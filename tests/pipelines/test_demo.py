"""The demo on own data: every stage is the real command."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dataprep import scene_files
from model import command, media
from model.errors import UserError
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
    for sidecar in sorted(data.glob("*.txt"))[:3]:  # longer than the text encoder takes
        sidecar.write_text(" ".join([sidecar.read_text()] * 8))
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


def test_overrides_that_training_would_refuse_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'schedule.step'; did you mean 'schedule.steps'"):
        demo(DemoConfig(prompts=("a circle",), folder=str(tmp_path / "demo"), overrides=("schedule.step=5",)))
    assert not list(tmp_path.iterdir())


def test_what_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        DemoConfig(prompts=("a circle",), processes=0)
    with pytest.raises(ValueError, match="prompts must name at least one"):
        DemoConfig(prompts=(" ",))


def test_two_demos_do_not_share_a_folder_and_sigterm_ends_what_runs(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "pipelines.demo", "yamls/demo/demo.yaml", f"folder={tmp_path}/demo"]
    first = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert first.stdout is not None
        assert "make sample media" in first.stdout.readline()
        second = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
        assert second.returncode == 2
        assert second.stderr.strip() == f"error: another one is at work in {tmp_path}/demo; wait for it, or name another folder"
        stages = psutil.Process(first.pid).children(recursive=True)
        assert stages
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == command.EXIT_INTERRUPTED
        assert not psutil.wait_procs(stages, timeout=10)[1]
    finally:
        first.kill()
