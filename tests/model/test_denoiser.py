"""The training objective and D: what counts in the loss, and what cannot be heard."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from model import optimizers
from model.codec import PixelCodecConfig
from model.denoiser import Denoiser, ModelConfig, UpsamplerConfig
from model.diffusion.edm import DiffusionConfig
from model.networks.network import NetworkOutput
from model.optimizers import AdamConfig


class Listening(nn.Module):
    """Calls a network, notes what goes in and out, and may change what comes out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[dict[str, Any]] = []
        self.noise = torch.zeros(())  # added to the network's output

    def forward(
        self, video: Tensor, conditioning: Any, latents: Tensor | None = None, latents_only: bool = False
    ) -> NetworkOutput:
        output = self.network(video, conditioning, latents, latents_only)
        if output.video is not None:
            output = NetworkOutput(output.video + self.noise, output.latents)
        call = {"input": video, "conditioning": conditioning, "latents": latents, "latents_only": latents_only}
        self.calls.append({**call, "output": output, "grad": torch.is_grad_enabled()})
        return output


def build(config: ModelConfig) -> tuple[Denoiser, Listening]:
    torch.manual_seed(0)
    denoiser = Denoiser(config)
    nn.init.normal_(denoiser.network.self_conditioning_norm.weight)
    denoiser.network = Listening(denoiser.network)
    return denoiser, denoiser.network


