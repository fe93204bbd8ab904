"""Keeps the running means of uncertainty weighting up to date in training (model/diffusion/loss_levels.py)."""

from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from model.denoiser import LossTerms
from model.diffusion.loss_levels import LossLevels
from model.follower import Follower


class Balance(Follower):
    """Keeps a denoiser's ``LossLevels`` up to date with each step's losses of all ranks."""

    def __init__(self, levels: LossLevels) -> None:
        self.levels = levels
        self._sums: list[Tensor] = []

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._sums = []

    def after_loss(self, state: State, logger: Logger) -> None:
        assert isinstance(state.outputs, LossTerms)
        self._sums.append(self.levels.sums(state.outputs.sigma, state.outputs.loss.detach()))  # of a microbatch

    def follow(self, state: State) -> None:
        sums = torch.stack(self._sums).sum(dim=0)
        dist.all_reduce(sums)
        self.levels.update(sums)

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.levels.means, "counts": self.levels.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.levels.means, self.levels.counts = state["means"], state["counts"]
