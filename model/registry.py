"""MLflow: where runs are tracked and models are published. ``models:/NAME@ALIAS`` is all that a sampler needs."""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from mlflow import MlflowClient, artifacts
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from model.errors import RunError, UserError

STAGE = "stage"  # tag of a version: 1, or 2 for an upsampler
METRIC = "metric."  # before the names of a version's metrics among its tags


@dataclass(frozen=True)
class TrackingConfig:
    """Where MLflow keeps runs."""

    uri: str = "sqlite:///runs/mlflow.db"  # or a server's address
    experiment: str = "snapvideo"
    artifacts: str | None = "runs/mlflow-artifacts"  # root for a new experiment's files; None leaves it to the server
    absent: Literal["fail", "spool"] = "fail"  # a server that cannot be reached at the start: end there, or go on and send later
    patience: float = 60.0  # seconds that a run's end waits for a server that is slow or away

    def __post_init__(self) -> None:
        if not self.patience >= 0:
            raise ValueError(f"patience must not be negative, got {self.patience}")

    @property
    def remote(self) -> bool:
        """Whether there is a server, which may be away."""
        return not self.uri.startswith(("sqlite:", "file:", "/", "."))


@dataclass(frozen=True)
class PublishConfig:
    """How a finished run is registered."""

    name: str  # registered model
    alias: str = "candidate"  # moved to the new version
    # Metrics of which lower is better, such as eval/loss/videos/total: the alias moves only if the new version beats its present
    # holder in each. An empty list moves it always.
    gate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Said before training: MLflow would refuse it after.
        if not re.fullmatch(r"[^/:@'\"%]+", self.name):
            raise ValueError("name must not be empty or contain any of /:@'\"%")
        reserved = re.fullmatch(r"latest|v\d+", self.alias, re.IGNORECASE)
        if reserved or not re.fullmatch(r"[\w-]+", self.alias, re.ASCII):
            raise ValueError("alias must consist of letters, digits, _ and -, and be neither 'latest' nor like 'v1'")


