"""What clusters do to runs and their checkpoints: signals, kills, damaged and half-written files, another number of processes."""

import fcntl
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient

from model import resume
from model.errors import UserError
from model.preemption import EXIT_PREEMPTED

Trainings = Callable[..., Any]


def make(checkpoints: Path, step: int, sealed: bool = True) -> Path:
    """A folder that looks like Composer's checkpoint of two processes."""
    folder = checkpoints / f"ep0-ba{step}"
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 1000)
    if sealed:
        files = {path.name: resume.fingerprint(path) for path in folder.iterdir()}
        resume.write_seal(folder, files)
    return folder


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda f: flip_bit(f / "__1_0.distcp"), "__1_0.distcp is damaged"),
    "a flipped bit in the metadata": (lambda f: flip_bit(f / ".metadata"), ".metadata is damaged"),
    "a cut file": (lambda f: os.truncate(f / "__0_0.distcp", 100), "__0_0.distcp has 100 bytes instead of"),
    "a missing file": (lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp: No such file"),
    "no seal": (lambda f: (f / resume.SEAL).unlink(), "it is not whole, its writing was cut short"),
    "a cut seal": (lambda f: os.truncate(f / resume.SEAL, 30), "whole.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    make(tmp_path, 8)
    before, newest = make(tmp_path, 9), make(tmp_path, 10)
    assert resume.find_whole(tmp_path) == resume.Found(newest, {}), "10 comes after 9"
    harm, told = DAMAGE[damage]
    harm(newest)
    found = resume.find_whole(tmp_path)
    assert found.newest == before
    assert told in found.ignored[newest]
    assert f"checkpoint ep0-ba10 is ignored: {told}" in str(found) and f"goes on from {before}" in str(found)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_by_itself(tmp_path: Path) -> None:
    for step in (3, 6):
        flip_bit(make(tmp_path, step) / "__0_0.distcp")
    with pytest.raises(UserError, match="no checkpoint is whole.*ep0-ba6: __0_0.distcp is damaged.*start the run over"):
        resume.find_whole(tmp_path)


def test_a_run_killed_in_its_first_checkpoint_starts_at_the_beginning(tmp_path: Path) -> None:
    assert resume.find_whole(tmp_path / "none").newest is None
    partial = make(tmp_path, 3, sealed=False)
    assert resume.find_whole(tmp_path) == resume.Found(None, {partial: "it is not whole, its writing was cut short"})


def test_checkpoints_outside_the_run_are_not_loaded(tmp_path: Path) -> None:
    elsewhere = make(tmp_path / "elsewhere", 9)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / elsewhere.name).symlink_to(elsewhere)
    assert resume.find_whole(tmp_path / "checkpoints") == resume.Found(None, {})


def test_pruning_keeps_the_newest_whole_ones_and_removes_what_is_partial_or_damaged(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, step)
    make(tmp_path, 5, sealed=False)
    flip_bit(make(tmp_path, 20) / "__0_0.distcp")
    (tmp_path / "notes").mkdir()
    found = resume.find_whole(tmp_path)
    assert found.newest == tmp_path / "ep0-ba8"
    newest = make(tmp_path, 10)
    resume.prune(tmp_path, newest, keep=3, ignored=frozenset(found.ignored))
    assert {folder.name for folder in tmp_path.iterdir()} == {"ep0-ba6", "ep0-ba8", "ep0-ba10", "notes"}
    resume.prune(tmp_path, newest, keep=1, ignored=frozenset({newest}))
    assert {folder.name for folder in tmp_path.iterdir()} == {"ep0-ba10", "notes"}, "sealed anew, it is whole"


def test_a_run_has_one_owner_and_its_successor_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = resume.claim(tmp_path)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* is training this run"):
        resume.claim(tmp_path, seconds=0.5)
    assert time.monotonic() - start > 0.5
    assert "waiting for process" in capsys.readouterr().out
    fcntl.flock(held, fcntl.LOCK_UN)
    os.close(resume.claim(tmp_path))
    os.close(held)


def ranks(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The launcher's processes by rank."""
    return sorted(psutil.Process(launcher.pid).children(), key=lambda rank: int(rank.environ()["RANK"]))


def assert_equal(got: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert got.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, training: Trainings) -> dict[str, torch.Tensor]:
    """The weights that a run of 59 steps ends with, whose checkpoints lie elsewhere than in the tests."""
    run = training(tmp_path_factory.mktemp("uninterrupted"), every=100)
    run.finish(run.start())
    weights: dict[str, torch.Tensor] = run.weights()
    return weights


def test_told_to_stop_then_damaged_then_killed_it_ends_with_equal_weights(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], training: Trainings
) -> None:
    """SIGTERM to the whole process group; then a flipped bit and half a checkpoint; then kill -9 of all processes."""
    run = training(tmp_path)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    process = run.start()
    run.wait_for(process, "ep1-ba7/whole.json")
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED, run.log[-3000:]
    stopped = run.whole[-1]
    assert 7 < stopped < run.steps - 7
    assert f"stopped by SIGTERM after step {stopped}, which is saved" in run.log
    assert [found.info.status for found in client.search_runs(["1"])] == ["KILLED"]

    checkpoints = tmp_path / "tiny" / "checkpoints"
    (newest,) = checkpoints.glob(f"ep*-ba{stopped}")
    flip_bit(newest / "__1_0.distcp")
    partial = checkpoints / "ep11-ba58"
    partial.mkdir()
    before = checkpoints / f"ep{(stopped - 1) // 7 * 7 // 5}-ba{(stopped - 1) // 7 * 7}"
    os.link(before / "__0_0.distcp", partial / "__0_0.distcp")
    process = run.start()
    run.wait_until(process, lambda: run.whole[-1] > stopped)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "tiny").glob("model-step-*")), "it had finished before it was killed: nothing was shown"
    assert "checkpoint ep11-ba58 is ignored: it is not whole, its writing was cut short" in run.log
    assert f"checkpoint {newest.name} is ignored: __1_0.distcp is damaged: its hash is another" in run.log
    assert f"goes on from {before}" in run.log

    run.finish(run.start())
    assert_equal(run.weights(), uninterrupted)
    assert {folder.name for folder in checkpoints.iterdir()} == {"ep11-ba56", "ep11-ba59"}, "the newest two, of all starts"
    assert [found.info.status for found in client.search_runs(["1"])] == ["FINISHED"], "the successor takes up the same run"


