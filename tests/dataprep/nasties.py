"""Hostile and odd media, made on the spot: each a file, and what must come of it.

Pictures are (H, W, 3) uint8 RGB. The scene is a photograph-like picture that pans, so that a wrong frame, a shift or a wrong
colour shows as a low PSNR against the frame that was drawn.
"""

import dataclasses
import random
import struct
import subprocess
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import imageio_ffmpeg
import numpy as np
from av.stream import Disposition
from PIL import Image

HEIGHT, WIDTH, FRAMES = 72, 128, 48
Frames = list[np.ndarray]
DAMAGE = frozenset({"not decodable", "corrupt", "truncated", "too short"})


@dataclasses.dataclass(frozen=True)
class Nasty:
    """A file, and what must come of it: these frames within ``psnr`` decibels, or one of these reasons."""

    name: str  # with suffix
    make: Callable[[Path], object]  # writes the file
    frames: Frames | None = None  # the first ones; None: whatever comes, but see ``reasons``
    reasons: frozenset[str] = frozenset()
    psnr: float = 30.0


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise with the spectrum of photographs, periodic in both directions."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 3e-3
    layers = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.6, s=(height, width)) for _ in range(4)
    ]
    layers = [(layer - layer.mean()) / layer.std() for layer in layers]
    levels = [layers[0] + 0.5 * layer for layer in layers[1:]]
    return np.clip(125 + 40 * np.stack(levels, -1), 8, 247).astype(np.uint8)


def scene(count: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, step: int = 2, seed: int = 0) -> Frames:
    picture = photograph(height, width, seed)
    return [np.roll(picture, step * n, axis=1) for n in range(count)]


def video(
    path: Path,
    frames: Iterable[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv444p",
    rate: int = 24,
    times: list[Fraction] | None = None,
    options: dict[str, str] | None = None,
    matrix: int = 5,  # BT.601; 1 is BT.709
    container: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    **context: Any,
) -> Path:
    """RGB or RGBA ``frames`` at ``rate``, or at ``times`` in seconds."""
    faststart = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=container if container is not None else faststart) as out:
        stream: Any = None
        for number, image in enumerate(frames):
            if stream is None:
                stream = out.add_stream(
                    codec, rate=rate, options={"crf": "8", "preset": "ultrafast"} if options is None else options
                )
                stream.height, stream.width, stream.pix_fmt = image.shape[0], image.shape[1], pix_fmt
                if times is not None:
                    stream.codec_context.time_base = Fraction(1, 1000)
                for name, value in context.items():
                    setattr(stream.codec_context, name, value)
                prepare(stream)
            out.mux(
                stream.encode(picture(image, pix_fmt, matrix, number if times is None else round(times[number] * 1000), stream))
            )
        out.mux(stream.encode(None))
    return path


def picture(image: np.ndarray, pix_fmt: str, matrix: int, pts: int, stream: Any) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgba" if image.shape[2] == 4 else "rgb24")
    if frame.format.name != pix_fmt:
        frame = frame.reformat(format=pix_fmt, dst_colorspace=matrix)
    frame.pts, frame.time_base = pts, stream.codec_context.time_base or Fraction(1, 24)
    return frame


# Damage.


