"""What holds for every network: what must not matter to it and what must. A new architecture is one line here."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.networks import catalogue
from model.networks.catalogue import NetworkConfig
from model.networks.conditioning import Conditioning
from model.networks.layers import reset_parameters
from model.networks.network import NetworkOutput

NETWORKS: dict[str, dict[str, Any]] = {  # by the fixture of its config
    "tiny": {},
    "tiny_beyond": {},
    "tiny_unet": {"multipliers": (1, 2), "attention_factors": (2,)},  # fewer levels: less to compile
}


@pytest.fixture(params=NETWORKS)
def config(request: pytest.FixtureRequest) -> NetworkConfig:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=NETWORKS)
def small(request: pytest.FixtureRequest) -> NetworkConfig:
    """Quick to compile."""
    return replace(request.getfixturevalue(request.param), **NETWORKS[request.param])


def previous(batch: int, config: NetworkConfig) -> Tensor | None:
    """Latents of an evaluation before, for a network that takes them."""
    if not config.carries_latents:
        return None
    shape = (batch, config.latent_tokens, config.latent_width)
    drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2), device="cpu")
    return drawn.to(torch.get_default_device())


def moved(after: Tensor, before: Tensor) -> Tensor:
    """(B,) how far each sample's video has moved."""
    return (after - before).abs().amax(dim=(1, 2, 3, 4))


def assert_same(found: NetworkOutput, expected: NetworkOutput) -> None:
    torch.testing.assert_close(found.video, expected.video, rtol=0, atol=1e-11)
    if expected.latents is not None:
        torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-11)


def test_padding_in_text_does_not_matter(config, build, video, conditioning) -> None:
    network, clip, told = build(config), video(4, config), conditioning(4, torch.float64)
    before = network(clip, told)
    garbage = torch.where(told.text_mask[..., None], told.text, 1e3 * torch.randn(4, 5, 6, dtype=torch.float64))
    longer = replace(
        told,
        text=torch.cat([garbage, torch.full((4, 7, 6), 50.0, dtype=torch.float64)], dim=1),
        text_mask=torch.cat([told.text_mask, torch.zeros(4, 7, dtype=torch.bool)], dim=1),
    )
    for other in (replace(told, text=garbage), longer):
        assert_same(network(clip, other), before)
    seen = told.text_mask.clone()
    seen[0, 3] = True  # one token more that counts does matter, to its own sample
    after = network(clip, replace(told, text_mask=seen))
    assert (moved(after.video, before.video) > 1e-6).tolist() == [True, False, False, False]


def test_dropped_text_is_the_learned_null_whatever_the_text(config, build, video, conditioning) -> None:
    network, clip, told = build(config), video(4, config), conditioning(4, torch.float64)
    dropped = network(clip, told.without_text())
    other = replace(told, text=torch.randn(4, 5, 6).double(), text_mask=torch.ones(4, 5, dtype=torch.bool))
    assert_same(network(clip, other.without_text()), dropped)
    assert moved(network(clip, told).video, dropped.video).min() > 1e-6
    with torch.no_grad():
        nn.init.normal_(network.conditioning.null_text)
    assert moved(network(clip, told.without_text()).video, dropped.video).min() > 1e-6


def test_every_scalar_is_heard(config, build, video, conditioning) -> None:
    network, clip = build(config), video(1, config).expand(6, -1, -1, -1, -1)
    one = {name: value for name, value in vars(conditioning(1, torch.float64)).items() if value is not None}
    values = {name: value.repeat(6, *[1] * (value.ndim - 1)) for name, value in one.items()}
    values["c_noise"][1] = 0.7
    values["frame_rate"][2] = math.inf  # an image
    values["frame_rate"][3] = 12.0
    values["resolution"][4, 0] = 720.0
    values["resolution"][5, 1] = 1280.0
    told = Conditioning(**values)
    before = network(clip, told).video
    assert before.isfinite().all()
    for a in range(6):
        for b in range(a):
            assert (before[a] - before[b]).abs().max() > 1e-6, (a, b)
    with torch.no_grad():
        nn.init.normal_(network.conditioning.image)  # an image's rate is a value of its own
    assert (moved(network(clip, told).video, before) > 1e-9).tolist() == [False, False, True, False, False, False]


