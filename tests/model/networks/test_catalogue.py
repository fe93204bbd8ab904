"""Networks by the type of their config, on the meta device and for real."""

import torch

from model.networks import catalogue
from model.networks.fit.network import FIT


def test_the_meta_device_allocates_nothing(tiny) -> None:
    network = catalogue.build(tiny, "meta")
    assert isinstance(network, FIT)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert list(network.buffers()) == []  # none that to_empty would leave undefined


def test_a_seed_decides_all_weights(tiny) -> None:
    builds = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        builds.append(catalogue.build(tiny).state_dict())
    assert all(torch.equal(builds[0][name], builds[1][name]) for name in builds[0])
    assert not all(torch.equal(builds[0][name], builds[2][name]) for name in builds[0])
    assert all(weight.isfinite().all() for weight in builds[0].values())
