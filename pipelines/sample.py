"""Generate clips from prompts with models pulled from the MLflow registry.

Alone, or ``composer -n N pipelines/sample.py ...`` to share the prompts among N processes. Writes an mp4 and a gif for each
prompt, a contact sheet, and samples.json with prompts, seeds and model versions. Started again, it makes what is missing.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

# Composer's launcher puts pipelines/ first on the path, where a file of ours could shadow a library.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, UnidentifiedImageError  # noqa: E402
from torch.nn import functional  # noqa: E402
from tqdm import tqdm  # noqa: E402

from model import command, config, media  # noqa: E402
from model.codec import from_pixels, to_pixels  # noqa: E402
from model.errors import RunError, UserError  # noqa: E402
from pipelines.cascade import Cascade, CascadeConfig, Progress  # noqa: E402
from pipelines.clips import RealClips, captions  # noqa: E402
from pipelines.prompts import apportion, blocked_by, of_file  # noqa: E402
from pipelines.ranks import Ranks, default_device  # noqa: E402


@dataclass(frozen=True)
class GivenConfig:
    """A picture, or the frames of a video, that the clips hold: to animate, to continue, to end with."""

    path: str
    at: int = 0  # number of the frame, or of the video's first; from the end if negative


@dataclass(frozen=True)
class SampleConfig:
    """A sampling job."""

    prompts: tuple[str, ...] = ()
    output: str = "runs/samples"
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    prompts_file: str | None = None  # more prompts, one a line
    prompts_from: str | None = None  # a data set whose clips' captions are prompts too
    number: int | None = None  # of clips: prompts in the proportions in which they are given; None: one for each
    given: tuple[GivenConfig, ...] = ()
    # A data set of videos at stage 1's or stage 2's size: its clips go through stage 2 alone, their captions are the prompts.
    low_from: str | None = None
    seed: int = 0  # the n-th prompt gets seed + n
    batch: int = 4  # clips sampled at once
    sheet: int = 32  # clips on the contact sheet: the first ones
    device: str | None = None  # None: a GPU if there is one


@dataclass(frozen=True)
class Clip:
    """One clip to make."""

    number: int
    prompt: str
    seed: int
    path: Path  # of the mp4


def sample(c: SampleConfig) -> None:
    """Run the job.

    Raises:
        UserError: nothing to sample, or models or given pictures that cannot be had.
        RunError: a clip cannot be written; those before it stay.
    """
    clips, refused = _clips(c)
    given = read_given(c.given, c.cascade.frames)
    if c.low_from and (given or c.prompts or c.prompts_file or c.prompts_from or c.number):
        raise UserError("low_from: its clips come with their captions; leave out prompts, number and given")
    ranks = Ranks.join()
    rank, world = ranks.rank, ranks.world
    cascade = Cascade(c.cascade, c.device or default_device())
    low = LowClips(c.low_from, cascade, c.seed) if c.low_from else None
    told = made_by(cascade, c.cascade, given)
    if low:
        told["settings"]["low_from"] = low.digest
    Path(c.output).mkdir(parents=True, exist_ok=True)
    mine = [clip for clip in clips[rank::world] if not _is_made(clip, told)]
    if rank == 0 and len(mine) < len(clips[rank::world]):
        print(f"{len(clips[rank::world]) - len(mine)} of {len(clips[rank::world])} clips are there already")
    with tqdm(total=len(mine), desc="clips", unit="clip", disable=rank > 0) as bar:
        for start in range(0, len(mine), c.batch):
            part = mine[start : start + c.batch]
            bars = _bars(disable=rank > 0)
            prompts, seeds = [clip.prompt for clip in part], [clip.seed for clip in part]
            if low:
                made = cascade.upsample(prompts, seeds, torch.stack([low.read(clip.number) for clip in part]), bars)
            else:
                made = cascade.sample(prompts, seeds, bars, given)
            for clip, frames in zip(part, made.high, strict=True):
                _write(clip, frames, c.cascade.frame_rate, told)
                bar.update()
    ranks.wait()
    if rank == 0:
        _finish(c, clips, refused, told, low)


class LowClips:
    """Windows of a data set's clips at ``cascade.frame_rate``, as stage 1 might have made them.

    Raises:
        UserError: no stage 2, no data set of videos, or of another size than the stages'.
    """

    def __init__(self, location: str, cascade: Cascade, seed: int) -> None:
        if cascade.stage2 is None:
            raise UserError("low_from needs a second stage: cascade.stage2 is null")
        self._stage2 = cascade.stage2.denoiser
        codec, upsampler = self._stage2.config.codec, self._stage2.config.upsampler
        assert upsampler is not None
        self._clips = RealClips(location, self._stage2.config.network.size[0], (cascade.config.frame_rate,), seed)
        manifest = self._clips.manifest
        small, large = (codec.height // upsampler.factor, codec.width // upsampler.factor), (codec.height, codec.width)
        self._is_large = (manifest.height, manifest.width) == large
        if manifest.kind != "videos" or (manifest.height, manifest.width) not in (small, large):
            held = f"{manifest.kind} of {manifest.height}x{manifest.width}"
            raise UserError(f"low_from: {location} holds {held}; stage 2 takes videos of {small} or makes them of {large} pixels")
        self.digest = _digest(repr(manifest).encode())

    def read(self, number: int) -> torch.Tensor:
        """(T, C, h, w) in [-1, 1] at stage 1's size."""
        video = from_pixels(self._clips.read(number).frames)
        return self._stage2.downsample(video[None])[0] if self._is_large else video


