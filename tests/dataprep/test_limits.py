"""A bound on memory that holds and goes again, and a process that dies in another's place."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from dataprep import ingest, limits, listing, shards
from dataprep.clips import ClipConfig
from dataprep.encode import StageConfig, TextConfig
from dataprep.filters import FilterConfig
from dataprep.partition import Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Recipe(
    stages=(StageConfig("only", 36, 64, "raw"),),
    clips=ClipConfig(frame_rate=24, clip_frames=24, min_frames=12),
    text=TextConfig("none", 8),
    filters=FilterConfig(max_cropped=1),
)


def in_fresh_process(script: str) -> None:
    """Run a script where malloc has nothing in hand: what earlier tests freed serves an allocation without new address space, and
    no bound stops that."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    done.check_returncode()


def test_memory_is_bounded_within_and_not_after() -> None:
    in_fresh_process("""
        import pytest
        from dataprep import limits

        with limits.memory(limits.memory_in_use() + 64 * limits.MEGABYTE):
            small = bytearray(16 * limits.MEGABYTE)
            with pytest.raises(MemoryError):
                bytearray(128 * limits.MEGABYTE)
        assert len(small) + len(bytearray(128 * limits.MEGABYTE)) == 144 * limits.MEGABYTE
    """)


def test_the_bound_goes_with_an_error() -> None:
    with pytest.raises(KeyError), limits.memory(limits.memory_in_use()):
        raise KeyError
    bytearray(128 * limits.MEGABYTE)


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda: None, ""),
        (lambda: 1 / 0, ""),  # an error is not a crash
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "SIGSEGV"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    ],
)
def test_which_signal_killed_the_work(work: Callable[[], object], name: str) -> None:
    assert limits.fatal_signal(work, 60) == name


def spin() -> None:
    with limits.cpu_time(1):
        while True:
            pass


def test_a_decoder_that_never_comes_back_is_killed() -> None:
    assert limits.fatal_signal(spin, 60) == "SIGXCPU"


def test_a_process_that_waits_for_ever_is_killed() -> None:
    assert limits.fatal_signal(threading.Lock().acquire, 60) == ""
    held = threading.Lock()
    held.acquire()
    assert limits.fatal_signal(held.acquire, 1) == "SIGALRM"


def test_the_bound_on_time_goes_too() -> None:
    before = resource.getrlimit(resource.RLIMIT_CPU)
    with limits.cpu_time(100):
        inside, _ = resource.getrlimit(resource.RLIMIT_CPU)
    assert time.process_time() + 90 < inside < time.process_time() + 110
    assert resource.getrlimit(resource.RLIMIT_CPU) == before


def test_a_file_that_crashes_the_decoder_ends_one_try_and_is_then_rejected(
    tmp_path: Path, write_pairs: Any, encoder_folder: Path
) -> None:
    """No such file is known; so the decoder of the second one kills the process that runs it."""
    write_pairs(tmp_path / "in", 3)
    ingest.write_items(listing.list_items([str(tmp_path / "in")]), tmp_path / shards.ITEMS_NAME, 3)
    attempt = f"""
        import dataclasses, os, signal
        from dataprep import partition
        from dataprep.encode import TextConfig
        from dataprep.selection import SelectConfig
        from tests.dataprep.test_limits import RECIPE

        whole = partition.prepare

        def prepare(item, recipe):
            if item.key == "clip.01":
                os.kill(os.getpid(), signal.SIGSEGV)
            return whole(item, recipe)

        partition.prepare = prepare
        recipe = dataclasses.replace(RECIPE, text=TextConfig({str(encoder_folder)!r}, 8))
        done = partition.process(recipe, SelectConfig(), {str(tmp_path)!r}, part=7, group=0, on_item=lambda account: None)
        assert done.kept == 2
    """
    with pytest.raises(subprocess.CalledProcessError) as crash:
        in_fresh_process(attempt)
    assert crash.value.returncode == -signal.SIGSEGV
    assert not (tmp_path / "parts").exists()
    in_fresh_process(attempt)
    rows = pq.read_table(tmp_path / "parts" / "part-00007" / shards.ITEMS_NAME).to_pylist()
    told = {row["key"]: (row["fate"], row["reason"], row["detail"]) for row in rows}
    crashed = ("rejected", "crashes the decoder", "SIGSEGV")
    assert told == {"clip.00": ("kept", "", ""), "clip.01": crashed, "clip.02": ("kept", "", "")}


def test_a_file_that_needs_too_much_memory_is_rejected(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("L", (8192, 4352), 255).save(large)
    in_fresh_process(f"""
        import pytest
        from dataprep import limits, partition
        from dataprep.clips import ClipConfig
        from dataprep.encode import StageConfig, TextConfig
        from dataprep.filters import FilterConfig, Rejected
        from dataprep.ingest import Item, Span

        recipe = partition.Recipe(
            stages=(StageConfig("only", 36, 64, "raw"),),
            clips=ClipConfig(frame_rate=24, clip_frames=24, min_frames=12),
            text=TextConfig("none", 8),
            filters=FilterConfig(max_cropped=1),
        )
        item = Item("large", "image", "large", Span({str(large)!r}))
        with pytest.raises(Rejected, match="too much memory: more than filters.max_memory_mb=1536"):
            partition.prepare_guarded(item, recipe, limits.memory_in_use() + 32 * limits.MEGABYTE, careful=False)
        most = limits.memory_in_use() + 1024 * limits.MEGABYTE
        assert len(partition.prepare_guarded(item, recipe, most, careful=False).clips) == 1
    """)
