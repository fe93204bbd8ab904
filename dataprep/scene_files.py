"""Sample data: captioned scenes as real files, in every codec, container, frame rate and layout that dataprep reads.

    python -m dataprep.scene_files yamls/scenes.yaml [key=value ...]

Items are dealt out in turn to the layouts of the config, so that the layouts together hold each item once::

    OUTPUT/folder/video-00000.mp4 + .txt, image-00001.png + .json     media with sidecar captions
    OUTPUT/webdataset/shard-00000.tar                                 the same pairs in WebDataset tars
    OUTPUT/parquet/manifest.parquet, media/video-00002.webm           a table with the columns path and caption
    OUTPUT/truth.jsonl                                                one line per item: its file, format, caption and scene

Started again after an interrupt, it makes only what is missing.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from dataprep import moving_scenes
from dataprep.scenes import Difficulty, Scene, draw_scene, render
from model import command
from model.config import to_tree
from model.errors import UserError

Layout = Literal["folder", "webdataset", "parquet"]

MARKER_NAME = "scene_files.json"  # in the output folder: the config, and whether the set is whole
TRUTH_NAME = "truth.jsonl"
MANIFEST_NAME = "manifest.parquet"

# Encoder and container, then frames per second (0: variable). The counts have no common factor: all 40 pairs occur in turn.
FORMATS = [
    ("libx264", "mp4"),
    ("libx265", "mkv"),
    ("libvpx-vp9", "webm"),
    ("libsvtav1", "mp4"),
    ("libx264", "mkv"),
    ("libx265", "mp4"),
    ("libvpx-vp9", "mkv"),
    ("libsvtav1", "webm"),
]
FRAME_RATES = [24, 25, 30, 60, 0]
IMAGE_FORMATS = ["jpg", "png"]
MUXERS = {"mp4": "mp4", "mkv": "matroska", "webm": "webm"}
ENCODER_OPTIONS = {  # quick, one thread, and good enough that shapes keep clean edges
    "libx264": {"preset": "veryfast", "crf": "18", "x264-params": "mbtree=0"},  # with it, hidden padding varies between runs
    "libx265": {"preset": "ultrafast", "crf": "20", "x265-params": "log-level=none:pools=none:frame-threads=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"},
    # Not preset 12: it wrote a stream that does not decode (scene 95 of the demo).
    "libsvtav1": {"preset": "10", "crf": "28", "svtav1-params": "lp=1"},
}
VARIABLE_INTERVALS = (0.012, 0.09)  # seconds between frames of variable rate
MIN_SIDE = 64  # pixels; the least that the av1 encoder takes
MAX_SIDE = 2048


@dataclasses.dataclass(frozen=True)
class SceneFilesConfig:
    """What ``python -m dataprep.scene_files`` makes."""

    output: str  # folder
    num_videos: int = 120
    num_images: int = 60
    seed: int = 0
    # See dataprep.scenes.draw_scene; of the benchmark see dataprep.moving_scenes.
    difficulty: Difficulty | Literal["benchmark", "benchmark_unseen", "benchmark_wide"] = "full"
    layouts: tuple[Layout, ...] = ("folder", "webdataset", "parquet")
    min_seconds: float = 2.0  # length of a video
    max_seconds: float = 2.5
    sizes: tuple[tuple[int, int], ...] = ((320, 180), (426, 240), (320, 180), (640, 360), (180, 320))  # (width, height), in turn
    samples_per_tar: int = 16
    prefix: str = ""  # of the files' names: sets that are prepared together must differ in them
    processes: int = 2

    def __post_init__(self) -> None:
        if self.num_videos < 0 or self.num_images < 0 or self.num_videos + self.num_images < 1:
            raise ValueError("num_videos and num_images must be at least 0, and one of them at least 1")
        if not 0 < self.min_seconds <= self.max_seconds <= 60:
            raise ValueError("lengths must satisfy 0 < min_seconds <= max_seconds <= 60")
        if self.difficulty.startswith("benchmark") and self.max_seconds > moving_scenes.MAX_SECONDS:
            raise ValueError(
                f"max_seconds must be at most {moving_scenes.MAX_SECONDS:g} for the benchmark: objects leave the view"
            )
        if not self.sizes or any(side % 2 or not MIN_SIDE <= side <= MAX_SIDE for size in self.sizes for side in size):
            raise ValueError(f"sizes must be (width, height) pairs of even numbers from {MIN_SIDE} to {MAX_SIDE}")
        if not self.layouts or len(set(self.layouts)) < len(self.layouts):
            raise ValueError("layouts must name at least one layout, each once")
        if not re.fullmatch(r"[a-z0-9-]{0,32}", self.prefix):
            raise ValueError(f"prefix must be at most 32 lower-case letters, digits and dashes, got {self.prefix!r}")
        if self.samples_per_tar < 1 or self.processes < 1:
            raise ValueError("samples_per_tar and processes must be at least 1")


@dataclasses.dataclass(frozen=True)
class Item:
    """One video or image to make; everything about it follows from the config."""

    key: str  # such as "video-00012"
    layout: Layout
    scene: Scene
    caption: str
    suffix: str  # of the file, without dot: the container or image format
    sidecar: Literal["txt", "json"]
    encoder: str  # empty for images
    frame_rate: int  # per second; 0: variable, or an image
    times: tuple[float, ...]  # (T,) seconds at which frames are shown; one for an image
    width: int
    height: int

    @property
    def file_name(self) -> str:
        return f"{self.key}.{self.suffix}"


@dataclasses.dataclass(frozen=True)
class Job:
    """The items of one file that appears at once: a tar, or a single item with its sidecar."""

    path: Path  # of the tar or the media file
    items: tuple[Item, ...]


def plan_items(config: SceneFilesConfig) -> list[Item]:
    """Every item of the set, videos first, in the same order with the same content for the same config."""
    return [_plan_item(config, index) for index in range(config.num_videos + config.num_images)]


def make(config: SceneFilesConfig) -> Path:
    """Write the set that ``config`` describes and return its folder. Does nothing where it is there already.

    Raises:
        UserError: the folder holds something else, or the set of another config.
    """
    output = Path(config.output).expanduser()
    if _is_finished(output, config):
        return output
    items = plan_items(config)
    jobs = _plan_jobs(config, output, items)
    for job in jobs:
        job.path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in job.path.parent.glob(".*.partial"):  # of an interrupted run
            leftover.unlink()
    missing = [job for job in jobs if not job.path.exists()]
    with tqdm(total=len(items), initial=len(items) - sum(len(job.items) for job in missing), desc="scenes", unit="file") as bar:
        for count in _run_jobs(missing, config.processes):
            bar.update(count)
    _write_tables(output, items, jobs)
    _write_marker(output, config, finished=True)
    return output


@contextlib.contextmanager
def _kept_scheduling() -> Iterator[None]:
    """Puts the thread's scheduling back. Run by root, the av1 encoder makes the thread that opens it real-time, processes
    started later inherit it, and one that waits in a loop (py-cpuinfo, which Composer calls, does) then starves the machine.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@_kept_scheduling()
