"""Sources -> frames: probe, decode in process, and pick the frames that a display at the target rate would show.

One pass: only the picked frames are scaled, to all stages at once. Shapes: H height, W width; arrays are (H, W, 3) uint8 RGB.
"""

import contextlib
import dataclasses
import errno
import io
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, BinaryIO, Protocol

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from dataprep import geometry
from dataprep.bars import NO_BARS, BarFinder, Bars
from dataprep.deinterlace import deinterlaced
from dataprep.filters import FilterConfig, Rejected, Unsupported
from dataprep.geometry import Size

# Demuxers of plain files. Playlists and the like (hls, concat, dash) are out: they would open other files.
DEMUXERS = "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,gif,ogg,h264,hevc,m4v"
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
TIMESTAMP_SLACK = Fraction(1, 1000)  # seconds; Matroska rounds to milliseconds, and so does an mp4 that was made from it
DURATION_SLACK = 0.25  # seconds; containers also count audio and delays
FRAME_BYTES = 6  # of a pixel of a decoded frame, at most: three times 16 bits
PACKET_PIXELS = 1 << 16  # a packet of a tiny picture costs as much to decode as this many pixels


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """What a stored clip is."""

    frame_rate: float  # of the stored frames, per second; a multiple of every training rate
    clip_frames: int  # a clip holds at most this many; longer sources give several clips
    min_frames: int  # shorter clips are dropped, shorter sources rejected
    max_clips_per_video: int = 8
    split_at_cuts: bool = True  # a clip lies in one shot
    crop_bars: bool = True  # black bars at both ends of a side, through all of the video, are cut off
    deinterlace: bool = True  # else interlaced sources are rejected
    second_try: bool = True  # by the ffmpeg program: high dynamic range, codecs that PyAV lacks; else these are rejected

    def __post_init__(self) -> None:
        if not 0 < self.frame_rate <= 1000:
            raise ValueError("frame_rate must lie between 0 and 1000")
        if not 1 <= self.min_frames <= self.clip_frames:
            raise ValueError("min_frames must lie between 1 and clip_frames")
        if self.max_clips_per_video < 1:
            raise ValueError("max_clips_per_video must be at least 1")

    @property
    def max_frames(self) -> int:
        """Most frames taken from one source."""
        return self.clip_frames * self.max_clips_per_video


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picked frame at the size of each stage, shown for ``repeats`` consecutive frames of the target rate."""

    images: list[np.ndarray]
    repeats: int


class Timed(Protocol):
    """What picking needs of a frame: its display time and duration, in ticks of ``time_base`` seconds."""

    pts: int
    duration: int
    time_base: Fraction


@dataclasses.dataclass
class Facts:
    """What was learnt of a source while reading it."""

    source: Size | None = None  # upright, without bars
    seconds: float = 0.0  # read; up to the end of the last frame
    frames: int = 0  # decoded
    interlaced: int = 0
    stream: int = 0  # number in the container
    declared_seconds: float | None = None  # by the headers
    cropped: Bars = NO_BARS  # cut off
    bars: Bars = NO_BARS  # that there are, as the whole of the video shows

    @property
    def frame_rate(self) -> float:
        """Decoded frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0


def pick(frames: Iterator[Any], frame_rate: Fraction, filters: FilterConfig, facts: Facts) -> Iterator[tuple[Any, int]]:
    """Pairs (frame, repeats): at every instant k / ``frame_rate`` after the first frame, the latest frame that is due.

    Exact on variable rates: times are fractions. A frame counts as due up to a millisecond early, because containers round
    timestamps. Frames that are never shown are skipped.

    Raises:
        Rejected: a gap in the timestamps.
    """
    held, begin, start = None, 0, None
    for frame in frames:
        if start is None:
            start = frame.pts
        seconds = (frame.pts - start) * frame.time_base
        if held is not None:
            filters.check_gap(float(seconds) - facts.seconds, facts.seconds)
            due = _first_instant(seconds, frame_rate)
            if due > begin:
                yield held, due - begin
            begin = max(begin, due)
        held = frame
        facts.seconds = float(seconds)
        facts.frames += 1
    if held is not None:
        lasts = held.duration * held.time_base
        if lasts > filters.max_gap_seconds:  # it may claim hours
            lasts = Fraction(filters.max_gap_seconds)
        end = (held.pts - start) * held.time_base + lasts
        facts.seconds = float(end)
        due = _first_instant(end, frame_rate)
        if due > begin:
            yield held, due - begin


