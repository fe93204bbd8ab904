"""Scores on real encoded files: stills stay still through codec noise, and each fault shows in its own score."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dataprep import clips, encode, scores
from dataprep.clips import ClipConfig, Facts
from dataprep.encode import StageConfig
from dataprep.filters import FilterConfig
from dataprep.scores import Scores
from dataprep.selection import SelectConfig, fault

STAGES = (StageConfig("small", 36, 64, "raw"), StageConfig("large", 144, 256, "raw"))
CONFIG = ClipConfig(frame_rate=24, clip_frames=48, min_frames=24, crop_bars=False)
Picture = Callable[[int], np.ndarray]


def photograph(seed: int = 0, height: int = 144, width: int = 256) -> np.ndarray:
    """(H, W, 3) with the spectrum of a photograph: amplitude falls with frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    layers = [np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency, s=(height, width)) for _ in range(4)]
    levels = [layers[0] / layers[0].std() + 0.3 * layer / layer.std() for layer in layers[1:]]
    return (120 + 45 * np.stack(levels, axis=-1)).clip(0, 255).astype(np.uint8)


PHOTOGRAPH = photograph()


def noisy(n: int) -> np.ndarray:
    return (PHOTOGRAPH + np.random.default_rng(n).normal(0, 8, PHOTOGRAPH.shape)).clip(0, 255).astype(np.uint8)


def small_ball(n: int) -> np.ndarray:
    return cv2.circle(PHOTOGRAPH.copy(), (20 + 2 * n, 70), 5, (200, 30, 30), -1)


def moving(n: int) -> np.ndarray:
    return np.roll(PHOTOGRAPH, n, axis=1)


def letterboxed(n: int) -> np.ndarray:
    image = moving(n)
    image[:18] = image[-18:] = 0
    return image


def night_sky(n: int) -> np.ndarray:
    image = moving(n)
    image[:48] = 2
    return image


@pytest.fixture
def scored(tmp_path: Path, media: Any) -> Callable[..., Scores]:
    """The scores of the first clip of an encoded video of two seconds, whose frame n is ``picture(n)``."""

    def run(picture: Picture, crf: int = 28, frames: int = 48) -> Scores:
        options = {"crf": str(crf), "preset": "veryfast"}
        path = media.video(tmp_path / "v.mp4", [picture(n) for n in range(frames)], 24, options=options)
        with path.open("rb") as file:
            shown = clips.read_video(file, [stage.size for stage in STAGES], CONFIG, FilterConfig(max_cropped=1.0), Facts())
            return encode.pack_clips(shown, STAGES, CONFIG)[0].scores

    return run


@pytest.mark.parametrize(
    ("picture", "crf", "reason"),
    [
        (moving, 28, None),
        (moving, 40, None),
        (small_ball, 28, None),
        (night_sky, 28, None),  # black on one side is no letterbox
        (lambda n: PHOTOGRAPH, 28, "still"),
        (lambda n: PHOTOGRAPH, 40, "still"),
        (noisy, 28, "still"),
        (noisy, 40, "still"),
        (lambda n: (PHOTOGRAPH * (0.9 + 0.1 * (n % 2))).astype(np.uint8), 28, "still"),  # a flickering lamp moves nothing
        (lambda n: cv2.GaussianBlur(moving(n), (0, 0), 6), 28, "blurred"),
        (lambda n: (moving(n) * 0.05).astype(np.uint8), 28, "dark"),
        (letterboxed, 28, "letterboxed"),
        (lambda n: letterboxed(n).transpose(1, 0, 2)[:, ::-1], 28, "letterboxed"),  # bars at the sides
    ],
)
def test_each_fault_is_seen_at_the_default_thresholds(
    scored: Callable[..., Scores], picture: Picture, crf: int, reason: str | None
) -> None:
    found = fault("video", scored(picture, crf), SelectConfig())
    assert (found and found.reason) == reason, found


def test_bars_are_measured_to_a_row_of_the_probe(scored: Callable[..., Scores]) -> None:
    found = scored(letterboxed)
    assert found.bar_top == pytest.approx(18 / 144, abs=1 / 72)
    assert found.bar_bottom == pytest.approx(18 / 144, abs=1 / 72)
    assert (found.bar_left, found.bar_right) == (0, 0)
    assert found.letterbox == pytest.approx(0.25, abs=2 / 72)


def test_a_picture_in_parts_of_the_clip_is_no_bar() -> None:
    frames = np.zeros((2, 72, 128), np.uint8)
    frames[0, 10:62] = 100
    assert scores.bars(frames) == (10 / 72, 10 / 72, 0, 0)
    frames[1, :20, 64:] = 100  # a title, later
    assert scores.bars(frames) == (0, 10 / 72, 0, 0)
    assert scores.bars(np.zeros((2, 72, 128), np.uint8)) == (0, 0, 0, 0)  # dark, not letterboxed


def test_the_hash_survives_compression_and_tells_pictures_apart(scored: Callable[..., Scores]) -> None:
    def distance(a: int, b: int) -> int:
        return (a ^ b).bit_count()

    clean, rough = scored(moving, 18).phash, scored(moving, 35).phash
    assert distance(clean, rough) <= 3
    brighter = scored(lambda n: (moving(n) * 0.8 + 30).astype(np.uint8)).phash
    assert distance(clean, brighter) <= 3
    hashes = [scores.perceptual_hash(scores.grey(photograph(seed))) for seed in range(12)]
    assert min(distance(a, b) for n, a in enumerate(hashes) for b in hashes[:n]) > 12


def test_sharpness_does_not_depend_on_contrast_and_falls_with_blur() -> None:
    grey = scores.grey(PHOTOGRAPH)
    sharp = scores.sharpness(grey)
    assert scores.sharpness((grey // 2 + 40).astype(np.uint8)) == pytest.approx(sharp, abs=0.03)
    blurred = [scores.sharpness(cv2.GaussianBlur(grey, (0, 0), sigma)) for sigma in (1, 2, 4)]
    assert sharp > blurred[0] > blurred[1] > blurred[2]
    assert scores.sharpness(np.full((36, 64), 90, np.uint8)) == 0


def test_motion_of_half_a_clip_counts_half() -> None:
    still = [scores.grey(PHOTOGRAPH)] * 48
    run = [scores.grey(np.roll(PHOTOGRAPH, 8 * n, axis=1)) for n in range(48)]
    assert scores.motion(still, 24) == 0
    assert scores.motion(still + run, 24) == pytest.approx(scores.motion(run, 24) / 2, rel=0.2)
    assert scores.motion(run[:1], 1) == 0


def test_the_probe_is_the_mean_of_what_it_covers() -> None:
    image = np.random.default_rng(0).integers(0, 256, (288, 512), dtype=np.uint8)
    expected = image.reshape(72, 4, 128, 4).mean(axis=(1, 3))
    assert np.abs(scores.probe(image) - expected).max() <= 1
    assert scores.probe(image[:36, :64]).shape == (36, 64)
