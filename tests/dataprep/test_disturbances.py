"""Killed drivers, workers and executors, a full disk, a second job: each ends with the samples of an undisturbed job, no more.

A reader that looks all the while sees the earlier data set or the whole new one. Kills come at seeded random points: once so many
parts are there, a random moment later. Minutes long: `make test-all`.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyspark
import pytest

from dataprep import partition
from dataprep import run as job
from dataprep.run import DataprepConfig, Work
from model.config import load
from tests.dataprep.prepared import content, pool, same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]  # on a machine with other things to do

ROOT = Path(__file__).parents[2]
EARLY, LATE = 6, 18  # videos of the first job, and those that are new to the second
YAML = """\
inputs: [{inputs}]
output: {folder}/out
stages:
  - {{ name: stage1, height: 18, width: 32, frame_format: raw }}
  - {{ name: stage2, height: 90, width: 160, frame_format: jpeg }}
clips: {{ frame_rate: 24, clip_frames: 32, min_frames: 12, split_at_cuts: false }}
select: {{ duplicate_bits: null, max_letterbox: 1, min_sharpness: 0, min_motion: 0 }}
text: {{ path: {encoder}, max_tokens: 12 }}
items_per_partition: 1
spark:
  master: "local[2,4]"
  conf: {{ spark.task.reaper.enabled: "true" }}
"""
ON_CLUSTER = {
    "spark.speculation": "true",  # nearly every task runs twice
    "spark.speculation.interval": "50ms",
    "spark.speculation.multiplier": "1.01",
    "spark.speculation.quantile": "0.1",
    "spark.speculation.minTaskRuntime": "10ms",
    "spark.task.maxFailures": "20",
    "spark.executor.cores": "1",
    "spark.executor.memory": "512m",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the first and the second job make when nobody disturbs them."""

    folder: Path
    first: Path
    second: Path


def alone(config: DataprepConfig) -> None:
    """The job without Spark: one part after the other, in this process."""

    def prepare(c: DataprepConfig, work: Work, missing: list[int]) -> None:
        for part in missing:
            partition.process(c.recipe, c.select, str(work.workspace), part, part - work.parts.start, lambda account: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_prepare", prepare)
        job.run(config)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, media: Any, encoder_folder: Path) -> Reference:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "in").mkdir()
    (folder / "job.yaml").write_text(YAML.format(inputs=folder / "in", folder=folder, encoder=encoder_folder))
    outputs = []
    for name, count in (("first", EARLY), ("second", EARLY + LATE)):
        for n in range(count):
            path = folder / "in" / f"video{n:02d}.mp4"
            if not path.exists():
                media.video(path, media.numbered(120, 180, 320))
                path.with_suffix(".txt").write_text(f"video {n}")
        alone(load(DataprepConfig, folder / "job.yaml", [f"output={folder / name}"]))
        outputs.append(folder / name)
    return Reference(folder, *outputs)


@pytest.fixture
def yaml(reference: Reference, tmp_path: Path, encoder_folder: Path) -> Path:
    """A job whose output ``out`` is that of the first job; all inputs are there."""
    (tmp_path / "job.yaml").write_text(YAML.format(inputs=reference.folder / "in", folder=tmp_path, encoder=encoder_folder))
    shutil.copytree(reference.first, tmp_path / "out")
    return tmp_path / "job.yaml"


class Reader:
    """Looks at an output and finds it whole, whenever it looks."""

    def __init__(self, output: Path) -> None:
        self._output, self._seen = output, 0
        self.generations: list[str] = []

    def look(self) -> None:
        number = self._output.stat().st_ino  # there has to be one
        if number == self._seen:
            return
        try:
            digest = json.loads((self._output / "job.json").read_text())["digest"]
            for index in self._output.rglob("index.json"):
                for shard in json.loads(index.read_text())["shards"]:
                    assert (index.parent / shard["raw_data"]["basename"]).stat().st_size == shard["raw_data"]["bytes"]
        except OSError:
            assert self._output.stat().st_ino != number  # replaced while it was read
            return
        self._seen = number
        self.generations.append(digest)


