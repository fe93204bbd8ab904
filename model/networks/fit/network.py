"""FIT as Snap Video uses it (paper section 3.4, Figure 3b, appendix A). Imports torch and einops alone.

Legend: B batch, G groups, N patch tokens per group, M latent tokens per group, P patch width, Z latent width,
S conditioning tokens, E their width.

A few latent tokens read from many patch tokens, compute, and write back, block after block. Reads and writes stay within a group
of patches that spans all frames; the latents are divided among the groups, and global layers over all latents mix them.

Initialisation: truncated normal of variance 1 / fan_in; projections that end a residual branch are scaled by
1 / sqrt(number of residual branches on their stream); positions have ``position_std`` beside unit-variance patches; the
self-conditioning norm starts at scale zero.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from model.networks.conditioning import Conditioning, ConditioningTokens
from model.networks.fit import transfer
from model.networks.fit.beyond import ClipBlock, Modulation, PatchConvolution, PixelBlock, TextPooling
from model.networks.fit.config import FITConfig
from model.networks.layers import Attention, FeedForward, LayerNorm, init_linear
from model.networks.network import Block, Network, NetworkOutput, check_inputs


class GlobalLayer(nn.Module):
    """Self-attention over all latents, then a feed-forward; the only place with dropout (appendix B)."""

    def __init__(self, config: FITConfig, gain: float) -> None:
        super().__init__()
        self.attention = Attention(config.latent_width, None, config.latent_head_width, gain)
        self.feed_forward = FeedForward(config.latent_width, config.dropout, gain)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, G M, Z) -> the same."""
        latents = latents + self.attention(latents)
        return latents + self.feed_forward(latents)


class FITBlock(Block):
    """Latents read the conditioning, then their group's patches; global layers; patches read back from latents (the write)."""

    def __init__(self, config: FITConfig) -> None:
        super().__init__(recompute=config.checkpoint_blocks)
        c = config
        self.groups = c.groups
        latent_gain = 1 / math.sqrt(c.blocks * (4 + 2 * c.global_layers))
        patch_gain = 1 / math.sqrt(2 * c.blocks)
        self.read_conditioning = Attention(c.latent_width, c.conditioning_width, c.latent_head_width, latent_gain)
        self.conditioning_feed_forward = FeedForward(c.latent_width, output_gain=latent_gain)
        self.read = Attention(c.latent_width, c.patch_width, c.patch_head_width, latent_gain)
        self.read_feed_forward = FeedForward(c.latent_width, output_gain=latent_gain)
        self.layers = nn.ModuleList(GlobalLayer(c, latent_gain) for _ in range(c.global_layers))
        self.write = Attention(c.patch_width, c.latent_width, c.patch_head_width, patch_gain)
        self.write_feed_forward = FeedForward(c.patch_width, output_gain=patch_gain)
        self.modulation = Modulation(c.embedding_width, c.patch_width) if c.modulation else None
        self.convolution = PatchConvolution(c, patch_gain) if c.convolution else None

    def compute(
        self, patches: Tensor, latents: Tensor, tokens: Tensor, mask: Tensor, embedding: Tensor, write: bool
    ) -> tuple[Tensor, Tensor]:
        """One block of Figure 3b.

        Args:
            patches: (B G, N, P).
            latents: (B, G M, Z).
            tokens: (B, S, E), the conditioning.
            mask: (B, S), True where a token may be read.
            embedding: (B, M), what modulates the patches.
            write: False leaves the patches as they are.

        Returns:
            Patches and latents, in the same shapes.
        """
        latents = latents + self.read_conditioning(latents, tokens, mask)
        latents = latents + self.conditioning_feed_forward(latents)
        grouped = rearrange(latents, "b (g m) z -> (b g) m z", g=self.groups)
        grouped = grouped + self.read(grouped, patches)
        grouped = grouped + self.read_feed_forward(grouped)
        latents = rearrange(grouped, "(b g) m z -> b (g m) z", g=self.groups)
        for layer in self.layers:
            latents = layer(latents)
        if write:
            grouped = rearrange(latents, "b (g m) z -> (b g) m z", g=self.groups)
            patches = patches + self.write(patches, grouped)
            modulate = partial(self.modulation, embedding=embedding) if self.modulation else None
            patches = patches + self.write_feed_forward(patches, modulate)
            if self.convolution:
                patches = patches + self.convolution(patches)
        return patches, latents


