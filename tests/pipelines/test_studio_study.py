"""The user study: pairing, blind orders, votes that survive, and intervals against closed forms and simulation."""

import csv
import io
import json
import random
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from scipy.stats import binomtest

from model.errors import RunError, UserError
from pipelines.studio.study import QUESTIONS, Pair, StudyConfig, Votes, find_pairs, interval, order, preferences, to_csv

JobWriter = Callable[..., Path]


@pytest.fixture
def job(tmp_path: Path) -> JobWriter:
    """``job(name, prompts)`` writes what pairing reads of a sampling job: samples.json, and files with contents of their own."""

    def write(name: str, prompts: list[str]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        listed = [{"file": f"{n:03d}.mp4", "prompt": prompt, "seed": n} for n, prompt in enumerate(prompts)]
        (folder / "samples.json").write_text(json.dumps({"clips": listed}))
        for entry in listed:
            (folder / str(entry["file"])).write_text(f"{name} {entry}")
        return folder

    return write


def some_pairs(number: int) -> list[Pair]:
    return [Pair(f"key{n}", f"prompt {n}", "other", Path(f"ours/{n}"), Path(f"theirs/{n}")) for n in range(number)]


def test_clips_are_matched_by_prompt_in_their_order(job: JobWriter) -> None:
    ours, other = job("ours", ["a", "b", "a", "c"]), job("other", ["c", "a", "d", "a"])
    found = find_pairs(ours, [other])
    assert [(pair.prompt, pair.ours.name, pair.theirs.name) for pair in found.pairs] == [
        ("a", "000.mp4", "001.mp4"),
        ("a", "002.mp4", "003.mp4"),
        ("c", "003.mp4", "000.mp4"),
    ]
    assert {pair.other for pair in found.pairs} == {"other"}
    assert found.unmatched == ("other: 1 of our clips and 1 of its have no counterpart",)
    three = find_pairs(ours, [other, job("third", ["b"])])
    assert [pair.other for pair in three.pairs] == ["other"] * 3 + ["third"]


def test_other_contents_are_another_pair(job: JobWriter) -> None:
    ours, other = job("ours", ["a"]), job("other", ["a"])
    before = find_pairs(ours, [other]).pairs[0].key
    (other / "000.mp4").write_text("sampled again")
    assert find_pairs(ours, [other]).pairs[0].key != before


def test_what_cannot_be_paired(job: JobWriter, tmp_path: Path) -> None:
    ours = job("ours", ["a"])
    with pytest.raises(UserError, match="nowhere: not the folder of a finished sampling job"):
        find_pairs(ours, [tmp_path / "nowhere"])
    with pytest.raises(UserError, match="has no prompt in common"):
        find_pairs(ours, [job("stranger", ["b"])])
    gone = job("gone", ["a"])
    (gone / "000.mp4").unlink()
    with pytest.raises(UserError, match="000.mp4: No such file"):
        find_pairs(ours, [gone])
    with pytest.raises(ValueError, match="names of their own"):
        StudyConfig("a", ("x/b", "y/b"))
    with pytest.raises(ValueError, match="or neither"):
        StudyConfig(None, ("x",))


def test_each_rater_has_an_order_and_sides_of_their_own_that_stay() -> None:
    pairs = some_pairs(40)
    seen = order(pairs, "ann", 0)
    assert {shown.pair for shown in seen} == set(pairs)
    assert order(list(reversed(pairs)), "ann", 0) == seen, "whatever order the files come in"
    assert [s.pair for s in order(pairs, "bob", 0)] != [s.pair for s in seen] != [s.pair for s in order(pairs, "ann", 1)]
    for shown in seen:
        assert {shown.left, shown.right} == {shown.pair.ours, shown.pair.theirs}
        assert (shown.left == shown.pair.ours) == shown.ours_is_left
    # Over many raters each side and each place is as likely as the others: 1600 sides, 40 orders of 40.
    left = sum(shown.ours_is_left for rater in range(40) for shown in order(pairs, f"rater {rater}", 0))
    assert 720 < left < 880, "four standard deviations"
    firsts = {order(pairs, f"rater {rater}", 0)[0].pair for rater in range(40)}
    assert len(firsts) > 15


def test_a_vote_is_for_the_clip_not_for_the_side(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.db")
    for shown in order(some_pairs(20), "ann", 0):
        # Ours always looks better and never moves more, on whichever side it stands.
        answers = {name: shown.ours_is_left if name == "photorealism" else not shown.ours_is_left for name in QUESTIONS}
        assert votes.add("ann", shown, answers)
    found = {row.question: row for row in preferences(votes.all())}
    assert list(found) == list(QUESTIONS), "in the order of the paper's tables"
    assert (found["photorealism"].share, found["photorealism"].votes, found["photorealism"].pairs) == (1, 20, 20)
    assert found["motion quantity"].share == 0
    assert {vote.ours_was_left for vote in votes.all()} == {True, False}


def test_votes_are_there_after_a_restart_once_for_each_rater_and_pair(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "votes.db"
    first, second, *_ = order(some_pairs(3), "ann", 0)
    left, right = dict.fromkeys(QUESTIONS, True), dict.fromkeys(QUESTIONS, False)
    assert Votes(path).add("ann", first, left)
    assert not Votes(path).add("ann", first, right), "a second click changes nothing"
    assert Votes(path).add("bob", first, right) and Votes(path).add("ann", second, left)
    assert Votes(path).judged("ann") == {first.pair.key, second.pair.key}
    assert Votes(path).judged("bob") == {first.pair.key}
    assert [vote.prefers_ours for vote in Votes(path).all()[:4]] == [first.ours_is_left] * 4


def test_half_an_answer_is_none(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.db")
    (shown,) = order(some_pairs(1), "ann", 0)
    with pytest.raises(UserError, match="all four questions"):
        votes.add("ann", shown, {"photorealism": True})
    for name in ("", " ", "-", "a" * 65, "a\nb", "<b>"):
        with pytest.raises(UserError, match="^name: "):
            votes.add(name, shown, dict.fromkeys(QUESTIONS, True))
    assert votes.all() == []


def test_raters_vote_at_the_same_time(tmp_path: Path) -> None:
    votes, pairs = Votes(tmp_path / "votes.db"), some_pairs(5)

    def rate(rater: str) -> None:
        for shown in order(pairs, rater, 0):
            Votes(votes.path).add(rater, shown, dict.fromkeys(QUESTIONS, shown.ours_is_left))

    threads = [threading.Thread(target=rate, args=(f"rater {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(votes.all()) == 4 * 5 * 4 and all(vote.prefers_ours for vote in votes.all())


def test_files_that_hold_no_votes(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, though long enough to be one" * 100)
    with pytest.raises(UserError, match="text.db: file is not a database"):
        Votes(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE votes (something)")
    with pytest.raises(RunError, match="the vote is not stored"):
        Votes(tmp_path / "other.db").add("ann", order(some_pairs(1), "ann", 0)[0], dict.fromkeys(QUESTIONS, True))


def test_the_table_has_a_row_for_each_other_folder(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.db")
    pairs = some_pairs(4) + [replace(pair, key=f"2{pair.key}", other="better") for pair in some_pairs(4)]
    for shown in order(pairs, "ann", 0):
        votes.add("ann", shown, dict.fromkeys(QUESTIONS, shown.ours_is_left == (shown.pair.other == "other")))
    shares = {(row.other, row.question): row.share for row in preferences(votes.all())}
    assert shares == {(other, question): float(other == "other") for other in ("better", "other") for question in QUESTIONS}
    assert preferences([]) == []


@pytest.mark.parametrize(("ours", "number"), [(1, 10), (7, 20), (45, 65), (300, 325)])
def test_with_one_vote_for_each_pair_it_is_wilsons_interval(ours: int, number: int) -> None:
    expected = binomtest(ours, number).proportion_ci(method="wilson")
    found = interval([(1, 1)] * ours + [(0, 1)] * (number - ours))
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_votes_that_repeat_each_other_count_once() -> None:
    once = interval([(1, 1)] * 40 + [(0, 1)] * 25)
    # Five raters who always agree: the number of pairs decides, but for the correction by n - 1.
    assert interval([(5, 5)] * 40 + [(0, 5)] * 25) == pytest.approx(once, abs=2e-3)
    alone = interval([(3, 5)] * 65)  # they agree with each other no more than chance has it
    assert alone[1] - alone[0] < 0.7 * (once[1] - once[0])
    assert interval([(5, 5)] * 13) == interval([(1, 1)] * 13), "nothing tells how much they agree"
    assert interval([(3, 5)]) == pytest.approx(tuple(_wilson(0.6, 1)), abs=1e-12), "one pair is one pair"


def _wilson(share: float, number: float, z: float = 1.959963984540054) -> list[float]:
    """The roots of (p - share)^2 = z^2 p (1 - p) / number, by which Wilson's interval is defined."""
    a, b, c = 1 + z**2 / number, -(2 * share + z**2 / number), share**2
    root = (b**2 - 4 * a * c) ** 0.5
    return [(-b - root) / 2 / a, (-b + root) / 2 / a]


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """65 pairs of 5 votes, as in Table 6, whose true shares differ from pair to pair."""
    drawn, inside, naive = random.Random(0), 0, 0
    for _ in range(400):
        counts = []
        for _ in range(65):
            share = drawn.betavariate(1.4, 0.6)  # mean 0.7, and pairs about which all raters agree
            counts.append((sum(drawn.random() < share for _ in range(5)), 5))
        low, high = interval(counts)
        inside += low <= 0.7 <= high
        whole = binomtest(sum(k for k, _ in counts), 325).proportion_ci(method="wilson")
        naive += whole.low <= 0.7 <= whole.high
    assert 0.92 < inside / 400 < 0.98
    assert naive / 400 < 0.86, "votes taken for independent ones promise too much"


def test_the_export_holds_everything(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.db")
    pair = replace(some_pairs(1)[0], prompt='a "quoted", prompt\nof two lines')
    votes.add("ann", order([pair], "ann", 0)[0], dict.fromkeys(QUESTIONS, True))
    rows = list(csv.DictReader(io.StringIO(to_csv(votes.all()), newline="")))
    assert len(rows) == 4 and {row["prompt"] for row in rows} == {pair.prompt}
    assert [row["question"] for row in rows] == list(QUESTIONS)
    assert {row["prefers_ours"] for row in rows} == {str(int(order([pair], "ann", 0)[0].ours_is_left))}
