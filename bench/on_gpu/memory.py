"""Part "memory": the peak of a whole training step on one GPU, against what the plan says (model/planning/device_memory.py).

First the 3.9 B stages with one sample, then FIT 500M and the U-Net 284M in their microbatches, of which activations take most.
The step is as Composer runs it: FSDP2 of one process, which gathers each block's weights in bfloat16 and reduces its gradients in
float32; clipping, the optimiser, the average of the weights. A CPU's allocator tells no peak, so there it is times alone.

The plan counts what a run holds, less one thing: here no second copy of the batch lies about as the loader packed it.
"""

import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bench.on_gpu.record import Record
from bench.on_gpu.subjects import MEMORY, Subject, batch_of, shrunk
from bench.timing import seconds
from model import optimizers
from model.denoiser import Denoiser
from model.gradients import clip, local_shard, whole_norms
from model.planning import device_memory
from model.planning.device_memory import Memory
from model.planning.meta_step import StepCount, count_step, fsdp_units

AIM = 0.1  # of the plan, by which the peak may differ
GIB = 2**30


def planned(subject: Subject, videos: int) -> Memory:
    """What the plan says of one process."""

    def count(samples: int) -> StepCount:
        inputs = functools.partial(batch_of, subject.model, samples, "meta")
        return count_step(Denoiser(subject.model, "meta"), inputs, "amp_bf16")

    one = count(1)
    model = Denoiser(subject.model, "meta")
    return device_memory.memory(model, subject.optimizer, "amp_bf16", one, one if videos == 1 else count(videos), batch_bytes=0)


class Step:
    """A training step of a subject under FSDP2, in its two halves."""

    def __init__(self, subject: Subject, videos: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.denoiser, self.device = Denoiser(subject.model, device), device
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (1,))
        for unit in reversed(fsdp_units(self.denoiser)):  # the innermost first
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        self.weights: list[Tensor] = list(self.denoiser.parameters())
        self.optimizer = optimizers.build(self.weights, subject.optimizer)
        self.average = [local_shard(p.detach()).clone() for p in self.weights]
        self.batch = batch_of(subject.model, videos, device)

    def gradients(self) -> None:
        """Forward and backward."""
        with torch.autocast(self.device.type, torch.bfloat16):
            terms = self.denoiser(self.batch)
        self.denoiser.loss(terms, self.batch).backward()

    @torch.no_grad()
    def update(self) -> None:
        """Clipping, the optimiser and the average."""
        gradients = [local_shard(p.grad) for p in self.weights if p.grad is not None]
        clip(gradients, whole_norms(self.weights, gradients)[0].norm(), 0.5)
        del gradients
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [local_shard(p) for p in self.weights], 0.001)
        self.optimizer.zero_grad(set_to_none=True)


def free_bytes(device: torch.device) -> int:
    """Memory that is there to be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run(record: Record, device: torch.device, tiny: bool, seconds_left: float) -> None:
    """Measure what the record lacks, for so long."""
    end = time.monotonic() + seconds_left
    with tempfile.TemporaryDirectory() as folder:
        place = f"file://{Path(folder, 'store')}"
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=place, rank=0, world_size=1)
        try:
            for subject, videos in MEMORY:
                if record.find(subject=subject.name, videos=videos) is None and time.monotonic() < end:
                    _row(record, subject, videos, device, tiny)
        finally:
            distributed.destroy_process_group()


def _row(record: Record, subject: Subject, videos: int, device: torch.device, tiny: bool) -> None:
    """One row; of what is larger than the device, the plan alone."""
    key = {"subject": subject.name, "videos": videos}
    subject, count = (shrunk(subject), min(2, videos)) if tiny else (subject, videos)
    plan = planned(subject, count)
    told = {name: getattr(plan, name) / GIB for name in ("training", "update", "total")}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    free = free_bytes(device)
    if plan.total > free:
        record.add(
            key, plan_gib=told, too_large=f"not tried: by the plan it takes {plan.total / GIB:.1f} GiB of {free / GIB:.1f}"
        )
        return
    measured = _measured(subject, count, device, rounds=2 if tiny else 3)
    if measured is None:
        record.add(key, plan_gib=told, failed=f"out of memory, where the plan takes {plan.total / GIB:.1f} GiB")
    else:
        record.add(key, plan_gib=told, **measured)


def _measured(subject: Subject, videos: int, device: torch.device, rounds: int) -> dict[str, Any] | None:
    """Medians of the halves' seconds, and the peaks of both; None if memory is too small."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    times: dict[str, list[float]] = {"training": [], "update": []}
    peaks: dict[str, list[int]] = {"training": [], "update": []}
    try:
        step = Step(subject, videos, device)
        halves: dict[str, Callable[[], None]] = {"training": step.gradients, "update": step.update}
        for number in range(rounds + 1):  # the first makes the optimiser's state
            for name, half in halves.items():
                if cuda:
                    torch.cuda.reset_peak_memory_stats(device)
                took = seconds(half, device)
                if number:
                    times[name].append(took)
                    peaks[name].append(torch.cuda.max_memory_allocated(device) - before if cuda else 0)
    except torch.OutOfMemoryError:
        return None
    found: dict[str, Any] = {"seconds": {name: statistics.median(taken) for name, taken in times.items()}}
    if cuda:
        peak = {name: max(seen) for name, seen in peaks.items()}
        found["peak_gib"] = {**{name: size / GIB for name, size in peak.items()}, "total": max(peak.values()) / GIB}
        found["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB  # with what is lost between tensors
    return found


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Peak and plan of each model."""
    if not rows:
        return []
    lines = [
        f"{'':21}{'s / step':>17}{'peak GiB':>18}{'plan GiB':>18}{'peak / plan':>13}",
        f"{'model':15}{'videos':>6}{'training':>10}{'update':>7}" + f"{'training':>11}{'update':>7}" * 2,
    ]
    for row in rows:
        named, plan, peak = f"{row['key']['subject']:15}{row['key']['videos']:6}", row["plan_gib"], row.get("peak_gib")
        if "seconds" not in row:
            lines.append(f"{named}  {row.get('too_large') or row['failed']}")
            continue
        took = f"{row['seconds']['training']:10.3f}{row['seconds']['update']:7.3f}"
        peaks = f"{peak['training']:11.2f}{peak['update']:7.2f}" if peak else f"{'-':>11}{'-':>7}"
        share = f"{peak['total'] / plan['total']:13.3f}" if peak else f"{'-':>13}"
        lines.append(f"{named}{took}{peaks}{plan['training']:11.2f}{plan['update']:7.2f}{share}")
    return [
        *lines,
        f"aim: a peak within {AIM:.0%} of the plan" + ("" if any(r.get("peak_gib") for r in rows) else "; none was measured"),
    ]