def _clips(c: SampleConfig) -> tuple[list[Clip], list[str]]:
    """What to make, and the prompts that are blocked; the others keep the seeds that they would have without them."""
    prompts = list(c.prompts)
    if c.prompts_file:
        prompts += of_file(c.prompts_file)
    for source in (c.prompts_from, c.low_from):
        if source:
            prompts += captions(source)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("prompts: give at least one, and none empty")
    for name in ("batch", "sheet", "number"):
        if (value := getattr(c, name)) is not None and value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if c.number is not None:
        prompts = apportion(prompts, c.number)
    digits = max(3, len(str(len(prompts) - 1)))
    clips = [Clip(n, p, c.seed + n, Path(c.output, f"{n:0{digits}d}-{slug(p)}.mp4")) for n, p in enumerate(prompts)]
    refused = {clip.prompt for clip in clips if blocked_by(clip.prompt, c.cascade.blocked) is not None}
    served = [clip for clip in clips if clip.prompt not in refused]
    if not served:
        raise UserError("prompts: all of them hold something of cascade.blocked")
    return served, sorted(refused)


def read_given(given: Sequence[GivenConfig], length: int | None) -> dict[int, Image.Image]:
    """Pictures by the number of the frame.

    Raises:
        UserError: no picture and no video, or two for one frame.
    """
    pictures: dict[int, Image.Image] = {}
    for entry in given:
        for number, picture in enumerate(_pictures(entry.path), entry.at):
            if entry.at < 0 <= number:
                raise UserError(f"given: {entry.path}: at {entry.at} it goes beyond the clip's end")
            place = number if length is None or number >= 0 else number + length
            if place in pictures:
                raise UserError(f"given: {entry.path}: frame {number} is given twice")
            pictures[place] = picture
    return pictures


