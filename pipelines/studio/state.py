"""What the studio is told, and what it has in hand: models, queue, history, shards and study. It knows nothing of pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from model import media, registry
from model.errors import UserError
from pipelines.cascade import CascadeConfig
from pipelines.ranks import default_device
from pipelines.studio.history import History
from pipelines.studio.jobs import Queue, Task
from pipelines.studio.sampler import Sampler, require_playable
from pipelines.studio.scratch import Scratch
from pipelines.studio.shelf import Shelf
from pipelines.studio.study import Pairs, Shown, StudyConfig, Votes, find_pairs, order, require_rater

Tab = Literal["sample", "compare", "shards", "study", "results"]
SHOWN_HEIGHT = 288  # pixels that small clips are enlarged towards, by whole factors: h264 halves the colours' resolution
MAX_FRAMES = 2000  # of a clip of a study


@dataclass(frozen=True)
class StudioConfig:
    """The studio."""

    cascade: CascadeConfig = field(default_factory=CascadeConfig)  # what the page begins with
    models: tuple[str, ...] = ()  # folders of published models, beside all versions in the registry
    shards: tuple[str, ...] = ()  # output folders of data preparation
    study: StudyConfig = field(default_factory=StudyConfig)
    tabs: tuple[Tab, ...] = ("sample", "compare", "shards", "study", "results")  # in their order; raters get "study" alone
    output: str = "runs/studio"  # holds the history
    keep: int = 2  # cascades in memory
    device: str | None = None  # None: a GPU if there is one
    host: str = "127.0.0.1"  # this machine alone; there is no password
    port: int = 7860

    def __post_init__(self) -> None:
        if not self.tabs or len(set(self.tabs)) < len(self.tabs):
            raise ValueError(f"tabs must name at least one, and none twice, got {list(self.tabs)}")
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must lie between 0 and 65535, got {self.port}")
        names = [Path(folder).name for folder in self.shards]
        if len(set(self.shards)) < len(names):
            raise ValueError(f"shards are named twice: {list(self.shards)}")


@dataclass(frozen=True)
class Choice:
    """A model that can be chosen."""

    label: str
    uri: str
    stage: str | None = None  # "1" or "2", where it is known: as the other it is not offered


@dataclass(frozen=True)
class Settings:
    """What one sets beside prompt and models."""

    seed: int
    stage1_steps: int
    stage1_guidance: float
    stage2_steps: int
    stage2_guidance: float
    frame_rate: float
    frames: int | None  # None: as many as stage 1 makes at once
    corruption: float

    @classmethod
    def of(cls, c: CascadeConfig, seed: int = 0) -> "Settings":
        """Those of a cascade's config."""
        one, two = c.stage1_sampler, c.stage2_sampler
        return cls(seed, one.steps, one.guidance, two.steps, two.guidance, c.frame_rate, c.frames, c.corruption)

    def applied(self, c: CascadeConfig) -> CascadeConfig:
        """The config with these in it.

        Raises:
            UserError: out of range.
        """
        try:
            return replace(
                c,
                stage1_sampler=replace(c.stage1_sampler, steps=self.stage1_steps, guidance=self.stage1_guidance),
                stage2_sampler=replace(c.stage2_sampler, steps=self.stage2_steps, guidance=self.stage2_guidance),
                frame_rate=self.frame_rate,
                frames=self.frames,
                corruption=self.corruption,
            )
        except ValueError as error:
            raise UserError(str(error)) from error