@pytest.mark.parametrize(
    "diffusion", [DiffusionConfig(), DiffusionConfig(sigma_in=32.0), DiffusionConfig(sigma_in=4.0, sigma_data=0.5)]
)
def test_the_loss_is_equation_3(stage, clips, diffusion: DiffusionConfig) -> None:
    denoiser, network = build(stage(diffusion=diffusion))
    batch = clips(4)
    terms = denoiser(batch)
    # From what the network saw and said, in the form lambda |D - x|^2 of Table 1, on the media's pixels alone.
    s, s_d, s_i = terms.sigma.double()[:, None, None, None, None], diffusion.sigma_data, diffusion.sigma_in
    x_sigma = network.calls[-1]["input"].double() * (s_d**2 / s_i**2 + s**2).sqrt()
    c_skip = s_i * s_d**2 / (s_i * s**2 + s_d**2)
    c_out = -s_i * s * s_d * (s**2 + s_d**2).sqrt() / (s_d**2 + s_i * s**2)
    estimate = c_skip * x_sigma + c_out * network.calls[-1]["output"].video.double()
    errors = (estimate[..., :6, :] - batch["video"].double()) ** 2
    expected = (1 / s_d**2 + 1 / s.flatten() ** 2) * errors.mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(terms.loss.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(denoiser.loss(terms, batch), terms.loss.mean())
    torch.testing.assert_close(network.calls[-1]["conditioning"].c_noise, terms.sigma.log() / 4)
    # The noisy input is x / s_i plus unit noise of std sigma.
    padded = functional.pad(batch["video"], (0, 0, 0, 2)).double()
    noise = (x_sigma - padded / s_i) / s
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    assert len(torch.unique(terms.sigma)) == 4


def test_padding_is_out_of_the_loss(stage, clips) -> None:
    denoiser, network = build(stage())
    batch = clips(4)
    before = denoiser(batch).loss
    garbage = 100 * torch.randn(4, 4, 3, 8, 12)
    garbage[..., :6, :] = 0
    network.noise = garbage
    assert torch.equal(denoiser(batch).loss, before)
    network.noise = torch.zeros_like(garbage)
    network.noise[2, 1, 0, 5, 11] = 1.0  # the last pixel of the media
    assert (denoiser(batch).loss != before).tolist() == [False, False, True, False]


def test_d_is_the_preconditioned_output_and_zero_in_padding(stage, conditioning) -> None:
    diffusion = DiffusionConfig(sigma_in=2.0, sigma_data=0.7)
    denoiser, network = build(stage(diffusion=diffusion))
    x_sigma, sigma = torch.randn(3, 4, 3, 8, 12), torch.tensor([0.01, 1.0, 60.0])
    before = torch.randn(3, 8, 24)
    estimate, latents = denoiser.denoise(x_sigma, sigma, conditioning(3), before)
    assert not estimate[..., 6:, :].any()
    s = sigma[:, None, None, None, None].double()
    call = network.calls[0]
    torch.testing.assert_close(call["input"].double(), x_sigma.double() / (0.49 / 4 + s**2).sqrt(), rtol=1e-5, atol=1e-6)
    assert torch.equal(call["latents"], before)
    assert torch.equal(latents, call["output"].latents)
    expected = 2 * 0.49 / (2 * s**2 + 0.49) * x_sigma
    expected = expected - 2 * s * 0.7 * (s**2 + 0.49).sqrt() / (0.49 + 2 * s**2) * call["output"].video
    torch.testing.assert_close(estimate[..., :6, :].double(), expected[..., :6, :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sigma", "told"),
    [((0.05, 60.0), (0.05, 60.0)), ((1e-4, 1e4), (math.exp(1 - 5 * 0.9), math.exp(1 + 5 * 0.9)))],
)
def test_the_network_is_told_levels_that_training_draws(
    stage, conditioning, sigma: tuple[float, float], told: tuple[float, float]
) -> None:
    """At most five standard deviations of ln sigma away from its mean; its input is scaled by the level itself."""
    denoiser, network = build(stage(diffusion=DiffusionConfig(log_sigma_mean=1.0, log_sigma_std=0.9)))
    levels = torch.tensor(sigma)
    x_sigma = torch.randn(2, 4, 3, 8, 12) * levels[:, None, None, None, None]
    denoiser.denoise(x_sigma, levels, conditioning(2, c_noise=levels.log() / 4), None)
    torch.testing.assert_close(network.calls[0]["conditioning"].c_noise.mul(4).exp(), torch.tensor(told))
    c_in = (1 / 4.0**2 + levels**2).rsqrt()
    torch.testing.assert_close(network.calls[0]["input"], x_sigma * c_in[:, None, None, None, None])


def test_dropped_text_has_no_influence_and_kept_text_has(stage, clips) -> None:
    batch = clips(4)
    other = {**batch, "text": torch.randn(4, 5, 6), "text_mask": torch.ones(4, 5, dtype=torch.bool)}
    dropping, _ = build(stage(text_dropout=1.0))
    assert torch.equal(dropping(other).loss, dropping(batch).loss)
    keeping, _ = build(stage(text_dropout=0.0))
    assert (keeping(other).loss != keeping(batch).loss).all()


def test_text_is_dropped_for_the_configured_share_of_samples(stage, clips) -> None:
    denoiser, network = build(stage(text_dropout=0.25, self_conditioning=0.0))
    for seed in range(8):
        denoiser(clips(32, seed))
    dropped = [~call["conditioning"].text_mask.any(1) for call in network.calls]
    assert float(torch.cat(dropped).float().mean()) == pytest.approx(0.25, abs=0.08)  # 3 sigma of 256 draws


def test_self_conditioning_starts_from_the_latents_of_a_first_pass(stage, clips) -> None:
    denoiser, network = build(stage(self_conditioning=1.0))
    denoiser(clips(4)).loss.sum().backward()
    first, second = network.calls
    assert (first["latents_only"], first["grad"], first["latents"]) == (True, False, None)
    assert (second["latents_only"], second["grad"]) == (False, True)
    assert torch.equal(first["input"], second["input"])
    assert first["conditioning"] is second["conditioning"]
    assert torch.equal(second["latents"], first["output"].latents)
    assert not second["latents"].requires_grad


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_self_conditioning_is_chosen_by_sample(stage, clips, share: float) -> None:
    denoiser, network = build(stage(self_conditioning=share))
    for seed in range(8):
        denoiser(clips(32, seed))
    if share == 0:
        assert [call["latents"] for call in network.calls] == [None] * 8  # and no first pass
        return
    chosen = 0
    for first, second in zip(network.calls[::2], network.calls[1::2], strict=True):
        for given, found in zip(second["latents"], first["output"].latents, strict=True):
            assert torch.equal(given, found) or not given.any()
            chosen += bool(given.any())
    assert chosen / 256 == pytest.approx(share, abs=0.1)


def test_all_weights_are_the_networks(stage) -> None:
    # What lies directly on the ComposerModel would stay unsharded and unsynchronised under FSDP2.
    denoiser = Denoiser(stage(), "meta")
    assert {name.split(".")[0] for name, _ in denoiser.named_parameters()} == {"network"}
    assert {p.device.type for p in denoiser.parameters()} == {"meta"}


def test_a_u_net_trains_by_adam_and_samples(stage, clips, conditioning, tiny_unet) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(stage(network=tiny_unet, self_conditioning=0.0))
    optimizer = optimizers.build(denoiser.parameters(), AdamConfig(lr=1e-3))  # at 1e-2 the second step is one too far
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        terms = denoiser(clips(4))
        denoiser.loss(terms, clips(4)).backward()
        optimizer.step()
        losses.append(float(terms.loss.mean()))
    assert losses == sorted(losses, reverse=True)
    assert all(p.isfinite().all() for p in denoiser.parameters())
    estimate, latents = denoiser.denoise(torch.randn(3, 4, 3, 8, 12), torch.tensor([0.01, 1.0, 60.0]), conditioning(3), None)
    assert estimate.shape == (3, 4, 3, 8, 12) and estimate.isfinite().all()
    assert latents is None


def test_a_u_net_cannot_be_self_conditioned(stage, tiny_unet) -> None:
    with pytest.raises(ValueError, match="^self_conditioning must be 0 for a unet, which has no latents to carry"):
        stage(network=tiny_unet)


UP = UpsamplerConfig(factor=2, max_corruption=0.5)


def test_a_constant_video_without_corruption_arrives_as_it_is(stage) -> None:
    denoiser, _ = build(stage(upsampler=UP))
    colours = torch.rand(2, 4, 3, 1, 1) * 2 - 1
    low = colours.expand(2, 4, 3, 3, 6)
    arrived = denoiser.low_resolution_input(low, torch.zeros(2), torch.randn(2, 4, 3, 3, 6))
    assert arrived.shape == (2, 4, 3, 8, 12)
    torch.testing.assert_close(arrived[..., :6, :], colours.expand(2, 4, 3, 6, 12))
    assert not arrived[..., 6:, :].any()


def test_corruption_adds_noise_of_its_level_and_keeps_the_variance(stage) -> None:
    denoiser, _ = build(stage(upsampler=UP))
    low, noise = torch.randn(2, 3, 4, 3, 3, 6).double()
    level = torch.tensor([0.0, 0.3, 2.0]).double()
    arrived = denoiser.low_resolution_input(low, level, noise)[..., :6, :]
    plain = denoiser.low_resolution_input(low, torch.zeros(3).double(), noise)[..., :6, :]
    spread = denoiser.low_resolution_input(noise, torch.zeros(3).double(), noise)[..., :6, :]
    for row, value in enumerate(level.tolist()):
        expected = (plain[row] + value * spread[row]) / math.hypot(1, value)
        torch.testing.assert_close(arrived[row], expected)


def test_bringing_to_size_interpolates_between_centres(stage) -> None:
    denoiser, _ = build(stage(upsampler=UP))
    ramp = torch.arange(6.0).expand(1, 4, 3, 3, 6)  # centres of the small pixels lie at 0.5, 2.5, ... of the large ones
    arrived = denoiser.low_resolution_input(ramp, torch.zeros(1), torch.zeros_like(ramp))
    expected = ((torch.arange(12) + 0.5) / 2 - 0.5).clamp(0, 5)
    torch.testing.assert_close(arrived[0, 0, 0, 0], expected)


def test_an_upsampler_trains_on_its_own_clip_averaged_down_and_corrupted(stage, clips) -> None:
    batch = clips(32)
    denoiser, network = build(stage(upsampler=replace(UP, max_corruption=0.0)))
    denoiser(batch)
    told = network.calls[-1]["conditioning"]
    assert not told.corruption.any()
    small = batch["video"].unflatten(-1, (6, 2)).unflatten(-3, (3, 2)).mean(dim=(-3, -1))
    expected = denoiser.low_resolution_input(small, torch.zeros(32), torch.zeros_like(small))
    torch.testing.assert_close(told.low_resolution, expected)

    denoiser, network = build(stage(upsampler=UP))
    denoiser(batch)
    told = network.calls[-1]["conditioning"]
    assert 0 <= told.corruption.min() < 0.1
    assert 0.4 < told.corruption.max() <= 0.5
    # What was added has the std that the token tells.
    added = told.low_resolution * (1 + told.corruption**2).sqrt()[:, None, None, None, None] - expected
    noisiest, calmest = int(told.corruption.argmax()), int(told.corruption.argmin())
    assert added[noisiest, ..., :6, :].std() > 3 * added[calmest, ..., :6, :].std()


@pytest.mark.parametrize(("framework", "sigma_in"), [("snap_video", 4.0), ("edm", 1.0)])
def test_an_upsampler_of_residuals_diffuses_what_its_input_lacks(stage, clips, framework: Any, sigma_in: float) -> None:
    diffusion = DiffusionConfig(framework=framework, sigma_in=sigma_in, sigma_data=0.3)
    denoiser, network = build(stage(upsampler=replace(UP, residual=True), diffusion=diffusion))
    batch = clips(4)
    terms = denoiser(batch)
    call, s = network.calls[-1], terms.sigma[:, None, None, None, None]
    known, video = call["conditioning"].low_resolution, functional.pad(batch["video"], (0, 0, 0, 2))
    residual = call["input"] * (0.09 / sigma_in**2 + s**2).sqrt()  # noisy
    noise = (residual - (video - known) / sigma_in) / s
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    # The loss is of D, which says the whole video of a noisy video.
    estimate, _ = denoiser.denoise(residual + known / sigma_in, terms.sigma, call["conditioning"], call["latents"])
    torch.testing.assert_close(network.calls[-1]["input"], call["input"], rtol=1e-4, atol=1e-4)
    errors = ((estimate - video)[..., :6, :] ** 2).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(terms.loss, (1 / 0.09 + 1 / terms.sigma**2) * errors, rtol=1e-2, atol=1e-3)
    # All noise and nothing said: what is known.
    loudest = (1e4 * torch.randn_like(video), torch.full((4,), 1e6), call["conditioning"], call["latents"])
    denoiser.denoise(*loudest)
    network.noise = -network.calls[-1]["output"].video
    estimate, _ = denoiser.denoise(*loudest)
    torch.testing.assert_close(estimate[..., :6, :], known[..., :6, :], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codec": PixelCodecConfig(height=6, width=12, pad_bottom=1)},
            "codec: 6x12 padded by 1 and 0 is not the network's size 8x12",
        ),
        ({"upsampler": UpsamplerConfig(factor=4)}, "upsampler.factor 4 does not divide the media's 6x12"),
        ({"upsampler": None}, "network.upsampler must be true exactly where an upsampler is configured"),
        ({"text_dropout": 1.5}, r"text_dropout must be in \[0, 1\], got 1.5"),
        ({"self_conditioning": -0.1}, r"self_conditioning must be in \[0, 1\], got -0.1"),
    ],
)
def test_stages_that_do_not_fit_together_are_named(stage, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(**changes)


@pytest.mark.parametrize(("options", "name"), [({"factor": 0}, "factor"), ({"max_corruption": -1.0}, "max_corruption")])
def test_impossible_upsamplers_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        UpsamplerConfig(**options)


def test_an_image_with_its_own_scale_is_one_frame_to_the_network(stage, clips) -> None:
    denoiser, network = build(stage(diffusion=DiffusionConfig(sigma_in=4.0, image_sigma_in=1.0)))
    batch = clips(4)
    images = torch.isinf(batch["frame_rate"])
    assert images.any() and not images.all()
    batch["video"] = batch["video"][:, :1].expand_as(batch["video"])
    denoiser(batch)
    seen = network.calls[-1]["input"]
    same = (seen == seen[:, :1]).flatten(1).all(dim=1)
    assert same.tolist() == images.tolist()


def test_values_that_are_not_finite_are_refused_by_name(stage, clips) -> None:
    denoiser, _ = build(stage())
    for name in ("video", "text"):
        batch = clips(2)
        batch[name] = batch[name].clone()
        batch[name][1, 0, 0] = math.nan
        with pytest.raises(ValueError, match=rf"^{name} must be finite, got nan at \(1, 0, 0"):
            denoiser(batch)


def test_a_sample_has_the_same_loss_in_any_batch(stage, clips) -> None:
    """However samples are spread over processes and microbatches, each meets the same noise and the same fate."""
    denoiser = Denoiser(stage(upsampler=UpsamplerConfig(factor=2)))
    nn.init.normal_(denoiser.network.self_conditioning_norm.weight)
    batch = clips(6)
    whole = denoiser(batch)
    for rows in (slice(0, 4), slice(4, 6)):
        part = denoiser({name: values[rows] for name, values in batch.items()})
        torch.testing.assert_close(part.loss, whole.loss[rows], rtol=1e-5, atol=0)
        assert torch.equal(part.sigma, whole.sigma[rows])


def test_the_objective_is_weighted_and_the_losses_told_are_not(stage, clips) -> None:
    plain, weighted = (Denoiser(stage(uncertainty_weighting=on)) for on in (False, True))
    weighted.network.load_state_dict(plain.network.state_dict())
    assert plain.levels is None and weighted.levels is not None
    weighted.levels.means = torch.linspace(0.01, 1, len(weighted.levels.means))
    samples = clips(4)
    one, other = plain(samples), weighted(samples)
    assert torch.equal(one.loss, other.loss) and one.weight is None
    assert float(plain.loss(one, samples)) == pytest.approx(float(one.loss.mean()))
    expected = (other.loss * weighted.levels.weights(other.sigma)).mean()
    torch.testing.assert_close(weighted.loss(other, samples), expected)
    assert len(set(other.weight.tolist())) > 1
    assert torch.equal(weighted.loss_at(samples, one.sigma), plain.loss_at(samples, one.sigma)), "evaluation stays comparable"
