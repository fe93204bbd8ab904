"""An invisible watermark in clips: in the pixels, since metadata go with the first copy (the paper names it as a safeguard).

    python -m pipelines.watermark runs/samples/000-a-corgi-runs.mp4

says whether a video holds it. The library is invisible-watermark, its method dwtDctSvd: a bit for every 8x8 pixels of brightness,
again and again over picture and frames. It stands h264 and a change of the file, not a change of the size.

Shapes: T frames, H height, W width.
"""

import argparse
import hashlib
from dataclasses import dataclass

import numpy as np
from imwatermark import WatermarkDecoder, WatermarkEncoder
from scipy.stats import binom

from model import command, media
from model.errors import UserError

TEXT = "snapvideo"
BITS = 64  # of the text's hash: those of texts agree far better than by chance
MIN_PIXELS = 256 * 256  # of a frame, says the library
METHOD = "dwtDctSvd"  # dwtDct, four times as fast, lost bits of natural pictures even before any compression
MAX_CHANCE = 1e-6  # that bits agree so well by chance
MAX_FRAMES = 256  # that are read


@dataclass(frozen=True)
class Found:
    """How well a video's bits agree with those of a text."""

    agreeing: int  # bits, each voted on by all frames
    bits: int
    chance: float  # of as many or more in a video without it

    @property
    def is_marked(self) -> bool:
        return self.chance < MAX_CHANCE


def _bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(hashlib.sha256(text.encode()).digest()[: BITS // 8], np.uint8))


def embed(frames: np.ndarray, text: str) -> np.ndarray:
    """Mark (T, H, W, 3) uint8 RGB frames; those of fewer than ``MIN_PIXELS`` come back as they are."""
    if frames.shape[1] * frames.shape[2] < MIN_PIXELS:
        return frames
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", _bits(text).tolist())
    return np.stack([encoder.encode(np.ascontiguousarray(frame[..., ::-1]), METHOD)[..., ::-1] for frame in frames])


def read(frames: np.ndarray, text: str) -> Found:
    """Look for the watermark of ``text`` in (T, H, W, 3) uint8 RGB frames.

    Raises:
        UserError: frames that are too small to hold one.
    """
    if frames.shape[1] * frames.shape[2] < MIN_PIXELS:
        raise UserError(f"frames of {frames.shape[1]}x{frames.shape[2]} are too small for a watermark")
    wanted = _bits(text)
    decoder = WatermarkDecoder("bits", BITS)
    votes = [np.asarray(decoder.decode(np.ascontiguousarray(frame[..., ::-1]), METHOD), bool) for frame in frames]
    agreeing = int(((np.mean(votes, axis=0) > 0.5) == wanted).sum())
    return Found(agreeing, BITS, float(binom.sf(agreeing - 1, BITS, 0.5)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Say whether a video holds the watermark. Exit code 1: it does not.")
    parser.add_argument("video", help="the file")
    parser.add_argument("--text", default=TEXT, help=f"what to look for (default {TEXT})")
    parser.add_argument("--debug", action="store_true", help="show stack traces of errors")
    options = parser.parse_args(arguments)
    found: list[Found] = []

    def body() -> None:
        if not options.text:
            raise UserError("text: it is empty")
        found.append(read(media.read_video(options.video, MAX_FRAMES).frames, options.text))
        told = "holds the watermark" if found[0].is_marked else "no watermark found"
        print(f"{options.video}: {told} ({found[0].agreeing} of {found[0].bits} bits of {options.text!r})")

    command.guard(body, options.debug)
    raise SystemExit(0 if found[0].is_marked else 1)


if __name__ == "__main__":
    main()