class Run:
    """A job in a process of its own, and a reader of its output."""

    def __init__(self, yaml: Path, *overrides: str, env: dict[str, str] | None = None) -> None:
        self.folder = yaml.parent
        self.log = (self.folder / f"log-{time.monotonic_ns()}").open("w+")
        command = [sys.executable, "-m", "dataprep.run", str(yaml), *overrides]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": sys.executable, **(env or {})}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.log, stderr=subprocess.STDOUT)

    @property
    def printed(self) -> str:
        return Path(self.log.name).read_text()

    @property
    def parts(self) -> int:
        return sum(1 for _ in self.folder.glob("out.tmp-*/parts/part-*"))

    def until(self, reader: Reader, reached: Callable[[], bool]) -> bool:
        """Wait; False if the job ends first."""
        deadline = time.monotonic() + 1200
        while self.process.poll() is None:
            reader.look()
            if reached():
                return True
            assert time.monotonic() < deadline, self.printed
            time.sleep(0.005)
        return False

    def end(self, reader: Reader) -> str:
        """Wait for success; returns what was printed."""
        self.until(reader, lambda: False)
        assert self.process.returncode == 0, self.printed
        reader.look()
        return self.printed

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def workers(root: int) -> list[psutil.Process]:
    """The Python workers of Spark among the descendants of a process: children of a daemon that Java has started."""
    found = []
    for process in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "dataprep.daemon" in process.cmdline() and "dataprep.daemon" in process.parent().cmdline():
                found.append(process)
    return found


def finish(reference: Reference, yaml: Path, reader: Reader) -> None:
    output = yaml.parent / "out"
    same(output, reference.second)
    assert len(reader.generations) == 2, reader.generations
    left = {path.name for path in yaml.parent.iterdir() if not path.name.startswith("log-")}
    assert left == {"job.yaml", "out"}


@pytest.mark.parametrize("seed", [1, 2])
def test_drivers_killed_anywhere(reference: Reference, yaml: Path, seed: int) -> None:
    draw, reader = random.Random(seed), Reader(yaml.parent / "out")
    output = yaml.parent / "out"
    stages: list[Callable[[Run, int], bool]] = [
        lambda run, limit: any(output.parent.glob(".out.list-*")),
        lambda run, limit: run.parts >= limit,
        lambda run, limit: any(output.parent.glob("out.tmp-*/finished/pool/*")),
        lambda run, limit: any(output.parent.glob("out.tmp-*/finished/report.html")),
    ]
    before = 0
    for number, stage in enumerate(stages):
        limit = draw.randint(before + 1, max(before + 1, LATE - 2))
        run = Run(yaml)
        if run.until(reader, lambda run=run, stage=stage, limit=limit: stage(run, limit)):
            time.sleep(draw.uniform(0, 0.2))
            run.kill()
        elif run.process.returncode == 0:  # faster than the kill
            break
        before = run.parts
        print(f"kill {number}: {before} parts")
    printed = Run(yaml).end(reader)
    assert "partitions done before" in printed or "nothing to do" in printed
    finish(reference, yaml, reader)


