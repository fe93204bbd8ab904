"""The benchmark's metrics on real clips, whose truth is known: right through the codecs and at every frame rate, and chance where
captions are shuffled."""

import io
import itertools
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torchvision.io import decode_jpeg

from dataprep import moving_scenes, scene_files
from dataprep.clips import ClipConfig, Facts, read_video
from dataprep.encode import StageConfig, encode_frame
from dataprep.filters import FilterConfig
from dataprep.geometry import Size
from dataprep.moving_scenes import MOTIONS
from dataprep.scenes import CHECKER_CELL, PALETTE, SIMPLE_COLOURS, SIMPLE_SHAPES, Scene, render
from pipelines import checkerboard
from pipelines.judge import SPEED, Verdict, judge, parse, reworded
from pipelines.truth import COLOURS, DIRECTIONS, SHAPES, STILL, Reading, read

STORED_RATE = 24
SIZES = {36: Size(36, 64), 16: Size(16, 24)}
FRAMES = {36: 16, 16: 8}  # by height
RATES = {36: (24, 12, 8), 16: (24, 12, 8, 6, 4)}  # by height: those at which so many frames fit into two seconds
WINDOWS = [(height, rate) for height, rates in RATES.items() for rate in rates]
CHANCE = {"background": 1 / 6, "count": 1, "colour": 1 / 6, "shape": 1 / 3, "direction": 1 / 5}  # about: one in so many words


class Read(NamedTuple):
    """A window of a real clip, read."""

    caption: str
    height: int
    frame_rate: float
    reading: Reading

    def verdict(self) -> Verdict:
        return judge(self.reading, parse(self.caption))


def drawn(scene: Scene, begin: float, height: int, rate: float) -> np.ndarray:
    """(T, H, W, 3) as the geometry of dataprep crops it: 16:9, and 3:2 from its middle."""
    wide = round(height * 16 / 9)
    margin = (wide - SIZES[height].width) // 2
    frames = [render(scene, begin + n / rate, height, wide) for n in range(FRAMES[height])]
    return np.stack(frames)[:, :, margin : margin + SIZES[height].width]


def look(scene: Scene, number: int, height: int, rate: float) -> Read:
    """A window of a scene as it is drawn, at a place drawn by its number."""
    begin = np.random.default_rng(number).uniform(0, 2 - (FRAMES[height] - 1) / rate)
    stage = min(height, round(height * 16 / 9) * 9 / 16)  # pixels, where no whole number of them is as wide as 16:9
    return Read(scene.caption(), height, rate, read(drawn(scene, begin, height, rate), rate, stage))