def truncated(whole: bytes, tenths: int) -> bytes:
    return whole[: len(whole) * tenths // 10]


def flipped(whole: bytes, seed: int, count: int = 10) -> bytes:
    data, rng = bytearray(whole), random.Random(seed)
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


# What containers say.


def patched(path: Path, box: bytes, offset: int, values: bytes) -> None:
    """Write ``values`` at ``offset`` behind the name of the first ``box``."""
    data = bytearray(path.read_bytes())
    at = data.index(box) + 4 + offset
    data[at : at + len(values)] = values
    path.write_bytes(data)


def edit_list_from_the_middle(path: Path) -> None:
    """Only the second half is to be shown; the first half lies there, and decoding needs it."""
    video(path, scene(), options={"crf": "8", "preset": "ultrafast", "g": "48"})
    data = path.read_bytes()
    at = data.index(b"elst") + 4
    version, entries, duration, media_time = struct.unpack(">IIIi", data[at : at + 16])
    assert (version, entries, media_time) == (0, 1, 0)
    timescale = struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])[0]
    patched(path, b"elst", 8, struct.pack(">Ii", duration // 2, timescale))  # one second in


def changes_its_size(path: Path) -> None:
    """Two encoders, one stream: the new parameters come in band, as from a camera or a cut-up broadcast."""
    with av.open(str(path), "w") as out:
        stream: Any = None
        parts = (scene(24), [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in scene()[24:]])
        for part, frames in enumerate(parts):
            encoder: Any = av.CodecContext.create("libx264", "w")
            encoder.height, encoder.width, encoder.pix_fmt = *frames[0].shape[:2], "yuv444p"
            encoder.time_base, encoder.framerate = Fraction(1, 24), Fraction(24)
            encoder.options = {"crf": "8", "preset": "ultrafast", "bf": "0"}
            if stream is None:
                stream = out.add_stream("libx264", rate=24)
                stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv444p"
            packets = []
            for number, image in enumerate(frames):
                packets += encoder.encode(picture(image, "yuv444p", 5, 24 * part + number, encoder_as_stream(encoder)))
            for packet in [*packets, *encoder.encode(None)]:
                packet.stream, packet.time_base = stream, Fraction(1, 24)
                out.mux(packet)


def encoder_as_stream(encoder: Any) -> Any:
    return type("Stream", (), {"codec_context": encoder})


def fields() -> Frames:
    """Twice as many moments as frames, of a picture soft enough for half of its lines to tell it."""
    soft = cv2.GaussianBlur(np.tile(photograph(HEIGHT, WIDTH), (3, 3, 1)), (0, 0), 1.5)[HEIGHT : 2 * HEIGHT, WIDTH : 2 * WIDTH]
    return [np.roll(soft, 5 * n, axis=1) for n in range(2 * FRAMES)]


def interlaced(path: Path, top_first: bool, progressive: int = 0) -> None:
    """Each frame holds two moments, the first of them in the upper lines if ``top_first``; the first frames may be whole."""
    moments, weave = fields(), av.filter.Graph()
    source = weave.add_buffer(width=WIDTH, height=HEIGHT, format="yuv444p", time_base=Fraction(1, 24))
    chain = [source, weave.add("setfield", "tff" if top_first else "bff"), weave.add("buffersink")]
    weave.link_nodes(*chain).configure()
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24, options={"crf": "4", "x264-params": "interlaced=1"})
        stream.height, stream.width, stream.pix_fmt, stream.codec_context.time_base = HEIGHT, WIDTH, "yuv444p", Fraction(1, 24)
        for number in range(FRAMES):
            image, other = moments[2 * number].copy(), moments[2 * number + (number >= progressive)]
            image[top_first::2] = other[top_first::2]
            source.push(picture(image, "yuv444p", 5, number, stream))
            out.mux(stream.encode(chain[-1].pull()))
        out.mux(stream.encode(None))


def cover_art_first(path: Path) -> None:
    """A picture of the sleeve is the first video stream; the film is the second."""
    with av.open(str(path), "w") as out:
        art: Any = out.add_stream("mjpeg", rate=24)
        art.width = art.height = 64
        art.pix_fmt, art.disposition = "yuvj420p", Disposition.attached_pic
        film: Any = out.add_stream("libx264", rate=24, options={"crf": "8", "preset": "ultrafast"})
        film.height, film.width, film.pix_fmt = HEIGHT, WIDTH, "yuv444p"
        white = np.full((64, 64, 3), 255, np.uint8)
        out.mux([*art.encode(picture(white, "yuvj420p", 5, 0, art)), *art.encode(None)])
        for number, image in enumerate(scene()):
            out.mux(film.encode(picture(image, "yuv444p", 5, number, film)))
        out.mux(film.encode(None))


def many_packets(path: Path) -> None:
    """Four megabytes of packets that say nothing new, all due at once: work without an end in sight."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24, options={"preset": "ultrafast", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        black = np.zeros((64, 64, 3), np.uint8)
        packets = [p for n in range(3) for p in stream.encode(picture(black, "yuv420p", 5, n, stream))]
        out.mux(packets)
        for number in range(60_000):
            again = av.Packet(bytes(packets[-1]))
            again.stream, again.time_base = stream, Fraction(1, 1000)
            again.pts = again.dts = 200 + number
            out.mux(again)


def raw_frames_of_8k(path: Path) -> None:
    """125 kB on disk; its frames refer to 16 others, so that 2.2 GB must be held to decode them."""
    quick = {"preset": "ultrafast", "crf": "40", "x264-params": "ref=16:bframes=16:b-adapt=0:level=6.2:scenecut=0"}
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24, options=quick)
        stream.width, stream.height, stream.pix_fmt = 8192, 4352, "yuv444p10le"
        frame = av.VideoFrame(8192, 4352, "yuv444p10le")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        for number in range(24):
            frame.pts, frame.time_base = number, Fraction(1, 24)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def gif(path: Path, width: int = WIDTH, height: int = HEIGHT) -> None:
    """Rendered by Pillow, 25 frames a second; another size may be put into the header."""
    stills = [Image.fromarray(image).quantize(255) for image in scene(25)]
    stills[0].save(path, save_all=True, append_images=stills[1:], duration=40, loop=0)
    data = bytearray(path.read_bytes())
    data[6:10] = struct.pack("<HH", width, height)
    path.write_bytes(data)


def see_through_gif(path: Path) -> None:
    """A red square moves over nothing."""
    stills = []
    for image in over_white(squares()):
        hidden = (image == 255).all(-1)
        still = Image.fromarray(np.where(hidden, 0, 1).astype(np.uint8), "P")
        still.putpalette([0, 0, 0, 220, 20, 20])
        stills.append(still)
    stills[0].save(path, save_all=True, append_images=stills[1:], duration=40, loop=0, transparency=0, disposal=2)


def squares() -> Frames:
    """(H, W, 4): a red square moves over black that is not to be seen."""
    frames = []
    for number in range(25):
        image = np.zeros((HEIGHT, WIDTH, 4), np.uint8)
        image[20:50, 10 + 2 * number : 40 + 2 * number] = 220, 20, 20, 255
        frames.append(image)
    return frames


def over_white(frames: Frames) -> Frames:
    return [np.where(image[..., 3:] > 0, image[..., :3], 255).astype(np.uint8) for image in frames]


def rotated(degrees: int) -> Callable[[Any], None]:
    return lambda stream: stream.set_display_rotation(degrees)


# High dynamic range, and a codec that PyAV does not know.

WHITE = 203  # cd/m2 of what standard video shows as white (ITU-R BT.2408)
TO_2020 = np.linalg.inv([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])  # from BT.709
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593])


def pq(light: np.ndarray) -> np.ndarray:
    """cd/m2 -> signal (SMPTE ST 2084)."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    """cd/m2 on a display of 1000 -> signal (ITU-R BT.2100)."""
    shown = np.maximum(light, 1e-4) / 1000
    scene_light = shown / ((shown @ LUMA_2020) ** (0.2 / 1.2))[..., None]
    upper = 0.17883277 * np.log(np.maximum(12 * scene_light - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light), upper)


def high_dynamic_range(path: Path, transfer: int = 16) -> None:
    """The scene as standard video would show it, in the primaries of BT.2020 and 10 bits; ``transfer`` 16 is PQ, 18 HLG."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx265", rate=24, options={"x265-params": "log-level=none:crf=4", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt, context = HEIGHT, WIDTH, "yuv444p10le", stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, 9, 1
        for number, image in enumerate(scene(24)):
            light = np.maximum((image / 255.0) ** 2.4 * WHITE @ TO_2020.T, 0)
            signal = pq(light) if transfer == 16 else hlg(light)
            luma = signal @ LUMA_2020
            blue, red = (signal[..., 2] - luma) / 1.8814, (signal[..., 0] - luma) / 1.4746
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv444p10le")
            for plane, levels in zip(frame.planes, (64 + 876 * luma, 512 + 896 * blue, 512 + 896 * red), strict=True):
                rows = np.zeros((HEIGHT, plane.line_size // 2), np.uint16)
                rows[:, :WIDTH] = levels.round()
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 24)
            frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, 9, 9, 1
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def rare_codec(path: Path, parameters: str = "BFrames=0") -> None:
    """AVS2, which the ffmpeg program writes and reads. Where it reorders frames, the times it writes are wrong."""
    raw = b"".join(image.tobytes() for image in scene(24))
    pipe = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "24", "-i", "pipe:0"]
    codec = ["-pix_fmt", "yuv420p", "-c:v", "libxavs2", "-qp", "8", "-xavs2-params", parameters]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *pipe, *codec, str(path)]
    subprocess.run(command, input=raw, check=True, capture_output=True)
