"""The model: codec + network + loss, and the denoiser D that samplers call. Imports torch and einops alone."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.codec import PixelCodec, PixelCodecConfig
from model.diffusion import edm
from model.diffusion.loss_levels import LossLevels
from model.draws import Draws
from model.networks import catalogue
from model.networks.conditioning import Conditioning
from model.networks.fit.config import FITConfig


@dataclass(frozen=True)
class UpsamplerConfig:
    """How stage 2 makes its low-resolution input in training (section 3.4).

    The clip itself, averaged down by ``factor``, corrupted at low resolution by Gaussian noise of a random std, and brought back
    to size. The paper says that the input is corrupted by a variable level of noise; concatenation to the network's input,
    the uniform draw and the level's token are our reading.
    """

    factor: int = 8
    max_corruption: float = 0.5  # std of the noise in training is uniform in [0, this]
    # Diffuse what the low-resolution input lacks (Li et al. 2022, SRDiff), which the paper does not: a narrow network then need
    # not learn to copy its input (docs/learning.md). ``diffusion.sigma_data`` is that residual's spread.
    residual: bool = False

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if self.max_corruption < 0:
            raise ValueError(f"max_corruption must not be negative, got {self.max_corruption}")


@dataclass(frozen=True)
class ModelConfig:
    """One stage of the cascade."""

    codec: PixelCodecConfig = field(default_factory=PixelCodecConfig)
    diffusion: edm.DiffusionConfig = field(default_factory=edm.DiffusionConfig)
    network: catalogue.NetworkConfig = field(default_factory=FITConfig)
    upsampler: UpsamplerConfig | None = None  # None for stage 1
    self_conditioning: float = 0.9  # probability of a first pass whose latents the training pass starts from
    text_dropout: float = 0.1  # "label dropout": share of samples that train without text, for guidance
    # Beyond the paper: each noise level's loss is divided by its running mean (model/diffusion/loss_levels.py, docs/learning.md).
    uncertainty_weighting: bool = False

    def __post_init__(self) -> None:
        for name in ("self_conditioning", "text_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.self_conditioning and not self.network.carries_latents:
            raise ValueError(f"self_conditioning must be 0 for a {self.network.kind}, which has no latents to carry")
        c, size = self.codec, self.network.size
        if (c.height + c.pad_bottom, c.width + c.pad_right) != size[1:]:
            padded = f"{c.height}x{c.width} padded by {c.pad_bottom} and {c.pad_right}"
            raise ValueError(f"codec: {padded} is not the network's size {size[1]}x{size[2]}")
        if (self.upsampler is not None) != self.network.upsampler:
            raise ValueError("network.upsampler must be true exactly where an upsampler is configured")
        if self.upsampler and (c.height % self.upsampler.factor or c.width % self.upsampler.factor):
            raise ValueError(f"upsampler.factor {self.upsampler.factor} does not divide the media's {c.height}x{c.width}")


@dataclass(frozen=True)
class LossTerms:
    """What a training forward pass yields. B batch."""

    loss: Tensor  # (B,) effective weight times mean squared error, padding left out
    sigma: Tensor  # (B,)
    weight: Tensor | None = None  # (B,) of each sample's loss in the objective; None: 1


class Denoiser(nn.Module):
    """A stage of the cascade.

    All parameters live in ``network``: one directly on this module would stay unsharded and unsynchronised.

    Args:
        config: the stage.
        device: where the network is built; "meta" allocates nothing.
    """

    def __init__(self, config: ModelConfig, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.config = config
        self.codec = PixelCodec(config.codec)
        self.network = catalogue.build(config.network, device)
        self.levels = LossLevels(config.diffusion) if config.uncertainty_weighting else None

    def forward(self, batch: dict[str, Any], draws: Draws | None = None) -> LossTerms:
        """The training objective on a batch: equation 3 of the paper, in the F form, which is stable at all sigma.

        All that is drawn comes from each sample's own ``seed``, or from ``draws``; dropout in the network does not.

        Raises:
            ValueError: media or text of another shape than configured, or (on the CPU) with values that are not finite.
        """
        draws = draws or Draws(batch["seed"], batch["video"].device)
        sigma = edm.training_sigma(draws.normal(), self.config.diffusion)
        terms = self._objective(batch, sigma, draws, self.config.text_dropout, self.config.self_conditioning)
        return replace(terms, weight=self.levels.weights(sigma)) if self.levels else terms

    def loss_at(self, batch: dict[str, Any], sigma: Tensor) -> Tensor:
        """(B,) the objective at the noise levels ``sigma`` (B,), with the network used as samplers use it.

        Every sample keeps its text, and where the network carries latents they come from a first pass. Noise comes from each
        sample's ``seed``.

        Raises:
            ValueError: as ``forward``.
        """
        draws = Draws(batch["seed"], batch["video"].device)
        first_pass = float(self.config.self_conditioning > 0)
        return self._objective(batch, sigma, draws, text_dropout=0.0, self_conditioning=first_pass).loss

    def _objective(
        self, batch: dict[str, Any], sigma: Tensor, draws: Draws, text_dropout: float, self_conditioning: float
    ) -> LossTerms:
        diffusion = self.config.diffusion
        edm.check_finite("video", batch["video"])
        edm.check_finite("text", batch["text"])
        x = self.codec.encode(batch["video"])
        conditioning = self._training_conditioning(batch, sigma, draws, text_dropout)
        process = edm.process(diffusion, conditioning.is_image)
        x = x - self._known(conditioning, x)
        eps = edm.share_noise(draws.normal(*x.shape[1:]), conditioning.is_image, diffusion)
        network_input = process.scale_input(process.add_noise(x, eps, sigma), sigma)
        latents = self._self_conditioning(network_input, conditioning, draws, self_conditioning)
        output = self.network(network_input, conditioning, latents).video
        error = (output.float() - process.network_target(x, eps, sigma)) ** 2
        mask = self.codec.mask(x.device)
        mean = (error * mask).mean(dim=(1, 2, 3, 4)) / mask.mean()
        return LossTerms(process.effective_weight(sigma) * mean, sigma)

    def loss(self, outputs: LossTerms, batch: dict[str, Any]) -> Tensor:
        """() what training minimises."""
        return (outputs.loss if outputs.weight is None else outputs.loss * outputs.weight).mean()

    def denoise(
        self, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning, latents: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """D(x_sigma; sigma), the estimate of the data in model space, and what the network carries to the next evaluation.

        Padding is known to be zero, so D says zero there rather than what the untrained output says. The network is told levels
        that training can have drawn.
        """
        conditioning = replace(conditioning, c_noise=edm.drawn_c_noise(conditioning.c_noise, self.config.diffusion))
        process = edm.process(self.config.diffusion, conditioning.is_image)
        known = self._known(conditioning, x_sigma)
        x_sigma = process.take_away(x_sigma, known)
        output, latents = self.network(process.scale_input(x_sigma, sigma), conditioning, latents)
        estimate = process.combine(x_sigma, output.float(), sigma) + known
        return estimate * self.codec.mask(estimate.device), latents

    def downsample(self, video: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, T, C, H / factor, W / factor), the low-resolution video that an upsampler trains on."""
        if self.config.upsampler is None:
            raise ValueError("upsampler: this stage has none, so its media have no low-resolution version")
        return functional.avg_pool2d(video.flatten(0, 1), self.config.upsampler.factor).unflatten(0, video.shape[:2])

    def low_resolution_input(self, low: Tensor, corruption: Tensor, noise: Tensor) -> Tensor:
        """Corrupt a low-resolution video and bring it to the network's size.

        Args:
            low: (B, T, C, h, w) in [-1, 1].
            corruption: (B,) std of the noise.
            noise: unit Gaussian noise of the shape of ``low``.
        """
        level = edm.expand(corruption, low)
        corrupted = (low + level * noise) / (1 + level**2).sqrt()
        height, width = self.config.codec.height, self.config.codec.width
        flat = functional.interpolate(corrupted.flatten(0, 1), (height, width), mode="bilinear", align_corners=False)
        return self.codec.encode(flat.unflatten(0, low.shape[:2]))

    def _known(self, conditioning: Conditioning, like: Tensor) -> Tensor:
        """(B, T, C, H, W) what of the media is not diffused: the low-resolution input where the residual is, else zero."""
        if self.config.upsampler is None or not self.config.upsampler.residual:
            return like.new_zeros(())
        assert conditioning.low_resolution is not None
        return conditioning.low_resolution

    def _training_conditioning(self, batch: dict[str, Any], sigma: Tensor, draws: Draws, text_dropout: float) -> Conditioning:
        low_resolution = corruption = None
        if self.config.upsampler:
            video = batch["video"]
            low = self.downsample(video)
            corruption = draws.uniform() * self.config.upsampler.max_corruption
            low_resolution = self.low_resolution_input(low, corruption, draws.normal(*low.shape[1:]))
        conditioning = Conditioning(
            c_noise=edm.c_noise(sigma),
            text=batch["text"],
            text_mask=batch["text_mask"],
            frame_rate=batch["frame_rate"],
            resolution=batch["resolution"],
            low_resolution=low_resolution,
            corruption=corruption,
        )
        return conditioning.without_text(draws.uniform() < text_dropout)

    def _self_conditioning(
        self, network_input: Tensor, conditioning: Conditioning, draws: Draws, probability: float
    ) -> Tensor | None:
        """Latents of a first pass without gradient; zeros for the samples that do without.

        The choice is made by sample and the pass is always run: a choice by batch would let ranks disagree on the number of
        collectives under FSDP.
        """
        if probability == 0:
            return None
        with torch.no_grad():
            latents = self.network(network_input, conditioning, latents_only=True).latents
        chosen = draws.uniform() < probability
        return latents * edm.expand(chosen, latents)