@pytest.fixture(scope="module")
def raw() -> list[Read]:
    """360 clips as they are drawn, each of another scene; every third of an unseen combination."""
    streams = [moving_scenes.scenes(split, 7) for split in ("seen", "seen", "unseen")]
    found = []
    for number, (height, rate) in zip(range(360), itertools.cycle(WINDOWS)):
        found.append(look(next(streams[number // len(WINDOWS) % 3]), number, height, rate))
    return found


@pytest.fixture(scope="module")
def wide() -> list[Read]:
    """240 clips as they are drawn, of two objects or a pan."""
    scenes = zip(range(240), itertools.cycle(WINDOWS), moving_scenes.scenes("wide", 7))
    return [look(scene, number, height, rate) for number, (height, rate), scene in scenes]


def jpeg(frame: np.ndarray) -> np.ndarray:
    """As stage 2 stores it and training reads it."""
    data = encode_frame(frame, StageConfig("stage2", 36, 64, "jpeg"))
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()


def encoded(videos: int, difficulty: Literal["benchmark", "benchmark_wide"]) -> list[Read]:
    """Windows of video files, one at each size and frame rate: every codec and container at every rate, variable ones too."""
    made = scene_files.SceneFilesConfig("", videos, 0, 11, difficulty, max_seconds=2.25, sizes=((320, 180), (426, 240)))
    config = ClipConfig(frame_rate=STORED_RATE, clip_frames=48, min_frames=40, max_clips_per_video=1)
    rng = np.random.default_rng(0)
    found = []
    for item in scene_files.plan_items(made):
        file = io.BytesIO(scene_files.encode_video(item))
        shown = [s for s in read_video(file, [*SIZES.values()], config, FilterConfig(), Facts()) for _ in range(s.repeats)]
        stored = {36: np.stack([jpeg(s.images[0]) for s in shown]), 16: np.stack([s.images[1] for s in shown])}
        for height, rate in WINDOWS:
            stride = STORED_RATE // rate
            reach = (FRAMES[height] - 1) * stride + 1
            begin = rng.integers(len(shown) - reach + 1)
            window = stored[height][begin : begin + reach : stride]
            found.append(Read(item.caption, height, rate, read(window, rate)))
    return found


@pytest.fixture(scope="module")
def files() -> list[Read]:
    return encoded(40, "benchmark")


@pytest.fixture(scope="module")
def wide_files() -> list[Read]:
    return encoded(20, "benchmark_wide")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("colour", "a white circle moves left on a blue background"),
        ("shape", "a green square moves left on a blue background"),
        ("direction", "a green circle moves right on a blue background"),
    ],
)
def test_one_word_of_a_caption_is_another(what: str, expected: str) -> None:
    """Not the background's colour; what it says else stays."""
    caption = "a green circle moves left on a blue background"
    found = reworded(caption, what)
    assert found == expected
    assert found is not None and parse(found).background == "blue"


def test_no_direction_is_no_other() -> None:
    assert reworded("a red square stays still on a white background", "direction") is None
    assert reworded("a red square on a white background", "direction") is None
    assert reworded("a red square on a white background", "shape") == "a red triangle on a white background"


@pytest.mark.parametrize("source", ["raw", "files", "wide", "wide_files"])
def test_real_clips_are_read_right(source: str, request: pytest.FixtureRequest) -> None:
    clips: list[Read] = request.getfixturevalue(source)
    assert len(clips) >= 160
    verdicts = [clip.verdict() for clip in clips]
    for name in (*CHANCE, "camera"):
        told = [(clip, verdict) for clip, verdict in zip(clips, verdicts, strict=True) if getattr(verdict, name) is not None]
        assert bool(told) == (name != "camera" or "wide" in source)
        wrong = [clip for clip, verdict in told if not getattr(verdict, name)]
        assert len(wrong) <= 0.01 * len(told), (name, wrong)
    for height, rate in WINDOWS:  # none hides behind the others
        here = [v for clip, v in zip(clips, verdicts, strict=True) if (clip.height, clip.frame_rate) == (height, rate)]
        assert sum(not v.all for v in here) <= 1
        ratios = np.array([v.speed_ratio for v in here if v.speed_ratio is not None])
        assert len(ratios) > 0.5 * len(here)
        assert abs(ratios.mean() - 1) < 0.03
        assert np.abs(ratios - 1).max() < 0.15


def test_shuffled_captions_read_chance(raw: list[Read]) -> None:
    order = np.random.default_rng(1).permutation(len(raw))
    shuffled = [raw[other]._replace(reading=clip.reading).verdict() for clip, other in zip(raw, order, strict=True)]
    truths = [parse(clip.caption) for clip in raw]
    words = {
        "background": [t.background for t in truths],
        "count": [str(len(t.objects)) for t in truths],
        "colour": [t.objects[0].colour for t in truths],
        "shape": [t.objects[0].shape for t in truths],
        "direction": [t.objects[0].direction for t in truths],
    }
    for name, chance in CHANCE.items():
        expected = sum(count**2 for count in Counter(words[name]).values()) / len(raw) ** 2  # that two clips say the same
        assert expected == pytest.approx(chance, rel=0.15)
        low, high = binom.interval(0.9999, len(raw), expected)
        assert low <= sum(getattr(verdict, name) for verdict in shuffled) <= high, name
    assert np.mean([verdict.all for verdict in shuffled]) < 0.05


def test_with_shuffled_captions_pans_read_chance(wide: list[Read]) -> None:
    pans = [clip for clip in wide if parse(clip.caption).camera]
    assert len(pans) > 80
    order = np.random.default_rng(1).permutation(len(pans))
    right = sum(
        bool(pans[other]._replace(reading=clip.reading).verdict().camera) for clip, other in zip(pans, order, strict=True)
    )
    low, high = binom.interval(0.9999, len(pans), 1 / 4)
    assert low <= right <= high


def test_the_reader_and_the_scenes_mean_the_same_words() -> None:
    assert {name: PALETTE[name] for name in SIMPLE_COLOURS} == COLOURS
    assert set(SHAPES) == set(SIMPLE_SHAPES)
    assert set(MOTIONS) <= {*DIRECTIONS, STILL}
    assert SPEED == moving_scenes.SPEED
    assert checkerboard.CELL == CHECKER_CELL
    for scene in itertools.islice(moving_scenes.scenes("seen", 0), 50):
        figure = scene.figures[0]
        said = parse(scene.caption())
        assert (said.background, said.objects[0].colour, said.objects[0].shape) == (
            scene.background.colours[0],
            figure.colour,
            figure.shape,
        )
        steps = np.sign(figure.velocity).astype(int).tolist()
        assert said.objects[0].direction == next(name for name, motion in MOTIONS.items() if list(motion) == steps)
        assert parse(scene.still_caption()).objects[0].direction is None
    for scene in itertools.islice(moving_scenes.scenes("wide", 0), 50):
        said = parse(scene.caption())
        assert [(one.colour, one.shape) for one in said.objects] == [(one.colour, one.shape) for one in scene.figures]
        assert said.background == " and ".join(sorted(scene.background.colours))
        pan = np.sign(scene.pan).astype(int).tolist()
        assert said.camera == next((name for name, motion in MOTIONS.items() if any(pan) and list(motion) == pan), None)
