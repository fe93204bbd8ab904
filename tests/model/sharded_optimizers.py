"""Run by test_lamb.py as one of some processes: optimisers on sharded parameters, as JSON by rank 0. Imports torch alone."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import optimizers
from model.lamb import LAMBConfig
from model.optimizers import AdamConfig, OptimizerConfig

STEPS = 4
LAMB = LAMBConfig(lr=0.02, weight_decay=0.1)
ADAM = AdamConfig(lr=0.02, weight_decay=0.1)


def network() -> nn.Module:
    """Rows 7, 3 and 1 over the processes: uneven shards, and biases of which some hold nothing."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1))
    with torch.no_grad():
        layers[0].weight.mul_(20)  # over the clamp of weight norms
        layers[1].bias.zero_()
    return layers


def gradients(step: int, layers: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in layers.parameters()]


def train(layers: nn.Module, config: OptimizerConfig) -> list[int]:
    """Four steps in the layers' precision; the number of collectives of each."""
    optimizer = optimizers.build(layers.parameters(), config)
    collectives = []
    for step in range(STEPS):
        for p, gradient in zip(layers.parameters(), gradients(step, layers), strict=True):
            mesh = getattr(p, "device_mesh", None)
            gradient = gradient.to(p.dtype)
            p.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, p.placements)
        with CommDebugMode() as counted:
            optimizer.step()
        collectives.append(counted.get_total_counts())
    return collectives


def train_sharded(layers: nn.Module, mesh: DeviceMesh, config: OptimizerConfig = LAMB) -> list[int]:
    for layer in layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(layers, mesh=mesh)
    return train(layers, config)


def worst(found: nn.Module, expected: nn.Module) -> float:
    """The largest relative distance of a whole parameter to the one that was never sharded."""
    pairs = zip(found.parameters(), expected.parameters(), strict=True)
    return max(float((p.full_tensor().double() - e.double()).norm() / e.double().norm()) for p, e in pairs)


def main() -> None:
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    alone, alone_low, alone_adam = network().double(), network().bfloat16(), network().double()
    result: dict[str, Any] = {"alone": train(alone, LAMB), "alone_adam": train(alone_adam, ADAM)}
    train(alone_low, LAMB)
    names = ("replicate", "shard")
    inner = 2 if world == 4 else world
    meshes = {
        "sharded": init_device_mesh("cpu", (world,)),
        "replicated": init_device_mesh("cpu", (world, 1), mesh_dim_names=names),
        "hybrid": init_device_mesh("cpu", (world // inner, inner), mesh_dim_names=names),
    }
    for name, mesh in meshes.items():
        layers, low, adam = network(), network().bfloat16(), network()
        collectives = train_sharded(layers, mesh)
        train_sharded(low, mesh)
        collectives_adam = train_sharded(adam, mesh, ADAM)
        result[name] = {
            "collectives": collectives,
            "collectives_adam": collectives_adam,
            "worst": worst(layers, alone),
            "worst_adam": worst(adam, alone_adam),
            "worst_low_precision": worst(low, alone_low),
            "local": [p.to_local().numel() for p in layers.parameters()],
        }
    locals_of_ranks: list[object] = [None] * world
    distributed.all_gather_object(locals_of_ranks, {name: result[name]["local"] for name in meshes})
    if rank == 0:
        print(json.dumps({**result, "locals": locals_of_ranks}), flush=True)
    distributed.barrier()
    os._exit(0)  # gloo now and then never returns from destroying this many groups


if __name__ == "__main__":
    main()
