"""The optimisers by the kind that a yaml names; Adam against its equations."""

from typing import Any

import pytest
import torch

from model import optimizers
from model.lamb import LAMB, LAMBConfig
from model.optimizers import AdamConfig


def test_the_kind_decides() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    built = optimizers.build([weight], LAMBConfig(lr=0.3))
    assert isinstance(built, LAMB)
    assert built.param_groups[0]["lr"] == 0.3


def test_adam_is_kingma_and_ba_with_decoupled_decay() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3, dtype=torch.float64)
    gradients = torch.randn(5, 4, 3, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    optimizer = optimizers.build([weight], AdamConfig(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.5))
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()

    expected, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        update = (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)
        expected = expected - 0.02 * update - 0.02 * 0.5 * expected
    torch.testing.assert_close(weight.data, expected)


def test_adams_defaults_are_table_9s() -> None:
    c = AdamConfig()
    assert (c.lr, c.betas, c.weight_decay) == (1e-4, (0.9, 0.999), 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr": 0.0}, "lr must be positive"), ({"betas": (0.9, 1.0)}, "betas must be in"), ({"eps": 0.0}, "eps must be positive")],
)
def test_impossible_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamConfig(**options)
