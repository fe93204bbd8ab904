"""A real SQLite store and registry: publish, alias, fetch."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from model import registry
from model.errors import UserError
from model.registry import PublishConfig, TrackingConfig

PUBLISH = PublishConfig("snap-stage1", "newest")


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """A new store, whose folder does not exist yet."""
    root = tmp_path_factory.mktemp("mlflow")
    config = TrackingConfig(f"sqlite:///{root}/runs/mlflow.db", "tests", str(root / "artifacts"))
    registry.ensure_experiment(config)
    return config


@pytest.fixture
def run_id(tracking: TrackingConfig) -> str:
    client = MlflowClient(tracking.uri)
    return client.create_run(registry.ensure_experiment(tracking)).info.run_id


def artefact(folder: Path, weights: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights)
    (folder / "more").mkdir()
    (folder / "more" / "config.yaml").write_text("a: 1")
    return folder


def versions(tracking: TrackingConfig, name: str) -> list[str]:
    return sorted(str(v.version) for v in MlflowClient(tracking.uri).search_model_versions(f"name='{name}'"))


def test_the_experiment_is_created_once_with_its_artefacts_where_configured(tracking: TrackingConfig) -> None:
    first = registry.ensure_experiment(tracking)
    assert registry.ensure_experiment(tracking) == first
    found = [e for e in MlflowClient(tracking.uri).search_experiments() if e.name == "tests"]
    assert len(found) == 1
    assert found[0].artifact_location == Path(tracking.artifacts).as_uri()


def test_publish_alias_fetch(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    one = artefact(tmp_path / "model-step-1", "one")
    version = registry.publish(one, tracking, PUBLISH, run_id, {"step": "1", "data": "d"}).version
    fetched = registry.fetch("models:/snap-stage1@newest", tracking.uri)
    assert (fetched / "model.safetensors").read_text() == "one"
    assert (fetched / "more" / "config.yaml").read_text() == "a: 1"
    stored = MlflowClient(tracking.uri).get_model_version("snap-stage1", version)
    assert (stored.tags, stored.run_id) == ({"step": "1", "data": "d"}, run_id)

    # The same again, as when a finished run is started again: one version.
    assert registry.publish(one, tracking, PUBLISH, run_id, {"step": "1", "data": "d"}).version == version
    assert versions(tracking, "snap-stage1") == [version]

    # A later step: another version, to which the alias moves; the first stays.
    two = artefact(tmp_path / "model-step-2", "two")
    later = registry.publish(two, tracking, PUBLISH, run_id, {"step": "2", "data": "d"}).version
    assert versions(tracking, "snap-stage1") == [version, later]
    assert (registry.fetch("models:/snap-stage1@newest", tracking.uri) / "model.safetensors").read_text() == "two"
    assert (registry.fetch(f"models:/snap-stage1/{version}", tracking.uri) / "model.safetensors").read_text() == "one"

    # Published again, the first takes the alias back.
    assert registry.publish(one, tracking, PUBLISH, run_id, {"step": "1", "data": "d"}).version == version
    assert (registry.fetch("models:/snap-stage1@newest", tracking.uri) / "model.safetensors").read_text() == "one"

    # Another alias of the same model.
    registry.publish(two, tracking, PublishConfig("snap-stage1", "best"), run_id, {"step": "2", "data": "d"})
    assert (registry.fetch("models:/snap-stage1@best", tracking.uri) / "model.safetensors").read_text() == "two"
    assert (registry.fetch("models:/snap-stage1@newest", tracking.uri) / "model.safetensors").read_text() == "one"


def test_all_versions_are_listed_with_their_aliases(tmp_path: Path) -> None:
    own = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db", "tests", str(tmp_path / "artifacts"))
    with pytest.raises(UserError, match="no MLflow store at"):
        registry.versions(own.uri)
    assert not (tmp_path / "mlflow.db").exists()
    client, experiment = MlflowClient(own.uri), registry.ensure_experiment(own)
    assert registry.versions(own.uri) == []
    for name in ("second", *["first"] * 11):
        run = client.create_run(experiment).info.run_id
        tags = {"run": run} | ({registry.STAGE: "2"} if name == "second" else {})
        registry.publish(artefact(tmp_path / run, name), own, PublishConfig(name, "newest"), run, tags)
    client.set_registered_model_alias("first", "best", "2")
    client.set_registered_model_alias("first", "paper", "2")
    found = registry.versions(own.uri)
    assert [(version.name, version.number) for version in found] == [
        *[("first", str(n)) for n in range(11, 0, -1)],
        ("second", "1"),
    ]
    assert [version.aliases for version in found] == [("newest",), *[()] * 8, ("best", "paper"), (), ("newest",)]
    assert [version.stage for version in found] == [*[None] * 11, "2"]
    assert (registry.fetch(found[9].uri, own.uri) / "model.safetensors").read_text() == "first"


def test_another_run_publishes_its_own_version(tracking: TrackingConfig, tmp_path: Path) -> None:
    client, config = MlflowClient(tracking.uri), PublishConfig("twice", "newest")
    experiment = registry.ensure_experiment(tracking)
    for number in (1, 2):
        run = client.create_run(experiment).info.run_id
        registry.publish(artefact(tmp_path / f"{number}" / "model", f"{number}"), tracking, config, run, {"step": "1"})
    assert versions(tracking, "twice") == ["1", "2"]
    assert (registry.fetch("models:/twice@newest", tracking.uri) / "model.safetensors").read_text() == "2"


def test_the_gate_moves_the_alias_only_to_what_beats_its_holder(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    config = PublishConfig("gated", "production", gate=("eval/loss/videos/total", "eval/loss/images/total"))

    def publish(step: int, videos: float | None, images: float, gate: PublishConfig = config) -> registry.Publication:
        metrics = {"eval/loss/images/total": images} | ({} if videos is None else {"eval/loss/videos/total": videos})
        folder = tmp_path / f"model-step-{step}"
        if not folder.exists():
            artefact(folder, str(step))
        return registry.publish(folder, tracking, gate, run_id, {"step": str(step)}, metrics)

    def held() -> str:
        return (registry.fetch("models:/gated@production", tracking.uri) / "model.safetensors").read_text()

    assert publish(1, 0.5, 0.4).refused == "" and held() == "1"  # nobody held it
    worse = publish(2, 0.4, 0.4)
    assert worse.refused == "eval/loss/images/total is 0.4, and 0.4 in version 1, which holds it" and held() == "1"
    assert publish(3, 0.4, 0.3).refused == "" and held() == "3"
    assert publish(4, None, 0.1).refused == "version 4 has no eval/loss/videos/total" and held() == "3"
    assert publish(3, 0.4, 0.3).refused == "" and held() == "3"  # started again
    assert publish(5, 9.0, 9.0, PublishConfig("gated", "production")).refused == "" and held() == "5"  # forced


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert registry.fetch(str(tmp_path), "sqlite:////nowhere/mlflow.db") == tmp_path


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/no-such-model@newest", "Registered Model with name=no-such-model not found"),
        ("models:/known@no-such-alias", "no-such-alias"),
        ("models:/known/77", "77"),
        ("models:/known/one", "one"),
        ("models:/known", "not of the form models:/NAME@ALIAS"),
        ("models:known@newest", "not of the form models:/NAME@ALIAS"),
        ("/no/such/folder", "neither a folder nor models:/NAME@ALIAS"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    tracking: TrackingConfig, run_id: str, tmp_path: Path, uri: str, message: str
) -> None:
    registry.publish(artefact(tmp_path / "model", "x"), tracking, PublishConfig("known", "newest"), run_id, {})
    with pytest.raises(UserError, match=message) as caught:
        registry.fetch(uri, tracking.uri)
    assert "\n" not in str(caught.value)
    assert uri in str(caught.value)


def test_files_that_were_deleted_are_told_in_one_line(tracking: TrackingConfig, run_id: str, tmp_path: Path) -> None:
    registry.publish(artefact(tmp_path / "model", "x"), tracking, PublishConfig("emptied", "newest"), run_id, {})
    shutil.rmtree(Path(tracking.artifacts, run_id))
    with pytest.raises(UserError, match="^models:/emptied@newest: ") as caught:
        registry.fetch("models:/emptied@newest", tracking.uri)
    assert "\n" not in str(caught.value)


def test_a_missing_store_is_told_and_not_created(tmp_path: Path) -> None:
    store = tmp_path / "nowhere" / "mlflow.db"
    with pytest.raises(UserError, match=f"no MLflow store at sqlite:///{store}"):
        registry.fetch("models:/x@y", f"sqlite:///{store}")
    assert not store.parent.exists()


def test_a_store_that_is_no_database_is_told_in_one_line(tmp_path: Path) -> None:
    store = tmp_path / "mlflow.db"
    store.write_text("not a database, but a text of some length")
    for use in (
        lambda: registry.ensure_experiment(TrackingConfig(f"sqlite:///{store}", "tests", None)),
        lambda: registry.fetch("models:/x@y", f"sqlite:///{store}"),
    ):
        with pytest.raises(UserError, match="file is not a database") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alias", ["latest", "Latest", "v1", "V22", "", "a b", "a@b"])
def test_aliases_that_mlflow_reserves_are_refused_before_training(alias: str) -> None:
    with pytest.raises(ValueError, match="alias must"):
        PublishConfig("name", alias)


@pytest.mark.parametrize("name", ["", "a/b", "a@b", "a:b", "it's"])
def test_names_that_no_uri_can_hold_are_refused_before_training(name: str) -> None:
    with pytest.raises(ValueError, match="name must"):
        PublishConfig(name)