class Studio:
    """Everything behind the pages."""

    def __init__(self, c: StudioConfig) -> None:
        """Open what the tabs need.

        Raises:
            UserError: no models, shards that are none, or folders that make no study.
        """
        self.config = c
        samples = "sample" in c.tabs or "compare" in c.tabs
        if samples:
            self._require_models()
        self.shelves = {folder: Shelf(Path(folder)) for folder in c.shards} if "shards" in c.tabs else {}
        self.pairs = Pairs((), ())
        self.votes: Votes | None = None
        if c.study.ours is not None and ("study" in c.tabs or "results" in c.tabs):
            self.votes = Votes(Path(c.study.votes))
            if "study" in c.tabs:
                self.pairs = find_pairs(Path(c.study.ours), [Path(folder) for folder in c.study.others])
        self.history = History(Path(c.output, "clips"))
        self.queue = Queue(Sampler(self.history, c.device or default_device(), c.keep).make)
        self.scratch = Scratch()

    def close(self) -> None:
        """Cancel what runs and remove what was made to be shown."""
        self.queue.close()
        self.scratch.close()

    def _require_models(self) -> None:
        where = f"no published models in {self.config.cascade.tracking_uri}"
        try:
            found = self.models()
        except UserError as error:
            found, where = [], str(error)
        if not found:
            raise UserError(f"{where}: run `make demo`, or publish models and name their registry as cascade.tracking_uri")

    def models(self) -> list[Choice]:
        """All that can be chosen now.

        Raises:
            UserError: no registry.
        """
        c = self.config.cascade
        folders = [*self.config.models, *(uri for uri in (c.stage1, c.stage2) if uri and not uri.startswith("models:"))]
        found = [Choice(folder, folder) for folder in dict.fromkeys(folders)]
        try:
            versions = registry.versions(c.tracking_uri)
        except UserError:
            if not found:
                raise
            return found
        for version in versions:
            named = "".join(f" @{alias}" for alias in version.aliases)
            found.append(Choice(f"{version.name}{named} (version {version.number})", version.uri, version.stage))
        return found

    def version_of(self, uri: str | None) -> str | None:
        """What ``models:/NAME@ALIAS`` stands for now, among ``models()``; None if it stands for nothing."""
        if uri is None:
            return None
        name, mark, alias = uri.removeprefix("models:/").partition("@")
        if uri.startswith("models:/") and mark:
            versions = registry.versions(self.config.cascade.tracking_uri)
            return next((v.uri for v in versions if v.name == name and alias in v.aliases), None)
        return uri

    def task(self, prompt: str, stage1: str | None, stage2: str | None, settings: Settings) -> Task:
        """A clip to make, with the version that an alias stands for now.

        Raises:
            UserError: models that are not to be chosen, or what no clip can be made of.
        """
        known = {choice.uri for choice in self.models()}
        one, two = self.version_of(stage1), self.version_of(stage2)
        if one not in known:
            raise UserError(f"stage 1: no such model: {stage1}")
        if stage2 and two not in known:
            raise UserError(f"stage 2: no such model: {stage2}")
        task = Task(prompt, settings.seed, settings.applied(replace(self.config.cascade, stage1=one, stage2=two or None)))
        require_playable(task)
        return task

    def sample_file(self, shelf: str, dataset: str, index: int) -> Path:
        """A clip or picture of a data set as a file that browsers show.

        Raises:
            UserError: no such sample.
        """
        if shelf not in self.shelves:
            raise UserError(f"no such shards: {shelf}")
        frames, rate = self.shelves[shelf].clip(dataset, index)
        suffix = ".mp4" if rate else ".png"

        def make(path: Path) -> None:
            shown = media.enlarge(frames, SHOWN_HEIGHT)
            if rate:
                media.write_mp4(path, shown, rate)
            else:
                Image.fromarray(shown[0]).save(path)

        return self.scratch.file(f"{shelf}\0{dataset}\0{index}\0{hash(frames.tobytes())}", suffix, make)

    def next_pair(self, rater: str) -> tuple[Shown | None, int, int]:
        """What a rater judges next (None at the end), how many pairs are judged, and how many there are.

        Raises:
            UserError: no name.
        """
        require_rater(rater)
        judged = self.votes.judged(rater) if self.votes else set()
        shown = order(self.pairs.pairs, rater, self.config.study.seed)
        left = [one for one in shown if one.pair.key not in judged]
        return left[0] if left else None, len(shown) - len(left), len(shown)

    def vote(self, rater: str, pair: str, left: Mapping[str, bool]) -> None:
        """Store a rater's answers about the pair of that key; those to a pair that was judged before are left alone.

        Raises:
            UserError: not all questions are answered, or no such pair.
            RunError: they cannot be stored.
        """
        require_rater(rater)
        shown = next((one for one in order(self.pairs.pairs, rater, self.config.study.seed) if one.pair.key == pair), None)
        if shown is None or self.votes is None:
            raise UserError("no such pair: the study has changed; begin again")
        self.votes.add(rater, shown, left)

    def blind(self, clip: Path) -> str:
        """The name in the scratch folder of a copy of a clip without what its file says of itself.

        Raises:
            UserError: not a readable video.
        """

        def make(path: Path) -> None:
            video = media.read_video(clip, MAX_FRAMES)
            media.write_mp4(path, media.enlarge(video.frames, SHOWN_HEIGHT), video.frame_rate)

        stat = clip.stat()
        return self.scratch.file(f"{clip.resolve()}\0{stat.st_ino}\0{stat.st_mtime_ns}", ".mp4", make).name
