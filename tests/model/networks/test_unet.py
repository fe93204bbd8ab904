"""The U-Net: published sizes, its parts against other implementations, what must not matter and what must."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.networks import catalogue
from model.networks.unet.config import UNetConfig
from model.networks.unet.network import GroupNorm, ResidualBlock, SpatialAttention, TemporalAttention

# The columns of Table 7.
UNET_85M = UNetConfig(base_width=128, multipliers=(1, 2, 2, 3))
UNET_284M = UNetConfig()


def expected_parameters(widths: tuple[int, ...], conditioning: int, text: int, frames: int) -> int:
    """Counted from the description, level by level: two residual blocks down, three up, attention at all levels but the first."""
    e, top = conditioning, len(widths) - 1

    def convolution(inputs: int, outputs: int, side: int) -> int:
        return side * side * inputs * outputs + outputs

    def residual(inputs: int, outputs: int) -> int:
        norms = 2 * inputs + 2 * outputs
        skip = convolution(inputs, outputs, 1) if inputs != outputs else 0
        return norms + convolution(inputs, outputs, 3) + (e + 1) * 2 * outputs + convolution(outputs, outputs, 3) + skip

    def attention(c: int) -> int:
        within = 2 * c + (c + 1) * 3 * c + (c + 1) * c
        inner = min(c, e)
        to_text = 2 * c + 2 * e + c * inner + e * 2 * inner + inner * c
        return 2 * within + frames * c + to_text

    total = convolution(3, widths[0], 3) + 2 * widths[0] + convolution(widths[0], 3, 3)
    total += 2 * residual(widths[top], widths[top]) + attention(widths[top])
    for level, c in enumerate(widths):
        above, below = widths[max(level - 1, 0)], widths[min(level + 1, top)]
        total += residual(above, c) + residual(c, c)  # down
        # Up: from below, each block also reads what the way down left: two results of this level and the one it started from.
        total += residual(below + c, c) + residual(c + c, c) + residual(c + above, c)
        total += 5 * attention(c) if level > 0 else 0
        total += residual(above, above) + residual(c, c) if level > 0 else 0  # halving and doubling
    scalar = (128 * e + e) + (e * e + e)
    return total + text * e + e + 2 * e + 4 * scalar


@pytest.mark.parametrize(
    ("config", "widths", "published"),
    [(UNET_85M, (128, 256, 256, 384), 85e6), (UNET_284M, (192, 384, 576, 768), 284e6)],
    ids=["85M", "284M"],
)
def test_published_sizes(config: UNetConfig, widths: tuple[int, ...], published: float) -> None:
    parameters = sum(p.numel() for p in catalogue.build(config, "meta").parameters())
    assert parameters == expected_parameters(widths, 768, 1024, 16)
    assert parameters == pytest.approx(published, rel=0.03)
    assert config.tokens == {"spatial_2": 20 * 32, "spatial_4": 10 * 16, "spatial_8": 5 * 8, "temporal": 16}


@pytest.mark.parametrize("resample", [None, "halve", "double"])
@pytest.mark.parametrize("outputs", [32, 64])
def test_residual_blocks_are_adms(loud, resample: Any, outputs: int) -> None:
    block = loud(ResidualBlock(32, outputs, 10, 0.0, resample))
    x, embedding = torch.randn(6, 32, 4, 6).double(), torch.randn(2, 10).double()

    def change(h: Tensor) -> Tensor:
        if resample == "halve":
            return h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
        return functional.interpolate(h, scale_factor=2, mode="nearest") if resample else h

    def norm(h: Tensor, layer: nn.GroupNorm) -> Tensor:
        groups = h.unflatten(1, (h.shape[1] // 4, -1))
        centred = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
        h = (centred / (centred.square().mean(dim=(2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
        return h * layer.weight[:, None, None] + layer.bias[:, None, None]

    scale, shift = (embedding @ block.scale_shift.weight.T + block.scale_shift.bias).repeat_interleave(3, dim=0).chunk(2, dim=1)
    h = functional.conv2d(change(functional.silu(norm(x, block.input_norm))), block.input.weight, block.input.bias, padding=1)
    h = norm(h, block.output_norm) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    h = functional.conv2d(functional.silu(h), block.output.weight, block.output.bias, padding=1)
    short = change(x) if outputs == 32 else functional.conv2d(change(x), block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, embedding), short + h)


def test_norms_have_32_groups_of_four_channels_and_more() -> None:
    for width, groups in {32: 8, 96: 24, 128: 32, 160: 32, 768: 32}.items():
        assert GroupNorm(width).num_groups == groups


def reference_attention(layer: SpatialAttention | TemporalAttention, tokens: Tensor) -> Tensor:
    """(N, M, C) -> the same, by torch's own module."""
    width = tokens.shape[-1]
    reference = nn.MultiheadAttention(width, width // layer.head_width, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        reference.in_proj_weight.copy_(layer.query_key_value.weight)
        reference.in_proj_bias.copy_(layer.query_key_value.bias)
        reference.out_proj.weight.copy_(layer.output.weight)
        reference.out_proj.bias.copy_(layer.output.bias)
    return reference(tokens, tokens, tokens)[0]


def test_spatial_attention_is_among_the_places_of_a_frame(loud) -> None:
    layer, x = loud(SpatialAttention(64, 16)), torch.randn(6, 64, 2, 3).double()
    expected = reference_attention(layer, layer.norm(x).flatten(2).transpose(1, 2))
    torch.testing.assert_close(layer(x), expected.transpose(1, 2).reshape(x.shape))


def test_temporal_attention_is_among_the_frames_at_a_place(loud) -> None:
    layer, x = loud(TemporalAttention(64, 16, frames=4)), torch.randn(8, 64, 2, 3).double()
    normed, attended = layer.norm(x).unflatten(0, (2, 4)), layer(x).unflatten(0, (2, 4))
    for row in range(2):
        for column in range(3):
            expected = reference_attention(layer, normed[..., row, column] + layer.position[:, 0])
            torch.testing.assert_close(attended[..., row, column], expected)


def test_frames_mix_only_through_temporal_attention(tiny_unet, build, video, conditioning) -> None:
    network, clip, told = build(tiny_unet), video(1, tiny_unet), conditioning(1, torch.float64)
    other = clip.clone()
    other[0, 2, 1, 5, 3] += 1

    def frames_that_move() -> list[bool]:
        difference = network(other, told).video - network(clip, told).video
        return (difference.abs().amax(dim=(0, 2, 3, 4)) > 1e-9).tolist()

    assert frames_that_move() == [True] * 4
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, TemporalAttention):
                module.output.weight.zero_()
                module.output.bias.zero_()
    assert frames_that_move() == [False, False, True, False]


