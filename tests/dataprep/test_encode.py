"""Frames -> clips -> bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from dataprep import encode
from dataprep.clips import ClipConfig, Shown
from dataprep.encode import Packed, StageConfig

RAW = StageConfig("small", 2, 3, "raw")
JPEG = StageConfig("large", 16, 32, "jpeg")


def shown(number: int, repeats: int) -> Shown:
    return Shown([np.full((2, 3, 3), number, np.uint8), np.full((16, 32, 3), number, np.uint8)], repeats)


def frames(packed: Packed) -> list[bytes]:
    starts = [0, *packed.frame_ends[:-1]]
    return [packed.frames[start:end] for start, end in zip(starts, packed.frame_ends, strict=True)]


def test_clips_are_consecutive_and_a_short_rest_is_dropped() -> None:
    config = ClipConfig(frame_rate=10, clip_frames=4, min_frames=3)
    counts = [1, 2, 3, 1, 1, 2]  # 10 frames: clips of 4 and 4, and 2 that are too few
    expected = np.repeat(np.arange(6), counts)
    clips = encode.pack_clips([shown(n, count) for n, count in enumerate(counts)], (RAW, JPEG), config)
    assert [(clip.number, clip.start_seconds) for clip in clips] == [(0, 0.0), (1, 0.4)]
    for clip, numbers in zip(clips, (expected[:4], expected[4:8]), strict=True):
        assert clip.scores.brightness == pytest.approx(numbers[:1].mean() / 255)  # two frames per second are looked at
        raw, jpeg = (frames(packed) for packed in clip.stages)
        assert [frame[0] for frame in raw] == list(numbers)
        assert all(len(frame) == 2 * 3 * 3 for frame in raw)
        levels = [np.asarray(Image.open(io.BytesIO(frame))).mean() for frame in jpeg]
        assert levels == pytest.approx(list(numbers), abs=1)


def test_a_rest_that_is_long_enough_is_a_shorter_clip() -> None:
    clips = encode.pack_clips([shown(0, 7)], (RAW, JPEG), ClipConfig(frame_rate=10, clip_frames=4, min_frames=3))
    assert [len(clip.stages[0].frame_ends) for clip in clips] == [4, 3]
    assert all(clip.stages[0].frame_ends.dtype == np.uint32 for clip in clips)


def test_jpeg_is_4_2_0_at_the_quality_asked_for() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    sizes = [len(encode.encode_frame(image, StageConfig("s", 16, 32, "jpeg", quality))) for quality in (50, 95)]
    assert sizes[0] < sizes[1]
    decoded = Image.open(io.BytesIO(encode.encode_frame(image, JPEG)))
    assert decoded.size == (32, 16)
    assert [layer[1:3] for layer in decoded.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["../up", "Stage", "", "a/b", "-x"])
def test_stage_names_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        StageConfig(name, 2, 2, "raw")
