"""The loss by noise band: the training objective at named levels, on samples that training never sees."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Precision
from composer.devices import DeviceCPU
from torch import nn

from model.data.dataset import build_loader
from model.denoiser import Denoiser
from model.diffusion import edm
from model.diffusion.edm import DiffusionConfig
from model.ema import EMA, EMAConfig
from model.errors import UserError
from model.evaluation import Evaluation, EvaluationConfig, band_losses, noise_bands, report, share
from model.networks.conditioning import Conditioning

CONFIG = EvaluationConfig(every=2, videos=5, images=3, bands=(0.2, 1.0), levels=2, batch=3)


def stirred(config: Any) -> Denoiser:
    """A denoiser whose every weight matters: networks begin with zeros in places."""
    torch.manual_seed(0)
    denoiser = Denoiser(config)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(torch.randn_like(p) / 10)
    return denoiser


def test_bands_are_those_of_the_training_distribution() -> None:
    diffusion = DiffusionConfig()
    bands = noise_bands(EvaluationConfig(bands=(0.1, 0.3, 1.0), levels=3), diffusion)
    assert [band.name for band in bands] == ["sigma_below_0.1", "sigma_0.1_to_0.3", "sigma_0.3_to_1", "sigma_above_1"]
    drawn = edm.training_sigma(torch.randn(200_000, generator=torch.Generator().manual_seed(0)), diffusion)
    for band, (low, high) in zip(bands, [(0, 0.1), (0.1, 0.3), (0.3, 1.0), (1.0, math.inf)], strict=True):
        inside = drawn[(drawn >= low) & (drawn < high)]
        assert band.share == pytest.approx(len(inside) / len(drawn), abs=0.005)
        # Three levels at the centres of thirds: quantiles 1/6, 1/2 and 5/6 of what training draws there.
        expected = inside.quantile(torch.tensor([1 / 6, 1 / 2, 5 / 6]))
        torch.testing.assert_close(torch.tensor(band.sigmas), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": (0.3, 0.1)}, r"bands must be positive and rise, got \[0.3, 0.1\]"),
        ({"bands": (0.0, 0.1)}, "bands must be positive"),
        ({"videos": 0, "images": 0}, "nothing to evaluate"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**options)
    with pytest.raises(ValueError, match="draws no sigma between 1e"):
        noise_bands(EvaluationConfig(bands=(1e9,)), DiffusionConfig())


def test_the_loss_is_the_training_objective_at_that_level(stage, clips) -> None:
    # In training the same noise follows the draw of sigma; here, where sigma is given, it comes first.
    denoiser = stirred(stage(self_conditioning=0.0, text_dropout=0.0))
    batch = clips(3)
    sigma = torch.tensor([0.05, 0.4, 3.0])
    with torch.no_grad():
        found = denoiser.loss_at(batch, sigma)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
        for generator in generators:
            torch.rand((), generator=generator)  # text dropout, of none
        x = denoiser.codec.encode(batch["video"])
        eps = torch.stack([torch.empty(x.shape[1:]).normal_(generator=generator) for generator in generators])
        s = sigma.reshape(-1, 1, 1, 1, 1)
        told = {name: batch[name] for name in ("text", "text_mask", "frame_rate", "resolution")}
        noisy = x / 4 + s * eps
        estimate, _ = denoiser.denoise(noisy, sigma, Conditioning(c_noise=sigma.log() / 4, **told), None)
        error = ((estimate - x)[..., :6, :] ** 2).mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(found, (1 + 1 / sigma**2) * error, rtol=1e-3, atol=1e-5)  # equation 1 with lambda of equation 36


def test_what_is_random_in_training_is_fixed(stage, clips) -> None:
    batch = clips(4)
    bands = noise_bands(CONFIG, DiffusionConfig())
    losses = band_losses(stirred(stage()), batch, bands)
    assert losses.shape == (3, 4)
    assert torch.equal(band_losses(stirred(stage()), batch, bands), losses)
    assert torch.equal(band_losses(stirred(stage(text_dropout=1.0, self_conditioning=0.1)), batch, bands), losses)
    alone = {name: value[1:2] for name, value in batch.items()}
    torch.testing.assert_close(band_losses(stirred(stage()), alone, bands), losses[:, 1:2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_every_sample_counts_once_and_no_process_waits(world: int) -> None:
    shares = [share({"videos": 5, "images": 3}, rank, world) for rank in range(world)]
    assert len({len(part) for part in shares}) == 1
    counted = [(place.kind, place.index) for part in shares for place in part if place.counts]
    assert sorted(counted) == sorted([("videos", i) for i in range(5)] + [("images", i) for i in range(3)])


def test_totals_weigh_bands_as_training_does() -> None:
    bands = noise_bands(EvaluationConfig(bands=(1.0,)), DiffusionConfig())
    metrics = report(torch.tensor([[10.0, 30.0]]), [5], ["images"], bands)
    assert metrics["images/sigma_below_1"] == 2 and metrics["images/sigma_above_1"] == 6
    assert metrics["images/total"] == pytest.approx(2 * bands[0].share + 6 * (1 - bands[0].share))


def test_samples_held_out_are_never_trained_on_and_all_else_stays_in_its_place(tmp_path, write_dataset, config) -> None:
    given = config(videos=write_dataset(tmp_path / "v", "videos", 20), images=write_dataset(tmp_path / "i", "images", 12))
    held = {f"videos-{i}" for i in range(15, 20)} | {f"images-{i}" for i in range(9, 12)}

    def epochs(held_out: dict[str, int] | None) -> list[str]:
        loader = build_loader(given, 8, held_out).dataloader
        return [key for _ in range(2) for packed in loader for key in packed["key"]]

    whole, kept = epochs(None), epochs(CONFIG.held_out)
    assert held <= set(whole) and not held & set(kept)
    assert len(whole) == len(kept)
    assert all(with_all == without for with_all, without in zip(whole, kept, strict=True) if with_all not in held)
    stood_in = [without for with_all, without in zip(whole, kept, strict=True) if with_all in held]
    assert len(set(stood_in)) > len(held) // 2  # not always the same ones

    parts = build_loader(given, 8, CONFIG.held_out).dataloader.dataset.parts
    assert [parts["videos"].held_out_sample(i).key for i in range(5)] == [f"videos-{i}" for i in range(15, 20)]
    assert [parts["images"].held_out_sample(i).key for i in range(3)] == [f"images-{i}" for i in range(9, 12)]
    with pytest.raises(UserError, match="holds 12 samples, 12 are to be held out"):
        build_loader(given, 8, {"images": 12})


def test_evaluation_leaves_no_trace(tmp_path, write_dataset, config, stage) -> None:
    size = (6, 12)
    folders = {kind: write_dataset(tmp_path / kind, kind, 12, size=size) for kind in ("videos", "images")}
    given = config(**folders, height=6, width=12)
    network = replace(stage().network, text_width=4, dropout=0.3)
    denoiser = stirred(stage(network=network)).train()
    ema = EMA(EMAConfig(half_life=1000))
    state = SimpleNamespace(
        model=denoiser,
        timestamp=SimpleNamespace(batch=0),
        device=DeviceCPU(),
        precision=Precision.FP32,
        precision_config=None,
    )
    ema.before_load(state, None)
    with torch.no_grad():
        for p in denoiser.parameters():
            nn.init.normal_(p, std=0.1)
    weights = [p.detach().clone() for p in denoiser.parameters()]
    averages = [w.clone() for w in ema.weights.values()]

    logged: list[dict[str, float]] = []
    callback = Evaluation(CONFIG, ema, build_loader(given, 8, CONFIG.held_out), given.max_tokens)
    logger: Any = SimpleNamespace(log_metrics=logged.append)
    callback.fit_start(state, logger)
    random = torch.get_rng_state()
    for step in range(1, 5):
        state.timestamp.batch = step
        callback.batch_end(state, logger)
    callback.fit_end(state, logger)
    assert torch.equal(torch.get_rng_state(), random)
    assert denoiser.training
    assert all(torch.equal(p, w) for p, w in zip(denoiser.parameters(), weights, strict=True))
    assert all(torch.equal(w, a) for w, a in zip(ema.weights.values(), averages, strict=True))

    assert len(logged) == 2 and logged[0] == logged[1]  # steps 2 and 4; the end is step 4 again
    names = {f"eval/loss/{kind}/{part}" for kind in folders for part in
             ("total", "sigma_below_0.2", "sigma_0.2_to_1", "sigma_above_1")}  # fmt: skip
    assert logged[0].keys() == names
    # With the averaged weights: another model's losses are others.
    with torch.no_grad():
        for w, p in zip(ema.weights.values(), denoiser.parameters(), strict=True):
            w.copy_(p)
    state.timestamp.batch = 6
    callback.batch_end(state, logger)
    assert logged[2] != logged[0]
