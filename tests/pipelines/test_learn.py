"""The benchmark's whole chain: every stage is the real command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.config import UserError
from pipelines.learn import LearnConfig, learn

REPOSITORY = Path(__file__).parents[2]
SHORT = ["schedule.steps=4", "schedule.warmup=1", "evaluation.videos=2", "evaluation.images=2", "samples.sampler.steps=2"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_videos_to_figures_and_a_second_start_runs_nothing_again(tmp_path: Path) -> None:
    overrides = {
        "media": ["num_videos=24", "num_images=8"],
        "stage1": SHORT,
        "stage2": SHORT,
        "learned": [
            "cascade.stage1_sampler.steps=2",
            "cascade.stage2_sampler.steps=2",
            "upsampled=3",
            "swept=3",
            "guidances=[1,4]",
        ],
    }
    words = [
        f"folder={tmp_path / 'learn'}",
        "seen=4",
        "new=3",
        *(f"{name}={json.dumps(told)}" for name, told in overrides.items()),
    ]
    command = [sys.executable, "-m", "pipelines.learn", "yamls/learn/learn.yaml", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "learn" / "learned" / "learned.json").read_text())
    numbers = {name: found[name]["real"]["rates"]["all"]["number"] for name in ("seen", "new")}
    assert sum(numbers.values()) == 7 and numbers["new"] >= 3  # with so few to train on, more is new
    for name, number in numbers.items():  # what it is measured against is right
        rates = found[name]["real"]["rates"]
        assert {rates[each]["right"] for each in ("background", "colour", "shape", "direction")} == {number}
    assert found["upsampling"]["clips"] == 3 and found["upsampling"]["bicubic"] > 25

    again = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=REPOSITORY)
    assert again.returncode == 0 and again.stdout.count("done before") == 9


def test_overrides_that_training_would_refuse_are_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'schedule.step'; did you mean 'schedule.steps'"):
        learn(LearnConfig(folder=str(tmp_path / "learn"), stage2=("schedule.step=5",)))
    assert not list(tmp_path.iterdir())


def test_what_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="new must be at least 1, got 0"):
        LearnConfig(new=0)
