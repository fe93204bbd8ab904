"""LAMB (You et al. 2020, algorithm 2), exact under sharding. Imports torch alone.

The trust ratio is per whole parameter. On shards, the norm of a DTensor is only a part; here each rank sums squares over its own
shards of all parameters at once, and one all-reduce per step makes them whole.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from torch.optim import Optimizer


@dataclass(frozen=True)
class LAMBConfig:
    """Table 9; what the paper leaves open follows the first author's later FIT code."""

    lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01  # added to the update before the trust ratio
    max_weight_norm: float = 10.0  # trust ratio = min(|weight|, this) / |update|; 1 where either norm is 0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.eps <= 0:  # or a weight whose gradients are all zero would become 0 / 0
            raise ValueError(f"eps must be positive, got {self.eps}")


class LAMB(Optimizer):
    """Layer-wise adaptive moments without bias correction, for plain tensors and DTensors alike."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], config: LAMBConfig) -> None:
        defaults = {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "max_weight_norm": config.max_weight_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. Collective: every rank that holds shards must call it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, group)
        return loss

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        weights = [local_shard(p) for p in params]
        gradients = [local_shard(p.grad) for p in params if p.grad is not None]
        first = [local_shard(self.state[p]["exp_avg"]) for p in params]
        second = [local_shard(self.state[p]["exp_avg_sq"]) for p in params]

        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(first, denominators)
        if group["weight_decay"]:
            torch._foreach_add_(updates, weights, alpha=group["weight_decay"])

        weight_norms, update_norms = _whole_norms(params, weights, updates)
        ratios = weight_norms.clamp(max=group["max_weight_norm"]) / update_norms
        ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
        torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(weights, updates, alpha=-float(group["lr"]))


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole_norms(params: list[Tensor], *lists: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Norms (len(params),) of the whole parameters behind each list of local shards; one all-reduce for all of them."""
    squares = torch.stack([torch.stack(torch._foreach_norm(list(shards))).float() ** 2 for shards in lists])
    columns: dict[tuple[distributed.ProcessGroup, ...], list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        columns[_sharding_groups(p)].append(i)
    for groups, indices in columns.items():
        part = squares[:, indices]
        for group in groups:
            distributed.all_reduce(part, group=group)
        squares[:, indices] = part
    return tuple(squares.sqrt().unbind())


def _sharding_groups(p: Tensor) -> tuple[distributed.ProcessGroup, ...]:
    """The process groups over which a parameter is split; replicas need no sum."""
    if not isinstance(p, DTensor):
        return ()
    return tuple(p.device_mesh.get_group(dim) for dim, placement in enumerate(p.placements) if isinstance(placement, Shard))