def encode_video(item: Item) -> bytes:
    """The bytes of a video file: one thread, frames at exactly ``item.times``, rounded to the container's clock."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only; the av1 encoder greets on standard error otherwise
    buffer = io.BytesIO()
    time_base = Fraction(1, item.frame_rate or 1000)
    with av.open(buffer, "w", format=MUXERS[item.suffix], options={"fflags": "+bitexact"}) as container:
        # An encoder wants some rate to plan by; timestamps alone decide when frames are shown.
        stream: Any = container.add_stream(item.encoder, rate=item.frame_rate or 25, options=ENCODER_OPTIONS[item.encoder])
        stream.width, stream.height, stream.pix_fmt = item.width, item.height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = time_base
        for t in item.times:
            frame = av.VideoFrame.from_ndarray(render(item.scene, t, item.height, item.width), format="rgb24")
            frame.pts, frame.time_base = round(t / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def encode_image(item: Item) -> bytes:
    """The bytes of a jpeg or png file."""
    buffer = io.BytesIO()
    image = Image.fromarray(render(item.scene, item.times[0], item.height, item.width))
    image.save(buffer, format="JPEG" if item.suffix == "jpg" else "PNG", quality=92)
    return buffer.getvalue()


def _plan_item(config: SceneFilesConfig, index: int) -> Item:
    rng = np.random.default_rng([config.seed, index])
    scene = _draw_scene(rng, config)
    is_video = index < config.num_videos
    number = index if is_video else index - config.num_videos
    encoder, suffix = FORMATS[number % len(FORMATS)] if is_video else ("", IMAGE_FORMATS[number % len(IMAGE_FORMATS)])
    width, height = config.sizes[(number + number // len(FORMATS)) % len(config.sizes)]
    frame_rate = FRAME_RATES[number % len(FRAME_RATES)] if is_video else 0
    return Item(
        key=f"{config.prefix}{'video' if is_video else 'image'}-{number:05d}",
        layout=config.layouts[number % len(config.layouts)],
        scene=scene,
        caption=scene.caption() if is_video else scene.still_caption(),
        suffix=suffix,
        sidecar="txt" if (number // len(config.layouts)) % 2 == 0 else "json",
        encoder=encoder,
        frame_rate=frame_rate,
        times=_draw_times(rng, config, frame_rate) if is_video else (float(rng.uniform(0.5, 1.5)),),
        width=width,
        height=height,
    )


def _draw_scene(rng: np.random.Generator, config: SceneFilesConfig) -> Scene:
    kinds: dict[str, moving_scenes.Kind] = {"benchmark": "seen", "benchmark_unseen": "unseen", "benchmark_wide": "wide"}
    match config.difficulty:
        case "simple" | "full" as difficulty:
            return draw_scene(rng, difficulty)
        case benchmark:
            return moving_scenes.draw(rng, kinds[benchmark], config.max_seconds)


def _draw_times(rng: np.random.Generator, config: SceneFilesConfig, frame_rate: int) -> tuple[float, ...]:
    """When the frames of a video are shown: at a constant rate, or irregularly on a clock of milliseconds."""
    seconds = float(rng.uniform(config.min_seconds, config.max_seconds))
    if frame_rate:
        return tuple(index / frame_rate for index in range(max(1, round(seconds * frame_rate))))
    intervals = rng.uniform(*VARIABLE_INTERVALS, size=int(seconds / VARIABLE_INTERVALS[0]) + 1)
    times = itertools.accumulate(intervals, initial=0.0)
    return tuple(round(float(t), 3) for t in times if t < seconds)


def _plan_jobs(config: SceneFilesConfig, output: Path, items: list[Item]) -> list[Job]:
    jobs = [
        Job(output / ("folder" if item.layout == "folder" else "parquet/media") / item.file_name, (item,))
        for item in items
        if item.layout != "webdataset"
    ]
    in_tars = [item for item in items if item.layout == "webdataset"]
    for number, start in enumerate(range(0, len(in_tars), config.samples_per_tar)):
        path = output / "webdataset" / f"shard-{number:05d}.tar"
        jobs.append(Job(path, tuple(in_tars[start : start + config.samples_per_tar])))
    return jobs


def _run_jobs(jobs: list[Job], processes: int) -> Iterator[int]:
    """Run ``jobs``, the long ones first, and yield the number of items of each as it ends."""
    jobs = sorted(jobs, key=lambda job: -len(job.items))
    if processes == 1 or len(jobs) < 2:
        yield from map(_run_job, jobs)
        return
    # Spawned, not forked: a fork of a process with threads may hang.
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn, initializer=_end_with_parent)
    try:
        for future in as_completed([executor.submit(_run_job, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError("a process that made files was killed, perhaps for memory; start the command again to go on") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: leave interrupts to the parent, and do not outlive it when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_job(job: Job) -> int:
    """Write the file of ``job``, whole or not at all, and return the number of its items."""
    item = job.items[0]
    if item.layout == "webdataset":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for item in job.items:
                _add_to_tar(tar, item.file_name, _encode(item))
                _add_to_tar(tar, f"{item.key}.{item.sidecar}", _sidecar(item))
        _write_whole(job.path, buffer.getvalue())
        return len(job.items)
    if item.layout == "folder":  # the sidecar first: where the media file exists, the item is complete
        _write_whole(job.path.with_suffix(f".{item.sidecar}"), _sidecar(item))
    _write_whole(job.path, _encode(item))
    return 1


def _encode(item: Item) -> bytes:
    return encode_video(item) if item.encoder else encode_image(item)


def _sidecar(item: Item) -> bytes:
    text = f"{item.caption}\n" if item.sidecar == "txt" else json.dumps({"caption": item.caption}) + "\n"
    return text.encode()


def _add_to_tar(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # time and owner stay zero: the same config gives the same bytes
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_bytes(data)
    temporary.replace(path)


def _write_tables(output: Path, items: list[Item], jobs: list[Job]) -> None:
    """The parquet manifest of its layout, and the truth about all items."""
    files = {item.key: job.path.relative_to(output).as_posix() for job in jobs for item in job.items}
    in_manifest = [item for item in items if item.layout == "parquet"]
    if in_manifest:
        table = {
            "path": [f"media/{item.file_name}" for item in in_manifest],  # relative to the manifest's folder
            "caption": [item.caption for item in in_manifest],
            "width": [item.width for item in in_manifest],
            "height": [item.height for item in in_manifest],
        }
        manifest = output / "parquet" / MANIFEST_NAME
        temporary = manifest.with_name(f".{manifest.name}.partial")
        pq.write_table(pa.table(table), temporary)
        temporary.replace(manifest)
    _write_whole(output / TRUTH_NAME, "".join(json.dumps(_truth(item, files[item.key])) + "\n" for item in items).encode())


def _truth(item: Item, file: str) -> dict[str, Any]:
    """One line of ``truth.jsonl``."""
    fields = dataclasses.asdict(item)
    times = fields.pop("times")
    return {"file": file, **fields, "num_frames": len(times), "last_frame_seconds": times[-1] if item.encoder else 0.0}


def _is_finished(output: Path, config: SceneFilesConfig) -> bool:
    """Whether ``output`` holds this config's set, whole; marks a new or empty folder as begun."""
    marker = output / MARKER_NAME
    if marker.is_file():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            state = json.loads(marker.read_text(encoding="utf-8"))
            if {**_content(SceneFilesConfig("")), **state["config"]} == _content(config):  # a set may be older than a setting
                return state.get("finished") is True
        raise UserError(f"{output} holds scenes of another config; choose another output, or delete it")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and was not made by this command; choose another output")
    output.mkdir(parents=True, exist_ok=True)
    _write_marker(output, config, finished=False)
    return False


def _write_marker(output: Path, config: SceneFilesConfig, finished: bool) -> None:
    _write_whole(output / MARKER_NAME, (json.dumps({"finished": finished, "config": _content(config)}, indent=2) + "\n").encode())


def _content(config: SceneFilesConfig) -> dict[str, Any]:
    """The part of a config that decides what the files hold."""
    return {key: value for key, value in to_tree(config).items() if key not in ("output", "processes")}


def _report(config: SceneFilesConfig) -> None:
    output = make(config)
    print(f"{config.num_videos} videos and {config.num_images} images are in {output}", flush=True)
    for layout in config.layouts:
        print(f"  {layout}: {output / layout}{f'/{MANIFEST_NAME}' if layout == 'parquet' else ''}", flush=True)
    print(f"  truth: {output / TRUTH_NAME}", flush=True)


if __name__ == "__main__":
    command.run(
        SceneFilesConfig,
        _report,
        description="Make captioned sample videos and images as real files. Goes on where an interrupted run stopped.",
        example="python -m dataprep.scene_files yamls/scenes.yaml num_videos=24 output=runs/scenes",
    )
