"""Clips to be looked at: those that a sampling job made, and windows of a data set's real ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from streaming import LocalDataset

from model.data.batch import Sample
from model.data.samples import View, decode_sample, derived_seed, stride_of
from model.data.shards import open_source
from model.errors import UserError


@dataclass(frozen=True)
class Made:
    """A clip of a sampling job."""

    path: Path  # in the job's folder, whatever the list says
    prompt: str


def made(folder: Path) -> list[Made]:
    """The clips that a sampling job lists, in its order; whether the files are there is not looked at.

    Raises:
        UserError: not the folder of a finished job.
    """
    try:
        listed = json.loads((folder / "samples.json").read_bytes())["clips"]
        return [Made(folder / Path(entry["file"]).name, str(entry["prompt"])) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not the folder of a finished sampling job: {error}") from error


class RealClips:
    """Windows of a data set's clips: of each, frame rate and place are drawn from the seed and its number.

    Raises:
        UserError: no data set, or one whose frame rate none of the wanted ones divides.
    """

    def __init__(self, location: str, frames: int, frame_rates: Sequence[float], seed: int) -> None:
        source = open_source(location, None)
        self.location, self.manifest = source.location, source.manifest
        stored = self.manifest.frame_rate
        if self.manifest.kind == "videos" and not any(stride_of(stored, rate) for rate in frame_rates):
            wanted = ", ".join(f"{rate:g}" for rate in frame_rates)
            raise UserError(f"{location}: stored at {stored:g} frames per second, of which {wanted} is no whole part")
        text = self.manifest.text
        self._view = View(frames, tuple(frame_rates), text.width, text.max_tokens, seed)
        self._rows = LocalDataset(str(source.folder))
        self._seed = seed

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int) -> Sample:
        """One of them.

        Raises:
            UserError: it is damaged, or too short.
        """
        try:
            return decode_sample(self._rows[number], self.manifest, self._view, derived_seed(self._seed, number))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{self.location}: {error}") from error


def captions(location: str) -> list[str]:
    """The captions of a data set, one for each of its clips, in their order.

    Raises:
        UserError: no data set.
    """
    rows = LocalDataset(str(open_source(location, None).folder))
    return [rows[number]["caption"] for number in range(len(rows))]
