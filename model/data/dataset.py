"""MDS shards -> samples: which frames of a clip are seen at which frame rate, and their decoding."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataset
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from model import text
from model.config import UserError
from model.data.batch import CHANNELS, Sample
from model.data.schema import Kind, Manifest, SchemaError, require_same
from model.data.shards import ShardStream, Source, one_line, open_source


@dataclass(frozen=True)
class DataConfig:
    """What training reads. ``videos`` and ``images`` are dataset folders or addresses such as ``s3://bucket/stage1/videos``."""

    height: int  # pixels of the shards' frames, which the model sees as they are
    width: int
    text_width: int  # D of the shards' text states
    max_tokens: int  # L: captions are padded to it
    text_revision: str | None = None  # if given, the encoder revision that the shards must have
    videos: str | None = None
    images: str | None = None
    image_share: float = 0.5  # of each process's batch; where only one of videos and images is given, all is of that kind
    frames: int = 16  # T
    # Per second. Each clip's is drawn uniformly from those for which it is long enough; name one twice to draw it more often.
    frame_rates: tuple[float, ...] = (24.0, 12.0, 8.0)
    local: str | None = None  # folder for local copies of remote datasets
    local_limit: str | None = None  # of each remote dataset's copies, such as 500gb; the shards used longest ago make room
    verify: bool = True  # hash every local shard before training, about a second per gigabyte; sizes are always compared
    workers: int = 2  # loader processes per training process; 0 loads in the training process itself
    prefetch: int = 2  # batches that each loader process prepares ahead
    # Part of the order: keep it over a run. With N > 1, the order is made of N interleaved ones, and nodes whose number divides N
    # download different shards instead of all of them.
    canonical_nodes: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Window:
    """Which frames of a stored clip are seen."""

    frame_rate: float  # per second
    indices: tuple[int, ...]  # T of them


def open_sources(config: DataConfig) -> dict[Kind, Source]:
    """Open the datasets that ``config`` names, videos first, and check that they hold what it asks for.

    Raises:
        UserError: none named, nothing there, or another schema, geometry, frame rate or text encoder.
    """
    named: dict[Kind, str | None] = {"videos": config.videos, "images": config.images}
    sources = {kind: open_source(location, config.local) for kind, location in named.items() if location}
    if not sources:
        raise UserError("neither 'videos' nor 'images' is given: there is nothing to train on")
    try:
        for kind, source in sources.items():
            _require_match(source.manifest, kind, source.location, config)
        if len(sources) == 2:
            videos, images = sources["videos"], sources["images"]
            if videos.manifest.text.revision != images.manifest.text.revision:
                raise SchemaError(f"{videos.location} and {images.location}: their captions went through different text encoders")
    except SchemaError as error:
        raise UserError(str(error)) from error
    return sources


def manifests(config: DataConfig) -> dict[str, Manifest]:
    """The manifests of the datasets that ``config`` names, by kind, to publish with a model that was trained on them."""
    return {kind: source.manifest for kind, source in open_sources(config).items()}


def span(frames: int, stride: int) -> int:
    """How many stored frames a window of ``frames`` with ``stride`` reaches over."""
    return (frames - 1) * stride + 1


def stride_of(stored_rate: float, frame_rate: float) -> int | None:
    """The step between stored frames at which ``frame_rate`` is seen; None if it does not divide ``stored_rate``."""
    stride = round(stored_rate / frame_rate)
    return stride if stride > 0 and abs(stride * frame_rate - stored_rate) < 1e-3 else None