def test_frames_are_told_apart_by_their_positions(tiny_unet, build, video, conditioning) -> None:
    network, told = build(tiny_unet), conditioning(1, torch.float64)
    still = video(1, tiny_unet)[:, :1].expand(-1, 4, -1, -1, -1)
    output = network(still, told).video
    assert (output[:, 1:] - output[:, :1]).abs().amax() > 1e-6
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, TemporalAttention):
                module.position.zero_()
    output = network(still, told).video
    torch.testing.assert_close(output, output[:, :1].expand_as(output), rtol=0, atol=1e-11)


def test_the_start_is_silent(tiny_unet, video, conditioning) -> None:
    """As ADM: the head and the end of every residual branch start at zero."""
    network = catalogue.build(tiny_unet)
    zeros = {name.rsplit(".", 1)[0] for name, p in network.named_parameters() if p.ndim > 1 and not p.any()}
    assert zeros == {name for name, _ in network.named_modules() if name.endswith("output") and "conditioning" not in name} | {
        "head"
    }
    assert not network(video(2, tiny_unet).float(), conditioning(2)).video.any()


TWO_LEVELS: dict[str, Any] = {"multipliers": (1, 2), "attention_factors": (2,)}  # less to compile


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (4, 10, 12)}, "^size: height 10 does not divide by 4, the factor of the last level"),
        ({"size": (4, 8, 14)}, "^size: width 14 does not divide by 4"),
        ({"size": (0, 8, 12)}, "^size: frames must be at least 1, got 0"),
        ({"base_width": 48}, "^base_width must be a multiple of 32, the groups of its norms, got 48"),
        ({"base_width": 0}, "^base_width must be at least 1, got 0"),
        ({"residual_blocks": 0}, "^residual_blocks must be at least 1, got 0"),
        ({"multipliers": ()}, r"^multipliers must name one factor of at least 1 for each level, got \[\]"),
        ({"multipliers": (1, 0, 2)}, r"^multipliers must .* got \[1, 0, 2\]"),
        ({"attention_factors": (2, 8)}, "^attention_factors: 8 is no level's factor; they are 1, 2, 4"),
        ({"head_width": 24}, "^head_width 24 does not divide the width 128 at attention factor 2"),
        ({"conditioning_width": 40}, "^head_width 16 does not divide the conditioning_width 40"),
        ({"dropout": 1.0}, "^dropout must be in"),
    ],
)
def test_impossible_shapes_are_named(tiny_unet, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny_unet, **changes)


def test_it_has_no_latents_to_give(tiny_unet, build, video, conditioning) -> None:
    with pytest.raises(ValueError, match="^latents: "):
        build(tiny_unet)(video(2, tiny_unet), conditioning(2, torch.float64), latents_only=True)


def test_each_block_is_sharded_on_its_own(tiny_unet, build) -> None:
    network = build(tiny_unet)
    units = [name for name, module in network.named_modules() if network.fsdp_wrap_fn(module)]
    blocks = [("down", 5), ("middle", 2), ("up", 8)]
    assert units == [f"{part}.{i}" for part, count in blocks for i in range(count)]
