"""Samplers and guidance (paper section 3.6): pure functions over ``denoise(x, sigma)``. Imports torch alone.

With D the estimate of the data, the forward process ``x_sigma = x / s_i + sigma * eps`` has the probability flow
``dx/dsigma = (x - D / s_i) / sigma``. That is stock EDM on ``s_i * x`` with every sigma scaled by s_i.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# (x (B, ...), sigma (B,)) -> D (B, ...)
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ChurnConfig:
    """EDM's stochastic sampler: fresh noise before each step (its algorithm 2, table 5; the paper's Figure 6)."""

    amount: float = 0.0  # S_churn, spread over the steps; 0: the deterministic sampler
    sigma_min: float = 0.0  # S_tmin: no churn below
    sigma_max: float = 80.0  # S_tmax: none above
    noise: float = 1.0  # S_noise: std of the fresh noise; a little over 1 makes up for detail that a network smooths away

    def __post_init__(self) -> None:
        for name in ("amount", "sigma_min", "noise"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.sigma_max < self.sigma_min:
            raise ValueError(f"sigma_min <= sigma_max must hold, got {self.sigma_min} and {self.sigma_max}")

    def increase(self, sigma: float, steps: int) -> float:
        """gamma: by how much of itself the noise level is raised before a step from ``sigma``."""
        return min(self.amount / steps, math.sqrt(2) - 1) if self.sigma_min <= sigma <= self.sigma_max else 0.0


@dataclass(frozen=True)
class OscillationConfig:
    """Oscillating guidance (Imagen Video): high at first, for layout; then high and low in turn, against over-saturation."""

    low: float = 1.0  # weight of every second level
    constant: int = 15  # levels at the start that all have the full weight

    def __post_init__(self) -> None:
        if self.constant < 0:
            raise ValueError(f"constant must not be negative, got {self.constant}")


@dataclass(frozen=True)
class SamplerConfig:
    """How one stage is sampled. n steps cost 2n - 1 evaluations of the denoiser."""

    steps: int = 256  # the paper: 256 for stage 1, 40 for stage 2
    guidance: float = 7.5  # classifier-free guidance weight; 1 switches it off
    oscillation: OscillationConfig | None = None  # None: the same guidance at all noise levels
    churn: ChurnConfig = field(default_factory=ChurnConfig)
    # Noise levels sigma, least and largest, between which guidance acts (Kynkäänniemi et al. 2024). Beyond, as wherever its
    # weight is 1, only the branch with text is evaluated, at half the cost. None: everywhere.
    guidance_interval: tuple[float, float] | None = None
    batched_guidance: bool = True  # both branches in one batch; false: one after the other, for less memory
    threshold_quantile: float = 0.995  # dynamic thresholding of D; 1 clips at the largest value, 0 switches it off
    sigma_min: float = 0.002  # effective noise at the end is sigma_min * sigma_in
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max must hold, got {self.sigma_min} and {self.sigma_max}")
        if not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise ValueError(f"guidance must be finite and not negative, got {self.guidance}")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval must be two rising noise levels, got {list(self.guidance_interval)}")
        if not 0 <= self.threshold_quantile <= 1:
            raise ValueError(f"threshold_quantile must be in [0, 1], got {self.threshold_quantile}")


def noise_levels(config: SamplerConfig) -> Tensor:
    """(steps + 1,) float64 levels from sigma_max down to sigma_min, then 0 (EDM equation 5)."""
    ramp = torch.linspace(0, 1, config.steps, dtype=torch.float64)
    largest, smallest = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
    return torch.cat([(largest + ramp * (smallest - largest)) ** config.rho, torch.zeros(1, dtype=torch.float64)])


def guidance_weights(config: SamplerConfig) -> Tensor:
    """(steps,) the weight of guidance at each noise level."""
    weights = torch.full((config.steps,), config.guidance, dtype=torch.float64)
    if config.oscillation is not None:
        weights[config.oscillation.constant + 1 :: 2] = config.oscillation.low
    if config.guidance_interval is not None:
        least, largest = config.guidance_interval
        levels = noise_levels(config)[:-1]
        weights[(levels < least) | (levels > largest)] = 1.0
    return weights


def level_of(sigma: float, levels: Tensor) -> int:
    """Index of the noise level at which a sampler is at ``sigma``: the last one not below it, since churn raises levels."""
    above = int((levels[:-1] >= sigma * (1 - 1e-6)).sum())
    return max(above - 1, 0)


def heun(
    denoise: Denoise,
    noise: Tensor,
    levels: Tensor,
    sigma_in: float | Tensor,
    progress: Iterable[int] | None = None,
    churn: ChurnConfig | None = None,
    fresh_noise: Callable[[], Tensor] | None = None,
) -> Tensor:
    """EDM's second-order sampler under the paper's forward process: deterministic (its algorithm 1), or with churn (algorithm 2).

    Args:
        denoise: the estimate D of the data.
        noise: (B, ...) unit Gaussian noise.
        levels: (n + 1,) decreasing noise levels that end in 0.
        sigma_in: s_i of the forward process; a tensor that broadcasts against ``noise`` where samples differ.
        progress: ``range(n)``, or a progress bar over it.
        churn: how much fresh noise to add before each step. Its levels are those of the process, as ``levels`` are.
        fresh_noise: draws unit Gaussian noise of the shape of ``noise``; called for each step with churn.

    Returns:
        (B, ...) the sample, in the scale of the data.

    Raises:
        ValueError: churn without a source of noise.
    """
    if churn is not None and churn.amount and fresh_noise is None:
        raise ValueError(f"fresh_noise must be given where churn is {churn.amount}")

    def drift(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        return (x - denoise(x, level) / sigma_in) / sigma

    schedule = [float(level) for level in levels]
    steps = len(schedule) - 1
    x = schedule[0] * noise
    for i in progress if progress is not None else range(steps):
        here, there = schedule[i], schedule[i + 1]
        gamma = churn.increase(here, steps) if churn is not None else 0.0
        if gamma and churn is not None and fresh_noise is not None:
            raised = here * (1 + gamma)
            x = x + math.sqrt(raised**2 - here**2) * churn.noise * fresh_noise()
            here = raised
        slope = drift(x, here)
        ahead = x + (there - here) * slope
        x = ahead if there == 0 else x + (there - here) * (slope + drift(ahead, there)) / 2
    return sigma_in * x


def guide(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: ``D_u + g (D_c - D_u)``."""
    return unconditional + weight * (conditional - unconditional)


def reconstruction_gradient(estimate: Tensor, x: Tensor, known: Tensor, is_known: Tensor) -> Tensor:
    """``grad_x || known - D ||^2`` over what is known: reconstruction guidance (Ho et al. 2022, equation 8; appendix C.5).

    What is not known then follows ``D - w_r / (2 s_i) grad``: without the ``1 / s_i`` the strength would change with s_i.

    Args:
        estimate: (B, ...) D at ``x``, computed with gradients.
        x: (B, ...) the noisy sample, a leaf that requires gradients.
        known: (B, ...) data, anything where it is not known.
        is_known: bool, broadcasts against ``known``.
    """
    error = torch.where(is_known, known - estimate, 0.0).square().sum()
    return torch.autograd.grad(error, x)[0]


def dynamic_threshold(x: Tensor, quantile: float) -> Tensor:
    """Imagen's dynamic thresholding of D, before D is divided by s_i.

    Each sample is clipped at a quantile of its own |x|, at least 1, and rescaled by it.
    """
    limit = torch.quantile(x.abs().flatten(1).float(), quantile, dim=1).clamp(min=1).to(x.dtype)
    limit = limit.reshape(-1, *[1] * (x.ndim - 1))
    return x.clamp(-limit, limit) / limit
