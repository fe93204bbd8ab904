"""What the tests of networks share. Those that build networks run on any device, and need neither Composer nor yaml:

    TEST_DEVICE=cuda python -m pytest -m device --confcutdir=tests/model tests/model/networks tests/model/diffusion

``bench/gpu.py`` runs them so. What is of the CPU alone is marked ``cpu_only``.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.networks import catalogue
from model.networks.catalogue import NetworkConfig
from model.networks.fit.config import FITConfig
from model.networks.fit.network import FIT
from model.networks.network import Network


@pytest.fixture
def loud(device: torch.device) -> Callable[[nn.Module], nn.Module]:
    """``loud(module)``: in float64, so that what must not matter differs by nothing but rounding, with every parameter away from
    its neutral value and from zero."""

    def prepare(module: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for p in module.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.5 if p.ndim == 1 else 1 / math.sqrt(p[0].numel()))
            else:
                nn.init.uniform_(p, 0.5, 1.5)  # means and spreads
        return module.to(device).double()

    return prepare


@pytest.fixture
def build(loud: Callable[[nn.Module], nn.Module]) -> Callable[[NetworkConfig], Network]:
    """``build(config)``: the network, loud."""
    return lambda config: loud(catalogue.build(config))


@pytest.fixture
def build_fit(device: torch.device) -> Callable[[FITConfig], FIT]:
    """``build_fit(config)``: as it starts, but in float64, so that what must not matter differs by nothing but rounding, and with
    self-conditioning heard."""

    def build_fit(config: FITConfig) -> FIT:
        torch.manual_seed(0)
        network = catalogue.build(config, device)
        assert isinstance(network, FIT)
        nn.init.normal_(network.self_conditioning_norm.weight)
        return network.double()

    return build_fit


@pytest.fixture
def video(device: torch.device) -> Callable[[int, NetworkConfig], Tensor]:
    """``video(batch, config)``: noise of the size that the network takes."""

    def draw(batch: int, config: NetworkConfig) -> Tensor:
        frames, height, width = config.size
        shape, rng = (batch, frames, 3, height, width), torch.Generator().manual_seed(1)
        return torch.randn(shape, dtype=torch.float64, generator=rng, device="cpu").to(device)

    return draw
