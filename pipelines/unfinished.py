"""What a process has computed of its share of a long job, on the disk from time to time: a job that died goes on from there."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.ranks import Ranks

EVERY_SECONDS = 60.0


class Stateful(Protocol):
    """Sums or rows that grow."""

    def state(self) -> dict[str, Tensor]:
        """All of it, as it is now."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what ``state`` gave."""
        ...


class Unfinished:
    """The state of some parts after the first ``done`` items of this process's share.

    Args:
        folder: where files are kept.
        job: plain values on which the result depends; another job finds nothing.
        ranks: each process has a file of its own, good for as many processes only.
        parts: what is kept, always in the same order.
    """

    def __init__(self, folder: Path, job: Any, ranks: Ranks, parts: list[Stateful]) -> None:
        key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder / f"unfinished-{key}-{ranks.rank}-of-{ranks.world}.safetensors"
        self.parts = parts
        self.done = 0
        self._kept = time.monotonic()
        try:
            found = load_file(self.path) if self.path.is_file() else {}
        except SafetensorError:
            found = {}
        if "done" in found:
            self.done = int(found["done"])
            for number, part in enumerate(parts):
                prefix = f"{number}."
                part.restore({name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)})

    def advance(self, items: int) -> None:
        """``items`` more are done; from time to time, keep all."""
        self.done += items
        if time.monotonic() - self._kept >= EVERY_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write it, whole or not at all."""
        state = {f"{number}.{name}": value for number, part in enumerate(self.parts) for name, value in part.state().items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        save_file({**state, "done": torch.tensor(self.done)}, partial)
        partial.replace(self.path)
        self._kept = time.monotonic()

    def drop(self) -> None:
        """The job is finished."""
        self.path.unlink(missing_ok=True)
