"""The rewritten EDM against its defining identities, stock EDM and float64."""

import math

import pytest
import torch
from torch import Tensor

from model.diffusion import edm
from model.diffusion.edm import DiffusionConfig, Process

CONFIGS = [
    DiffusionConfig(sigma_in=1.0, sigma_data=1.0),
    DiffusionConfig(sigma_in=4.0, sigma_data=1.0),  # stage 1
    DiffusionConfig(sigma_in=32.0, sigma_data=1.0),  # stage 2
    DiffusionConfig(sigma_in=2.0, sigma_data=1.0),  # ablation iii
    DiffusionConfig(sigma_in=1.0, sigma_data=0.5),  # ablation i
    DiffusionConfig(sigma_in=4.0, sigma_data=0.5),  # ablation ii
]
NAIVE = [DiffusionConfig("edm", sigma_in=s_i, sigma_data=s_d) for s_i, s_d in ((1.0, 0.5), (1.0, 1.0), (4.0, 0.5), (4.0, 1.0))]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"s_i={c.sigma_in:g},s_d={c.sigma_data:g}")
every_framework = pytest.mark.parametrize(
    "config", CONFIGS + NAIVE, ids=lambda c: f"{c.framework},s_i={c.sigma_in:g},s_d={c.sigma_data:g}"
)


def sigmas() -> Tensor:
    """(61,) float64: 1e-3 to 1e3."""
    return torch.logspace(-3, 3, 61, dtype=torch.float64)


def process(config: DiffusionConfig) -> Process:
    """The process of a batch without images."""
    return edm.process(config, torch.zeros(61, dtype=torch.bool))


