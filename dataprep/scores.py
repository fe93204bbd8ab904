"""What a clip looks like, in a few numbers: motion, sharpness, brightness, black borders, and a hash that near duplicates share.

Computed during the one decode: from a small probe picture of each frame, scaled from the largest stage, and now and then from a
frame of that stage itself. They are stored with every clip and judged later (``dataprep/selection.py``).

Shapes: T frames of a clip; arrays are (H, W, 3) uint8 RGB or (H, W) uint8 grey. Scores are shares between 0 and 1.
"""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

PROBE_HEIGHT = 72  # pixels; of the probe, unless the largest stage is smaller
MOTION_SECONDS = 0.5  # between the two frames that are compared
MOTION_PAIRS = 8  # per second
# Grey levels of a pixel, after a 3x3 mean of the probe, below which a change counts as noise. Grain and quantisation average out
# in scaling down: a still at crf 40 stays within 4 (tests/dataprep/test_scores.py).
MOTION_LEVEL = 8
BLACK_LEVEL = 20  # grey levels; codecs ring around black bars
BLACK_SHARE = 0.98  # of the pixels of a row or column that is part of a bar: a channel's logo may reach in
BLUR_TAPS = 11  # of the low pass that sharpness compares with
HASH_SIDE = 32  # pixels; of the picture that is hashed

cv2.setNumThreads(1)  # Spark runs one task per core


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one clip or image."""

    motion: float = 0.0  # share of the picture that changes within half a second, mean over the clip; 0 for images
    sharpness: float = 0.0  # of the sharpest frame looked at; 0.95 for a sharp picture, 0.6 for one enlarged six times
    brightness: float = 0.0  # mean grey level; 0 is black, 1 white
    bar_top: float = 0.0  # black throughout the clip: share of the height
    bar_bottom: float = 0.0
    bar_left: float = 0.0  # share of the width
    bar_right: float = 0.0
    phash: int = 0  # 64 bits, of the middle frame
    text_area: float | None = None  # of the middle frame, share that is text; None where looks.text_area is off
    aesthetic: float | None = None  # of the middle frame, as looks.aesthetic scores it

    @property
    def letterbox(self) -> float:
        """The share of the height or width, whichever is larger, that black bars on opposite sides take. Both count as
        wide as the narrower: a night sky is black on one side only."""
        return 2 * max(min(self.bar_top, self.bar_bottom), min(self.bar_left, self.bar_right))


def grey(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) RGB -> (H, W)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def probe(image: np.ndarray) -> np.ndarray:
    """A grey frame of the largest stage -> the small picture of it that most scores are computed from."""
    height, width = image.shape
    if height <= PROBE_HEIGHT:
        return image
    return cv2.resize(image, (max(1, round(width * PROBE_HEIGHT / height)), PROBE_HEIGHT), interpolation=cv2.INTER_AREA)


def score(probes: Sequence[np.ndarray], frame_rate: float, sharpness: float) -> Scores:
    """The scores of a clip from its T grey ``probes``, ``frame_rate`` per second; of an image where T is 1."""
    looked_at = np.stack(probes[:: max(1, round(frame_rate / 2))])  # two per second
    top, bottom, left, right = bars(looked_at)
    return Scores(
        motion=motion(probes, frame_rate),
        sharpness=sharpness,
        brightness=float(looked_at.mean()) / 255,
        bar_top=top,
        bar_bottom=bottom,
        bar_left=left,
        bar_right=right,
        phash=perceptual_hash(probes[len(probes) // 2]),
    )


def motion(probes: Sequence[np.ndarray], frame_rate: float) -> float:
    """The share of pixels that differ between frames half a second apart, mean over the clip; 0 for a single frame.

    Robust against what moves nothing: noise by the small picture and ``MOTION_LEVEL``, changes of exposure because the median
    change is taken off first. A still picture that is zoomed or panned moves.
    """
    lag = min(round(MOTION_SECONDS * frame_rate), len(probes) - 1)
    if lag < 1:
        return 0.0
    shares = []
    for begin in range(0, len(probes) - lag, max(1, round(frame_rate / MOTION_PAIRS))):
        first, second = (cv2.blur(probes[n], (3, 3)).astype(np.int16) for n in (begin, begin + lag))
        change = second - first
        shares.append(np.mean(np.abs(change - np.median(change)) > MOTION_LEVEL))
    return float(np.mean(shares))


def sharpness(image: np.ndarray) -> float:
    """How much of the variation between neighbours of a grey image a low pass takes away; 0 where nothing varies.

    1 minus the blur of Crété et al., "The blur effect" (2007), with two changes: variation is squared, so that smooth gradients,
    which no low pass takes away, do not outweigh edges; and both directions count by their variation, where the paper takes the
    worse one, so that stripes are sharp. Contrast does not count.
    """
    levels = image.astype(np.float32)
    total = lost = 0.0
    for axis, taps in ((0, (1, BLUR_TAPS)), (1, (BLUR_TAPS, 1))):
        variation = np.square(np.diff(levels, axis=axis))
        smooth = np.square(np.diff(cv2.blur(levels, taps), axis=axis))
        total += float(variation.sum())
        lost += float(np.maximum(0, variation - smooth).sum())
    return lost / total if total else 0.0


def bars(frames: np.ndarray) -> tuple[float, float, float, float]:
    """The shares of (T, H, W) grey ``frames`` that are black in all of them, from the top, bottom, left and right edge.

    A picture that is all black has no bars: it is dark.
    """
    brightest = frames.max(axis=0)
    black = brightest <= BLACK_LEVEL
    found = []
    for share in (black.mean(axis=1), black.mean(axis=0)):  # of the rows, of the columns
        other = np.flatnonzero(share < BLACK_SHARE)
        if not len(other):
            return 0.0, 0.0, 0.0, 0.0
        found += [float(other[0]) / len(share), float(len(share) - 1 - other[-1]) / len(share)]
    return found[0], found[1], found[2], found[3]


def perceptual_hash(image: np.ndarray) -> int:
    """64 bits of a grey image: which of its 8x8 lowest frequencies lie above their median (pHash). Recompression, scaling and
    small changes of brightness turn few of them."""
    small = cv2.resize(image, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    bits = low > float(np.median(low.tolist()))
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
