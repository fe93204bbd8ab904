"""What data preparation costs beyond decoding: ``python bench/dataprep.py [--help]``.

CPU seconds, of processes with all their children, for the same made-up videos (h264, 30 frames per second, 720p and 1080p, 10 s):

- job: the whole Spark job on one core, from the command to the finished data sets; start-up is told apart by a job of fewer files
- ffmpeg: ``ffmpeg -threads 1``, decoding, 24 frames per second, scaling to both stages' sizes, output thrown away
- decoding: ``ffmpeg -threads 1``, nothing else
- re-encoding: what video2dataset does, with the ffmpeg program: each step reads and writes h264 (frame rate, then each size), and
  a reader decodes the result

In rounds that interleave them; medians are reported.
"""

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

# Python puts bench/ first on the path, where this file would shadow the package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import imageio_ffmpeg  # noqa: E402
import psutil  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dataprep import small_t5  # noqa: E402

ROOT = Path(__file__).parents[1]
SIZES = {"720p": "1280x720", "1080p": "1920x1080"}
SECONDS = 10
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.05


def ffmpeg(*arguments: str) -> None:
    """Run the program on one thread."""
    quiet = ("-hide_banner", "-loglevel", "error", "-nostdin", "-y", "-threads", "1", "-filter_threads", "1")
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), *quiet, *arguments], check=True)


def make(folder: Path, files: int) -> list[Path]:
    """Videos with moving detail and grain, each with a caption."""
    paths = []
    for number in tqdm(range(files), "make videos", unit="file", leave=False, disable=None):
        size = list(SIZES.values())[number % len(SIZES)]
        path = folder / f"{number:03d}.mp4"
        source = f"mandelbrot=size={size}:rate=30:start_scale={3 - 0.1 * number},noise=alls=8:allf=t"
        encode = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-pix_fmt", "yuv420p")
        ffmpeg("-f", "lavfi", "-i", source, "-t", str(SECONDS), *encode, str(path))
        path.with_suffix(".txt").write_text(f"fractal number {number}")
        paths.append(path)
    return paths


def bare(paths: Sequence[Path]) -> None:
    """Decode, change the rate, scale to both sizes."""
    graph = "[0:v]fps=24,split=2[a][b];[a]scale=512:288[large];[b]scale=64:36[small]"
    outputs = [word for name in ("large", "small") for word in ("-map", f"[{name}]", "-f", "rawvideo", "/dev/null")]
    for path in paths:
        ffmpeg("-i", str(path), "-filter_complex", graph, *outputs)


def decoding(paths: Sequence[Path]) -> None:
    """Decode."""
    for path in paths:
        ffmpeg("-i", str(path), "-f", "null", "-")


def reencoding(paths: Sequence[Path], folder: Path) -> None:
    """A chain of files."""
    encode = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")
    rate, large, small = (str(folder / f"{name}.mp4") for name in ("rate", "large", "small"))
    for path in paths:
        ffmpeg("-i", str(path), "-r", "24", *encode, rate)
        ffmpeg("-i", rate, "-vf", "scale=512:288", *encode, large)
        ffmpeg("-i", large, "-vf", "scale=64:36", *encode, small)
        for result in (large, small):
            ffmpeg("-i", result, "-f", "null", "-")


def job(media: Path, encoder: Path, output: Path) -> None:
    """The Spark job on one core."""
    overrides = (f"inputs=[{media}]", f"output={output}", f"text.path={encoder}", "text.max_tokens=32")
    words = [
        sys.executable,
        "-m",
        "dataprep.run",
        "yamls/dataprep.yaml",
        *overrides,
        "spark.master=local[1]",
        "items_per_partition=4",
    ]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(ended.stderr)


def adopt_orphans() -> None:
    """What outlives its parent for a moment stays a descendant of ours."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU time of all processes that ``work`` starts, asked while they live: Spark's daemon forgets its workers'."""
    spent: dict[int, float] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            look(spent)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    while look(spent):  # Java and its children outlive the command for a moment
        time.sleep(POLL_SECONDS)
    return sum(spent.values())


def look(spent: dict[int, float]) -> bool:
    """Write down what each living descendant has used so far; whether there is one."""
    found = psutil.Process().children(recursive=True)
    living = False
    for process in found:
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            times = process.cpu_times()
            spent[process.pid], living = times.user + times.system, True
    return living


def compare(files: int, rounds: int) -> dict[str, object]:
    """Run the comparison; returns what is printed as JSON."""
    adopt_orphans()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few, all_ = folder / "few", folder / "all"
        for each in (few, all_):
            each.mkdir()
        paths = make(all_, files)
        fewer = paths[: len(SIZES)]
        for path in fewer:
            for made in (path, path.with_suffix(".txt")):
                os.link(made, few / made.name)
        encoder = small_t5.build(small_t5.SmallT5Config(output=str(folder / "t5"), captions=str(all_)))
        times: dict[str, list[float]] = {}
        work = {
            "job": lambda output: job(all_, encoder, output),
            "job of few": lambda output: job(few, encoder, output),
            "ffmpeg": lambda output: bare(paths),
            "decoding": lambda output: decoding(paths),
            "re-encoding": lambda output: reencoding(paths, folder),
        }
        with tqdm(total=rounds * len(work), leave=False, disable=None) as bar:
            for round_ in range(rounds):
                for title, body in work.items():
                    output = folder / f"{title}-{round_}"
                    times.setdefault(title, []).append(cpu_seconds(partial(body, output)))
                    bar.update()
    seconds = {title: statistics.median(found) for title, found in times.items()}
    slope = (seconds["job"] - seconds.pop("job of few")) / (files - len(fewer)) * files  # of all files
    seconds["job without start-up"] = slope
    return {
        "files": files,
        "rounds": rounds,
        "cpu_seconds": seconds,
        "cpu_seconds_per_minute_of_video": {title: 60 * spent / (files * SECONDS) for title, spent in seconds.items()},
        "times_as_fast_without_startup_as": {title: seconds[title] / slope for title in ("ffmpeg", "decoding", "re-encoding")},
    }


def report(result: dict[str, object]) -> str:
    """The result for people."""
    spent, ratios = result["cpu_seconds"], result["times_as_fast_without_startup_as"]
    assert isinstance(spent, dict) and isinstance(ratios, dict)
    lines = [f"{result['files']} videos of {SECONDS} s, half 720p, half 1080p; CPU seconds, median of {result['rounds']}"]
    lines += [f"{title:22}{seconds:9.1f}" for title, seconds in spent.items()]
    lines += [f"without start-up the job is {ratio:.2f} x as fast as {title}" for title, ratio in ratios.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=16, help="videos; an even number, at least 4 (default 16)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    if arguments.files < 4 or arguments.files % 2 or arguments.rounds < 1:
        sys.exit("--files must be an even number of at least 4, --rounds at least 1")
    result = compare(arguments.files, arguments.rounds)
    print(json.dumps(result, indent=2) if arguments.json else report(result))


if __name__ == "__main__":
    main()
