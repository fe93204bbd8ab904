"""The optimisers that a yaml may name (Table 9): LAMB for FIT, Adam for the U-Nets."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.gradients import local_shard
from model.lamb import LAMB, LAMBConfig, check_rates, loss_of


@dataclass(frozen=True)
class AdamConfig:
    """Table 9's U-Nets. The paper says Adam with weight decay; here that is the decoupled decay (AdamW)."""

    kind: Literal["adam"] = "adam"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01  # times the learning rate: the share of each weight that a step takes off

    def __post_init__(self) -> None:
        check_rates(self.lr, self.betas, self.eps)


class ShardedAdamW(Optimizer):
    """AdamW by torch's fused kernel on the shards that each rank holds: exact, for nothing in it crosses elements.

    torch's own class sends every tensor and operation through DTensor's dispatch on the host, eight times as long for a small
    model (docs/decisions.md). Its state has the same names.
    """

    def __init__(self, params: Iterable[Tensor], config: AdamConfig) -> None:
        rates = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        super().__init__(params, rates)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step."""
        loss = loss_of(closure)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            states = [self.state[p] for p in params]
            if not states:
                continue
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            gradients = [local_shard(p.grad) for p in params if p.grad is not None]
            first, second = ([local_shard(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                [local_shard(p) for p in params], gradients, first, second, [], steps,
                amsgrad=False, lr=float(group["lr"]), beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], maximize=False,
            )  # fmt: skip
        return loss


OptimizerConfig = LAMBConfig | AdamConfig


def build(params: Iterable[Tensor], config: OptimizerConfig) -> Optimizer:
    """The configured optimiser of those parameters that train; both are exact under sharding."""
    params = [p for p in params if p.requires_grad]
    if isinstance(config, LAMBConfig):
        return LAMB(params, config)
    return ShardedAdamW(params, config)
