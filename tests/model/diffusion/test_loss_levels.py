"""Uncertainty weighting in closed form; that runs keep it through kills is tested with them (test_resume.py)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.diffusion import edm
from model.diffusion.edm import DiffusionConfig
from model.diffusion.loss_levels import BINS, HORIZON, LossLevels

CONFIG = DiffusionConfig(log_sigma_mean=0.9, log_sigma_std=1.25)


def drawn(number: int) -> Tensor:
    """(number,) noise levels as training draws them."""
    return edm.training_sigma(torch.randn(number, generator=torch.Generator().manual_seed(0)), CONFIG)


def told(levels: LossLevels, loss: Callable[[Tensor], Tensor], steps: int, batch: int = 64) -> LossLevels:
    for sigma in drawn(steps * batch).split(batch):
        levels.update(levels.sums(sigma, loss(sigma)))
    return levels


def test_before_anything_is_known_all_levels_weigh_the_same() -> None:
    assert torch.equal(LossLevels(CONFIG).weights(drawn(100)), torch.ones(100))


def test_each_level_comes_to_weigh_the_inverse_of_its_loss() -> None:
    levels = told(LossLevels(CONFIG), lambda sigma: 0.01 + 0.04 * sigma.log().abs(), 2000)
    sigma = drawn(100_000)
    weights = levels.weights(sigma)
    assert float(weights.log().mean()) == pytest.approx(0, abs=0.02), "geometric mean over what training draws"
    balanced = weights * (0.01 + 0.04 * sigma.log().abs())
    # In the bins' middles they are equal; the outermost are wide.
    inner = (sigma > sigma.quantile(1 / BINS)) & (sigma < sigma.quantile(1 - 1 / BINS))
    middle = balanced[inner].median()
    assert float((balanced[inner] / middle).log().abs().mean()) < 0.15


def test_bins_are_equally_likely_and_cover_every_level() -> None:
    levels = LossLevels(CONFIG)
    sums = levels.sums(drawn(320_000), torch.ones(320_000))
    torch.testing.assert_close(sums[1], torch.full((BINS,), 10_000.0), rtol=0.05, atol=0)
    farthest = levels.sums(torch.tensor([1e-30, 1e30]), torch.ones(2))[1]
    assert farthest.nonzero().flatten().tolist() == [0, BINS - 1]


def test_means_are_plain_at_first_and_forget_later() -> None:
    levels, sigma = LossLevels(CONFIG), torch.full((1,), 2.0)
    bin_ = int(levels.sums(sigma, sigma)[1].argmax())
    for seen in range(1, 200):
        levels.update(levels.sums(sigma, torch.full((1,), 0.5)))
        if seen < HORIZON - 1:
            assert float(levels.means[bin_]) == pytest.approx((1 + 0.5 * seen) / (1 + seen)), "1 is what it started with"
    before = float(levels.means[bin_])
    for _ in range(HORIZON):
        levels.update(levels.sums(sigma, torch.full((1,), 0.1)))
    assert float(levels.means[bin_]) == pytest.approx(0.1 + (before - 0.1) * (1 - 1 / HORIZON) ** HORIZON)
    others = torch.arange(BINS) != bin_
    assert torch.equal(levels.means[others], torch.ones(BINS - 1)), "levels that were not drawn keep theirs"


def test_ranks_and_microbatches_add_up() -> None:
    sigma = drawn(64)
    whole, parts = LossLevels(CONFIG), LossLevels(CONFIG)
    whole.update(whole.sums(sigma, sigma / 10))
    parts.update(sum(parts.sums(part, part / 10) for part in sigma.split(16)))  # type: ignore[arg-type]
    torch.testing.assert_close(parts.means, whole.means)


def test_a_loss_that_is_not_finite_or_nothing_leaves_weights_finite() -> None:
    levels = told(LossLevels(CONFIG), lambda sigma: torch.where(sigma > 4, torch.nan, 0.0), 300)
    assert bool(levels.means.isfinite().all()) and bool(levels.weights(drawn(1000)).isfinite().all())


def test_a_spike_does_not_silence_its_noise_level() -> None:
    levels, sigma = LossLevels(CONFIG), torch.full((1,), 2.0)
    for _ in range(300):
        levels.update(levels.sums(sigma, torch.full((1,), 0.02)))
    before = levels.weights(sigma)
    levels.update(levels.sums(sigma, torch.full((1,), 1e8)))
    assert 0.5 < float(levels.weights(sigma) / before) < 0.7
