import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from model.config import UserError
from model.data import shards
from model.data.dataset import build_loader
from model.data.shards import find_fault, open_source


@pytest.fixture
def videos(tmp_path, write_dataset) -> Path:
    """37 videos in 10 shards."""
    return write_dataset(tmp_path / "videos", "videos", 37)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def keys(loader) -> list[str]:
    return [key for batch in loader for key in batch["key"]]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (flip_a_byte, "do not have the xxh64 that the index says"),
        (cut, r"bytes long, the index says"),
        (Path.unlink, "no such file"),
    ],
)
def test_a_damaged_or_missing_shard_is_found_before_training(videos, config, damage, what: str) -> None:
    damage(videos / "shard.00006.mds")
    with pytest.raises(UserError, match=rf"shard.00006.mds: .*{what}") as error:
        build_loader(config(videos=videos), 4)
    assert "\n" not in str(error.value)
    # Processes share the work: the one whose part it is finds it.
    source = open_source(str(videos), None)
    assert [find_fault(source, part, 4, True) is not None for part in range(4)] == [False, False, True, False]
    assert (find_fault(source, 0, 1, hashes=False) is None) == (damage is flip_a_byte)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(bytes(path.stat().st_size))])
def test_a_shard_that_goes_bad_during_training_ends_it_and_is_named(videos, config, workers: int, damage) -> None:
    loader = build_loader(config(videos=videos, workers=workers), 4).dataloader
    iterator = iter(loader)
    next(iterator)
    for number in range(10):
        damage(videos / f"shard.{number:05d}.mds")
    with pytest.raises(UserError, match=r"^\S*videos/shard\.\d{5}\.mds: ") as error:
        list(iterator)
    assert "\n" not in str(error.value)


def test_one_missing_shard_does_not_shorten_the_epoch_silently(videos, config) -> None:
    loader = build_loader(config(videos=videos, workers=2), 4).dataloader
    (videos / "shard.00003.mds").unlink()
    with pytest.raises(UserError, match=r"shard\.00003\.mds"):
        list(loader)


def edited(entry: dict, **changes) -> dict:
    return {**entry, **changes}


HOSTILE = [
    (lambda e: edited(e, raw_data={**e["raw_data"], "basename": "../../../etc/passwd"}), "lies outside of the dataset's folder"),
    (lambda e: edited(e, raw_data={**e["raw_data"], "basename": "/etc/passwd"}), "lies outside of the dataset's folder"),
    (lambda e: edited(e, column_encodings=["pkl"] * 8), "does not have the columns of schema version 1"),
    (lambda e: edited(e, column_names=[f"c{n}" for n in range(8)]), "does not have the columns of schema version 1"),
    (lambda e: edited(e, format="csv"), "does not have the columns"),
    (lambda e: edited(e, compression="zstd"), "is compressed"),
    (lambda e: edited(e, samples=10**12), "cannot hold 1000000000000 samples"),
    (lambda e: edited(e, samples=-1), "cannot hold -1 samples"),
    (lambda e: edited(e, raw_data={**e["raw_data"], "hashes": {}}), "has no hash"),
    (lambda e: edited(e, raw_data=None), "not an index of MDS shards"),
    (lambda e: edited(e, samples="many"), "not an index of MDS shards"),
    (lambda e: "shard", "not an index of MDS shards"),
]


