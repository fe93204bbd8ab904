"""Sampling jobs of the studio: one at a time, in the order in which they came, whoever asked for them."""

import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from model.errors import RunError, UserError
from model.registry import first_line
from pipelines.cascade import CascadeConfig, Progress

KEPT = 200  # ended jobs that can still be looked at; their clips stay in the history


@dataclass(frozen=True)
class Task:
    """A clip to make."""

    prompt: str
    seed: int
    settings: CascadeConfig


@dataclass(frozen=True)
class Job:
    """What is known of a job at one moment."""

    number: int
    tasks: tuple[Task, ...]  # made one after the other
    state: Literal["waiting", "running", "done", "failed", "cancelled"] = "waiting"
    said: str = ""  # what it is at, or why it failed
    share: float = 0.0  # of what it is at
    clips: tuple[str, ...] = ()  # names in the history, one for each finished task
    change: int = 0  # counts what happened to it

    @property
    def ended(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class CancelledError(Exception):
    """Somebody wants a job no more; told where it asks for its next step."""


class Queue:
    """Runs jobs in a thread of its own, so that they outlive the page that asked for them."""

    def __init__(self, make: Callable[[Task, Progress], str]) -> None:
        """``make`` makes a clip and returns its name. It reports its steps, and may be cancelled between two of them."""
        self._make = make
        self._jobs: dict[int, Job] = {}
        self._unwanted: set[int] = set()
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sampling", daemon=True)
        self._thread.start()

    def submit(self, tasks: Sequence[Task]) -> int:
        """Add a job and return its number."""
        with self._changed:
            number = next(self._numbers)
            self._jobs[number] = Job(number, tuple(tasks))
            for old in [job.number for job in self._jobs.values() if job.ended][:-KEPT]:
                del self._jobs[old]
            self._changed.notify_all()
        return number

    def cancel(self, number: int) -> None:
        """End a job where it is; what it has finished stays. Nothing happens to one that has ended or never was."""
        with self._changed:
            job = self._jobs.get(number)
            if job is None or job.ended:
                return
            if job.state == "waiting":
                self._note(number, state="cancelled")
            else:
                self._unwanted.add(number)

    def look(self, number: int) -> Job:
        """The job as it is now.

        Raises:
            KeyError: unknown, or ended long ago.
        """
        with self._changed:
            return self._jobs[number]

    def unfinished(self) -> list[Job]:
        """Jobs that wait or run, in their order."""
        with self._changed:
            return [job for job in self._jobs.values() if not job.ended]

    def follow(self, number: int, pause: float = 0.15) -> Iterator[Job]:
        """The job each time that it has changed, at most every ``pause`` seconds; last when it has ended."""
        job = self.look(number)
        yield job
        while not job.ended:
            time.sleep(pause)
            with self._changed:
                self._changed.wait_for(partial(self._is_past, job))
                job = self._jobs[number]
            yield job

    def close(self) -> None:
        """Cancel everything and wait until the thread has ended."""
        with self._changed:
            self._closed = True
            self._unwanted.update(job.number for job in self._jobs.values())
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                job = self._next()
                if self._closed or job is None:
                    return
                self._note(job.number, state="running")
            self._run(job)

    def _is_past(self, seen: Job) -> bool:
        return self._jobs[seen.number].change != seen.change

    def _next(self) -> Job | None:
        return next((job for job in self._jobs.values() if job.state == "waiting"), None)

    def _run(self, job: Job) -> None:
        try:
            for place, task in enumerate(job.tasks, 1):
                title = f"clip {place} of {len(job.tasks)}: " if len(job.tasks) > 1 else ""
                name = self._make(task, partial(self._steps, job.number, title))
                with self._changed:
                    self._note(job.number, clips=(*self._jobs[job.number].clips, name))
            self._end(job.number, "done", "")
        except CancelledError:
            self._end(job.number, "cancelled", "")
        except (UserError, RunError, ValueError) as error:
            self._end(job.number, "failed", str(error))
        except Exception as error:  # the next job must run all the same
            traceback.print_exc()
            self._end(job.number, "failed", f"{type(error).__name__}: {first_line(error)}")

    def _steps(self, number: int, title: str, stage: str, steps: int) -> Iterator[int]:
        said = title + stage
        for step in range(steps):
            with self._changed:
                if number in self._unwanted:
                    raise CancelledError
                self._note(number, said=f"{said}, step {step + 1} of {steps}" if steps > 1 else said, share=step / steps)
            yield step

    def _end(self, number: int, state: Literal["done", "failed", "cancelled"], said: str) -> None:
        with self._changed:
            self._unwanted.discard(number)
            self._note(number, state=state, said=said, share=1.0 if state == "done" else 0.0)

    def _note(self, number: int, **changes: object) -> None:
        job = self._jobs[number]
        self._jobs[number] = replace(job, change=job.change + 1, **changes)  # type: ignore[arg-type]
        self._changed.notify_all()
