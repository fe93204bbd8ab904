"""Networks by the type of their config, on the meta device and for real."""

import pytest
import torch
from torch import nn

from model.networks import catalogue
from model.networks.fit.network import FIT
from model.networks.unet.network import UNet


@pytest.mark.parametrize(("name", "expected"), [("tiny", FIT), ("tiny_unet", UNet)])
def test_the_meta_device_allocates_nothing(request: pytest.FixtureRequest, name: str, expected: type[nn.Module]) -> None:
    network = catalogue.build(request.getfixturevalue(name), "meta")
    assert type(network) is expected
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert list(network.buffers()) == []  # none that to_empty would leave undefined


@pytest.mark.parametrize("name", ["tiny", "tiny_unet"])
def test_a_seed_decides_all_weights(request: pytest.FixtureRequest, name: str) -> None:
    builds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        builds.append(catalogue.build(request.getfixturevalue(name)).state_dict())
    assert all(torch.equal(builds[0][name], builds[1][name]) for name in builds[0])
    assert not all(torch.equal(builds[0][name], builds[2][name]) for name in builds[0])
    assert all(weight.isfinite().all() for weight in builds[0].values())
