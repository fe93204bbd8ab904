"""Decoding: exactly the frames that are due, and the right reason for every bad file."""

import bisect
import dataclasses
import io
import itertools
import math
import random
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from dataprep import clips
from dataprep.clips import ClipConfig, Facts
from dataprep.filters import FilterConfig, Rejected
from dataprep.geometry import Size

CLIPS = ClipConfig(frame_rate=24, clip_frames=1000, min_frames=12)
LENIENT = FilterConfig(max_cropped=1.0)
SIZE = Size(36, 64)


def read(
    file: Path | bytes, config: ClipConfig = CLIPS, filters: FilterConfig = LENIENT
) -> tuple[list[tuple[np.ndarray, int]], Facts]:
    facts = Facts()
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        shown = [(s.images[0], s.repeats) for s in clips.read_video(stream, [SIZE], config, filters, facts)]
    return shown, facts


def numbers(file: Path, media: Any, config: ClipConfig = CLIPS) -> list[int]:
    """The number in each stored frame."""
    shown, _ = read(file, config)
    return [number for image, repeats in shown for number in [media.read_number(image)] * repeats]


@dataclasses.dataclass
class Tick:
    pts: int
    time_base: Fraction
    duration: int


@pytest.mark.parametrize("seed", range(20))
def test_pick_agrees_with_brute_force_on_random_clocks(seed: int) -> None:
    rng = random.Random(seed)
    clock = Fraction(1, rng.choice([24, 25, 1000, 12288, 30000, 90000]))
    ticks = sorted(rng.sample(range(-50, round(3 / clock)), min(round(3 / clock), rng.randint(2, 90))))
    frames = [Tick(pts, clock, 1 + rng.randrange(round(0.1 / clock) + 1)) for pts in ticks]
    rate = rng.choice([Fraction(24), Fraction(30000, 1001), Fraction(8), Fraction(120)])
    picked = [(frames.index(frame), n) for frame, n in clips.pick(iter(frames), rate, FilterConfig(max_gap_seconds=10), Facts())]

    slack = Fraction(1, 1000)
    due = [(pts - ticks[0]) * clock for pts in ticks]
    end = (ticks[-1] + frames[-1].duration - ticks[0]) * clock
    expected = []
    for k in range(math.ceil(rate * end) + 1):
        if k / rate < end - slack:
            expected.append(max(i for i, t in enumerate(due) if t <= k / rate + slack))
    assert [i for i, n in picked for _ in range(n)] == expected
    assert all(n > 0 for _, n in picked)
    assert len({i for i, _ in picked}) == len(picked)  # no picture is scaled twice


def test_variable_rate_file_gives_exactly_the_frames_that_are_due(tmp_path: Path, media: Any) -> None:
    rng = random.Random(1)
    intervals = [Fraction(rng.randint(300, 9000), 90000) for _ in range(59)]  # 3 to 100 ms
    times = list(itertools.accumulate(intervals, initial=Fraction(0)))
    path = media.video(tmp_path / "variable.mp4", media.numbered(60), times)
    seconds = times[-1] + intervals[-1]  # the last frame lasts as long as the one before
    expected = [bisect.bisect_right(times, Fraction(k, 24) + Fraction(1, 1000)) - 1 for k in range(math.ceil(seconds * 24))]
    got = numbers(path, media)
    # The muxer decides how long the very last frame lasts; what is shown before is exact.
    known = sum(Fraction(k, 24) + Fraction(1, 1000) < times[-1] for k in range(len(expected)))
    assert got[:known] == expected[:known]
    assert set(got[known:]) <= {59}
    assert abs(len(got) - len(expected)) <= 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov"])
