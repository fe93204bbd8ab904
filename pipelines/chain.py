"""Commands run one after the other, each shown as one would type it; what has finished is not run again."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from model import config
from model.errors import UserError

END_SECONDS = 30  # that an interrupted stage has to end
MODULE = (sys.executable, "-m")


def trainer(processes: int) -> tuple[str, ...]:
    """Composer's launcher on the training command."""
    return (str(Path(sys.executable).with_name("composer")), "-n", str(processes), "model/train.py")


@dataclass(frozen=True)
class Stage:
    """One command of a chain."""

    title: str
    arguments: tuple[str, ...]

    @cached_property
    def told(self) -> list[object]:
        """Its words and the values of the yamls among them, not comments, as they are when first asked for.

        Wherever the checkout lies: a folder that was moved has not lost what was done in it.
        """
        yamls = [word for word in self.arguments if word.endswith(".yaml") and Path(word).is_file()]
        return [_without_prefix(self.arguments), [config.read(yaml) for yaml in yamls]]


class Busy(UserError):
    """Another chain is at work in the folder."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse to start where another chain is at work; the lock goes with the process that holds it."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"another one is at work in {folder}; wait for it, or name another folder") from error
        yield


class Progress:
    """Runs stages in their order and remembers in ``folder`` which have finished.

    A stage runs again if its words have changed, or what the yamls among them say, or those of any stage before it.
    """

    def __init__(self, folder: Path, total: int, variable: str, value: Path | None = None) -> None:
        """``variable``: of the environment, through which the stages' yamls learn the folder, or another ``value``."""
        self.folder = folder
        self.variable = variable
        self.value = value or folder
        self.total = total
        self.stages: list[Stage] = []

    def have_finished(self, stages: Sequence[Stage]) -> bool:
        """Whether these, the chain's first, have finished before."""
        marker = self._marker(stages)  # its digest is of those before as well
        return marker.exists() and marker.read_text(encoding="utf-8") == _digest(stages)

    def _marker(self, stages: Sequence[Stage]) -> Path:
        return self.folder / "finished" / str(len(stages))

    def run(self, stage: Stage) -> None:
        """Run the next stage unless it has finished before.

        Raises:
            UserError: it failed.
        """
        self.stages.append(stage)
        number = f"[{len(self.stages)}/{self.total}]"
        digest = _digest(self.stages)  # of its yaml as it starts with it
        if self.have_finished(self.stages):
            print(f"{number} {stage.title}: done before", flush=True)
            return
        print(f"{number} {stage.title}\n      {_typed(stage.arguments)}", flush=True)
        begin = time.monotonic()
        environment = {**os.environ, self.variable: str(self.value), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        code = _call(stage.arguments, environment)
        if code:
            raise UserError(
                f"stopped at '{stage.title}' (exit code {code}); what is done is kept, the same command goes on from there"
            )
        marker = self._marker(self.stages)
        marker.parent.mkdir(exist_ok=True)
        marker.write_text(digest, encoding="utf-8")
        print(f"{number} {stage.title}: {time.monotonic() - begin:.0f} s\n", flush=True)


def _digest(stages: Sequence[Stage]) -> str:
    return hashlib.sha256(json.dumps([stage.told for stage in stages], default=str).encode()).hexdigest()


def _without_prefix(words: Sequence[str]) -> list[str]:
    return [Path(word).name if word.startswith(sys.prefix) else word for word in words]


def _call(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command to its end and return its exit code. Ended itself, by Ctrl-C or SIGTERM, it ends the command first."""
    process = subprocess.Popen(arguments, env=environment)

    def terminate(*_: object) -> None:
        process.send_signal(signal.SIGINT)  # what a Ctrl-C would have sent to all
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        return process.wait()
    except KeyboardInterrupt:
        try:
            process.wait(timeout=END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _typed(arguments: Sequence[str]) -> str:
    """The command as one would type it."""
    return " ".join(f"'{word}'" if any(mark in word for mark in ' "[') else word for word in _without_prefix(arguments))