def read_video(
    file: BinaryIO,
    sizes: Sequence[Size],
    clips: ClipConfig,
    filters: FilterConfig,
    facts: Facts,
    bars: Bars | None = None,
    raw: bool = False,
) -> Iterator[Shown]:
    """Decode a video once and yield what a display at the target rate would show, up to ``clips.max_frames`` in all.

    Black bars are cut off as the first second shows them, or as ``bars`` says. Fills ``facts``. Judges the source as a whole at
    the end: use nothing of it before the iterator is exhausted. ``raw`` is for what ``second_try`` makes, whose container is open
    to nothing else.

    Raises:
        Unsupported: before anything was yielded, or midway: the ffmpeg program may do better.
        Rejected: not a video, damaged beyond the limits, or against a filter.
    """
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(_opened(file, filters, "nut" if raw else None))
            stream = _video_stream(container, facts)
            facts.declared_seconds = _declared_seconds(container, stream) or facts.declared_seconds
            context = stream.codec_context
            filters.check_header(context.height, context.width)
            scaler = geometry.VideoScaler(sizes, Fraction(stream.sample_aspect_ratio or 1), filters)
            context.thread_count = 1  # Spark runs one task per core
            context.options = {"max_pixels": str(filters.max_pixels)}
            decoder = _Decoder(container, stream, filters)
            rate, count = Fraction(str(clips.frame_rate)), 0
            frames = deinterlaced(iter(decoder)) if clips.deinterlace else iter(decoder)
            finder = BarFinder(clips.frame_rate)
            picked = pick(frames, rate, filters, facts)
            for frame, repeats in finder.watch(picked) if clips.crop_bars else picked:
                if not count:
                    scaler.bars = facts.cropped = finder.found() if bars is None else bars
                repeats = min(repeats, clips.max_frames - count)
                yield Shown(scaler(frame), repeats)
                count += repeats
                if count == clips.max_frames:
                    break
        except MemoryError:  # libav's is one too
            raise
        except av.FFmpegError as error:
            raise Rejected("not decodable", f"{type(error).__name__}: {error.strerror}") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # the disk's, not the file's: it asked for bytes before its beginning
                raise
            raise Rejected("not decodable", "it points outside itself") from error
        facts.source, facts.interlaced, facts.bars = scaler.upright, decoder.interlaced, finder.found()
        declared = None
        if facts.declared_seconds is not None and count < clips.max_frames:
            declared = max(0.0, facts.declared_seconds - DURATION_SLACK)
        if container.format.name == "gif" and count < clips.max_frames and not _has_gif_end(file):
            raise Rejected("truncated", "no end mark, so its last frame may be torn")
        filters.check_damage(decoder.damaged, decoder.packets, decoder.offset + facts.seconds, declared)
        if not facts.frames:
            raise Rejected("not decodable", "no frame in it")
        if not clips.deinterlace and facts.interlaced * 2 > facts.frames:
            raise Rejected("interlaced", f"{facts.interlaced} of {facts.frames} frames")
        if count < clips.min_frames:
            raise Rejected("too short", f"{count} frames at {clips.frame_rate:g} per second, less than {clips.min_frames}")
        filters.check_frame_rate(facts.frame_rate)


