"""Records come back in their order, once, over kills and a disk that damages them."""

from pathlib import Path

import pytest

from model import journal as module
from model.journal import Journal, Position


def test_a_journal_is_read_in_order_and_leaves_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 200)
    monkeypatch.setattr(module, "READ_BYTES", 64)
    journal = Journal(tmp_path)
    for number in range(50):
        journal.append({"number": number, "text": "x" * (number % 7) * 20})
    seen = []
    for _ in range(20):
        records, behind = journal.read()
        seen += [record["number"] for record in records]
        journal.done(behind)
    successor = Journal(tmp_path)  # as after a kill
    successor.append({"number": 50})
    while (read := successor.read())[0]:
        seen += [record["number"] for record in read[0]]
        successor.done(read[1])
    assert seen == list(range(51))
    assert len(list(tmp_path.glob("*.jsonl"))) == 1


def test_a_line_that_a_kill_cut_or_the_disk_damaged_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(tmp_path)
    for number in range(3):
        journal.append({"number": number})
    journal.close()
    (segment,) = tmp_path.glob("*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b'{"number": 1}', b'{"nu\xff\0er" 1}') + b'{"number": 3, "va')
    successor = Journal(tmp_path)
    successor.append({"number": 4})
    seen = []
    while (read := successor.read())[0]:
        seen += [record["number"] for record in read[0]]
        successor.done(read[1])
    assert seen == [0, 2, 4]
    assert "a damaged record" in capsys.readouterr().out
    assert Journal(tmp_path).position > Position()
