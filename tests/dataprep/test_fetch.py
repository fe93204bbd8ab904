"""Bytes from other machines: what may pass is waited for, what is refused has a reason, and no address leads inside."""

import dataclasses
import io
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprep import fetch, ingest, listing, spans
from dataprep.fetch import FAILED, REFUSED, FetchConfig
from dataprep.filters import Rejected
from dataprep.ingest import Item
from model.data import transfer
from model.errors import UserError
from tests.dataprep.servers import Web, web
from tests.dataprep.test_ingest import tar_of
from tests.model.data.conftest import Server


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    with web() as served:
        yield served


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def bucket(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An empty bucket "media" and its client."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", "/nonexistent"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent"),
        ("S3_ENDPOINT_URL", server.endpoint),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", 0.01)
    fetch._s3.cache_clear()
    server.fail()
    client = server.client
    client.create_bucket(Bucket="media")
    yield client
    for entry in client.list_objects_v2(Bucket="media").get("Contents", []):
        client.delete_object(Bucket="media", Key=entry["Key"])
    client.delete_bucket(Bucket="media")
    fetch._s3.cache_clear()


def allowed(site: Web, **changes: Any) -> FetchConfig:
    return FetchConfig(private_hosts=(site.host,), **changes)


def read(address: str, config: FetchConfig, *span: Any) -> bytes:
    with fetch.fetch(address, config, *span) as file:
        return file.read()


def refusal(address: str, config: FetchConfig, *span: Any) -> tuple[str, str]:
    with pytest.raises(Rejected) as caught:
        fetch.fetch(address, config, *span)
    return caught.value.reason, caught.value.detail


def test_a_file_and_a_stretch_of_it(site: Web) -> None:
    site.files["a b.mp4"] = bytes(range(256)) * 1000
    address = site.address("a%20b.mp4")
    site.files["a%20b.mp4"] = site.files["a b.mp4"]
    assert read(address, allowed(site)) == site.files["a b.mp4"]
    assert read(address, allowed(site), 300, 20) == bytes(range(44, 64))
    assert read(address, allowed(site), 300, 0) == b""
    found = fetch.look(address, allowed(site))
    assert found.size == 256_000
    assert read(address, allowed(site), 0, 3, found.version) == bytes(range(3))
    site.files["a%20b.mp4"] += b"more"
    assert refusal(address, allowed(site), 0, 3, found.version) == (FAILED, f"{address}: changed since it was listed")


@pytest.mark.parametrize("fault", [503, 429, 500, "cut", "silent"])
def test_what_may_pass_is_tried_again_and_then_given_up(site: Web, monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(transfer, "READ_SECONDS", 0.3)
    fetch._http.cache_clear()
    site.files["x"] = bytes(100_000)
    site.faults["x"] = [fault] * 2
    assert read(site.address("x"), allowed(site)) == bytes(100_000)
    site.requests.clear()
    site.faults["x"] = [fault] * 3
    reason, detail = refusal(site.address("x"), allowed(site))
    assert reason == FAILED
    assert detail.startswith(site.address("x") + ": ")
    assert "(attempt 3 of 3)" in detail
    assert len(site.requests) == 3
    fetch._http.cache_clear()


@pytest.mark.parametrize("fault", [404, 403, 401, 410, 304, (200, {"Content-Encoding": "gzip"}), (206, {})])
def test_what_is_refused_is_asked_once(site: Web, fault: Any) -> None:
    site.files["x"] = b"data"
    site.faults["x"] = [fault]
    assert refusal(site.address("x"), allowed(site))[0] == REFUSED
    assert len(site.requests) == 1


def test_nobody_there(site: Web) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    config = FetchConfig(private_hosts=("127.0.0.1", "no-such-host.invalid"), attempts=2)
    assert refusal(f"http://127.0.0.1:{port}/x", config)[0] == FAILED
    assert refusal("http://no-such-host.invalid/x", config)[0] == FAILED


def test_no_more_than_the_limit_is_taken(site: Web) -> None:
    site.files.update(large=bytes((1 << 20) + 1), right=bytes(1 << 20), endless=b"")
    config = allowed(site, max_file_mb=1)
    assert len(read(site.address("right"), config)) == 1 << 20
    assert refusal(site.address("large"), config) == (
        REFUSED,
        f"{site.address('large')}: {(1 << 20) + 1} bytes, more than fetch.max_file_mb=1",
    )
    site.faults["endless"] = ["endless"]
    assert refusal(site.address("endless"), config) == (
        REFUSED,
        f"{site.address('endless')}: more than fetch.max_file_mb=1",
    )
    assert refusal(site.address("right"), config, 0, 2 << 20)[0] == REFUSED


def test_a_server_without_ranges_is_told(site: Web) -> None:
    site.files["x"] = bytes(1000)
    site.faults["x"] = ["no ranges"]
    reason, detail = refusal(site.address("x"), allowed(site), 100, 10)
    assert (reason, "answers no ranges" in detail) == (REFUSED, True)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "127.0.0.1.", "user@127.0.0.1"],
)
def test_no_address_leads_to_this_machine(site: Web, host: str) -> None:
    for config in (FetchConfig(), FetchConfig(private_hosts=("10.0.0.1", f"127.0.0.1:{site.port + 1}"))):
        reason, detail = refusal(f"http://{host}:{site.port}/x", dataclasses.replace(config, attempts=1))
        assert reason == REFUSED or "127.0.0.1." in host  # which some resolvers do not know
        assert "no public address" in detail or "127.0.0.1." in host
    assert site.requests == []


