"""The models that ``bench/gpu.py`` measures, as the yamls configure them.

They are written out, because the machine with the GPU need not have what reads yamls; a test compares them with the yamls. The
parts of the bench take their subjects from the tables here, so another system is measured once it has entries in them.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.codec import PixelCodecConfig
from model.denoiser import ModelConfig, UpsamplerConfig
from model.diffusion.edm import DiffusionConfig
from model.draws import Draws
from model.lamb import LAMBConfig
from model.networks.conditioning import Conditioning
from model.networks.fit.config import FITConfig
from model.networks.unet.config import UNetConfig
from model.optimizers import AdamConfig, OptimizerConfig

TEXT_TOKENS = 128


@dataclass(frozen=True)
class Subject:
    """A model to measure."""

    name: str
    yaml: str  # which says the same
    model: ModelConfig
    optimizer: OptimizerConfig


FIT_500M = Subject("FIT 500M", "stage1_500m.yaml", ModelConfig(network=FITConfig()), LAMBConfig())
UNET_284M = Subject("U-Net 284M", "unet_284m.yaml", ModelConfig(network=UNetConfig(), self_conditioning=0.0), AdamConfig())
LARGE: dict[str, Any] = {
    "patch_width": 1024, "latent_tokens": 768, "latent_width": 3072, "patch_head_width": 64, "latent_head_width": 128,
    "conditioning_width": 1024, "checkpoint_blocks": True,
}  # fmt: skip
FIT_3_9B = Subject("FIT 3.9B", "stage1.yaml", ModelConfig(network=FITConfig(**LARGE)), LAMBConfig())
UPSAMPLER = Subject(
    "FIT 3.9B Up",
    "stage2.yaml",
    ModelConfig(
        codec=PixelCodecConfig(height=288, width=512, pad_bottom=0),
        diffusion=DiffusionConfig(sigma_in=32.0),
        network=FITConfig(**LARGE, size=(16, 288, 512), group=(16, 18, 16), position="factorised", upsampler=True),
        upsampler=UpsamplerConfig(factor=8, max_corruption=0.5),
    ),
    LAMBConfig(),
)

SPEED = (FIT_500M, UNET_284M)
MEMORY = ((FIT_3_9B, 1), (UPSAMPLER, 1), (FIT_500M, 32), (UNET_284M, 16))  # with so many videos at once
OPTIMIZERS = FIT_500M
WALT: tuple[Subject, ...] = ()  # W.A.L.T.'s models are not in this checkout yet


def shrunk(subject: Subject) -> Subject:
    """The subject in miniature, for a rehearsal: 4 frames of 8x12 pixels and some thousand parameters."""
    network = subject.model.network
    size: dict[str, Any] = {"size": (4, 8, 12), "conditioning_width": 32, "text_width": 16}
    if isinstance(network, FITConfig):
        size |= {"patch": (1, 2, 2), "group": (4, 2, 3), "patch_width": 32, "latent_tokens": 8, "latent_width": 32, "blocks": 2}
        size |= {"global_layers": 1, "patch_head_width": 16, "latent_head_width": 16}
    else:
        size |= {"base_width": 32, "multipliers": (1, 2), "residual_blocks": 1, "attention_factors": (2,), "head_width": 16}
    codec = PixelCodecConfig(height=8, width=12, pad_bottom=0)
    upsampler = replace(subject.model.upsampler, factor=2) if subject.model.upsampler else None
    return replace(subject, model=replace(subject.model, codec=codec, network=replace(network, **size), upsampler=upsampler))


class SharedDraws(Draws):
    """Draws of all samples at once from the device's own generator, as a CUDA graph can capture them; seeds do not count."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.count, *shape, device=self.device)

    def uniform(self) -> Tensor:
        return torch.rand(self.count, device=self.device)


def batch_of(model: ModelConfig, videos: int, device: str | torch.device) -> dict[str, Any]:
    """A batch of noise with full-length captions; every second one is an image."""
    codec = model.codec
    rates = torch.tensor([24.0, float("inf")]).repeat(-(-videos // 2))[:videos]
    with torch.device(device):
        return {
            "video": torch.empty(videos, model.network.size[0], 3, codec.height, codec.width).uniform_(-1, 1),
            "text": torch.randn(videos, TEXT_TOKENS, model.network.text_width).to(torch.bfloat16),
            "text_mask": torch.ones(videos, TEXT_TOKENS, dtype=torch.bool),
            "frame_rate": rates.to(device),
            "resolution": torch.tensor([[288.0, 512.0]]).repeat(videos, 1),
            "seed": list(range(videos)),
        }


def evaluation_of(model: ModelConfig, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Conditioning, Tensor | None]:
    """Arguments of ``Denoiser.denoise`` for a batch at a noise level of 1, as in the middle of sampling."""
    network, videos = model.network, len(batch["frame_rate"])
    frames, height, width = network.size
    with torch.device(batch["frame_rate"].device):
        x, sigma = torch.randn(videos, frames, 3, height, width), torch.ones(videos)
        low, corruption = (
            (torch.randn(videos, frames, 3, height, width), torch.zeros(videos)) if model.upsampler else (None, None)
        )
        carried = torch.randn(videos, network.latent_tokens, network.latent_width) if isinstance(network, FITConfig) else None
    told = Conditioning(
        sigma.log() / 4, batch["text"], batch["text_mask"], batch["frame_rate"], batch["resolution"], low, corruption
    )
    return x, sigma, told, carried
