"""Train one stage of the cascade: ``composer [-n PROCESSES] model/train.py yamls/stage1.yaml [key=value ...]``.

Started again with the same name, a run goes on from its newest whole checkpoint. Exit codes: 0 done, 2 bad input, 143 stopped by
SIGTERM or SIGUSR1, with a checkpoint: start it again.
"""

import os
import signal
import sys
from pathlib import Path

# The launcher puts model/ first on the path, where a file of ours could shadow a library.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from model import cpu_memory  # noqa: E402

if __name__ == "__main__":
    cpu_memory.tune()  # may start the process afresh, so before the slow imports
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(143))  # until model.preemption takes over

import hashlib  # noqa: E402
import warnings  # noqa: E402
from dataclasses import dataclass, field, replace  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any, Literal  # noqa: E402

import torch  # noqa: E402
from composer import Trainer  # noqa: E402
from composer.callbacks import LRMonitor, SpeedMonitor  # noqa: E402
from composer.optim import CosineAnnealingWithWarmupScheduler  # noqa: E402
from composer.utils import dist, get_device, reproducibility  # noqa: E402

# torch and Composer warn about their own ways.
warnings.filterwarnings("ignore", message="TypedStorage is deprecated|FSDP2 Config/APIs are experimental")

from model import (  # noqa: E402
    adapters,
    checkpoint,
    command,
    config,
    finetuning,
    optimizers,
    provenance,
    registry,
    resume,
    sharding,
    telemetry,
)
from model.balance import Balance  # noqa: E402
from model.callbacks import ProgressBar, SamplesConfig, SampleVideos  # noqa: E402
from model.composer_denoiser import ComposerDenoiser  # noqa: E402
from model.data import dataset  # noqa: E402
from model.data.dataset import DataConfig  # noqa: E402
from model.data.samples import text_states  # noqa: E402
from model.data.schema import Manifest  # noqa: E402
from model.denoiser import ModelConfig  # noqa: E402
from model.ema import EMA, EMAConfig  # noqa: E402
from model.evaluation import Evaluation, EvaluationConfig, noise_bands  # noqa: E402
from model.faults import FaultsConfig, StepGuard  # noqa: E402
from model.finetuning import FinetuneConfig  # noqa: E402
from model.lamb import LAMBConfig  # noqa: E402
from model.networks.conditioning import measure_text  # noqa: E402
from model.optimizers import OptimizerConfig  # noqa: E402
from model.planning import memory_plan  # noqa: E402
from model.preemption import Preempted, Preemption  # noqa: E402
from model.registry import PublishConfig, TrackingConfig  # noqa: E402
from model.resume import CheckpointConfig, WholeCheckpoints  # noqa: E402
from model.sharding import ShardingConfig  # noqa: E402
from model.telemetry import PeakMemory, Telemetry, TelemetryConfig  # noqa: E402
from model.tracking import Tracking  # noqa: E402


@dataclass(frozen=True)
class ScheduleConfig:
    """Table 9: cosine decay after a linear warm-up, in optimiser steps."""

    steps: int = 550_000
    warmup: int = 10_000
    final: float = 0.0  # the learning rate ends at this share of its peak; the paper names a cosine and no end


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    name: str  # of the run; its folder is FOLDER/NAME
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=LAMBConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    samples: SamplesConfig | None = None
    evaluation: EvaluationConfig | None = None
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    publish: PublishConfig | None = None
    folder: str = "runs"
    initialise_from: str | None = None  # models:/NAME@ALIAS or a folder: stage 2 starts from stage 1's weights
    finetune: FinetuneConfig | None = None  # what of initialise_from trains; None: everything
    global_batch: int = 4096
    microbatch: int | None = None  # samples per process at once; None for the whole batch
    clip_norm: float = 0.5  # gradient clipping is used, its bound unstated; this is the first author's later choice
    precision: Literal["fp32", "amp_bf16"] = "amp_bf16"
    compile: bool = False  # the network's blocks; needs a C++ compiler on a CPU, and some minutes at the start
    seed: int = 17

    def __post_init__(self) -> None:
        if self.finetune and self.initialise_from is None:
            raise ValueError("finetune trains part of a published model, which initialise_from must name")
        if self.publish and self.publish.gate and self.evaluation is None:
            raise ValueError("publish.gate names metrics, for which evaluation must be configured")
        codec, network = self.model.codec, self.model.network
        for name, given, built in (
            ("frames", self.data.frames, network.size[0]),
            ("height", self.data.height, codec.height),
            ("width", self.data.width, codec.width),
            ("text_width", self.data.text_width, network.text_width),
        ):
            if given != built:
                raise ValueError(f"data.{name} is {given}, the model is built for {built}")
        if self.evaluation:
            noise_bands(self.evaluation, self.model.diffusion)


