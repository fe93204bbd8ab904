"""Shards -> training batches: videos and images, mixed in each batch in a fixed share, in an order that resumes exactly."""

import contextlib
import fcntl
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from composer.core import DataSpec
from composer.utils import dist
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World
from torch.utils.data import DataLoader, IterableDataset

from model.data import batch
from model.data.batch import PackedBatch, Sample
from model.data.samples import ClipDataset, View, derived_seed, span, stride_of
from model.data.schema import Kind, Manifest, SchemaError, require_same
from model.data.shards import Source, find_fault, open_source
from model.errors import UserError
from model.preemption import shield_loader_process

KINDS: tuple[Kind, ...] = ("videos", "images")


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
    # Of each remote dataset's copies, such as 500gb: the shards used longest ago make room. Shards on their way come on top.
    local_limit: str | None = None
    verify: bool = True  # hash every local shard before training, about a second per gigabyte; sizes are always compared
    workers: int = 2  # loader processes per training process; 0 loads in the training process itself
    prefetch: int = 2  # batches that each loader process prepares ahead
    # Part of the order: keep it over a run. With N > 1, the order is made of N interleaved ones, and nodes whose number divides N
    # download different shards instead of all of them.
    canonical_nodes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"frames": 1, "workers": 0, "prefetch": 1, "canonical_nodes": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")


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