def test_samples_of_a_batch_do_not_see_each_other(config, build, video, conditioning) -> None:
    network, clip, told, latents = build(config), video(4, config), conditioning(4, torch.float64), previous(4, config)
    whole = network(clip, told, latents)
    for row in range(4):
        one = slice(row, row + 1)
        alone = Conditioning(**{name: None if value is None else value[one] for name, value in vars(told).items()})
        expected = NetworkOutput(*(None if part is None else part[one] for part in whole))
        assert_same(network(clip[one], alone, None if latents is None else latents[one]), expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"position": "factorised"}),
        ("tiny", {"upsampler": True}),
        ("tiny", {"upsampler": True, "position": "factorised"}),
        ("tiny_beyond", {"upsampler": True}),
        ("tiny_unet", {}),
    ],
)
def test_every_parameter_gets_a_gradient(request, build, video, conditioning, name: str, changes: dict[str, Any]) -> None:
    config = replace(request.getfixturevalue(name), **changes)
    network, clip = build(config), video(4, config)
    told = conditioning(4, torch.float64).without_text(torch.tensor([True, False, False, False]))
    if config.upsampler:
        told = replace(told, low_resolution=clip.flip(0), corruption=torch.rand(4).double())
    network(clip, told, previous(4, config)).video.square().mean().backward()
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert set(dict(network.named_parameters())) - set(trained) <= {f"conditioning.standard.{x}" for x in ("mean", "spread")}
    silent = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 1e-12]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in trained.values())


def test_every_parameter_is_initialised(config) -> None:
    network = catalogue.build(config)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(math.nan)
    reset_parameters(network)
    assert all(p.isfinite().all() for p in network.parameters())


def test_checkpointed_blocks_give_the_same_gradients(config, build, video, conditioning) -> None:
    results, calls = [], []
    for checkpoint in (False, True):
        network = build(replace(config, dropout=0.3, checkpoint_blocks=checkpoint))
        unit = next(module for module in network.modules() if network.fsdp_wrap_fn(module))
        count: list[int] = []
        first = next(module for module in unit.modules() if isinstance(module, nn.Linear | nn.Conv2d))
        first.register_forward_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)
        loss = network(video(2, config), conditioning(2, torch.float64), previous(2, config)).video.square().mean()
        loss.backward()
        results.append([loss, *(p.grad for p in network.parameters() if p.grad is not None)])
        calls.append(len(count))
    assert calls == [1, 2]  # once more in the backward pass
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_compiles_whole(small, build, video, conditioning, checkpoint: bool) -> None:
    """Without a graph break, not even for recomputation; what the compiler is told must give the same."""
    config = replace(small, checkpoint_blocks=checkpoint)
    network, told, clip, latents = build(config), conditioning(2, torch.float64), video(2, config), previous(2, config)
    torch._dynamo.reset()
    results = []
    for forward in (torch.compile(network, fullgraph=True, backend="aot_eager"), network):
        network.zero_grad()
        output = forward(clip, told, latents).video
        output.square().sum().backward()
        results.append([output, *(p.grad for p in network.parameters())])
    torch.testing.assert_close(*results)


def test_it_compiles_whole_under_autocast_with_dropout(small, video, conditioning, device) -> None:
    """As it trains on a GPU: weights of bfloat16, as FSDP gathers them, and everything that the layers do about that."""
    network = catalogue.build(replace(small, dropout=0.5), device).bfloat16()
    told, clip, latents = conditioning(2), video(2, small).bfloat16(), previous(2, small)
    latents = None if latents is None else latents.bfloat16()
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    results = []
    for forward in (compiled, network):
        torch.manual_seed(5)  # what is dropped
        network.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            output = forward(clip, told, latents).video
        output.float().square().sum().backward()
        results.append([output, *(p.grad for p in network.parameters() if p.grad is not None)])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).float().norm() <= 0.05 * expected.float().norm()


def test_compiled_blocks_give_the_same(small, build, video, conditioning) -> None:
    network, told, clip = build(small), conditioning(2, torch.float64), video(2, small)
    names, expected = list(network.state_dict()), network(clip, told).video
    torch._dynamo.reset()
    network.compile_blocks(backend="aot_eager")
    torch.testing.assert_close(network(clip, told).video, expected)
    with torch.no_grad():
        torch.testing.assert_close(network(clip, told).video, expected)
    assert list(network.state_dict()) == names


def test_inputs_of_another_shape_are_named(config, build, video, conditioning) -> None:
    network, clip, told = build(config), video(2, config), conditioning(2, torch.float64)
    with pytest.raises(ValueError, match=r"^video: \(T, C, H, W\) is \(4, 3, 8, 10\), the network is built for \(4, 3, 8, 12\)"):
        network(clip[..., :10], told)
    with pytest.raises(ValueError, match="^text: width is 5, the network is built for 6"):
        network(clip, replace(told, text=told.text[..., :5]))
    with pytest.raises(ValueError, match="^low_resolution: "):
        network(clip, replace(told, low_resolution=clip))
    with pytest.raises(ValueError, match="^latents: "):
        network(clip, told, torch.zeros(2, 4, 24))
