"""Train one stage of the cascade: ``composer [-n PROCESSES] model/train.py yamls/stage1.yaml [key=value ...]``.

Started again with the same name, a run goes on from its newest checkpoint.
"""

import os
import sys
from pathlib import Path

# The launcher puts model/ first on the path, where a file of ours could shadow a library.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from model import cpu_memory  # noqa: E402

if __name__ == "__main__":
    cpu_memory.tune()  # may start the process afresh, so before the slow imports

import hashlib  # noqa: E402
import warnings  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from typing import Any, Literal  # noqa: E402

import torch  # noqa: E402
from composer import Trainer  # noqa: E402
from composer.algorithms import GradientClipping  # noqa: E402
from composer.callbacks import LRMonitor, SpeedMonitor  # noqa: E402
from composer.optim import CosineAnnealingWithWarmupScheduler  # noqa: E402
from composer.utils import dist, get_device, reproducibility  # noqa: E402

# torch and Composer warn about their own ways.
warnings.filterwarnings("ignore", message="TypedStorage is deprecated|FSDP2 Config/APIs are experimental")

from model import checkpoint, command, config, provenance, registry, sharding  # noqa: E402
from model.callbacks import ProgressBar, SamplesConfig, SampleVideos  # noqa: E402
from model.data import dataset  # noqa: E402
from model.data.dataset import DataConfig  # noqa: E402
from model.data.schema import Manifest  # noqa: E402
from model.denoiser import Denoiser, ModelConfig  # noqa: E402
from model.ema import EMA, EMAConfig  # noqa: E402
from model.lamb import LAMB, LAMBConfig  # noqa: E402
from model.registry import PublishConfig, TrackingConfig  # noqa: E402


@dataclass(frozen=True)
class ScheduleConfig:
    """Table 9: cosine decay after a linear warm-up, in optimiser steps."""

    steps: int = 550_000
    warmup: int = 10_000
    final: float = 0.0  # the learning rate ends at this share of its peak; the paper names a cosine and no end


@dataclass(frozen=True)
class CheckpointConfig:
    """Sharded checkpoints under the run's folder."""

    every: int = 1000  # steps
    keep: int = 3


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    name: str  # of the run; its folder is FOLDER/NAME
    model: ModelConfig
    data: DataConfig
    optimizer: LAMBConfig = field(default_factory=LAMBConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    samples: SamplesConfig | None = None
    publish: PublishConfig | None = None
    folder: str = "runs"
    initialise_from: str | None = None  # models:/NAME@ALIAS or a folder: stage 2 starts from stage 1's weights
    global_batch: int = 4096
    microbatch: int | None = None  # samples per process at once; None for the whole batch
    clip_norm: float = 0.5  # gradient clipping is used, its bound unstated; this is the first author's later choice
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    seed: int = 17


def train(c: TrainConfig) -> None:
    """Build everything, fit, publish."""
    device = get_device(None)
    dist.initialize_dist(device, timeout=1800.0)
    if device.name == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_local_world_size()))
    reproducibility.seed_all(c.seed)
    if dist.get_global_rank() == 0:
        registry.ensure_experiment(c.tracking)
    dist.barrier()

    manifests = dataset.manifests(c.data)
    loader = dataset.build_loader(c.data, c.global_batch)
    denoiser = Denoiser(c.model, sharding.build_device())
    if c.initialise_from and dist.get_global_rank() == 0:
        transfer = checkpoint.initialise_from(denoiser, registry.fetch(c.initialise_from, c.tracking.uri))
        print(f"from {c.initialise_from}: copied {len(transfer.copied)} weights, new {transfer.new}, unused {transfer.unused}")
    ema = EMA(c.ema)
    callbacks = [ema, ProgressBar(c.name, c.schedule.steps), LRMonitor(), SpeedMonitor(window_size=20)]
    if c.samples:
        text = next(iter(manifests.values())).text
        callbacks.append(SampleVideos(c.samples, ema, text.encoder, text.max_tokens))
    mlflow_logger = registry.make_logger(c.tracking, c.name)
    trainer = Trainer(
        model=denoiser,
        train_dataloader=loader,
        optimizers=LAMB(denoiser.parameters(), c.optimizer),
        schedulers=CosineAnnealingWithWarmupScheduler(f"{c.schedule.warmup}ba", f"{c.schedule.steps}ba", c.schedule.final),
        algorithms=GradientClipping("norm", c.clip_norm),
        callbacks=callbacks,
        loggers=mlflow_logger,
        parallelism_config=sharding.parallelism(),
        max_duration=f"{c.schedule.steps}ba",
        device_train_microbatch_size=c.microbatch or c.global_batch // dist.get_world_size(),
        precision=c.precision if device.name == "gpu" else "fp32",
        run_name=c.name,
        seed=c.seed,
        save_folder=str(Path(c.folder, c.name, "checkpoints")),
        save_interval=f"{c.checkpoints.every}ba",
        save_num_checkpoints_to_keep=c.checkpoints.keep,
        autoresume=True,
        progress_bar=False,
        dist_timeout=1800.0,
    )
    sharding.average_gradients_on_gloo(trainer.state.model)
    trainer.logger.log_hyperparameters(_flat(config.to_tree(c)))
    if trainer._rng_state is not None:
        # Composer restores the random state only where it has to replay batches, which our dataset spares it.
        reproducibility.load_rng_state(trainer._rng_state)
        trainer._rng_state = None
    try:
        trainer.fit()
        publish(c, ema, int(trainer.state.timestamp.batch), manifests, mlflow_logger._run_id)
    except BaseException:
        trainer.close()  # first: it flushes, and then reports the run FINISHED
        registry.mark_failed(c.tracking, mlflow_logger._run_id)
        raise
    trainer.close()


def publish(c: TrainConfig, ema: EMA, step: int, manifests: dict[str, Manifest], run_id: str | None) -> None:
    """Write the artefact with the EMA weights, and register it if the config says so."""
    weights = checkpoint.gather(ema.weights)
    if dist.get_global_rank() != 0:
        return
    folder = Path(c.folder, c.name, f"model-step-{step:07d}")
    origin = checkpoint.Origin(c.name, step, provenance.git_commit())
    checkpoint.write(folder, weights, config.to_tree(c), manifests, origin)
    print(f"model of step {step}: {folder}")
    if c.publish and run_id:
        data = hashlib.sha256("".join(manifest.to_json() for manifest in manifests.values()).encode()).hexdigest()[:16]
        tags = {"run": c.name, "step": str(step), "commit": origin.commit, "data": data}
        version = registry.publish(folder, c.tracking, c.publish, run_id, tags)
        print(f"registered as models:/{c.publish.name}@{c.publish.alias}, version {version}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one level with dotted keys, as MLflow shows parameters."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


if __name__ == "__main__":
    command.run(TrainConfig, train, __doc__ or "", example="composer -n 2 model/train.py yamls/demo/stage1.yaml")