@pytest.mark.parametrize(("change", "what"), HOSTILE)
def test_indices_that_no_dataprep_wrote_are_refused(videos, config, change, what: str) -> None:
    index = json.loads((videos / "index.json").read_text())
    index["shards"][2] = change(index["shards"][2])
    (videos / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=what) as error:
        build_loader(config(videos=videos), 4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2", '"text"', "{}", "\xff"])
def test_an_index_that_is_no_index(videos, config, text: str) -> None:
    (videos / "index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"index\.json: "):
        build_loader(config(videos=videos), 4)
    (videos / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json"):
        build_loader(config(videos=videos), 4)


class Bucket(SimpleHTTPRequestHandler):
    """The part of S3's protocol that downloads need: HEAD and GET of /BUCKET/KEY."""

    requests: list[str]
    failures: dict[str, int]  # how often a GET of a path is answered with damaged contents

    def do_GET(self) -> None:
        self.requests.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        if self.failures.get(name, 0):
            self.failures[name] -= 1
            data = bytes(Path(self.translate_path(self.path)).stat().st_size)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        else:
            super().do_GET()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def bucket(tmp_path, videos, monkeypatch) -> Iterator[type[Bucket]]:
    """Serves tmp_path, so that s3://videos is the dataset ``videos``."""
    handler = type("Handler", (Bucket,), {"requests": [], "failures": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(shards, "BACKOFF_SECONDS", 0.01)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler
    server.shutdown()


def test_remote_shards_are_downloaded_once_and_checked(bucket, videos, tmp_path, config) -> None:
    local = build_loader(config(videos=videos), 4).dataloader
    given = config(videos="s3://videos", local=str(tmp_path / "cache"), workers=1)
    expected = keys(local)
    bucket.failures = {"shard.00004.mds": 4}  # the fifth attempt works
    assert keys(build_loader(given, 4).dataloader) == expected
    downloads = [path for path in bucket.requests if path.endswith(".mds")]
    assert len(downloads) == 10 + 4
    # A damaged copy is found at the next start and downloaded again; the whole ones stay.
    copies = next((tmp_path / "cache").glob("*/shard.00001.mds")).parent
    assert not list(copies.glob("*.partial"))
    flip_a_byte(copies / "shard.00001.mds")
    bucket.requests.clear()
    assert keys(build_loader(given, 4).dataloader) == expected
    assert [path for path in bucket.requests if path.endswith(".mds")] == ["/videos/shard.00001.mds"]


def test_remote_shards_that_stay_damaged_or_are_missing_are_named(bucket, videos, tmp_path, config) -> None:
    given = config(videos="s3://videos", local=str(tmp_path / "cache"), workers=1)
    bucket.failures = {"shard.00004.mds": 1000}
    with pytest.raises(UserError, match=r"shard\.00004\.mds: the download from s3://videos is damaged"):
        list(build_loader(given, 4).dataloader)
    bucket.failures = {}
    (videos / "shard.00004.mds").unlink()
    with pytest.raises(UserError, match=r"shard\.00004\.mds: .*not found"):
        list(build_loader(given, 4).dataloader)
    with pytest.raises(UserError, match=r"s3://none/manifest\.json: .*not found"):
        build_loader(dataclasses.replace(given, videos="s3://none"), 4)
    with pytest.raises(UserError, match="Unsupported remote path"):
        build_loader(dataclasses.replace(given, videos="ftp3://none"), 4)


def test_another_version_at_the_same_address_is_not_mixed_with_the_cached_one(
    bucket, videos, tmp_path, config, write_dataset
) -> None:
    given = config(videos="s3://videos", local=str(tmp_path / "cache"))
    first = keys(build_loader(given, 4).dataloader)
    for file in videos.iterdir():
        file.unlink()
    write_dataset(videos, "videos", 37, edit=lambda row: row.update(key="new " + row["key"]))
    assert keys(build_loader(given, 4).dataloader) == ["new " + key for key in first]


def test_a_limit_on_local_copies_holds(bucket, videos, tmp_path, config) -> None:
    expected = keys(build_loader(config(videos=videos), 4).dataloader)
    given = config(videos="s3://videos", local=str(tmp_path / "cache"), local_limit="60kb")
    loader = build_loader(given, 4).dataloader
    most = 0
    seen = []
    for batch in loader:
        seen += batch["key"]
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.mds*")))
    assert seen == expected
    assert 30_000 < most <= 60 * 1024 + 10_000  # of about 85 kB; a shard that is being downloaded is not counted yet
    with pytest.raises(UserError, match=r"[Cc]ache limit"):
        build_loader(dataclasses.replace(given, local_limit="20kb"), 4)


KILLED = """
import json, os, sys, time
from model.data.dataset import DataConfig, build_loader
config = json.loads(sys.argv[1])
iterator = iter(build_loader(DataConfig(**{**config, "frame_rates": tuple(config["frame_rates"])}), 4).dataloader)
next(iterator)
print("running", flush=True)
time.sleep(100)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_does_not_keep_the_next_from_starting(bucket, videos, tmp_path, config) -> None:
    given = config(videos="s3://videos", local=str(tmp_path / "cache"), workers=2)
    expected = keys(build_loader(config(videos=videos), 4).dataloader)
    before = set(Path("/dev/shm").iterdir())
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, json.dumps(dataclasses.asdict(given))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"

        os.killpg(process.pid, signal.SIGKILL)  # with its loader processes and the one that cleans up shared memory
        process.wait()
    left = set(Path("/dev/shm").iterdir()) - before
    try:
        assert left
        assert keys(build_loader(given, 4).dataloader) == expected
    finally:
        for path in left:
            path.unlink(missing_ok=True)
