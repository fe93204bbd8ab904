"""The paper's user study (Tables 6 and 10): pairs of clips of one prompt, judged blind by four criteria.

One folder of clips ("ours") is compared with any number of others, as ``pipelines.sample`` writes them. Each rater sees all pairs
in an order and with sides of their own. A vote prefers one of the two; there is no tie, as in the paper.
"""

import csv
import hashlib
import io
import json
import math
import random
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from scipy.stats import norm

from model.errors import RunError, UserError
from pipelines.clips import made

# The paper's criteria, in the order of its tables. It does not print the words that its raters read; these are ours.
QUESTIONS: Mapping[str, str] = {
    "photorealism": "Which clip looks more like a real recording?",
    "text alignment": "Which clip shows better what the text says?",
    "motion quantity": "Which clip has more motion in it?",
    "motion quality": "Which clip moves better: plausible, smooth, without flicker?",
}
LEVEL = 0.95  # of the intervals
RATER = re.compile(r"[\w][\w .@+-]{0,63}")


@dataclass(frozen=True)
class StudyConfig:
    """Which folders of clips are compared, and where the votes go."""

    ours: str | None = None  # a sampling job's output; None: no study
    others: tuple[str, ...] = ()  # each compared with ours
    votes: str = "runs/studio/votes.db"
    seed: int = 0  # of the raters' orders

    def __post_init__(self) -> None:
        if (self.ours is None) != (not self.others):
            raise ValueError("ours and others must both be named, or neither")
        names = [Path(folder).resolve().name for folder in self.others]
        if len(set(names)) < len(names):
            raise ValueError(f"others must have names of their own, got {list(self.others)}")


@dataclass(frozen=True)
class Pair:
    """Two clips of one prompt."""

    key: str  # of both files' contents: votes count for these clips, not for what later lies under their names
    prompt: str
    other: str  # name of the folder that ours is compared with
    ours: Path
    theirs: Path


@dataclass(frozen=True)
class Shown:
    """A pair as a rater sees it."""

    pair: Pair
    ours_is_left: bool

    @property
    def left(self) -> Path:
        return self.pair.ours if self.ours_is_left else self.pair.theirs

    @property
    def right(self) -> Path:
        return self.pair.theirs if self.ours_is_left else self.pair.ours


@dataclass(frozen=True)
class Vote:
    """One rater's answer to one question about one pair."""

    rater: str
    pair: str  # its key
    prompt: str
    other: str
    question: str
    prefers_ours: bool
    ours_was_left: bool
    at: str  # when, UTC, ISO 8601


@dataclass(frozen=True)
class Preference:
    """How often ours was preferred."""

    other: str
    question: str
    ours: int  # votes for it
    votes: int
    pairs: int  # that the votes are about
    low: float  # interval of LEVEL
    high: float

    @property
    def share(self) -> float:
        return self.ours / self.votes


@dataclass(frozen=True)
class Pairs:
    """What a study shows."""

    pairs: tuple[Pair, ...]
    unmatched: tuple[str, ...]  # of each other folder whose prompts are not all ours, or the reverse, a line that says so


def find_pairs(ours: Path, others: Sequence[Path]) -> Pairs:
    """Match clips by their prompts; several of one prompt in their order.

    Raises:
        UserError: a folder that is no finished sampling job's, a clip that is missing, or a folder without a prompt of ours.
    """
    mine = _clips(ours)
    pairs, unmatched = [], []
    for folder in others:
        theirs = _clips(folder)
        name = folder.resolve().name
        found = [
            Pair(_key(prompt, a, b), prompt, name, a, b)
            for prompt in mine
            for a, b in zip(mine[prompt], theirs.get(prompt, ()), strict=False)
        ]
        if not found:
            raise UserError(f"{folder}: has no prompt in common with {ours}")
        left_out = [sum(map(len, clips.values())) - len(found) for clips in (mine, theirs)]
        if any(left_out):
            unmatched.append(f"{name}: {left_out[0]} of our clips and {left_out[1]} of its have no counterpart")
        pairs += found
    if len({pair.key for pair in pairs}) < len(pairs):
        raise UserError(f"{ours}: a pair of the same two clips occurs twice; is a folder named twice?")
    return Pairs(tuple(pairs), tuple(unmatched))


