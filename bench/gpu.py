"""What only a GPU can show, in one command of at most ten minutes: ``python bench/gpu.py [--help]``.

Needs torch, einops, numpy and this checkout, installed or not; for ``--part learning`` scipy and Pillow, too. Parts run one after
the other, the most important first, each in a process of its own with a limit of its own, and keep every row as soon as it is
measured: what crashes or runs out of time costs its own rows alone, and the same command goes on from there.

    speed        FIT 500M against the U-Net 284M, training and sampling, eager, CUDA graphs, compiled
    memory       the peak of a whole training step against the plan, first of the 3.9 B stages
    walt         W.A.L.T.'s models
    optimizers   LAMB against fused AdamW, clipping, the average
    precision    loss curves in bfloat16 and float32; the tests of networks and diffusion on the device
    learning     a FIT of the paper's recipe on Moving Scenes: only if asked for, a call of its own

Without a GPU, ``--device cpu --tiny`` rehearses all of it, and ``--device cpu --part speed --minutes 20`` compares the two
networks at full size, one video at a time in float32.

Exit codes: 0 all is measured, 1 something is missing, 2 bad input.
"""

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before bench/, which comes first by itself and has files named as packages are

from bench.on_gpu.record import Record  # noqa: E402
from model import cpu_memory, provenance  # noqa: E402