def _pictures(path: str) -> list[Image.Image]:
    if not Path(path).is_file():
        raise UserError(f"given: no such file: {path}")
    try:
        with Image.open(path) as image:
            return [image.convert("RGB")]
    except UnidentifiedImageError:
        return [Image.fromarray(frame) for frame in media.read_video(path, 1000).frames]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"given: {path}: not a readable picture: {error}") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def made_by(cascade: Cascade, settings: CascadeConfig, given: Mapping[int, Image.Image] = MappingProxyType({})) -> dict[str, Any]:
    """What decides a clip besides its prompt and its seed: the models' origins and all settings, as plain values."""
    stages = {"stage1": cascade.stage1, "stage2": cascade.stage2}
    origins = {name: asdict(stage.origin) for name, stage in stages.items() if stage is not None}
    pictures = [[str(at), _digest(image.tobytes())] for at, image in given.items()]
    tree = config.to_tree(settings)
    for name in ("blocked", "offload", "upsampled_at_once"):  # do not decide what a clip shows
        del tree[name]
    return {"models": origins, "settings": {**tree, "given": pictures}}


def tags(prompt: str, seed: int, told: dict[str, Any]) -> dict[str, str]:
    """What a clip's file says of itself; ``told`` is what ``made_by`` returns."""
    comment = json.dumps({"generated_by": "snapvideo", "prompt": prompt, "seed": seed, **told}, sort_keys=True)
    return {"title": prompt, "comment": comment}


def _is_made(clip: Clip, told: dict[str, Any]) -> bool:
    """Whether the clip is there, made of this prompt by these models with these settings."""
    try:
        made = media.read_tags(clip.path).get("comment") == tags(clip.prompt, clip.seed, told)["comment"]
    except UserError:
        return False
    return made and clip.path.with_suffix(".gif").is_file()


def _write(clip: Clip, frames: torch.Tensor, frame_rate: float, told: dict[str, Any]) -> None:
    try:
        media.write_gif(clip.path.with_suffix(".gif"), frames, frame_rate)
        # Last: it says that the clip is there.
        media.write_mp4(clip.path, frames, frame_rate, tags(clip.prompt, clip.seed, told))
    except (OSError, av.FFmpegError) as error:
        raise RunError(f"{clip.path}: {error.strerror or error}; the clips before it are whole") from error


def _finish(c: SampleConfig, clips: list[Clip], refused: list[str], told: dict[str, Any], low: LowClips | None) -> None:
    output = Path(c.output)
    shown = clips[: c.sheet]
    most = c.cascade.frames or 1000
    frames = [media.read_video(clip.path, most).frames for clip in shown]
    titles = [clip.prompt for clip in shown]
    if low:  # above each clip what it was made from
        inputs = [_enlarged(low.read(clip.number), made.shape[1:3]) for clip, made in zip(shown, frames, strict=True)]
        frames = [strip for pair in zip(inputs, frames, strict=True) for strip in pair]
        titles = [title for prompt in titles for title in (f"{prompt}: stage 2's input", "stage 2")]
    media.write_contact_sheet(output / "sheet.png", frames, titles)
    records = [{"file": clip.path.name, "prompt": clip.prompt, "seed": clip.seed} for clip in clips]
    tree = {"clips": records, "refused": refused, **told}
    (output / "samples.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    if refused:
        print(f"{len(refused)} prompts hold something of cascade.blocked and were not sampled: see {output / 'samples.json'}")
    print(f"{len(clips)} clips: {output}\ncontact sheet: {output / 'sheet.png'}")


def _enlarged(video: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """(T, C, h, w) in [-1, 1] -> (T, H, W, C) uint8, each pixel a square."""
    return to_pixels(functional.interpolate(video, size, mode="nearest")[None])[0].numpy()


def slug(prompt: str) -> str:
    """A short file name of letters, digits and dashes, whatever the prompt holds."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "clip"


def _bars(disable: bool) -> Progress:
    """A progress bar for each stage."""
    return lambda stage, steps: tqdm(range(steps), desc=stage, unit="step", leave=False, disable=disable)


if __name__ == "__main__":
    command.run(
        SampleConfig, sample, __doc__ or "", example="python -m pipelines.sample yamls/sample.yaml prompts='[\"a corgi runs\"]'"
    )
