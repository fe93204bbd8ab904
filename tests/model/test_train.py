"""Training as users start it: two processes under Composer's launcher, FSDP2 on gloo, real shards, a real MLflow store."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from model import checkpoint, registry

REPOSITORY = Path(__file__).parents[2]
STEPS, SAVED_EVERY = 24, 7  # 5 batches make an epoch, so the checkpoints lie within epochs
TINY = """
base: {repository}/yamls/demo/stage1.yaml
name: tiny
folder: {folder}
model:
  codec: {{height: 8, width: 16, pad_bottom: 0}}
  network:
    size: [4, 8, 16]
    group: [4, 2, 2]
    patch_width: 32
    latent_tokens: 8
    latent_width: 32
    blocks: 2
    global_layers: 1
    patch_head_width: 16
    latent_head_width: 16
    conditioning_width: 32
    text_width: 4
    dropout: 0.1 # so that a resumed run must also take up the random state
data: {{videos: {data}/videos, images: {data}/images, frames: 4, max_tokens: 5}}
schedule: {{steps: {steps}, warmup: 3}}
global_batch: 8
checkpoints: {{every: {every}}}
samples: null
tracking: {{uri: 'sqlite:///{folder}/mlflow.db', artifacts: '{folder}/artifacts'}}
publish: {{name: tiny, alias: newest}}
"""

Runner = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_dataset: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("videos", "images"):
        write_dataset(folder / kind, kind, 20, size=(8, 16), frames=12)
    return folder


@pytest.fixture
def start(data: Path) -> Runner:
    """Starts a tiny run in a folder, in a process group of its own."""

    def run(folder: Path, *overrides: str, processes: int = 2) -> subprocess.Popen[str]:
        folder.mkdir(parents=True, exist_ok=True)
        yaml = folder / "tiny.yaml"
        yaml.write_text(TINY.format(repository=REPOSITORY, folder=folder, data=data, steps=STEPS, every=SAVED_EVERY))
        launcher = Path(sys.executable).with_name("composer")
        command = [str(launcher), "-n", str(processes), "model/train.py", str(yaml), *overrides]
        log = (folder / "log.txt").open("a")
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, text=True, start_new_session=True)

    return run


def finish(process: subprocess.Popen[str], folder: Path) -> None:
    assert process.wait(timeout=240) == 0, (folder / "log.txt").read_text()[-3000:]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "tiny" / f"model-step-{STEPS:07d}" / checkpoint.WEIGHTS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted")


def test_a_run_trains_tracks_and_publishes(uninterrupted: Path, start: Runner) -> None:
    finish(start(uninterrupted), uninterrupted)
    client = MlflowClient(f"sqlite:///{uninterrupted}/mlflow.db")
    version = client.get_model_version_by_alias("tiny", "newest")
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.01"
    losses = [metric.value for metric in client.get_metric_history(run.info.run_id, "loss/train/total")]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert {"throughput/samples_per_sec", "lr-LAMB/group0"} <= set(run.data.metrics)
    published = checkpoint.load(registry.fetch("models:/tiny@newest", f"sqlite:///{uninterrupted}/mlflow.db"))
    assert published.origin.step == STEPS and set(published.manifests) == {"videos", "images"}
    for name, tensor in weights(uninterrupted).items():
        torch.testing.assert_close(dict(published.denoiser.named_parameters())[name].data, tensor, rtol=0, atol=0)


def test_a_run_killed_within_an_epoch_resumes_to_equal_weights(tmp_path: Path, uninterrupted: Path, start: Runner) -> None:
    reference = weights(uninterrupted)
    process = start(tmp_path)
    latest = tmp_path / "tiny" / "checkpoints" / "latest-rank0.pt"
    deadline = time.monotonic() + 200
    while not (latest.is_symlink() and latest.readlink().name.endswith(f"ba{2 * SAVED_EVERY}")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()[-3000:]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "tiny").glob("model-step-*")), "it had finished before it was killed: nothing was shown"

    finish(start(tmp_path), tmp_path)
    resumed = weights(tmp_path)
    assert resumed.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0, msg=name)
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert [run.info.status for run in runs] == ["FINISHED"], "the successor takes up the killed run"


@pytest.mark.parametrize(
    ("override", "told"),
    [("data.height=9", "frame height is 8"), ("model.codec.hight=8", "did you mean 'model.codec.height'")],
)
def test_bad_input_is_told_in_one_line(tmp_path: Path, start: Runner, override: str, told: str) -> None:
    process = start(tmp_path, override)
    assert process.wait(timeout=120) == 2
    log = (tmp_path / "log.txt").read_text()
    assert [line for line in log.splitlines() if line.startswith("error:") and told in line]
    assert "Traceback" not in log
