"""FIT: published sizes, locality, what must not matter and what must."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.networks import catalogue
from model.networks.conditioning import Conditioning
from model.networks.fit.config import FITConfig

# The columns of Table 8. The padded heights and the groups' order (T x H x W) are as the specification reads them.
FIT_500M = FITConfig()
FIT_3900M = FITConfig(
    patch_width=1024, latent_tokens=768, latent_width=3072, patch_head_width=64, latent_head_width=128, conditioning_width=1024
)
FIT_3900M_UP = replace(FIT_3900M, size=(16, 288, 512), group=(16, 18, 16), position="factorised", upsampler=True)


def previous(batch: int, config: FITConfig) -> Tensor:
    shape = (batch, config.latent_tokens, config.latent_width)
    drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2), device="cpu")
    return drawn.to(torch.get_default_device())


def expected_parameters(c: FITConfig) -> int:
    """Counted from the description: layer norms on both sides, bias-free projections, the smaller side's width inside."""

    def attention(query: int, context: int | None) -> int:
        inner = min(query, context or query)
        norms = 2 * query + (2 * context if context else 0)
        return norms + query * inner + (context or query) * 2 * inner + inner * query

    def feed_forward(width: int) -> int:
        return 2 * width + width * 4 * width + 4 * width + 4 * width * width + width

    p, z, w, pixels = c.patch_width, c.latent_width, c.conditioning_width, 3 * math.prod(c.patch)
    block = attention(z, w) + attention(z, p) + attention(p, z) + 2 * feed_forward(z) + feed_forward(p)
    block += c.global_layers * (attention(z, None) + feed_forward(z))
    scalar = (128 * w + w) + (w * w + w)
    tokens = c.text_width * w + w + 2 * w + (5 if c.upsampler else 4) * scalar
    stem = pixels * (2 if c.upsampler else 1) * p + p
    frames, height, width = c.grid
    places = frames + height * width if c.position == "factorised" else frames * height * width
    latents = c.latent_tokens * z + feed_forward(z) + 2 * z
    return c.blocks * block + tokens + stem + places * p + latents + 2 * p + p * pixels + pixels


