"""Sampling one stage: prompts' text states -> video. Shared by the trainer's sample callback and the cascade."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from model.denoiser import Denoiser
from model.diffusion import edm, sampler
from model.diffusion.sampler import SamplerConfig
from model.networks.conditioning import Conditioning


@dataclass(frozen=True)
class Known:
    """Frames that the clips must hold: of an image to animate, of a video to continue, of a lower frame rate (appendix C.5)."""

    video: Tensor  # (B, T, C, H, W) in [-1, 1], at the codec's size; anything where it is not known
    frames: Tensor  # (B, T) bool: which are known
    weight: float = 1.0  # w_r of reconstruction guidance; 0 holds the known frames and does not steer the others towards them

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight must be finite and not negative, got {self.weight}")

    @property
    def mask(self) -> Tensor:
        """(B, T, 1, 1, 1), true at the frames that are known."""
        return self.frames[:, :, None, None, None]


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
    known: Known | None = None


def draw(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    """(B, *shape) unit Gaussian noise, each row from its own generator."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


class GuidedDenoiser:
    """``denoise(x, sigma)`` with classifier-free guidance and thresholding; carries each branch's latents from call to call.

    Both branches run in one batch of 2B, or one after the other. Frames that are known are part of the estimate, which keeps them
    on their straight way through the noise levels; the gradient of what the network makes of them steers the others.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        conditioning: Conditioning,
        config: SamplerConfig,
        sigma_in: float | Tensor = 1.0,
        known: Known | None = None,
    ) -> None:
        """``sigma_in`` counts where frames are ``known``, whose video is in model space here."""
        self.denoiser = denoiser
        self.config = config
        self.guided = config.guidance != 1 or config.oscillation is not None
        self.levels = sampler.noise_levels(config)
        self.weights = sampler.guidance_weights(config)
        self.branches: dict[tuple[int, ...], Conditioning] = {(0,): conditioning}  # 0 is the one with text, 1 the one without
        if self.guided:
            dropped = conditioning.without_text()
            self.branches |= {(0, 1): _joined(conditioning, dropped)} if config.batched_guidance else {(1,): dropped}
        self.sigma_in = sigma_in
        self.known = known
        self.latents: list[Tensor | None] = [None, None]  # of each branch

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if self.known is None:
            estimate, _ = self._estimates(x, sigma)
        else:
            estimate = self._steered(x, sigma, self.known)
        if self.config.threshold_quantile:
            estimate = sampler.dynamic_threshold(estimate, self.config.threshold_quantile)
        if self.known is not None:
            estimate = torch.where(self.known.mask, self.known.video, estimate)
        return estimate

    def _estimates(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """D with classifier-free guidance, and that of the conditional branch alone."""
        weight = self._weight(sigma)
        if weight == 1:
            (conditional,) = self._evaluate(x, sigma, (0,))
            return conditional, conditional
        if self.config.batched_guidance:
            conditional, unconditional = self._evaluate(x, sigma, (0, 1))
        else:
            conditional, unconditional = (*self._evaluate(x, sigma, (0,)), *self._evaluate(x, sigma, (1,)))
        return sampler.guide(conditional, unconditional, weight), conditional

    def _evaluate(self, x: Tensor, sigma: Tensor, numbers: tuple[int, ...]) -> tuple[Tensor, ...]:
        """D of some branches, in one batch."""
        count = len(numbers)
        levels = sigma.repeat(count)
        conditioning = replace(self.branches[numbers], c_noise=edm.c_noise(levels))
        known = [latents for number in numbers if (latents := self.latents[number]) is not None]
        latents = None  # a branch that has none beside one that has starts from zeros, as a network without any does
        if known:
            latents = torch.cat([torch.zeros_like(known[0]) if (own := self.latents[n]) is None else own for n in numbers])
        estimate, latents = self.denoiser.denoise(torch.cat([x] * count) if count > 1 else x, levels, conditioning, latents)
        if latents is not None:
            for number, part in zip(numbers, latents.detach().chunk(count), strict=True):
                self.latents[number] = part
        return estimate.chunk(count)

    def _steered(self, x: Tensor, sigma: Tensor, known: Known) -> Tensor:
        """D with reconstruction guidance, whose gradient is the conditional branch's: text guidance does not scale it."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            estimate, conditional = self._estimates(x, sigma)
            if not known.weight:
                return estimate.detach()
            gradient = sampler.reconstruction_gradient(conditional, x, known.video, known.mask)
        return estimate.detach() - known.weight / 2 / self.sigma_in * gradient

    def _weight(self, sigma: Tensor) -> float:
        if self.config.oscillation is None and self.config.guidance_interval is None:
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
    known = None if request.known is None else _in_model_space(request.known, denoiser, device)
    denoise = GuidedDenoiser(denoiser, conditioning, config, sigma_in, known)
    levels = sampler.noise_levels(config)
    was_training = denoiser.training
    trained = [p for p in denoiser.parameters() if p.requires_grad and known is not None]
    denoiser.eval()
    for p in trained:
        p.requires_grad_(False)  # the gradient of reconstruction guidance stops at x
    try:
        sample = sampler.heun(denoise, noise, levels, sigma_in, progress, config.churn, fresh_noise)
    finally:
        denoiser.train(was_training)
        for p in trained:
            p.requires_grad_()
    return denoiser.codec.decode(sample)


def _in_model_space(known: Known, denoiser: Denoiser, device: torch.device) -> Known:
    video = known.video.to(device)
    edm.check_finite("known.video", video)
    return replace(known, video=denoiser.codec.encode(video), frames=known.frames.to(device))


def _joined(c: Conditioning, other: Conditioning) -> Conditioning:
    """Two batches as one."""

    def both(name: str) -> Tensor | None:
        mine, its = getattr(c, name), getattr(other, name)
        return None if mine is None else torch.cat([mine, its])

    return Conditioning(**{field.name: both(field.name) for field in fields(Conditioning)})  # type: ignore[arg-type]
