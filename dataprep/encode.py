"""Frames and captions -> the bytes that shards store.

Shapes: T frames, H height, W width; L text tokens, D width of the text states.
"""

import dataclasses
import functools
import io
import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from dataprep import scores
from dataprep.clips import ClipConfig, Shown
from dataprep.geometry import Size
from dataprep.scores import Scores
from dataprep.shots import ShotFinder
from model.data.schema import FrameFormat

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """The stored frames of one cascade stage."""

    name: str  # of its folder in the output
    height: int  # pixels
    width: int
    frame_format: FrameFormat
    jpeg_quality: int = 95  # Pillow's scale; colour at half resolution

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a stage's name is made of a-z, 0-9, - and _: '{self.name}'")
        if not (1 <= self.height <= 8192 and 1 <= self.width <= 8192 and 1 <= self.jpeg_quality <= 100):
            raise ValueError("height and width lie between 1 and 8192, jpeg_quality between 1 and 100")

    @property
    def size(self) -> Size:
        return Size(self.height, self.width)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text encoder whose states are stored."""

    path: str  # a local folder or a hub name
    max_tokens: int  # captions are cut to this many, the end token included

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")


@dataclasses.dataclass(frozen=True)
class Packed:
    """The frames of one clip at one stage, as the columns ``frames`` and ``frame_ends``."""

    frames: bytes
    frame_ends: np.ndarray  # (T,) uint32

    def frame(self, number: int, stage: StageConfig) -> np.ndarray:
        """One of them, (H, W, 3) uint8 RGB."""
        begin = int(self.frame_ends[number - 1]) if number else 0
        data = self.frames[begin : int(self.frame_ends[number])]
        return np.asarray(decode_frame(data, stage.height, stage.width, stage.frame_format))


@dataclasses.dataclass(frozen=True)
class Clip:
    """Consecutive frames of a source."""

    number: int  # within the source
    start_seconds: float  # after the first frame of the source
    stages: tuple[Packed, ...]  # in the order of the configured stages
    scores: Scores
    shot: int = 0  # of the source


def encode_frame(image: np.ndarray, stage: StageConfig) -> bytes:
    """(H, W, 3) uint8 RGB -> its stored bytes."""
    if stage.frame_format == "raw":
        return image.tobytes()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=stage.jpeg_quality, subsampling="4:2:0")
    return buffer.getvalue()


def decode_frame(data: bytes, height: int, width: int, frame_format: FrameFormat) -> Image.Image:
    """The picture of a frame's stored bytes."""
    if frame_format == "raw":
        return Image.frombytes("RGB", (width, height), data)
    return Image.open(io.BytesIO(data)).convert("RGB")


def pack(frames: list[bytes]) -> Packed:
    """Encoded frames, one behind the other."""
    return Packed(b"".join(frames), np.cumsum([len(frame) for frame in frames], dtype=np.uint32))


def pack_clips(shown: Iterable[Shown], stages: tuple[StageConfig, ...], config: ClipConfig) -> list[Clip]:
    """Cut what ``clips.read_video`` yields into clips of ``clip_frames``, none across the border of two shots; a remainder below
    ``min_frames`` is dropped.

    Every picture is encoded once, however often it repeats; only encoded frames and the small probes are held.
    """
    encoded: list[list[bytes]] = [[] for _ in stages]
    probes: list[np.ndarray] = []
    by_size = sorted(range(len(stages)), key=lambda n: stages[n].height * stages[n].width)
    finder = ShotFinder(config.frame_rate) if config.split_at_cuts else None
    step = min(max(1, round(config.frame_rate)), config.min_frames)  # every clip then has a frame whose sharpness is known
    sharpness: dict[int, float] = {}
    for picture in shown:
        begin, end = len(probes), len(probes) + picture.repeats
        if finder:
            finder.add(picture.images[by_size[0]], begin)
        grey = scores.grey(picture.images[by_size[-1]])
        for number in range(-(-begin // step) * step, end, step):
            sharpness[number] = scores.sharpness(grey)
        probes += [scores.probe(grey)] * picture.repeats
        for frames, image, stage in zip(encoded, picture.images, stages, strict=True):
            frames += [encode_frame(image, stage)] * picture.repeats
    edges = [0, *(finder.cuts() if finder else []), len(probes)]
    clips = []
    for number, (shot, begin, end) in enumerate(itertools.islice(spans(edges, config), config.max_clips_per_video)):
        sharpest = max(value for frame, value in sharpness.items() if begin <= frame < end)
        found = scores.score(probes[begin:end], config.frame_rate, sharpest)
        packed = tuple(pack(frames[begin:end]) for frames in encoded)
        clips.append(Clip(number, begin / config.frame_rate, packed, found, shot))
    return clips


def spans(edges: list[int], config: ClipConfig) -> Iterator[tuple[int, int, int]]:
    """(shot, first frame, end) of each clip, given the frames at which shots begin and the last one ends."""
    for shot, (first, last) in enumerate(itertools.pairwise(edges)):
        for begin in range(first, last, config.clip_frames):
            end = min(begin + config.clip_frames, last)
            if end - begin >= config.min_frames:
                yield shot, begin, end


def pack_image(images: list[np.ndarray], stages: tuple[StageConfig, ...]) -> Clip:
    """An image as a clip of one frame."""
    packed = tuple(pack([encode_frame(image, stage)]) for image, stage in zip(images, stages, strict=True))
    grey = scores.grey(max(images, key=lambda image: image.size))
    found = scores.score([scores.probe(grey)], 1, scores.sharpness(grey))
    return Clip(0, 0.0, packed, found)


def encode_captions(captions: Iterable[str], config: TextConfig) -> dict[str, np.ndarray]:
    """Caption -> (L, D) uint16, the bits of its bfloat16 T5 states. Each is encoded once, and by itself: in a batch its last bits
    would depend on its neighbours, and so on what else is prepared with it."""
    from model import text  # torch and transformers take seconds to import; the driver does without

    states: dict[str, np.ndarray] = {}
    for caption in sorted(set(captions)):
        (state,) = load_encoder(config.path, config.max_tokens).encode([caption])
        states[caption] = text.pack(state)
    return states


@functools.lru_cache(maxsize=1)
def load_encoder(path: str, max_tokens: int) -> "model.text.TextEncoder":  # type: ignore[name-defined]  # noqa: F821
    """The encoder of this process, on one thread: Spark runs one task per core. Forked processes share its weights.

    Raises:
        UserError: nothing to load at ``path``.
    """
    import torch

    from model.text import TextEncoder

    torch.set_num_threads(1)
    return TextEncoder(path, max_tokens)
