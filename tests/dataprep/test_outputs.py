"""One job at a time, an output that changes at once, and what killed jobs leave."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dataprep import outputs
from dataprep.shards import Outcome
from model.errors import UserError

OUTCOME = Outcome(1, 0, 0, {}, 1, {}, {})


def finish(workspace: Path, digest: str) -> None:
    """What a job leaves in its work folder."""
    folder = workspace / "finished"
    folder.mkdir(parents=True)
    (folder / "name").write_text(digest)
    job = {"digest": digest, "recipe": "r", "workspace": workspace.name, "select": {}, "outcome": vars(OUTCOME)}
    (folder / "job.json").write_text(json.dumps(job))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Made by a job named "old"."""
    workspace = outputs.workspace_of(tmp_path / "out", "old")
    finish(workspace, "old")
    outputs.swap_in(workspace, tmp_path / "out")
    return tmp_path / "out"


def digest(output: Path) -> str:
    made = outputs.describe(output)
    assert made is not None
    assert (made.outcome, made.recipe, made.pool) == (OUTCOME, "r", "")
    return made.digest


@pytest.mark.parametrize("exchanged", [True, False])
def test_an_output_is_replaced_and_nothing_is_left(output: Path, monkeypatch: Any, exchanged: bool) -> None:
    if not exchanged:  # as on NFS
        monkeypatch.setattr(outputs, "_exchange", lambda first, second: False)
    finish(outputs.workspace_of(output, "new"), "new")
    outputs.swap_in(outputs.workspace_of(output, "new"), output)
    assert digest(output) == "new"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_reader_never_misses_the_output(output: Path) -> None:
    """Another process looks for it without a pause while it is replaced a few hundred times."""
    script = f"""
import pathlib, sys
looks = 0
print("ready", flush=True)
while not pathlib.Path({str(output.parent / "stop")!r}).exists():
    assert pathlib.Path({str(output)!r}).is_dir()
    looks += 1
print(looks)
"""
    reader = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    try:
        for n in range(300):
            finish(outputs.workspace_of(output, n), f"new{n}")
            outputs.swap_in(outputs.workspace_of(output, n), output)
    finally:
        (output.parent / "stop").touch()
        looks = reader.stdout.read()
        assert reader.wait() == 0
    assert int(looks) > 0


def test_an_output_lost_between_two_renames_comes_back(output: Path) -> None:
    workspace = outputs.workspace_of(output, "new")
    finish(workspace, "new")
    output.rename(workspace / "replaced")  # killed here
    outputs.recover(output)
    assert digest(output) == "old"
    assert workspace.exists()  # to go on from
    outputs.swap_in(workspace, output)
    assert digest(output) == "new"


def test_what_a_kill_behind_the_swap_leaves_is_cleared_away(output: Path, monkeypatch: Any) -> None:
    for exchanged in (True, False):
        name = f"new{exchanged}"
        finish(outputs.workspace_of(output, name), name)
        with monkeypatch.context() as patch:
            patch.setattr(outputs.shutil, "rmtree", lambda *_, **__: None)  # killed before it
            if not exchanged:
                patch.setattr(outputs, "_exchange", lambda first, second: False)
            outputs.swap_in(outputs.workspace_of(output, name), output)
        assert outputs.workspace_of(output, name).exists()
        outputs.recover(output)
        assert [path.name for path in output.parent.iterdir()] == ["out"]
        assert digest(output) == name


def test_lists_of_killed_jobs_go_and_work_folders_stay(output: Path) -> None:
    workspace = outputs.workspace_of(output, "new")
    (workspace / "parts").mkdir(parents=True)
    (output.parent / ".out.list-abc").mkdir()
    for other in (".out2.list-abc", "out2.tmp-0123456789abcdef"):
        (output.parent / other).mkdir()
    outputs.recover(output)
    left = {path.name for path in output.parent.iterdir()}
    assert left == {"out", workspace.name, ".out2.list-abc", "out2.tmp-0123456789abcdef"}


def test_folders_of_others_are_not_touched(tmp_path: Path) -> None:
    assert outputs.describe(tmp_path / "out") is None
    (tmp_path / "out").mkdir()
    assert outputs.describe(tmp_path / "out") is None  # empty
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not written by dataprep"):
        outputs.describe(tmp_path / "out")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(UserError, match="not written by dataprep"):
        outputs.describe(tmp_path / "file")


def test_one_job_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with outputs.locked(output):
        with pytest.raises(UserError, match=f"another dataprep job is writing to {output}"), outputs.locked(output):
            pass
        with outputs.locked(tmp_path / "new" / "other"):
            pass
    with outputs.locked(output):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_the_lock_of_a_killed_job_is_no_hindrance(tmp_path: Path) -> None:
    script = (
        "import pathlib, time\n"
        "from dataprep import outputs\n"
        f"with outputs.locked(pathlib.Path({str(tmp_path / 'out')!r})):\n"
        "    print('locked', flush=True); time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert job.stdout is not None
    assert job.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="another dataprep job"), outputs.locked(tmp_path / "out"):
        pass
    job.kill()
    job.wait()
    with outputs.locked(tmp_path / "out"):
        pass
