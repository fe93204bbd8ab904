"""Run by test_lamb.py as one of two processes: LAMB on sharded parameters, printed as JSON by rank 0. Imports torch alone."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from model.lamb import LAMB, LAMBConfig

STEPS = 4
CONFIG = LAMBConfig(lr=0.02, weight_decay=0.1)


def network() -> nn.Module:
    """Rows 7, 3 and 1 over two processes: uneven shards, and biases of which the second process holds nothing."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1))
    with torch.no_grad():
        layers[0].weight.mul_(20)  # over the clamp of weight norms
        layers[1].bias.zero_()
    return layers


def gradients(step: int, layers: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in layers.parameters()]


def train(layers: nn.Module) -> list[int]:
    """Four steps; the number of collectives of each."""
    optimizer = LAMB(layers.parameters(), CONFIG)
    collectives = []
    for step in range(STEPS):
        for p, gradient in zip(layers.parameters(), gradients(step, layers), strict=True):
            mesh = getattr(p, "device_mesh", None)
            p.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, p.placements)
        with CommDebugMode() as counted:
            optimizer.step()
        collectives.append(counted.get_total_counts())
    return collectives


def main() -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    alone = network()
    result = {"alone": train(alone)}
    meshes = {
        "sharded": init_device_mesh("cpu", (2,)),
        "replicated": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")),
        "hybrid": init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")),
    }
    for name, mesh in meshes.items():
        layers = network()
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(layers, mesh=mesh)
        local = [p.to_local().numel() for p in layers.parameters()]
        collectives = train(layers)
        whole = [p.full_tensor() for p in layers.parameters()]
        worst = max(float(((a - b).norm() / b.norm()).detach()) for a, b in zip(whole, alone.parameters(), strict=True))
        result[name] = {"collectives": collectives, "worst": worst, "local": local}
    locals_of_ranks: list[object] = [None, None]
    distributed.all_gather_object(locals_of_ranks, {name: result[name]["local"] for name in meshes})
    if rank == 0:
        print(json.dumps({**result, "locals": locals_of_ranks}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
