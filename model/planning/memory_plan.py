"""What a training run asks of its GPUs, counted before it starts and without allocating the model.

Nothing is derived by hand: the model's own training step runs on meta tensors (model/planning/meta_step.py), for one sample and
for the configured microbatch. docs/plan.md says what each number means and how far it can be trusted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from model import finetuning
from model.data import batch, dataset
from model.denoiser import Denoiser
from model.errors import UserError
from model.networks.conditioning import ConditioningTokens
from model.planning import device_memory
from model.planning.device_memory import Memory, Parameters
from model.planning.meta_step import StepCount, count_step

if TYPE_CHECKING:
    from model.train import TrainConfig  # which holds its run against the plan

GIB = 2**30
HEADROOM = 0.1  # share of a GPU left to what is not counted: CUDA's context, NCCL's buffers, kernels' workspaces, fragmentation


@dataclass(frozen=True)
class Computation:
    """FLOPs per video."""

    first_pass: int  # self-conditioning, without gradient
    forward: int
    backward: int  # gradients alone
    recomputation: int  # by activation checkpointing
    step: int  # all of these


@dataclass(frozen=True)
class Fit:
    """Whether the run fits on its GPUs."""

    gpu_memory: int  # bytes
    usable: int  # bytes, less the headroom
    fits: bool
    largest_microbatch: int  # that fits; 0 if none does


@dataclass(frozen=True)
class Run:
    """The run's extent."""

    global_batch: int
    gpu_batch: int  # samples per GPU and step
    microbatch: int
    microbatches: int  # per step
    steps: int
    samples: int  # seen over the run
    videos: int  # of these
    images: int
    flops: int  # of the run


@dataclass(frozen=True)
class NoiseScale:
    """The rule sigma_in = s sqrt(T), s = longer side / 64 (section 3.2), and what is configured."""

    sigma_in: float
    rule: float


@dataclass(frozen=True)
class Budget:
    """What a training run asks for."""

    name: str
    gpus: int
    precision: str
    parameters: Parameters
    tokens: dict[str, int]
    computation: Computation
    memory: Memory
    fit: Fit
    run: Run
    noise: NoiseScale

    def flat(self) -> dict[str, Any]:
        """One level with dotted keys; FLOPs are per video, memory is in bytes."""
        return dict(_flatten(asdict(self), ""))


def count(c: TrainConfig, gpus: int = 8, gpu_memory: float = 80.0) -> Budget:
    """Count what ``c`` asks of each of ``gpus`` GPUs with ``gpu_memory`` GiB.

    Raises:
        UserError: a number of GPUs that the batch does not split over, or data that does not suit the model.
    """
    if gpus < 1 or not gpu_memory > 0:
        raise UserError(f"gpus and gpu-memory must be positive, got {gpus} and {gpu_memory:g}")
    mix = dataset.mixture(c.data, c.global_batch, gpus)
    microbatch = min(c.microbatch or mix.size, mix.size)
    model = build(c)
    tokens: dict[str, int] = dict(getattr(c.model.network, "tokens", {}))
    try:
        one = _count_step(c, 1, tokens)
        second = max(2, microbatch)  # two sizes tell the largest that fits, for memory is linear in the batch
        other = _count_step(c, second, tokens)
    except ValueError as error:
        raise UserError(f"the configured data does not suit the model: {error}") from error
    computation = Computation(
        first_pass=one.first_pass,
        forward=one.forward,
        backward=one.backward,
        recomputation=one.recomputation,
        step=one.first_pass + one.forward + one.backward + one.recomputation,
    )
    local_batch = sum(tensor.nbytes for tensor in tree_leaves(_packed(c, mix.videos, mix.images)) if isinstance(tensor, Tensor))
    memory = device_memory.memory(
        model,
        c.optimizer,
        c.precision,
        one,
        one if microbatch == 1 else other,
        local_batch,
        sharing=min(gpus, c.sharding.processes or gpus),
        reshard=c.sharding.reshard,
        averages=1 + len(c.ema.others),
    )
    usable = round(gpu_memory * GIB * (1 - HEADROOM))
    room = usable - (memory.training - memory.activations) - one.peak  # for samples after the first
    largest = min(mix.size, max(0, 1 + math.floor(room * (second - 1) / (other.peak - one.peak))))
    return Budget(
        name=c.name,
        gpus=gpus,
        precision=c.precision,
        parameters=device_memory.count_parameters(model),
        tokens=tokens,
        computation=computation,
        memory=memory,
        fit=Fit(round(gpu_memory * GIB), usable, memory.total <= usable, largest if memory.update <= usable else 0),
        run=_run(c, mix, gpus, microbatch, computation.step),
        noise=NoiseScale(
            sigma_in=c.model.diffusion.sigma_in,
            rule=max(c.model.codec.height, c.model.codec.width) / 64 * math.sqrt(c.data.frames),
        ),
    )


def build(c: TrainConfig) -> Denoiser:
    """The model of a run on the meta device, with what does not train frozen."""
    model = Denoiser(c.model, "meta")
    model.network.shard_blocks = c.sharding.blocks
    if c.finetune:
        finetuning.prepare(model, c.finetune)
    return model


def _count_step(c: TrainConfig, samples: int, tokens: dict[str, int]) -> StepCount:
    """Count a pass of ``samples`` videos; the number of conditioning tokens goes into ``tokens``."""
    model = build(c)
    for module in model.modules():
        if isinstance(module, ConditioningTokens):
            module.register_forward_hook(lambda _module, _inputs, output: tokens.update(conditioning=output[0].shape[1]))
    inputs = partial(example_batch, c, samples)
    return count_step(model, inputs, c.precision)


def _packed(c: TrainConfig, videos: int, images: int) -> batch.PackedBatch:
    """A batch as it leaves the loader, on the meta device."""
    count, frame = videos + images, (c.data.height, c.data.width, batch.CHANNELS)
    with torch.device("meta"):
        return batch.PackedBatch(
            videos=torch.empty(videos, c.data.frames, *frame, dtype=torch.uint8),
            images=torch.empty(images, 1, *frame, dtype=torch.uint8),
            text=torch.empty(count, c.data.max_tokens, c.data.text_width, dtype=torch.bfloat16),
            text_mask=torch.empty(count, c.data.max_tokens, dtype=torch.bool),
            frame_rate=torch.empty(count),
            resolution=torch.empty(count, 2),
            is_image=torch.empty(count, dtype=torch.bool),
            seed=[0] * count,
            key=[""] * count,
            caption=[""] * count,
        )


def example_batch(c: TrainConfig, videos: int) -> batch.Batch:
    """A batch of so many videos on the meta device, as the model gets it."""
    return batch.unpack(_packed(c, videos, 0), c.data.frames)


def _run(c: TrainConfig, mix: dataset.Mixture, gpus: int, microbatch: int, step_flops: int) -> Run:
    samples = c.global_batch * c.schedule.steps
    return Run(
        global_batch=c.global_batch,
        gpu_batch=mix.size,
        microbatch=microbatch,
        microbatches=math.ceil(mix.size / microbatch),
        steps=c.schedule.steps,
        samples=samples,
        videos=mix.videos * gpus * c.schedule.steps,
        images=mix.images * gpus * c.schedule.steps,
        flops=samples * step_flops,
    )


def _flatten(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
