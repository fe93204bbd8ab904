"""Random numbers of each sample of a batch from its own generator. Imports torch alone.

A sample then sees the same noise whichever process and microbatch it falls into, so a run goes on exactly with another number of
processes; and a generated clip depends on its own seed, not on what else is generated beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Draws for the samples of a batch, each from its own seed. B samples.

    Args:
        seeds: one per sample, in [0, 2^63).
        device: where the numbers are drawn; on the meta device nothing is.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.count, self.device = len(seeds), device
        if device.type != "meta":
            self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) unit Gaussian, float32."""
        drawn = torch.empty(self.count, *shape, device=self.device)
        if self.device.type != "meta":
            for row, generator in zip(drawn, self.generators, strict=True):
                row.normal_(generator=generator)
        return drawn

    def uniform(self) -> Tensor:
        """(B,) in [0, 1), float32."""
        drawn = torch.empty(self.count, device=self.device)
        if self.device.type != "meta":
            for row, generator in zip(drawn, self.generators, strict=True):
                row.uniform_(generator=generator)
        return drawn
