"""A cascade behind a web address: one MLflow model that holds both stages and the text encoder and answers prompts with clips.

python -m pipelines.serving yamls/serving.yaml
MLFLOW_TRACKING_URI=sqlite:///runs/mlflow.db mlflow models serve -m models:/snapvideo@serving --env-manager local --port 5001
curl localhost:5001/invocations -H 'Content-Type: application/json' -d '{"dataframe_records": [{"prompt": "a corgi runs"}]}'
"""

import base64
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from tqdm import tqdm

from model import checkpoint, command, config, media, registry
from model.errors import UserError
from model.registry import PublishConfig, TrackingConfig
from pipelines.cascade import Cascade, CascadeConfig
from pipelines.ranks import default_device

# The whole code in the artefact: it is run where the model is loaded, and must be what a reader sees at a glance.
ENTRY = """from mlflow.models import set_model

from pipelines.serving import ClipModel

set_model(ClipModel())
"""
INPUTS = Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.long, "seed", required=False)])
OUTPUTS = Schema([ColSpec(DataType.string, "prompt"), ColSpec(DataType.long, "seed"), ColSpec(DataType.string, "mp4")])


@dataclass(frozen=True)
class ServingConfig:
    """A cascade to serve."""

    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    publish: PublishConfig = field(default_factory=lambda: PublishConfig("snapvideo", "serving"))
    experiment: str = "snapvideo"
    artifacts: str | None = "runs/mlflow-artifacts"  # root for a new experiment's files; None leaves it to the server


class ClipModel(PythonModel):
    """Rows of prompt and seed -> rows with the clip: an mp4 in base64. Settings of a request are its ``params``."""

    def load_context(self, context: PythonModelContext) -> None:
        settings = dict(context.model_config)
        parts: Mapping[str, str] = context.artifacts
        places = {"stage1": parts["stage1"], "stage2": parts.get("stage2"), "text_encoder": parts["text_encoder"]}
        built = config.build(CascadeConfig, settings | places, where="the served model's settings")
        self.cascade = Cascade(built, default_device())

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        settings = self._settings(params or {})
        rows = []
        for number, row in enumerate(model_input.to_dict("records")):
            prompt, seed = str(row["prompt"]), row.get("seed")
            seed = number if seed is None or pd.isna(seed) else int(seed)
            clip = self.cascade.sample([prompt], [seed], _bar, settings=settings).high[0]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "clip.mp4")
                media.write_mp4(path, clip, settings.frame_rate, {"title": prompt})
                rows.append({"prompt": prompt, "seed": seed, "mp4": base64.b64encode(path.read_bytes()).decode()})
        return pd.DataFrame(rows)

    def _settings(self, params: Mapping[str, Any]) -> CascadeConfig:
        own = self.cascade.config
        return replace(
            own,
            stage1_sampler=replace(own.stage1_sampler, steps=params["num_inference_steps"], guidance=params["guidance_scale"]),
            stage2_sampler=replace(own.stage2_sampler, guidance=params["guidance_scale"]),
        )


def serve(c: ServingConfig) -> None:
    """Register the cascade as one model.

    Raises:
        UserError: models or the text encoder that cannot be had, or an encoder that is no folder.
    """
    if c.cascade.stage1 is None:
        raise UserError("cascade.stage1 is null: a served model starts from prompts, so it needs a first stage")
    cascade = Cascade(c.cascade, "cpu")  # says what does not belong together
    uri = c.cascade.tracking_uri
    encoder = Path(cascade.encoder.path).expanduser()
    if not encoder.is_dir():
        raise UserError(f"text encoder {encoder}: to be served it must be a folder")
    parts = {"stage1": str(registry.fetch(c.cascade.stage1, uri)), "text_encoder": str(encoder)}
    if c.cascade.stage2:
        parts["stage2"] = str(registry.fetch(c.cascade.stage2, uri))
    settings = config.to_tree(replace(c.cascade, stage1="", stage2=None, text_encoder=None))
    sampler = c.cascade.stage1_sampler
    params = ParamSchema(
        [
            ParamSpec("num_inference_steps", DataType.long, sampler.steps),
            ParamSpec("guidance_scale", DataType.double, float(sampler.guidance)),
        ]
    )
    mlflow.set_tracking_uri(uri)  # which MLflow's artifact clients ask
    tracking = TrackingConfig(uri, c.experiment, c.artifacts)
    run = MlflowClient(uri).create_run(registry.ensure_experiment(tracking), run_name=f"serve {c.publish.name}")
    with tempfile.TemporaryDirectory() as scratch:
        entry = Path(scratch, "entry.py")
        entry.write_text(ENTRY, encoding="utf-8")
        folder = Path(scratch, "model")
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(entry),
            artifacts=parts,
            model_config=settings,
            signature=ModelSignature(INPUTS, OUTPUTS, params),
            pip_requirements=["snapvideo"],
        )
        tags = {name: f"{stage.origin.run} step {stage.origin.step}" for name, stage in _stages(cascade).items()}
        done = registry.publish(folder, tracking, c.publish, run.info.run_id, tags)
    MlflowClient(uri).set_terminated(run.info.run_id)
    print(f"registered as models:/{c.publish.name}/{done.version}, models:/{c.publish.name}@{c.publish.alias}")
    print(
        f"serve it: MLFLOW_TRACKING_URI={uri} mlflow models serve -m models:/{c.publish.name}@{c.publish.alias} "
        "--env-manager local --port 5001"
    )


def _stages(cascade: Cascade) -> dict[str, checkpoint.Published]:
    stages = {"stage1": cascade.stage1, "stage2": cascade.stage2}
    return {name: stage for name, stage in stages.items() if stage is not None}


def _bar(stage: str, steps: int) -> "tqdm[int]":
    return tqdm(range(steps), desc=stage, unit="step", leave=False)


if __name__ == "__main__":
    command.run(ServingConfig, serve, __doc__ or "", example="python -m pipelines.serving yamls/serving.yaml")
