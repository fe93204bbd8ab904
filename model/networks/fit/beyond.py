"""What the paper's FIT has not and small ones learn faster with (docs/learning.md); off by default. Torch and einops alone.

Legend: B batch, T frames, G groups, N patch tokens per group, P patch width, L text tokens, E width of the conditioning,
M of what modulates.
"""

import contextlib
import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from model.networks.fit.config import CLIP_STRIDE, FITConfig
from model.networks.layers import init_linear


class Modulation(nn.Module):
    """Scale and shift by an embedding of scalars and text, as in FiLM (Perez et al. 2018) and DiT (Peebles and Xie 2023)."""

    def __init__(self, embedding_width: int, width: int) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(embedding_width, 2 * width)

    def reset_parameters(self) -> None:
        init_linear(self.scale_shift, gain=0.3)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B n, K, width), n sequences for each sample, and ``embedding`` (B, M) -> as ``x``."""
        scale, shift = repeat(self.scale_shift(embedding), "b (two c) -> two (b n) 1 c", two=2, n=len(x) // len(embedding))
        return x * (1 + scale) + shift


def init_convolution(layer: nn.Conv2d | nn.Conv3d, gain: float = 1.0) -> None:
    """Normal of variance ``gain^2 / fan_in``; bias zero."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class TextPooling(nn.Module):
    """The text as one vector, for modulation: a perceptron over its tokens' mean, much as in Imagen (Saharia et al. 2022)."""

    def __init__(self, conditioning_width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(conditioning_width, conditioning_width)
        self.output = nn.Linear(conditioning_width, conditioning_width)

    def reset_parameters(self) -> None:
        init_linear(self.hidden)
        init_linear(self.output)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """``text`` (B, L, E) and ``mask`` (B, L), True where a token may be read, at one place at least -> (B, E)."""
        shown = mask[..., None].to(text.dtype)
        # By the root of their number: a mean of L tokens, as different as words are, has a variance of 1 / L.
        pooled = (text * shown).sum(dim=1) / shown.sum(dim=1).sqrt()
        return functional.silu(self.output(functional.silu(self.hidden(pooled))))


def convolve(layer: nn.Conv2d | nn.Conv3d, cells: Tensor, cpu_bf16: bool) -> Tensor:
    """(B, ..., C), channels last, as convolutions are fastest -> the same with the layer's channels."""
    # Elsewhere torch emulates bfloat16, which takes longer than float32 does.
    lowered = cpu_bf16 and cells.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    with torch.autocast("cpu", torch.bfloat16) if lowered else contextlib.nullcontext():
        convolved: Tensor = layer(cells.movedim(-1, 1))
    return (convolved.to(cells.dtype) if lowered else convolved).movedim(1, -1)


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
        frames = grid.flatten(0, 1).movedim(-1, 1)  # channels last, which is fastest
        # As three convolutions of single frames: depthwise ones over three dimensions take four times as long on a CPU.
        before, here, after = (
            functional.conv2d(frames, kernel, bias, padding=1, groups=frames.shape[1]).movedim(1, -1).view_as(grid)
            for kernel, bias in zip(self.convolution.weight.unbind(2), (None, self.convolution.bias, None), strict=True)
        )
        here = here + functional.pad(before[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        here = here + functional.pad(after[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
        return rearrange(here, "b (nt t) (nh h) (nw w) p -> (b nt nh nw) (t h w) p", **self.boxes)


class PixelBlock(nn.Module):
    """Two convolutions over pixels and, by default, frames, modulated before and in between, beside a 1x1 one.

    Around a transformer as in U-ViT (Hoogeboom et al. 2023): details need not pass through its stream, and what moves by less
    than a patch from frame to frame is seen before patches are cut. There is no norm, which would take contrast away. How much of
    the input passes depends on sigma: in much noise F is hardly a function of it, in little nearly the identity.
    """

    def __init__(self, config: FITConfig, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.gain, self.cpu_bf16 = gain, config.cpu_bf16
        width, kernel = config.pixel_width, (config.pixel_frames, 3, 3)
        padding = (config.pixel_frames // 2, 1, 1)
        self.input_modulation = Modulation(config.embedding_width, inputs)
        self.input = nn.Conv3d(inputs, width, kernel, padding=padding)
        self.modulation = Modulation(config.embedding_width, width)
        self.output = nn.Conv3d(width, outputs, kernel, padding=padding)
        self.skip = nn.Conv3d(inputs, outputs, 1)

    def reset_parameters(self) -> None:
        init_convolution(self.input)
        init_convolution(self.output, self.gain)
        init_convolution(self.skip, self.gain)

    def forward(self, video: Tensor, embedding: Tensor) -> Tensor:
        """``video`` (B, T, H, W, inputs) and ``embedding`` (B, M) -> (B, T, H, W, outputs)."""
        video = self._modulate(self.input_modulation, video, embedding)
        hidden = functional.silu(convolve(self.input, video, self.cpu_bf16))
        hidden = self._modulate(self.modulation, hidden, embedding)
        skipped = functional.linear(video, self.skip.weight.flatten(1), self.skip.bias)  # a 1x1x1 convolution is slow on a CPU
        return skipped + convolve(self.output, hidden, self.cpu_bf16)

    @staticmethod
    def _modulate(modulation: Modulation, video: Tensor, embedding: Tensor) -> Tensor:
        return modulation(video.flatten(1, 3), embedding).view_as(video)


class ClipBlock(nn.Module):
    """Three convolutions over places that see all frames as channels, modulated after the first two: beside FIT, not in it.

    What is hidden by noise in every frame is found by what all frames show along its way, much as by a matched filter; neither
    convolutions of three frames nor patches of one see that. What is found is painted into all frames, and told to the patches.
    """

    def __init__(self, config: FITConfig, inputs: int) -> None:
        super().__init__()
        self.frames, width, self.cpu_bf16 = config.size[0], config.clip_width, config.cpu_bf16
        cell = self.frames * CLIP_STRIDE**2
        self.cells = (config.patch[1] // CLIP_STRIDE, config.patch[2] // CLIP_STRIDE)
        self.input = nn.Conv2d(cell * inputs, width, 5, padding=2)
        self.input_modulation = Modulation(config.embedding_width, width)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.middle_modulation = Modulation(config.embedding_width, width)
        self.output = nn.Conv2d(width, cell * config.channels, 5, padding=2)
        self.patches = nn.Linear(width * math.prod(self.cells), config.patch_width)

    def reset_parameters(self) -> None:
        init_convolution(self.input)
        init_convolution(self.middle)
        init_convolution(self.output, 0.2)
        init_linear(self.patches, 0.5)

    def forward(self, video: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """``video`` (B, T, inputs, H, W) and ``embedding`` (B, M) -> (B, T, C, H, W), and (B, h w, P): for h x w patches, whose
        frames are all told the same."""
        squares = {"sh": CLIP_STRIDE, "sw": CLIP_STRIDE}
        # Channels last, as convolutions are fastest.
        places = rearrange(video, "b t c (h sh) (w sw) -> b h w (t c sh sw)", **squares)
        first = self._modulate(self.input_modulation, convolve(self.input, places, self.cpu_bf16), embedding)
        second = self._modulate(self.middle_modulation, first + convolve(self.middle, first, self.cpu_bf16), embedding)
        painted = convolve(self.output, second, self.cpu_bf16)
        told = self.patches(rearrange(second, "b (h ch) (w cw) c -> b (h w) (ch cw c)", ch=self.cells[0], cw=self.cells[1]))
        painted = rearrange(painted, "b h w (t c sh sw) -> b t c (h sh) (w sw)", t=self.frames, **squares)
        return painted, told

    @staticmethod
    def _modulate(modulation: Modulation, places: Tensor, embedding: Tensor) -> Tensor:
        return functional.silu(modulation(places.flatten(1, 2), embedding).view_as(places))
