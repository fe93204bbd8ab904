"""Loader processes that end at once, a data set, and an S3 server that holds it."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from torch.utils.data import _utils

from model.data import transfer


@pytest.fixture(autouse=True)
def impatient_loaders(monkeypatch) -> None:
    """A loader that the garbage collector finds waits this long for each of its processes; it has closed their queues already."""
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.5)


class Server:
    """An S3 server in a process of its own, behind faults, with the dataset of the test at ``address``."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("s3_server.py")
        self.process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self._buckets = 0
        self.address = ""

    def upload(self, folder: Path) -> None:
        """The files of ``folder`` as objects of a new bucket."""
        self._buckets += 1
        bucket = f"data-{self._buckets}"
        self.address = f"s3://{bucket}/stage1/videos"
        self.client.create_bucket(Bucket=bucket)
        for file in folder.iterdir():
            self.put(file.name, file.read_bytes())

    def put(self, name: str, data: bytes) -> None:
        self.client.put_object(**self._object(name), Body=data)

    def read(self, name: str) -> bytes:
        return self.client.get_object(**self._object(name))["Body"].read()

    def delete(self, name: str) -> None:
        self.client.delete_object(**self._object(name))

    def fail(self, **faults: list[int | str]) -> None:
        """What comes next, by the object's name without its ending; and the requests so far are forgotten."""
        names = {"manifest": "manifest.json", "index": "index.json"}
        ordered = {names.get(name, f"{name.replace('_', '.')}.mds"): fault for name, fault in faults.items()}
        self._call("/-/faults", json.dumps(ordered).encode())

    @property
    def downloads(self) -> list[str]:
        """Names of the shards that were asked for, in order."""
        paths = json.loads(self._call("/-/requests"))
        return [path.rsplit("/", 1)[-1] for path in paths if path.endswith(".mds")]

    def lock(self, allowed: int) -> None:
        """Check signatures and permissions from now on, after ``allowed`` further requests."""
        self._call("/moto-api/reset-auth", str(allowed).encode(), "POST")

    @property
    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")

    def _object(self, name: str) -> dict[str, str]:
        bucket, _, prefix = self.address.removeprefix("s3://").partition("/")
        return {"Bucket": bucket, "Key": f"{prefix}/{name}"}

    def _call(self, path: str, data: bytes | None = None, method: str | None = None) -> bytes:
        request = urllib.request.Request(
            self.endpoint + path, data, {"Content-Type": "text/plain"}, method=method or ("PUT" if data else "GET")
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
            return answer.read()


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[], Server]]:
    """A server for all tests, a new one where a test has ended the last."""
    started: list[Server] = []

    def running() -> Server:
        if not started or started[-1].process.poll() is not None:
            started.append(Server())
        return started[-1]

    yield running
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def videos(tmp_path, write_dataset) -> Path:
    """37 videos in 10 shards."""
    return write_dataset(tmp_path / "videos", "videos", 37)


@pytest.fixture
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """Credentials, and no long pauses."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    return monkeypatch


@pytest.fixture
def s3(servers, videos, environment) -> Server:
    """A server that holds ``videos``."""
    server = servers()
    environment.setenv("S3_ENDPOINT_URL", server.endpoint)
    server.fail()
    server.upload(videos)
    return server


@pytest.fixture
def remote(s3, tmp_path, config) -> Any:
    """A config that reads ``videos`` from the server."""
    return config(videos=s3.address, local=str(tmp_path / "cache"))
