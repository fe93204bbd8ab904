"""What the processes of a job that Composer's launcher started share: who they are, and sums."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Ranks:
    """This process among ``world`` of them."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls) -> "Ranks":
        """Join the others, if there are any. Collectives may be days apart: processes work through their shares alone."""
        ranks = cls(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
        if ranks.world > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        return ranks

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place; a tensor on the CPU."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def most(self, value: int) -> int:
        """The largest among all processes."""
        if self.world == 1:
            return value
        largest = torch.tensor(value)
        distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        return int(largest)

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            distributed.barrier()


def default_device() -> str:
    """A GPU if there is one: of several processes, each its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
