"""The optimisers that a yaml may name (Table 9): LAMB for FIT, Adam for the U-Nets."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.optim import AdamW, Optimizer

from model.lamb import LAMB, LAMBConfig, check_rates


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


OptimizerConfig = LAMBConfig | AdamConfig


def build(params: Iterable[Tensor], config: OptimizerConfig) -> Optimizer:
    """The configured optimiser of those parameters that train; both are exact under sharding."""
    params = [p for p in params if p.requires_grad]
    if isinstance(config, LAMBConfig):
        return LAMB(params, config)
    # The implementation that GPUs would choose, named so that what is planned on the meta device is what runs.
    return AdamW(params, config.lr, config.betas, config.eps, config.weight_decay, foreach=True)
