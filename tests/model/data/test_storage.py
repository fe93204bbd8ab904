import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from streaming.base.dataset import _Iterator, _ShardState

from model.data import transfer
from model.data.dataset import build_loader
from model.data.storage import Storage
from model.errors import UserError


def keys(loader) -> list[str]:
    return [key for batch in loader for key in batch["key"]]


def epoch(given) -> list[str]:
    """The keys of a first epoch."""
    return keys(build_loader(given, 4).dataloader)


def fault_of(given) -> str:
    """The one line that a first epoch stops with."""
    with pytest.raises(UserError) as error:
        epoch(given)
    assert "\n" not in str(error.value)
    return str(error.value)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_downloaded_once_and_checked(s3, remote, videos, tmp_path, config, workers: int) -> None:
    given = dataclasses.replace(remote, workers=workers)
    expected = epoch(config(videos=videos))
    assert epoch(given) == expected
    assert sorted(s3.downloads) == [f"shard.{number:05d}.mds" for number in range(10)]
    # A damaged copy is found at the next start and downloaded again; the whole ones stay.
    copies = next((tmp_path / "cache").glob("*/shard.00001.mds")).parent
    assert {path.name for path in copies.iterdir()} == {path.name for path in videos.iterdir()}
    flip_a_byte(copies / "shard.00001.mds")
    s3.fail()
    assert epoch(given) == expected
    assert s3.downloads == ["shard.00001.mds"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_passes_is_waited_for(s3, remote, videos, config, workers: int) -> None:
    s3.fail(
        manifest=[503, 500], index=[429], shard_00004=[503] * 3, shard_00006=["zeros", "cut", 503, 500, 408], shard_00002=["cut"]
    )
    assert epoch(dataclasses.replace(remote, workers=workers)) == epoch(config(videos=videos))
    assert len(s3.downloads) == 10 + 3 + 5 + 1


def test_pauses_grow_and_end(s3, remote, environment) -> None:
    pauses = []
    environment.setattr(transfer, "BACKOFF_SECONDS", 1.0)
    me, wait = threading.current_thread(), threading.Event.wait

    def watched(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is not me:  # a progress bar's, say
            return wait(event, timeout)
        pauses.append(timeout)
        return False

    environment.setattr(threading.Event, "wait", watched)
    s3.fail(manifest=[503] * 100)
    with pytest.raises(UserError, match=r"manifest\.json at .*: .*\(SlowDown, HTTP 503\) \(attempt 6 of 6\)"):
        Storage(s3.address).fetch("manifest.json", Path(remote.local, "manifest.json"))
    assert len(pauses) == 5
    assert all(2**attempt / 2 <= pause <= 2**attempt for attempt, pause in enumerate(pauses))
    assert not list(Path(remote.local).iterdir())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("zeros", "checksum"),
        ("cut", "."),
        (503, "SlowDown, HTTP 503"),
    ],
)
def test_a_shard_that_stays_bad_is_named(s3, remote, workers: int, fault, what: str) -> None:
    s3.fail(shard_00004=[fault] * 1000)
    line = fault_of(dataclasses.replace(remote, workers=workers))
    assert line.startswith(f"{s3.address}/shard.00004.mds at {s3.endpoint}: ")
    assert what in line
    assert "attempt" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_named_at_once(s3, remote, workers: int) -> None:
    s3.delete("shard.00004.mds")
    line = fault_of(dataclasses.replace(remote, workers=workers))
    assert line.startswith(f"{s3.address}/shard.00004.mds at {s3.endpoint}: ")
    assert "NoSuchKey, HTTP 404" in line
    assert s3.downloads.count("shard.00004.mds") < transfer.ATTEMPTS * max(workers, 1)  # ahead of its use, and for its use


def test_a_damaged_object_is_named(s3, remote) -> None:
    s3.put("shard.00004.mds", bytes(len(s3.read("shard.00004.mds"))))
    line = fault_of(remote)
    assert line.startswith(f"{s3.address}/shard.00004.mds at {s3.endpoint}: damaged: its contents do not have the xxh64")


def test_a_shard_of_another_length_is_not_downloaded(s3, remote) -> None:
    s3.put("shard.00004.mds", bytes(10**6))
    assert "damaged: 1000000 bytes long, the index says " in fault_of(remote)


