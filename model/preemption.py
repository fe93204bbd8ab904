"""Stop a run between two steps when a scheduler says so: every rank at the same step, with a checkpoint.

SIGTERM is what schedulers send before SIGKILL; SIGUSR1 is what they can be told to send earlier. A rank whose launcher has died
stops in the same way.
"""

import os
import signal
import threading
from types import FrameType

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

EXIT_PREEMPTED = 128 + signal.SIGTERM  # 143, by which schedulers know a program that ended because it was told to
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The run was told to stop and did; the same command goes on from its checkpoint."""

    def __init__(self, why: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.why = why

    def __str__(self) -> str:
        return self.why


def shield_loader_process(number: int) -> None:
    """In a process that loads data: take the end from the parent alone, which needs it for the steps still to come.

    Schedulers signal all processes of a job; a loader process that dies of it would take the run with it, before its checkpoint.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # so that its sender can be asked for

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Preemption(Callback):
    """Between steps, lets all ranks agree on whether to stop: ``stopping`` is true on all of them after the same step.

    One number is summed over the ranks, and at each step: a rank that was told nothing cannot know that it should take part.
    While the run trains a signal only leaves a note; before and after, where no step is lost, it ends the process.
    """

    def __init__(self) -> None:
        """Takes the signals over; call it in the main thread, after importing Composer, which takes SIGTERM itself."""
        self.stopping = False
        self.told = ""  # by whom this rank was
        self._noting = False
        # A launcher's child becomes another's when the launcher dies. Started by hand, a run may outlive its shell.
        self._launcher = os.getppid() if "RANK" in os.environ else None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._noting = True

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.told and self._launcher not in (None, os.getppid()):
            self.told = "the launcher's end"
        told = state.device.tensor_to_device(torch.tensor(float(bool(self.told))))
        dist.all_reduce(told, reduce_operation="SUM")
        self.stopping = bool(told.item())

    def fit_end(self, state: State, logger: Logger) -> None:
        self._noting = False
        if self.told:
            self.leave(f"{self.told} after the last step")

    def leave(self, why: str) -> None:
        """Raise ``Preempted``. The signals are ignored from here on.

        The launcher sends SIGTERM to the others once the first rank has ended. A handler in Python would be gone by then in one
        that is about to end too, and its exit code another.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Preempted(why)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._noting:
            self.told = name
        else:
            self.leave(name)
