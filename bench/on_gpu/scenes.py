"""Moving Scenes on the device, rendered on the spot: clips and captions as batches that a denoiser trains on.

There is no T5 on the machine that this is for. The states of a caption are frozen random vectors instead: one for each word plus
one for its place in the caption, drawn from seeds that are the same on every machine. So words are told apart, and their order is
told; that two words mean much the same is not.

Clips are rendered before training, one of each scene, at a frame rate and from an instant of its own.
"""

import itertools
import multiprocessing
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataprep import moving_scenes
from dataprep.moving_scenes import Split
from dataprep.scenes import render
from model.codec import from_pixels

TOKENS = 16  # of a caption; the longest has ten words
RATES = (8.0, 12.0)  # frames per second of the clips, in turn
SECONDS = 2.0  # of a scene: an object passes the middle halfway
RESOLUTION = (288.0, 512.0)  # height and width that all clips claim their source to have had
CHUNK = 256  # scenes that a process renders at once
ALONE = 1024  # scenes that one process renders sooner than others start


@dataclass(frozen=True)
class Rendered:
    """Clips on the device, with what is true of them. N clips."""

    frames: Tensor  # (N, T, H, W, 3) uint8
    rates: Tensor  # (N,) frames per second
    captions: list[str]
    still_captions: list[str]  # of any one frame


@dataclass(frozen=True)
class _Chunk:
    """Scenes of a split from one number up to another, and how their clips are made."""

    split: Split
    seed: int
    start: int
    stop: int
    frames: int
    height: int
    width: int


def _render(chunk: _Chunk) -> tuple[np.ndarray, list[float], list[str], list[str]]:
    clips, rates, captions, stills = [], [], [], []
    scenes = itertools.islice(moving_scenes.scenes(chunk.split, chunk.seed, SECONDS), chunk.start, chunk.stop)
    for number, scene in enumerate(scenes, chunk.start):
        rate = RATES[number % len(RATES)]
        begin = np.random.default_rng([chunk.seed, number, 1]).uniform(0, SECONDS - (chunk.frames - 1) / rate)
        instants = begin + np.arange(chunk.frames) / rate
        clips.append(np.stack([render(scene, t, chunk.height, chunk.width) for t in instants.tolist()]))
        rates.append(rate)
        captions.append(scene.caption())
        stills.append(scene.still_caption())
    return np.stack(clips), rates, captions, stills


def rendered(split: Split, seed: int, number: int, frames: int, height: int, device: torch.device) -> Rendered:
    """Clips of the first ``number`` scenes of a split, 16:9; many are rendered by a process on each core.

    Raises:
        ValueError: a height that makes no whole 16:9, or clips that are longer than the scenes.
    """
    if height % 9 or (frames - 1) / min(RATES) > SECONDS:
        raise ValueError(f"scenes are 16:9 and last {SECONDS:g} s, got {height} lines and {frames} frames")
    width = height // 9 * 16
    chunks = [_Chunk(split, seed, start, min(start + CHUNK, number), frames, height, width) for start in range(0, number, CHUNK)]
    clips = torch.empty(number, frames, height, width, 3, dtype=torch.uint8, device=device)
    rates, captions, stills = list[float](), list[str](), list[str]()
    for chunk, (frames_of, rates_of, captions_of, stills_of) in zip(chunks, _parts(chunks, number), strict=True):
        clips[chunk.start : chunk.stop] = torch.from_numpy(frames_of).to(device)
        rates += rates_of
        captions += captions_of
        stills += stills_of
    return Rendered(clips, torch.tensor(rates, device=device), captions, stills)


def _parts(chunks: Sequence[_Chunk], number: int) -> Iterator[tuple[np.ndarray, list[float], list[str], list[str]]]:
    if number <= ALONE:
        yield from map(_render, chunks)
        return
    # Spawned: a process that holds a GPU and threads is not safe to fork.
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_render, chunks)


