"""Training as users start it: two processes under Composer's launcher, FSDP2 on gloo, real shards, a real MLflow store."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file

from model import checkpoint, registry
from model.data import dataset
from model.data.samples import text_states
from model.networks.unet.network import UNet
from model.train import cpu_threads

Runs = Callable[..., Any]


def test_cores_are_shared_out_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [cpu_threads(processes) for processes in (1, 2, 5, 24)] == [12, 6, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_threads(1) == cpu_threads(2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert cpu_threads(2) == 4


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, training: Runs) -> Any:
    run = training(tmp_path_factory.mktemp("uninterrupted"))
    run.finish(run.start("precision=amp_bf16"))
    return run


def test_a_run_trains_tracks_and_publishes(uninterrupted: Any) -> None:
    client = MlflowClient(f"sqlite:///{uninterrupted.folder}/mlflow.db")
    version = client.get_model_version_by_alias("tiny", "newest")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.01"
    # It was started with amp_bf16, which no CPU runs: what is logged and published is what ran.
    assert run.data.params["precision"] == "fp32"
    assert "precision: amp_bf16 needs a GPU; on CPUs this run computes in fp32" in uninterrupted.log
    folder = uninterrupted.folder / "tiny" / f"model-step-{uninterrupted.steps:07d}"
    assert yaml.safe_load((folder / checkpoint.CONFIG).read_text())["precision"] == "fp32"
    losses = [metric.value for metric in client.get_metric_history(run.info.run_id, "loss/train/total")]
    assert len(losses) == uninterrupted.steps and losses[-1] < losses[0]
    assert {"throughput/samples_per_sec", "lr-LAMB/group0"} <= set(run.data.metrics)
    published = checkpoint.load(registry.fetch("models:/tiny@newest", f"sqlite:///{uninterrupted.folder}/mlflow.db"))
    assert published.origin.step == uninterrupted.steps and set(published.manifests) == {"videos", "images"}
    for name, tensor in uninterrupted.weights().items():
        torch.testing.assert_close(dict(published.denoiser.named_parameters())[name].data, tensor, rtol=0, atol=0)


def test_a_run_standardises_its_text_by_what_its_data_hold(uninterrupted: Any, config: Callable[..., Any]) -> None:
    data = config(videos=uninterrupted.data / "videos", images=uninterrupted.data / "images", height=8, width=16)
    states = text_states(dataset.build_loader(data, 2).dataloader.joint.parts.values())
    weights = uninterrupted.weights()
    torch.testing.assert_close(weights["network.conditioning.standard.mean"], states.mean(0))
    torch.testing.assert_close(weights["network.conditioning.standard.spread"], states.std(0))


def test_a_run_that_is_done_publishes_once_and_ends_well(uninterrupted: Any) -> None:
    """As after a kill between the last checkpoint and publishing; or when fewer steps are asked for than were made."""
    folder = uninterrupted.folder / "tiny" / f"model-step-{uninterrupted.steps:07d}"
    before = load_file(folder / checkpoint.WEIGHTS)
    shutil.rmtree(folder)
    steps = uninterrupted.steps
    evaluation = "evaluation={every: 1000, videos: 3, images: 2, bands: [0.3], batch: 2}"
    uninterrupted.finish(uninterrupted.start(f"schedule.steps={steps - 4}", evaluation))
    assert f"tiny has made {steps} steps already, of {steps - 4} asked for: nothing to train" in uninterrupted.log
    for name, tensor in load_file(folder / checkpoint.WEIGHTS).items():
        assert torch.equal(tensor, before[name]), name
    client = MlflowClient(f"sqlite:///{uninterrupted.folder}/mlflow.db")
    (version,) = client.search_model_versions("name='tiny'")
    assert version.tags["stage"] == "1"
    run = client.get_run(client.get_model_version_by_alias("tiny", "newest").run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/loss/videos/total"] > 0, "a gate needs the metrics, trained or not"


UNET = (
    "model.network={kind: unet, size: [4, 8, 16], base_width: 32, multipliers: [1, 2], residual_blocks: 1, "
    "attention_factors: [2], head_width: 16, conditioning_width: 32, text_width: 4}"
)


@pytest.mark.slow
def test_a_u_net_trains_by_adam_on_shards(tmp_path: Path, training: Runs) -> None:
    overrides = (UNET, "model.self_conditioning=0", "optimizer={kind: adam, lr: 1e-3}")
    run = training(tmp_path, steps=6)
    run.finish(run.start(*overrides))
    model = checkpoint.load(tmp_path / "tiny" / "model-step-0000006")
    assert isinstance(model.denoiser.network, UNet)
    assert all(p.isfinite().all() for p in model.denoiser.parameters())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.codec.height=6 model.codec.pad_bottom=2", "frame height is 8"),
        ("data.frames=8", "data.frames is 8, the model is built for 4"),
        ("model.codec.hight=8", "did you mean 'model.codec.height'"),
        ("sharding.processes=1", "copies of the weights need GPUs"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path: Path, training: Runs, override: str, told: str) -> None:
    run = training(tmp_path)
    process = run.start(*override.split())
    assert process.wait(timeout=120) == 2
    assert [line for line in run.log.splitlines() if line.startswith("error:") and told in line]
    assert "Traceback" not in run.log
