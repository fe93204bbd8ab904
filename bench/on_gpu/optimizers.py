"""Part "optimizers": LAMB's step against AdamW's on FIT 500M's weights, clipping, and the average of the weights.

All go over the same weights and gradients, in rounds that alternate them with a copy of as many bytes as the weights have, which
is the memory's own limit.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.on_gpu.record import Record
from bench.on_gpu.subjects import OPTIMIZERS, shrunk
from bench.timing import interleaved
from model import optimizers
from model.denoiser import Denoiser
from model.gradients import clip, whole_norms
from model.lamb import LAMBConfig
from model.optimizers import AdamConfig

AIM = 1.25  # LAMB's time over torch's fused AdamW's
LAMB, FUSED = "LAMB", "AdamW, torch's fused"


def work_on(weights: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """What follows the gradients of a step, by name, and the copy."""
    for p in weights:
        p.grad = torch.randn_like(p) / 1000
    plain = [p.detach() for p in weights]
    gradients = [p.grad for p in weights if p.grad is not None]
    average = [torch.zeros_like(p) for p in plain]
    return {
        LAMB: optimizers.build(weights, LAMBConfig()).step,
        "AdamW, ours": optimizers.build(weights, AdamConfig()).step,
        FUSED: torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=True).step,
        "norm of the gradients": lambda: whole_norms(weights, gradients)[0].norm(),
        "norm, and clipping": lambda: clip(gradients, whole_norms(weights, gradients)[0].norm(), 0.5),
        "average": lambda: torch._foreach_lerp_(average, plain, 0.001),
        "copy": lambda: torch._foreach_copy_(average, plain),
    }


@torch.no_grad()
def run(record: Record, device: torch.device, tiny: bool, seconds_left: float) -> None:
    """Measure, unless the record has it: seconds on a GPU, so that nothing looks at the time."""
    if record.find(kernels="copy") is not None:
        return
    subject = shrunk(OPTIMIZERS) if tiny else OPTIMIZERS
    torch.manual_seed(0)
    shapes = [p.shape for p in Denoiser(subject.model, "meta").parameters()]
    weights: list[Tensor] = [torch.nn.Parameter(torch.randn(shape, device=device) / 30) for shape in shapes]
    work = work_on(weights)
    if record.find(work="copy") is None:
        size = sum(p.nbytes for p in weights)
        for name, measured in interleaved(work, 3 if tiny else 9, device).items():
            median = statistics.median(measured)
            spread = (max(measured) - min(measured)) / median
            record.add({"work": name}, ms=1000 * median, spread=spread, weight_bytes=size)
    if device.type == "cuda":  # apart, for a machine's profiler may fail
        for name, body in work.items():
            record.add({"kernels": name}, launches=launches(body))


def launches(work: Callable[[], Any]) -> int:
    """CUDA kernels, copies and fills of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    # Not the spans that an optimiser names after itself, which show among the device's events too.
    events = [e for e in profile.key_averages() if e.device_type.name == "CUDA" and not e.key.startswith("Optimizer.")]
    return sum(event.count for event in events)


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Times, and how many copies of the weights each is worth."""
    timed = {row["key"]["work"]: row for row in rows if "work" in row["key"]}
    kernels = {row["key"]["kernels"]: row["launches"] for row in rows if "kernels" in row["key"]}
    if not {LAMB, FUSED, "copy"} <= timed.keys():
        return []
    copy, size = timed["copy"]["ms"], timed["copy"]["weight_bytes"]
    lines = [
        f"{size / 4e6:.4g} M weights in float32; the copy moves {2 * size / copy / 1e9:.3g} TB/s",
        f"{'':24}{'ms':>9}{'spread':>8}{'copies':>8}{'kernels':>9}",
    ]
    for name, row in timed.items():
        lines.append(f"{name:24}{row['ms']:9.3f}{row['spread']:8.0%}{row['ms'] / copy:8.2f}{kernels.get(name, '-'):>9}")
    return [*lines, f"LAMB takes {timed[LAMB]['ms'] / timed[FUSED]['ms']:.2f} times torch's fused AdamW (aim {AIM:g})"]
