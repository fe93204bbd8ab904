"""Small networks, and what they are told."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model.networks.conditioning import Conditioning
from model.networks.fit.config import FITConfig

# 4 frames of 8x12 pixels in 2x2 patches: 4x4x6 patches, in 4 groups of 4x2x3 that hold 2 latents each.
TINY = FITConfig(
    size=(4, 8, 12),
    patch=(1, 2, 2),
    group=(4, 2, 3),
    patch_width=16,
    latent_tokens=8,
    latent_width=24,
    blocks=2,
    global_layers=2,
    patch_head_width=8,
    latent_head_width=8,
    conditioning_width=16,
    text_width=6,
    dropout=0.0,
)


@pytest.fixture
def tiny() -> FITConfig:
    """A FIT of some thousand parameters."""
    return TINY


@pytest.fixture
def conditioning() -> Callable[..., Conditioning]:
    """``conditioning(batch, dtype=..., **changes)``: videos and images in turn, captions of 1 to 5 tokens."""

    def build(batch: int, dtype: torch.dtype = torch.float32, **changes: torch.Tensor) -> Conditioning:
        generator = torch.Generator().manual_seed(5)
        rates = torch.tensor([24.0, float("inf"), 12.0, 8.0])
        given = Conditioning(
            c_noise=torch.linspace(-1.5, 1, batch),
            text=torch.randn(batch, 5, 6, generator=generator).to(dtype),
            text_mask=torch.arange(5) < torch.tensor([3, 5, 1, 4] * batch)[:batch, None],
            frame_rate=rates.repeat(batch)[:batch],
            resolution=torch.tensor([[36.0, 64.0], [720.0, 1280.0]]).repeat(batch, 1)[:batch],
        )
        return replace(given, **changes)

    return build