@pytest.mark.parametrize(
    "address",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://10.1.2.3/x",
        "http://192.168.1.1/x",
        "http://[fd00::1]/x",
        "http://100.64.0.1/",
    ],
)
def test_nor_to_its_neighbours(address: str) -> None:
    reason, detail = refusal(address, FetchConfig(attempts=1))
    assert (reason, "no public address" in detail) == (REFUSED, True)


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1/x",
        "HTTP://127.0.0.1/",
        "data://x",
        "s3://",
        "s3://bucket",
        "http://",
    ],
)
def test_only_three_kinds_of_address_are_asked(address: str) -> None:
    assert refusal(address, FetchConfig(attempts=1))[0] == REFUSED


def test_redirects_are_followed_to_where_one_might_have_gone_anyway(site: Web) -> None:
    site.files["end"] = b"the end"
    site.faults["start"] = [(302, {"Location": "/middle"})] * 2
    site.faults["middle"] = [(307, {"Location": site.address("end")})] * 2
    assert read(site.address("start"), allowed(site)) == b"the end"
    assert read(site.address("start"), allowed(site), 4, 3) == b"end"
    site.faults["round"] = [(301, {"Location": "round"})] * 10
    assert "more than 5 times" in refusal(site.address("round"), allowed(site))[1]
    with web() as inside:
        inside.files["secret"] = b"secret"
        for target in (
            "file:///etc/passwd",
            "s3://bucket/x",
            inside.address("secret"),
            f"//127.0.0.1:{inside.port}/secret",
            f"http://localhost:{inside.port}/secret",
            "http://169.254.169.254/latest",
            "http://[::1",
            "",
        ):
            site.faults["out"] = [(302, {"Location": target})]
            assert refusal(site.address("out"), allowed(site))[0] == REFUSED, target
        assert inside.requests == []


