"""A real MLflow server that is late, dies, is slow, or loses its answers: nothing that was logged may be missing or double."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from model import tracking
from model.errors import RunError
from model.registry import PublishConfig, TrackingConfig
from model.tracking import Tracking
from pipelines.sync import main as sync

STATE: Any = SimpleNamespace()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``mlflow server`` on a port of its own, over a store that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers=1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{self.folder}/files"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
            assert self.process.poll() is None and time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, 9)
            self.process.wait()
            self.process = None


class Proxy:
    """Stands before a server and misbehaves: ``delay`` seconds before each answer; or loses ``lost`` answers."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.delay = 0.0
        self.lost = 0
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self.target)) as server, contextlib.suppress(OSError):
            threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()
            while data := server.recv(1 << 16):
                time.sleep(self.delay)
                if self.lost:
                    self.lost -= 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)

    @staticmethod
    def _pass_on(client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                server.sendall(data)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SEND_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "PAUSES", (0.1, 0.5))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def begin(address: str, folder: Path, **values: Any) -> Tracking:
    config = TrackingConfig(address, "tests", None, **{"patience": 60.0, **values})
    started = Tracking(config, "run", folder)
    started.init(STATE, STATE)
    return started


def log(destination: Tracking, steps: range) -> None:
    for step in steps:
        destination.log_metrics({"loss": step / 8, "lr": 0.5}, step)


def steps_of(address: str, run_id: str) -> list[int]:
    history = MlflowClient(address).get_metric_history(run_id, "loss")
    assert all(metric.value == metric.step / 8 for metric in history)
    return sorted(metric.step for metric in history)


def end(destination: Tracking, status: tracking.Status = "FINISHED") -> None:
    destination.end(status)
    destination.close(STATE, STATE)


def test_all_that_a_run_logs_is_in_mlflow(server: Server, tmp_path: Path) -> None:
    run = begin(server.address, tmp_path)
    log(run, range(1500))  # more than a request takes
    run.log_hyperparameters({f"p{number}": number for number in range(150)} | {"long": "x" * 9000, "none": None})
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"video")
    run.upload_file(STATE, "samples/step-5/clip.mp4", clip, overwrite=False)
    run.log_text("config/from-step-0.yaml", "a: 1")
    end(run)
    client = MlflowClient(server.address)
    found = client.get_run(str(run.sender.run_id))
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert steps_of(server.address, found.info.run_id) == list(range(1500))
    assert found.data.params["p149"] == "149" and len(found.data.params["long"]) == 6000
    for name, content in {"samples/step-5/clip.mp4": "video", "config/from-step-0.yaml": "a: 1"}.items():
        assert Path(client.download_artifacts(found.info.run_id, name, str(tmp_path))).read_text() == content
    assert not list(run.journal.files.iterdir())


def test_a_successor_takes_up_the_run_and_what_was_not_sent(server: Server, tmp_path: Path) -> None:
    killed = begin(server.address, tmp_path)
    log(killed, range(5))
    assert killed.sender.flush(60)
    killed.sender.stop()
    log(killed, range(5, 9))  # never sent; nothing closes it
    killed.log_hyperparameters({"a": 1})
    successor = begin(server.address, tmp_path)
    successor.log_hyperparameters({"a": 2, "b": 3})
    log(successor, range(9, 12))
    successor.close(STATE, STATE)  # without ``end``: as when an error ends the process
    found = MlflowClient(server.address).get_run(str(successor.sender.run_id))
    assert found.info.run_id == killed.sender.run_id
    assert found.info.status == "FAILED"
    assert steps_of(server.address, found.info.run_id) == list(range(12))
    assert found.data.params == {"a": "1", "b": "3"}, "MLflow does not change a parameter"
    elsewhere = begin(server.address, tmp_path / "elsewhere")  # another run of the same name
    end(elsewhere)
    assert elsewhere.sender.run_id != found.info.run_id