@pytest.mark.parametrize("rate", [24, Fraction(24000, 1001), 25, 30, 50, 60, 12])
def test_constant_rates_in_every_container(tmp_path: Path, media: Any, suffix: str, rate: int | Fraction) -> None:
    """Also where timestamps are rounded to milliseconds (mkv): 24 per second stays 24, without a frame doubled or lost."""
    count = round(2 * rate)
    path = media.video(tmp_path / f"constant.{suffix}", media.numbered(count), rate, time_base=1 / Fraction(rate))
    got = numbers(path, media)
    assert len(got) == pytest.approx(count / rate * 24, abs=0.999)  # 2.002 s have 49 instants, or 48 where 2.002 is rounded
    slack = Fraction(1, 1000) + (Fraction(1, 2000) if suffix == "mkv" else 0)  # and what rounding may add
    for k, number in enumerate(got):
        exact, early = math.floor(Fraction(k, 24) * rate), math.floor((Fraction(k, 24) + slack) * rate)
        assert number in {exact, early}
        assert number == exact or rate not in (24, 25, 30, 60, 12)  # where no frame is due within the millisecond


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [
        ("libx265", "mp4", {"x265-params": "log-level=none", "preset": "ultrafast", "crf": "10"}),
        ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "crf": "10"}),
        ("libsvtav1", "mkv", {"preset": "12", "crf": "20"}),
        ("mpeg4", "mp4", {"qmax": "4"}),
        ("libx264", "ts", {"bf": "3"}),
    ],
)
def test_codecs(tmp_path: Path, media: Any, codec: str, suffix: str, options: dict[str, str]) -> None:
    frames = media.numbered(24, 72, 128)
    path = media.video(tmp_path / f"c.{suffix}", frames, 24, codec=codec, time_base=Fraction(1, 24), options=options)
    assert numbers(path, media) == list(range(24))


@pytest.mark.parametrize("start", [-1, 5])
def test_a_clock_may_start_anywhere(tmp_path: Path, media: Any, start: int) -> None:
    times = [Fraction(start) + Fraction(n, 24) for n in range(24)]
    path = media.video(tmp_path / "late.mkv", media.numbered(24), times, time_base=Fraction(1, 1000))
    assert numbers(path, media) == list(range(24))


def test_decoding_stops_at_the_most_frames_wanted(tmp_path: Path, media: Any) -> None:
    path = media.video(tmp_path / "long.mp4", media.numbered(200), 24)
    shown, facts = read(path, ClipConfig(frame_rate=24, clip_frames=10, min_frames=5, max_clips_per_video=2))
    assert sum(repeats for _, repeats in shown) == 20
    assert facts.frames < 30


def test_facts_of_a_good_source(tmp_path: Path, media: Any) -> None:
    _, facts = read(media.video(tmp_path / "good.mp4", media.numbered(30, 48, 64), 15))
    assert (facts.source, facts.frames) == (Size(48, 64), 30)
    assert facts.seconds == pytest.approx(2.0, abs=0.01)
    assert facts.frame_rate == pytest.approx(15, rel=0.01)


# Bad files: a maker of each, what is read with, and the reason that must come out.


def good(folder: Path, media: Any, suffix: str = "mp4", **options: Any) -> bytes:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (36, 64, 3), dtype=np.uint8) for _ in range(48)]
    return media.video(folder / f"good.{suffix}", noise, 24, **options).read_bytes()


def text_file(folder: Path, media: Any) -> bytes:
    return b"this is no video\n" * 100


def empty_file(folder: Path, media: Any) -> bytes:
    return b""


