"""The U-Net: published sizes, its parts against other implementations, what must not matter and what must."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.networks import catalogue
from model.networks.conditioning import Conditioning
from model.networks.layers import reset_parameters
from model.networks.unet.config import UNetConfig
from model.networks.unet.network import ResidualBlock, SpatialAttention, TemporalAttention, UNet

# The columns of Table 7.
UNET_85M = UNetConfig(base_width=128, multipliers=(1, 2, 2, 3))
UNET_284M = UNetConfig()


def loud(module: nn.Module) -> Any:
    """In float64, with every parameter away from its neutral value and from zero."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5 if p.ndim == 1 else 1 / math.sqrt(p[0].numel()))
    return module.double()


def build(config: UNetConfig) -> UNet:
    network = loud(catalogue.build(config))
    assert isinstance(network, UNet)
    return network


def video(batch: int, config: UNetConfig) -> Tensor:
    frames, height, width = config.size
    return torch.randn(batch, frames, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def moved(after: Tensor, before: Tensor) -> Tensor:
    """(B,) how far each sample's video has moved."""
    return (after - before).abs().amax(dim=(1, 2, 3, 4))


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
def test_residual_blocks_are_adms(resample: Any, outputs: int) -> None:
    block = loud(ResidualBlock(32, outputs, 10, 0.0, resample))
    x, embedding = torch.randn(6, 32, 4, 6).double(), torch.randn(2, 10).double()

    def change(h: Tensor) -> Tensor:
        if resample == "halve":
            return h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))
        return functional.interpolate(h, scale_factor=2, mode="nearest") if resample else h

    def norm(h: Tensor, layer: nn.GroupNorm) -> Tensor:
        groups = h.unflatten(1, (32, -1))
        centred = groups - groups.mean(dim=(2, 3, 4), keepdim=True)
        h = (centred / (centred.square().mean(dim=(2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
        return h * layer.weight[:, None, None] + layer.bias[:, None, None]

    scale, shift = (embedding @ block.scale_shift.weight.T + block.scale_shift.bias).repeat_interleave(3, dim=0).chunk(2, dim=1)
    h = functional.conv2d(change(functional.silu(norm(x, block.input_norm))), block.input.weight, block.input.bias, padding=1)
    h = norm(h, block.output_norm) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    h = functional.conv2d(functional.silu(h), block.output.weight, block.output.bias, padding=1)
    short = change(x) if outputs == 32 else functional.conv2d(change(x), block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, embedding), short + h)


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


def test_spatial_attention_is_among_the_places_of_a_frame() -> None:
    layer, x = loud(SpatialAttention(64, 16)), torch.randn(6, 64, 2, 3).double()
    expected = reference_attention(layer, layer.norm(x).flatten(2).transpose(1, 2))
    torch.testing.assert_close(layer(x), expected.transpose(1, 2).reshape(x.shape))


def test_temporal_attention_is_among_the_frames_at_a_place() -> None:
    layer, x = loud(TemporalAttention(64, 16, frames=4)), torch.randn(8, 64, 2, 3).double()
    normed, attended = layer.norm(x).unflatten(0, (2, 4)), layer(x).unflatten(0, (2, 4))
    for row in range(2):
        for column in range(3):
            expected = reference_attention(layer, normed[..., row, column] + layer.position[:, 0])
            torch.testing.assert_close(attended[..., row, column], expected)


def test_frames_mix_only_through_temporal_attention(tiny_unet, conditioning) -> None:
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


def test_frames_are_told_apart_by_their_positions(tiny_unet, conditioning) -> None:
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


def test_padding_in_text_does_not_matter(tiny_unet, conditioning) -> None:
    network, clip, told = build(tiny_unet), video(4, tiny_unet), conditioning(4, torch.float64)
    before = network(clip, told).video
    garbage = torch.where(told.text_mask[..., None], told.text, 1e3 * torch.randn(4, 5, 6, dtype=torch.float64))
    longer = replace(
        told,
        text=torch.cat([garbage, torch.full((4, 7, 6), 50.0, dtype=torch.float64)], dim=1),
        text_mask=torch.cat([told.text_mask, torch.zeros(4, 7, dtype=torch.bool)], dim=1),
    )
    for other in (replace(told, text=garbage), longer):
        torch.testing.assert_close(network(clip, other).video, before, rtol=0, atol=1e-11)
    seen = told.text_mask.clone()
    seen[0, 3] = True  # one token more that counts does matter, to its own sample
    assert (moved(network(clip, replace(told, text_mask=seen)).video, before) > 1e-6).tolist() == [True, False, False, False]


def test_dropped_text_is_the_learned_null_whatever_the_text(tiny_unet, conditioning) -> None:
    network, clip, told = build(tiny_unet), video(4, tiny_unet), conditioning(4, torch.float64)
    dropped = network(clip, told.without_text()).video
    other = replace(told, text=torch.randn(4, 5, 6).double(), text_mask=torch.ones(4, 5, dtype=torch.bool))
    torch.testing.assert_close(network(clip, other.without_text()).video, dropped, rtol=0, atol=1e-11)
    assert moved(network(clip, told).video, dropped).min() > 1e-6
    with torch.no_grad():
        nn.init.normal_(network.conditioning.null_text)
    assert moved(network(clip, told.without_text()).video, dropped).min() > 1e-6


def test_every_scalar_is_heard(tiny_unet, conditioning) -> None:
    network, clip = build(tiny_unet), video(1, tiny_unet).expand(6, -1, -1, -1, -1)
    one = {name: value for name, value in vars(conditioning(1, torch.float64)).items() if value is not None}
    told = {name: value.repeat(6, *[1] * (value.ndim - 1)) for name, value in one.items()}
    told["c_noise"][1] = 0.7
    told["frame_rate"][2] = math.inf  # an image
    told["frame_rate"][3] = 12.0
    told["resolution"][4, 0] = 720.0
    told["resolution"][5, 1] = 1280.0
    output = network(clip, Conditioning(**told)).video
    assert output.isfinite().all()
    for a in range(6):
        for b in range(a):
            assert (output[a] - output[b]).abs().max() > 1e-6, (a, b)


def test_samples_of_a_batch_do_not_see_each_other(tiny_unet, conditioning) -> None:
    network, clip, told = build(tiny_unet), video(4, tiny_unet), conditioning(4, torch.float64)
    whole = network(clip, told).video
    for row in range(4):
        one = slice(row, row + 1)
        alone = Conditioning(**{name: None if value is None else value[one] for name, value in vars(told).items()})
        torch.testing.assert_close(network(clip[one], alone).video, whole[one], rtol=0, atol=1e-11)


def test_every_parameter_gets_a_gradient(tiny_unet, conditioning) -> None:
    network = build(tiny_unet)
    told = conditioning(4, torch.float64).without_text(torch.tensor([True, False, False, False]))
    network(video(4, tiny_unet), told).video.square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_every_parameter_is_initialised_and_the_start_is_silent(tiny_unet, conditioning) -> None:
    network = catalogue.build(tiny_unet)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(math.nan)
    reset_parameters(network)
    assert all(p.isfinite().all() for p in network.parameters())
    # As ADM: the head and the end of every residual branch start at zero.
    zeros = {name.rsplit(".", 1)[0] for name, p in network.named_parameters() if p.ndim > 1 and not p.any()}
    assert zeros == {name for name, _ in network.named_modules() if name.endswith("output") and "conditioning" not in name} | {
        "head"
    }
    assert not network(video(2, tiny_unet).float(), conditioning(2)).video.any()


def test_checkpointed_blocks_give_the_same_gradients(tiny_unet, conditioning) -> None:
    config = replace(tiny_unet, dropout=0.3)
    gradients, calls = [], []
    for checkpoint in (False, True):
        network = build(replace(config, checkpoint_blocks=checkpoint))
        count: list[int] = []
        network.down[0].residual.input.register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)
        network(video(2, config), conditioning(2, torch.float64)).video.square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
        calls.append(len(count))
    assert calls == [1, 2]  # once more in the backward pass
    torch.testing.assert_close(*gradients)


TWO_LEVELS: dict[str, Any] = {"multipliers": (1, 2), "attention_factors": (2,)}  # less to compile


def test_it_compiles_whole(tiny_unet, conditioning) -> None:
    """Without a graph break, not even for recomputation; what the compiler is told must give the same."""
    config = replace(tiny_unet, **TWO_LEVELS, checkpoint_blocks=True)
    network, told, clip = build(config), conditioning(2, torch.float64), video(2, config)
    torch._dynamo.reset()
    gradients = []
    for forward in (torch.compile(network, fullgraph=True, backend="aot_eager"), network):
        network.zero_grad()
        forward(clip, told).video.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_compiled_blocks_give_the_same(tiny_unet, conditioning) -> None:
    config = replace(tiny_unet, **TWO_LEVELS)
    network, told, clip = build(config), conditioning(2, torch.float64), video(2, config)
    names, expected = list(network.state_dict()), network(clip, told).video
    torch._dynamo.reset()
    network.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(network(clip, told).video, expected)
    with torch.no_grad():
        torch.testing.assert_close(network(clip, told).video, expected)
    assert list(network.state_dict()) == names


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


def test_inputs_of_another_shape_are_named(tiny_unet, conditioning) -> None:
    network, clip, told = build(tiny_unet), video(2, tiny_unet), conditioning(2, torch.float64)
    with pytest.raises(ValueError, match=r"^video: \(T, C, H, W\) is \(4, 3, 8, 10\), the network is built for \(4, 3, 8, 12\)"):
        network(clip[..., :10], told)
    with pytest.raises(ValueError, match="^text: width is 5, the network is built for 6"):
        network(clip, replace(told, text=told.text[..., :5]))
    with pytest.raises(ValueError, match="^low_resolution: "):
        network(clip, replace(told, low_resolution=clip))
    with pytest.raises(ValueError, match="^latents: "):
        network(clip, told, torch.zeros(2, 8, 24))
    with pytest.raises(ValueError, match="^latents: "):
        network(clip, told, latents_only=True)


def test_each_block_is_sharded_on_its_own(tiny_unet) -> None:
    network = build(tiny_unet)
    units = [name for name, module in network.named_modules() if network.fsdp_wrap_fn(module)]
    blocks = [("down", 5), ("middle", 2), ("up", 8)]
    assert units == [f"{part}.{i}" for part, count in blocks for i in range(count)]
