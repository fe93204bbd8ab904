"""FSDP2 under Composer: how parameters are sharded, and what gloo gets wrong."""

import torch
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def build_device() -> str:
    """Where this rank builds its network: rank 0 for real, the others on the meta device until sharding sends them weights."""
    return "cpu" if dist.get_global_rank() == 0 else "meta"


def parallelism() -> dict[str, FSDP2Config]:
    """Composer's ``parallelism_config``: FSDP2 with sharded checkpoints, at any number of processes."""
    return {"fsdp": FSDP2Config(state_dict_type="sharded")}


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
