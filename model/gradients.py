"""Norms and clipping of tensors that may be sharded: local shards, and one all-reduce for all of them. Imports torch alone."""

import functools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_norms(params: Sequence[Tensor], *lists: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Norms (len(params),) of the whole parameters behind each list of local shards; one all-reduce for all of them."""
    norms = []
    for shards in lists:  # in float32 at least, also where the shards are not
        dtype = functools.reduce(torch.promote_types, {shard.dtype for shard in shards}, torch.float32)
        norms.append(torch.stack(torch._foreach_norm(list(shards), 2, dtype)).float())
    squares = torch.stack(norms) ** 2
    columns: dict[tuple[distributed.ProcessGroup, ...], list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        columns[_sharding_groups(p)].append(i)
    for groups, indices in columns.items():
        part = squares[:, indices]
        for group in groups:
            distributed.all_reduce(part, group=group)
        squares[:, indices] = part
    return tuple(squares.sqrt().unbind())


def _sharding_groups(p: Tensor) -> tuple[distributed.ProcessGroup, ...]:
    """The process groups over which a parameter is split; replicas need no sum."""
    if not isinstance(p, DTensor):
        return ()
    return tuple(p.device_mesh.get_group(dim) for dim, placement in enumerate(p.placements) if isinstance(placement, Shard))


def clip(gradients: Sequence[Tensor], norm: Tensor, bound: float) -> None:
    """Scale gradients of the whole ``norm`` to at most ``bound``, in place; without waiting for the device."""
    torch._foreach_mul_(list(gradients), (bound / (norm + 1e-6)).clamp(max=1.0))
