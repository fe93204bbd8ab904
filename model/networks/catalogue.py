"""Name -> network: a plain dict, the only registry. A new architecture is one folder and one line here."""

import torch
from torch import nn

from model.networks.fit.config import FITConfig
from model.networks.fit.network import FIT
from model.networks.layers import reset_parameters

NetworkConfig = FITConfig  # a union, once there are more

NETWORKS: dict[type, type[nn.Module]] = {FITConfig: FIT}


def build(config: NetworkConfig, device: str | torch.device = "cpu") -> nn.Module:
    """Build and initialise a network; on the meta device nothing is allocated or initialised."""
    with torch.device("meta"):
        network = NETWORKS[type(config)](config)
    if torch.device(device).type == "meta":
        return network
    network = network.to_empty(device=device)
    reset_parameters(network)
    return network
