"""Scores of clips of the benchmark: counts, intervals and distances against closed forms, and the command on real folders."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from dataprep import moving_scenes as benchmark
from dataprep.scenes import render
from model import media, text
from model.data import schema
from model.data.schema import Manifest, TextManifest
from model.errors import UserError
from pipelines import moving_scenes, scoring
from pipelines.moving_scenes import LEAST_SPREAD, distance, table
from pipelines.scoring import Clip, Score, features, score


def clips(number: int, seed: int, frame_rate: float = 12, frames: int = 16) -> list[Clip]:
    """Real ones, half a second into each scene."""
    drawn = itertools.islice(benchmark.scenes("seen", seed), number)
    return [
        Clip(np.stack([render(scene, 0.5 + n / frame_rate, 36, 64) for n in range(frames)]), scene.caption(), frame_rate)
        for scene in drawn
    ]


def rates(found: Score) -> dict[str, tuple[int, int]]:
    return {rate.name: (rate.right, rate.number) for rate in found.rates}


def test_counts_and_intervals() -> None:
    real = clips(20, 0, frames=8)
    moving = sum(" moves " in clip.caption for clip in real)
    found = score(real)
    assert rates(found) == {
        **dict.fromkeys(("background", "count", "colour", "shape", "direction", "all"), (20, 20)),
        "speed": (moving,) * 2,
    }
    assert [rate.unread for rate in found.rates] == [0] * 7
    assert [(s.frame_rate, s.number) for s in found.speeds] == [(12, moving)]
    assert found.speeds[0].ratio == pytest.approx(1, abs=0.01)
    empty = [Clip(np.broadcast_to(clip.frames[:, :1, :1], clip.frames.shape).copy(), clip.caption, 12) for clip in real[:5]]
    mixed = score([*real[5:], *empty])
    assert rates(mixed)["background"] == (20, 20)
    assert rates(mixed)["shape"] == rates(mixed)["all"] == (15, 20)
    assert next(rate.unread for rate in mixed.rates if rate.name == "shape") == 5
    rate = scoring._rate("of a table in a book", 95, 0, 100)  # Wilson's interval of 95 in 100
    assert (rate.low, rate.high) == pytest.approx((0.8882, 0.9785), abs=1e-4)


def test_pictures_are_scored_without_motion() -> None:
    drawn = itertools.islice(benchmark.scenes("unseen", 1), 5)
    pictures = [Clip(render(scene, 1, 36, 64)[None], scene.still_caption(), 12) for scene in drawn]
    found = score(pictures)
    assert rates(found) == dict.fromkeys(("background", "count", "colour", "shape", "all"), (5, 5))
    assert (found.speeds, found.flicker) == ((), None)
    assert "flicker" not in table(found)


def test_scenes_drawn_straight_into_another_shape_say_their_scale() -> None:
    drawn = [*itertools.islice(benchmark.scenes("unseen", 8), 20)]
    made = [(np.stack([render(scene, 0.5 + n / 8, 16, 24) for n in range(8)]), scene.caption()) for scene in drawn]
    found = score(Clip(frames, caption, 8, stage=24 * 9 / 16) for frames, caption in made)
    assert rates(found)["all"] == (20, 20)
    assert found.speeds[0].ratio == pytest.approx(1, abs=0.02)


def test_a_frame_rate_that_is_not_obeyed_shows() -> None:
    said = [Clip(clip.frames, clip.caption, 24) for clip in clips(12, 2, frames=8) if " moves " in clip.caption]
    found = score(said)
    assert found.speeds[0].ratio == pytest.approx(2, rel=0.01)
    assert rates(found)["speed"] == (0, len(said))
    assert rates(found)["direction"] == (len(said), len(said))
    assert rates(score(said, speed=0.5))["speed"] == (len(said), len(said))


def test_features_tell_flicker_from_colour() -> None:
    (clip,) = clips(1, 3)
    flickering = clip.frames.clip(10, 245)
    flickering[::2] -= 10
    still, moved = features(clip.frames.clip(10, 245)), features(flickering)
    once, _, twice, _ = (moved - still)[-4:]  # mean change between frames, and change of the change
    assert (once, twice) == pytest.approx((10 / 255, 20 / 255), rel=0.05)
    assert np.abs(moved - still)[:6].max() < 0.03  # colours
    assert features(clip.frames[:1]).shape == still.shape


def test_distance_against_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(0.5, 0.1, (500, 5))
    assert distance(real, real) == pytest.approx(0, abs=1e-6)
    step = np.array([1.0, 0, -2, 0, 0]) * (real.std(axis=0) + LEAST_SPREAD)
    assert distance(real + step, real) == pytest.approx(5, rel=1e-6)  # of Gaussians of one covariance
    wide = real.mean(axis=0) + 3 * (real - real.mean(axis=0))
    variances = (real.std(axis=0, ddof=1) / (real.std(axis=0) + LEAST_SPREAD)) ** 2
    assert distance(wide, real) == pytest.approx((3 - 1) ** 2 * variances.sum(), rel=1e-3)


def write_job(folder: Path, made: list[Clip]) -> Path:
    records = []
    for number, clip in enumerate(made):
        media.write_mp4(folder / f"{number}.mp4", clip.frames, clip.frame_rate)
        records.append({"file": f"{number}.mp4", "prompt": clip.caption, "seed": number})
    (folder / "samples.json").write_text(json.dumps({"clips": records}))
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    with MDSWriter(out=str(folder), columns=schema.COLUMNS, hashes=["xxh64"]) as writer:
        for number, clip in enumerate(clips(24, 4, frame_rate=24, frames=31)):
            row = {"key": f"{number}", "caption": clip.caption, "frames": clip.frames.tobytes()}
            ends = (np.arange(1, 32) * clip.frames[0].size).astype(np.uint32)
            size = {"source_height": 36, "source_width": 64, "start_seconds": 0.0}
            writer.write({**row, **size, "frame_ends": ends, "text": text.pack(torch.zeros(2, 4))})
    Manifest("videos", 36, 64, 24.0, 31, "raw", 24, TextManifest("encoder", "r", 4, "bfloat16", 8)).write(folder)
    return folder


def test_command(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = write_job(tmp_path / "fast", clips(6, 5, 24)), write_job(tmp_path / "slow", clips(6, 6, 12))
    moving_scenes.main([str(fast), str(slow), "--real", str(dataset)])
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "12 of   12   100.0%    75.8% to 100.0%        0  100.0%" in lines["all"]
    assert out.count("frames per second: 1.0") + out.count("frames per second: 0.9") == 2
    assert "12 against 12 clips" in lines["frechet"]
    assert "real clips 0." in lines["flicker:"]
    moving_scenes.main([str(fast), "--limit", "2"])
    assert "2 of    2" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["nothing there", "another caption", "another length", "another rate", "too small", "no limit"])
def test_what_does_not_fit_is_told_in_one_line(
    wrong: str, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = clips(2, 7, 9 if wrong == "another rate" else 12, frames=12 if wrong == "another length" else 16)
    if wrong == "another caption":
        made[1] = Clip(made[1].frames, "a dog barks", 12)
    if wrong == "another length":
        made[1] = Clip(made[1].frames[:8], made[1].caption, 12)
    if wrong == "too small":
        made = [Clip(clip.frames[:, ::2, ::2], clip.caption, 12) for clip in made]
    folder = write_job(tmp_path, made)
    arguments = [str(tmp_path / "other" if wrong == "nothing there" else folder), "--real", str(dataset)]
    with pytest.raises(SystemExit) as stop:
        moving_scenes.main(arguments + (["--limit", "0"] if wrong == "no limit" else []))
    assert stop.value.code == 2
    said = {
        "nothing there": "not the folder of a finished sampling job",
        "another caption": "cannot be judged",
        "another length": "one size and length",
        "another rate": "of which 9 is no whole part",
        "too small": "18 lines, too few",
        "no limit": "at least 1",
    }
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said[wrong] in error


def test_no_clips_are_an_error() -> None:
    with pytest.raises(UserError, match="no clips"):
        score([])
