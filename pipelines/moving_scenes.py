"""Score generated clips of the benchmark Moving Scenes by their captions.

``python -m pipelines.moving_scenes runs/samples --real data/shards/stage2/videos`` reads what each clip shows from its pixels
(``pipelines.truth``), holds it against its prompt (``pipelines.judge``) and prints how many are right, beside the real clips.

Shapes: T frames, H height, W width, N clips, F features; frames are (T, H, W, 3) uint8 RGB.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm

from model import command, media
from model.errors import UserError
from pipelines.clips import RealClips, made
from pipelines.judge import SPEED, Verdict, judge, parse
from pipelines.metrics import Frechet
from pipelines.truth import read

PROPERTIES = ("background", "count", "colour", "shape", "direction", "camera", "all")
SPEED_TOLERANCE = 0.15
BINS = 6  # of a channel's histogram
LEAST_SPREAD = 1 / 255  # of a feature among the real clips; less is not worth telling apart
MAX_FRAMES = 256
MIN_FILE_HEIGHT = 32  # pixels; h264 halves the resolution of colours, and shapes of a few pixels with it


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


def distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Squared Frechet distance of (N, F) features, in units of the real ones' spread."""
    scale = real.std(axis=0) + LEAST_SPREAD
    frechet = Frechet(real.shape[1])
    for found, is_real in ((generated, False), (real, True)):
        frechet.add(torch.from_numpy((found - real.mean(axis=0)) / scale), is_real)
    return frechet.value()


def table(generated: Score, real: Score | None = None) -> str:
    """The scores as lines of text."""
    beside = {rate.name: f"{rate.right / rate.number:8.1%}" for rate in real.rates} if real else {}
    lines = [f"{'right':12}{'clips':>14}{'':>9}   95 % interval   not told{'   real' if real else ''}"]
    for r in generated.rates:
        shown = f"{r.right:6} of {r.number:4}{r.right / r.number:9.1%}   {r.low:6.1%} to {r.high:6.1%}{r.unread:9}"
        lines.append(f"{r.name:12}{shown}{beside.get(r.name, '')}")
    for s in generated.speeds:
        lines.append(f"speed at {s.frame_rate:g} frames per second: {s.ratio:.3f} of the true one, mean of {s.number} clips")
    if generated.flicker is not None:
        against = "" if real is None or real.flicker is None else f", real clips {real.flicker:.2f}"
        lines.append(f"flicker: {generated.flicker:.2f} levels{against}")
    if real and min(len(generated.features), len(real.features) // 2) >= 2:
        halves = distance(real.features[::2], real.features[1::2])
        found = distance(generated.features, real.features)
        count = f"{len(generated.features)} against {len(real.features)} clips"
        lines.append(
            f"frechet distance of simple features: {found:.3f}, {count}; between two halves of the real ones {halves:.3f}"
        )
    return "\n".join(lines)


def sampled(folder: Path, limit: int | None = None) -> Iterator[Clip]:
    """The clips of a sampling job, with their prompts.

    Raises:
        UserError: not the folder of a finished job, or a clip that cannot be read.
    """
    for entry in tqdm(made(folder)[:limit], f"clips of {folder.name}", unit="clip"):
        video = media.read_video(entry.path, MAX_FRAMES)
        if video.frames.shape[1] < MIN_FILE_HEIGHT:
            raise UserError(f"{entry.path}: {video.frames.shape[1]} lines, too few to tell shapes in compressed video")
        yield Clip(video.frames, entry.prompt, video.frame_rate)


def real_clips(location: str, frames: int, frame_rates: Sequence[float], limit: int, seed: int = 0) -> Iterator[Clip]:
    """Clips of a prepared data set; rate and place in the stored clip are drawn from the seed.

    Raises:
        UserError: no data set, or one whose clips are not long enough.
    """
    clips = RealClips(location, frames, frame_rates, seed)
    for number in tqdm(range(min(limit, len(clips))), "real clips", unit="clip"):
        sample = clips.read(number)
        yield Clip(sample.frames.numpy(), sample.caption, sample.frame_rate)


def report(folders: Sequence[Path], real: str | None, limit: int | None, speed: float) -> str:
    """The table of sampling jobs' clips, beside as many real ones of the same length and frame rates if a data set is named.

    Raises:
        UserError: clips or real ones that are missing or do not fit each other.
    """
    clips = [clip for folder in folders for clip in sampled(folder, limit)]
    shapes = {clip.frames.shape for clip in clips}
    if len(shapes) != 1:
        raise UserError(f"clips of one size and length can be scored together, not of {sorted(shapes) or 'none'}")
    beside = None
    if real is not None:
        rates = sorted({round(clip.frame_rate, 3) for clip in clips})
        others = list(real_clips(real, clips[0].frames.shape[0], rates, len(clips)))
        if not others or others[0].frames.shape != clips[0].frames.shape:
            raise UserError(f"{real}: holds {others[0].frames.shape if others else 'no clips'}, not {clips[0].frames.shape}")
        beside = score(others, speed)
    return table(score(clips, speed), beside)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Score generated clips of the benchmark Moving Scenes by their captions.")
    parser.add_argument("folders", nargs="+", help="folders of sampling jobs (python -m pipelines.sample)")
    parser.add_argument("--real", metavar="DATASET", help="real clips to show beside them, such as data/shards/stage2/videos")
    parser.add_argument("--limit", type=int, help="clips of each folder; all if not given")
    parser.add_argument("--speed", type=float, default=SPEED, help=f"of what moves, stage heights a second (default {SPEED})")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    options = parser.parse_args(arguments)

    def body() -> None:
        if options.speed <= 0 or (options.limit is not None and options.limit < 1):
            raise UserError("speed must be above 0 and limit at least 1")
        print(report([Path(folder) for folder in options.folders], options.real, options.limit, options.speed), flush=True)

    command.guard(body, options.debug)


if __name__ == "__main__":
    main()
