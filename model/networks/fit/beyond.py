"""What the paper's FIT has not and small ones learn faster with (docs/learning.md); off by default. Torch and einops alone.

Legend: B batch, T frames, G groups, N patch tokens per group, P patch width, E width of the conditioning.
"""

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from model.networks.fit.config import FITConfig
from model.networks.layers import init_linear


class Modulation(nn.Module):
    """Scale and shift by what the scalars say, as in FiLM (Perez et al. 2018) and DiT (Peebles and Xie 2023)."""

    def __init__(self, conditioning_width: int, width: int) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(conditioning_width, 2 * width)

    def reset_parameters(self) -> None:
        init_linear(self.scale_shift, gain=0.1)

    def forward(self, x: Tensor, scalars: Tensor) -> Tensor:
        """``x`` (B n, K, width), n sequences for each sample, and ``scalars`` (B, E) -> as ``x``."""
        scale, shift = repeat(self.scale_shift(scalars), "b (two c) -> two (b n) 1 c", two=2, n=len(x) // len(scalars))
        return x * (1 + scale) + shift


def init_convolution(layer: nn.Conv2d | nn.Conv3d, gain: float = 1.0) -> None:
    """Normal of variance ``gain^2 / fan_in``; bias zero."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class PatchConvolution(nn.Module):
    """Depthwise 3x3x3 convolution over the grid of patches, across the borders of groups; residual left to the caller.

    As in conditional positional encodings (Chu et al. 2021): that neighbours agree is learnt once, not anew at each place.
    """

    def __init__(self, config: FITConfig, gain: float) -> None:
        super().__init__()
        self.boxes, self.gain = config.boxes, gain
        self.convolution = nn.Conv3d(config.patch_width, config.patch_width, 3, padding=1, groups=config.patch_width)

    def reset_parameters(self) -> None:
        init_convolution(self.convolution, self.gain)

    def forward(self, patches: Tensor) -> Tensor:
        """(B G, N, P) -> the same."""
        grid = rearrange(patches, "(b nt nh nw) (t h w) p -> b (nt t) (nh h) (nw w) p", **self.boxes)
        grid = self.convolution(grid.movedim(-1, 1)).movedim(1, -1)  # channels last, which is fastest
        return rearrange(grid, "b (nt t) (nh h) (nw w) p -> (b nt nh nw) (t h w) p", **self.boxes)


class PixelBlock(nn.Module):
    """Two 3x3 convolutions over the pixels of each frame, modulated in between, beside a 1x1 one.

    Around a transformer as in U-ViT (Hoogeboom et al. 2023): details need not pass through its stream. There is no norm, which
    would take contrast away.
    """

    def __init__(self, inputs: int, width: int, outputs: int, conditioning_width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.input = nn.Conv2d(inputs, width, 3, padding=1)
        self.modulation = Modulation(conditioning_width, width)
        self.output = nn.Conv2d(width, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def reset_parameters(self) -> None:
        init_convolution(self.input)
        init_convolution(self.output, self.gain)
        init_convolution(self.skip, self.gain)

    def forward(self, video: Tensor, scalars: Tensor) -> Tensor:
        """``video`` (B, T, inputs, H, W) and ``scalars`` (B, E) -> (B, T, outputs, H, W)."""
        frames = video.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        hidden = functional.silu(self.input(frames))
        pixels = self.modulation(rearrange(hidden, "n c h w -> n (h w) c"), scalars)
        hidden = rearrange(pixels, "n (h w) c -> n c h w", h=video.shape[3])
        return (self.skip(frames) + self.output(hidden)).unflatten(0, video.shape[:2])
