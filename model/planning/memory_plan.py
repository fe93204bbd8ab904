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

from model import finetuning, optimizers
from model.config import UserError
from model.data import batch, dataset
from model.denoiser import Denoiser
from model.networks.conditioning import ConditioningTokens
from model.optimizers import OptimizerConfig
from model.planning.meta_step import Meter, StepCount, compute_dtype, count_step, fsdp_units

if TYPE_CHECKING:
    from model.train import TrainConfig  # which holds its run against the plan

GIB = 2**30
FLOAT32 = 4  # bytes; of the sharded state, and of FSDP2's gradient reduction
HEADROOM = 0.1  # share of a GPU left to what is not counted: CUDA's context, NCCL's buffers, kernels' workspaces, fragmentation


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights."""

    total: int
    trained: int  # of these; all where finetune names no part
    components: dict[str, int]  # by part of the network; parts of repeated blocks are summed over the blocks
    largest_unit: int  # weights of the largest block that FSDP2 gathers at once
    root_unit: int  # weights outside of such blocks, which stay gathered
    largest_unit_trained: int  # of a block, the most that train
    root_unit_trained: int


@dataclass(frozen=True)
class Computation:
    """FLOPs per video."""

    first_pass: int  # self-conditioning, without gradient
    forward: int
    backward: int  # gradients alone
    recomputation: int  # by activation checkpointing
    step: int  # all of these


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int  # sharded, float32
    gradients: int  # the same, of what trains
    moments: int  # twice that: the optimiser's
    average: int  # once for each half-life: the EMA
    state: int  # the four
    gathered: int  # FSDP2's whole copies in the compute dtype: the root, the block at work, the one fetched ahead; or all blocks
    reducing: int  # whole gradients of the root and of the block at work, and the float32 buffer of a reduction
    batch: int  # the step's samples as they come from the loader
    activations: int  # most alive at once in a microbatch's pass, inputs and temporaries too
    activations_kept: int  # of a microbatch, alive between forward and backward
    activations_sample: int  # most alive at once in the pass of one sample
    optimizer: int  # temporaries of an optimiser step
    training: int  # peak of a microbatch's pass: state, gathered, reducing, batch and activations
    update: int  # peak of the optimiser step: state, batch and optimizer
    total: int  # the larger of the two peaks


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
    model = _build(c)
    parameters = _parameters(model)
    sharing = min(gpus, c.sharding.processes or gpus)  # GPUs that one copy of the weights is spread over
    shard = sum(FLOAT32 * _largest_shard(p, sharing) for p in model.parameters())
    trained = sum(FLOAT32 * _largest_shard(p, sharing) for p in model.parameters() if p.requires_grad)
    optimizer = _count_optimizer(model, c.optimizer)
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
    memory = _memory(c, parameters, shard, trained, optimizer, local_batch, one, one if microbatch == 1 else other)
    usable = round(gpu_memory * GIB * (1 - HEADROOM))
    room = usable - (memory.training - memory.activations) - one.peak  # for samples after the first
    largest = min(mix.size, max(0, 1 + math.floor(room * (second - 1) / (other.peak - one.peak))))
    return Budget(
        name=c.name,
        gpus=gpus,
        precision=c.precision,
        parameters=parameters,
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


def _build(c: TrainConfig) -> Denoiser:
    model = Denoiser(c.model, "meta")
    model.network.shard_blocks = c.sharding.blocks
    if c.finetune:
        finetuning.prepare(model, c.finetune)
    return model


def _parameters(model: Denoiser) -> Parameters:
    components: dict[str, int] = {}
    for name, p in model.named_parameters():
        _, top, *below = name.split(".")  # the first is the network itself
        component = f"{top}.{below[1]}" if below and below[0].isdigit() else top
        components[component] = components.get(component, 0) + p.numel()
    units = fsdp_units(model)
    owner = {p: unit for unit in units for p in unit.parameters()}  # an outer unit comes before those within, which take over
    held = {unit: finetuning.Share.of(p for p, its in owner.items() if its is unit) for unit in units}
    roots = set(model.children())
    root, blocks = [share for unit, share in held.items() if unit in roots], [s for unit, s in held.items() if unit not in roots]
    return Parameters(
        total=sum(components.values()),
        trained=finetuning.Share.of(model.parameters()).trained,
        components=components,
        root_unit=sum(share.total for share in root),
        largest_unit=max((share.total for share in blocks), default=0),
        root_unit_trained=sum(share.trained for share in root),
        largest_unit_trained=max((share.trained for share in blocks), default=0),
    )


def _largest_shard(p: Tensor, gpus: int) -> int:
    """Numbers on the first GPU, which holds most: FSDP2 deals out rows."""
    return math.ceil(p.shape[0] / gpus) * math.prod(p.shape[1:]) if p.ndim else 1


@dataclass(frozen=True)
class _OptimizerCount:
    """Bytes per byte of weights that train."""

    state: float
    temporaries: float


def _count_optimizer(model: Denoiser, config: OptimizerConfig) -> _OptimizerCount:
    """Run the optimiser's first step on meta tensors, which makes its state before all else."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizers.build(trained, config)
    gradients = [torch.empty_like(p) for p in trained]
    for p, gradient in zip(trained, gradients, strict=True):
        p.grad = gradient
    meter = Meter()
    meter.ignore([*trained, *gradients])
    with meter:
        optimizer.step()
    weights = sum(p.nbytes for p in trained)
    return _OptimizerCount(meter.live / weights, (meter.peak - meter.live) / weights)


def _count_step(c: TrainConfig, samples: int, tokens: dict[str, int]) -> StepCount:
    """Count a pass of ``samples`` videos; the number of conditioning tokens goes into ``tokens``."""
    model = _build(c)
    for module in model.modules():
        if isinstance(module, ConditioningTokens):
            module.register_forward_hook(lambda _module, _inputs, output: tokens.update(conditioning=output[0].shape[1]))
    inputs = partial(_unpacked, c, samples)
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


def _unpacked(c: TrainConfig, videos: int) -> batch.Batch:
    return batch.unpack(_packed(c, videos, 0), c.data.frames)


def _memory(
    c: TrainConfig,
    parameters: Parameters,
    shard: int,
    trained: int,
    optimizer: _OptimizerCount,
    local_batch: int,
    one: StepCount,
    microbatch: StepCount,
) -> Memory:
    compute = torch.empty(0, dtype=compute_dtype(c.precision)).element_size()
    at_once = parameters.root_unit + 2 * parameters.largest_unit if c.sharding.reshard else parameters.total
    gathered = compute * at_once
    root, largest = parameters.root_unit_trained, parameters.largest_unit_trained
    reducing = compute * (root + largest) + FLOAT32 * max(root, largest)
    moments, temporaries = round(trained * optimizer.state), round(trained * optimizer.temporaries)
    average = trained * (1 + len(c.ema.others))
    state = shard + trained + moments + average
    training = state + gathered + reducing + local_batch + microbatch.peak
    update = state + local_batch + temporaries
    return Memory(
        weights=shard,
        gradients=trained,
        moments=moments,
        average=average,
        state=state,
        gathered=gathered,
        reducing=reducing,
        batch=local_batch,
        activations=microbatch.peak,
        activations_kept=microbatch.kept,
        activations_sample=one.peak,
        optimizer=temporaries,
        training=training,
        update=update,
        total=max(training, update),
    )


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
