"""Exponential moving average of the weights, exact under sharding: every rank averages its own shards, nothing is gathered.

Composer's stock EMA is an algorithm, whose state is pickled whole; under FSDP2 every rank then resumes with rank 0's shards. A
callback's state stays a dict of sharded tensors in sharded checkpoints, which are saved, loaded and resharded like the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from model.lamb import local_shard


@dataclass(frozen=True)
class EMAConfig:
    """Table 9: half-life of 6k steps."""

    half_life: float = 6000.0  # steps
    ramp: float = 0.05  # the half-life is at most this share of the steps so far (EDM's ramp-up), or the start would linger

    def __post_init__(self) -> None:
        if self.half_life <= 0 or self.ramp <= 0:
            raise ValueError(f"half_life and ramp must be positive, got {self.half_life} and {self.ramp}")

    def decay(self, step: int) -> float:
        """Weight of the old average at optimiser step ``step`` (1 is the first): half remains after ``half_life`` steps."""
        return 0.5 ** (1 / min(self.half_life, max(self.ramp * step, 1e-8)))


class EMA(Callback):
    """Averages the model's parameters after each optimiser step.

    ``weights`` maps parameter names to averages, of the parameters' own kind (DTensor under FSDP2).
    """

    def __init__(self, config: EMAConfig) -> None:
        self.config = config
        self.weights: dict[str, Tensor] = {}

    def before_load(self, state: State, logger: Logger) -> None:
        # Here the model is sharded already, and a checkpoint about to be loaded finds tensors to fill.
        self._start(state.model)

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 0:  # weights may have been loaded from another run since before_load
            self._start(state.model)

    @torch.no_grad()
    def batch_end(self, state: State, logger: Logger) -> None:
        decay = self.config.decay(int(state.timestamp.batch))  # batch_end comes after the count is raised
        current = dict(state.model.named_parameters())
        average = [local_shard(self.weights[name]) for name in current]
        torch._foreach_lerp_(average, [local_shard(p) for p in current.values()], 1 - decay)

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Within, ``model`` holds the averages; afterwards its own weights again, to the bit."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, saved in state["weights"].items():
                if saved is not self.weights[name]:
                    self.weights[name].copy_(saved)

    def _start(self, model: nn.Module) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass that no backward pass follows leaves the outermost weights gathered
        for name, p in model.named_parameters():
            own, average = local_shard(p), local_shard(self.weights[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)
