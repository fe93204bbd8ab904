"""The served model, loaded as MLflow loads it, and behind ``mlflow models serve`` as users call it."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest

from model import config, media
from model.errors import UserError
from model.registry import PublishConfig
from pipelines.cascade import CascadeConfig
from pipelines.sample import SampleConfig
from pipelines.serving import ServingConfig, serve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(cascade_config: CascadeConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a store that holds ``models:/clips@serving``."""
    folder = tmp_path_factory.mktemp("serving")
    uri = f"sqlite:///{folder}/mlflow.db"
    cascade = replace(cascade_config, tracking_uri=uri)
    serve(ServingConfig(cascade, PublishConfig("clips", "serving"), "tests", str(folder / "artifacts")))
    return uri


def clip_of(encoded: str, folder: Path) -> media.Clip:
    path = folder / "clip.mp4"
    path.write_bytes(base64.b64decode(encoded))
    assert media.read_tags(path)["title"].startswith("a ")
    return media.read_video(path, 100)


def test_prompts_become_clips(store: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri(store)
    model = mlflow.pyfunc.load_model("models:/clips@serving")
    rows = model.predict(pd.DataFrame({"prompt": ["a red circle", "a blue square"], "seed": [7, 8]}))
    assert list(rows["seed"]) == [7, 8]
    clips = [clip_of(row, tmp_path) for row in rows["mp4"]]
    assert clips[0].frames.shape == (4, 12, 32, 3) and clips[0].frame_rate == 8.0
    alone = model.predict(pd.DataFrame({"prompt": ["a blue square"], "seed": [8]}), params={"num_inference_steps": 3})
    assert alone["mp4"][0] == rows["mp4"][1], "of its seed alone; 3 steps are the default here"
    other = model.predict(pd.DataFrame({"prompt": ["a blue square"], "seed": [8]}), params={"guidance_scale": 9.0})
    assert other["mp4"][0] != rows["mp4"][1]


def test_the_artefact_holds_no_pickle(store: str) -> None:
    folder = Path(mlflow.artifacts.download_artifacts("models:/clips@serving", tracking_uri=store))
    # Python leaves its bytecode beside the script when a model is loaded from there.
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    assert kinds <= {".py", ".yaml", ".txt", ".json", ".safetensors", ".model", ""}, kinds
    assert (folder / "MLmodel").is_file()


def test_what_cannot_be_served_is_told(cascade_config: CascadeConfig, tmp_path: Path) -> None:
    missing = replace(cascade_config, stage1="models:/none@best", tracking_uri=f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(UserError, match="models:/none@best"):
        serve(ServingConfig(missing))


def test_the_shipped_yamls_name_the_same_cascade() -> None:
    sampled = config.load(SampleConfig, ROOT / "yamls" / "sample.yaml")
    assert config.load(ServingConfig, ROOT / "yamls" / "serving.yaml").cascade == sampled.cascade


@pytest.mark.slow
def test_a_server_answers(store: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/clips@serving", "--env-manager", "local"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, "MLFLOW_TRACKING_URI": store, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=10):
                    break
            except OSError:
                told = (tmp_path / "log.txt").read_text()[-3000:]
                assert process.poll() is None and time.monotonic() < deadline, told
                time.sleep(0.5)
        asked: dict[str, Any] = {"dataframe_records": [{"prompt": "a red circle"}], "params": {"num_inference_steps": 2}}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (row,) = json.load(answer)["predictions"]
        assert (row["prompt"], row["seed"]) == ("a red circle", 0)
        assert clip_of(row["mp4"], tmp_path).frames.shape == (4, 12, 32, 3)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
