"""One partition of the items, from reading to committed shards: the work of one Spark task, which knows nothing of Spark."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from dataprep import captioner, clips, disk, encode, ingest, limits, looks, models, second_try, selection, shards, spans
from dataprep.bars import Bars
from dataprep.captioner import CaptionerConfig
from dataprep.captions import MISSING
from dataprep.clips import ClipConfig, Facts
from dataprep.encode import Clip, StageConfig, TextConfig
from dataprep.fetch import FetchConfig
from dataprep.filters import FilterConfig, Rejected
from dataprep.ingest import Item
from dataprep.looks import LooksConfig
from dataprep.selection import SelectConfig
from dataprep.shards import Account, ClipRow, PartSummary, PartWriter, ShardConfig
from model import config

MOST_SECONDS = 3600  # of CPU for one item; what filters.max_gigapixels lets through takes minutes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the content of the datasets, given the inputs."""

    stages: tuple[StageConfig, ...]
    clips: ClipConfig
    text: TextConfig
    captioner: CaptionerConfig | None = None  # describes what has no caption; null: it is rejected
    looks: LooksConfig = dataclasses.field(default_factory=LooksConfig)
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    shards: ShardConfig = dataclasses.field(default_factory=ShardConfig)
    fetch: FetchConfig = dataclasses.field(default_factory=FetchConfig)  # decides only what can be had: see ``content``

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) != len(names):
            raise ValueError("stages: at least one, each with a name of its own")

    @property
    def largest(self) -> tuple[StageConfig, int]:
        """The stage of the largest pictures, and its number."""
        return max(((stage, number) for number, stage in enumerate(self.stages)), key=lambda pair: pair[0].height * pair[0].width)

    @property
    def models(self) -> dict[str, str]:
        """Key of the config -> folder or hub name of a model that it names, the text encoder first."""
        found = {"text.path": self.text.path}
        if self.captioner:
            found["captioner.path"] = self.captioner.path
        if self.looks.aesthetic is not None:
            found["looks.aesthetic"] = self.looks.aesthetic
        return found

    def for_workers(self) -> "Recipe":
        """The same for processes that run elsewhere."""
        looks = self.looks
        if looks.aesthetic is not None:
            looks = dataclasses.replace(looks, aesthetic=models.absolute(looks.aesthetic))
        moved = dataclasses.replace(self, text=dataclasses.replace(self.text, path=models.absolute(self.text.path)), looks=looks)
        if self.captioner is None:
            return moved
        return dataclasses.replace(
            moved, captioner=dataclasses.replace(self.captioner, path=models.absolute(self.captioner.path))
        )

    @property
    def content(self) -> dict[str, Any]:
        """What decides the content of a sample: with the same, what is prepared can be used again."""
        return {name: value for name, value in config.to_tree(self).items() if name != "fetch"}


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A kept item."""

    clips: list[Clip]
    facts: Facts


def process(
    recipe: Recipe, select: SelectConfig, workspace: str, part: int, group: int, on_item: Callable[[Account], None]
) -> PartSummary:
    """Prepare the items of row group ``group`` of the list and commit them as ``part``. Bad items become accounts with a reason;
    anything else that goes wrong (no space left, a bug) is raised, leaves nothing behind, and is for Spark to try again.

    After a try that was killed each item is first prepared in a process of its own: a file that makes a decoder crash ends that
    process and is rejected, where it would end every try.

    ``select`` only decides into which files a clip goes, so that the shards of what will be kept need not be written again."""
    av.logging.set_level(av.logging.PANIC)  # what matters is raised
    # An attempt that fails leaves nothing behind: one that is there was killed, or is still at it.
    careful = any(Path(workspace).glob(f"attempts/{shards.part_name(part)}-*"))
    writer = PartWriter(Path(workspace), part, recipe.shards)
    try:
        items = ingest.read_group(Path(workspace, shards.ITEMS_NAME), group)
        captions = [_caption(item, recipe.fetch) for item in items]
        states = encode.encode_captions([caption for caption in captions if isinstance(caption, str)], recipe.text)
        if recipe.captioner and any(map(_is_missing, captions)):
            captioner.load_captioner(recipe.captioner)  # before what is in use is measured
        looks.load(recipe.looks)
        most = limits.memory_in_use() + recipe.filters.max_memory_mb * limits.MEGABYTE
        guarded = functools.partial(prepare_guarded, recipe=recipe, most_memory=most, careful=careful)
        for item, caption in zip(items, captions, strict=True):
            account = _item(item, caption, recipe, select, states, writer, guarded)
            writer.account(dataclasses.replace(account, fingerprint=ingest.fingerprint(item)))
            on_item(account)
        return writer.commit()
    except BaseException:
        writer.abort()
        raise


def prepare(item: Item, recipe: Recipe) -> Prepared:
    """Read the media of one item.

    Raises:
        Rejected: it cannot or shall not be used.
    """
    facts = Facts()
    with spans.open_span(item.media, recipe.fetch) as file:  # type: ignore[arg-type]
        if item.kind == "image":
            images, facts.source = clips.read_image(file, [stage.size for stage in recipe.stages], recipe.filters)
            facts.frames = 1
            return Prepared([encode.pack_image(images, recipe.stages)], facts)
        packed = _clips(file, recipe, facts, None)
        if facts.cropped.differ(facts.bars):  # the first second showed other black bars than the whole
            bars, facts = facts.bars, Facts()
            file.seek(0)
            packed = _clips(file, recipe, facts, bars)
    if not packed:
        raise Rejected("shots too short", f"none has {recipe.clips.min_frames} frames at {recipe.clips.frame_rate:g} per second")
    return Prepared(packed, facts)


def looked_at(prepared: Prepared, recipe: Recipe) -> list[Clip]:
    """The clips with the scores that models give."""
    if not recipe.looks.asks:
        return prepared.clips
    stage, number = recipe.largest
    found = []
    for clip in prepared.clips:
        packed = clip.stages[number]
        scored = looks.look(packed.frame(len(packed.frame_ends) // 2, stage), recipe.looks)
        found.append(dataclasses.replace(clip, scores=dataclasses.replace(clip.scores, **vars(scored))))
    return found


def described(clips: list[Clip], recipe: Recipe) -> tuple[list[str], str]:
    """A caption for each clip by the captioner, empty where it said nothing; and who that was."""
    assert recipe.captioner is not None
    stage, number = recipe.largest
    shown = []
    for clip in clips:
        packed, count = clip.stages[number], recipe.captioner.frames
        middles = (2 * np.arange(count) + 1) * len(packed.frame_ends) // (2 * count)  # of as many equal pieces
        shown.append([packed.frame(frame, stage) for frame in middles.tolist()])
    return captioner.load_captioner(recipe.captioner).describe(shown), Path(recipe.captioner.path).name


def prepare_guarded(item: Item, recipe: Recipe, most_memory: int, careful: bool) -> Prepared:
    """``prepare`` within ``most_memory`` bytes of address space; if ``careful`` only after another process has survived it.

    A decoder that never comes back kills the process in the end, as one that crashes does at once.

    Raises:
        Rejected: it cannot or shall not be used.
    """

    def within() -> Prepared | None:
        with contextlib.suppress(MemoryError), limits.memory(most_memory), limits.cpu_time(MOST_SECONDS):
            return prepare(item, recipe)
        return None  # and nothing holds what the error held

    signal = limits.fatal_signal(within, 2 * MOST_SECONDS) if careful else ""
    if signal:
        raise Rejected("crashes the decoder", signal)
    prepared = within()
    if prepared is None:
        raise Rejected("too much memory", f"more than filters.max_memory_mb={recipe.filters.max_memory_mb}")
    return prepared


def _clips(file: BinaryIO, recipe: Recipe, facts: Facts, bars: Bars | None) -> list[Clip]:
    sizes = [stage.size for stage in recipe.stages]
    shown = second_try.read_video(file, sizes, recipe.clips, recipe.filters, facts, bars)
    return encode.pack_clips(shown, recipe.stages, recipe.clips)


def _caption(item: Item, settings: FetchConfig) -> str | Rejected:
    try:
        if item.reason:
            raise Rejected(item.reason, item.detail)
        return ingest.read_caption(item, settings)
    except Rejected as rejected:
        return rejected


def _is_missing(caption: str | Rejected) -> bool:
    return isinstance(caption, Rejected) and caption.reason == MISSING


def _item(
    item: Item,
    caption: str | Rejected,
    recipe: Recipe,
    select: SelectConfig,
    states: dict[str, np.ndarray],
    writer: PartWriter,
    guarded: Callable[[Item], Prepared],
) -> Account:
    try:
        if isinstance(caption, Rejected) and not (recipe.captioner and _is_missing(caption)):
            raise caption
        prepared = guarded(item)
    except Rejected as rejected:
        return Account(item.key, item.kind, item.source, "rejected", rejected.reason, rejected.detail)
    except Exception as error:  # a decoder's complaint about hostile bytes that is not foreseen: still only this item's end
        if isinstance(error, OSError) and error.errno in disk.NO_SPACE:  # for what was fetched: no fault of the item
            raise
        return Account(item.key, item.kind, item.source, "rejected", "failed", f"{type(error).__name__}: {error}"[:500])
    source = prepared.facts.source
    assert source is not None
    clips = looked_at(prepared, recipe)
    if isinstance(caption, str):
        said, by = [caption] * len(clips), ""
    else:
        said, by = described(clips, recipe)
        states = states | encode.encode_captions(filter(None, said), recipe.text)
        if not any(said):
            return Account(item.key, item.kind, item.source, "rejected", MISSING, "and the captioner had nothing to say")
    for clip, caption in zip(clips, said, strict=True):
        if not caption:
            continue
        key, frames = f"{item.key}:{clip.number}", len(clip.stages[0].frame_ends)
        aside = selection.fault(item.kind, clip.scores, select) is not None
        row = ClipRow(
            key=key,
            item=item.key,
            kind=item.kind,
            caption=caption,
            captioner=by,
            frames=frames,
            start_seconds=clip.start_seconds,
            shot=clip.shot,
            **dataclasses.asdict(clip.scores),
        )
        writer.clip(row, aside)
        for stage, packed in zip(recipe.stages, clip.stages, strict=True):
            sample: dict[str, Any] = {
                "key": key,
                "caption": caption,
                "frames": packed.frames,
                "frame_ends": packed.frame_ends,
                "start_seconds": clip.start_seconds,
                "source_height": source.height,
                "source_width": source.width,
                "text": states[caption],
            }
            writer.write(f"{stage.name}/{item.kind}s", sample, aside)
    return Account(
        item.key,
        item.kind,
        item.source,
        "kept",
        clips=sum(map(bool, said)),
        source_height=source.height,
        source_width=source.width,
        seconds=prepared.facts.seconds,
        frame_rate=prepared.facts.frame_rate,
    )
