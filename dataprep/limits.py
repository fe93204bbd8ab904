"""What keeps a hostile file from taking its worker along: bounds on memory and time, and a child process that dies first."""

import contextlib
import faulthandler
import math
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MEGABYTE = 1 << 20


def memory_in_use() -> int:
    """Bytes of address space that this process has taken; 0 where the system does not say (it then knows no limit either)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


@contextlib.contextmanager
def memory(up_to: int) -> Iterator[None]:
    """Within it an allocation beyond ``up_to`` bytes of address space fails, which decoders and Python report as an error.

    Without it a file of 125 kB (black 8K frames that all refer to one another) takes 2.2 GB, and the kernel kills the worker.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    if memory_in_use():
        resource.setrlimit(resource.RLIMIT_AS, (min([up_to, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def cpu_time(seconds: int) -> Iterator[None]:
    """Within it the process is killed, by SIGXCPU, once it has computed for so long: nothing else ends a decoder that never comes
    back. For the hopeless case, not for what merely takes long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_CPU, (min([math.ceil(time.process_time()) + seconds, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def fatal_signal(work: Callable[[], object], seconds: int) -> str:
    """Do ``work`` in a forked process and forget what comes of it. The name of the signal that killed it; empty if none did.

    After ``seconds`` it is killed by SIGALRM: a fork has only one of its parent's threads, and may wait for the others for ever.
    """
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(work, seconds), daemon=True)
    process.start()
    process.join()
    code = process.exitcode or 0
    process.close()
    return signal.Signals(-code).name if code < 0 else ""


def _quietly(work: Callable[[], object], seconds: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    faulthandler.disable()  # a crash is an answer here, no report of one
    with contextlib.suppress(Exception):  # whoever does it in earnest will see it
        work()
