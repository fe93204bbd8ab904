"""The tests of networks and diffusion on the device, for part "precision" (tests/model/networks/conftest.py has the command).

Those that compile take most of the time and come last, so that the others are there if it runs out.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tests/model/networks", "tests/model/diffusion", "tests/model/tokenizer")
EXPRESSIONS = {"eager": "not compile", "compiled": "compile"}
IN_MINIATURE = {"eager": "test_layers"}
WORKERS = 6  # that compile side by side, where pytest-xdist is installed: a compiler keeps the GPU waiting
WORD = "PASSED|FAILED|ERROR"
OUTCOME = re.compile(rf"(?:(?P<before>{WORD}) )?(?P<test>tests/\S+::.+?)(?:\s+(?P<after>{WORD})\b.*| - .*)?\s*$")


def run_tests(device: str, expression: str, seconds: float) -> dict[str, Any]:
    """Run the tests that have a ``device`` fixture and fit pytest's ``-k``, for so long.

    Returns:
        How many passed, which failed, and why there are no more, if there is a reason.
    """
    folders = [folder for folder in FOLDERS if (ROOT / folder).is_dir()]
    words = [sys.executable, "-m", "pytest", "-v", "-m", "device", "-k", expression, "--confcutdir=tests/model", *folders]
    words += [
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
    ]  # without --strict-config, which asks for plugins
    if expression == EXPRESSIONS["compiled"] and importlib.util.find_spec("xdist"):
        words += ["-n", str(WORKERS)]
    environment = {**os.environ, "TEST_DEVICE": device, "PYTHONUNBUFFERED": "1", "COLUMNS": "400"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        # Into a file and in a session of its own: the compiler's processes would hold a pipe open and outlive pytest.
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        why = None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            why = f"cut off after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        told = output.read()
    outcomes = outcomes_of(told)
    passed = sum(outcome == "PASSED" for outcome in outcomes.values())
    if not outcomes and why is None:
        why = told.strip()[-300:]
    return {"passed": passed, "failed": [test for test, outcome in outcomes.items() if outcome != "PASSED"], "why": why}


def outcomes_of(told: str) -> dict[str, str]:
    """PASSED, FAILED or ERROR by test, from what pytest says with -v, whole or cut off, with xdist's workers or without."""
    found = {}
    for line in told.splitlines():
        match = OUTCOME.search(line)
        outcome = match and (match["before"] or match["after"])
        if match and outcome:
            found[match["test"].rstrip()] = outcome
    return found