def train(c: TrainConfig) -> None:
    """Build everything, fit, publish."""
    device = get_device(None)
    dist.initialize_dist(device, timeout=1800.0)
    if device.name == "cpu":
        torch.set_num_threads(cpu_threads(dist.get_local_world_size()))
        if c.precision != "fp32":  # what is logged and published is what ran
            if dist.get_global_rank() == 0:
                print(f"precision: {c.precision} needs a GPU; on CPUs this run computes in fp32", flush=True)
            c = replace(c, precision="fp32")
    preemption = Preemption()
    reproducibility.seed_all(c.seed)
    manifests = dataset.manifests(c.data)
    if dist.get_global_rank() == 0:
        resume.claim(Path(c.folder, c.name))
    dist.barrier()
    memory = PeakMemory(torch.device(device.name.replace("gpu", "cuda")))
    tracking = Tracking(c.tracking, c.name, Path(c.folder, c.name))
    checkpoints = Path(c.folder, c.name, "checkpoints").absolute()
    found = resume.find_whole(checkpoints)
    if dist.get_global_rank() == 0:
        print(found, flush=True)

    loader = dataset.build_loader(c.data, c.global_batch, c.evaluation.held_out if c.evaluation else None)
    denoiser = ComposerDenoiser(c.model, sharding.build_device())
    denoiser.network.shard_blocks = c.sharding.blocks
    new: list[str] = []
    if found.newest is None and dist.get_global_rank() == 0:
        assert isinstance(loader.dataloader, dataset.JointLoader)
        measure_text(denoiser.network, partial(text_states, loader.dataloader.joint.parts.values()))
    if c.initialise_from and found.newest is None and dist.get_global_rank() == 0:
        transfer = checkpoint.initialise_from(denoiser, registry.fetch(c.initialise_from, c.tracking.uri))
        print(f"from {c.initialise_from}: {transfer}")
        new = transfer.new
    if c.finetune:
        share = finetuning.prepare(denoiser, c.finetune, new)
        if dist.get_global_rank() == 0:
            print(share, flush=True)
    if found.newest:
        resume.require_same_parts(found.newest, denoiser)
    if c.compile:
        denoiser.network.compile_blocks()
    denoiser.flops_per_batch = telemetry.flops_per_batch(c.model, c.data.max_tokens, c.finetune)
    ema = EMA(c.ema)
    followers = [ema, Balance(denoiser.levels)] if denoiser.levels else [ema]
    guard = StepGuard(c.faults, c.clip_norm, followers, Path(c.folder, c.name, "faults"), checkpoints)
    planned = memory_plan.count(c, dist.get_world_size()).memory.total
    callbacks = [preemption, guard, Telemetry(c.telemetry, guard, c.data.frame_rates, memory, planned), *guard.followers]
    callbacks += [ProgressBar(c.name, c.schedule.steps)]
    callbacks += [LRMonitor(), SpeedMonitor(window_size=20)]
    evaluation = Evaluation(c.evaluation, ema, loader, c.data.max_tokens) if c.evaluation else None
    if evaluation:
        callbacks.append(evaluation)
    if c.samples:
        text = next(iter(manifests.values())).text
        callbacks.append(SampleVideos(c.samples, ema, text.encoder, text.max_tokens))
    callbacks.append(WholeCheckpoints(checkpoints, c.checkpoints, preemption, frozenset(found.ignored)))
    trainer = Trainer(
        model=denoiser,
        train_dataloader=loader,
        optimizers=optimizers.build(denoiser.parameters(), c.optimizer),
        schedulers=CosineAnnealingWithWarmupScheduler(f"{c.schedule.warmup}ba", f"{c.schedule.steps}ba", c.schedule.final),
        callbacks=callbacks,
        loggers=tracking,
        parallelism_config=sharding.parallelism(c.sharding),
        max_duration=f"{c.schedule.steps}ba",
        device_train_microbatch_size=c.microbatch or c.global_batch // dist.get_world_size(),
        precision=c.precision,
        run_name=c.name,
        seed=c.seed,
        load_path=None if found.newest is None else str(found.newest),
        progress_bar=False,
        dist_timeout=1800.0,
    )
    sharding.average_gradients_on_gloo(trainer.state.model)
    done = int(trainer.state.timestamp.batch)
    trainer.logger.log_hyperparameters(_flat(config.to_tree(c)))
    tracking.log_text(f"config/from-step-{done:07d}.yaml", config.to_yaml(c))
    if trainer._rng_state is not None:
        # Composer restores the random state only where it has to replay batches, which our dataset spares it.
        reproducibility.load_rng_state(trainer._rng_state)
        trainer._rng_state = None
    try:
        if done < c.schedule.steps:
            trainer.fit()
        elif dist.get_global_rank() == 0:
            anew = f"to train it anew, move {Path(c.folder, c.name)} away"
            print(f"{c.name} has made {done} steps already, of {c.schedule.steps} asked for: nothing to train; {anew}")
        measured = evaluation.measured(trainer.state, trainer.logger) if evaluation else {}
        weights = checkpoint.gather(ema.averaged(trainer.state.model))
        publish(c, weights, int(trainer.state.timestamp.batch), manifests, tracking, measured)
    except BaseException as error:
        tracking.end("KILLED" if isinstance(error, Preempted) else "FAILED")
        trainer.close()
        if isinstance(error, Preempted) and preemption.stopping:
            dist.barrier()  # the launcher kills the others when the first one ends
        raise
    tracking.end("FINISHED")
    trainer.close()