def test_python_workers_killed_and_a_second_job_turned_away(reference: Reference, yaml: Path, capsys: Any) -> None:
    draw, reader = random.Random(3), Reader(yaml.parent / "out")
    run = Run(yaml)
    assert run.until(reader, lambda: (yaml.parent / ".out.lock").exists())
    with pytest.raises(SystemExit) as caught:
        job.main([str(yaml)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: another dataprep job is writing to {yaml.parent / 'out'}\n"
    killed = 0
    for limit in sorted(draw.sample(range(1, LATE), 3)):
        if run.until(reader, lambda limit=limit: run.parts >= limit and bool(workers(run.process.pid))):
            with contextlib.suppress(psutil.Error, IndexError):
                draw.choice(workers(run.process.pid)).kill()
                killed += 1
    run.end(reader)
    assert killed
    finish(reference, yaml, reader)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A standalone master and two workers."""

    url: str
    processes: list[subprocess.Popen[bytes]]

    def executors(self) -> list[psutil.Process]:
        found = []
        for worker in self.processes[1:]:
            for process in psutil.Process(worker.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "CoarseGrainedExecutorBackend" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def workers(self) -> list[psutil.Process]:
        return [python for worker in self.processes[1:] for python in workers(worker.pid)]


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    spark = Path(pyspark.__file__).parent
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    environment = {
        **os.environ,
        "SPARK_HOME": str(spark),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYTHONPATH": str(ROOT),  # as if the project were installed on the nodes
        "SPARK_DAEMON_JAVA_OPTS": job.QUICK_JAVA,
    }
    deploy = "org.apache.spark.deploy"
    master = [f"{deploy}.master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0"]
    worker = [f"{deploy}.worker.Worker", f"spark://127.0.0.1:{port}", "--host", "127.0.0.1", "--webui-port", "0"]
    worker += ["--cores", "1", "--memory", "1g"]
    processes = []
    try:
        for number, arguments in enumerate((master, worker, worker)):
            own = ["--work-dir", str(folder / f"worker{number}")] if number else []
            with (folder / f"log{number}").open("w") as log:
                command = [str(spark / "bin" / "spark-class"), *arguments, *own]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 120
        while (folder / "log0").read_text().count("Registering worker") < 2:
            assert time.monotonic() < deadline, [(folder / f"log{n}").read_text() for n in range(3)]
            time.sleep(0.1)
        yield Cluster(f"spark://127.0.0.1:{port}", processes)
    finally:
        for process in processes:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait()


def test_a_cluster_loses_executors_workers_and_its_driver(reference: Reference, yaml: Path, cluster: Cluster) -> None:
    """With speculation on, so that most parts are made by two tasks at a time."""
    draw, reader = random.Random(4), Reader(yaml.parent / "out")
    conf = ", ".join(f"{name}: '{value}'" for name, value in ON_CLUSTER.items())
    options = [f"spark.master='{cluster.url}'", f"spark.conf={{{conf}}}"]
    run, killed = Run(yaml, *options), []
    for limit in sorted(draw.sample(range(1, LATE - 6), 3)):
        for victims in (cluster.executors, cluster.workers):
            if run.until(reader, lambda limit=limit, victims=victims: run.parts >= limit and bool(victims())):
                time.sleep(draw.uniform(0, 0.1))
                with contextlib.suppress(psutil.Error, IndexError):
                    draw.choice(victims()).kill()
                    killed.append(victims.__name__)
    assert {"executors", "workers"} <= set(killed), run.printed
    limit = draw.randint(run.parts, LATE - 2)
    if run.until(reader, lambda: run.parts >= limit):
        run.kill()
        run = Run(yaml, *options)
    run.end(reader)
    finish(reference, yaml, reader)


def test_a_disk_that_is_full_and_then_is_not(reference: Reference, yaml: Path, encoder_folder: Path) -> None:
    """A file system of its own, first with room for the earlier output and a little more, then for all."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here to mount a file system in")
    folder, needed = yaml.parent, sum(path.stat().st_size for path in (yaml.parent / "out").rglob("*") if path.is_file())
    (folder / "disk").mkdir()
    script = f"""
        mount -t tmpfs -o size={needed + 700_000} none {folder}/disk && cp -r {folder}/out {folder}/disk/out || exit 99
        {sys.executable} -m dataprep.run {yaml} output={folder}/disk/out > {folder}/log-full 2>&1; echo $? > {folder}/code
        cp -r {folder}/disk/out {folder}/kept
        mount -o remount,size=1g {folder}/disk
        {sys.executable} -m dataprep.run {yaml} output={folder}/disk/out > {folder}/log-again 2>&1 || exit 98
        cp -r {folder}/disk/out {folder}/done
        ls -A {folder}/disk > {folder}/left
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], cwd=ROOT, env=environment, check=False, timeout=2400)
    full, again = (folder / "log-full").read_text(), (folder / "log-again").read_text() if done.returncode in (0, 98) else ""
    assert done.returncode == 0, full + again
    assert (folder / "code").read_text() == "2\n"
    assert "Traceback" not in full
    assert "No space left on device" in full.splitlines()[-1], full
    assert "run again to go on" in full.splitlines()[-1]
    assert content(folder / "kept") == content(reference.first)
    assert pool(folder / "kept") == pool(reference.first)
    assert "partitions done before" in again
    same(folder / "done", reference.second)
    assert (folder / "left").read_text() == "out\n"
