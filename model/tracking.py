"""Runs in MLflow. What is logged goes to a journal on the disk, and from there to the server, which may be slow or away.

A thread of process 0 sends the journal in its order; training never waits for it. What a killed run had not sent, its successor
sends. Only what the server has taken leaves the disk, so it may be sent twice: MLflow keeps one of two equal metrics.
"""

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import mlflow
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from model import registry
from model.errors import RunError
from model.journal import Journal, Record
from model.registry import PublishConfig, TrackingConfig

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
TOKEN = "snapvideo.run"  # noqa: S105 - a tag: which journal a run belongs to
METRICS, PARAMS, CHARACTERS = 1000, 100, 6000  # MLflow's limits: of a request, of a request, of a parameter's value
SEND_SECONDS = 3.0  # between two looks for something to send
PAUSES = (1.0, 30.0)  # seconds behind the first failure to send, and at most
# What the same request would meet again. All else may pass: no connection, no answer, a server that is busy or set up wrong.
REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE"}


class Sender:
    """Sends a journal to MLflow, as one run, from a thread of its own."""

    def __init__(self, config: TrackingConfig, name: str, journal: Journal) -> None:
        """``name`` is the run's, which MLflow shows; which run it is, the journal knows."""
        self.config = config
        self.name = name
        self.journal = journal
        self.run_id: str | None = None
        self.away = ""  # why nothing can be sent at present
        self._client: MlflowClient | None = None
        self._wake = threading.Event()
        self._hurry = False  # somebody waits
        self._idle = threading.Condition()
        self._rounds = 0  # after each of which everything from before it is sent
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def flush(self, seconds: float) -> bool:
        """Wait until everything so far is sent, for at most ``seconds``; return whether it is."""
        with self._idle:
            # The round that goes on now may have looked already.
            goal = self._rounds + 2
            self._hurry = True
            self._wake.set()
            sent = self._idle.wait_for(lambda: self._rounds >= goal or not self._thread.is_alive(), seconds)
            self._hurry = False
        return sent and self._rounds >= goal

    def stop(self) -> None:
        """Send no more; a request under way may take until its timeout."""
        self._stopped = True
        self._wake.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        pause = PAUSES[0]
        while not self._stopped:
            try:
                self.send()
            except Exception as error:  # whatever MLflow, SQLAlchemy and urllib3 raise: the journal keeps it
                told = registry.first_line(error.__cause__ or error)
                if not self.away:
                    self._say(f"{told}; what is logged waits in {self.journal.folder}")
                self.away = told
                self._wake.wait(min(pause, PAUSES[0]) if self._hurry else pause)
                pause = min(2 * pause, PAUSES[1])
            else:
                if self.away:
                    self._say("it is back, and has all that was logged")
                self.away, pause = "", PAUSES[0]
                with self._idle:
                    self._rounds += 1
                    self._idle.notify_all()
                if not self._hurry:
                    self._wake.wait(SEND_SECONDS)
            self._wake.clear()

    def send(self, progress: Callable[[int], Any] = lambda _: None) -> None:
        """Send what there is; tell ``progress`` how many records went.

        Raises:
            MlflowException, SQLAlchemyError, OSError: it cannot be sent at present.
        """
        if self._client is None:
            self._client = MlflowClient(self.config.uri)
        while not self._stopped:
            records, behind = self.journal.read()
            if not records:
                return
            if self.run_id is None:
                self.run_id = self._find_run(self._client)
            for kind, group in groupby(records, key=lambda record: record["kind"]):
                self._send(self._client, kind, list(group))
            self.journal.done(behind)
            progress(len(records))
            for record in records:
                if record["kind"] == "file":
                    shutil.rmtree(self.journal.files / record["folder"], ignore_errors=True)

    def _find_run(self, client: MlflowClient) -> str:
        """The journal's run, created if need be. The journal's token tells it, even from one created a moment before a kill."""
        token = self.journal.token
        experiment = registry.ensure_experiment(self.config)
        found = client.search_runs([experiment], f"tags.`{TOKEN}` = '{token}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        return str(client.create_run(experiment, run_name=self.name, tags={TOKEN: token, "run_name": self.name}).info.run_id)

    def _send(self, client: MlflowClient, kind: str, records: list[Record]) -> None:
        try:
            self._request(client, kind, records)
        except MlflowException as error:
            if error.error_code not in REFUSALS:
                raise
            if not self._is_active(client):  # somebody deleted it: the rest goes to a new one
                self.run_id = self._find_run(client)
                self._request(client, kind, records)
            elif len(records) > 1:  # one of them is at fault
                for record in records:
                    self._send(client, kind, [record])
            else:
                self._say(f"refused, and left out: {registry.first_line(error)}")

    def _is_active(self, client: MlflowClient) -> bool:
        try:
            return str(client.get_run(str(self.run_id)).info.lifecycle_stage) == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _request(self, client: MlflowClient, kind: str, records: list[Record]) -> None:
        run_id = str(self.run_id)
        match kind:
            case "metrics":
                every = [
                    Metric(name, value, record["time"], record["step"])
                    for record in records
                    for name, value in record["values"].items()
                ]
                for part in _parts(every, METRICS):
                    client.log_batch(run_id, metrics=part)
            case "params":
                # Those of the run's first start stay: MLflow refuses to change a parameter.
                known = client.get_run(run_id).data.params
                values = {name: value for record in reversed(records) for name, value in record["values"].items()}
                new = [Param(name, value[:CHARACTERS]) for name, value in values.items() if name not in known]
                for part in _parts(new, PARAMS):
                    client.log_batch(run_id, params=part)
            case "file":
                for record in records:
                    folder = self.journal.files / record["folder"]
                    for path in folder.iterdir() if folder.is_dir() else ():  # gone: sent before a kill
                        client.log_artifact(run_id, str(path), record["to"] or None)
            case "status":
                status, moment = records[-1]["status"], records[-1]["time"]
                if status == "RUNNING":
                    client.update_run(run_id, status=status)
                else:
                    client.set_terminated(run_id, status, moment)

    def _say(self, what: str) -> None:
        tqdm.write(f"MLflow at {self.config.uri}: {what}")


def _parts(values: list[Any], size: int) -> Iterable[list[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def set_up_client(uri: str) -> None:
    """Tell MLflow, for this process, the address, and to leave retries to the sender; what is in the environment counts."""
    mlflow.set_tracking_uri(uri)  # which its artifact clients ask, whatever a client was made with
    # Its own retries take minutes, in which nothing else is sent.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


class Tracking(LoggerDestination):
    """Composer's metrics, parameters and files, to MLflow. Process 0 alone logs.

    A run that ends without ``end`` has failed.
    """

    def __init__(self, config: TrackingConfig, name: str, folder: Path) -> None:
        """Connects at once; ``folder`` is the run's.

        Raises:
            UserError: no store can be made at the address.
            RunError: the server cannot be reached, and ``config.absent`` says to fail then.
        """
        self.config = config
        self._status: Status = "FAILED"
        self._closed = False
        self._enabled = dist.get_global_rank() == 0
        if not self._enabled:
            return
        set_up_client(config.uri)
        self._connect()
        self.journal = Journal(folder / "tracking")
        self.journal.describe(name, asdict(config))
        self.sender = Sender(config, name, self.journal)

    def init(self, state: State, logger: Logger) -> None:
        del state, logger
        if self._enabled:
            self._record("status", status="RUNNING")
            self.sender.start()

    def _connect(self) -> None:
        try:
            registry.ensure_experiment(self.config)
        except RunError as error:
            if self.config.absent == "fail":
                raise RunError(f"{error}; with tracking.absent=spool the run would go on without it") from error
            tqdm.write(f"{error}; the run goes on without it")

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if self._enabled:
            self._record("metrics", step=step or 0, values={name: float(value) for name, value in metrics.items()})

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        if self._enabled:
            self._record("params", values={name: str(value) for name, value in hyperparameters.items()})

    def can_upload_files(self) -> bool:
        return True

    def upload_file(self, state: State, remote_file_name: str, file_path: Path, *, overwrite: bool) -> None:
        del state, overwrite
        if self._enabled:
            self._keep(remote_file_name, lambda path: shutil.copyfile(file_path, path))

    def log_text(self, name: str, text: str) -> None:
        """Log a file of this content to the run, as ``FOLDER/NAME`` or ``NAME``."""
        if self._enabled:
            self._keep(name, lambda path: path.write_text(text, encoding="utf-8"))

    def publish(
        self, folder: Path, config: PublishConfig, tags: dict[str, str], metrics: Mapping[str, float]
    ) -> registry.Publication:
        """``registry.publish``, when MLflow has what was logged before. Process 0 only.

        Raises:
            RunError: it did not take it within ``config.patience``.
        """
        end = time.monotonic() + self.config.patience
        hint = f"the model is in {folder}; the same command again publishes it"
        if not self.sender.flush(self.config.patience) or self.sender.run_id is None:
            raise RunError(f"MLflow at {self.config.uri}: {self.sender.away or 'no answer'}; {hint}")
        while True:
            try:
                return registry.publish(folder, self.config, config, self.sender.run_id, tags, metrics)
            except (MlflowException, SQLAlchemyError, OSError) as error:
                passes = not isinstance(error, MlflowException) or error.error_code not in REFUSALS
                if not passes or time.monotonic() > end:
                    raise RunError(f"MLflow at {self.config.uri}: {registry.first_line(error)}; {hint}") from error
                time.sleep(PAUSES[0])

    def end(self, status: Status) -> None:
        """Say how the run ended; ``close`` reports it."""
        self._status = status

    def close(self, state: State, logger: Logger) -> None:
        del state, logger
        if not self._enabled or self._closed:
            return
        self._closed = True
        self._record("status", status=self._status)
        # Who sent the signal does not wait long.
        patience = min(self.config.patience, 5.0) if self._status == "KILLED" else self.config.patience
        if not self.sender.flush(patience):
            tqdm.write(
                f"MLflow at {self.config.uri} has not taken all: {self.sender.away or 'too slow'}; the rest waits in "
                f"{self.journal.folder}: the next start sends it, or: python -m pipelines.sync {self.journal.folder.parent}"
            )
        self.sender.stop()
        self.journal.close()

    def _keep(self, name: str, write: Callable[[Path], Any]) -> None:
        to = PurePosixPath(name)
        folder = self.journal.files / uuid.uuid4().hex
        folder.mkdir()
        write(folder / to.name)
        self._record("file", folder=folder.name, to="" if to.parent == PurePosixPath() else str(to.parent))

    def _record(self, kind: str, **values: Any) -> None:
        self.journal.append({"kind": kind, "time": int(time.time() * 1000), **values})