def read_image(file: BinaryIO, sizes: Sequence[Size], filters: FilterConfig) -> tuple[list[np.ndarray], Size]:
    """Decode an image: one array per stage, and the size of the upright source.

    Raises:
        Rejected: not an image, damaged, or against a filter.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            filters.check_header(image.height, image.width)
            upright = geometry.upright_image(image)
    except Rejected:
        raise
    except UnidentifiedImageError as error:
        raise Rejected("not decodable", "not an image") from error
    except Image.DecompressionBombError as error:
        raise Rejected("too many pixels", str(error)) from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise on damage
        raise Rejected("corrupt", str(error)[:200]) from error
    return geometry.scale_image(upright, sizes, filters), Size(upright.height, upright.width)


class _Decoder:
    """Frames of a stream in display order, with strictly increasing timestamps; counts what is damaged on the way."""

    def __init__(self, container: Any, stream: Any, filters: FilterConfig) -> None:
        self._container, self._stream, self._filters = container, stream, filters
        self.packets = self.damaged = self.interlaced = 0
        self.offset = 0.0  # seconds at which the first frame is due

    def __iter__(self) -> Iterator[Any]:
        previous: int | None = None
        context, pixels = self._stream.codec_context, 0
        for packet in self._demuxed():
            self.packets += packet.size > 0
            self.damaged += packet.is_corrupt
            pixels += max(context.width * context.height, PACKET_PIXELS)
            self._filters.check_work(pixels)
            try:
                frames = packet.decode()
            except MemoryError:  # libav's is one too
                raise
            except av.FFmpegError:
                bytearray(FRAME_BYTES * context.width * context.height)  # no room? Decoders call that invalid data
                self.damaged += 1
                continue
            for frame in frames:
                if frame.pts is None:
                    frame.pts = frame.dts
                untimed = frame.pts is None or frame.time_base is None
                if frame.is_corrupt or untimed or (previous is not None and frame.pts <= previous):
                    self.damaged += 1
                    continue
                if previous is None:
                    self.offset = float(frame.pts * frame.time_base)
                elif not frame.duration:
                    frame.duration = frame.pts - previous  # the last frame then lasts as long as the one before
                previous = frame.pts
                self.interlaced += frame.interlaced_frame
                yield frame

    def _demuxed(self) -> Iterator[Any]:
        try:
            yield from self._container.demux(self._stream)
        except av.FFmpegError:  # the file ends in the middle of a packet; the duration tells how much is missing
            self.damaged += 1


def _first_instant(seconds: Fraction, frame_rate: Fraction) -> int:
    """The first k whose instant k / ``frame_rate`` is not before ``seconds``, give or take what timestamps are rounded by."""
    return max(0, math.ceil((seconds - TIMESTAMP_SLACK) * frame_rate))


def _opened(file: BinaryIO, filters: FilterConfig, demuxer: str | None) -> Any:
    options = {"format_whitelist": demuxer or DEMUXERS, "max_pixels": str(filters.max_pixels)}
    return av.open(file, "r", format=demuxer, options=options, metadata_errors="replace")


def _video_stream(container: Any, facts: Facts) -> Any:
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:  # cover art
            facts.stream = stream.index
            if stream.codec_context is None:
                raise Unsupported("not decodable", "no decoder for its codec")
            return stream
    raise Rejected("no video stream", f"{len(container.streams)} other streams")


def _has_gif_end(file: BinaryIO) -> bool:
    """Gifs say nowhere how long they are, and the decoder shows half a frame without a word."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - 512))
    return file.read().rstrip(b"\0\r\n ").endswith(b";")


def _declared_seconds(container: Any, stream: Any) -> float | None:
    """How long the headers say that the video is; None where they do not say, or speak of the other streams too."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "").split(":")  # Matroska, per stream: 00:00:02.000000000
    if len(tag) == 3:
        with contextlib.suppress(ValueError):
            return int(tag[0]) * 3600 + int(tag[1]) * 60 + float(tag[2])
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else None
