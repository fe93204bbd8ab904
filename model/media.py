"""Clips on disk: mp4, gif and contact sheets from uint8 RGB frames, and videos read back.

Shapes: T frames, H height, W width; frames are (T, H, W, 3) uint8 RGB everywhere. Every file appears whole or not at all: it is
written beside its destination and renamed.
"""

import contextlib
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageDraw, ImageFont, ImageOps

from model.errors import UserError

H264_CRF = "12"  # close to lossless to the eye; generated clips are small
BT709 = 1  # the tag's value in h264 for primaries, transfer and matrix
MAX_PIXELS = 8192 * 8192  # of a video that is read: a header may claim any size

SHEET_FRAME_HEIGHT = 144  # pixels; 18, 36, 72 and 288 reach it by whole factors
SHEET_FONT_SIZE = 24
SHEET_MARGIN = 24
SHEET_GAP = 6
SHEET_PAPER = (250, 250, 248)
SHEET_INK = (32, 33, 36)
SHEET_LINE = (208, 208, 204)  # around each frame: a white one would merge with the paper

Frames = np.ndarray | torch.Tensor


class Clip(NamedTuple):
    """A decoded video."""

    frames: np.ndarray  # (T, H, W, 3) uint8 RGB
    frame_rate: float  # average, per second