def _clips(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for clip in made(folder):
        found[clip.prompt].append(clip.path)
    return found


def _key(prompt: str, *clips: Path) -> str:
    digest = hashlib.sha256(prompt.encode())
    for clip in clips:
        try:
            digest.update(hashlib.sha256(clip.read_bytes()).digest())
        except OSError as error:
            raise UserError(f"{clip}: {error.strerror}") from error
    return digest.hexdigest()[:32]


def order(pairs: Sequence[Pair], rater: str, seed: int) -> list[Shown]:
    """All pairs as ``rater`` sees them: always the same for one rater, independent for others and of the order of ``pairs``."""
    drawn = random.Random(json.dumps([seed, rater]))  # hashes a string by SHA-512, the same in every process
    found = sorted(pairs, key=lambda pair: pair.key)
    drawn.shuffle(found)
    return [Shown(pair, drawn.random() < 0.5) for pair in found]


class Votes:
    """The votes in an SQLite file: the four of a pair together or not at all, each pair once for each rater."""

    def __init__(self, path: Path) -> None:
        """Make the file if there is none.

        Raises:
            UserError: not a file of votes.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = ", ".join(f"{field.name} NOT NULL" for field in fields(Vote))
        with self._open() as connection, connection:
            connection.execute(f"CREATE TABLE IF NOT EXISTS votes ({columns}, PRIMARY KEY (rater, pair, question))")

    def add(self, rater: str, shown: Shown, left: Mapping[str, bool]) -> bool:
        """Store a rater's answers; ``left`` says of each question whether the left clip is preferred. Back means: on the disk.

        Returns:
            False if the rater has judged the pair before; the first answers stay.

        Raises:
            UserError: not exactly the four questions, or no name.
            RunError: the file takes no votes.
        """
        require_rater(rater)
        if set(left) != set(QUESTIONS):
            raise UserError("all four questions need an answer")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pair, side = shown.pair, shown.ours_is_left
        votes = [
            Vote(rater, pair.key, pair.prompt, pair.other, question, left[question] == side, side, now) for question in QUESTIONS
        ]
        places = ", ".join("?" * len(fields(Vote)))
        try:
            with self._open() as connection, connection:
                connection.executemany(f"INSERT INTO votes VALUES ({places})", map(astuple, votes))  # noqa: S608
        except sqlite3.IntegrityError:
            return False
        except sqlite3.Error as error:
            raise RunError(f"{self.path}: {error}; the vote is not stored") from error
        return True

    def judged(self, rater: str) -> set[str]:
        """Keys of the pairs that a rater has judged."""
        with self._open() as connection:
            return {key for (key,) in connection.execute("SELECT DISTINCT pair FROM votes WHERE rater = ?", (rater,))}

    def all(self) -> list[Vote]:
        """All votes, in the order in which they came."""
        names = ", ".join(field.name for field in fields(Vote))
        with self._open() as connection:
            rows = connection.execute(f"SELECT {names} FROM votes ORDER BY rowid").fetchall()  # noqa: S608
        return [
            Vote(rater, pair, prompt, other, question, bool(prefers), bool(left), at)
            for rater, pair, prompt, other, question, prefers, left, at in rows
        ]

    def _open(self) -> "closing[sqlite3.Connection]":
        return closing(_Connection(self.path))


class _Connection(sqlite3.Connection):
    """Waits for other processes, and tells in one line what fails."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path, timeout=30)
            super().execute("PRAGMA synchronous = FULL")
            super().execute("SELECT 1 FROM sqlite_master").fetchone()  # the first thing that reads the file
        except sqlite3.Error as error:
            raise UserError(f"{path}: {error}") from error


def require_rater(rater: str) -> None:
    """Refuse names that are none.

    Raises:
        UserError: it is empty, too long, or holds odd characters.
    """
    if not RATER.fullmatch(rater):
        raise UserError("name: up to 64 letters, digits, spaces and .@+-_, the first one a letter or digit")


def preferences(votes: Iterable[Vote]) -> list[Preference]:
    """How often ours was preferred, for each other folder and question: the rows and columns of Table 6."""
    found: dict[tuple[str, str], dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        found[vote.other, vote.question][vote.pair].append(vote.prefers_ours)
    rows = []
    for (other, question), by_pair in sorted(found.items(), key=lambda item: (item[0][0], [*QUESTIONS].index(item[0][1]))):
        counts = [(sum(answers), len(answers)) for answers in by_pair.values()]
        ours, number = (sum(column) for column in zip(*counts, strict=True))
        rows.append(Preference(other, question, ours, number, len(counts), *interval(counts)))
    return rows


def interval(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Wilson's interval of a share, at the number of independent votes that the votes on so many pairs are worth.

    Votes on one pair agree more than chance would have it: five raters of one pair tell less about a model than one rater each of
    five pairs. So the number of votes is divided by the design effect, the variance between pairs over that of independent votes
    (Kish 1965), as Dean and Pagano (2015) evaluate it for Wilson's interval. Where all votes are the same it cannot be told, and
    pairs are counted.

    Args:
        counts: votes for ours and all votes, for each pair.
    """
    ours, number, pairs = sum(k for k, _ in counts), sum(n for _, n in counts), len(counts)
    share = ours / number
    effective = float(min(number, pairs))
    if 0 < ours < number and pairs > 1:
        between = pairs / (pairs - 1) * math.fsum((k - share * n) ** 2 for k, n in counts) / number**2
        effective = number / max(1.0, between * (number - 1) / (share * (1 - share)))
    z = float(norm.ppf((1 + LEVEL) / 2))
    middle = (share + z**2 / 2 / effective) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * math.sqrt(share * (1 - share) / effective + (z / 2 / effective) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def to_csv(votes: Iterable[Vote]) -> str:
    """The votes as a table with a header."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(field.name for field in fields(Vote))
    for vote in votes:
        writer.writerow(int(value) if isinstance(value, bool) else value for value in astuple(vote))
    return text.getvalue()
