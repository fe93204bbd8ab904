"""Train part of a published model, or adapters to it; the rest stays as it is to the bit.

Patterns are those of a shell, over the names of parameters within the network (``blocks.0.read.query.weight``): ``*`` also spans
dots.
What does not train takes no gradient, no optimiser state and no average.
"""

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from model import adapters
from model.adapters import AdaptersConfig
from model.checkpoint import PREFIX
from model.denoiser import Denoiser
from model.errors import UserError


@dataclass(frozen=True)
class FinetuneConfig:
    """What trains: what matches a pattern of ``trainable`` and none of ``freeze``; with ``lora``, adapters alone."""

    trainable: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()
    lora: AdaptersConfig | None = None

    def __post_init__(self) -> None:
        if self.lora and (self.trainable, self.freeze) != (("*",), ()):
            raise ValueError("finetune.lora trains adapters alone, so trainable and freeze must be left out")


@dataclass(frozen=True)
class Share:
    """How much of a network trains."""

    trained: int  # parameters
    total: int

    @classmethod
    def of(cls, params: Iterable[Tensor]) -> "Share":
        """Count ``params``."""
        counts = [(p.numel(), p.requires_grad) for p in params]
        return cls(sum(size for size, trains in counts if trains), sum(size for size, _ in counts))

    def __str__(self) -> str:
        return f"trains {self.trained:,} of {self.total:,} parameters ({self.trained / self.total:.2%})"


def prepare(denoiser: Denoiser, config: FinetuneConfig, new: Collection[str] = ()) -> Share:
    """Freeze what is not to train, add what is. Call it before sharding, on every process, also where the network is on "meta".

    Args:
        denoiser: changed in place.
        config: what trains.
        new: names of the denoiser's parameters that the published model had nothing for (``checkpoint.Transfer.new``).

    Raises:
        UserError: a pattern that matches nothing, nothing left to train, or frozen parameters without published values.
    """
    own = dict(denoiser.network.named_parameters())
    chosen: set[str] = set()
    if config.lora is None:
        chosen = matching(own, config.trainable, "finetune.trainable") - matching(own, config.freeze, "finetune.freeze")
        if not chosen:
            raise UserError("finetune: nothing is left to train: finetune.freeze names all of finetune.trainable")
    if random := [name.removeprefix(PREFIX) for name in new if name.removeprefix(PREFIX) not in chosen]:
        raise UserError(
            f"finetune: {random[0]}, one of {len(random)} parameters that the published model lacks, would stay random: "
            "let it train (finetune.trainable), or start from a model that has it"
        )
    if config.lora:
        layers = matching(adapters.linear_layers(denoiser), config.lora.targets, "finetune.lora.targets")
        if not layers:
            raise UserError("finetune: nothing is left to train: finetune.lora.targets is empty")
        adapters.inject(denoiser, layers, config.lora)
        return Share.of(denoiser.parameters())
    for name, p in own.items():
        p.requires_grad_(p.requires_grad and name in chosen)  # what never trains (TextStandard) does not here either
    return Share.of(denoiser.parameters())


def matching(names: Iterable[str], patterns: Iterable[str], key: str) -> set[str]:
    """The names that match any of the patterns.

    Args:
        names: dotted.
        patterns: each must match something.
        key: of the config, for errors.

    Raises:
        UserError: a pattern that matches nothing; names the nearest.
    """
    names, found = list(names), set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            near = ", ".join(_near(pattern, names))
            raise UserError(f"{key}: {pattern!r} matches no name in the network; the nearest are {near}")
        found |= matched
    return found


def _near(pattern: str, names: list[str]) -> list[str]:
    """Names, and patterns of whole modules, that look like a pattern."""
    parts = [name.split(".") for name in names]
    modules = {".".join(path[:depth]) + ".*" for path in parts for depth in range(1, len(path))}
    return difflib.get_close_matches(pattern, [*names, *sorted(modules)], n=3, cutoff=0.0)
