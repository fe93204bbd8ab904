"""Small real media files and a small real T5 encoder, made on the spot."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BITS = 8  # of a frame's number, drawn as black and white columns


@dataclasses.dataclass(frozen=True)
class Media:
    """Writers of media files, and a number in the picture that survives compression and scaling."""

    @staticmethod
    def video(
        path: Path,
        frames: Iterable[np.ndarray],
        times: Sequence[Fraction | float] | Fraction | int = 24,
        codec: str = "libx264",
        time_base: Fraction = Fraction(1, 90000),
        options: dict[str, str] | None = None,
        **context: Any,
    ) -> Path:
        """(H, W, 3) uint8 ``frames`` shown at ``times`` in seconds, or at that constant rate."""
        rate = Fraction(25)  # an encoder wants one to plan by, and gives the last frame its duration
        if not isinstance(times, Sequence):
            rate, times = Fraction(times), None
        with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as out:
            stream: Any = None
            for number, image in enumerate(frames):
                if stream is None:
                    stream = out.add_stream(
                        codec, rate=rate, options={"crf": "10", "preset": "ultrafast"} if options is None else options
                    )
                    stream.height, stream.width, stream.pix_fmt = image.shape[0], image.shape[1], "yuv420p"
                    stream.codec_context.time_base = time_base
                    for name, value in context.items():
                        setattr(stream.codec_context, name, value)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                seconds = number / rate if times is None else Fraction(times[number])
                frame.pts, frame.time_base = round(seconds / time_base), time_base
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
        return path

    @staticmethod
    def numbered(count: int, height: int = 36, width: int = 64) -> list[np.ndarray]:
        """``count`` frames; frame n shows n in binary, a column per bit."""
        return [Media.number(n, height, width) for n in range(count)]

    @staticmethod
    def number(n: int, height: int = 36, width: int = 64) -> np.ndarray:
        bits = [255 * (n >> bit & 1) for bit in range(BITS)]
        return np.repeat(np.array(bits, np.uint8), width // BITS)[None, :, None].repeat(height, 0).repeat(3, 2)

    @staticmethod
    def read_number(image: np.ndarray) -> int:
        """The inverse of ``number`` for (H, W, 3) uint8 of any size."""
        columns = image.mean(axis=(0, 2)).reshape(BITS, -1)
        middle = columns[:, columns.shape[1] // 2]
        return sum(int(level > 127) << bit for bit, level in enumerate(middle))


@pytest.fixture(scope="session")
def media() -> type[Media]:
    return Media


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 encoder with random weights and its own sentencepiece model."""
    from dataprep import small_t5

    return small_t5.build(small_t5.SmallT5Config(output=str(tmp_path_factory.mktemp("encoder") / "t5"), width=16))


@pytest.fixture
def write_pairs(media: type[Media]) -> Callable[[Path, int], list[tuple[str, str]]]:
    """``write_pairs(folder, count)``: one-second numbered videos with sidecar captions; returns (file name, caption)."""

    def write(folder: Path, count: int) -> list[tuple[str, str]]:
        folder.mkdir(parents=True, exist_ok=True)
        pairs = []
        for index in range(count):
            caption = f"a red circle moves {index}"
            path = media.video(folder / f"clip.{index:02d}.mp4", [media.number(index + n) for n in range(24)])
            path.with_suffix(".txt").write_text(caption)
            pairs.append((path.name, caption))
        return pairs

    return write
