"""Sampling a stage: each clip depends on its own generator, and guidance is the formula."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.denoiser import Denoiser, ModelConfig, UpsamplerConfig
from model.diffusion import edm, sampler
from model.diffusion.sampler import ChurnConfig, OscillationConfig, SamplerConfig
from model.generate import GuidedDenoiser, Request, draw, generate

SAMPLER = SamplerConfig(steps=3, guidance=3.0)


def build(config: ModelConfig) -> Denoiser:
    torch.manual_seed(0)
    denoiser = Denoiser(config)
    nn.init.normal_(denoiser.network.self_conditioning_norm.weight)
    return denoiser.eval()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture
def request_for(conditioning):
    """``request_for(rows, seeds, **changes)``: of three prompts, those of ``rows``."""

    def build_request(rows: slice, seeds: list[int], **changes: Any) -> Request:
        told = conditioning(3)
        names = ("text", "text_mask", "frame_rate", "resolution")
        given = {name: getattr(told, name)[rows] for name in names}
        return Request(**given, generators=generators(*seeds), **changes)

    return build_request


def test_each_row_of_noise_is_its_own_generators() -> None:
    noise = draw(generators(5, 6), (2, 3), torch.device("cpu"))
    for row, seed in enumerate((5, 6)):
        assert torch.equal(noise[row], torch.randn(2, 3, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("upsampler", [False, True])
def test_a_clip_depends_on_its_own_seed_and_prompt_alone(stage, request_for, upsampler: bool) -> None:
    denoiser = build(stage(upsampler=UpsamplerConfig(factor=2)) if upsampler else stage())
    low = torch.rand(3, 4, 3, 3, 6) * 2 - 1

    def sample(rows: slice, seeds: list[int]) -> Tensor:
        more = {"low_resolution": low[rows], "corruption": 0.3} if upsampler else {}
        torch.manual_seed(len(seeds))  # the global generator has no part
        return generate(denoiser, request_for(rows, seeds, **more), SAMPLER)

    whole = sample(slice(0, 3), [1, 2, 3])
    assert whole.shape == (3, 4, 3, 6, 12)
    assert whole.abs().max() <= 1
    for row in range(3):
        alone = sample(slice(row, row + 1), [row + 1])
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=2e-4)
    assert torch.equal(sample(slice(0, 3), [1, 2, 3]), whole)
    reseeded = (sample(slice(0, 3), [1, 9, 3]) - whole).abs().amax(dim=(1, 2, 3, 4))
    assert (reseeded > 1e-3).tolist() == [False, True, False]


def test_the_prompt_matters(stage, request_for) -> None:
    denoiser = build(stage())
    first = generate(denoiser, request_for(slice(0, 1), [1]), SAMPLER)
    other = replace(request_for(slice(0, 1), [1]), text=torch.randn(1, 5, 6))
    assert (generate(denoiser, other, SAMPLER) - first).abs().max() > 1e-3
    silent = replace(SAMPLER, guidance=0.0)  # the unconditional branch alone
    assert torch.equal(
        generate(denoiser, replace(other, generators=generators(1)), silent),
        generate(denoiser, request_for(slice(0, 1), [1]), silent),
    )


def test_frame_rate_and_resolution_matter(stage, request_for) -> None:
    denoiser = build(stage())
    first = generate(denoiser, request_for(slice(0, 1), [1]), SAMPLER)
    for change in ({"frame_rate": torch.tensor([float("inf")])}, {"resolution": torch.tensor([[1080.0, 1920.0]])}):
        other = replace(request_for(slice(0, 1), [1]), **change)
        assert (generate(denoiser, other, SAMPLER) - first).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("quantile", [0.0, 0.9])
def test_guidance_is_the_formula_with_latents_carried_by_branch(stage, conditioning, guidance: float, quantile: float) -> None:
    denoiser, told = build(stage()), conditioning(2)
    config = SamplerConfig(guidance=guidance, threshold_quantile=quantile)
    guided = GuidedDenoiser(denoiser, told, config)
    batches: list[int] = []
    denoiser.network.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    latents: dict[str, Tensor | None] = {"with": None, "without": None}
    for level in (5.0, 0.7, 0.1):
        x, sigma = 3 * torch.randn(2, 4, 3, 8, 12), torch.full((2,), level)
        with torch.no_grad():
            found = guided(x, sigma)
            branches = {}
            for name, text in (("with", told), ("without", told.without_text())):
                now = replace(text, c_noise=edm.c_noise(sigma))
                branches[name], latents[name] = denoiser.denoise(x, sigma, now, latents[name])
        expected = branches["without"] + guidance * (branches["with"] - branches["without"])
        if quantile:
            expected = sampler.dynamic_threshold(expected, quantile)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    # One batch for both branches; none doubled where guidance of 1 needs the conditional branch alone.
    assert batches[::3] == [2 if guidance == 1 else 4] * 3


def test_the_upsampler_sees_its_input_and_the_corruption(stage, request_for) -> None:
    denoiser = build(stage(upsampler=UpsamplerConfig(factor=2)))
    low = torch.rand(1, 4, 3, 3, 6)
    seen: list[Any] = []
    denoiser.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    request = request_for(slice(0, 1), [4], low_resolution=low, corruption=0.25)
    generate(denoiser, request, SAMPLER)
    noise = torch.randn(4, 3, 3, 6, generator=torch.Generator().manual_seed(4))
    expected = denoiser.low_resolution_input(low, torch.tensor([0.25]), noise[None])
    for told in seen:
        torch.testing.assert_close(told.corruption, torch.full((2,), 0.25))
        torch.testing.assert_close(told.low_resolution, expected.repeat(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="^low_resolution: must be given to an upsampler"):
        generate(denoiser, request_for(slice(0, 1), [4]), SAMPLER)


def test_sampling_neither_trains_nor_drops_out_and_leaves_the_mode(stage, request_for, tiny) -> None:
    denoiser = build(stage(network=replace(tiny, dropout=0.5)))
    calm = generate(denoiser, request_for(slice(0, 1), [1]), SAMPLER)
    denoiser.train()
    assert torch.equal(generate(denoiser, request_for(slice(0, 1), [1]), SAMPLER), calm)
    assert denoiser.training
    assert not calm.requires_grad


@pytest.mark.parametrize("framework", ["snap_video", "edm"])
@pytest.mark.parametrize("image_sigma_in", [None, 1.0])
def test_a_perfect_network_gives_back_the_truth(stage, request_for, framework: Any, image_sigma_in: float | None) -> None:
    """With F = c_nrm v for one known video, sampling must end there whatever the noise."""
    diffusion = edm.DiffusionConfig(framework, sigma_in=4.0, image_sigma_in=image_sigma_in)
    denoiser = build(stage(diffusion=diffusion))
    truth = denoiser.codec.encode(torch.rand(1, 4, 3, 6, 12) * 1.8 - 0.9)

    class Oracle(nn.Module):
        def forward(self, network_input: Tensor, told: Any, latents: Tensor | None = None) -> tuple[Tensor, Tensor]:
            sigma = (4 * told.c_noise).exp()
            process = edm.process(diffusion, told.is_image)
            x_sigma = network_input / process.scale_input(torch.ones_like(network_input), sigma)
            eps = (x_sigma - process.add_noise(truth, torch.zeros_like(x_sigma), sigma)) / edm.expand(sigma, x_sigma)
            return process.network_target(truth, eps, sigma), torch.zeros(len(x_sigma), 1)

    denoiser.network = Oracle()
    request = request_for(slice(0, 2), [1, 2])  # a video and an image
    sample = generate(denoiser, request, SamplerConfig(steps=8, guidance=3.0))
    torch.testing.assert_close(sample, truth[..., :6, :].expand_as(sample), rtol=0, atol=1e-3)


def test_churn_draws_from_each_clips_own_seed(stage, request_for) -> None:
    denoiser, config = build(stage()), replace(SAMPLER, churn=ChurnConfig(2.0))
    whole = generate(denoiser, request_for(slice(0, 2), [1, 2]), config)
    alone = generate(denoiser, request_for(slice(1, 2), [2]), config)
    torch.testing.assert_close(whole[1:], alone, rtol=0, atol=2e-4)
    assert (whole - generate(denoiser, request_for(slice(0, 2), [1, 2]), SAMPLER)).abs().max() > 1e-3


def test_guidance_acts_within_its_interval_and_costs_nothing_beyond(stage, request_for, conditioning) -> None:
    denoiser, told = build(stage()), conditioning(2)
    config = SamplerConfig(steps=5, guidance=4.0, threshold_quantile=0.0)
    levels = sampler.noise_levels(config)[:-1].tolist()
    within = replace(config, guidance_interval=(levels[3] * 0.99, levels[1] * 1.01))
    assert sampler.guidance_weights(within).tolist() == [1, 4, 4, 4, 1]
    sizes = list[int]()
    denoiser.network.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    x = torch.randn(2, 4, 3, 8, 12)
    for level, weight in zip(levels, (1.0, 4.0, 4.0, 4.0, 1.0), strict=True):
        sigma = torch.full((2,), level)
        with torch.no_grad():
            found = GuidedDenoiser(denoiser, told, within)(x, sigma)
            evaluated = sizes[-1]
            plain = GuidedDenoiser(denoiser, told, replace(config, guidance=weight))(x, sigma)
        torch.testing.assert_close(found, plain)
        assert evaluated == (2 if weight == 1 else 4)
    whole, part = (generate(denoiser, request_for(slice(0, 2), [1, 2]), c) for c in (config, within))
    assert (whole - part).abs().max() > 1e-3
    # Everywhere, it is what it was; nowhere, there is no guidance.
    everywhere, nowhere = replace(config, guidance_interval=(0.0, 1e9)), replace(config, guidance_interval=(1e8, 1e9))
    torch.testing.assert_close(generate(denoiser, request_for(slice(0, 2), [1, 2]), everywhere), whole)
    none = generate(denoiser, request_for(slice(0, 2), [1, 2]), replace(config, guidance=1.0))
    torch.testing.assert_close(generate(denoiser, request_for(slice(0, 2), [1, 2]), nowhere), none)
    with pytest.raises(ValueError, match="guidance_interval must be two rising"):
        SamplerConfig(guidance_interval=(2.0, 1.0))


def test_branches_one_after_the_other_are_the_batch_of_both(stage, request_for) -> None:
    denoiser = build(stage())  # one that carries latents
    config = SamplerConfig(steps=4, guidance=5.0)
    apart = replace(config, batched_guidance=False)
    for changed in ({}, {"guidance_interval": (0.01, 10.0)}, {"oscillation": OscillationConfig(low=1.0, constant=0)}):
        both, one = (generate(denoiser, request_for(slice(0, 2), [1, 2]), replace(c, **changed)) for c in (config, apart))
        torch.testing.assert_close(both, one, rtol=0, atol=2e-4)


def test_oscillating_guidance_takes_each_levels_weight(stage, conditioning) -> None:
    denoiser, told = build(stage()), conditioning(2)
    config = SamplerConfig(steps=4, guidance=5.0, oscillation=OscillationConfig(low=2.0, constant=1), threshold_quantile=0.0)
    levels = sampler.noise_levels(config)
    x = torch.randn(2, 4, 3, 8, 12)
    for level, weight in zip(levels[:-1].tolist(), (5.0, 5.0, 2.0, 5.0), strict=True):
        plain = GuidedDenoiser(denoiser, told, replace(config, oscillation=None, guidance=weight))
        sigma = torch.full((2,), level)
        with torch.no_grad():
            torch.testing.assert_close(GuidedDenoiser(denoiser, told, config)(x, sigma), plain(x, sigma))
