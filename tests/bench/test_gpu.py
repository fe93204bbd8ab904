"""bench/gpu.py, rehearsed on the CPU as one starts it: what it measures, what outlives a kill, what a part costs the others."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.on_gpu.record import Record

ROOT = Path(__file__).parents[2]
PARTS = ("speed", "memory", "walt", "optimizers")  # precision and learning have tests of their own
ABSENT = ("composer", "omegaconf", "pydantic", "streaming", "transformers", "mlflow", "pyspark", "tqdm", "yaml", "PIL", "scipy")


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "bench/gpu.py", "--device", "cpu", "--tiny", "--out", str(folder), *words]


def rows_of(folder: Path, part: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_rehearsal_goes_on_and_measures_all_parts_once(tmp_path: Path) -> None:
    killed = subprocess.Popen(command(tmp_path, "--part", *PARTS), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    shown = iter(killed.stdout)
    next(line for line in shown if "training eager" in line)
    workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    killed.kill()
    killed.wait()
    for worker in map(int, workers):
        while alive(worker):  # it notices that it is alone; two runs at once would measure each other
            time.sleep(0.1)
    assert workers
    with (tmp_path / "speed.jsonl").open("a") as file:
        file.write('{"key": {"subj')  # a row that a kill cut short
    before = rows_of_whole_lines(tmp_path / "speed.jsonl")
    assert any(row["key"].get("step") == "training" for row in before)

    done = subprocess.run(command(tmp_path, "--part", *PARTS), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    speed = rows_of(tmp_path, "speed")
    assert speed[: len(before)] == before, "what was measured is not measured again"
    assert len({json.dumps(row["key"]) for row in speed}) == len(speed)
    assert {(row["key"]["subject"], row["key"]["step"]) for row in speed if "subject" in row["key"]} == {
        (subject, step) for subject in ("FIT 500M", "U-Net 284M") for step in ("training", "sampling")
    }
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert summary["tiny"] and summary["torch"] == torch.__version__ and summary["device"] == "CPU, 1 threads"
    assert {part: (found["outcome"], found["rows"]) for part, found in summary["parts"].items()} == {
        part: ("done", rows_of(tmp_path, part)) for part in PARTS
    }
    assert [row["key"]["subject"] for row in rows_of(tmp_path, "memory")] == [
        "FIT 3.9B", "FIT 3.9B Up", "FIT 500M", "U-Net 284M"
    ]  # fmt: skip
    table = (tmp_path / "gpu.txt").read_text()
    assert table.strip() in done.stdout
    for told in (f"torch {torch.__version__}", "in miniature", "no W.A.L.T. in this checkout", "LAMB takes", "none was measured"):
        assert told in table
    best = {
        (subject, step): min(row["ms"] for row in speed if (row["key"].get("subject"), row["key"].get("step")) == (subject, step))
        for subject in ("FIT 500M", "U-Net 284M")
        for step in ("training", "sampling")
    }
    for step in ("training", "sampling"):
        ratio = best["U-Net 284M", step] / best["FIT 500M", step]
        assert f"{step}: speed of FIT 500M over U-Net 284M: eager {ratio:.2f}" in table

    again = subprocess.run(command(tmp_path, "--part", *PARTS), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "at most 10 minutes" in again.stdout
    assert (tmp_path / "gpu.txt").read_text() == table and " eager 1: " not in again.stdout


def rows_of_whole_lines(path: Path) -> list[dict[str, Any]]:
    """What a reader can make of a file whose last line may be torn."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_imports_torch_einops_and_the_standard_library_alone() -> None:
    modules = ", ".join(f"bench.on_gpu.{part}" for part in PARTS)
    code = f"import sys\nfor name in {ABSENT}: sys.modules[name] = None\nimport bench.gpu, {modules}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--minutes", "0"), "--minutes must be positive, got 0"),
        (("--part", "sped"), "invalid choice: 'sped'"),
        pytest.param(
            ("--device", "cuda"),
            "--device cuda: torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_input_is_one_line(words: Sequence[str], told: str, tmp_path: Path) -> None:
    done = subprocess.run(command(tmp_path, *words), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


COMMON = {"device": "CPU, 1 threads", "torch": "2.7", "commit": "abc", "tiny": True}


@pytest.mark.parametrize(
    ("before", "told"),
    [
        (
            {**COMMON, "device": "NVIDIA H200", "tiny": False, "parts": {}},
            "device NVIDIA H200 there and CPU, 1 threads here",
        ),
        ({**COMMON, "commit": "abd", "parts": {}}, "commit abd there and abc here"),
        ({"parts": {"speed": {}}}, "damaged"),
        (None, "no gpu.json"),
    ],
)
def test_rows_of_another_run_are_not_added_to(before: dict[str, Any] | None, told: str, tmp_path: Path) -> None:
    (tmp_path / "speed.jsonl").touch()
    if before is not None:
        (tmp_path / "gpu.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=told):
        gpu.outcomes_before(tmp_path, COMMON)


def test_rows_of_this_run_are(tmp_path: Path) -> None:
    assert gpu.outcomes_before(tmp_path / "new", COMMON) == {}
    gpu.save(tmp_path, COMMON, {"speed": "out of time"})
    assert gpu.outcomes_before(tmp_path, COMMON) == {"speed": "out of time"}


SLEEPS = """
import subprocess, sys, time
from pathlib import Path
def run(record, device, tiny, seconds_left):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    Path(record.path).with_name("child").write_text(str(child.pid))
    time.sleep(1000)
def report(rows):
    return ["slept"]
"""
BREAKS = """
import os
def run(record, device, tiny, seconds_left):
    for number in range(3):
        if record.find(number=number) is None:
            record.add({"number": number}, failed="at the second" if number == 1 else None)
            if number == 1:
                os.abort()
def report(rows):
    return rows.nothing
"""
RAISES = """
def run(record, device, tiny, seconds_left):
    raise RuntimeError("first line\\n  and what went wrong")
def report(rows):
    return []
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``parts(name=source, ...)`` runs parts of these sources, of a second each if they can, and returns the exit code."""

    def run(**sources: str) -> int:
        folder = tmp_path / "more/bench/on_gpu"
        folder.mkdir(parents=True)
        for name, source in sources.items():
            (folder / f"{name}.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "more"))
        monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(sources, 1))
        monkeypatch.setattr(gpu, "ALONE", {})
        handler = signal.getsignal(signal.SIGTERM)
        try:
            return gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--minutes", "1"])
        finally:
            signal.signal(signal.SIGTERM, handler)

    return run


@pytest.mark.slow
def test_a_part_over_its_limit_leaves_the_others_alone(
    parts: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def quick(part: str, words: Any, environment: Any, folder: Path, seconds: float) -> str:
        return whole(part, words, environment, folder, min(seconds, 4 if part == "sleeps" else 60))

    whole = gpu.run_part
    monkeypatch.setattr(gpu, "run_part", quick)
    assert parts(sleeps=SLEEPS, breaks=BREAKS, raises=RAISES) == 1
    outcomes = {part: found["outcome"] for part, found in json.loads((tmp_path / "out/gpu.json").read_text())["parts"].items()}
    assert outcomes["sleeps"].startswith("stopped at its limit of ")
    assert outcomes["breaks"] == "done, but something failed"
    assert outcomes["raises"] == "crashed with exit code 1:   and what went wrong"
    assert [row["key"]["number"] for row in rows_of(tmp_path / "out", "breaks")] == [0, 1, 2]
    printed = capfd.readouterr().out
    assert printed.count("it goes on in a fresh process") == 1
    table = (tmp_path / "out/gpu.txt").read_text()
    assert f"sleeps ({outcomes['sleeps']})" in table and "no table: " in table
    child = tmp_path / "out/child"
    if child.exists():  # on a machine so slow that it was not there yet, nothing is left to be ended
        assert not alive(int(child.read_text()))


def test_what_a_record_holds_outlives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = Record(path)
    first.add({"a": 1}, ms=2.0)
    first.add({"a": 2}, ms=3.0)
    with path.open("a") as file:
        file.write('{"key": {"a"')
    second = Record(path)
    assert second.rows == first.rows and second.find(a=2) == {"key": {"a": 2}, "ms": 3.0} and second.find(a=3) is None
    second.add({"a": 3}, ms=4.0)
    assert [row["key"]["a"] for row in Record(path).rows] == [1, 2, 3]
    second.clear()
    assert Record(path).rows == [] and [*tmp_path.iterdir()] == [path]
