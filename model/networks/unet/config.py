"""The U-Net's configuration: the columns of Table 7."""

from dataclasses import dataclass
from typing import ClassVar, Literal

NORM_GROUPS = 32  # of every group norm, as in ADM
# At least, as in EDM's code: a norm of one channel takes away how much of it a frame has, such as the background's colour.
CHANNELS_PER_GROUP = 4


@dataclass(frozen=True)
class UNetConfig:
    """ADM U-Net with temporal attention. Defaults are U-Net 284M's; sizes are (frames, height, width)."""

    carries_latents: ClassVar[bool] = False  # every evaluation starts anew: no self-conditioning

    kind: Literal["unet"] = "unet"
    size: tuple[int, int, int] = (16, 40, 64)  # the padded video
    channels: int = 3
    base_width: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)  # of the base width, by level; each level halves height and width
    residual_blocks: int = 2  # per level on the way down; one more on the way up
    # Levels with attention, by how much smaller they are: the 32, 16 and 8 of Table 7 are sides of its 64 pixels' width.
    attention_factors: tuple[int, ...] = (2, 4, 8)
    head_width: int = 64
    conditioning_width: int = 768
    text_width: int = 1024
    text_standardised: bool = False  # as FIT's: text states enter with their mean taken away and divided by their spread
    dropout: float = 0.1  # in residual blocks
    upsampler: Literal[False] = False  # the paper's U-Nets are of stage 1 alone
    checkpoint_blocks: bool = False  # recompute each block's activations in the backward pass

    def __post_init__(self) -> None:
        for axis, value in zip(("frames", "height", "width"), self.size, strict=True):
            if value < 1:
                raise ValueError(f"size: {axis} must be at least 1, got {value}")
        for name in ("channels", "base_width", "residual_blocks", "head_width", "conditioning_width", "text_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must name one factor of at least 1 for each level, got {list(self.multipliers)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.base_width % NORM_GROUPS:
            raise ValueError(f"base_width must be a multiple of {NORM_GROUPS}, the groups of its norms, got {self.base_width}")
        for axis, value in zip(("height", "width"), self.size[1:], strict=True):
            if value % self.factors[-1]:
                raise ValueError(f"size: {axis} {value} does not divide by {self.factors[-1]}, the factor of the last level")
        for factor in self.attention_factors:
            if factor not in self.factors:
                raise ValueError(
                    f"attention_factors: {factor} is no level's factor; they are {', '.join(map(str, self.factors))}"
                )
            width = self.widths[self.factors.index(factor)]
            if width % self.head_width:
                raise ValueError(f"head_width {self.head_width} does not divide the width {width} at attention factor {factor}")
        if self.attention_factors and self.conditioning_width % self.head_width:
            raise ValueError(f"head_width {self.head_width} does not divide the conditioning_width {self.conditioning_width}")

    @property
    def factors(self) -> tuple[int, ...]:
        """By how much each level is smaller than the video."""
        return tuple(2**level for level in range(len(self.multipliers)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(multiplier * self.base_width for multiplier in self.multipliers)

    @property
    def tokens(self) -> dict[str, int]:
        """The sizes of its sequences by name, for people to read: places of a frame by factor, and frames."""
        places = {f"spatial_{factor}": (self.size[1] // factor) * (self.size[2] // factor) for factor in self.attention_factors}
        return {**places, "temporal": self.size[0]}