def write_mp4(path: str | Path, frames: Frames, frame_rate: float, tags: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write (T, H, W, 3) uint8 ``frames`` as h264 in mp4 that browsers play. Odd sizes gain one repeated row or column.

    ``tags`` go into the file: of those that mp4 knows, such as title and comment.

    Raises:
        ValueError: other shape or type, no frames, or a frame rate that is not positive.
    """
    array = _checked(frames, frame_rate)
    height, width = array.shape[1:3]
    array = np.pad(array, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # 4:2:0 halves both sides
    with (
        _appearing_whole(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as out,
    ):
        out.metadata.update(tags)
        stream = out.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = array.shape[2], array.shape[1], "yuv420p"
        stream.options = {"crf": H264_CRF, "preset": "medium"}
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709  # untagged, players guess by size
        context.color_range = ColorRange.MPEG
        for image in array:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def read_tags(path: str | Path) -> dict[str, str]:
    """What ``write_mp4`` put into a file; nothing where there is no video.

    Raises:
        UserError: not a readable video.
    """
    if not Path(path).is_file():
        return {}
    try:
        with av.open(str(path)) as container:
            return dict(container.metadata)
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable video: {error}") from error


def write_gif(path: str | Path, frames: Frames, frame_rate: float) -> None:
    """Write (T, H, W, 3) uint8 ``frames`` as a looping gif with one palette, so that still parts do not flicker.

    Gif counts time in 1/100 s: durations alternate so that the clip as a whole keeps its length, up to 100 frames per second.

    Raises:
        ValueError: other shape or type, no frames, or a frame rate that is not positive.
    """
    array = _checked(frames, frame_rate)
    count, width = len(array), array.shape[2]
    samples = array[np.linspace(0, count - 1, min(count, 16)).round().astype(int)]
    palette = Image.fromarray(samples.reshape(-1, width, 3)).quantize(256, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(image).quantize(palette=palette, dither=Image.Dither.NONE) for image in array]
    ends = np.round(np.arange(count + 1) * 100 / frame_rate).astype(int)
    durations = (10 * np.maximum(np.diff(ends), 1)).tolist()  # milliseconds
    with _appearing_whole(path) as temporary:
        images[0].save(temporary, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)


def enlarge(frames: Frames, height: int) -> np.ndarray:
    """(T, H, W, 3) -> (T, k H, k W, 3) by repeating pixels, with the whole factor k >= 1 that comes closest to ``height``."""
    array = _checked(frames)
    factor = max(1, round(height / array.shape[1]))
    return array.repeat(factor, axis=1).repeat(factor, axis=2)


def contact_sheet(clips: Sequence[Frames], prompts: Sequence[str], columns: int = 8) -> Image.Image:
    """One row per clip: up to ``columns`` frames evenly spaced in time, first and last included, the prompt under the row.

    Args:
        clips: each (T, H, W, 3) uint8; sizes and lengths may differ. Frames are scaled by whole factors.
        prompts: one per clip.

    Raises:
        ValueError: no clips, another number of prompts, or frames of another shape or type.
    """
    if not clips or len(clips) != len(prompts) or columns < 1:
        raise ValueError(
            f"a contact sheet needs clips, a prompt for each, and columns: got {len(clips)}, {len(prompts)}, {columns}"
        )
    font = ImageFont.load_default(size=SHEET_FONT_SIZE)
    strips = [_strip(clip, columns) for clip in clips]
    width = max(max(strip.width for strip in strips), 3 * SHEET_FRAME_HEIGHT)  # room for words under a single frame
    texts = [_wrapped(prompt, font, width) for prompt in prompts]
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heights = [round(probe.multiline_textbbox((0, 0), text, font=font)[3]) for text in texts]

    row_heights = [strip.height + SHEET_GAP + height + SHEET_MARGIN for strip, height in zip(strips, heights, strict=True)]
    sheet = Image.new("RGB", (width + 2 * SHEET_MARGIN, SHEET_MARGIN + sum(row_heights)), SHEET_PAPER)
    draw = ImageDraw.Draw(sheet)
    top = SHEET_MARGIN
    for strip, text, row_height in zip(strips, texts, row_heights, strict=True):
        sheet.paste(strip, (SHEET_MARGIN, top))
        draw.multiline_text((SHEET_MARGIN, top + strip.height + SHEET_GAP), text, fill=SHEET_INK, font=font)
        top += row_height
    return sheet


def write_contact_sheet(path: str | Path, clips: Sequence[Frames], prompts: Sequence[str], columns: int = 8) -> None:
    """Write ``contact_sheet`` as PNG."""
    sheet = contact_sheet(clips, prompts, columns)
    with _appearing_whole(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def read_video(path: str | Path, max_frames: int) -> Clip:
    """Decode the first ``max_frames`` frames of a video.

    Raises:
        UserError: no such file, not a video, damaged, without frames, or larger than 8192 x 8192 pixels.
    """
    if not Path(path).is_file():
        raise UserError(f"no such video: {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(f"{path}: {stream.width}x{stream.height} is more than {MAX_PIXELS} pixels")
            frame_rate = float(stream.average_rate or stream.guessed_rate or 0)
            images = []
            for frame in container.decode(stream):
                if frame.width * frame.height > MAX_PIXELS:  # a stream may change its size on the way
                    raise UserError(f"{path}: a frame of {frame.width}x{frame.height} is more than {MAX_PIXELS} pixels")
                images.append(frame.to_ndarray(format="rgb24"))
                if len(images) == max_frames:
                    break
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable video: {error}") from error
    if not images or any(image.shape != images[0].shape for image in images):
        raise UserError(f"{path}: {'frames of several sizes' if images else 'holds no frames'}")
    return Clip(np.stack(images), frame_rate)


def _checked(frames: Frames, frame_rate: float = 1.0) -> np.ndarray:
    array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else frames
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise ValueError(f"frames must be (T, H, W, 3) uint8 with T, H, W > 0, got {array.shape} {array.dtype}")
    if not 0 < frame_rate < 1000:
        raise ValueError(f"the frame rate must lie between 0 and 1000 per second, got {frame_rate}")
    return array


def _strip(clip: Frames, columns: int) -> Image.Image:
    """The frames of one row, side by side."""
    array = _checked(clip)
    picked = array[np.linspace(0, len(array) - 1, min(columns, len(array))).round().astype(int)]
    images = [Image.fromarray(image) for image in enlarge(picked, SHEET_FRAME_HEIGHT)]
    reduction = round(images[0].height / SHEET_FRAME_HEIGHT)
    if reduction > 1:
        images = [image.reduce(reduction) for image in images]
    images = [ImageOps.expand(image, border=1, fill=SHEET_LINE) for image in images]
    width, height = images[0].size
    strip = Image.new("RGB", (len(images) * (width + SHEET_GAP) - SHEET_GAP, height), SHEET_PAPER)
    for index, image in enumerate(images):
        strip.paste(image, (index * (width + SHEET_GAP), 0))
    return strip


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text`` on as many lines as keep it within ``width`` pixels; words longer than a line are broken."""
    text = " ".join(text.split())
    limit = max(1, len(text))
    while True:
        lines = textwrap.wrap(text, limit) or [""]
        widest = max(lines, key=font.getlength)
        if font.getlength(widest) <= width or limit == 1:
            return "\n".join(lines)
        limit = max(1, min(limit, len(widest)) - 1)


@contextlib.contextmanager
def _appearing_whole(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes ``path`` when the body succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