@pytest.mark.slow
@pytest.mark.parametrize("told", ["launcher", "rank 1", "SIGUSR1 to all ranks", "group, with loader processes"])
def test_however_a_run_is_told_to_stop_it_saves_the_step(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], training: Trainings, told: str
) -> None:
    run = training(tmp_path, every=5)  # at the epochs' ends
    workers = ("data.workers=2",) if "loader" in told else ()
    process = run.start(*workers)
    run.wait_for(process, "ep*-ba10/whole.json")
    match told.split()[0]:
        case "launcher":
            process.terminate()
        case "rank":
            ranks(process)[1].terminate()
        case "SIGUSR1":
            for rank in ranks(process):
                rank.send_signal(signal.SIGUSR1)
        case _:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED, run.log[-3000:]
    stopped = run.whole[-1]
    assert 10 <= stopped < run.steps and f"after step {stopped}, which is saved" in run.log
    run.finish(run.start(*workers))
    assert_equal(run.weights(), uninterrupted)


@pytest.mark.slow
def test_told_to_stop_before_its_first_step_it_ends_at_once(tmp_path: Path, training: Trainings) -> None:
    run = training(tmp_path)
    process = run.start()
    run.wait_until(process, lambda: "no checkpoint yet" in run.log)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT_PREEMPTED, run.log[-3000:]
    assert run.whole == [] and "after step" not in run.log


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["rank 0", "rank 1", "launcher"])
def test_killed_in_part_a_run_ends_and_its_successor_ends_with_equal_weights(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor], training: Trainings, killed: str
) -> None:
    run = training(tmp_path, every=5)
    process = run.start()
    run.wait_for(process, "ep*-ba10/whole.json")
    left = ranks(process)
    (process if killed == "launcher" else left[int(killed[-1])]).kill()
    assert process.wait(timeout=60) != 0
    successor = run.start()  # at once: orphans may still be about to end
    run.finish(successor)
    assert not [rank for rank in left if rank.is_running()]
    assert f"goes on from {tmp_path}/tiny/checkpoints/ep" in run.log
    if killed == "launcher":
        assert "stopped by the launcher's end after step" in run.log
    assert_equal(run.weights(), uninterrupted)


@pytest.mark.slow
def test_other_sharding_goes_on_with_the_same_samples(tmp_path: Path, training: Trainings) -> None:
    whole, changed = training(tmp_path / "whole"), training(tmp_path / "changed")
    for run in (whole, changed):
        process = run.start("model.network.dropout=0")
        if run is changed:
            run.wait_for(process, "ep2-ba14/whole.json")
            process.terminate()
            assert process.wait(timeout=60) == EXIT_PREEMPTED
            process = run.start("model.network.dropout=0", "sharding.blocks=false", processes=1)
        run.finish(process)
    reference = whole.weights()
    for name, tensor in changed.weights().items():
        off = float((tensor - reference[name]).norm() / reference[name].norm().clamp_min(1e-12))
        assert off < 1e-6, f"{name}: {off}"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_20_random_points_a_run_ends_with_equal_weights(tmp_path: Path, training: Trainings) -> None:
    """Kill -9 of a rank, of the launcher or of all, some of them within the writing of a checkpoint."""
    reference = training(tmp_path / "uninterrupted", steps=100, every=100)
    reference.finish(reference.start())
    run = training(tmp_path / "killed", steps=100, every=2)
    draw = random.Random(11)

    def starts(log: str) -> int:
        return log.count("no checkpoint yet") + log.count("goes on from /")

    for kills, step in enumerate(sorted(draw.sample(range(2, 92, 2), 20))):
        saved = set(run.folders)
        process = run.start()
        run.wait_until(process, partial(lambda before: starts(run.log) > before, kills))
        # Orphans of a killed launcher may have gone beyond the step: then the next checkpoint will do.
        run.wait_until(process, partial(lambda step, saved: any(n >= step and n not in saved for n in run.folders), step, saved))
        time.sleep(draw.uniform(0, 0.3))  # within its writing, or after it
        victim = draw.choice(["rank 0", "rank 1", "launcher", "all"])
        if victim == "all":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "launcher":
            process.kill()
        else:
            ranks(process)[int(victim[-1])].kill()
        assert process.wait(timeout=60) != 0
    run.finish(run.start())
    assert_equal(run.weights(), reference.weights())