# Seconds of each part, out of ten minutes; the starts of its processes are within. What a part leaves goes to those after it.
LIMITS = {"speed": 270, "memory": 90, "walt": 20, "optimizers": 40, "precision": 130}
ALONE = {"learning": 550}
KEPT_BACK = 0.05  # share of all the time: for finding the device, and for the tables
GRACE = 0.1  # share of its limit, 15 s at most, that a part is given to end by itself
SUMMARY, TABLE = "gpu.json", "gpu.txt"
OUT_OF_TIME, FAILED = 3, 4  # exit codes of a part's process


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="(default cuda)")
    parser.add_argument("--tiny", action="store_true", help="everything in miniature: a rehearsal")
    parser.add_argument(
        "--part", action="extend", nargs="+", choices=[*LIMITS, *ALONE], help="one part, or several (default: all but learning)"
    )
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together (default 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder for rows, JSON and table (default runs/gpu)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        return work(given.worker, given.out, given.device, given.tiny, given.seconds)
    if not given.minutes > 0:
        return refuse(f"--minutes must be positive, got {given.minutes:g}")
    begin = time.monotonic()
    end = begin + 60 * given.minutes * (1 - KEPT_BACK)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part at work is ended, too
    words = ["--device", given.device, "--out", str(given.out), *(["--tiny"] if given.tiny else [])]
    found = subprocess.run([*worker("header"), *words], env=environment(given.device, given.tiny), capture_output=True, text=True)
    if found.returncode:
        return refuse(last_line(found.stderr))
    limits, common = {**LIMITS, **ALONE}, json.loads(last_line(found.stdout))
    try:
        before = outcomes_before(given.out, common)
    except ValueError as error:
        return refuse(f"{given.out} {error}: name another folder by --out")
    asked = [part for part in limits if part in (given.part or LIMITS)]
    outcomes = {part: before.get(part, "not run") for part in limits if part in before or part in asked}
    save(given.out, common, outcomes)
    print(f"{common['device']}, torch {common['torch']}; at most {given.minutes:g} minutes", flush=True)
    todo = [part for part in asked if outcomes[part] != "done"]
    try:
        for number, part in enumerate(todo):
            share = limits[part] / sum(limits[later] for later in todo[number:])
            outcomes[part] = "not finished"
            save(given.out, common, outcomes)
            outcomes[part] = run_part(
                part, words, environment(given.device, given.tiny), given.out, share * (end - time.monotonic())
            )
            print(f"{part}: {outcomes[part]}; {time.monotonic() - begin:.0f} s since the start", flush=True)
            replace(given.out / TABLE, table(given.out, common, outcomes))
    finally:
        save(given.out, common, outcomes)
        shown = table(given.out, common, outcomes)
        replace(given.out / TABLE, shown)
    print(f"\n{shown}\n\nrows, {SUMMARY} and {TABLE}: {given.out}")
    return 0 if all(outcomes[part] == "done" for part in asked) else 1


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(refuse(message))


def refuse(why: str) -> int:
    """One line; the exit code of bad input."""
    print(f"error: {why}", file=sys.stderr)
    return 2


def worker(part: str) -> list[str]:
    """The command of a part's process."""
    return [sys.executable, __file__, "--worker", part]


def environment(device: str, tiny: bool) -> dict[str, str]:
    """Of a part's process."""
    settings = dict(cpu_memory.SETTINGS) if device == "cpu" else {}
    if device == "cpu" and tiny:
        settings["OMP_NUM_THREADS"] = "1"  # on models so small, threads would only wait for each other
    return {**settings, **os.environ, "PYTHONUNBUFFERED": "1"}


def header(device: str, tiny: bool) -> dict[str, Any]:
    """What all rows of a folder have in common. In a process of its own, for asking opens the GPU, which takes of its memory."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU; --device cpu --tiny rehearses without one")
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    return {"device": name, "tiny": tiny, "commit": provenance.git_commit(), **versions}


def outcomes_before(folder: Path, common: dict[str, Any]) -> dict[str, str]:
    """How the parts ended whose rows a folder holds already.

    Raises:
        ValueError: they are of another device, code or size, or nothing says of which.
    """
    path = folder / SUMMARY
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.glob("*.jsonl")):
            raise ValueError(f"holds rows, but no {SUMMARY} that says what was measured")
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        outcomes = {part: str(found["outcome"]) for part, found in summary["parts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"holds a damaged {SUMMARY}") from error
    if differing := [name for name in common if summary.get(name) != common[name]]:
        told = ", ".join(f"{name} {summary.get(name)} there and {common[name]} here" for name in differing)
        raise ValueError(f"holds rows of another run ({told})")
    return outcomes


def work(part: str, folder: Path, device: str, tiny: bool, seconds: float) -> int:
    """The process of a part; returns its exit code."""
    if part == "header":
        print(json.dumps(header(device, tiny)))
        return 0
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    import torch

    record = Record(folder / f"{part}.jsonl")
    module = importlib.import_module(f"bench.on_gpu.{part}")
    module.run(record, torch.device(device), tiny, seconds - (time.monotonic() - START))
    if time.monotonic() - START >= seconds:
        return OUT_OF_TIME
    return FAILED if any(row.get("failed") for row in record.rows) else 0


def end_with(parent: int) -> None:
    """End this process once its parent has ended, however that did: two runs would measure each other."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def run_part(part: str, words: Sequence[str], environment: dict[str, str], folder: Path, seconds: float) -> str:
    """Run a part to its end or its limit; returns how it ended.

    A process that crashes after it has measured something is followed by a fresh one, which goes on behind the row that failed.
    """
    end = time.monotonic() + seconds
    print(f"{part}: at most {seconds:.0f} s", flush=True)
    while True:
        before, left = len(rows_of(folder, part)), end - time.monotonic()
        told = left - min(15.0, GRACE * left)
        outcome = run_process([*worker(part), *words, "--seconds", f"{told:.1f}"], environment, left)
        if not outcome.startswith("crashed") or len(rows_of(folder, part)) <= before or time.monotonic() > end:
            return outcome
        print(f"{part}: {outcome}; it goes on in a fresh process", flush=True)


def run_process(command: Sequence[str], environment: dict[str, str], seconds: float) -> str:
    """Run a part's process, and end all that it has started; returns how it ended."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(command, env=environment, stderr=errors, start_new_session=True)
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code in (0, OUT_OF_TIME, FAILED):
            return {0: "done", OUT_OF_TIME: "out of time", FAILED: "done, but something failed"}[code]
        errors.seek(0)
        told = errors.read()
        print(told[-3000:], file=sys.stderr, flush=True)
        return f"crashed with exit code {code}: {last_line(told)[:200]}"


def last_line(text: str) -> str:
    """Of an error's trace, what went wrong."""
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def rows_of(folder: Path, part: str) -> list[dict[str, Any]]:
    """What a part has measured so far."""
    path = folder / f"{part}.jsonl"
    return Record(path).rows if path.exists() else []


def save(folder: Path, common: dict[str, Any], outcomes: dict[str, str]) -> None:
    """Everything as one JSON."""
    parts = {part: {"outcome": outcome, "rows": rows_of(folder, part)} for part, outcome in outcomes.items()}
    replace(folder / SUMMARY, json.dumps({**common, "parts": parts}, indent=1))


def table(folder: Path, common: dict[str, Any], outcomes: dict[str, str]) -> str:
    """Everything for people."""
    size = ", in miniature" if common["tiny"] else ""
    lines = [f"{common['device']}, torch {common['torch']}, CUDA {common['cuda']}, commit {common['commit'][:12]}{size}"]
    for part, outcome in outcomes.items():
        lines += ["", part + ("" if outcome == "done" else f" ({outcome})")]
        lines += [f"  {line}" for line in reported(part, rows_of(folder, part))]
    return "\n".join(lines)


def reported(part: str, rows: list[dict[str, Any]]) -> list[str]:
    """A part's lines of the table; what goes wrong with them must not cost those of the others."""
    try:
        lines: list[str] = importlib.import_module(f"bench.on_gpu.{part}").report(rows)
    except Exception as error:
        return [f"no table: {type(error).__name__}: {error}"]
    return lines


def replace(path: Path, text: str) -> None:
    """Write a file in one go: a kill leaves the old one or the new one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