class PatchPosition(nn.Module):
    """Learned position of each patch (Table 8), in reading order, before grouping; t h w is the grid of patches."""

    def __init__(self, config: FITConfig) -> None:
        super().__init__()
        frames, height, width = config.grid
        self.factorised = config.position == "factorised"
        self.std = config.position_std
        if self.factorised:
            self.frame = nn.Parameter(torch.empty(frames, 1, config.patch_width))
            self.place = nn.Parameter(torch.empty(1, height * width, config.patch_width))
        else:
            self.table = nn.Parameter(torch.empty(frames * height * width, config.patch_width))

    def reset_parameters(self) -> None:
        parts = list(self.parameters())
        for part in parts:
            nn.init.normal_(part, std=self.std / math.sqrt(len(parts)))

    def forward(self) -> Tensor:
        """Return (t h w, P)."""
        return (self.frame + self.place).flatten(0, 1) if self.factorised else self.table


class FIT(Network):
    """FIT, with latents to carry on.

    Raises:
        ValueError: an input of another size, or text or latents of another width, than configured, or an upsampler without its
            low-resolution video.
    """

    def __init__(self, config: FITConfig) -> None:
        super().__init__()
        self.config = config
        width, cell = config.pixel_width, config.pixel_stride**2
        pixels = math.prod(config.patch) // cell
        inputs = config.channels * (2 if config.upsampler else 1) * cell
        self.conditioning = ConditioningTokens(
            config.text_width, config.conditioning_width, config.upsampler, config.text_standardised
        )
        # Without it no bound holds on what scales, multiplied with each other, make of a noise level that training never drew.
        self.embedding_norm = nn.RMSNorm(config.conditioning_width) if config.modulates else nn.Identity()
        self.text_pooling = TextPooling(config.conditioning_width) if config.text_modulation else None
        self.pixel_stem = PixelBlock(config, inputs, width) if width else None
        self.clip = ClipBlock(config, config.channels * (2 if config.upsampler else 1)) if config.clip_width else None
        self.stem = nn.Linear((width or inputs) * pixels, config.patch_width)
        self.position = PatchPosition(config)
        self.latents = nn.Parameter(torch.empty(config.latent_tokens, config.latent_width))
        self.self_conditioning = FeedForward(config.latent_width)
        self.self_conditioning_norm = LayerNorm(config.latent_width)
        self.blocks = nn.ModuleList(FITBlock(config) for _ in range(config.blocks))
        self.stem_modulation = Modulation(config.embedding_width, config.patch_width) if config.modulation else None
        self.head_norm = LayerNorm(config.patch_width) if config.head_norm else nn.Identity()
        self.head_modulation = Modulation(config.embedding_width, config.patch_width) if config.modulation else None
        self.head = nn.Linear(config.patch_width, (width or config.channels) * pixels)
        self.pixel_head = PixelBlock(config, 2 * width, config.channels * cell, 0.2) if width else None

    def reset_parameters(self) -> None:
        init_linear(self.stem)
        # Unit variance: the latents must differ from each other for their reads to differ.
        nn.init.normal_(self.latents)
        nn.init.zeros_(self.self_conditioning_norm.weight)
        # Not zero: LAMB's step is relative to a weight's norm, so a weight that starts at zero grows slowly.
        init_linear(self.head, gain=1.0 if self.config.pixel_width else 0.2)

    def adapt(self, weights: Mapping[str, Tensor], source: FITConfig) -> dict[str, Tensor]:
        """Input stem and positions from another FIT's (model/networks/fit/transfer.py)."""
        return transfer.adapt(weights, source, self.config)

    def forward(
        self, video: Tensor, conditioning: Conditioning, latents: Tensor | None = None, latents_only: bool = False
    ) -> NetworkOutput:
        """One evaluation; ``latents`` are (B, G M, Z)."""
        c = self.config
        check_inputs(video, conditioning, c)
        if latents is not None and tuple(latents.shape[1:]) != (c.latent_tokens, c.latent_width):
            built = (c.latent_tokens, c.latent_width)
            raise ValueError(f"latents: (tokens, width) is {tuple(latents.shape[1:])}, the network is built for {built}")
        tokens, mask = self.conditioning(conditioning)
        if conditioning.low_resolution is not None:
            video = torch.cat([video, conditioning.low_resolution.to(video.dtype)], dim=2)
        length = conditioning.text.shape[1]
        embedding = functional.silu(self.embedding_norm(tokens[:, length:].sum(dim=1)))
        if self.text_pooling:
            embedding = torch.cat([embedding, self.text_pooling(tokens[:, :length], mask[:, :length])], dim=1)
        painted, told = self.clip(video, embedding) if self.clip else (None, None)
        video = self._to_cells(video)
        if self.pixel_stem:
            video = self.pixel_stem(video, embedding)
        # Grouped while they are pixels: the stream of patches is many times as wide, and every copy of it counts.
        patches = self.stem(self._to_patches(video))
        patches = (patches.unflatten(0, (-1, c.groups)) + self._to_groups(self.position()[None])).flatten(0, 1)
        if told is not None:
            patches = patches + repeat(told, "b (nh h nw w) p -> (b nt nh nw) (t h w) p", **c.boxes)
        if self.stem_modulation:
            patches = self.stem_modulation(patches, embedding)

        previous = self.latents.new_zeros(len(video), *self.latents.shape) if latents is None else latents
        state = self.latents + self.self_conditioning_norm(self.self_conditioning(previous))
        for number, block in enumerate(self.blocks):
            write = not (latents_only and number == c.blocks - 1)
            patches, state = block(patches, state, tokens, mask, embedding, write)
        if latents_only:
            return NetworkOutput(None, state)
        patches = self.head_norm(patches)
        if self.head_modulation:
            patches = self.head_modulation(patches, embedding)
        output = self._to_video(self.head(patches))
        if self.pixel_head:
            output = self.pixel_head(torch.cat([output, video.to(output.dtype)], dim=-1), embedding)
        output = self._from_cells(output)
        return NetworkOutput(output if painted is None else output + painted, state)

    def _to_cells(self, video: Tensor) -> Tensor:
        s = self.config.pixel_stride
        return rearrange(video, "b t c (h sh) (w sw) -> b t h w (c sh sw)", sh=s, sw=s)

    def _from_cells(self, cells: Tensor) -> Tensor:
        s = self.config.pixel_stride
        return rearrange(cells, "b t h w (c sh sw) -> b t c (h sh) (w sw)", sh=s, sw=s)

    def _to_patches(self, video: Tensor) -> Tensor:
        pt, ph, pw = self.config.patch_cells
        axes = "b (nt t pt) (nh h ph) (nw w pw) c -> (b nt nh nw) (t h w) (pt ph pw c)"
        return rearrange(video, axes, pt=pt, ph=ph, pw=pw, **self.config.boxes)

    def _to_groups(self, patches: Tensor) -> Tensor:
        return rearrange(patches, "b (nt t nh h nw w) p -> (b nt nh nw) (t h w) p", **self.config.boxes)

    def _to_video(self, pixels: Tensor) -> Tensor:
        pt, ph, pw = self.config.patch_cells
        axes = "(b nt nh nw) (t h w) (pt ph pw c) -> b (nt t pt) (nh h ph) (nw w pw) c"
        return rearrange(pixels, axes, pt=pt, ph=ph, pw=pw, **self.config.boxes)
