"""Rows of MDS shards -> samples: which frames of a clip are seen at which frame rate, and their decoding."""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from model import text
from model.data.batch import CHANNELS, Sample
from model.data.rows import StoredFrames
from model.data.schema import Manifest
from model.data.shards import ShardStream, Source
from model.data.transfer import one_line
from model.errors import UserError

T = TypeVar("T")

RUNS, RUN_LENGTH = 8, 32  # of captions whose states are measured


@dataclass(frozen=True)
class View:
    """What training sees of the stored samples."""

    frames: int  # T
    frame_rates: tuple[float, ...]  # per second, to draw from
    text_width: int  # D
    max_tokens: int  # most tokens that a caption has
    seed: int  # of the order and of the draws


@dataclass(frozen=True)
class Window:
    """Which frames of a stored clip are seen."""

    frame_rate: float  # per second
    indices: range  # T of them


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
    return Window(rate, range(start, start + span(frames, stride), stride))


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


def decode_frames(data: bytes | StoredFrames, ends: np.ndarray, window: Window, manifest: Manifest) -> Tensor:
    """Decode the frames of a window -> (T, H, W, C) uint8.

    Args:
        data: the column ``frames``.
        ends: the checked column ``frame_ends``.
        window: which frames; only these are decoded.
        manifest: geometry and frame format.

    Raises:
        ValueError: a frame that is not of the manifest's geometry. It is refused before anything is allocated for it.
        RuntimeError: a damaged JPEG.
    """
    shape = (manifest.height, manifest.width, CHANNELS)
    starts = [0, *ends[:-1].tolist()]
    first, last = window.indices[0], window.indices[-1]
    if manifest.frame_format == "raw":
        stored = _writable(data[starts[first] : ends[last]]).reshape(-1, *shape)
        return torch.from_numpy(np.ascontiguousarray(stored[:: window.indices.step]))
    frames = torch.empty(len(window.indices), *shape, dtype=torch.uint8)
    for frame, index in zip(frames, window.indices, strict=True):
        jpeg = _writable(data[starts[index] : ends[index]])
        if (size := jpeg_size(jpeg.tobytes())) != shape[:2]:
            raise ValueError(f"frame {index} is {size}, not {shape[:2]}")
        frame.copy_(decode_jpeg(torch.from_numpy(jpeg), mode=ImageReadMode.RGB).permute(1, 2, 0))
    return frames


def _writable(data: bytes | np.ndarray) -> np.ndarray:
    return data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8).copy()  # torch takes nothing else