def ensure_experiment(config: TrackingConfig) -> str:
    """Create the store and the experiment if missing and return the experiment's id.

    Call it in one process before several open a new SQLite store: their migrations would race and break it for good.

    Raises:
        UserError: no store can be opened or made.
        RunError: the server cannot be reached, or refuses.
    """
    if config.uri.startswith("sqlite:///"):
        Path(config.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        is_new = config.uri.startswith("sqlite:///") and not Path(config.uri.removeprefix("sqlite:///")).exists()
        with _quiet_migrations() if is_new else contextlib.nullcontext():
            client = MlflowClient(config.uri)
            experiment = client.get_experiment_by_name(config.experiment)
        if experiment is not None:
            return str(experiment.experiment_id)
        root = None if config.artifacts is None else Path(config.artifacts).absolute().as_uri()
        try:
            return str(client.create_experiment(config.experiment, artifact_location=root))
        except MlflowException:  # another run was faster, or it cannot be made
            experiment = client.get_experiment_by_name(config.experiment)
            if experiment is None:
                raise
            return str(experiment.experiment_id)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        kind = RunError if config.remote else UserError  # a server may be there again soon
        raise kind(f"MLflow at {config.uri}: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet_migrations() -> Iterator[None]:
    """A new SQLite store announces 40 schema changes on stderr; show them only if creating it fails."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except Exception:
        print(told.getvalue(), file=sys.stderr)
        raise


@dataclass(frozen=True)
class Publication:
    """A registered version."""

    version: str
    refused: str  # why the alias did not move; empty if it did


def publish(
    folder: Path,
    tracking: TrackingConfig,
    config: PublishConfig,
    run_id: str,
    tags: dict[str, str],
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> Publication:
    """Log the artefact ``folder`` to its run, register it as a new version, and move the alias there if the gate lets it.

    A run that has published before, with the same tags, is not published twice. ``metrics`` stay with the version, as tags.
    """
    client = MlflowClient(tracking.uri)
    try:
        client.create_registered_model(config.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name='{config.name}'")
    same = (v for v in known if v.run_id == run_id and all(v.tags.get(key) == value for key, value in tags.items()))
    version = next(same, None)
    if version is None:
        client.log_artifacts(run_id, str(folder), folder.name)
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder.name}"
        measured = {METRIC + name: repr(float(value)) for name, value in metrics.items()}
        version = client.create_model_version(config.name, source, run_id, tags={**tags, **measured})
    refused = _refusal(client, config, version)
    if not refused:
        client.set_registered_model_alias(config.name, config.alias, version.version)
    return Publication(str(version.version), refused)


def _refusal(client: MlflowClient, config: PublishConfig, version: ModelVersion) -> str:
    """Why the gate keeps the alias where it is; empty if the alias may move."""
    try:
        holder = client.get_model_version_by_alias(config.name, config.alias)
    except MlflowException:  # nobody holds it
        return ""
    if str(holder.version) == str(version.version):
        return ""
    for name in config.gate:
        own, its = version.tags.get(METRIC + name), holder.tags.get(METRIC + name)
        if own is None or its is None:
            return f"version {version.version if own is None else holder.version} has no {name}"
        if not float(own) < float(its):
            return f"{name} is {float(own):.5g}, and {float(its):.5g} in version {holder.version}, which holds it"
    return ""


def fetch(uri: str, tracking_uri: str) -> Path:
    """The local folder of a published model: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a folder as it is.

    Raises:
        UserError: nothing there.
    """
    if not uri.startswith("models:"):
        if not Path(uri).is_dir():
            raise UserError(f"no published model at {uri}: neither a folder nor models:/NAME@ALIAS")
        return Path(uri)
    if tracking_uri.startswith("sqlite:///") and not Path(tracking_uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"{uri}: no MLflow store at {tracking_uri}")
    parts = re.fullmatch(r"models:/([^/@]+)([/@])([^/@]+)", uri)
    if parts is None:
        raise UserError(f"{uri}: not of the form models:/NAME@ALIAS or models:/NAME/VERSION")
    name, mark, pointer = parts.groups()
    try:
        client = MlflowClient(tracking_uri)
        client.get_registered_model(name)  # first: MLflow says of a missing model that its alias is missing
        version = client.get_model_version_by_alias(name, pointer).version if mark == "@" else pointer
        # Resolved here: MLflow's own models:/ scheme asks a process-wide registry, not this store.
        source = client.get_model_version_download_uri(name, version)
        return Path(artifacts.download_artifacts(artifact_uri=source, tracking_uri=tracking_uri))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"{uri}: {first_line(error)} (MLflow at {tracking_uri})") from error


@dataclass(frozen=True)
class Version:
    """A registered version."""

    name: str  # of the model
    number: str
    aliases: tuple[str, ...]
    stage: str | None = None  # "1" or "2"; None where nobody said

    @property
    def uri(self) -> str:
        """It, whatever becomes of its aliases."""
        return f"models:/{self.name}/{self.number}"


def versions(tracking_uri: str) -> list[Version]:
    """All registered versions, by name, of each the newest first. Makes no store.

    Raises:
        UserError: no store there.
    """
    if tracking_uri.startswith("sqlite:///") and not Path(tracking_uri.removeprefix("sqlite:///")).is_file():
        raise UserError(f"no MLflow store at {tracking_uri}")
    found = []
    try:
        client = MlflowClient(tracking_uri)
        for model in _pages(client.search_registered_models):
            named: dict[str, list[str]] = {}
            for alias, number in model.aliases.items():
                named.setdefault(str(number), []).append(alias)
            stages = {
                str(one.version): one.tags.get(STAGE)
                for one in _pages(partial(client.search_model_versions, f"name='{model.name}'"))
            }
            for number in sorted(stages, key=int, reverse=True):
                found.append(Version(model.name, number, tuple(sorted(named.get(number, ()))), stages[number]))
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"MLflow at {tracking_uri}: {first_line(error)}") from error
    return sorted(found, key=lambda version: version.name)


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def first_line(error: BaseException) -> str:
    """What an error of another library says, without what follows."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    # urllib3 wraps the cause in pages of objects.
    refused = re.search(r"\(Caused by .*?: ([^:\"']*)[\"')>]*$", line)
    return refused[1] if refused else line
