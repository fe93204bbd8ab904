"""Media <-> model space: the only seam where pixels and latents differ.

The paper's cascade works on pixels; a latent system adds a codec here and nothing else changes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class PixelCodecConfig:
    """Pixels as they are, padded at the bottom and right to the network's size (36 x 64 becomes 40 x 64, appendix A)."""

    kind: Literal["pixels"] = "pixels"
    height: int = 36  # of the media
    width: int = 64
    pad_bottom: int = 4
    pad_right: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("pad_bottom", "pad_right"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class PixelCodec:
    """Video (B, T, C, H, W) in [-1, 1] <-> model space (B, T, C, H + pad_bottom, W + pad_right).

    Padding is whole patches at the edge, not a split between both edges: no patch then mixes media and padding.
    """

    def __init__(self, config: PixelCodecConfig) -> None:
        self.config = config

    def encode(self, video: Tensor) -> Tensor:
        """Pad with zeros.

        Raises:
            ValueError: media of another size than configured.
        """
        c = self.config
        if tuple(video.shape[-2:]) != (c.height, c.width):
            raise ValueError(
                f"video: height and width are {tuple(video.shape[-2:])}, the codec is configured for {(c.height, c.width)}"
            )
        return functional.pad(video, (0, c.pad_right, 0, c.pad_bottom))

    def decode(self, video: Tensor) -> Tensor:
        """Crop the padding away and clip to [-1, 1]."""
        return video[..., : self.config.height, : self.config.width].clamp(-1, 1)

    def mask(self, device: torch.device) -> Tensor:
        """(1, 1, 1, H', W'): 1 on media, 0 on padding, which stays out of the loss."""
        ones = torch.ones(1, 1, 1, self.config.height, self.config.width, device=device)
        return functional.pad(ones, (0, self.config.pad_right, 0, self.config.pad_bottom))


def to_pixels(video: Tensor) -> Tensor:
    """[-1, 1] floats (..., C, H, W) -> uint8 (..., H, W, C)."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-3, -1)


def from_pixels(pixels: Tensor) -> Tensor:
    """uint8 (..., H, W, C) -> [-1, 1] floats (..., C, H, W)."""
    return pixels.movedim(-1, -3).to(torch.float32) / 127.5 - 1