def draw_window(stored: int, strides: Sequence[tuple[float, int]], frames: int, rng: np.random.Generator) -> Window:
    """Draw a frame rate uniformly from those for which a clip is long enough, and where the window begins in the clip.

    Args:
        stored: how many frames the clip has.
        strides: the frame rates to draw from, each with its stride.
        frames: T.
        rng: where the draw comes from.

    Raises:
        ValueError: the clip is too short for all of them.
    """
    possible = [(rate, stride) for rate, stride in strides if span(frames, stride) <= stored]
    if not possible:
        shortest = min(span(frames, stride) for _, stride in strides)
        raise ValueError(f"the clip has {stored} frames, but {frames} at the configured frame rates need {shortest} or more")
    rate, stride = possible[rng.integers(len(possible))]
    start = int(rng.integers(stored - span(frames, stride) + 1))
    return Window(rate, tuple(range(start, start + span(frames, stride), stride)))


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width that a JPEG's header announces, read without decoding.

    Raises:
        ValueError: no such header.
    """
    position = 2  # behind the start marker
    while data[:2] == b"\xff\xd8" and position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start-of-frame segment
            return int.from_bytes(data[position + 5 : position + 7]), int.from_bytes(data[position + 7 : position + 9])
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    raise ValueError("not a JPEG")


def decode_frames(data: bytes, ends: np.ndarray, indices: Sequence[int], manifest: Manifest) -> Tensor:
    """Decode the frames ``indices`` of a sample -> (len(indices), H, W, C) uint8.

    Args:
        data: the column ``frames``.
        ends: the checked column ``frame_ends``.
        indices: which frames; only these are decoded.
        manifest: geometry and frame format.

    Raises:
        ValueError: a frame that is not of the manifest's geometry. It is refused before anything is allocated for it.
        RuntimeError: a damaged JPEG.
    """
    height, width = manifest.height, manifest.width
    starts = [0, *ends[:-1].tolist()]
    frames = []
    for index in indices:
        frame = data[starts[index] : ends[index]]
        if manifest.frame_format == "raw":
            frames.append(torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(height, width, CHANNELS))
            continue
        if jpeg_size(frame) != (height, width):
            raise ValueError(f"frame {index} is {jpeg_size(frame)}, not {(height, width)}")
        pixels = decode_jpeg(torch.frombuffer(bytearray(frame), dtype=torch.uint8), mode=ImageReadMode.RGB)
        frames.append(pixels.permute(1, 2, 0))
    return torch.stack(frames)


def derived_seed(*parts: int) -> int:
    """A seed in [0, 2^63) from non-negative numbers: equal for equal ones, unrelated for others."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def decode_sample(row: dict[str, Any], manifest: Manifest, config: DataConfig, seed: int) -> Sample:
    """A row of the schema's columns -> a sample; ``seed`` decides its window.

    Raises:
        ValueError, RuntimeError: the row is not what the manifest says. Sizes are checked before anything is allocated for them.
    """
    data, ends, bits = row["frames"], row["frame_ends"].astype(np.int64), row["text"]
    if ends.ndim != 1 or not 1 <= len(ends) <= manifest.max_frames:
        raise ValueError(f"frame_ends has the shape {ends.shape}, but a sample holds 1 to {manifest.max_frames} frames")
    sizes = np.diff(ends, prepend=0)
    if sizes.min() <= 0 or ends[-1] != len(data):
        raise ValueError("the frames' offsets do not fit their data")
    if manifest.frame_format == "raw" and set(sizes.tolist()) != {manifest.height * manifest.width * CHANNELS}:
        raise ValueError(f"raw frames are not of {manifest.height} x {manifest.width} pixels")
    if bits.ndim != 2 or not 1 <= len(bits) <= config.max_tokens or bits.shape[1] != config.text_width:
        raise ValueError(f"text states have the shape {bits.shape}, not (1 to {config.max_tokens}, {config.text_width})")
    if manifest.kind == "images":
        window = Window(math.inf, (0,))
    else:
        strides = [(rate, stride) for rate in config.frame_rates if (stride := stride_of(manifest.frame_rate, rate))]
        window = draw_window(len(ends), strides, config.frames, np.random.default_rng(seed))
    return Sample(
        frames=decode_frames(data, ends, window.indices, manifest),
        text=text.unpack(bits),
        frame_rate=window.frame_rate,
        resolution=(row["source_height"], row["source_width"]),
        is_image=manifest.kind == "images",
        seed=seed,
        key=row["key"],
        caption=row["caption"],
    )


class ClipDataset(StreamingDataset):
    """The samples of one dataset, in StreamingDataset's order: shuffled, sharded over processes and workers, resumable.

    What is drawn for a sample depends on the seed, the epoch and the sample alone.
    """

    def __init__(self, source: Source, config: DataConfig, batch_size: int, epoch_size: int) -> None:
        """Collective: every process builds it at the same time.

        Args:
            source: the dataset, opened and checked.
            config: the window, the seed, the caching.
            batch_size: how many of a process's batch come from this dataset.
            epoch_size: how many samples an epoch draws over all processes.
        """
        self.source = source
        self.config = config
        self.stream = ShardStream(source)
        super().__init__(
            streams=[self.stream],
            epoch_size=epoch_size,
            batch_size=batch_size,
            cache_limit=config.local_limit if source.remote else None,  # it would delete the shards of a local dataset
            num_canonical_nodes=config.canonical_nodes,
            shuffle=True,
            shuffle_algo="py1e",  # across shards
            shuffle_seed=config.seed,
        )

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        yield from super().__iter__()  # type: ignore[misc]
        if self._event.is_set():  # StreamingDataset ends an epoch without an error when one of its threads died
            raise UserError(f"{self.source.location}: loading shards in the background failed; its error is above")

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard. The background threads do not block and must not raise, see ``ShardStream``."""
        super().prepare_shard(shard_id, blocking)
        fault = self.stream.faults.get(self.source.shards[shard_id].name)
        if blocking and fault:
            raise UserError(fault)

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """Read and decode one sample.

        Raises:
            UserError: its shard cannot be fetched, or it is damaged or not what the manifest says; names the shard.
        """
        shard_id, index = self.spanner[sample_id]
        path = self.source.folder / self.source.shards[shard_id].name
        seed = derived_seed(self.config.seed, self.next_epoch - 1, int(sample_id))
        try:
            return decode_sample(super().get_item(sample_id, retry), self.source.manifest, self.config, seed)
        except UserError:
            raise
        except Exception as error:  # whatever a damaged shard makes the MDS reader, numpy or libjpeg raise
            raise UserError(f"{path}: sample {index}: {one_line(error)}") from error


def _require_match(manifest: Manifest, kind: Kind, where: str, config: DataConfig) -> None:
    require_same(where, "kind of dataset", manifest.kind, kind)
    require_same(where, "frame height", manifest.height, config.height)
    require_same(where, "frame width", manifest.width, config.width)
    require_same(where, "width of the text states", manifest.text.width, config.text_width)
    require_same(where, "limit of text tokens", manifest.text.max_tokens, config.max_tokens)
    require_same(where, "type of the text states", manifest.text.dtype, "bfloat16")
    if config.text_revision is not None:
        require_same(where, "text encoder revision", manifest.text.revision, config.text_revision)
    if kind == "images":
        return
    strides = []
    for rate in config.frame_rates:
        stride = stride_of(manifest.frame_rate, rate) if 0 < rate < math.inf else None
        if stride is None:
            raise SchemaError(f"{where}: its {manifest.frame_rate:g} frames per second cannot be seen at {rate:g}")
        strides.append(stride)
    if not strides:
        raise SchemaError(f"{where}: the config names no frame rates")
    shortest = span(config.frames, min(strides))
    if manifest.max_frames < shortest:
        raise SchemaError(f"{where}: clips have at most {manifest.max_frames} frames, but the config needs {shortest} or more")