@pytest.mark.parametrize(
    ("config", "tokens", "groups", "published"),
    [(FIT_500M, 2560, 8, 0.50e9), (FIT_3900M, 2560, 8, 3.92e9), (FIT_3900M_UP, 147_456, 32, 3.92e9)],
    ids=["500M", "3.9B", "3.9B Up"],
)
def test_published_sizes(config: FITConfig, tokens: int, groups: int, published: float) -> None:
    assert (config.patch_tokens, config.groups, config.patch_tokens // config.groups) == (tokens, groups, tokens // groups)
    parameters = sum(p.numel() for p in catalogue.build(config, "meta").parameters())
    assert parameters == expected_parameters(config)
    assert parameters == pytest.approx(published, rel=0.01)


def test_a_full_table_of_positions_would_exceed_the_published_upsampler() -> None:
    sizes = {
        kind: sum(p.numel() for p in catalogue.build(replace(FIT_3900M_UP, position=kind), "meta").position.parameters())
        for kind in ("full", "factorised")
    }
    assert sizes == {"full": 147_456 * 1024, "factorised": (16 + 72 * 128) * 1024}


@pytest.mark.parametrize("long", [4, 2])  # frames per group: all of them, as in the paper, or half
def test_patches_are_in_reading_order_and_groups_are_boxes(build_fit, tiny, video, long: int) -> None:
    config = replace(tiny, group=(long, 2, 3))
    network, clip = build_fit(config), video(2, config)
    (frames, rows, columns), (_, high, wide) = config.grid, config.group
    groups = network._to_patches(network._to_cells(clip))
    numbers = network._to_groups(
        torch.arange(96)[None, :, None]
    )  # what is in reading order, such as positions, goes the same way
    assert groups.shape == (2 * config.groups, 96 // config.groups, 12)
    for t, h, w in itertools.product(range(frames), range(rows), range(columns)):
        pixels = clip[1, t, :, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].permute(1, 2, 0).flatten()
        group = ((t // long) * (rows // high) + h // high) * (columns // wide) + w // wide
        place = ((t % long) * high + h % high) * wide + w % wide
        assert torch.equal(groups[config.groups + group, place], pixels)
        assert numbers[group, place] == (t * rows + h) * columns + w
    assert torch.equal(network._from_cells(network._to_video(groups)), clip)


@pytest.mark.parametrize(
    "shape", [((4, 8, 12), (1, 2, 2), (4, 2, 3)), ((4, 6, 4), (2, 3, 2), (1, 2, 1)), ((2, 4, 4), (1, 1, 1), (2, 4, 4))]
)
def test_unpatching_inverts_patching(build_fit, tiny, video, shape: tuple[tuple[int, int, int], ...]) -> None:
    size, patch, group = shape
    config = replace(tiny, size=size, patch=patch, group=group, latent_tokens=48)
    network, clip = build_fit(config), video(3, config)
    groups = network._to_patches(network._to_cells(clip))
    assert torch.equal(network._from_cells(network._to_video(groups)), clip)


@pytest.mark.parametrize("std", [1.0, 0.1])
@pytest.mark.parametrize("position", ["full", "factorised"])
def test_every_patch_has_a_position_of_its_own_and_of_the_configured_spread(build_fit, tiny, position: str, std: float) -> None:
    table = build_fit(replace(tiny, position=position, position_std=std, patch_width=160)).position().detach()
    assert table.shape == (96, 160)
    assert float(table.std()) == pytest.approx(std, rel=0.05)
    assert len(torch.unique(table, dim=0)) == 96
    if position == "factorised":  # frame and place add up: (t, p) - (t, q) is the same in all frames
        by_frame = table.unflatten(0, (4, 24))
        torch.testing.assert_close(by_frame[0] - by_frame[0, :1], by_frame[3] - by_frame[3, :1])


@pytest.mark.parametrize("head_norm", [True, False])
def test_without_a_head_norm_what_the_stem_reads_reaches_the_head_as_it_is(
    build_fit, tiny, video, conditioning, head_norm: bool
) -> None:
    network, told = build_fit(replace(tiny, head_norm=head_norm)), conditioning(1)
    clip = video(1, tiny)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("position") or ".write" in name:
                parameter.zero_()
        for block in network.blocks:
            block.write.output.weight.zero_()
        once, twice = network(clip, told).video, network(2 * clip, told).video
    gain = (twice / once).median()
    assert float(gain) == pytest.approx(1 if head_norm else 2, abs=0.01)


@pytest.mark.parametrize("global_layers", [0, 1])
def test_reads_and_writes_stay_in_their_group_and_global_layers_mix(
    build_fit, tiny, video, conditioning, global_layers: int
) -> None:
    config = replace(tiny, global_layers=global_layers)
    network, clip, told = build_fit(config), video(1, config), conditioning(1)
    before = network(clip, told).video
    changed = clip.clone()
    changed[0, 2, 1, 5, 3] += 1  # in the lower left group: rows 4 to 7, columns 0 to 5
    moved = (network(changed, told).video - before).abs() > 1e-9
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[4:, :6] = True
    assert moved[..., inside].all()  # all frames of the group hear of it
    assert bool(moved[..., ~inside].any()) == (global_layers > 0)


def test_self_conditioning_is_silent_at_first_then_heard(build_fit, tiny, video, conditioning) -> None:
    network, clip, told = build_fit(tiny), video(2, tiny), conditioning(2)
    first = network(clip, told).video
    torch.testing.assert_close(network(clip, told, torch.zeros(2, 8, 24, dtype=torch.float64)).video, first, rtol=0, atol=0)
    assert (network(clip, told, previous(2, tiny)).video - first).abs().max() > 1e-6
    torch.manual_seed(0)
    fresh = catalogue.build(tiny).double()
    assert torch.equal(fresh(clip, told, previous(2, tiny)).video, fresh(clip, told).video)


def test_the_pass_for_latents_gives_the_latents_of_the_full_pass(build_fit, tiny, video, conditioning) -> None:
    network, clip, told = build_fit(tiny), video(2, tiny), conditioning(2)
    full = network(clip, told, previous(2, tiny))
    short = network(clip, told, previous(2, tiny), latents_only=True)
    assert short.video is None
    assert full.video.shape == clip.shape
    assert full.latents.shape == (2, tiny.latent_tokens, tiny.latent_width)
    assert torch.equal(short.latents, full.latents)


def test_an_upsampler_sees_its_low_resolution_video(build_fit, tiny, video, conditioning) -> None:
    config = replace(tiny, upsampler=True)
    network, clip = build_fit(config), video(2, config)
    told = conditioning(2, low_resolution=video(2, config).flip(0), corruption=torch.zeros(2))
    before = network(clip, told).video
    assert (network(clip, replace(told, low_resolution=clip)).video - before).abs().max() > 1e-6
    assert (network(clip, replace(told, corruption=torch.ones(2))).video - before).abs().max() > 1e-6


def test_the_start_is_tame(tiny, video, conditioning) -> None:
    torch.manual_seed(0)
    network = catalogue.build(replace(tiny, upsampler=True))
    clip = video(4, tiny).float()
    output = network(clip, conditioning(4, low_resolution=clip, corruption=torch.rand(4)))
    assert 0.02 < float(output.video.std()) < 1  # small beside its unit-variance target, but not zero
    assert 0.3 < float(output.latents.std()) < 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (4, 9, 12)}, "^size: height 9 does not divide into patches of 2"),
        ({"size": (4, 8, 13)}, "^size: width 13 does not divide into patches of 2"),
        ({"patch": (3, 2, 2)}, "^size: frames 4 does not divide into patches of 3"),
        ({"group": (4, 3, 3)}, "^group: height 8 has 4 patches, which do not divide into groups of 3"),
        ({"group": (3, 2, 3)}, "^group: frames 4 has 4 patches"),
        ({"latent_tokens": 10}, "^latent_tokens 10 do not divide among 4 groups"),
        ({"patch_head_width": 7}, "^patch_head_width 7 does not divide the attention's inner width 16"),
        ({"latent_head_width": 16}, "^latent_head_width 16 does not divide the attention's inner width 24"),
        ({"latent_head_width": 12}, "^latent_head_width 12 does not divide the attention's inner width 16"),
        ({"patch": (1, 0, 2)}, "^patch: height must be at least 1, got 0"),
        ({"group": (4, 2, -3)}, "^group: width must be at least 1, got -3"),
        ({"size": (0, 8, 12)}, "^size: frames must be at least 1, got 0"),
        ({"patch_head_width": 0}, "^patch_head_width must be at least 1, got 0"),
        ({"latent_tokens": 0}, "^latent_tokens must be at least 1, got 0"),
        ({"pixel_width": 6, "pixel_frames": 2}, "^pixel_frames must be odd and at least 1, got 2"),
        ({"pixel_width": 6, "pixel_stride": 3}, "^pixel_stride must divide the patch's 2x2, got 3"),
        ({"pixel_stride": 2}, "^pixel_stride is of convolutions over pixels"),
        ({"clip_width": -1}, "^clip_width must not be negative"),
        ({"clip_width": 6, "patch": (2, 2, 2), "group": (2, 2, 3)}, "^clip_width needs patches of one frame"),
        ({"dropout": 1.0}, "^dropout must be in"),
        ({"text_modulation": True}, "^text_modulation needs something to modulate"),
    ],
)
def test_shapes_that_do_not_divide_are_named(tiny, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny, **changes)


