"""FSDP2 under Composer: how parameters are sharded, and what gloo gets wrong."""

from dataclasses import dataclass

import torch
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from model.errors import UserError


@dataclass(frozen=True)
class ShardingConfig:
    """Over how many processes one copy of weights, moments and averages is spread."""

    # null: over all (FSDP). A number, as a rule the GPUs of a node: so many share a copy, and the copies are kept equal (HSDP):
    # weights are gathered within a node, and only gradients cross between nodes.
    processes: int | None = None
    blocks: bool = True  # gather each block's weights on its own; false: the network's as one, quicker where they are few
    reshard: bool = True  # free a block's gathered weights after its forward pass, and gather them again for its backward pass

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")


def build_device() -> str:
    """Where this rank builds its network: rank 0 for real, the others on the meta device until sharding sends them weights."""
    return "cpu" if dist.get_global_rank() == 0 else "meta"


def parallelism(config: ShardingConfig) -> dict[str, FSDP2Config]:
    """Composer's ``parallelism_config``: FSDP2 with sharded checkpoints, at any number of processes.

    Raises:
        UserError: the processes do not split into groups of the configured size, or copies are wanted on CPUs.
    """
    world, mesh = dist.get_world_size(), None
    if config.processes is not None and config.processes < world:
        if world % config.processes:
            raise UserError(f"sharding.processes: {world} processes do not split into groups of {config.processes}")
        if torch.distributed.get_backend() == "gloo":  # FSDP2 averages copies' gradients, which gloo refuses to do
            raise UserError("sharding.processes: copies of the weights need GPUs; on CPUs, leave it null")
        names = ("dp_replicate", "dp_shard")
        mesh = init_device_mesh("cuda", (world // config.processes, config.processes), mesh_dim_names=names)
    return {"fsdp": FSDP2Config(device_mesh=mesh, reshard_after_forward=config.reshard, state_dict_type="sharded")}


def average_gradients_on_gloo(model: nn.Module) -> None:
    """Make FSDP2 average gradients on the CPU as it does on GPUs. Call once, after the Trainer has sharded ``model``.

    gloo's reduce-scatter ignores AVG and sums, so gradients come out world_size times too large: unnoticed by Adam, wrong for
    clipping and for LAMB's moments.
    """
    if torch.distributed.get_backend() != "gloo":
        return
    world = dist.get_world_size()

    def average(gradient: Tensor) -> None:
        gradient.div_(world)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(average)
