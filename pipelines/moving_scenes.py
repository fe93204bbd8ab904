"""Score generated clips of the benchmark Moving Scenes by their captions.

``python -m pipelines.moving_scenes runs/samples --real data/shards/stage2/videos`` reads what each clip shows from its pixels,
holds it against its prompt (``pipelines.scoring``) and prints how many are right, beside the real clips.

Shapes: T frames, H height, W width, N clips, F features; frames are (T, H, W, 3) uint8 RGB.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from model import command, media
from model.errors import UserError
from pipelines.clips import RealClips, made
from pipelines.judge import SPEED
from pipelines.metrics import Frechet
from pipelines.scoring import Clip, Score, score

LEAST_SPREAD = 1 / 255  # of a feature among the real clips; less is not worth telling apart
MAX_FRAMES = 256
MIN_FILE_HEIGHT = 32  # pixels; h264 halves the resolution of colours, and shapes of a few pixels with it


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