def test_low_resolution_input_of_another_shape_is_named(build_fit, tiny, video, conditioning) -> None:
    clip, told = video(2, tiny), conditioning(2)
    with pytest.raises(ValueError, match="^low_resolution: "):
        build_fit(replace(tiny, upsampler=True))(clip, told)
    upsampler = build_fit(replace(tiny, upsampler=True))
    with pytest.raises(ValueError, match="^low_resolution: "):
        upsampler(clip, replace(told, low_resolution=clip[:, :, :, :4], corruption=torch.zeros(2)))


def test_each_block_is_sharded_on_its_own(build_fit, tiny) -> None:
    network = build_fit(tiny)
    assert [name for name, module in network.named_modules() if network.fsdp_wrap_fn(module)] == ["blocks.0", "blocks.1"]


def test_an_upsampler_compiles_whole_in_both_passes(build_fit, tiny, video, conditioning) -> None:
    config = replace(tiny, upsampler=True, position="factorised")
    network, x, latents = build_fit(config), video(2, config), previous(2, config)
    told = conditioning(2, torch.float64, low_resolution=x.flip(0), corruption=torch.tensor([0.1, 0.2]).double())
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for arguments in ((x, told, latents), (x, told, latents, True)):
        for found, expected in zip(compiled(*arguments), network(*arguments), strict=True):
            torch.testing.assert_close(found, expected)
    gradients = []
    for forward in (compiled, network):
        network.zero_grad()
        forward(x, told, latents).video.square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


class Attentions(TorchFunctionMode):
    """Notes the attentions that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, bool]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            self.calls.append((*args[:3], kwargs["attn_mask"] is not None))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [FIT_500M, FIT_3900M, FIT_3900M_UP], ids=["500M", "3.9B", "3.9B Up"])
def test_attention_among_patches_and_latents_can_take_the_flash_kernel(config: FITConfig) -> None:
    """In bfloat16 without a mask, heads of a multiple of 8 up to 256 channels whose channels lie together (FlashAttention 2)."""
    frames, height, width = config.size
    x = torch.empty(2, frames, 3, height, width, device="meta", dtype=torch.bfloat16)
    with torch.device("meta"):
        told = Conditioning(
            torch.empty(2), torch.empty(2, 128, 1024), torch.empty(2, 128).bool(), torch.empty(2), torch.empty(2, 2),
            x if config.upsampler else None, torch.empty(2) if config.upsampler else None,
        )  # fmt: skip
    with Attentions() as seen:
        catalogue.build(config, "meta").bfloat16()(x, told)
    products = {True: 0, False: 0}  # of queries and keys, by whether masked
    for query, key, value, masked in seen.calls:
        for tensor in (query, key, value):
            assert tensor.dtype == torch.bfloat16 and tensor.stride(-1) == 1
            assert tensor.shape[-1] % 8 == 0 and tensor.shape[-1] <= 256
        products[masked] += query.numel() * key.shape[2]
    assert len(seen.calls) == config.blocks * (3 + config.global_layers)
    assert products[True] < 0.2 * products[False]  # the text alone is masked