def test_a_full_disk_is_not_the_items_fault(site: Web) -> None:
    """It is raised as what it is, not as a row: the limit on the size of files stands for the disk's."""
    site.files["x"] = bytes(1_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            fetch.fetch(site.address("x"), allowed(site))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(site.requests) == 1


def contents(items: list[Item], config: FetchConfig) -> dict[str, tuple[str, str, bytes]]:
    found = {}
    for item in items:
        if not item.reason:
            assert item.media is not None
            with spans.open_span(item.media, config) as file:
                found[item.key] = (item.kind, ingest.read_caption(item, config), file.read())
    return found


MEDIA = {
    "plain/a.mp4": b"video a",
    "plain/a.txt": b"caption a",
    "plain/a.n.png": b"image n",
    "plain/a.n.json": b'{"caption": "caption n"}',
    "b 1%20.jpg": b"image b",
    "b 1%20.txt": b"caption b",
    "../up.png": b"image up",
    "../up.txt": b"caption up",
    "widow.txt": b"alone",
    ".hidden/x.png": b"x",
}
EXPECTED = {
    "plain/a": ("video", "caption a", b"video a"),
    "plain/a.n": ("image", "caption n", b"image n"),
    "b 1%20": ("image", "caption b", b"image b"),
    "../up": ("image", "caption up", b"image up"),
}
ROWS = {"t0": ("video", "caption t0", b"in tar 0"), "t1": ("video", "caption t1", b"in tar 1" * 50_000)}


def small_tar() -> bytes:
    members = {f"{key}.mp4": data for key, (_, _, data) in ROWS.items()}
    return tar_of({**members, **{f"{key}.txt": caption.encode() for key, (_, caption, _) in ROWS.items()}})


def manifest(rows: list[tuple[str, str, str]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(zip(("path", "caption", "key"), map(list, zip(*rows, strict=True)), strict=True))), buffer)
    return buffer.getvalue()


def test_a_folder_in_s3(bucket: Any) -> None:
    for name, data in MEDIA.items():
        bucket.put_object(Bucket="media", Key=f"deep/set/{name}", Body=data)
    bucket.put_object(Bucket="media", Key="deep/set/sub/part.tar", Body=small_tar())
    rows = [("../c.mp4", "from the manifest", "mine"), ("s3://media/other/d.png", "elsewhere", "d")]
    bucket.put_object(Bucket="media", Key="deep/set/list/m.parquet", Body=manifest(rows))
    bucket.put_object(Bucket="media", Key="deep/set/c.mp4", Body=b"video c")
    bucket.put_object(Bucket="media", Key="other/d.png", Body=b"image d")
    bucket.put_object(Bucket="media", Key="deep/set2/no.png", Body=b"of another folder")
    items = list(listing.list_items(["s3://media/deep/set/"]))
    assert contents(items, fetch.DEFAULTS) == {
        **EXPECTED,
        **ROWS,
        "mine": ("video", "from the manifest", b"video c"),
        "d": ("image", "elsewhere", b"image d"),
    }
    assert {item.key: item.reason for item in items if item.reason} == {"widow": "caption without media"}

    marks = {item.key: ingest.fingerprint(item) for item in items}
    assert marks == {item.key: ingest.fingerprint(item) for item in listing.list_items(["s3://media/deep/set"])}
    bucket.put_object(Bucket="media", Key="deep/set/plain/a.txt", Body=b"caption A")
    after = {item.key: ingest.fingerprint(item) for item in listing.list_items(["s3://media/deep/set"])}
    assert {key for key in marks if marks[key] != after[key]} == {"plain/a"}


def test_more_objects_than_a_page(bucket: Any, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(25):
        bucket.put_object(Bucket="media", Key=f"{n:02d}.png", Body=b"x")
    client = fetch._s3().client
    monkeypatch.setattr(client, "list_objects_v2", lambda **options: bucket.list_objects_v2(MaxKeys=10, **options))
    assert [name for name, _ in fetch.list_s3("s3://media")] == [f"{n:02d}.png" for n in range(25)]


def test_objects_that_are_not_there(bucket: Any) -> None:
    assert refusal("s3://media/gone.mp4", fetch.DEFAULTS)[0] == REFUSED
    assert refusal("s3://no-such-bucket/x.mp4", fetch.DEFAULTS)[0] == REFUSED
    for address in ("s3://no-such-bucket/folder", "s3://media/gone.tar", "s3://media/gone.parquet", "s3://media/empty"):
        with pytest.raises(UserError, match=address):
            list(listing.list_items([address]))


def test_tars_and_manifests_over_http(site: Web, bucket: Any) -> None:
    config = allowed(site)
    bucket.put_object(Bucket="media", Key="far.mp4", Body=b"far video")
    site.files["sets/part.tar"] = small_tar()
    rows = [
        ("near.png", "near", "near"),
        (site.address("x/y.mp4?token=secret"), "whole address", ""),
        ("s3://media/far.mp4", "far", "far"),
        (site.address("gone.mp4"), "gone", "gone"),
        ("file:///etc/passwd.png", "local", "local"),
        ("/etc/passwd.png", "root of the host", "root"),
        ("http://[::1/x.png", "no address", "none"),
        ("http://169.254.169.254/x.png", "a neighbour", "cloud"),
    ]
    site.files.update({"sets/m.parquet": manifest(rows), "sets/near.png": b"near image", "x/y.mp4": b"y", "etc/passwd.png": b"p"})
    tar = list(listing.list_items([site.address("sets/part.tar")], config))
    assert contents(tar, config) == ROWS
    items = list(listing.list_items([site.address("sets/m.parquet?a=b")], config))
    by_key = {item.key: item for item in items}
    assert by_key["local"].reason == by_key["none"].reason == REFUSED
    assert not any("secret" in item.source for item in items)
    unusual = {"gone": REFUSED, "cloud": REFUSED}
    for key, reason in unusual.items():
        item = by_key.pop(key)
        assert item.media is not None
        with pytest.raises(Rejected) as caught:
            spans.open_span(item.media, config)
        assert caught.value.reason == reason
    assert contents(list(by_key.values()), config) == {
        "near": ("image", "near", b"near image"),
        f"127.0.0.1:{site.port}/x/y": ("video", "whole address", b"y"),
        "far": ("video", "far", b"far video"),
        "root": ("image", "root of the host", b"p"),
    }


def test_a_tar_is_listed_by_its_headers(site: Web) -> None:
    large = {f"{n}.mp4": bytes([n]) * 1_000_000 for n in range(8)}
    site.files["large.tar"] = tar_of(large)
    items = list(listing.list_items([site.address("large.tar")], allowed(site)))
    assert len(items) == 8
    asked = sum(int(end) - int(begin) + 1 for begin, end in (span.removeprefix("bytes=").split("-") for _, span in site.requests))
    assert asked < len(site.files["large.tar"]) / 5
    site.files["large.tar"] = tar_of({"first.mp4": bytes(10), **large})  # members now lie elsewhere
    assert items[3].media is not None
    assert refusal(items[3].media.path, allowed(site), items[3].media.offset, 10, items[3].media.version)[0] == FAILED


@pytest.mark.parametrize("name", ["part.tar", "m.parquet", "other.zip", "folder/"])
def test_an_input_that_cannot_be_listed_ends_the_job(site: Web, name: str) -> None:
    """Its items would otherwise seem to be gone, and their samples would be removed."""
    site.faults[name] = [503] * 10
    with pytest.raises(UserError, match=f"inputs: {site.address(name)}"):
        list(listing.list_items([site.address(name)], allowed(site)))
    with pytest.raises(UserError, match="inputs: ftp://host/x.tar: only http"):
        list(listing.list_items(["ftp://host/x.tar"]))


def test_names_beside_an_address() -> None:
    for base, name, expected in (
        ("s3://b/x/m.parquet", "../../../y.png", "s3://b/y.png"),
        ("s3://b/x/m.parquet", "/y z.png", "s3://b/y z.png"),
        ("s3://b/x/m.parquet", "./a//b.png", "s3://b/x/a/b.png"),
        ("http://h/x/m.parquet?q=1", "a b#.png", "http://h/x/a%20b%23.png"),
        ("http://h/x/m.parquet", "//evil/y.png", "http://h/evil/y.png"),
        ("http://h/x/m.parquet", "../../../y.png", "http://h/y.png"),
        ("http://h/x/m.parquet", "javascript:x.png", "http://h/x/javascript%3Ax.png"),
        ("http://h/x/m.parquet", "https://other/y.png", "https://other/y.png"),
    ):
        assert fetch.beside(base, name) == expected


def test_hosts_of_inputs() -> None:
    addresses = ["http://a/x.tar", "https://b/y.tar", "http://c:8080/z", "/local", "s3://d/e"]
    assert fetch.hosts(addresses) == ("a:80", "b:443", "c:8080")
    assert Path(fetch.name_of("http://h/a%20b.mp4?x=.tar")).suffix == ".mp4"
