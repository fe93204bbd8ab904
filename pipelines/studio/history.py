"""The studio's clips on the disk: mp4 files that say in themselves what they were made of. There is no other record of them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av

from model import config, media
from model.errors import RunError, UserError
from model.media import Frames
from pipelines.cascade import CascadeConfig
from pipelines.sample import slug, tags

NAME = re.compile(r"(\d{8}-\d{6}-\d{6})-[a-z0-9-]{1,48}\.mp4")
TIME = "%Y%m%d-%H%M%S-%f"  # UTC; names in order of the alphabet are clips in order of time


@dataclass(frozen=True)
class Entry:
    """A clip that was made."""

    name: str  # of the file
    made: datetime  # when, UTC
    prompt: str
    seed: int
    told: dict[str, Any]  # as pipelines.sample.made_by tells it: models and settings
    fault: str = ""  # why nothing else is known of it

    @property
    def settings(self) -> CascadeConfig:
        """What it was made with.

        Raises:
            UserError: settings of another version of this project.
        """
        tree = {key: value for key, value in self.told.get("settings", {}).items() if key != "given"}
        return config.build(CascadeConfig, tree, where=self.name)


class History:
    """A folder of clips."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, frames: Frames, prompt: str, seed: int, told: dict[str, Any]) -> str:
        """Write a clip, at the frame rate of its settings, and return its name.

        Raises:
            RunError: it cannot be written.
        """
        rate = told["settings"]["frame_rate"]
        while (path := self.folder / f"{datetime.now(UTC).strftime(TIME)}-{slug(prompt)}.mp4").exists():
            pass  # of the same microsecond
        try:
            media.write_mp4(path, frames, rate, tags(prompt, seed, told))
        except (OSError, av.FFmpegError) as error:
            raise RunError(f"{path}: {error.strerror or error}") from error
        return path.name

    def path(self, name: str) -> Path | None:
        """The file of a clip; None if there is none of that name here, whatever the name is."""
        path = self.folder / name
        return path if NAME.fullmatch(name) and path.is_file() else None

    def entry(self, name: str) -> Entry:
        """Read what a clip says of itself.

        Raises:
            UserError: no clip of that name.
        """
        path = self.path(name)
        if path is None:
            raise UserError(f"no clip {name!r} in {self.folder}")
        made = datetime.strptime(name[: len("20261231-235959-999999")], TIME).replace(tzinfo=UTC)
        try:
            told = json.loads(media.read_tags(path).get("comment", ""))
            return Entry(name, made, str(told.pop("prompt")), int(told.pop("seed")), told)
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            return Entry(name, made, "", 0, {}, fault="damaged, or not of the studio")

    def entries(self, words: str = "") -> Iterator[Entry]:
        """Clips whose prompts hold ``words``, in whichever case, the newest first; each is read when it is asked for."""
        names = sorted((path.name for path in self.folder.iterdir() if NAME.fullmatch(path.name)), reverse=True)
        for name in names:
            if self.path(name) is not None:
                entry = self.entry(name)
                if words.lower() in entry.prompt.lower():
                    yield entry