@pytest.mark.parametrize(
    ("file", "change", "what"),
    [
        (
            "manifest.json",
            lambda text: text.replace('"height": 6', '"height": 12'),
            "frame height is 12, but the config asks for 6",
        ),
        ("manifest.json", lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), "schema version 9"),
        ("manifest.json", lambda text: text[:-10], "not valid JSON"),
        ("manifest.json", lambda text: "<html>Welcome</html>", "not valid JSON"),
        ("index.json", lambda text: text[:100], "is this a dataset that dataprep finished"),
        ("index.json", lambda text: text.replace("shard.00004.mds", "../../shard.mds"), "lies outside of the dataset's folder"),
    ],
)
def test_a_foreign_dataset_is_refused(s3, remote, file: str, change: Callable[[str], str], what: str) -> None:
    s3.put(file, change(s3.read(file).decode()).encode())
    line = fault_of(remote)
    assert line.startswith(f"{s3.address}: ")
    assert what in line
    assert not s3.downloads


def test_addresses_where_nothing_is(s3, remote) -> None:
    for address, what in [
        ("s3://data-1/none", "s3://data-1/none/manifest.json at .*NoSuchKey, HTTP 404"),
        ("s3://no-such-bucket/none", "s3://no-such-bucket/none/manifest.json at .*NoSuchBucket, HTTP 404"),
        ("s3://UPPER case/none", "UPPER case/none/manifest.json at .*Invalid bucket name"),
        ("ftp3://none", "Unsupported remote path"),
    ]:
        with pytest.raises(UserError, match=what):
            build_loader(dataclasses.replace(remote, videos=address), 4)


def test_wrong_credentials(s3, remote, environment) -> None:
    s3.lock(0)
    try:
        line = fault_of(remote)
        assert line.startswith(f"{s3.address}/manifest.json at {s3.endpoint}: ")
        assert "InvalidAccessKeyId, HTTP 403): check the credentials" in line
        s3.lock(5)  # manifest, index and three shards
        assert f"{s3.address}/shard." in fault_of(remote)
    finally:
        s3.lock(10**9)
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no credentials: set AWS_ACCESS_KEY_ID" in fault_of(dataclasses.replace(remote, local=remote.local + "2"))


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that answers no attempt to connect: its queue is full."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for client in clients:
            client.close()


def test_an_endpoint_that_cannot_be_reached(remote, silent, environment) -> None:
    environment.setattr(transfer, "CONNECT_SECONDS", 0.2)
    for endpoint in ("http://127.0.0.1:9", "http://no-such-host.invalid:9000", silent, "no address"):
        environment.setenv("S3_ENDPOINT_URL", endpoint)
        begun = time.monotonic()
        line = fault_of(remote)
        assert time.monotonic() - begun < 15
        assert line.startswith(f"{remote.videos}/manifest.json at {endpoint}: ")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_goes_away_in_mid_epoch(s3, remote, workers: int) -> None:
    # Of 10 shards, at most 3 fit: what is ahead cannot all have been downloaded.
    loader = build_loader(dataclasses.replace(remote, workers=workers, local_limit="45kb"), 4).dataloader
    iterator = iter(loader)
    next(iterator)
    s3.process.kill()
    s3.process.wait()
    with pytest.raises(UserError, match=rf"^{s3.address}/shard\.\d{{5}}\.mds at {s3.endpoint}: Could not connect") as error:
        for _ in range(3):
            list(iterator)
            iterator = iter(loader)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_stops_answering_in_mid_epoch(s3, remote, environment, workers: int) -> None:
    environment.setattr(transfer, "READ_SECONDS", 0.5)
    loader = build_loader(dataclasses.replace(remote, workers=workers, local_limit="45kb"), 4).dataloader
    iterator = iter(loader)
    next(iterator)
    os.kill(s3.process.pid, signal.SIGSTOP)
    begun = time.monotonic()
    try:
        with pytest.raises(UserError, match=rf"^{s3.address}/shard\.\d{{5}}\.mds at {s3.endpoint}: .*[Tt]ime(d )?out"):
            for _ in range(3):
                list(iterator)
                iterator = iter(loader)
        assert time.monotonic() - begun < 30
        if not workers:  # its threads would keep the process from ending: with the server silent, 3 s for each shard left
            begun = time.monotonic()
            loader.dataset.parts["videos"]._executor.shutdown(wait=True)
            assert time.monotonic() - begun < 2
    finally:
        os.kill(s3.process.pid, signal.SIGCONT)


