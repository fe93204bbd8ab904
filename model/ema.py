"""Exponential moving average of the weights, exact under sharding: every rank averages its own shards, nothing is gathered.

Composer's stock EMA is an algorithm, whose state is pickled whole; under FSDP2 every rank then resumes with rank 0's shards. A
callback's state stays a dict of sharded tensors in sharded checkpoints, which are saved, loaded and resharded like the weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from model.follower import Follower
from model.gradients import local_shard


@dataclass(frozen=True)
class EMAConfig:
    """Table 9: half-life of 6k steps."""

    half_life: float = 6000.0  # steps; of the average that is sampled from, evaluated and published
    others: tuple[float, ...] = ()  # half-lives of averages beside it, which are evaluated too and lie in the checkpoints
    ramp: float = 0.05  # the half-life is at most this share of the steps so far (EDM's ramp-up), or the start would linger

    def __post_init__(self) -> None:
        if self.half_life <= 0 or self.ramp <= 0:
            raise ValueError(f"half_life and ramp must be positive, got {self.half_life} and {self.ramp}")
        if min(self.others, default=1.0) <= 0 or len({self.half_life, *self.others}) <= len(self.others):
            raise ValueError(f"others must be positive and differ, from half_life too, got {list(self.others)}")

    def decay(self, step: int, half_life: float | None = None) -> float:
        """Weight of the old average at optimiser step ``step`` (1 is the first): half remains after ``half_life`` steps."""
        return 0.5 ** (1 / min(half_life or self.half_life, max(self.ramp * step, 1e-8)))


class EMA(Follower):
    """Averages the parameters that train, after each optimiser step.

    ``weights`` maps their names to averages, of the parameters' own kind (DTensor under FSDP2); ``others`` has more such maps
    by half-life.
    """

    def __init__(self, config: EMAConfig) -> None:
        self.config = config
        self.weights: dict[str, Tensor] = {}
        self.others: dict[float, dict[str, Tensor]] = {}

    def before_load(self, state: State, logger: Logger) -> None:
        # Here the model is sharded already, and a checkpoint about to be loaded finds tensors to fill.
        self._start(state.model)

    def fit_start(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == 0:  # weights may have been loaded from another run since before_load
            self._start(state.model)

    @torch.no_grad()
    def follow(self, state: State) -> None:
        current = _trained(state.model)
        shards = [local_shard(p) for p in current.values()]
        for half_life, weights in {self.config.half_life: self.weights, **self.others}.items():
            decay = self.config.decay(int(state.timestamp.batch), half_life)  # batch_end comes after the count is raised
            torch._foreach_lerp_([local_shard(weights[name]) for name in current], shards, 1 - decay)

    @contextmanager
    def swapped(self, model: nn.Module, half_life: float | None = None) -> Iterator[None]:
        """Within, ``model`` holds averages, by default ``weights``; afterwards its own weights again, to the bit."""
        weights = self.weights if half_life is None else self.others[half_life]
        self._exchange(model, weights)
        try:
            yield
        finally:
            self._exchange(model, weights)

    def averaged(self, model: nn.Module) -> dict[str, Tensor]:
        """All parameters of ``model`` by name: averages of those that train, and the others, which are their own average."""
        _reshard(model)
        return {name: self.weights.get(name, p) for name, p in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        others = {f"weights_{half_life:.10g}": weights for half_life, weights in self.others.items()}
        return {"weights": self.weights, **others}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for kind, weights in self.state_dict().items():
                for name, saved in state[kind].items():
                    if saved is not weights[name]:
                        weights[name].copy_(saved)

    def _start(self, model: nn.Module) -> None:
        def copy() -> dict[str, Tensor]:
            return {name: p.detach().clone() for name, p in _trained(model).items()}

        self.weights, self.others = copy(), {half_life: copy() for half_life in self.config.others}

    @torch.no_grad()
    def _exchange(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        _reshard(model)
        for name, p in _trained(model).items():
            own, average = local_shard(p), local_shard(weights[name])
            kept = own.clone()
            own.copy_(average)
            average.copy_(kept)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _reshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a forward pass that no backward pass follows leaves the outermost weights gathered
