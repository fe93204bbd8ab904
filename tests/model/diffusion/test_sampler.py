"""The sampler against stock EDM written from scratch, exact flows of Gaussians, and closed forms of guidance."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from model.diffusion import sampler
from model.diffusion.sampler import ChurnConfig, OscillationConfig, SamplerConfig

SIGMA_INS = [1.0, 4.0, 32.0]


def normal_quantiles(count: int) -> Tensor:
    """(count, 1) float64: unit Gaussian noise without sampling error."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)[:, None]


def gaussian(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The optimal denoiser of stock EDM, ``E[x | x + s eps = y]``, of a Gaussian."""

    def denoise(y: Tensor, s: Tensor) -> Tensor:
        return (std**2 * y + s**2 * mean) / (std**2 + s**2)

    return denoise


WEIGHTS, MEANS, STDS = (0.3, 0.7), (-1.0, 0.8), (0.15, 0.25)


def mixture(y: Tensor, s: Tensor) -> Tensor:
    """The same of a mixture of two Gaussians."""
    posts, means = [], []
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        variance = std**2 + s**2
        posts.append(math.log(weight) - variance.log() / 2 - (y - mean) ** 2 / (2 * variance))
        means.append((std**2 * y + s**2 * mean) / variance)
    return (torch.stack(posts).softmax(0) * torch.stack(means)).sum(0)


def under(sigma_in: float, stock: Callable[[Tensor, Tensor], Tensor]) -> sampler.Denoise:
    """A stock denoiser under the forward process of ``sigma_in``: ``s_i x_sigma = x + s_i sigma eps``."""
    return lambda x, sigma: stock(sigma_in * x, sigma_in * sigma[:, None])


def stock_heun(denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: list[float]) -> Tensor:
    """Algorithm 1 of EDM, line by line."""
    for t, following in itertools.pairwise(times):
        d = (y - denoise(y, torch.tensor(t, dtype=y.dtype))) / t
        ahead = y + (following - t) * d
        if following != 0:
            d_ahead = (ahead - denoise(ahead, torch.tensor(following, dtype=y.dtype))) / following
            ahead = y + (following - t) * (d / 2 + d_ahead / 2)
        y = ahead
    return y


@pytest.mark.parametrize(("steps", "smallest", "largest", "rho"), [(1, 0.002, 80, 7), (2, 0.002, 80, 7), (40, 0.01, 50, 3)])
def test_noise_levels_follow_edm(steps: int, smallest: float, largest: float, rho: float) -> None:
    levels = sampler.noise_levels(SamplerConfig(steps=steps, sigma_min=smallest, sigma_max=largest, rho=rho))
    expected = [
        (largest ** (1 / rho) + i / max(steps - 1, 1) * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho
        for i in range(steps)
    ]
    assert levels.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    assert levels[-1] == 0


@pytest.mark.parametrize("sigma_in", SIGMA_INS)
def test_heun_is_stock_edm_on_scaled_data(sigma_in: float) -> None:
    levels = sampler.noise_levels(SamplerConfig(steps=18))
    noise = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = sampler.heun(under(sigma_in, mixture), noise, levels, sigma_in)
    times = [sigma_in * level for level in levels.tolist()]
    torch.testing.assert_close(ours, stock_heun(mixture, times[0] * noise, times), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sigma_in", SIGMA_INS)
def test_a_gaussian_is_reproduced_and_the_order_is_two(sigma_in: float) -> None:
    mean, std = 0.3, 0.5
    noise = normal_quantiles(1001)
    # The exact flow down to the smallest level: y - mean shrinks like sqrt(std^2 + s^2). There D ends it.
    start, end = 80 * sigma_in, 0.002 * sigma_in
    y = mean + (start * noise - mean) * math.sqrt((std**2 + end**2) / (std**2 + start**2))
    exact = gaussian(mean, std)(y, torch.tensor(end))
    errors = []
    for steps in (32, 64, 128):
        levels = sampler.noise_levels(SamplerConfig(steps=steps))
        sample = sampler.heun(under(sigma_in, gaussian(mean, std)), noise, levels, sigma_in)
        errors.append(float((sample - exact).abs().max()))
    assert errors[2] < 5e-3
    for coarse, fine in itertools.pairwise(errors):
        assert 3.3 < coarse / fine < 5
    assert float(sample.mean()) == pytest.approx(mean, abs=0.01)
    assert float(sample.std()) == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize("sigma_in", SIGMA_INS)
def test_a_mixture_is_reproduced(sigma_in: float) -> None:
    # The finest detail is 0.15 wide: at s_i = 32 the default end would be an effective 0.064, too coarse for it.
    levels = sampler.noise_levels(SamplerConfig(steps=128, sigma_min=0.002 / sigma_in))
    sample = sampler.heun(under(sigma_in, mixture), normal_quantiles(4001), levels, sigma_in).flatten()
    mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
    square = sum(w * (m**2 + s**2) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
    assert float(sample.mean()) == pytest.approx(mean, abs=0.005)
    assert float(sample.std()) == pytest.approx(math.sqrt(square - mean**2), rel=0.005)
    assert float((sample < -0.2).double().mean()) == pytest.approx(WEIGHTS[0], abs=0.003)  # the valley between both
    for low, high, m, s in [(-9, -0.2, MEANS[0], STDS[0]), (-0.2, 9, MEANS[1], STDS[1])]:
        mode = sample[(sample > low) & (sample < high)]
        assert float(mode.mean()) == pytest.approx(m, abs=0.01)
        assert float(mode.std()) == pytest.approx(s, rel=0.02)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_n_steps_cost_2n_minus_1_evaluations_at_the_levels(steps: int) -> None:
    levels = sampler.noise_levels(SamplerConfig(steps=steps))
    seen: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert (sigma.shape, sigma.dtype) == ((3,), x.dtype)
        seen.append(sigma[0])
        return torch.zeros_like(x)

    done: list[int] = []

    def progress() -> Iterator[int]:
        for i in range(steps):
            yield i
            done.append(i)

    sampler.heun(denoise, torch.randn(3, 2), levels, 4.0, progress())
    expected = [levels[0], *(level for level in levels[1:-1] for _ in range(2))]
    assert len(seen) == 2 * steps - 1
    torch.testing.assert_close(torch.stack(seen), torch.stack(expected).float())
    assert done == list(range(steps))


def test_a_perfect_denoiser_is_returned_whatever_the_noise() -> None:
    truth = torch.rand(2, 3, 4) * 2 - 1
    for sigma_in in SIGMA_INS:
        sample = sampler.heun(lambda x, sigma: truth, torch.randn(2, 3, 4), sampler.noise_levels(SamplerConfig()), sigma_in)
        torch.testing.assert_close(sample, truth, rtol=0, atol=2e-4)


def test_guidance_is_linear_between_and_beyond_both_branches() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(sampler.guide(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(sampler.guide(conditional, unconditional, 1.0), conditional)
    torch.testing.assert_close(sampler.guide(conditional, unconditional, 7.5), 7.5 * conditional - 6.5 * unconditional)


@pytest.mark.parametrize("quantile", [0.9, 0.995, 1.0])
def test_thresholding_clips_each_sample_at_its_own_quantile(quantile: float) -> None:
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([0.1, 2.0, 30.0])[:, None, None, None]
    result = sampler.dynamic_threshold(x, quantile)
    torch.testing.assert_close(result[0], x[0], rtol=0, atol=0)  # all within [-1, 1]: as it is
    for row in (1, 2):
        values = x[row].numpy().astype(np.float64)
        limit = np.quantile(np.abs(values), quantile)
        assert limit > 1
        expected = np.clip(values, -limit, limit) / limit
        np.testing.assert_allclose(result[row].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert result[row].abs().max() == 1


def test_values_up_to_one_are_not_stretched() -> None:
    x = torch.linspace(-1, 1, 50)[None]
    for quantile in (0.1, 0.5, 1.0):
        torch.testing.assert_close(sampler.dynamic_threshold(x, quantile), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "0 < sigma_min < sigma_max"),
        ({"threshold_quantile": 1.5}, "threshold_quantile must be in"),
        ({"guidance": math.nan}, "guidance must be finite and not negative, got nan"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)


def stock_churn(
    denoise: Callable[[Tensor, Tensor], Tensor], y: Tensor, times: list[float], c: ChurnConfig, draws: Iterator[Tensor]
) -> Tensor:
    """Algorithm 2 of EDM, line by line."""
    n = len(times) - 1
    for t, following in itertools.pairwise(times):
        gamma = min(c.amount / n, math.sqrt(2) - 1) if c.sigma_min <= t <= c.sigma_max else 0
        raised = t + gamma * t
        if gamma:
            y = y + math.sqrt(raised**2 - t**2) * c.noise * next(draws)
        d = (y - denoise(y, torch.tensor(raised, dtype=y.dtype))) / raised
        ahead = y + (following - raised) * d
        if following != 0:
            d_ahead = (ahead - denoise(ahead, torch.tensor(following, dtype=y.dtype))) / following
            ahead = y + (following - raised) * (d / 2 + d_ahead / 2)
        y = ahead
    return y


@pytest.mark.parametrize("sigma_in", SIGMA_INS)
def test_churn_is_stock_edm_on_scaled_data(sigma_in: float) -> None:
    levels = sampler.noise_levels(SamplerConfig(steps=18))
    churn = ChurnConfig(amount=5.0, sigma_min=0.05, sigma_max=50.0, noise=1.003)
    noise, *fresh = torch.randn(19, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = iter(fresh)
    ours = sampler.heun(under(sigma_in, mixture), noise, levels, sigma_in, None, churn, lambda: next(given))
    times = [sigma_in * level for level in levels.tolist()]
    scaled = ChurnConfig(5.0, 0.05 * sigma_in, 50.0 * sigma_in, 1.003)
    stock = stock_churn(mixture, times[0] * noise, times, scaled, iter(fresh))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-9)
    assert not torch.allclose(ours, sampler.heun(under(sigma_in, mixture), noise, levels, sigma_in))


@pytest.mark.parametrize("sigma_in", SIGMA_INS)
def test_a_mixture_survives_churn(sigma_in: float) -> None:
    levels = sampler.noise_levels(SamplerConfig(steps=128, sigma_min=0.002 / sigma_in))
    generator = torch.Generator().manual_seed(0)
    noise = normal_quantiles(20_001)

    def fresh() -> Tensor:
        return torch.randn(noise.shape, dtype=torch.float64, generator=generator)

    sample = sampler.heun(under(sigma_in, mixture), noise, levels, sigma_in, None, ChurnConfig(20.0), fresh).flatten()
    assert float((sample < -0.2).double().mean()) == pytest.approx(WEIGHTS[0], abs=0.015)  # 4 sigma of 20,001 draws
    for low, high, m, s in [(-9, -0.2, MEANS[0], STDS[0]), (-0.2, 9, MEANS[1], STDS[1])]:
        mode = sample[(sample > low) & (sample < high)]
        assert float(mode.mean()) == pytest.approx(m, abs=0.015)
        assert float(mode.std()) == pytest.approx(s, rel=0.04)


def test_churn_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="fresh_noise must be given where churn is 3.0"):
        sampler.heun(mixture, torch.zeros(2, 1), sampler.noise_levels(SamplerConfig(steps=2)), 4.0, churn=ChurnConfig(3.0))
    with pytest.raises(ValueError, match="amount must not be negative, got -1.0"):
        ChurnConfig(-1.0)


def test_guidance_oscillates_after_its_constant_part() -> None:
    config = SamplerConfig(steps=7, guidance=15.0, oscillation=OscillationConfig(low=1.0, constant=3))
    assert sampler.guidance_weights(config).tolist() == [15, 15, 15, 15, 1, 15, 1]
    assert sampler.guidance_weights(SamplerConfig(steps=2, guidance=3.0)).tolist() == [3, 3]
    levels = sampler.noise_levels(config)
    assert [sampler.level_of(float(level), levels) for level in levels[:-1].float()] == list(range(7))


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_reconstruction_guidance_does_not_depend_on_sigma_in_and_finds_what_goes_with_the_known(weight: float) -> None:
    """Two Gaussian numbers of correlation 0.9, the first of which is known."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    known = torch.tensor([1.2, 0.0], dtype=torch.float64)
    is_known = torch.tensor([True, False])
    levels = sampler.noise_levels(SamplerConfig(steps=60))

    def stock(y: Tensor, s: Tensor) -> Tensor:  # of N(0, covariance)
        noise = s.flatten()[0] ** 2 * torch.eye(2, dtype=torch.float64)
        return y @ torch.linalg.solve(covariance + noise, covariance)

    def samples(sigma_in: float, weight: float) -> Tensor:
        denoise = under(sigma_in, stock)

        def steered(x: Tensor, sigma: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            estimate = denoise(x, sigma)
            gradient = sampler.reconstruction_gradient(estimate, x, known.expand_as(x), is_known)
            return torch.where(is_known, known, estimate.detach() - weight / 2 / sigma_in * gradient)

        noise = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        scaled = [sigma_level / sigma_in for sigma_level in levels.tolist()]
        return sampler.heun(steered, noise, torch.tensor(scaled), sigma_in)

    found = samples(1.0, weight)
    for sigma_in in SIGMA_INS[1:]:
        torch.testing.assert_close(samples(sigma_in, weight), found, rtol=0, atol=1e-5)
    assert torch.equal(found[:, 0], known[0].expand(500))
    # Exact conditioning gives a mean of 0.9 * 1.2; the network alone, told the known number's noisy version, less.
    exact, unsteered = 1.08, float(samples(1.0, 0.0)[:, 1].mean())
    assert abs(float(found[:, 1].mean()) - exact) < abs(unsteered - exact)
