"""Name -> network: a plain dict, the only registry. A new architecture is one folder and one line here."""

from collections.abc import Callable

import torch

from model.networks.fit.config import FITConfig
from model.networks.fit.network import FIT
from model.networks.layers import reset_parameters
from model.networks.network import Network
from model.networks.unet.config import UNetConfig
from model.networks.unet.network import UNet

NetworkConfig = FITConfig | UNetConfig

NETWORKS: dict[type, Callable[..., Network]] = {FITConfig: FIT, UNetConfig: UNet}


def build(config: NetworkConfig, device: str | torch.device = "cpu") -> Network:
    """Build and initialise a network; on the meta device nothing is allocated or initialised."""
    with torch.device("meta"):
        network = NETWORKS[type(config)](config)
    if torch.device(device).type == "meta":
        return network
    network = network.to_empty(device=device)
    reset_parameters(network)
    return network