def truncated_mp4(folder: Path, media: Any) -> bytes:
    data = good(folder, media)
    return data[: len(data) * 6 // 10]


def truncated_before_the_index(folder: Path, media: Any) -> bytes:
    path = folder / "plain.mp4"
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 36, 64, "yuv420p"
        for image in media.numbered(24):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    return path.read_bytes()[:-600]


def truncated_mkv(folder: Path, media: Any) -> bytes:
    data = good(folder, media, "mkv")
    return data[: len(data) * 6 // 10]


def flipped_bits(folder: Path, media: Any) -> bytes:
    data = bytearray(good(folder, media, "mkv"))
    rng = random.Random(0)
    for _ in range(30):
        data[rng.randrange(len(data) // 4, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def audio_alone(folder: Path, media: Any) -> bytes:
    return audio(folder / "audio.mp4", cover=False)


def audio_with_cover_art(folder: Path, media: Any) -> bytes:
    return audio(folder / "song.mp4", cover=True)


def audio(path: Path, cover: bool) -> bytes:
    with av.open(str(path), "w") as out:
        sound: Any = out.add_stream("aac", rate=16000)
        if cover:
            art: Any = out.add_stream("mjpeg", rate=1)
            art.width = art.height = 64
            art.pix_fmt, art.disposition = "yuvj420p", av.stream.Disposition.attached_pic
            white = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 255, np.uint8), format="rgb24")
            out.mux([*art.encode(white.reformat(format="yuvj420p")), *art.encode(None)])
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux([*sound.encode(frame), *sound.encode(None)])
    return path.read_bytes()


def ten_hour_gap(folder: Path, media: Any) -> bytes:
    times = [Fraction(n, 24) + (36000 if n >= 20 else 0) for n in range(40)]
    return media.video(folder / "gap.mkv", media.numbered(40), times, time_base=Fraction(1, 1000)).read_bytes()


def short(folder: Path, media: Any) -> bytes:
    return media.video(folder / "short.mp4", media.numbered(11), 24).read_bytes()


def single_frame(folder: Path, media: Any) -> bytes:
    return media.video(folder / "one.mp4", media.numbered(1), 24).read_bytes()


def interlaced(folder: Path, media: Any) -> bytes:
    return good(folder, media, options={"x264-params": "interlaced=1"})


def high_dynamic_range(folder: Path, media: Any) -> bytes:
    return good(folder, media, color_trc=16)


def playlist(folder: Path, media: Any) -> Path:
    """It names a good file beside it; whoever follows it can be led to any file of the machine."""
    media.video(folder / "secret.mp4", media.numbered(48), 24)
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    return folder / "list.mp4"


def unusual_container(folder: Path, media: Any) -> bytes:
    """Every demuxer is a door; only those of plain video files are open."""
    return media.video(folder / "good.nut", media.numbered(48), 24).read_bytes()


def as_it_is(folder: Path, media: Any) -> bytes:
    return good(folder, media)


BAD: list[tuple[Callable[[Path, Any], Path | bytes], FilterConfig, str]] = [
    (text_file, LENIENT, "not decodable"),
    (empty_file, LENIENT, "not decodable"),
    (playlist, LENIENT, "not decodable"),
    (unusual_container, LENIENT, "not decodable"),
    (truncated_before_the_index, LENIENT, "not decodable"),
    (truncated_mp4, FilterConfig(max_damage=0.1), "truncated"),
    (truncated_mkv, FilterConfig(max_damage=0.1), "truncated"),
    (flipped_bits, LENIENT, "corrupt"),
    (audio_alone, LENIENT, "no video stream"),
    (audio_with_cover_art, LENIENT, "no video stream"),
    (ten_hour_gap, LENIENT, "gap in timestamps"),
    (short, LENIENT, "too short"),
    (single_frame, LENIENT, "too short"),
    (high_dynamic_range, LENIENT, "high dynamic range"),
    (as_it_is, FilterConfig(max_pixels=36 * 64 - 1), "too many pixels"),
    (as_it_is, FilterConfig(min_height=37), "too small"),
    (as_it_is, FilterConfig(min_width=65), "too small"),
    (as_it_is, FilterConfig(min_frame_rate=25), "frame rate too low"),
]


@pytest.mark.parametrize(("make", "filters", "reason"), BAD, ids=[f"{make.__name__}-{reason}" for make, _, reason in BAD])
def test_bad_videos_are_rejected_with_their_reason(
    tmp_path: Path, media: Any, make: Callable[[Path, Any], Path | bytes], filters: FilterConfig, reason: str
) -> None:
    with pytest.raises(Rejected) as caught:
        read(make(tmp_path, media), filters=filters)
    assert caught.value.reason == reason
    assert "\n" not in caught.value.detail


def test_interlaced_videos_are_rejected_where_they_are_not_to_be_deinterlaced(tmp_path: Path, media: Any) -> None:
    with pytest.raises(Rejected, match="interlaced: 48 of 48 frames"):
        read(interlaced(tmp_path, media), dataclasses.replace(CLIPS, deinterlace=False))


def test_the_good_file_behind_the_bad_ones_is_good(tmp_path: Path, media: Any) -> None:
    for suffix in ("mp4", "mkv"):
        shown, _ = read(good(tmp_path, media, suffix))
        assert sum(repeats for _, repeats in shown) == 48


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", "not decodable"),
        (b"", "not decodable"),
        (png_that_claims(9000, 9000), "too many pixels"),
        (png_that_claims(100_000, 100_000), "too many pixels"),
        (png_that_claims(64, 64), "corrupt"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not decodable"),  # never to be handed to an interpreter
    ],
)
def test_bad_images_are_rejected_with_their_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        clips.read_image(io.BytesIO(data), [SIZE], LENIENT)
    assert caught.value.reason == reason