def text_states(captions: Sequence[str], width: int) -> tuple[Tensor, Tensor]:
    """(N, TOKENS, width) states and their mask (N, TOKENS), true where a word is.

    Raises:
        ValueError: a caption of more words than ``TOKENS``.
    """
    words = sorted({word for caption in captions for word in caption.split()})
    vectors = dict(zip(words, _vectors(words, width), strict=True))
    places = _vectors([f"place {place}" for place in range(TOKENS)], width)
    states, mask = torch.zeros(len(captions), TOKENS, width), torch.zeros(len(captions), TOKENS, dtype=torch.bool)
    for row, caption in enumerate(captions):
        said = caption.split()
        if len(said) > TOKENS:
            raise ValueError(f"caption {caption!r} has {len(said)} words, at most {TOKENS} are taken")
        states[row, : len(said)] = (torch.stack([vectors[word] for word in said]) + places[: len(said)]) / 2**0.5
        mask[row, : len(said)] = True
    return states, mask


def _vectors(names: Sequence[str], width: int) -> Tensor:
    """(N, width) a unit Gaussian vector for each name. The seed is a checksum, as Python's hash differs between processes."""
    rngs = (np.random.default_rng(zlib.crc32(name.encode())) for name in names)
    return torch.from_numpy(np.stack([rng.standard_normal(width, dtype=np.float32) for rng in rngs]))


class Batches:
    """What a denoiser trains on (model/data/batch.py), from rendered clips. An image is one frame of a clip, repeated."""

    def __init__(self, clips: Rendered, text_width: int) -> None:
        self.clips, device = clips, clips.frames.device
        self.text, self.mask = (part.to(device) for part in text_states(clips.captions, text_width))
        self.still_text, self.still_mask = (part.to(device) for part in text_states(clips.still_captions, text_width))
        self.resolution = torch.tensor([RESOLUTION], device=device)

    def draw(self, count: int, rng: torch.Generator, image_share: float) -> dict[str, Any]:
        """Clips by lot, a share of them images. ``rng`` is on the CPU, so that every device and precision sees the same."""
        number, frames = self.clips.frames.shape[:2]
        chosen = torch.randint(number, (count,), generator=rng)
        frame = torch.randint(frames, (count, 1), generator=rng)
        seeds = torch.randint(2**63 - 1, (count,), generator=rng)
        is_image = torch.arange(count) < round(image_share * count)
        return self._batch(chosen, torch.where(is_image[:, None], frame, torch.arange(frames)), is_image, seeds.tolist())

    def videos(self, numbers: range) -> dict[str, Any]:
        """The clips of these numbers, whole."""
        chosen, frames = torch.tensor(numbers), torch.arange(self.clips.frames.shape[1])
        return self._batch(chosen, frames.expand(len(numbers), -1), torch.zeros(len(numbers), dtype=torch.bool), [*numbers])

    def _batch(self, chosen: Tensor, frames: Tensor, is_image: Tensor, seeds: list[int]) -> dict[str, Any]:
        """``chosen`` (B,) clips, the ``frames`` (B, T) of each."""
        device = self.clips.frames.device
        if device.type == "cuda":  # from pinned memory, for else every copy would wait for all that the device has to do
            chosen, frames, is_image = (t.contiguous().pin_memory() for t in (chosen, frames, is_image))
        chosen, frames, is_image = (t.to(device, non_blocking=True) for t in (chosen, frames, is_image))
        return {
            "video": from_pixels(self.clips.frames[chosen[:, None], frames]),
            "text": torch.where(is_image[:, None, None], self.still_text[chosen], self.text[chosen]),
            "text_mask": torch.where(is_image[:, None], self.still_mask[chosen], self.mask[chosen]),
            "frame_rate": torch.where(is_image, torch.inf, self.clips.rates[chosen]),
            "resolution": self.resolution.expand(len(seeds), -1),
            "seed": seeds,
        }
