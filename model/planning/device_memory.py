"""What a training step keeps in the memory of one GPU: weights, state and activations under FSDP2. Imports torch alone.

Nothing is derived by hand: the model's own training step and the optimiser's run on meta tensors (model/planning/meta_step.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import optimizers
from model.optimizers import OptimizerConfig
from model.planning.meta_step import Meter, Precision, StepCount, compute_dtype, fsdp_units

FLOAT32 = 4  # bytes; of the sharded state, and of FSDP2's gradient reduction


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


def count_parameters(model: nn.Module) -> Parameters:
    """The numbers of a model's weights, by component and by the units that FSDP2 gathers."""
    components: dict[str, int] = {}
    for name, p in model.named_parameters():
        _, top, *below = name.split(".")  # the first is the network itself
        component = f"{top}.{below[1]}" if below and below[0].isdigit() else top
        components[component] = components.get(component, 0) + p.numel()
    units = fsdp_units(model)
    owner = {p: unit for unit in units for p in unit.parameters()}  # an outer unit comes before those within, which take over
    held = {unit: [p for p, its in owner.items() if its is unit] for unit in units}
    roots = set(model.children())
    root = [p for unit, own in held.items() if unit in roots for p in own]
    blocks = [own for unit, own in held.items() if unit not in roots]
    return Parameters(
        total=sum(components.values()),
        trained=_trained(model.parameters()),
        components=components,
        root_unit=sum(p.numel() for p in root),
        largest_unit=max((sum(p.numel() for p in own) for own in blocks), default=0),
        root_unit_trained=_trained(root),
        largest_unit_trained=max(map(_trained, blocks), default=0),
    )


def _trained(params: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in params if p.requires_grad)


def largest_shard(p: Tensor, gpus: int) -> int:
    """Numbers on the first GPU, which holds most: FSDP2 deals out rows."""
    return math.ceil(p.shape[0] / gpus) * math.prod(p.shape[1:]) if p.ndim else 1


@dataclass(frozen=True)
class OptimizerCount:
    """Bytes per byte of weights that train."""

    state: float
    temporaries: float


def count_optimizer(model: nn.Module, config: OptimizerConfig) -> OptimizerCount:
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
    return OptimizerCount(meter.live / weights, (meter.peak - meter.live) / weights)


def memory(
    model: nn.Module,
    optimizer: OptimizerConfig,
    precision: Precision,
    one: StepCount,
    microbatch: StepCount,
    batch_bytes: int,
    sharing: int = 1,
    reshard: bool = True,
    averages: int = 1,
) -> Memory:
    """The memory of one GPU, the first, which holds most.

    Args:
        model: on the meta device, frozen where it does not train.
        optimizer: the optimiser's configuration.
        precision: Composer's.
        one: the step of one sample.
        microbatch: the step of as many as are computed at once.
        batch_bytes: what a step's samples take as they come from the loader.
        sharing: GPUs that one copy of the weights is spread over.
        reshard: whether a block's gathered weights are freed after its forward pass.
        averages: how many averages of the weights are kept.
    """
    shard = sum(FLOAT32 * largest_shard(p, sharing) for p in model.parameters())
    trained = sum(FLOAT32 * largest_shard(p, sharing) for p in model.parameters() if p.requires_grad)
    parameters, counted = count_parameters(model), count_optimizer(model, optimizer)
    compute = torch.empty(0, dtype=compute_dtype(precision)).element_size()
    at_once = parameters.root_unit + 2 * parameters.largest_unit if reshard else parameters.total
    gathered = compute * at_once
    root, largest = parameters.root_unit_trained, parameters.largest_unit_trained
    reducing = compute * (root + largest) + FLOAT32 * max(root, largest)
    moments, temporaries = round(trained * counted.state), round(trained * counted.temporaries)
    average = trained * averages
    state = shard + trained + moments + average
    training = state + gathered + reducing + batch_bytes + microbatch.peak
    update = state + batch_bytes + temporaries
    return Memory(
        weights=shard,
        gradients=trained,
        moments=moments,
        average=average,
        state=state,
        gathered=gathered,
        reducing=reducing,
        batch=batch_bytes,
        activations=microbatch.peak,
        activations_kept=microbatch.kept,
        activations_sample=one.peak,
        optimizer=temporaries,
        training=training,
        update=update,
        total=max(training, update),
    )
