"""Snap Video's rewritten EDM diffusion (paper section 3.2, Table 1, appendices D and E). Imports torch alone.

Legend: x data, eps unit Gaussian noise, sigma noise level, s_d = sigma_data (std of the data), s_i = sigma_in (input scale). The
forward process is ``x_sigma = x / s_i + sigma * eps``: larger s_i brings back the signal-to-noise ratio that EDM was designed for
when neighbouring pixels and frames repeat each other. s_i = 1 is stock EDM, but for the sign of F.

The denoiser is ``D = c_skip * x_sigma + c_out * F(c_in * x_sigma)`` and the network F learns ``c_nrm * v``.
Equations 41 and 42 of the paper print a plus before ``c_nrm F_tgt``; equation 15 makes it a minus, and Table 1's EDM column
squares sigma_data in c_out where equation 7 does not. The functions below satisfy ``D(c_nrm * v) = x`` exactly.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise process of one stage."""

    sigma_in: float = 4.0  # s * sqrt(T), s = resolution / 64: 4 for 16 frames at 64 px, 32 at 512 px
    sigma_data: float = 1.0
    log_sigma_mean: float = -1.2  # ln sigma ~ N(mean, std^2) in training, as in EDM
    log_sigma_std: float = 1.2

    def __post_init__(self) -> None:
        for name in ("sigma_in", "sigma_data", "log_sigma_std"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


def target(x: Tensor, eps: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """v = F_tgt (Table 1): what the network predicts, before normalisation by ``c_nrm``."""
    return sigma_data**2 * eps - sigma * x


def c_in(sigma: Tensor, sigma_data: float, sigma_in: float) -> Tensor:
    """Input scale: ``c_in * x_sigma`` has unit variance."""
    return (sigma_data**2 / sigma_in**2 + sigma**2).rsqrt()


def c_nrm(sigma: Tensor, sigma_data: float) -> Tensor:
    """Target scale: ``c_nrm * v`` has unit variance."""
    return 1 / (sigma_data * (sigma_data**2 + sigma**2).sqrt())


def c_skip(sigma: Tensor, sigma_data: float, sigma_in: float) -> Tensor:
    """Share of the noisy input in D."""
    return sigma_in * sigma_data**2 / (sigma_in * sigma**2 + sigma_data**2)


def c_out(sigma: Tensor, sigma_data: float, sigma_in: float) -> Tensor:
    """Share of the network's output in D; negative, since v points from the data to the noise."""
    scale = (sigma**2 + sigma_data**2).sqrt() / (sigma_data**2 + sigma_in * sigma**2)
    return -sigma_in * sigma * sigma_data * scale


def c_noise(sigma: Tensor) -> Tensor:
    """The noise level as the network sees it (EDM, unaltered)."""
    return sigma.log() / 4


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda: weight of ``|D - x|^2``."""
    return 1 / sigma_data**2 + 1 / sigma**2


def effective_weight(sigma: Tensor, sigma_data: float, sigma_in: float) -> Tensor:
    """w = lambda * c_out^2: weight of ``|F - c_nrm v|^2``.

    Tends to s_i^2 as sigma tends to 0, so losses do not compare across stages.
    """
    return ((sigma**2 + sigma_data**2) / (sigma**2 + sigma_data**2 / sigma_in)) ** 2


def expand(scalars: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank of ``like``."""
    return scalars.reshape(-1, *[1] * (like.ndim - 1))


def draw_sigma(count: int, config: DiffusionConfig, device: torch.device) -> Tensor:
    """(count,) noise levels for training, log-normal, float32."""
    normal = torch.randn(count, device=device, dtype=torch.float32)
    return (normal * config.log_sigma_std + config.log_sigma_mean).exp()


def add_noise(x: Tensor, eps: Tensor, sigma: Tensor, config: DiffusionConfig) -> Tensor:
    """The forward process ``x / s_i + sigma * eps``; ``sigma`` is (B,)."""
    return x / config.sigma_in + expand(sigma, x) * eps


def network_target(x: Tensor, eps: Tensor, sigma: Tensor, config: DiffusionConfig) -> Tensor:
    """``c_nrm * v``, what F should return; unit variance for data of std ``sigma_data``."""
    sigma = expand(sigma, x)
    return c_nrm(sigma, config.sigma_data) * target(x, eps, sigma, config.sigma_data)


def scale_input(x_sigma: Tensor, sigma: Tensor, config: DiffusionConfig) -> Tensor:
    """``c_in * x_sigma``, what F should see."""
    return c_in(expand(sigma, x_sigma), config.sigma_data, config.sigma_in) * x_sigma


def combine(x_sigma: Tensor, network_output: Tensor, sigma: Tensor, config: DiffusionConfig) -> Tensor:
    """D, the estimate of the data: ``c_skip * x_sigma + c_out * F``."""
    sigma = expand(sigma, x_sigma)
    skip = c_skip(sigma, config.sigma_data, config.sigma_in)
    return skip * x_sigma + c_out(sigma, config.sigma_data, config.sigma_in) * network_output
