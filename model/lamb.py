"""LAMB (You et al. 2020, algorithm 2), exact under sharding. Imports torch alone.

The trust ratio is per whole parameter. On shards, the norm of a DTensor is only a part; here each rank sums squares over its own
shards of all parameters at once, and one all-reduce per step makes them whole.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.gradients import local_shard, whole_norms

CHUNK = 2**24  # numbers


def check_rates(lr: float, betas: tuple[float, float], eps: float) -> None:
    """Refuse, by a ValueError that names it, what no adaptive optimiser can step with."""
    if lr <= 0:
        raise ValueError(f"lr must be positive, got {lr}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), got {betas}")
    if eps <= 0:  # or a weight whose gradients are all zero would become 0 / 0
        raise ValueError(f"eps must be positive, got {eps}")


@dataclass(frozen=True)
class LAMBConfig:
    """Table 9; what the paper leaves open follows the first author's later FIT code."""

    kind: Literal["lamb"] = "lamb"
    lr: float = 5e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01  # added to the update before the trust ratio
    max_weight_norm: float = 10.0  # trust ratio = min(|weight|, this) / |update|; 1 where either norm is 0

    def __post_init__(self) -> None:
        check_rates(self.lr, self.betas, self.eps)


class LAMB(Optimizer):
    """Layer-wise adaptive moments without bias correction, for plain tensors and DTensors alike.

    Moments and arithmetic are float32 where parameters are of lower precision. A step writes its updates over the gradients, as
    apex's FusedLAMB does: they must be kept for all parameters until the norms are known, and 4 bytes a parameter are saved.

    Attributes:
        trust_ratios: (parameters with a gradient,) of the last step; empty before the first.
        update_norm: () of the last step's change to all weights together.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], config: LAMBConfig) -> None:
        defaults = {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "max_weight_norm": config.max_weight_norm,
        }
        super().__init__(params, defaults)
        self.trust_ratios, self.update_norm = torch.empty(0), torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. Collective: every rank that holds shards must call it."""
        loss = loss_of(closure)
        steps = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                steps.append(self._step_group(params, group))
        if steps:
            ratios, moved = (torch.cat(parts) for parts in zip(*steps, strict=True))
            self.trust_ratios, self.update_norm = ratios, moved.norm()
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which casts moments to their parameter's type; here they keep their own."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, params, strict=True):
            for name, saved in state_dict["state"].get(number, {}).items():
                if self.state[p][name].dtype != saved.dtype:
                    self.state[p][name] = saved.to(p.device, copy=True)

    def _step_group(self, params: list[Tensor], group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Step; return the trust ratios (len(params),) and the norms of what was subtracted."""
        for p in params:
            if not self.state[p]:
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p][name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        weights = [local_shard(p) for p in params]
        updates = self._updates(params, weights, group)  # with a minus
        weight_norms, update_norms = whole_norms(params, weights, updates)
        ratios = weight_norms.clamp(max=group["max_weight_norm"]) / update_norms
        ratios = torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)
        scales = list(ratios.unbind())
        for chunk in _chunks(weights):
            raised = _raised(weights[chunk])
            # In one pass; none of it reads a ratio back to the host.
            torch._foreach_addcmul_(raised, updates[chunk], scales[chunk], value=float(group["lr"]))
            if any(new is not weight for new, weight in zip(raised, weights[chunk], strict=True)):
                torch._foreach_copy_(weights[chunk], raised)
        return ratios, float(group["lr"]) * ratios * update_norms

    def _updates(self, params: list[Tensor], weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Advance the moments; return minus the updates before the trust ratio, in place of float32 gradients."""
        updates = _raised([local_shard(p.grad) for p in params if p.grad is not None])
        first = [local_shard(self.state[p]["exp_avg"]) for p in params]
        second = [local_shard(self.state[p]["exp_avg_sq"]) for p in params]
        beta1, beta2 = group["betas"]
        # One pass over memory: AdamW's kernel on "weights" of which its decay of 1 at a rate of 1 leaves only minus the update.
        # After endless steps its bias correction is none.
        endless = torch.full((), math.inf, device=updates[0].device)
        torch._fused_adamw_(
            updates, updates, first, second, [], [endless] * len(updates),
            amsgrad=False, lr=1.0, beta1=beta1, beta2=beta2, weight_decay=1.0, eps=group["eps"], maximize=False,
        )  # fmt: skip
        for chunk in _chunks(weights) if group["weight_decay"] else []:
            torch._foreach_add_(updates[chunk], _raised(weights[chunk]), alpha=-group["weight_decay"])
        return updates


def loss_of(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """What an optimiser's ``step`` does with its closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _chunks(tensors: list[Tensor]) -> list[slice]:
    """Consecutive tensors of about ``CHUNK`` numbers in all: what is needed only in between is held for one chunk at a time."""
    chunks, start, held = [], 0, 0
    for i, tensor in enumerate(tensors):
        held += tensor.numel()
        if held >= CHUNK or i + 1 == len(tensors):
            chunks.append(slice(start, i + 1))
            start, held = i + 1, 0
    return chunks


def _raised(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in float32 at least; the same ones where they are already."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
