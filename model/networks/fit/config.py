"""FIT's configuration: the columns of Table 8."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

CLIP_STRIDE = 2  # pixels of a side of the squares that the convolutions over whole clips see as one place


@dataclass(frozen=True)
class FITConfig:
    """Far-reaching Interleaved Transformer. Defaults are FIT 500M's; sizes are (frames, height, width)."""

    carries_latents: ClassVar[bool] = True  # from one evaluation to the next: self-conditioning

    kind: Literal["fit"] = "fit"
    size: tuple[int, int, int] = (16, 40, 64)  # the padded video
    patch: tuple[int, int, int] = (1, 4, 4)  # pixels per patch
    group: tuple[int, int, int] = (16, 5, 4)  # patches per group (the paper writes sizes T x W x H but groups T x H x W)
    channels: int = 3
    patch_width: int = 768
    latent_tokens: int = 512
    latent_width: int = 1024
    blocks: int = 6
    global_layers: int = 4  # per block
    patch_head_width: int = 48
    latent_head_width: int = 64
    conditioning_width: int = 768
    text_width: int = 1024
    dropout: float = 0.1  # in feed-forwards after self-attention only (appendix B)
    # A full table has a vector per patch; a factorised one adds a frame's and a place's. Full at stage 2 would be 151 M
    # parameters over the published 3.9 B, factorised 10 M.
    position: Literal["full", "factorised"] = "full"
    # Spread of the positions at the start, beside patches of unit variance. At the usual 0.02 neither reads nor writes can tell
    # places apart at first; at 1 they drown patches that fill a narrow stream (docs/learning-before.md).
    position_std: float = 1.0
    # Normalise patches before the head. It takes their contrast away, which a wide stream keeps in other channels; in a narrow
    # one the head is better without (docs/learning-before.md).
    head_norm: bool = True
    # Beyond the paper, whose patches hear the noise level from the latents alone and meet each other only there: small networks
    # learn several times as fast with these (model/networks/fit/beyond.py, docs/learning.md).
    modulation: bool = False  # the scalars scale and shift the patches
    text_modulation: bool = False  # the text, pooled, is among what modulates
    text_standardised: bool = False  # text states enter with their mean taken away and divided by their spread
    convolution: bool = False  # over neighbouring patches, after each write
    pixel_width: int = 0  # channels of convolutions over pixels before the patches and after them; 0: none
    pixel_frames: int = 3  # that these convolutions span; 1 costs a third, where details are no matter of motion
    pixel_stride: int = 1  # squares of so many pixels, side by side in the channels, are what they see as one pixel
    clip_width: int = 0  # channels of convolutions over places that see all frames at once, beside FIT; 0: none
    cpu_bf16: bool = False  # on a CPU that has instructions for it, both kinds compute in bfloat16: half the time
    upsampler: bool = False  # reads a low-resolution video, concatenated to its input's channels
    checkpoint_blocks: bool = False  # recompute each block's activations in the backward pass

    def __post_init__(self) -> None:
        for name in ("size", "patch", "group"):
            for axis, value in zip(("frames", "height", "width"), getattr(self, name), strict=True):
                if value < 1:
                    raise ValueError(f"{name}: {axis} must be at least 1, got {value}")
        for name in (
            "channels", "patch_width", "latent_tokens", "latent_width", "blocks", "patch_head_width", "latent_head_width",
            "conditioning_width", "text_width",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.position_std > 0 and math.isfinite(self.position_std)):
            raise ValueError(f"position_std must be positive and finite, got {self.position_std}")
        for name in ("global_layers", "pixel_width", "clip_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.pixel_frames < 1 or not self.pixel_frames % 2:
            raise ValueError(f"pixel_frames must be odd and at least 1, got {self.pixel_frames}")
        if self.pixel_stride < 1 or any(side % self.pixel_stride for side in self.patch[1:]):
            raise ValueError(f"pixel_stride must divide the patch's {self.patch[1]}x{self.patch[2]}, got {self.pixel_stride}")
        if self.pixel_stride > 1 and not self.pixel_width:
            raise ValueError("pixel_stride is of convolutions over pixels: it needs a pixel_width")
        if self.clip_width and (any(side % CLIP_STRIDE for side in self.patch[1:]) or self.patch[0] > 1):
            raise ValueError(f"clip_width needs patches of one frame and even sides, got {list(self.patch)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for axis, size, patch, group in zip(("frames", "height", "width"), self.size, self.patch, self.group, strict=True):
            if size % patch:
                raise ValueError(f"size: {axis} {size} does not divide into patches of {patch}")
            if (size // patch) % group:
                raise ValueError(f"group: {axis} {size} has {size // patch} patches, which do not divide into groups of {group}")
        if self.text_modulation and not self.modulates:
            raise ValueError("text_modulation needs something to modulate: modulation, a pixel_width, or a clip_width")
        if self.latent_tokens % self.groups:
            raise ValueError(f"latent_tokens {self.latent_tokens} do not divide among {self.groups} groups")
        for name, inner, head in (
            ("patch_head_width", min(self.patch_width, self.latent_width), self.patch_head_width),
            ("latent_head_width", self.latent_width, self.latent_head_width),
            ("latent_head_width", min(self.conditioning_width, self.latent_width), self.latent_head_width),
        ):
            if inner % head:
                raise ValueError(f"{name} {head} does not divide the attention's inner width {inner}")

    @property
    def modulates(self) -> bool:
        """Whether anything is modulated."""
        return bool(self.modulation or self.pixel_width or self.clip_width)

    @property
    def embedding_width(self) -> int:
        """Width of what modulates: the scalars, and the text beside them."""
        return self.conditioning_width * (2 if self.text_modulation else 1)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along (frames, height, width)."""
        return (self.size[0] // self.patch[0], self.size[1] // self.patch[1], self.size[2] // self.patch[2])

    @property
    def patch_cells(self) -> tuple[int, int, int]:
        """The patch (frames, height, width) in what the convolutions over pixels see as one pixel."""
        return (self.patch[0], self.patch[1] // self.pixel_stride, self.patch[2] // self.pixel_stride)

    @property
    def boxes(self) -> dict[str, int]:
        """Groups along each axis of the grid and patches of a group along it, as the einops patterns name them."""
        numbers = [patches // group for patches, group in zip(self.grid, self.group, strict=True)]
        return dict(zip(("nt", "nh", "nw", "t", "h", "w"), (*numbers, *self.group), strict=True))

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.patch_tokens // (self.group[0] * self.group[1] * self.group[2])

    @property
    def patch_tokens(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> dict[str, int]:
        """The sizes of its sequences by name, for people to read."""
        return {"patch": self.patch_tokens, "latent": self.latent_tokens, "groups": self.groups}