def cpu_threads(processes: int) -> int:
    """How many threads each of so many processes computes with: what OMP_NUM_THREADS says, or the cores shared out."""
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]  # the others are of nested regions
    return int(told) if told.isdigit() and int(told) else max(1, (os.cpu_count() or 1) // processes)


def publish(
    c: TrainConfig,
    weights: dict[str, torch.Tensor],
    step: int,
    manifests: dict[str, Manifest],
    tracking: Tracking,
    metrics: dict[str, float],
) -> None:
    """Write the artefact with the EMA ``weights``, and register it if the config says so."""
    if dist.get_global_rank() != 0:
        return
    folder = Path(c.folder, c.name, f"model-step-{step:07d}")
    origin = checkpoint.Origin(c.name, step, provenance.git_commit())
    lora = c.finetune.lora if c.finetune else None
    plain = adapters.merged(weights, c.model, lora) if lora else weights
    checkpoint.write(folder, plain, config.to_tree(c), manifests, origin)
    if lora:
        adapters.write(folder / checkpoint.ADAPTER, weights, lora)
    print(f"model of step {step}: {folder}")
    if c.publish:
        data = hashlib.sha256("".join(manifest.to_json() for manifest in manifests.values()).encode()).hexdigest()[:16]
        stage = "2" if c.model.upsampler else "1"
        tags = {"run": c.name, "step": str(step), "commit": origin.commit, "data": data, registry.STAGE: stage}
        done = tracking.publish(folder, c.publish, tags, metrics)
        print(f"registered as models:/{c.publish.name}/{done.version}")
        alias = f"models:/{c.publish.name}@{c.publish.alias}"
        print(f"{alias} stays where it is: {done.refused}" if done.refused else f"{alias} is version {done.version}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> one level with dotted keys, as MLflow shows parameters."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


if __name__ == "__main__":
    command.run(TrainConfig, train, __doc__ or "", example="composer -n 2 model/train.py yamls/demo/stage1.yaml")