def data_and_noise(config: DiffusionConfig) -> tuple[Tensor, Tensor]:
    """x of std s_d and eps, both (61, 3, 5) float64."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 61, 3, 5, dtype=torch.float64, generator=generator)
    return config.sigma_data * x, eps


@every_framework
def test_the_denoiser_of_the_true_target_is_the_data(config: DiffusionConfig) -> None:
    x, eps = data_and_noise(config)
    x_sigma = process(config).add_noise(x, eps, sigmas())
    estimate = process(config).combine(x_sigma, process(config).network_target(x, eps, sigmas()), sigmas())
    torch.testing.assert_close(estimate, x, rtol=0, atol=1e-12)


@every_config
def test_the_weights_of_both_losses_agree(config: DiffusionConfig) -> None:
    s, s_d, s_i = sigmas(), config.sigma_data, config.sigma_in
    product = edm.loss_weight(s, s_d) * edm.c_out(s, s_d, s_i) ** 2
    torch.testing.assert_close(product, edm.effective_weight(s, s_d, s_i), rtol=1e-12, atol=0)


@every_framework
def test_the_losses_in_both_forms_agree_for_any_network(config: DiffusionConfig) -> None:
    x, eps = data_and_noise(config)
    s = sigmas()
    output = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    estimate = process(config).combine(process(config).add_noise(x, eps, s), output, s)
    d_form = process(config).loss_weight(s) * ((estimate - x) ** 2).mean(dim=(1, 2))
    f_error = ((output - process(config).network_target(x, eps, s)) ** 2).mean(dim=(1, 2))
    f_form = process(config).effective_weight(s) * f_error
    torch.testing.assert_close(f_form, d_form, rtol=1e-9, atol=0)


@every_config
def test_network_input_and_target_have_unit_variance(config: DiffusionConfig) -> None:
    # Both are linear in x and eps, independent with variances s_d^2 and 1: their coefficients say the variance exactly.
    s, one, zero = sigmas(), torch.ones(61, 1, dtype=torch.float64), torch.zeros(61, 1, dtype=torch.float64)

    def network_input(x: Tensor, eps: Tensor) -> Tensor:
        return process(config).scale_input(process(config).add_noise(x, eps, s), s)

    def network_target(x: Tensor, eps: Tensor) -> Tensor:
        return process(config).network_target(x, eps, s)

    for linear in (network_input, network_target):
        variance = config.sigma_data**2 * linear(one, zero) ** 2 + linear(zero, one) ** 2
        torch.testing.assert_close(variance, one, rtol=1e-12, atol=0)


@pytest.mark.parametrize("s_d", [0.5, 1.0])
def test_sigma_in_of_one_is_stock_edm_with_the_networks_sign_flipped(s_d: float) -> None:
    config = DiffusionConfig(sigma_in=1.0, sigma_data=s_d)
    x, eps = data_and_noise(config)
    s = sigmas()
    column = s[:, None, None]
    noisy = x + column * eps
    torch.testing.assert_close(process(config).add_noise(x, eps, s), noisy, rtol=1e-15, atol=0)
    torch.testing.assert_close(process(config).scale_input(noisy, s), noisy / (column**2 + s_d**2).sqrt(), rtol=1e-12, atol=0)
    output = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # Table 1 of EDM (Karras et al. 2022).
    skip = s_d**2 / (column**2 + s_d**2)
    out = column * s_d / (column**2 + s_d**2).sqrt()
    torch.testing.assert_close(process(config).combine(noisy, -output, s), skip * noisy + out * output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(edm.loss_weight(s, s_d), (s**2 + s_d**2) / (s * s_d) ** 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(edm.effective_weight(s, s_d, 1.0), torch.ones_like(s), rtol=1e-12, atol=0)
    torch.testing.assert_close(edm.c_noise(s), torch.tensor([math.log(value) / 4 for value in s.tolist()], dtype=torch.float64))


@every_config
def test_the_effective_weight_tends_to_sigma_in_squared_and_to_one(config: DiffusionConfig) -> None:
    ends = torch.tensor([1e-7, 1e7], dtype=torch.float64)
    weight = edm.effective_weight(ends, config.sigma_data, config.sigma_in)
    torch.testing.assert_close(weight, torch.tensor([config.sigma_in**2, 1.0], dtype=torch.float64), rtol=1e-9, atol=0)


@every_config
def test_float32_is_enough(config: DiffusionConfig) -> None:
    x, eps = (part.float() for part in data_and_noise(config))
    wide, s = sigmas(), sigmas().float()
    s_d, s_i = config.sigma_data, config.sigma_in
    for name, arguments in [
        ("c_in", (s_d, s_i)),
        ("c_nrm", (s_d,)),
        ("c_skip", (s_d, s_i)),
        ("c_out", (s_d, s_i)),
        ("loss_weight", (s_d,)),
        ("effective_weight", (s_d, s_i)),
    ]:
        function = getattr(edm, name)
        torch.testing.assert_close(function(s, *arguments).double(), function(wide, *arguments), rtol=2e-6, atol=0, msg=name)
    target = process(config).network_target(x, eps, s)
    assert target.dtype == torch.float32
    expected = process(config).network_target(x.double(), eps.double(), wide)
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=2e-6)
    estimate = process(config).combine(process(config).add_noise(x, eps, s), target, s)
    torch.testing.assert_close(estimate, x, rtol=0, atol=1e-5)


def test_each_sample_has_its_own_noise_level() -> None:
    config = CONFIGS[1]
    x, eps = torch.randn(2, 3, 2, 3, 4, 4)
    sigma = torch.tensor([0.01, 1.0, 50.0])
    whole = [
        process(config).add_noise(x, eps, sigma),
        process(config).network_target(x, eps, sigma),
        process(config).scale_input(x, sigma),
        process(config).combine(x, eps, sigma),
    ]
    for row in range(3):
        one = slice(row, row + 1)
        alone = [
            process(config).add_noise(x[one], eps[one], sigma[one]),
            process(config).network_target(x[one], eps[one], sigma[one]),
            process(config).scale_input(x[one], sigma[one]),
            process(config).combine(x[one], eps[one], sigma[one]),
        ]
        for together, apart in zip(whole, alone, strict=True):
            torch.testing.assert_close(together[one], apart, rtol=0, atol=0)


def test_training_noise_levels_are_log_normal() -> None:
    torch.manual_seed(0)
    config = DiffusionConfig(log_sigma_mean=-1.2, log_sigma_std=1.2)
    sigma = edm.training_sigma(torch.randn(200_000), config)
    assert (sigma.shape, sigma.dtype) == ((200_000,), torch.float32)
    # The quantiles of a standard normal at 2.5, 16, 50, 84 and 97.5 %; their sampling error here is below 0.01.
    normal = (sigma.log().double() + 1.2) / 1.2
    levels = torch.tensor([0.025, 0.158655, 0.5, 0.841345, 0.975], dtype=torch.float64)
    expected = torch.tensor([-1.959964, -1.0, 0.0, 1.0, 1.959964], dtype=torch.float64)
    torch.testing.assert_close(normal.quantile(levels), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["sigma_in", "image_sigma_in", "sigma_data", "log_sigma_std"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_not_positive_and_finite_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be positive and finite"):
        DiffusionConfig(**{name: value})


def test_the_naive_target_explodes_and_the_rewritten_does_not() -> None:
    x, eps = data_and_noise(CONFIGS[1])
    low = torch.full((61,), 1e-3, dtype=torch.float64)
    naive = process(DiffusionConfig("edm", sigma_in=4.0)).network_target(x, eps, low)
    # Equation 13: the spurious term is s_d^2 (s_i - 1) / (sigma s_i) x = 750 x, beside terms of size 1.
    torch.testing.assert_close(naive, 750 * x - eps, rtol=1e-4, atol=1e-2)
    assert process(CONFIGS[1]).network_target(x, eps, low).abs().max() < 6  # unit variance


def test_at_sigma_in_of_one_the_frameworks_differ_in_the_sign_of_f_alone() -> None:
    ours, stock = (process(DiffusionConfig(name, sigma_in=1.0, sigma_data=0.5)) for name in ("snap_video", "edm"))
    x, eps = data_and_noise(DiffusionConfig(sigma_data=0.5))
    s = sigmas()
    noisy = ours.add_noise(x, eps, s)
    torch.testing.assert_close(stock.add_noise(x, eps, s), noisy, rtol=0, atol=0)
    torch.testing.assert_close(stock.scale_input(noisy, s), ours.scale_input(noisy, s), rtol=1e-12, atol=0)
    torch.testing.assert_close(stock.network_target(x, eps, s), -ours.network_target(x, eps, s), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(stock.combine(noisy, -eps, s), ours.combine(noisy, eps, s), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stock.effective_weight(s), ours.effective_weight(s), rtol=1e-12, atol=0)


def test_images_may_have_a_scale_of_their_own() -> None:
    config = DiffusionConfig(sigma_in=4.0, image_sigma_in=1.0)
    is_image = torch.tensor([True, False])
    both = edm.process(config, is_image)
    x, eps, output = torch.randn(3, 2, 3, 1, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for row, s_i in ((0, 1.0), (1, 4.0)):
        one = slice(row, row + 1)
        alone = edm.process(DiffusionConfig(sigma_in=s_i), is_image[one])
        arguments = x[one], eps[one], sigma[one]
        torch.testing.assert_close(both.add_noise(x, eps, sigma)[one], alone.add_noise(*arguments))
        torch.testing.assert_close(both.scale_input(x, sigma)[one], alone.scale_input(x[one], sigma[one]))
        torch.testing.assert_close(both.combine(x, output, sigma)[one], alone.combine(x[one], output[one], sigma[one]))
        torch.testing.assert_close(both.effective_weight(sigma)[one], alone.effective_weight(sigma[one]))
    shared = edm.share_noise(eps, is_image, config)
    torch.testing.assert_close(shared[0], eps[0, :1].expand(3, -1, -1, -1), rtol=0, atol=0)  # one frame's noise
    torch.testing.assert_close(shared[1], eps[1], rtol=0, atol=0)
    torch.testing.assert_close(edm.share_noise(eps, is_image, DiffusionConfig()), eps, rtol=0, atol=0)


@every_config
def test_it_is_stable_to_the_ends_in_float32_under_autocast(config: DiffusionConfig) -> None:
    wide = torch.logspace(-3, 3 + math.log10(config.sigma_in), 61, dtype=torch.float64)
    x, eps = data_and_noise(config)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = [
            process(config).scale_input(process(config).add_noise(x.float(), eps.float(), wide.float()), wide.float()),
            process(config).network_target(x.float(), eps.float(), wide.float()),
            process(config).effective_weight(wide.float()),
        ]
    exact = [
        process(config).scale_input(process(config).add_noise(x, eps, wide), wide),
        process(config).network_target(x, eps, wide),
        process(config).effective_weight(wide),
    ]
    for found, expected in zip(narrow, exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
def test_a_noise_level_that_is_not_positive_is_refused(value: float) -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"^sigma must be positive and finite, got {value}"):
        process(CONFIGS[0]).add_noise(x, x, torch.tensor([1.0, value]))


def test_values_that_are_not_finite_are_named_with_their_place() -> None:
    text = torch.zeros(2, 3)
    edm.check_finite("text", text)
    text[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"^text must be finite, got nan at \(1, 2\)"):
        edm.check_finite("text", text)
