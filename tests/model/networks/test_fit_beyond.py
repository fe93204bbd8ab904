"""What FIT has beyond the paper's: convolutions and modulations, against their definitions and by what reaches what."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from model.networks import layers
from model.networks.fit.beyond import ClipBlock, Modulation, PatchConvolution, PixelBlock


@pytest.mark.parametrize("group", [(4, 2, 3), (2, 4, 3)])
def test_a_convolution_is_over_the_grid_of_patches_whatever_the_groups(build_fit, tiny, group: tuple[int, int, int]) -> None:
    config = replace(tiny, group=group)
    network, layer = build_fit(config), PatchConvolution(config, gain=0.5).double()
    layer.reset_parameters()
    assert float(layer.convolution.weight.detach().std()) == pytest.approx(0.5 / math.sqrt(27), rel=0.1)
    nn.init.normal_(layer.convolution.bias)
    patches = torch.randn(2, config.patch_tokens, config.patch_width, dtype=torch.float64)
    expected = torch.empty_like(patches)
    frames, rows, columns = config.grid
    for channel in range(config.patch_width):
        grid = patches[..., channel].reshape(2, frames, rows, columns).cpu().numpy()
        kernel = layer.convolution.weight[channel, 0].detach().cpu().numpy()
        found = np.stack([ndimage.correlate(one, kernel, mode="constant") for one in grid])
        expected[..., channel] = torch.from_numpy(found).flatten(1).to(expected) + layer.convolution.bias[channel].detach()
    torch.testing.assert_close(layer(network._to_groups(patches)), network._to_groups(expected))


def test_with_convolutions_neighbours_meet_without_latents(build_fit, tiny, video, conditioning) -> None:
    config = replace(tiny, global_layers=0, convolution=True, blocks=2)
    network, clip, told = build_fit(config), video(1, config), conditioning(1)
    changed = clip.clone()
    changed[0, 2, 1, 5, 3] += 1  # in row 2, column 1 of the patches, in a group of rows 2 and 3, columns 0 to 2
    moved = (network(changed, told).video - network(clip, told).video).abs() > 1e-9
    outside = moved.amax(dim=(0, 1, 2))
    assert outside[2:4].any()  # row 1, in the group above
    assert outside[:, 6:8].any()  # column 3, in the group to the right


def test_a_pixel_block_is_two_convolutions_beside_a_1x1_one(tiny) -> None:
    config = replace(tiny, pixel_width=6, modulation=True)
    block, video, embedding = PixelBlock(config, 5, 2), torch.randn(2, 4, 8, 12, 5), torch.randn(2, config.embedding_width)
    block.apply(lambda module: module.reset_parameters() if isinstance(module, (PixelBlock, Modulation)) else None)
    block.double()

    def modulated(layer: Modulation, x: Tensor) -> Tensor:  # x (B, C, T, H, W)
        scale, shift = layer.scale_shift(embedding.double())[..., None, None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift

    x = modulated(block.input_modulation, video.double().permute(0, 4, 1, 2, 3))
    expected = block.skip(x) + block.output(modulated(block.modulation, functional.silu(block.input(x))))
    torch.testing.assert_close(block(video.double(), embedding.double()), expected.permute(0, 2, 3, 4, 1))


@pytest.mark.parametrize(("frames", "stride"), [(3, 1), (1, 1), (1, 2)])
def test_pixels_pass_beside_the_stream_within_their_neighbourhood(
    build_fit, tiny, video, conditioning, frames: int, stride: int
) -> None:
    config = replace(tiny, pixel_width=6, pixel_frames=frames, pixel_stride=stride)
    network, clip, told = build_fit(config), video(1, tiny), conditioning(1)
    with torch.no_grad():
        network.head.weight.zero_()
    changed = clip.clone()
    changed[0, 2, 1, 3, 5] += 1
    moved = ((network(changed, told).video - network(clip, told).video).abs() > 1e-9).any(dim=2)[0]
    near = torch.zeros(4, 8, 12, dtype=torch.bool)
    reached = slice(None) if frames == 3 else slice(2, 3)  # four convolutions of three frames reach all four
    near[reached, :8, 1:10] = True
    if stride == 2:
        near[reached] = True  # four convolutions reach four squares of 2x2 pixels to either side
    assert torch.equal(moved, near)


def test_squares_of_pixels_come_back_as_they_were(build_fit, tiny, video) -> None:
    network, clip = build_fit(replace(tiny, pixel_width=6, pixel_stride=2)), video(2, tiny)
    cells = network._to_cells(clip)
    assert cells.shape == (2, 4, 4, 6, 12)
    torch.testing.assert_close(cells[1, 3, 2, 1, 4:8], clip[1, 3, 1, 4:6, 2:4].flatten(), rtol=0, atol=0)
    assert torch.equal(network._from_cells(cells), clip)


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4)])
def test_a_clip_block_is_three_convolutions_of_squares_with_all_frames_as_channels(tiny, patch: tuple[int, int, int]) -> None:
    config = replace(tiny, clip_width=6, modulation=True, patch=patch, group=(4, 2, 3))
    block, video, embedding = ClipBlock(config, 6), torch.randn(2, 4, 6, 8, 12), torch.randn(2, config.embedding_width)
    layers.reset_parameters(block)
    block.double()

    def modulated(layer: Modulation, x: Tensor) -> Tensor:  # x (B, C, H, W)
        scale, shift = layer.scale_shift(embedding.double())[..., None, None].chunk(2, dim=1)
        return functional.silu(x * (1 + scale) + shift)

    first = modulated(block.input_modulation, block.input(functional.pixel_unshuffle(video.double().flatten(1, 2), 2)))
    second = modulated(block.middle_modulation, first + block.middle(first))
    painted, told = block(video.double(), embedding.double())
    torch.testing.assert_close(painted, functional.pixel_shuffle(block.output(second), 2).unflatten(1, (4, 3)))
    side = patch[1] // 2
    for row, column in ((0, 0), (1, 2)):  # of the patches
        squares = second[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side]
        expected = block.patches(squares.permute(0, 2, 3, 1).flatten(1))
        torch.testing.assert_close(told.unflatten(1, config.grid[1:])[:, row, column], expected)


@pytest.mark.parametrize("group", [(4, 2, 3), (2, 4, 3), (1, 1, 6)])
def test_what_a_clip_block_tells_reaches_the_patches_of_its_place_in_all_frames(
    build_fit, tiny, video, conditioning, group
) -> None:
    """Patches are in groups by then: what is told must be as well, whichever the groups are."""
    network, clip = build_fit(replace(tiny, clip_width=6, group=group, latent_tokens=48)), video(2, tiny)
    with torch.no_grad():
        network.stem.weight.zero_()
        network.stem.bias.zero_()
        for part in network.position.parameters():
            part.zero_()
        seen: list[torch.Tensor] = []
        told: list[torch.Tensor] = []
        network.clip.register_forward_hook(lambda module, inputs, output: told.append(output[1]))
        network.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        network(clip, conditioning(2))
    frames, height, width = network.config.grid
    everywhere = told[0].unflatten(1, (1, height, width)).expand(-1, frames, -1, -1, -1).flatten(1, 3)  # in reading order
    assert torch.equal(seen[0], network._to_groups(everywhere))


def test_a_clip_block_carries_what_one_frame_shows_to_the_others(build_fit, tiny, video, conditioning) -> None:
    network, clip, told = build_fit(replace(tiny, clip_width=6)), video(1, tiny), conditioning(1)
    with torch.no_grad():
        network.head.weight.zero_()
    changed = clip.clone()
    changed[0, 3] += 1
    moved = (network(changed, told).video - network(clip, told).video).abs().amax(dim=(0, 2, 3, 4))
    assert (moved > 1e-6).all() and len(moved) == 4


@pytest.mark.cpu_only
def test_convolutions_in_bfloat16_give_nearly_the_same_and_leave_the_rest_in_float32(
    build_fit, tiny, video, conditioning
) -> None:
    config = replace(tiny, pixel_width=6, clip_width=6)
    network, lowered = build_fit(config).float(), build_fit(replace(config, cpu_bf16=True)).float()
    lowered.load_state_dict(network.state_dict())
    clip, told = video(2, tiny).float(), conditioning(2)
    for one in (network, lowered):
        one(clip, told).video.square().mean().backward()
    given, expected = lowered(clip, told).video, network(clip, told).video
    assert given.dtype == torch.float32
    assert torch.equal(given, expected) != torch.cpu._is_avx512_bf16_supported()
    torch.testing.assert_close(given, expected, rtol=0, atol=0.02 * float(expected.std()))
    for (name, weight), other in zip(network.named_parameters(), lowered.parameters(), strict=True):
        assert (weight.grad is None) == (other.grad is None), name
        if weight.grad is not None and other.grad is not None:
            assert other.grad.dtype == torch.float32
            assert float((other.grad - weight.grad).norm()) <= 0.05 * float(weight.grad.norm()), name


@pytest.mark.parametrize(("modulation", "text_modulation"), [(False, False), (True, False), (True, True)])
def test_with_modulation_patches_hear_the_scalars_and_the_text_without_latents(
    build_fit, tiny, video, conditioning, modulation: bool, text_modulation: bool
) -> None:
    config = replace(tiny, modulation=modulation, text_modulation=text_modulation)
    network, clip, told = build_fit(config), video(1, tiny), conditioning(1)
    with torch.no_grad():
        for block in network.blocks:
            block.write.output.weight.zero_()
    other = replace(told, text=torch.randn_like(told.text), text_mask=torch.ones_like(told.text_mask))
    before = network(clip, told).video
    assert torch.equal(network(clip, other).video, before) != text_modulation
    louder = network(clip, replace(told, c_noise=told.c_noise + 1)).video
    assert bool((louder - before).abs().max() > 1e-6) == modulation
