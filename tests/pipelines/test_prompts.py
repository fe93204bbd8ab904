"""Prompts by number and proportion."""

from collections import Counter
from pathlib import Path

import pytest

from model.errors import UserError
from pipelines.clips import captions
from pipelines.prompts import apportion, blocked_by, of_file


def test_prompts_are_apportioned_by_largest_remainders_and_evenly_mixed() -> None:
    given = ["a"] * 6 + ["b"] * 3 + ["c"] * 1
    assert Counter(apportion(given, 20)) == {"a": 12, "b": 6, "c": 2}
    assert Counter(apportion(given, 7)) == {"a": 4, "b": 2, "c": 1}  # of 4.2, 2.1 and 0.7
    assert Counter(apportion(given, 3)) == {"a": 2, "b": 1}  # of 1.8, 0.9 and 0.3
    assert apportion(["x", "y"], 1) == ["x"]
    assert apportion(["x", "y", "z"], 3) == ["x", "y", "z"]
    mixed = apportion(given, 100)
    for start in range(0, 100, 20):
        part = Counter(mixed[start : start + 20])
        assert abs(part["a"] - 12) <= 1 and abs(part["b"] - 6) <= 1 and abs(part["c"] - 2) <= 1
    for number in (1, 2, 11, 101, 1000):
        assert len(apportion(given, number)) == number


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt"):
        of_file(str(tmp_path / "latin.txt"))
    with pytest.raises(UserError, match="nothing"):
        captions(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("prompt", "entry"),
    [
        ("a Gun on a table", "gun"),
        ("a gunner salutes", None),  # whole words
        ("two men,  fighting -- in a ring", "fighting in a ring"),
        ("fighting", None),
        ("ein ÜBERFALL", "überfall"),
        ("a cat", None),
    ],
)
def test_blocked_words_and_phrases(prompt: str, entry: str | None) -> None:
    assert blocked_by(prompt, ("gun", "  ", "fighting in a ring", "überfall")) == entry
