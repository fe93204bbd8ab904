"""What a chain of commands remembers."""

import sys
from pathlib import Path

import pytest

from pipelines.chain import Busy, Progress, Stage, alone_in


def test_a_changed_stage_runs_again_with_all_that_follow_it(tmp_path: Path) -> None:
    script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"

    def stages(first: str) -> str:
        progress = Progress(tmp_path, 2, "DEMO_FOLDER")
        for word in (first, "b"):
            progress.run(Stage(word, (sys.executable, "-c", script, str(tmp_path / "ran"), word)))
        return (tmp_path / "ran").read_text()

    assert stages("a") == "ab"
    assert stages("a") == "ab"
    assert stages("c") == "abcb"
    assert stages("a") == "abcbab"  # what lies in the folder is the last one's work


def test_a_stage_whose_yaml_or_its_base_was_edited_runs_again(tmp_path: Path) -> None:
    base, own, ran = (tmp_path / name for name in ("base.yaml", "own.yaml", "ran"))
    base.write_text("a: 1\n")
    own.write_text("base: base.yaml\nb: ${oc.env:NOT_SET}\n")
    words = (sys.executable, "-c", f"open({str(ran)!r}, 'a').write('a')", str(own))

    def times() -> int:
        Progress(tmp_path, 1, "DEMO_FOLDER").run(Stage("a", words))
        return len(ran.read_text())

    assert times() == 1
    own.write_text("# A comment.\nbase: base.yaml\nb: ${oc.env:NOT_SET}\n")
    assert times() == 1
    own.write_text("base: base.yaml\nb: 2\n")
    assert times() == 2
    base.write_text("a: 2\n")
    assert times() == 3


def test_a_yaml_that_is_edited_while_its_stage_runs_is_not_what_was_done(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("a: 1\n")
    stage = (sys.executable, "-c", f"open({str(own)!r}, 'w').write('a: 2')", str(own))
    Progress(tmp_path, 1, "DEMO_FOLDER").run(Stage("a", stage))
    assert not Progress(tmp_path, 1, "DEMO_FOLDER").have_finished([Stage("a", stage)])


def test_what_has_finished_is_known_without_running_it(tmp_path: Path) -> None:
    stages = [Stage(word, (sys.executable, "-c", "", word)) for word in ("a", "b")]
    progress = Progress(tmp_path, 2, "DEMO_FOLDER")
    assert not progress.have_finished(stages)
    progress.run(stages[0])
    assert progress.have_finished(stages[:1]) and not progress.have_finished(stages)
    progress.run(stages[1])
    assert progress.have_finished(stages)
    assert not progress.have_finished([Stage("other", (sys.executable, "-c", "", "other")), stages[1]])


def test_a_folder_has_room_for_one(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(Busy, match="another one is at work in"), alone_in(tmp_path):
        pass
    with alone_in(tmp_path):
        pass


def test_a_checkout_that_was_moved_has_not_lost_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Progress(tmp_path, 1, "DEMO_FOLDER").run(Stage("a", (sys.executable, "-c", "")))
    monkeypatch.setattr(sys, "prefix", "/elsewhere/.venv")
    moved = Stage("a", (f"/elsewhere/.venv/bin/{Path(sys.executable).name}", "-c", ""))
    assert Progress(tmp_path, 1, "DEMO_FOLDER").have_finished([moved])