@dataclass(frozen=True)
class Mixture:
    """How many of each kind a batch of one process holds."""

    videos: int
    images: int

    @property
    def size(self) -> int:
        """Samples in a process's batch."""
        return self.videos + self.images

    @property
    def slots(self) -> tuple[Kind, ...]:
        """The kind of each sample of the batch, as evenly alternating as the shares allow, so that every part of it is mixed."""
        before = [slot * self.images // self.size for slot in range(self.size + 1)]
        return tuple("images" if after > seen else "videos" for seen, after in itertools.pairwise(before))

    def count(self, kind: Kind) -> int:
        """Samples of ``kind`` in a process's batch."""
        return self.images if kind == "images" else self.videos


def mixture(config: DataConfig, global_batch_size: int, world_size: int) -> Mixture:
    """Split the global batch over processes and kinds.

    Raises:
        UserError: it does not split into whole samples.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        raise UserError(f"a global batch of {global_batch_size} does not split evenly over {world_size} processes")
    size = global_batch_size // world_size
    if not config.images:
        return Mixture(size, 0)
    if not config.videos:
        return Mixture(0, size)
    images = round(size * config.image_share)
    if abs(images - size * config.image_share) > 1e-6 or not 0 < images < size:
        raise UserError(
            f"an image share of {config.image_share:g} makes {size * config.image_share:g} images in a process's batch of {size} "
            f"(global batch {global_batch_size} over {world_size} processes); it must be a whole number from 1 to {size - 1}"
        )
    return Mixture(size - images, images)


class JointDataset(IterableDataset[Sample]):
    """Videos and images in the slots of one batch after the other; the epoch is a pass over the videos, or over the only kind.

    Composer calls ``state_dict`` and ``load_state_dict`` for checkpoints.
    """

    def __init__(
        self, sources: dict[Kind, Source], config: DataConfig, mix: Mixture, held_out: Mapping[Kind, int] | None = None
    ) -> None:
        """Collective: every process builds it at the same time. ``held_out`` samples of each kind are not iterated over.

        Raises:
            UserError: fewer samples than one global batch takes, or none beside those held out.
        """
        held_out = held_out or {}
        for kind, source in sources.items():
            if held_out.get(kind, 0) >= source.manifest.num_samples:
                raise UserError(
                    f"{source.location} holds {source.manifest.num_samples} samples, {held_out[kind]} are to be held out"
                )
        world = World.detect()
        world_size = world.num_ranks
        kind, source = next(iter(sources.items()))
        per_batch = mix.count(kind) * world_size
        self.batches = source.manifest.num_samples // per_batch  # in an epoch
        if not self.batches:
            raise UserError(f"{source.location} holds {source.manifest.num_samples} samples, a global batch takes {per_batch}")
        if any(mix.count(kind) * world_size % config.canonical_nodes for kind in sources):
            raise UserError(f"canonical_nodes {config.canonical_nodes} does not divide the videos and images of a global batch")
        self.mix = mix
        self.global_batch_size = mix.size * world_size
        self.seed = config.seed
        self.canonical_nodes = config.canonical_nodes
        view = View(config.frames, config.frame_rates, config.text_width, config.max_tokens, config.seed)
        self.parts: dict[Kind, ClipDataset] = {}
        with _names_of_shared_memory(world):
            for kind, source in sources.items():
                count = mix.count(kind)
                epoch_size = self.batches * count * world_size
                self.parts[kind] = ClipDataset(
                    source, view, count, epoch_size, config.canonical_nodes, config.local_limit, held_out.get(kind, 0)
                )
        self._position = {"epoch": 0, "sample_in_epoch": 0}  # where iteration begins, in samples over all processes
        # What the order depends on: a checkpoint's position means nothing under another.
        self._order = {
            "global batch size": self.global_batch_size,
            "share of images": mix.images / mix.size,
            "data seed": config.seed,
            "canonical_nodes": config.canonical_nodes,
            **{f"number of {kind}": source.manifest.num_samples for kind, source in sources.items()},
        }
        self._nodes = world.num_nodes  # of the first run, on which StreamingDataset's order over nodes depends
        # Said to StreamingDataset even at the beginning: it would take up a position that a killed run left in shared memory.
        self._start_parts()

    def __len__(self) -> int:
        """Samples of an epoch in this process."""
        return self.batches * self.mix.size

    def __iter__(self) -> Iterator[Sample]:
        """The samples of this worker, whole batches of them. Every part begins and ends its epoch together with the others."""
        epoch, first = self._upcoming_epoch(), self.batches - self.batches_left()
        world = World.detect()  # in a loader process, its number among them too
        iterators = {kind: iter(part) for kind, part in self.parts.items()}
        for number in range(first + world.worker_of_rank, self.batches, world.workers_per_rank):
            drawn = dict.fromkeys(self.parts, 0)
            for kind in self.mix.slots:
                sample = next(iterators[kind], None)
                if sample is None:
                    raise UserError(
                        f"{self.parts[kind].source.location}: its epoch ended early, at batch {number} of {self.batches}"
                    )
                # Its place in the order over all processes, which is the same for every number of them.
                place = number * self.mix.count(kind) + drawn[kind]
                place = (place * world.ranks_per_node + world.rank_of_node) * world.num_nodes + world.node
                yield replace(sample, seed=derived_seed(self.seed, epoch, KINDS.index(kind), place))
                drawn[kind] += 1
        for kind, iterator in iterators.items():
            if next(iterator, None) is not None:
                raise UserError(f"{self.parts[kind].source.location}: its epoch did not end after {self.batches} batches")

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position in the order, for a checkpoint.

        Args:
            num_samples: trained on in this epoch, over all processes; 0 behind an epoch's end.
            from_beginning: always true in Composer: ``num_samples`` counts from the epoch's beginning.
        """
        del from_beginning
        upcoming = self._upcoming_epoch()
        if upcoming == self._position["epoch"]:
            position = self._position
        elif num_samples:
            position = {"epoch": upcoming - 1, "sample_in_epoch": num_samples}
        else:
            position = {"epoch": upcoming, "sample_in_epoch": 0}
        return {**position, "nodes": self._nodes, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the position of ``state``; every process calls it before it iterates.

        Raises:
            UserError: the order was another one.
        """
        for what, saved in state["order"].items():
            if saved != self._order.get(what):
                raise UserError(
                    f"the checkpoint's {what} is {saved}, this run's {self._order.get(what, 0)}: its place in the data cannot be "
                    "found; keep the value, or start a run of another name from the checkpoint's weights"
                )
        self._position = {"epoch": state["epoch"], "sample_in_epoch": state["sample_in_epoch"]}
        self._nodes = state["nodes"]
        self._start_parts()

    def batches_left(self) -> int:
        """How many batches the iteration that begins next will yield in this process."""
        resumed = self._upcoming_epoch() == self._position["epoch"]
        return self.batches - (self._position["sample_in_epoch"] // self.global_batch_size if resumed else 0)

    def _upcoming_epoch(self) -> int:
        """The epoch of the iteration that begins next."""
        # StreamingDataset's count lies in shared memory, and its workers advance it when they begin. Until then it knows
        # nothing of a position to resume at.
        return max(self._position["epoch"], next(iter(self.parts.values())).next_epoch)

    def _start_parts(self) -> None:
        for kind, part in self.parts.items():
            part.load_state_dict(
                {
                    "epoch": self._position["epoch"],
                    "sample_in_epoch": self._position["sample_in_epoch"] * self.mix.count(kind) // self.mix.size,
                    "num_canonical_nodes": self.canonical_nodes,
                    "shuffle_seed": self.seed,
                    "initial_physical_nodes": self._nodes,
                }
            )


class JointLoader(DataLoader[Sample]):
    """Batches of a ``JointDataset``. An epoch that would end early is an error."""

    def __init__(self, dataset: JointDataset, config: DataConfig) -> None:
        self.joint = dataset
        super().__init__(
            dataset,
            batch_size=dataset.mix.size,
            collate_fn=partial(batch.collate, max_tokens=config.max_tokens),
            num_workers=config.workers,
            prefetch_factor=config.prefetch if config.workers else None,
            persistent_workers=config.workers > 0,
            worker_init_fn=shield_loader_process,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
            generator=torch.Generator(),  # its own: an epoch's start must not advance the generator that noise comes from
        )

    def __iter__(self) -> Iterator[PackedBatch]:  # type: ignore[override]
        """The batches of an epoch, or of what a checkpoint left of it.

        Raises:
            UserError: samples cannot be had; names the shard.
        """
        promised = self.joint.batches_left()
        yielded = 0
        try:
            for packed in super().__iter__():
                yielded += 1
                yield packed
        except UserError as error:
            # One from a worker process brings the worker's stack trace; its last line is the message.
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        if yielded != promised:
            raise UserError(f"the epoch ended after {yielded} of {promised} batches; the loader's error is above")


def build_loader(config: DataConfig, global_batch_size: int, held_out: Mapping[Kind, int] | None = None) -> DataSpec:
    """Open and check the datasets and build the loader for Composer's Trainer. Collective: every process calls it.

    Each process gets batches of its part of ``global_batch_size``, all with the same numbers of videos and images. In the
    training loop ``state.batch`` is a ``PackedBatch`` until it is split into microbatches, then a ``Batch``.

    Args:
        config: what to read.
        global_batch_size: samples of a step, over all processes.
        held_out: how many samples of each kind are never trained on; ``ClipDataset.held_out_sample`` reads them.

    Raises:
        UserError: datasets that are missing, damaged or not what ``config`` asks for, or a batch that does not split. The same in
            every process.
    """
    sources: dict[Kind, Source] = {}
    fault = None
    try:
        mix = mixture(config, global_batch_size, dist.get_world_size())
        sources = open_sources(config)
        for source in sources.values():
            fault = fault or find_fault(source, dist.get_local_rank(), dist.get_local_world_size(), config.verify)
    except UserError as error:
        fault = str(error)
    faults = [found for found in dist.all_gather_object(fault) if found]
    if faults:
        raise UserError(faults[0])
    dataset = JointDataset(sources, config, mix, held_out)
    return DataSpec(
        JointLoader(dataset, config),
        num_samples=dataset.batches * global_batch_size,
        microbatch_transforms=partial(batch.unpack, frames=config.frames),
        split_batch=batch.split,
        get_num_samples_in_batch=batch.num_samples,
    )


class _SharedMemory(SharedMemory):
    """Shared memory that is let go of with its last reference, unless it was created here: that lasts as long as the process."""

    def __init__(self, name: str, create: bool, size: int = 0) -> None:
        super().__init__(name, create, size, auto_cleanup=create)


@contextlib.contextmanager
def _names_of_shared_memory(world: World) -> Iterator[None]:
    """Let one run of this machine at a time choose names for its shared memory. Collective.

    StreamingDataset looks for names that are free and takes them a moment later; of two runs that start together one would die.
    It attaches to every name that is taken, killed runs' among them, and would keep all of them open: thousands of files.
    """
    with contextlib.ExitStack() as stack:
        if world.is_local_leader:
            path = Path(f"/dev/shm/streaming-names-{os.getuid()}.lock")  # noqa: S108
            lock = stack.enter_context(path.open("a"))
            for _ in range(600):  # a minute; runs on several nodes could wait for each other's locks
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.1)
        dist.barrier()
        stack.enter_context(mock.patch.object(prefix, "SharedMemory", _SharedMemory))
        yield


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
