"""What keeps a hostile file from taking its worker along: a bound on memory, and a child process that dies first."""

import contextlib
import multiprocessing
import resource
import signal
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


def fatal_signal(work: Callable[[], object]) -> str:
    """Do ``work`` in a forked process and forget what comes of it. The name of the signal that killed it; empty if none did."""
    process = multiprocessing.get_context("fork").Process(target=_quietly, args=(work,), daemon=True)
    process.start()
    process.join()
    code = process.exitcode or 0
    process.close()
    return signal.Signals(-code).name if code < 0 else ""


def _quietly(work: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):  # whoever does it in earnest will see it
        work()
