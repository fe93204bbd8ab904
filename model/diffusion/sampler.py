"""Samplers and guidance (paper section 3.6): pure functions over ``denoise(x, sigma)``. Imports torch alone.

With D the estimate of the data, the forward process ``x_sigma = x / s_i + sigma * eps`` has the probability flow
``dx/dsigma = (x - D / s_i) / sigma``. That is stock EDM on ``s_i * x`` with every sigma scaled by s_i.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# (x (B, ...), sigma (B,)) -> D (B, ...)
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SamplerConfig:
    """How one stage is sampled. n steps cost 2n - 1 evaluations of the denoiser."""

    steps: int = 256  # the paper: 256 for stage 1, 40 for stage 2
    guidance: float = 7.5  # classifier-free guidance weight; 1 switches it off
    threshold_quantile: float = 0.995  # dynamic thresholding of D; 1 clips at the largest value, 0 switches it off
    sigma_min: float = 0.002  # effective noise at the end is sigma_min * sigma_in
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max must hold, got {self.sigma_min} and {self.sigma_max}")
        if not 0 <= self.threshold_quantile <= 1:
            raise ValueError(f"threshold_quantile must be in [0, 1], got {self.threshold_quantile}")


def noise_levels(config: SamplerConfig) -> Tensor:
    """(steps + 1,) float64 levels from sigma_max down to sigma_min, then 0 (EDM equation 5)."""
    ramp = torch.linspace(0, 1, config.steps, dtype=torch.float64)
    largest, smallest = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    return torch.cat([(largest + ramp * (smallest - largest)) ** config.rho, torch.zeros(1, dtype=torch.float64)])


def heun(denoise: Denoise, noise: Tensor, levels: Tensor, sigma_in: float, progress: Iterable[int] | None = None) -> Tensor:
    """EDM's deterministic second-order sampler (its algorithm 1) under the paper's forward process.

    Args:
        denoise: the estimate D of the data.
        noise: (B, ...) unit Gaussian noise.
        levels: (n + 1,) decreasing noise levels that end in 0.
        sigma_in: s_i of the forward process.
        progress: ``range(n)``, or a progress bar over it.

    Returns:
        (B, ...) the sample, in the scale of the data.
    """

    def drift(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.to(x.dtype)
        return (x - denoise(x, sigma.expand(len(x))) / sigma_in) / sigma

    levels = levels.to(noise.device)
    x = levels[0].to(noise.dtype) * noise
    for i in progress if progress is not None else range(len(levels) - 1):
        here, there = levels[i], levels[i + 1]
        step = (there - here).to(x.dtype)
        slope = drift(x, here)
        ahead = x + step * slope
        x = ahead if there == 0 else x + step * (slope + drift(ahead, there)) / 2
    return sigma_in * x


def guide(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: ``D_u + g (D_c - D_u)``."""
    return unconditional + weight * (conditional - unconditional)


def dynamic_threshold(x: Tensor, quantile: float) -> Tensor:
    """Imagen's dynamic thresholding of D, before D is divided by s_i.

    Each sample is clipped at a quantile of its own |x|, at least 1, and rescaled by it.
    """
    limit = torch.quantile(x.abs().flatten(1).float(), quantile, dim=1).clamp(min=1).to(x.dtype)
    limit = limit.reshape(-1, *[1] * (x.ndim - 1))
    return x.clamp(-limit, limit) / limit
