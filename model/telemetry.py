"""Numbers that tell how a run is doing: norms and trust ratios, frames per second, waiting for data, memory, and model FLOPs."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from model import finetuning
from model.data import batch
from model.data.batch import CHANNELS, PackedBatch
from model.denoiser import Denoiser, ModelConfig
from model.faults import StepGuard
from model.finetuning import FinetuneConfig
from model.lamb import LAMB
from model.planning.meta_step import flop_counter

QUANTILES = (0.05, 0.5, 0.95)
GIB = 2**30


@dataclass(frozen=True)
class TelemetryConfig:
    """How often what costs a wait for the device is logged."""

    every: int = 10  # steps

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


def flops_per_sample(config: ModelConfig, max_tokens: int, finetune: FinetuneConfig | None = None) -> int:
    """Floating-point operations that training needs for one sample, counted on the meta device.

    Matrix products, convolutions and attention of the first pass, the forward and the backward pass, a multiplication and
    addition as two. Recomputation is left out: it is a price, not progress. So are gradients of what ``finetune`` freezes.
    """
    denoiser = Denoiser(replace(config, network=replace(config.network, checkpoint_blocks=False)), "meta")
    if finetune:
        finetuning.prepare(denoiser, finetune)
    codec, network = config.codec, config.network
    with torch.device("meta"):
        clips: dict[str, Any] = {
            "video": torch.empty(1, network.size[0], CHANNELS, codec.height, codec.width),
            "text": torch.empty(1, max_tokens, network.text_width),
            "text_mask": torch.empty(1, max_tokens, dtype=torch.bool),
            "frame_rate": torch.empty(1),
            "resolution": torch.empty(1, 2),
            "seed": [0],
        }
    with flop_counter() as counted:
        denoiser.loss(denoiser(clips), clips).backward()
    return counted.get_total_flops()


def flops_per_batch(config: ModelConfig, max_tokens: int, finetune: FinetuneConfig | None = None) -> Callable[[PackedBatch], int]:
    """What Composer's ``SpeedMonitor`` asks a model for: FLOPs of a process's batch. It logs the share of the device's peak."""
    of_one = flops_per_sample(config, max_tokens, finetune)
    return lambda packed: of_one * batch.num_samples(packed)


class PeakMemory:
    """The most memory that this process used: of a GPU, since last asked; on a CPU, beyond what it had when this was built."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0 if device.type == "cuda" else self._resident()

    @staticmethod
    def _resident() -> int:
        # Not getrusage's ru_maxrss: a process inherits that of the one which started it.
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(peak[1]) * 1024 if peak else 0

    def take(self) -> int:
        """Bytes."""
        if self.device.type != "cuda":
            return self._resident() - self._before
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak


class Telemetry(Callback):
    """Logs every ``every`` steps. Times are those of the steps alone: evaluation, samples and checkpoints are left out."""

    def __init__(
        self, config: TelemetryConfig, guard: StepGuard, frame_rates: Sequence[float], memory: PeakMemory, planned: int
    ) -> None:
        """``frame_rates`` are those that videos are drawn at; ``planned`` is the plan's memory of a process, in bytes."""
        self.config = config
        self.memory, self.planned = memory, planned
        self.guard = guard
        self._begin = self._busy = self._waited = 0.0  # seconds: of the clock, of the steps since the last log, of their waits
        self._frames = 0  # in this process since the last log
        self._compared = False  # the first interval's memory with the plan's
        self._rates = torch.tensor(sorted(set(frame_rates)))
        self._drawn = torch.zeros(len(self._rates))  # how many videos of each, in this process so far

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._begin = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._waited += time.perf_counter() - self._begin
        videos, images = state.batch["videos"], state.batch["images"]
        self._frames += videos.shape[0] * videos.shape[1] + len(images)
        self._drawn += (state.batch["frame_rate"].cpu()[:, None] == self._rates).sum(0)

    def batch_end(self, state: State, logger: Logger) -> None:
        self._busy += time.perf_counter() - self._begin
        if int(state.timestamp.batch) % self.config.every:
            return
        metrics = {"optimizer/gradient_norm": self.guard.gradient_norm}
        optimizer = state.optimizers[0]
        if isinstance(optimizer, LAMB) and len(optimizer.trust_ratios):
            ratios = optimizer.trust_ratios
            for quantile, value in zip(QUANTILES, ratios.quantile(ratios.new_tensor(QUANTILES)).tolist(), strict=True):
                metrics[f"optimizer/trust_ratio_p{100 * quantile:02.0f}"] = value
            metrics["optimizer/update_norm"] = float(optimizer.update_norm)
        device = self.memory.device
        slowest = torch.tensor([self._waited / self._busy, self.memory.take() / GIB], device=device)
        dist.all_reduce(slowest, reduce_operation="MAX")
        metrics["throughput/data_wait_share"], peak = slowest.tolist()
        metrics |= {"memory/peak_gib": peak, "memory/peak_of_plan": peak * GIB / self.planned}
        if not self._compared and dist.get_global_rank() == 0:
            print(against_plan(peak, self.planned / GIB, device), flush=True)
        self._compared = True
        drawn = self._drawn.to(device)
        dist.all_reduce(drawn)
        for rate, share in zip(self._rates.tolist(), (drawn / drawn.sum().clamp_min(1)).tolist(), strict=True):
            metrics[f"data/share_of_videos_at_{rate:g}_fps"] = share
        metrics["throughput/frames_per_sec"] = self._frames * dist.get_world_size() / self._busy
        logger.log_metrics(metrics)
        self._busy, self._waited, self._frames = 0.0, 0.0, 0


def against_plan(peak: float, planned: float, device: torch.device) -> str:
    """The line that says how far the plan of memory was off; both in GiB, of the process with the most."""
    what = "of the GPU's memory" if device.type == "cuda" else "of memory more than at the start (the plan is for a GPU)"
    return f"the first steps used {peak:.2f} GiB {what}, the plan says {planned:.2f}: {peak / planned - 1:+.0%}"
