"""Learning curves from a real MLflow store."""

from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest

from model.errors import UserError
from pipelines import curves
from pipelines.curves import CurvesConfig


@pytest.fixture
def c(tmp_path: Path) -> CurvesConfig:
    """A store with two runs of one name; the newer one was resumed at step 3."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("learn")
    for start, base in ((1, 5.0), (2, 1.0)):
        run = client.create_run(experiment, start_time=start, run_name="stage1").info.run_id
        for step, value in [(1, base), (2, base / 2), (3, 9.0), (3, base / 3), (4, base / 4)]:
            client.log_metric(run, "loss/train/total", value, step=step)
        for kind in ("videos", "images"):
            for step in (2, 4):
                client.log_metric(run, f"eval/loss/{kind}/sigma_1_to_2", base / step, step=step)
    client.create_run(experiment, run_name="silent")
    return CurvesConfig(uri, "learn", ("stage1",), str(tmp_path / "made/curves.png"))


def test_the_newest_run_is_read_and_a_repeated_step_counts_once(c: CurvesConfig) -> None:
    found = curves.history(c, "stage1")
    assert set(found) == {"loss/train/total", "eval/loss/videos/sigma_1_to_2", "eval/loss/images/sigma_1_to_2"}
    steps, losses = found["loss/train/total"]
    assert steps.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(losses, [1, 1 / 2, 1 / 3, 1 / 4])


def test_a_picture_is_drawn(c: CurvesConfig, capsys: pytest.CaptureFixture[str]) -> None:
    curves.curves(c)
    assert Path(c.output).read_bytes().startswith(b"\x89PNG") and Path(c.output).stat().st_size > 10_000
    assert c.output in capsys.readouterr().out


def test_smoothing_takes_means_of_windows() -> None:
    steps = np.arange(1, 101)
    found = curves.smooth((steps, 2.0 * steps), 0.1)
    np.testing.assert_allclose(found[0], np.arange(5.5, 100, 10))
    np.testing.assert_allclose(found[1], 2 * found[0])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"experiment": "other"}, "no experiment 'other'"),
        ({"runs": ("stage3",)}, "has no run 'stage3'"),
        ({"runs": ("silent",)}, "'silent' has logged no loss"),
    ],
)
def test_what_is_not_there_is_named(c: CurvesConfig, wrong: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        curves.curves(replace(c, **wrong))


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs must name at least one"):
        CurvesConfig("sqlite:///x.db", "learn", (), "curves.png")
