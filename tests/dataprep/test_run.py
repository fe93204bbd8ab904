"""The whole job on real Spark: what it writes, what it does with bad inputs, and how a killed one ends."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from streaming import LocalDataset, StreamingDataset
from streaming.base.hashing import get_hash

from dataprep import run as job
from model import text
from model.config import load
from model.data.schema import Manifest
from model.text import TextEncoder
from tests.dataprep.prepared import content
from tests.model.data.conftest import Server

ROOT = Path(__file__).parents[2]
GOOD_VIDEOS, GOOD_IMAGES = 9, 3
REASONS = {
    "cut": "truncated",
    "text": "not decodable",
    "latin": "caption is not UTF-8",
    "silent": "caption missing",
    "widow": "caption without media",
    "brief": "too short",
    "notes": "not a video or image",
}
YAML = """\
# Two small stages of real files.
inputs: [{inputs}]
output: {output}
stages:
  - {{ name: stage1, height: 18, width: 32, frame_format: raw }}
  - {{ name: stage2, height: 36, width: 64, frame_format: jpeg, jpeg_quality: 95 }}
clips: {{ frame_rate: 24, clip_frames: 24, min_frames: 12, max_clips_per_video: 3, split_at_cuts: false }}
select: {{ duplicate_bits: null, max_letterbox: 1 }}
text: {{ path: {encoder}, max_tokens: 12 }}
items_per_partition: 2
spark: {{ master: "local[2,3]" }}
"""


@dataclasses.dataclass(frozen=True)
class Finished:
    """An undisturbed job."""

    yaml: Path
    output: Path
    encoder: Path
    printed: str
    seconds: float


def make_inputs(folder: Path, media: Any) -> None:
    folder.mkdir()
    for index in range(GOOD_VIDEOS):  # 24 to 60 frames: one to three clips
        rate, frames = ((24, 30 + index), (30, 60), (60, 120))[index % 3]
        media.video(folder / f"good{index}.mp4", [media.number((index + n) % 256) for n in range(frames)], rate)
        (folder / f"good{index}.txt").write_text(f"video {index} shows a red circle")
    for index in range(GOOD_IMAGES):
        Image.fromarray(media.number(200 + index, 72, 128)).save(folder / f"still{index}.png")
        (folder / f"still{index}.json").write_text(json.dumps({"caption": f"image {index}"}))
    whole = (folder / "good1.mp4").read_bytes()
    for name, data in (
        ("cut.mp4", whole[: len(whole) * 6 // 10]),
        ("text.mp4", b"not a video\n"),
        ("latin.mp4", whole),
        ("silent.mp4", whole),
        ("latin.txt", b"caf\xe9"),
        ("cut.txt", b"cut"),
        ("text.txt", b"text"),
        ("widow.txt", b"my film is gone"),
        ("notes.pdf", b"%PDF"),
        ("brief.txt", b"brief"),
    ):
        (folder / name).write_bytes(data)
    media.video(folder / "brief.mp4", media.numbered(8), 24)


def command(yaml: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "dataprep.run", str(yaml), *overrides]


def environment() -> dict[str, str]:
    """spark-submit looks for Python on the path, as in an activated environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PYTHONPATH": str(ROOT), "PATH": path}


def execute(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, media: Any, encoder_folder: Path) -> Finished:
    folder = tmp_path_factory.mktemp("job")
    make_inputs(folder / "in", media)
    yaml = folder / "job.yaml"
    yaml.write_text(YAML.format(inputs=folder / "in", output=folder / "out", encoder=encoder_folder))
    begin = time.monotonic()
    done = execute(command(yaml), folder)
    assert done.returncode == 0, done.stderr
    return Finished(yaml, folder / "out", encoder_folder, done.stdout, time.monotonic() - begin)


def frames(row: dict[str, Any], manifest: Manifest) -> Iterator[np.ndarray]:
    starts = [0, *row["frame_ends"][:-1].tolist()]
    for start, end in zip(starts, row["frame_ends"].tolist(), strict=True):
        data = row["frames"][start:end]
        if manifest.frame_format == "raw":
            yield np.frombuffer(data, np.uint8).reshape(manifest.height, manifest.width, 3)
        else:
            yield np.asarray(Image.open(io.BytesIO(data)))


