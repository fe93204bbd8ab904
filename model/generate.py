"""Sampling one stage: prompts' text states -> video. Shared by the trainer's sample callback and the cascade."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.diffusion import edm, sampler
from model.diffusion.sampler import SamplerConfig
from model.networks.conditioning import Conditioning


@dataclass(frozen=True)
class Request:
    """What to sample. B clips, L text tokens, D text width."""

    text: Tensor  # (B, L, D)
    text_mask: Tensor  # (B, L)
    frame_rate: Tensor  # (B,) frames per second; inf for still images
    resolution: Tensor  # (B, 2) the original resolution to imitate: height, width
    generators: Sequence[torch.Generator]  # one per clip, on the CPU: a clip depends on its own seed alone
    low_resolution: Tensor | None = None  # (B, T, C, h, w) in [-1, 1], for an upsampler
    corruption: float = 0.0  # std of the noise that the upsampler adds to it first


def draw(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """(B, *shape) unit Gaussian noise, each row from its own generator."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


class GuidedDenoiser:
    """``denoise(x, sigma)`` with classifier-free guidance and thresholding; carries each branch's latents from call to call.

    Both branches run in one batch of 2B.
    """

    def __init__(self, denoiser: Denoiser, conditioning: Conditioning, config: SamplerConfig) -> None:
        self.denoiser = denoiser
        self.config = config
        self.guided = config.guidance != 1 or config.oscillation is not None
        self.levels = sampler.noise_levels(config)
        self.weights = sampler.guidance_weights(config)
        self.conditioning = _doubled(conditioning) if self.guided else conditioning
        self.latents: Tensor | None = None

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.guided:
            x, sigma = torch.cat([x, x]), torch.cat([sigma, sigma])
        conditioning = replace(self.conditioning, c_noise=edm.c_noise(sigma))
        estimate, self.latents = self.denoiser.denoise(x, sigma, conditioning, self.latents)
        if self.guided:
            conditional, unconditional = estimate.chunk(2)
            estimate = sampler.guide(conditional, unconditional, self._weight(sigma))
        if self.config.threshold_quantile:
            estimate = sampler.dynamic_threshold(estimate, self.config.threshold_quantile)
        return estimate

    def _weight(self, sigma: Tensor) -> float:
        if self.config.oscillation is None:
            return self.config.guidance
        return float(self.weights[sampler.level_of(float(sigma[0]), self.levels)])


@torch.no_grad()
def generate(denoiser: Denoiser, request: Request, config: SamplerConfig, progress: Iterable[int] | None = None) -> Tensor:
    """Sample one stage.

    Returns:
        (B, T, C, H, W) video in [-1, 1], at the codec's size.
    """
    device = request.text.device
    edm.check_finite("text", request.text)
    frames, height, width = denoiser.config.network.size
    low_resolution = corruption = None
    if request.low_resolution is not None:
        low = request.low_resolution.to(device)
        corruption = torch.full((len(low),), request.corruption, device=device)
        noise = draw(request.generators, low.shape[1:], device)
        low_resolution = denoiser.low_resolution_input(low, corruption, noise)
    conditioning = Conditioning(
        c_noise=torch.zeros(len(request.text), device=device),
        text=request.text,
        text_mask=request.text_mask,
        frame_rate=request.frame_rate,
        resolution=request.resolution,
        low_resolution=low_resolution,
        corruption=corruption,
    )
    diffusion = denoiser.config.diffusion

    def fresh_noise() -> Tensor:
        drawn = draw(request.generators, (frames, denoiser.config.network.channels, height, width), device)
        return edm.share_noise(drawn, conditioning.is_image, diffusion)

    noise = fresh_noise()
    sigma_in = edm.process(diffusion, conditioning.is_image).sigma_in
    if isinstance(sigma_in, Tensor):
        sigma_in = edm.expand(sigma_in, noise)
    denoise = GuidedDenoiser(denoiser, conditioning, config)
    levels = sampler.noise_levels(config)
    was_training = denoiser.training
    denoiser.eval()
    try:
        sample = sampler.heun(denoise, noise, levels, sigma_in, progress, config.churn, fresh_noise)
    finally:
        denoiser.train(was_training)
    return denoiser.codec.decode(sample)


def _doubled(c: Conditioning) -> Conditioning:
    """The conditional batch followed by the same without text."""
    dropped = c.without_text()

    def twice(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.cat([values, values])

    return Conditioning(
        c_noise=torch.cat([c.c_noise, c.c_noise]),
        text=torch.cat([c.text, c.text]),
        text_mask=torch.cat([c.text_mask, dropped.text_mask]),
        frame_rate=torch.cat([c.frame_rate, c.frame_rate]),
        resolution=torch.cat([c.resolution, c.resolution]),
        low_resolution=twice(c.low_resolution),
        corruption=twice(c.corruption),
    )