def test_a_server_that_is_back_soon(s3, remote, videos, config, environment) -> None:
    environment.setattr(transfer, "READ_SECONDS", 1.0)
    expected = epoch(config(videos=videos))
    iterator = iter(build_loader(dataclasses.replace(remote, workers=1, local_limit="45kb"), 4).dataloader)
    seen = list(next(iterator)["key"])
    os.kill(s3.process.pid, signal.SIGSTOP)
    timer = threading.Timer(2.5, os.kill, (s3.process.pid, signal.SIGCONT))
    timer.start()
    seen += keys(iterator)
    timer.join()
    assert seen == expected


def test_a_download_that_trickles_is_given_up(s3, tmp_path, environment) -> None:
    environment.setattr(transfer, "READ_SECONDS", -1.0)  # no allowance: whatever comes, it comes too slowly
    environment.setattr(transfer, "SLOWEST", 10**9)
    environment.setattr(transfer, "Config", lambda **options: None)  # with the client's own timeouts
    with pytest.raises(UserError, match=r"shard\.00001\.mds at .*: slower than"):
        Storage(s3.address).fetch("shard.00001.mds", tmp_path / "shard")


def test_what_a_killed_download_left_is_removed(s3, remote, videos, tmp_path, config) -> None:
    epoch(remote)
    copies = next((tmp_path / "cache").glob("*/index.json")).parent
    for name, age in {"old.1.2.partial": 3600, "new.1.2.partial": 5}.items():
        (copies / name).write_bytes(b"half")
        os.utime(copies / name, (time.time() - age,) * 2)
    epoch(remote)
    assert [path.name for path in copies.glob("*.partial")] == ["new.1.2.partial"]


def test_another_version_at_the_same_address_is_not_mixed_with_the_cached_one(s3, remote, videos, write_dataset) -> None:
    first = epoch(remote)
    for file in videos.iterdir():
        file.unlink()
    write_dataset(videos, "videos", 37, edit=lambda row: row.update(key="new " + row["key"]))
    for file in videos.iterdir():
        s3.put(file.name, file.read_bytes())
    assert epoch(remote) == ["new " + key for key in first]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_limit_on_local_copies_holds(s3, remote, videos, tmp_path, config, workers: int) -> None:
    local = build_loader(config(videos=videos), 4).dataloader
    loader = build_loader(dataclasses.replace(remote, local_limit="60kb", workers=workers), 4).dataloader
    for _ in range(2):
        seen, most = [], 0
        for batch in loader:
            seen += batch["key"]
            with contextlib.suppress(FileNotFoundError):  # one that made room between being found and being measured
                most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.mds*")))
        assert seen == keys(local)
        assert 30_000 < most <= 60 * 1024 + 10_000 * max(workers, 1)  # of about 85 kB; one on its way is not counted yet
    assert len(s3.downloads) > 10
    with pytest.raises(UserError, match=r"[Cc]ache limit"):
        build_loader(dataclasses.replace(remote, local_limit="20kb"), 4)


def test_a_shard_that_makes_room_before_it_is_seen_is_fetched_again(remote) -> None:
    part = build_loader(remote, 4).dataloader.dataset.parts["videos"]
    part._event = threading.Event()
    part._shard_states[0] = _ShardState.PREPARING  # by another process
    iterator = _Iterator(np.zeros(1, np.int64))
    thread = threading.Thread(target=part._ready_thread, args=(iterator,), daemon=True)
    thread.start()
    time.sleep(0.1)
    assert iterator.ready_index == 0
    part._shard_states[0] = _ShardState.REMOTE  # it came, and made room for others within a blink
    thread.join(10)
    assert iterator.ready_index == 1
    assert (part.source.folder / "shard.00000.mds").is_file()


def test_a_failure_to_make_room_leaves_the_others_their_turn(remote) -> None:
    part = build_loader(dataclasses.replace(remote, local_limit="45kb"), 4).dataloader.dataset.parts["videos"]
    part.cache_usage = 10**9  # of which no shard is left to remove
    with pytest.raises(ValueError, match="no shards present"):
        part.prepare_shard(0)
    assert not part._cache_filelock.is_locked


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
def test_a_run_that_was_killed_does_not_keep_the_next_from_starting(s3, videos, tmp_path, config) -> None:
    given = config(videos=s3.address, local=str(tmp_path / "cache"), workers=2)
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