def test_what_mlflow_refuses_is_left_out_alone(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin(server.address, tmp_path)
    log(run, range(2))
    run.log_metrics({"no/such\nname": 1.0}, 2)
    log(run, range(2, 4))
    end(run)
    assert steps_of(server.address, str(run.sender.run_id)) == list(range(4))
    assert "refused, and left out" in capsys.readouterr().out


def test_a_run_that_somebody_deleted_goes_on_as_another(server: Server, tmp_path: Path) -> None:
    run = begin(server.address, tmp_path)
    log(run, range(2))
    assert run.sender.flush(60)
    first = str(run.sender.run_id)
    MlflowClient(server.address).delete_run(first)
    log(run, range(2, 4))
    end(run)
    assert run.sender.run_id != first
    assert steps_of(server.address, str(run.sender.run_id)) == [2, 3]


def test_a_lost_answer_makes_nothing_double(server: Server, tmp_path: Path) -> None:
    proxy = Proxy(server.port)
    run = begin(proxy.address, tmp_path)
    for part in range(5):
        log(run, range(part * 3, part * 3 + 3))
        proxy.lost = part % 3
        assert run.sender.flush(60)
    end(run)
    assert steps_of(server.address, str(run.sender.run_id)) == list(range(15))


def test_a_slow_server_holds_nothing_up(server: Server, tmp_path: Path) -> None:
    proxy = Proxy(server.port)
    run = begin(proxy.address, tmp_path)
    proxy.delay = 1.0
    log(run, range(2000))
    assert run.journal.read()[0], "all was logged before the server has it"
    proxy.delay = 0.0
    end(run)
    assert steps_of(server.address, str(run.sender.run_id)) == list(range(2000))


def test_a_server_that_is_away_at_the_start_or_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server(tmp_path)
    with pytest.raises(RunError) as error:
        begin(server.address, tmp_path / "run")
    hint = "with tracking.absent=spool the run would go on without it"
    assert str(error.value) == f"MLflow at {server.address}: [Errno 111] Connection refused; {hint}"
    run = begin(server.address, tmp_path / "run", absent="spool")
    log(run, range(10))
    run.log_text("notes.txt", "kept")
    assert not run.sender.flush(1.0)
    server.start()
    try:
        assert run.sender.flush(60)
        server.kill()
        log(run, range(10, 20))
        assert not run.sender.flush(1.0)
        server.start()
        end(run)
        told = capsys.readouterr().out
        assert told.count("what is logged waits in") == 2 and told.count("it is back") == 2
        found = MlflowClient(server.address).get_run(str(run.sender.run_id))
        assert steps_of(server.address, found.info.run_id) == list(range(20))
        assert found.info.status == "FINISHED"
        assert [file.path for file in MlflowClient(server.address).list_artifacts(found.info.run_id)] == ["notes.txt"]

        # Away again at the end of the next start: it ends in time, and another command sends the rest.
        again = begin(server.address, tmp_path / "run", patience=0.5)
        assert again.sender.flush(60)
        server.kill()
        log(again, range(20, 25))
        with pytest.raises(RunError, match=r"the model is in .*; the same command again publishes it"):
            again.publish(tmp_path / "model", PublishConfig("m"), {}, {})
        end(again)
        assert f"python -m pipelines.sync {tmp_path}/run" in capsys.readouterr().out
        with pytest.raises(SystemExit) as exit_:
            sync([str(tmp_path / "run")])
        assert exit_.value.code == 1
        server.start()
        sync([str(tmp_path / "run")])
        assert re.search(r"MLflow at .* has all that run logged", capsys.readouterr().out)
        assert steps_of(server.address, found.info.run_id) == list(range(25))
    finally:
        server.kill()


def test_sync_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        sync([str(tmp_path)])
    assert exit_.value.code == 2
    assert "no run that logged to MLflow" in capsys.readouterr().err
