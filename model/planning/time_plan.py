"""How long a training run takes on known GPUs by the roofline (model/planning/roofline.py): a bound to hold a run against."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import optimizers
from model.data import dataset
from model.planning import memory_plan, roofline
from model.planning.roofline import Device, Kernel, Row
from model.planning.trace import Operation, trace_step, trace_update

if TYPE_CHECKING:
    from model.train import TrainConfig

DAY = 86_400  # seconds


@dataclass(frozen=True)
class Time:
    """Seconds of one GPU."""

    video: float  # of training on one video, in a microbatch; without the update
    update: float  # of the optimiser's step and the average's
    step: float  # all microbatches of a step, and the update
    run: float  # all steps


@dataclass(frozen=True)
class TimePlan:
    """A run's time on one kind of GPU."""

    device: Device
    eager: Time
    fused: Time
    parts_eager: list[Row]  # of one microbatch
    parts_fused: list[Row]
    microbatch: int


def predict(c: TrainConfig, gpus: int) -> list[TimePlan]:
    """One plan for each kind of GPU, of ``gpus`` of them.

    Raises:
        UserError: a number of GPUs that the batch does not split over.
    """
    mix = dataset.mixture(c.data, c.global_batch, gpus)
    microbatch = min(c.microbatch or mix.size, mix.size)
    operations = trace_step(memory_plan.build(c), partial(memory_plan.example_batch, c, microbatch), c.precision)
    update, sharing = trace_updates(c), min(gpus, c.sharding.processes or gpus)
    eager, fused = roofline.eager(operations), roofline.fused(operations)
    moved, launched = sum(o.bytes for o in update) / sharing, sum(o.launches for o in update)

    def time(kernels: list[Kernel], device: Device, hosted: bool) -> Time:
        once = roofline.seconds(kernels, device, hosted)
        updating = max(moved / (device.bandwidth * roofline.REACHED_BANDWIDTH), roofline.HOST_LAUNCH * launched)
        step = math.ceil(mix.size / microbatch) * once + updating
        return Time(once / microbatch, updating, step, step * c.schedule.steps)

    return [
        TimePlan(
            device,
            eager=time(eager, device, hosted=True),
            fused=time(fused, device, hosted=False),
            parts_eager=roofline.by_part(eager, device),
            parts_fused=roofline.by_part(fused, device),
            microbatch=microbatch,
        )
        for device in roofline.DEVICES.values()
    ]


def trace_updates(c: TrainConfig) -> list[Operation]:
    """What follows the gradients of a step, on whole weights: the optimiser's step and that of each average."""
    weights: list[Tensor] = [p for p in memory_plan.build(c).parameters() if p.requires_grad]
    optimizer = optimizers.build(weights, c.optimizer)
    for p in weights:
        p.grad = torch.empty_like(p)
    optimizer.step()  # the first one makes the state
    gradients = [p.grad for p in weights if p.grad is not None]
    averages: list[list[Tensor]] = [[torch.empty_like(p) for p in weights] for _ in (c.ema.half_life, *c.ema.others)]

    def update() -> None:
        optimizer.step()
        for average in averages:
            torch._foreach_lerp_(average, weights, 0.5)

    state = [tensor for each in optimizer.state.values() for tensor in each.values()]
    return trace_update(update, [*weights, *gradients, *state, *(t for average in averages for t in average)])
