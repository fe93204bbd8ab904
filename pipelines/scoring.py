"""How many clips of the benchmark Moving Scenes are right, by their captions: each is read (pipelines.truth) and judged.

    score([Clip(frames, caption, frame_rate), ...]).rates

Imports no more than numpy, scipy and what reads clips, so that it runs where Composer is not installed.

Shapes: T frames, H height, W width, N clips, F features; frames are (T, H, W, 3) uint8 RGB.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from model.errors import UserError
from pipelines.judge import SPEED, Verdict, judge, parse
from pipelines.truth import read

PROPERTIES = ("background", "count", "colour", "shape", "direction", "camera", "all")
SPEED_TOLERANCE = 0.15
BINS = 6  # of a channel's histogram


@dataclass(frozen=True)
class Clip:
    """A clip and what it should show."""

    frames: np.ndarray  # (T, H, W, 3) uint8 RGB
    caption: str
    frame_rate: float  # per second
    stage: float | None = None  # pixels per stage height, see pipelines.truth.read; None: H


@dataclass(frozen=True)
class Rate:
    """How many clips are right."""

    name: str
    right: int
    unread: int  # of the others: where it could not be told
    number: int
    low: float  # Wilson's interval of 95 %
    high: float


@dataclass(frozen=True)
class Speed:
    """How fast objects move that should, at one frame rate."""

    frame_rate: float
    number: int  # of clips where it could be told
    ratio: float  # mean of read over true


@dataclass(frozen=True)
class Score:
    """What a set of clips is worth."""

    rates: tuple[Rate, ...]  # PROPERTIES, and "speed": within SPEED_TOLERANCE, of clips where something should move
    speeds: tuple[Speed, ...]
    flicker: float | None  # median over clips, see pipelines.truth.Reading
    features: np.ndarray  # (N, F)


def score(clips: Iterable[Clip], speed: float = SPEED) -> Score:
    """Read and judge clips.

    Args:
        clips: any number of them, one after the other.
        speed: that moving objects and cameras should have, in stage heights per second.

    Raises:
        UserError: no clips, or a caption that is not of the benchmark.
    """
    judged: list[tuple[float, Verdict]] = []
    flickers, found = [], []
    for clip in clips:
        truth = parse(clip.caption)
        reading = read(clip.frames, clip.frame_rate, clip.stage)
        judged.append((clip.frame_rate, judge(reading, truth, speed)))
        flickers += [reading.flicker] if reading.flicker is not None else []
        found.append(features(clip.frames))
    if not judged:
        raise UserError("no clips to score")
    rates = []
    for name in PROPERTIES:
        answers = [verdict for _, verdict in judged if getattr(verdict, name) is not None]
        if answers:
            unread = sum(name in verdict.unread or (name == "all" and bool(verdict.unread)) for verdict in answers)
            rates.append(_rate(name, sum(getattr(verdict, name) for verdict in answers), unread, len(answers)))
    moving = [(rate, verdict.speed_ratio) for rate, verdict in judged if verdict.moves]
    told = [(rate, ratio) for rate, ratio in moving if ratio is not None]
    if moving:
        right = sum(abs(ratio - 1) <= SPEED_TOLERANCE for _, ratio in told)
        rates.append(_rate("speed", right, len(moving) - len(told), len(moving)))
    counts = Counter(rate for rate, _ in told)
    speeds = [Speed(rate, n, float(np.mean([r for at, r in told if at == rate]))) for rate, n in sorted(counts.items())]
    return Score(tuple(rates), tuple(speeds), float(np.median(flickers)) if flickers else None, np.stack(found))


def _rate(name: str, right: int, unread: int, number: int) -> Rate:
    interval = binomtest(right, number).proportion_ci(method="wilson")
    return Rate(name, right, unread, number, float(interval.low), float(interval.high))


def features(frames: np.ndarray) -> np.ndarray:
    """(F,) simple features of a clip, all about 0..1: colours, their histogram, edges, and change between frames."""
    values = frames.astype(np.float64) / 255
    bins = (frames.astype(int) * BINS // 256).reshape(-1, 3)
    histogram = [np.bincount(bins[:, channel], minlength=BINS) / len(bins) for channel in range(3)]
    grey = values.mean(axis=-1)
    edges = [np.diff(grey, axis=axis) for axis in (1, 2)]
    once, twice = (np.diff(values, n, axis=0) for n in (1, 2))
    change = [[np.abs(step).mean(), np.sqrt((step**2).mean())] if step.size else [0.0, 0.0] for step in (*edges, once, twice)]
    return np.concatenate([values.mean(axis=(0, 1, 2)), values.std(axis=(0, 1, 2)), *histogram, *change])
