"""The U-Net baseline: ADM (Dhariwal and Nichol 2021) with temporal attention (paper section 4.3, Table 7).

Legend: B batch, T frames, C channels of a level, E conditioning width, L text tokens. Imports torch and einops alone.

Convolutions, norms and spatial attention see one frame at a time; temporal attention after each spatial attention sees one place
at all times, told its frames apart by learned positions. As in ADM: residual blocks that also change the resolution, scale and
shift of the second norm by the embedding, and zeros at the end of every residual branch and in the head.

Where the text enters, the paper does not say; we infer it from the published sizes. The scalars (sigma, frame rate, resolution)
are summed to the embedding, and after each temporal attention a cross-attention of its own reads the text, both at Table 7's
"conditioning channels": 86.4 M and 281.8 M parameters, for 85 M and 284 M. With the text among the keys and values of the spatial
attention, as GLIDE has it, there would be 83 M and 270 M; with plain convolutions to change the resolution, 80 M and 263 M.

Activations lie channels-last: convolutions are fastest so, and sequences of places are views.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from model.networks.conditioning import Conditioning, ConditioningTokens
from model.networks.layers import Attention, activate
from model.networks.network import Block, Network, NetworkOutput, check_inputs
from model.networks.unet.config import CHANNELS_PER_GROUP, NORM_GROUPS, UNetConfig


class GroupNorm(nn.GroupNorm):
    """Group norm whose result has its input's dtype: computed in float32 under autocast, as in ADM, but not kept so."""

    def __init__(self, width: int) -> None:
        super().__init__(min(NORM_GROUPS, width // CHANNELS_PER_GROUP), width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return super().forward(x).to(x.dtype)


class Double(nn.Module):
    """(N, C, H, W) -> (N, C, 2 H, 2 W), nearest neighbours; unlike torch's own, in its input's dtype under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(repeat(x, "n c h w -> n (h two) (w too) c", two=2, too=2), "n h w c -> n c h w")


Resample = Literal["halve", "double"] | None
RESAMPLERS: dict[Resample, Callable[[], nn.Module]] = {"halve": partial(nn.AvgPool2d, 2), "double": Double, None: nn.Identity}


def zero(layer: nn.Linear | nn.Conv2d) -> None:
    """ADM's start of what ends a residual branch: the branch is silent."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ResidualBlock(nn.Module):
    """Two convolutions, the second's norm scaled and shifted by the embedding; may halve or double the resolution."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, resample: Resample) -> None:
        super().__init__()
        self.resample = RESAMPLERS[resample]()
        self.input_norm = GroupNorm(inputs)
        self.input = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.scale_shift = nn.Linear(embedding, 2 * outputs)
        self.output_norm = GroupNorm(outputs)
        self.dropout = dropout
        self.output = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def reset_parameters(self) -> None:
        zero(self.output)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` (B T, inputs, H, W) and ``embedding`` (B, E) -> (B T, outputs, ...)."""
        h = self.input(self.resample(functional.silu(self.input_norm(x))))
        frames = len(x) // len(embedding)
        scale, shift = repeat(self.scale_shift(embedding), "b (two c) -> two (b t) c 1 1", two=2, t=frames)
        h = self.output_norm(h) * (1 + scale) + shift
        return self.skip(self.resample(x)) + self.output(activate(h, "silu", self.dropout if self.training else 0.0))


class SelfAttention(nn.Module):
    """What attention over places and attention over frames share; residual left to the caller."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        self.norm = GroupNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def reset_parameters(self) -> None:
        zero(self.output)


class SpatialAttention(SelfAttention):
    """Among the places of a frame."""

    def forward(self, x: Tensor) -> Tensor:
        """(B T, C, H, W) -> the same. P is H W."""
        tokens = self.query_key_value(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        q, k, v = rearrange(tokens, "n p (three heads c) -> three n heads p c", three=3, c=self.head_width)
        attended = rearrange(functional.scaled_dot_product_attention(q, k, v), "n heads p c -> n p (heads c)")
        return rearrange(self.output(attended), "n (h w) c -> n c h w", h=x.shape[2])


class TemporalAttention(SelfAttention):
    """Among the frames at a place.

    Very many very short sequences: their scores are a fraction of their keys, while fused kernels would pad each sequence to a
    tile of 64 or 128 and take no more than 65,535 of them.
    """

    def __init__(self, width: int, head_width: int, frames: int) -> None:
        super().__init__(width, head_width)
        self.position = nn.Parameter(torch.empty(frames, 1, width))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.position)  # the variance of what it is added to

    def forward(self, x: Tensor) -> Tensor:
        """(B T, C, H, W) -> the same. P is H W."""
        frames = len(self.position)
        tokens = rearrange(self.norm(x), "(b t) c h w -> b t (h w) c", t=frames) + self.position.to(x.dtype)
        tokens = self.query_key_value(tokens)
        q, k, v = rearrange(tokens, "b t p (three heads c) -> three (b p heads) t c", three=3, c=self.head_width)
        weights = (q @ k.transpose(1, 2) / math.sqrt(self.head_width)).softmax(dim=-1)
        attended = weights.to(v.dtype) @ v
        attended = rearrange(attended, "(b p heads) t c -> (b t) p (heads c)", b=len(x) // frames, p=tokens.shape[2])
        return rearrange(self.output(attended), "n (h w) c -> n c h w", h=x.shape[2])


class TextAttention(Attention):
    """From every place of every frame to the text."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        zero(self.output)

    def forward_frames(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """``x`` (B T, C, H, W), ``text`` (B, L, E), ``mask`` (B, L) -> as ``x``."""
        queries = rearrange(x, "(b t) c h w -> b (t h w) c", b=len(text))
        return rearrange(self(queries, text, mask), "b (t h w) c -> (b t) c h w", h=x.shape[2], w=x.shape[3])


class UNetBlock(Block):
    """A residual block, and at the levels that have it attention over places, over frames, and to the text."""

    def __init__(
        self,
        config: UNetConfig,
        inputs: int,
        outputs: int,
        attention: bool = False,
        resample: Resample = None,
    ) -> None:
        super().__init__(recompute=config.checkpoint_blocks)
        c = config
        self.doubles = resample == "double"
        self.residual = ResidualBlock(inputs, outputs, c.conditioning_width, c.dropout, resample)
        self.attention = attention
        if attention:
            self.spatial = SpatialAttention(outputs, c.head_width)
            self.temporal = TemporalAttention(outputs, c.head_width, c.size[0])
            self.text = TextAttention(outputs, c.conditioning_width, c.head_width)

    def compute(self, x: Tensor, embedding: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """``x`` (B T, C, H, W), ``embedding`` (B, E), ``text`` (B, L, E) and its ``mask`` (B, L) -> (B T, ...)."""
        x = self.residual(x, embedding)
        if self.attention:
            x = x + self.spatial(x)
            x = x + self.temporal(x)
            x = x + self.text.forward_frames(x, text, mask)
        return x


class UNet(Network):
    """The U-Net; no latents.

    Raises:
        ValueError: an input of another size or text of another width than configured, or what a U-Net does not have: latents, a
            low-resolution video.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        self.conditioning = ConditioningTokens(
            c.text_width, c.conditioning_width, corruption=False, standardised=c.text_standardised
        )
        self.stem = nn.Conv2d(c.channels, c.base_width, 3, padding=1)
        levels = [(width, factor in c.attention_factors) for width, factor in zip(c.widths, c.factors, strict=True)]

        self.down = nn.ModuleList()
        skips = [c.base_width]  # channels of what the way up reads: the stem's result and each of these blocks'
        for level, (width, attention) in enumerate(levels):
            if level > 0:
                self.down.append(UNetBlock(c, skips[-1], skips[-1], resample="halve"))
                skips.append(skips[-1])
            for _ in range(c.residual_blocks):
                self.down.append(UNetBlock(c, skips[-1], width, attention))
                skips.append(width)
        here, attention = levels[-1]
        self.middle = nn.ModuleList([UNetBlock(c, here, here, attention), UNetBlock(c, here, here)])
        self.up = nn.ModuleList()
        for level, (width, attention) in reversed(list(enumerate(levels))):
            for _ in range(c.residual_blocks + 1):
                self.up.append(UNetBlock(c, here + skips.pop(), width, attention))
                here = width
            if level > 0:
                self.up.append(UNetBlock(c, here, here, resample="double"))
        self.head_norm = GroupNorm(here)
        self.head = nn.Conv2d(here, c.channels, 3, padding=1)

    def reset_parameters(self) -> None:
        zero(self.head)

    def forward(
        self, video: Tensor, conditioning: Conditioning, latents: Tensor | None = None, latents_only: bool = False
    ) -> NetworkOutput:
        """One evaluation; ``latents`` and ``latents_only`` are there because other networks have some."""
        check_inputs(video, conditioning, self.config)
        if latents is not None or latents_only:
            raise ValueError("latents: a U-Net has none, neither to start from nor to ask for")
        tokens, mask = self.conditioning(conditioning)
        length = conditioning.text.shape[1]
        told = (functional.silu(tokens[:, length:].sum(dim=1)), tokens[:, :length], mask[:, :length])

        frames = rearrange(video, "b t c h w -> (b t) c h w")
        x = self.stem(frames.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in self.down:
            x = block(x, *told)
            skips.append(x)
        for block in self.middle:
            x = block(x, *told)
        for block in self.up:
            if not block.doubles:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, *told)
        x = self.head(functional.silu(self.head_norm(x)))
        return NetworkOutput(rearrange(x, "(b t) c h w -> b t c h w", t=video.shape[1]).contiguous(), None)