def streaming_dataset(folder: Path) -> StreamingDataset:
    for _ in range(20):  # two processes that start one at the same moment may both take the same name in shared memory
        with contextlib.suppress(FileExistsError):
            return StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    raise AssertionError("no free name in shared memory")


def test_streaming_reads_every_clip_of_both_stages(finished: Finished, media: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # streaming keeps lock files there
    rates = [(24, 30 + index) if index % 3 == 0 else (30, 60) if index % 3 == 1 else (60, 120) for index in range(GOOD_VIDEOS)]
    expected = {}
    for index, (rate, count) in enumerate(rates):
        numbers = [index + k * rate // 24 for k in range(count * 24 // rate)]
        for clip in range(len(numbers) // 24 + (len(numbers) % 24 >= 12)):
            expected[f"good{index}:{clip}"] = numbers[24 * clip : 24 * clip + 24]
    for stage, height, width in (("stage1", 18, 32), ("stage2", 36, 64)):
        folder = finished.output / stage / "videos"
        manifest = Manifest.read(folder)
        assert (manifest.kind, manifest.height, manifest.width, manifest.frame_rate) == ("videos", height, width, 24.0)
        assert (manifest.max_frames, manifest.num_samples) == (24, len(expected))
        dataset = streaming_dataset(folder)
        found = {row["key"]: [media.read_number(image) for image in frames(row, manifest)] for row in dataset}
        assert found == expected


def test_shard_hashes_hold_and_nothing_else_lies_there(finished: Finished) -> None:
    named = {"items.parquet", "rejects.parquet", "clips.parquet", "job.json", "report.html"}
    for dataset in ("stage1/videos", "stage1/images", "stage2/videos", "stage2/images"):
        index = json.loads((finished.output / dataset / "index.json").read_text())
        for shard in index["shards"]:
            raw = shard["raw_data"]
            data = (finished.output / dataset / raw["basename"]).read_bytes()
            assert (len(data), get_hash("xxh64", data)) == (raw["bytes"], raw["hashes"]["xxh64"])
            named.add(f"{dataset}/{raw['basename']}")
        named |= {f"{dataset}/index.json", f"{dataset}/manifest.json"}
    there = {str(path.relative_to(finished.output)) for path in finished.output.rglob("*") if path.is_file()}
    pool = {path.removeprefix("pool/") for path in there if path.startswith("pool/")}
    assert {path for path in there if not path.startswith("pool/")} == named
    tables = {"items.parquet", "clips.parquet", "shards.parquet"}
    assert pool == {path for path in named if path.endswith(".mds")} | tables  # everything was selected
    for path in pool - tables:
        assert (finished.output / path).samefile(finished.output / "pool" / path)
    assert sorted(path.name for path in finished.output.parent.iterdir()) == ["in", "job.yaml", "out"]


def test_images_are_datasets_of_their_own(finished: Finished, media: Any) -> None:
    for stage in ("stage1", "stage2"):
        folder = finished.output / stage / "images"
        manifest = Manifest.read(folder)
        assert (manifest.kind, manifest.frame_rate, manifest.max_frames) == ("images", 0.0, 1)
        rows = {row["key"]: row for row in LocalDataset(str(folder))}
        for index in range(GOOD_IMAGES):
            row = rows[f"still{index}:0"]
            assert [media.read_number(image) for image in frames(row, manifest)] == [200 + index]
            assert (row["caption"], row["source_height"], row["source_width"]) == (f"image {index}", 72, 128)


def test_text_states_are_those_of_the_encoder(finished: Finished) -> None:
    encoder = TextEncoder(str(finished.encoder), max_tokens=12)
    manifest = Manifest.read(finished.output / "stage1/videos")
    assert dataclasses.astuple(manifest.text) == (
        str(finished.encoder),
        text.revision(str(finished.encoder)),
        encoder.width,
        "bfloat16",
        12,
    )
    for row in LocalDataset(str(finished.output / "stage2/videos")):
        states = text.unpack(row["text"])
        (expected,) = encoder.encode([row["caption"]])
        assert states.shape == expected.shape
        assert states.shape[0] <= 12
        torch.testing.assert_close(states, expected, rtol=2**-6, atol=2**-6)  # batched otherwise: the last bit may differ


def test_every_input_is_accounted_for(finished: Finished) -> None:
    items = pq.read_table(finished.output / "items.parquet").to_pylist()
    rejects = pq.read_table(finished.output / "rejects.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in rejects} == REASONS
    assert [row for row in items if row["fate"] == "rejected"] == rejects
    kept = {row["key"]: row for row in items if row["fate"] == "kept"}
    assert set(kept) == {f"good{n}" for n in range(GOOD_VIDEOS)} | {f"still{n}" for n in range(GOOD_IMAGES)}
    assert (kept["good1"]["clips"], kept["good1"]["frame_rate"]) == (2, pytest.approx(30, rel=0.01))
    assert "19 inputs = 12 kept + 0 filtered + 7 rejected" in finished.printed
    for reason in REASONS.values():
        assert f"1 rejected: {reason}" in finished.printed


def test_a_second_run_has_nothing_to_do_and_another_config_is_refused(finished: Finished, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")}
    job.run(load(job.DataprepConfig, finished.yaml))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        job.main([str(finished.yaml), "clips.min_frames=20"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "another config" in message
    assert "overwrite" in message
    assert {path: path.stat().st_mtime_ns for path in finished.output.rglob("*")} == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inputs=[/no/such/folder]", "no such file or folder: /no/such/folder"),
        ("inputs=[{empty}]", "nothing to prepare in"),
        ("inputs=[{yaml}]", "is none of: a folder, a WebDataset .tar or a .parquet manifest"),
        ("text.path=/no/such/t5", "text.path: no such folder"),
        ("text.path={empty}", "holds no config.json"),
        ("output={full}", "was not written by dataprep"),
        ("clips.clip_framse=3", "did you mean 'clips.clip_frames'?"),
        ("stages=[{{name: a, hight: 3}}]", "did you mean 'stages[0].height'?"),
        ("stages=[{{name: ../a, height: 3, width: 3, frame_format: raw}}]", "stage's name"),
        ("clips.frame_rate=fast", "clips.frame_rate"),
    ],
)
def test_bad_input_is_one_line_before_spark_starts(
    finished: Finished, tmp_path: Path, capsys: Any, override: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    names = {"empty": tmp_path / "empty", "full": tmp_path / "full", "yaml": finished.yaml}
    with pytest.raises(SystemExit) as caught:
        job.main([str(finished.yaml), f"output={tmp_path / 'out'}", override.format(**names)])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert "starting Spark" not in printed.out


def test_other_thresholds_select_anew_without_media_or_spark(finished: Finished, tmp_path: Path, capsys: Any) -> None:
    """Stricter, then as before: the media are gone meanwhile, and the second result is the first one, byte for byte."""
    shutil.copytree(finished.output, tmp_path / "out")
    options = [str(finished.yaml), f"output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as caught:
        job.main([*options, "select.min_motion=0.3"])
    assert caught.value.code == 2
    assert "overwrite=true selects anew" in capsys.readouterr().err

    rows = pq.read_table(finished.output / "clips.parquet").to_pylist()
    motion = sorted(row["motion"] for row in rows if row["kind"] == "video")
    limit = motion[len(motion) // 2]
    expected = {row["key"] for row in rows if row["kind"] == "image" or row["motion"] >= limit}
    assert 0 < len(rows) - len(expected) < len(rows)
    job.main([*options, f"select.min_motion={limit}", "overwrite=true"])
    printed = capsys.readouterr().out
    assert "starting Spark" not in printed
    assert f"{len(rows) - len(expected)} filtered: still" in printed
    strict = content(tmp_path / "out")
    before = content(finished.output)
    for stage in ("stage1", "stage2"):
        assert set(strict[f"{stage}/videos"]) | set(strict[f"{stage}/images"]) == expected
        assert strict[f"{stage}/videos"].items() <= before[f"{stage}/videos"].items()
    items = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert all(row["reason"] for row in items if row["fate"] != "kept")
    assert {row["fate"] for row in items if row["clips"] and not row["clips_kept"]} <= {"filtered"}

    with pytest.raises(SystemExit) as caught:
        job.main([*options, "select.min_brightness=1", "overwrite=true"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert "nothing was kept of 19 inputs: " in told and f"dark ({len(rows)})" in told
    assert content(tmp_path / "out") == strict

    job.main([*options, "overwrite=true"])
    assert content(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_job_goes_on_under_spark_submit_and_ends_like_an_undisturbed_one(finished: Finished, tmp_path: Path) -> None:
    """The driver is killed with -9 once a part is committed; spark-submit then finishes on one core."""
    output = tmp_path / "out"
    options = [f"output={output}", "spark.master='local[1,3]'"]
    process = subprocess.Popen(
        command(finished.yaml, *options), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while not (committed := list(tmp_path.glob("out.tmp-*/parts/part-*"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()

    spark_submit = Path(sys.executable).with_name("spark-submit")
    submit = [str(spark_submit), "--master", "local[2,3]", "--driver-java-options", job.QUICK_JAVA]
    submit += [str(ROOT / "dataprep/run.py"), str(finished.yaml)]
    resumed = execute([*submit, f"output={output}"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert f"of {-(-19 // 2)} partitions done before" in resumed.stdout, (committed, resumed.stdout)
    assert content(output) == content(finished.output)
    keys = ["key", "fate", "reason", "clips"]
    again, first = (pq.read_table(folder / "items.parquet", columns=keys) for folder in (output, finished.output))
    assert again == first
    with contextlib.suppress(FileNotFoundError):  # the killed job's orphans may still be writing there
        assert not [path for path in tmp_path.iterdir() if path != output and any(path.rglob("part.json"))]


def test_shipped_yamls_are_whole() -> None:
    production = load(job.DataprepConfig, ROOT / "yamls/dataprep.yaml")
    assert [(stage.height, stage.width, stage.frame_format) for stage in production.stages] == [
        (36, 64, "raw"),
        (288, 512, "jpeg"),
    ]
    demo = load(job.DataprepConfig, ROOT / "yamls/demo/dataprep.yaml")
    for frame_rate in (24, 12, 8):  # 8 frames at each of the demo's rates
        assert demo.clips.frame_rate % frame_rate == 0
        assert demo.clips.min_frames >= 7 * demo.clips.frame_rate / frame_rate + 1


@pytest.mark.slow
def test_the_same_inputs_in_s3_give_the_same_samples(finished: Finished, tmp_path: Path, monkeypatch: Any) -> None:
    server = Server()
    try:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("S3_ENDPOINT_URL", server.endpoint),
        ):
            monkeypatch.setenv(name, value)
        server.client.create_bucket(Bucket="media")
        inputs = finished.yaml.parent / "in"
        for path in inputs.iterdir():
            server.client.put_object(Bucket="media", Key=f"in/{path.name}", Body=path.read_bytes())
        done = execute(command(finished.yaml, "inputs=[s3://media/in]", f"output={tmp_path / 'out'}"), tmp_path)
        assert done.returncode == 0, done.stderr
    finally:
        server.process.kill()
        server.process.wait()
    assert content(tmp_path / "out") == content(finished.output)
    keys = ["key", "fate", "reason", "clips"]
    remote, local = (pq.read_table(folder / "items.parquet", columns=keys) for folder in (tmp_path / "out", finished.output))
    assert sorted(map(str, remote.to_pylist())) == sorted(map(str, local.to_pylist()))


@pytest.mark.slow
def test_what_is_nobodys_fault_is_told_in_one_line(finished: Finished, tmp_path: Path) -> None:
    """A missing encoder or a full disk rejects no item: the job fails after three tries, and leaves no dataset."""
    done = execute(command(finished.yaml, f"output={tmp_path / 'out'}", "text.path=no-such-name"), tmp_path)
    assert done.returncode == 2
    assert "error: a partition failed for good: " in done.stderr.splitlines()[-1]
    assert "run again to go on" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
