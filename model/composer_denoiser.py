"""The denoiser as Composer trains it; everything that it computes is in ``model.denoiser``, which needs torch alone."""

from collections.abc import Callable
from typing import Any

from composer.models import ComposerModel

from model.denoiser import Denoiser, LossTerms


class ComposerDenoiser(Denoiser, ComposerModel):
    """A denoiser with the methods that Composer's trainer asks for beside ``forward`` and ``loss``."""

    flops_per_batch: Callable[[Any], int]  # Composer's SpeedMonitor asks for it; set where a run is to log it

    def eval_forward(self, batch: dict[str, Any], outputs: LossTerms | None = None) -> LossTerms:
        return outputs if outputs is not None else self.forward(batch)
