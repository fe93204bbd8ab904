"""Clips of real encoded files that hold several shots: each lies in one of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataprep import clips, encode, partition
from dataprep.clips import ClipConfig, Facts
from dataprep.encode import Clip, StageConfig, TextConfig
from dataprep.filters import FilterConfig, Rejected
from dataprep.ingest import Item, Span
from dataprep.partition import Recipe
from dataprep.scenes import draw_scene, render
from dataprep.shots import ShotFinder

STAGES = (StageConfig("small", 36, 64, "raw"), StageConfig("large", 72, 128, "raw"))
CONFIG = ClipConfig(frame_rate=24, clip_frames=24, min_frames=8, max_clips_per_video=20)
Frames = list[np.ndarray]


def scene(seed: int, frames: int, height: int = 144, width: int = 256) -> Frames:
    """A moving shape on a plain or patterned background."""
    drawn = draw_scene(np.random.default_rng(seed))
    return [render(drawn, n / 24, height, width) for n in range(frames)]


def landscape(height: int = 144, width: int = 1024) -> np.ndarray:
    """A wide picture of soft hills of colour."""
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    waves = [np.sin(x * 2 * np.pi * k / width + y * 0.01 * j + j) for j, k in enumerate((3, 7, 12))]
    layers = np.broadcast_arrays(*[120 + 60 * w + 40 * v for w, v in zip(waves, [*waves[1:], waves[0]], strict=True)])
    return np.stack(layers, axis=-1).clip(0, 255).astype(np.uint8)


@pytest.fixture
def cut(tmp_path: Path, media: Any) -> Callable[..., list[Clip]]:
    """The clips of a video file of these frames."""

    def run(frames: Frames, rate: int = 24, config: ClipConfig = CONFIG) -> list[Clip]:
        path = media.video(tmp_path / "v.mp4", frames, rate, options={"crf": "23", "preset": "veryfast"})
        with path.open("rb") as file:
            shown = clips.read_video(file, [stage.size for stage in STAGES], config, FilterConfig(), Facts())
            return encode.pack_clips(shown, STAGES, config)

    return run


def spans(found: list[Clip]) -> list[tuple[int, int]]:
    return [(start, start + len(c.stages[0].frame_ends)) for c in found for start in [round(c.start_seconds * 24)]]


@pytest.mark.parametrize("seeds", [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
@pytest.mark.parametrize("rate", [24, 30, 60, 12])
def test_each_clip_of_three_scenes_lies_in_one(cut: Callable[..., list[Clip]], seeds: tuple[int, ...], rate: int) -> None:
    lengths = [round(seconds * rate) for seconds in (1.5, 1.0, 1.25)]
    frames = [image for seed, count in zip(seeds, lengths, strict=True) for image in scene(seed, count)]
    edges = np.cumsum([0, *lengths]) / rate * 24  # in stored frames
    expected = []
    for begin, end in zip(np.ceil(edges[:-1] - 0.02), np.ceil(edges[1:] - 0.02), strict=True):
        expected += [(int(a), int(min(a + 24, end))) for a in np.arange(begin, end, 24) if min(a + 24, end) - a >= 8]
    found = cut(frames, rate)
    assert spans(found) == expected
    assert sorted({clip.shot for clip in found}) == [0, 1, 2]
    assert [clip.number for clip in found] == list(range(len(found)))


@pytest.mark.parametrize("at", [1, 2, 46, 47])
def test_a_cut_at_the_very_edge_is_found(cut: Callable[..., list[Clip]], at: int) -> None:
    found = spans(cut([*scene(1, at), *scene(2, 48 - at)]))
    assert found and all(end <= at or begin >= at for begin, end in found)


def test_it_can_be_turned_off(cut: Callable[..., list[Clip]]) -> None:
    config = ClipConfig(frame_rate=24, clip_frames=24, min_frames=8, split_at_cuts=False)
    assert spans(cut([*scene(1, 36), *scene(2, 12)], config=config)) == [(0, 24), (24, 48)]


@pytest.mark.parametrize("pixels", [4, 24, 48])
def test_a_pan_is_no_cut(cut: Callable[..., list[Clip]], pixels: int) -> None:
    """Also one that crosses a fifth of the picture with each frame."""
    wide = landscape()
    frames = [np.roll(wide, -pixels * n, axis=1)[:, :256] for n in range(48)]
    assert spans(cut(frames)) == [(0, 24), (24, 48)]


def test_a_whip_pan_between_two_stills_is_no_cut(cut: Callable[..., list[Clip]]) -> None:
    wide = landscape()
    offsets = [0] * 12 + [24 * n for n in range(1, 13)] + [12 * 24] * 24
    assert spans(cut([wide[:, offset : offset + 256] for offset in offsets])) == [(0, 24), (24, 48)]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_flash_is_no_cut(cut: Callable[..., list[Clip]], length: int) -> None:
    frames = scene(1, 48)
    for n in range(10, 10 + length):
        frames[n] = np.full_like(frames[n], 255)
    assert spans(cut(frames)) == [(0, 24), (24, 48)]


def test_a_flash_between_two_scenes_hides_no_cut(cut: Callable[..., list[Clip]]) -> None:
    frames = [*scene(1, 24), *[np.full((144, 256, 3), 255, np.uint8)] * 2, *scene(2, 24)]
    assert spans(cut(frames)) == [(0, 24), (26, 50)]


def test_at_most_so_many_clips_come_from_a_source(cut: Callable[..., list[Clip]]) -> None:
    config = ClipConfig(frame_rate=24, clip_frames=24, min_frames=8, max_clips_per_video=2)
    assert len(cut([image for seed in (1, 2, 3, 4) for image in scene(seed, 12)], config=config)) == 2


def test_a_source_without_a_long_shot_is_rejected(tmp_path: Path, media: Any) -> None:
    path = media.video(tmp_path / "v.mp4", [image for seed in range(1, 7) for image in scene(seed, 6)], 24)
    recipe = Recipe(stages=STAGES, clips=CONFIG, text=TextConfig("none", 8))
    with pytest.raises(Rejected, match="shots too short: none has 8 frames at 24 per second"):
        partition.prepare(Item("v", "video", "v", Span(str(path))), recipe)


def test_nothing_has_no_cuts() -> None:
    assert ShotFinder(24).cuts() == []
