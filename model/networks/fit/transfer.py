"""Start a FIT from the weights of another: what can be adapted where shapes differ. Imports torch and einops alone.

The paper starts stage 2 from stage 1's weights and says no more. Input stem and positions are what differs: the upsampler's stem
reads the low-resolution video too, and its grid of patches is larger. Both adaptations keep what stage 1 computes where that is
defined: the stem ignores the added channels at first, and the positions are stage 1's, stretched over the larger grid.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from model.networks.fit.config import FITConfig

STEM, TABLE, FRAME, PLACE = "stem.weight", "position.table", "position.frame", "position.place"


def adapt(weights: Mapping[str, Tensor], source: FITConfig, config: FITConfig) -> dict[str, Tensor]:
    """Weights for a FIT of ``config`` made from those of a FIT of ``source``, by name; only what has to change its shape.

    Args:
        weights: of the source, by name within the network.
        source: the source's configuration.
        config: the configuration of the network to start.
    """
    if source.patch_width != config.patch_width:
        return {}
    adapted = {}
    alike = source.patch == config.patch and source.channels == config.channels and source.pixel_width == config.pixel_width == 0
    if alike and source.upsampler < config.upsampler:
        adapted[STEM] = _widen(weights[STEM], config.channels)
    if source.grid != config.grid or source.position != config.position:
        table = weights[TABLE] if TABLE in weights else weights[FRAME] + weights[PLACE]
        stretched = _stretch(table.reshape(*source.grid, source.patch_width), config.grid)
        adapted |= _factorise(stretched) if config.position == "factorised" else {TABLE: stretched.flatten(0, 2)}
    return adapted


def _widen(stem: Tensor, channels: int) -> Tensor:
    """(P, pixels C) -> (P, pixels 2C): zeros where the low-resolution video comes in, which stands behind the noisy one."""
    stem = rearrange(stem, "p (pixel c) -> p pixel c", c=channels)
    return torch.cat([stem, torch.zeros_like(stem)], dim=2).flatten(1)


def _stretch(table: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(t, h, w, P) -> (*grid, P), linearly interpolated."""
    if table.shape[:3] == grid:
        return table
    volume = rearrange(table, "t h w p -> 1 p t h w")
    return rearrange(functional.interpolate(volume, grid, mode="trilinear", align_corners=False), "1 p t h w -> t h w p")


def _factorise(table: Tensor) -> dict[str, Tensor]:
    """The frames' and the places' vectors whose sums come closest to a table (t, h, w, P), at the table's mean square.

    The sums alone would be too faint beside the patches: what a table says of a frame and a place together has no room in them.
    """
    table = table.flatten(1, 2)
    frame = table.mean(dim=1, keepdim=True) - table.mean(dim=(0, 1), keepdim=True)
    place = table.mean(dim=0, keepdim=True)
    scale = (table.square().mean() / (frame + place).square().mean()).sqrt()
    return {FRAME: scale * frame, PLACE: scale * place}
