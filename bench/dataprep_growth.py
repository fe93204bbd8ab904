"""How the cost of data preparation grows: ``python bench/dataprep_growth.py [--help]``.

The same job on 1, 2 and 4 times the inputs and on 1 and 2 executors, which are processes of a Spark cluster on this machine
with a core each. Told are wall-clock and CPU seconds, start-up included, and the largest memory of the driver's own process,
which must not grow with the inputs. One round each, in an order that interleaves sizes and executors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

# Python puts bench/ first on the path, where dataprep.py would shadow the package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from bench import dataprep as parts  # noqa: E402
from dataprep import small_t5  # noqa: E402

SIZES, EXECUTORS = (1, 2, 4), (1, 2)
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Row:
    """One job."""

    files: int
    executors: int
    seconds: float
    cpu_seconds: float
    driver_mb: float  # largest resident memory of the driver's Python


def run(media: Path, encoder: Path, output: Path, executors: int) -> tuple[float, float, float]:
    """Wall-clock seconds, CPU seconds, and the driver's memory in MB."""
    peak = 0.0

    def job() -> None:
        nonlocal peak
        words = [sys.executable, "-m", "dataprep.run", "yamls/dataprep.yaml", f"inputs=[{media}]", f"output={output}"]
        words += [f"text.path={encoder}", "text.max_tokens=32", "items_per_partition=2", "select.duplicate_bits=null"]
        words += [f"spark.master=local-cluster[{executors},1,1024]"]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(words, cwd=parts.ROOT, stdout=subprocess.DEVNULL, stderr=errors)
            ended = threading.Event()

            def watch() -> None:
                nonlocal peak
                while not ended.wait(0.2):
                    try:
                        peak = max(peak, psutil.Process(process.pid).memory_info().rss / MEGABYTE)
                    except psutil.Error:
                        return

            watcher = threading.Thread(target=watch)
            watcher.start()
            code = process.wait()
            ended.set()
            watcher.join()
            if code:
                errors.seek(0)
                sys.exit(errors.read().decode(errors="replace"))

    begin = time.monotonic()
    spent = parts.cpu_seconds(job)
    return time.monotonic() - begin, spent, peak


def table(files: int) -> list[Row]:
    """Run all jobs; ``files`` is the smallest number of inputs."""
    parts.adopt_orphans()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = folder / "sources"
        sources.mkdir()
        paths = parts.make(sources, 4)
        encoder = small_t5.build(small_t5.SmallT5Config(output=str(folder / "t5"), captions=str(sources)))
        jobs = [(size, executors) for size in SIZES for executors in EXECUTORS]
        for size, executors in tqdm(jobs, "jobs", leave=False, disable=None):
            media = folder / f"media-{size}"
            media.mkdir(exist_ok=True)
            for number in range(size * files):
                source = paths[number % len(paths)]
                for made in (source, source.with_suffix(".txt")):
                    target = media / f"{number:04d}{made.suffix}"
                    if not target.exists():
                        os.link(made, target)
            rows.append(Row(size * files, executors, *run(media, encoder, folder / f"out-{size}-{executors}", executors)))
    return rows


def report(rows: list[Row]) -> str:
    """The result for people, as a table in Markdown."""
    lines = ["| videos of 10 s | executors | seconds | CPU seconds | driver, MB |", "|---|---|---|---|---|"]
    lines += [f"| {r.files} | {r.executors} | {r.seconds:.0f} | {r.cpu_seconds:.0f} | {r.driver_mb:.0f} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=8, help="videos of the smallest job (default 8)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    if arguments.files < 1:
        sys.exit("--files must be at least 1")
    rows = table(arguments.files)
    print(json.dumps([asdict(row) for row in rows], indent=2) if arguments.json else report(rows))


if __name__ == "__main__":
    main()