def derived_seed(*parts: int) -> int:
    """A seed in [0, 2^63) from non-negative numbers: equal for equal ones, unrelated for others."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def held_out_ids(num_samples: int, held_out: int) -> range:
    """Which of a dataset's samples are held out of training: the last ones.

    Neighbours in the shards, which come from the same sources: of a source's clips some are held out and others trained on at one
    place at most.
    """
    return range(num_samples - held_out, num_samples)


def trained_id(sample_id: int, num_samples: int, held_out: int, seed: int) -> int:
    """The sample to train on where the order says ``sample_id``: itself, or, where that one is held out, one drawn by ``seed``.

    So the order's length and all places in it stay what they are without samples held out.
    """
    if sample_id not in held_out_ids(num_samples, held_out):
        return sample_id
    return seed % (num_samples - held_out)


def decode_sample(row: dict[str, Any], manifest: Manifest, view: View, seed: int) -> Sample:
    """A row of the schema's columns -> a sample; ``seed`` decides its window.

    Raises:
        ValueError, RuntimeError: the row is not what the manifest says. Sizes are checked before anything is allocated for them.
    """
    data, ends = row["frames"], row["frame_ends"].astype(np.int64)
    if ends.ndim != 1 or not 1 <= len(ends) <= manifest.max_frames:
        raise ValueError(f"frame_ends has the shape {ends.shape}, but a sample holds 1 to {manifest.max_frames} frames")
    sizes = np.diff(ends, prepend=0)
    if sizes.min() <= 0 or ends[-1] != len(data):
        raise ValueError("the frames' offsets do not fit their data")
    if manifest.frame_format == "raw" and set(sizes.tolist()) != {manifest.height * manifest.width * CHANNELS}:
        raise ValueError(f"raw frames are not of {manifest.height} x {manifest.width} pixels")
    states = decode_text(row["text"], view)
    if manifest.kind == "images":
        window = Window(math.inf, range(1))
    else:
        strides = [(rate, stride) for rate in view.frame_rates if (stride := stride_of(manifest.frame_rate, rate))]
        window = draw_window(len(ends), strides, view.frames, np.random.default_rng(seed))
    return Sample(
        frames=decode_frames(data, ends, window, manifest),
        text=states,
        frame_rate=window.frame_rate,
        resolution=(row["source_height"], row["source_width"]),
        is_image=manifest.kind == "images",
        seed=seed,
        key=row["key"],
        caption=row["caption"],
    )


def decode_text(bits: np.ndarray, view: View) -> Tensor:
    """The column ``text`` -> (L, D) bfloat16.

    Raises:
        ValueError: it is not of the shape that the view says.
    """
    if bits.ndim != 2 or not 1 <= len(bits) <= view.max_tokens or bits.shape[1] != view.text_width:
        raise ValueError(f"text states have the shape {bits.shape}, not (1 to {view.max_tokens}, {view.text_width})")
    return text.unpack(bits)


class ClipDataset(StreamingDataset):
    """The samples of one dataset, in StreamingDataset's order: shuffled, sharded over processes and workers, resumable.

    What is drawn for a sample depends on the seed, the epoch and the sample alone.
    """

    def __init__(
        self,
        source: Source,
        view: View,
        batch_size: int,
        epoch_size: int,
        canonical_nodes: int,
        cache_limit: str | None,
        held_out: int = 0,
    ) -> None:
        """Collective: every process builds it at the same time.

        Args:
            source: the dataset, opened and checked.
            view: what is seen of its samples.
            batch_size: how many of a process's batch come from this dataset.
            epoch_size: how many samples an epoch draws over all processes.
            canonical_nodes: how many interleaved orders make up the order.
            cache_limit: of the local copies of a remote dataset, such as "500gb".
            held_out: how many samples are never iterated over; fewer than there are.
        """
        self.source = source
        self.held_out = held_out
        self.view = view
        self.stream = ShardStream(source)
        try:
            super().__init__(
                streams=[self.stream],
                epoch_size=epoch_size,
                batch_size=batch_size,
                cache_limit=cache_limit if source.remote else None,  # it would delete the shards of a local dataset
                num_canonical_nodes=canonical_nodes,
                shuffle=True,
                shuffle_algo="py1e",  # across shards
                shuffle_seed=view.seed,
            )
        except ValueError as error:  # a cache limit that is no number of bytes, or too low
            raise UserError(f"{source.location}: {one_line(error)}") from error

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        yield from super().__iter__()  # type: ignore[misc]
        if self._event.is_set():  # StreamingDataset ends an epoch without an error when one of its threads died
            raise UserError(f"{self.source.location}: loading shards in the background failed; its error is above")

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard. The background threads do not block and must not raise, see ``ShardStream``."""
        if not blocking and self._shard_states[shard_id] != _ShardState.REMOTE:
            # They ask for the shard of every sample, and each time would take a lock between processes to learn that it is here.
            if self._shard_states[shard_id] == _ShardState.LOCAL:
                self._shard_access_times[shard_id] = time.time_ns()
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            self._cache_filelock.release(force=True)  # where making room failed; all other processes would wait for it
            raise
        fault = self.stream.faults.get(self.source.shards[shard_id].name)
        if blocking and fault:
            if hasattr(self, "_event"):  # while it is iterated over
                self._event.set()  # the background threads need not try the epoch's other shards before the process can end
            if self.stream.storage:
                self.stream.storage.abandon()
            raise UserError(fault)

    def _ready_thread(self, it: _Iterator) -> None:
        """Count the samples whose shards are here.

        StreamingDataset's own looks once whether a shard must be fetched, then waits for it: for ever if another process fetches
        it and makes room for the next ones before this thread has looked again. This one looks anew each time.
        """
        while it.ready_index < it.total and not it.should_exit() and not self._event.is_set():
            sample_id = it.sample_ids[it.ready_index]
            if self.predownload is not None and it.ready_index - it.yield_index > self.predownload:
                time.sleep(TICK)
                continue
            if sample_id != -1:  # which is a place that is left empty
                shard_id, _ = self.spanner[sample_id]
                if self._shard_states[shard_id] == _ShardState.REMOTE:
                    self.prepare_shard(shard_id, blocking=False)
                if self._shard_states[shard_id] != _ShardState.LOCAL:
                    time.sleep(TICK)
                    continue
            it.ready_index += 1
        it.on_exit()

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """Read and decode one sample of the order.

        Raises:
            UserError: its shard cannot be fetched, or it is damaged or not what the manifest says; names the shard.
        """
        seed = derived_seed(self.view.seed, self.next_epoch - 1, int(sample_id))
        return self._read(trained_id(int(sample_id), self.source.manifest.num_samples, self.held_out, seed), seed, retry)

    def held_out_sample(self, index: int) -> Sample:
        """Read and decode one of the samples held out, always with the same window.

        Raises:
            UserError: as ``get_item``.
        """
        sample_id = held_out_ids(self.source.manifest.num_samples, self.held_out)[index]
        return self._read(sample_id, derived_seed(self.view.seed, sample_id))

    def text_states(self, sample_id: int) -> Tensor:
        """(L, D) the states of one sample's caption; nothing else of it is decoded.

        Raises:
            UserError: as ``get_item``.
        """
        return self._decoded(sample_id, lambda row: decode_text(row["text"], self.view))

    def _read(self, sample_id: int, seed: int, retry: int = 7) -> Sample:
        return self._decoded(sample_id, lambda row: decode_sample(row, self.source.manifest, self.view, seed), retry)

    def _decoded(self, sample_id: int, decode: Callable[[dict[str, Any]], T], retry: int = 7) -> T:
        shard_id, index = self.spanner[sample_id]
        path = self.source.folder / self.source.shards[shard_id].name
        try:
            return decode(super().get_item(sample_id, retry))
        except UserError:
            raise
        except Exception as error:  # whatever a damaged shard makes the MDS reader, numpy or libjpeg raise
            raise UserError(f"{path}: sample {index}: {one_line(error)}") from error


def text_states(parts: Iterable[ClipDataset]) -> Tensor:
    """(N, D) the states of all tokens of ``RUNS`` times ``RUN_LENGTH`` captions of each dataset, float32.

    Runs of neighbours, evenly spaced over a dataset: of a large remote one few shards are fetched for them.

    Raises:
        UserError: as ``ClipDataset.get_item``.
    """
    states = []
    for part in parts:
        count = part.source.manifest.num_samples
        starts = np.linspace(0, max(0, count - RUN_LENGTH), RUNS).round().astype(int).tolist()
        numbers = sorted({start + place for start in starts for place in range(RUN_LENGTH) if start + place < count})
        states += [part.text_states(number) for number in numbers]
    return torch.cat(states).float()
