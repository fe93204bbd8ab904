"""A sweep over real sampling jobs and evaluations of a small cascade."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model import command, config
from model.errors import UserError
from pipelines.cascade import CascadeConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.metrics import ExtractorConfig
from pipelines.sample import SampleConfig
from pipelines.sweep import SeriesConfig, SweepConfig, sweep

ROOT = Path(__file__).parents[2]


class Halves(nn.Module):
    """Two class scores: how bright the halves of a picture are."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([half.mean((1, 2, 3)) for half in x.chunk(2, 3)], 1)


@pytest.fixture
def job(cascade_config: CascadeConfig, tmp_path: Path) -> SweepConfig:
    torch.jit.script(Halves()).save(str(tmp_path / "halves.pt"))
    digest = hashlib.sha256((tmp_path / "halves.pt").read_bytes()).hexdigest()
    sampled = SampleConfig(("a red circle", "a blue square"), str(tmp_path / "none"), cascade_config, device="cpu")
    scores = ExtractorConfig(str(tmp_path / "halves.pt"), digest, values="unit")
    measured = EvaluateConfig("none", inception=scores, frames=4, frame_rate=8, splits=1, device="cpu")
    (tmp_path / "sample.yaml").write_text(config.to_yaml(sampled))
    (tmp_path / "evaluate.yaml").write_text(config.to_yaml(measured))
    vary = "cascade.stage1_sampler.steps"
    yamls = {"sample": str(tmp_path / "sample.yaml"), "evaluate": str(tmp_path / "evaluate.yaml")}
    return SweepConfig(vary, (1, 3), **yamls, output=str(tmp_path / "sweep"))


@pytest.mark.slow
def test_every_value_is_sampled_measured_and_drawn_once(
    job: SweepConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    sweep(job)
    output = Path(job.output)
    points = json.loads((output / "sweep.json").read_text())["points"]
    assert [point["value"] for point in points] == [1, 3]
    for point in points:
        folder = output / f"all-{point['value']:g}"
        told = json.loads((folder / "samples.json").read_text())["settings"]["stage1_sampler"]["steps"]
        assert told == point["value"]
        (entry,) = json.loads((folder / "evaluation.json").read_text())["results"]
        assert point["metrics"] == {"inception_score": entry["value"]}
    assert Image.open(output / "sweep.png").width > 300
    shown = capfd.readouterr().out
    best = max(points, key=lambda point: point["metrics"]["inception_score"])
    assert f"best inception_score: {best['metrics']['inception_score']:.4g} of all" in shown
    sweep(job)
    assert capfd.readouterr().out.count("done before") == 4


def test_settings_that_a_job_would_refuse_are_told_before_the_first_one(job: SweepConfig) -> None:
    for other, told in (
        (replace(job, vary="cascade.stage1_sampler.step"), "did you mean 'cascade.stage1_sampler.steps'"),
        (replace(job, values=(0.5,)), "steps"),
        (replace(job, evaluate_overrides=("splits=0",)), "splits must be at least 1"),
        (replace(job, series=(SeriesConfig("one", ("cascade.none=1",)),)), "cascade.none"),
    ):
        with pytest.raises(UserError, match=told):
            sweep(other)
    assert not Path(job.output).exists()
    with pytest.raises(ValueError, match="values must name at least one, each once"):
        SweepConfig("seed", (1, 1))
    with pytest.raises(ValueError, match="series must have names"):
        SweepConfig("seed", (1,), series=(SeriesConfig("../x"),))


@pytest.mark.parametrize("name", ["sweep.yaml", "sweep_steps.yaml"])
def test_the_shipped_sweeps_load_with_their_jobs(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    c = config.load(SweepConfig, ROOT / "yamls" / name)
    for line in c.series:
        for value in c.values:
            config.load(SampleConfig, ROOT / c.sample, (*line.overrides, f"{c.vary}={value:g}"))
    with pytest.raises(SystemExit):
        command.run(SweepConfig, sweep, "", ["--help"])
    assert "vary" in capsys.readouterr().out
