"""Low-rank adapters (LoRA, Hu et al. 2021) by the peft library: beside a frozen linear layer W, trained B A of a small rank.

The layer computes ``W x + alpha / rank * B A x``. B starts at zero, so training starts from what the published model computes.
Adapted layers keep their places in the network, with ``base_layer``, ``lora_A.default`` and ``lora_B.default`` within, so blocks
are sharded, compiled and recomputed with their adapters.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from model.checkpoint import PREFIX
from model.denoiser import Denoiser, ModelConfig

PART = ".lora_"  # in the names of adapters' weights
ADAPTED, NAME = ".base_layer.", ".default."  # what injection puts into names: of adapted layers' own weights; of adapters'
PEFT_PREFIX = "base_model.model."  # in peft's files


@dataclass(frozen=True)
class AdaptersConfig:
    """Which linear layers get adapters, and how large these are."""

    rank: int = 16
    alpha: int = 16  # what an adapter adds is scaled by alpha / rank
    dropout: float = 0.0  # on an adapter's input
    targets: tuple[str, ...] = ("blocks.*",)  # patterns over the names of linear layers within the network; * spans dots

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 1:
            raise ValueError(f"rank and alpha must be positive, got {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


def linear_layers(denoiser: Denoiser) -> list[str]:
    """Names within the network of what can be adapted."""
    return [name for name, module in denoiser.network.named_modules() if type(module) is nn.Linear]


def inject(denoiser: Denoiser, layers: set[str], config: AdaptersConfig) -> None:
    """Put an adapter beside each of ``layers``; they alone train. A network on the meta device gets them there."""
    # In a module without a config of its own, which peft would take for a transformer's.
    inject_adapter_in_model(_peft_config(layers, config), nn.ModuleDict({PREFIX.rstrip("."): denoiser.network}))


def merged(weights: Mapping[str, Tensor], stage: ModelConfig, config: AdaptersConfig) -> dict[str, Tensor]:
    """The weights of the plain network that computes what the adapted one does: W + alpha / rank * B A.

    Args:
        weights: whole tensors of an adapted denoiser, by name; left as they are.
        stage: of the denoiser.
        config: of the adapters.
    """
    denoiser = Denoiser(stage, "meta")
    inject(denoiser, _adapted(weights), config)
    denoiser.load_state_dict(weights, assign=True)
    for module in denoiser.modules():
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)  # into a copy: the tensor may be the training's own
    own = denoiser.named_parameters()
    return {name.replace(ADAPTED, "."): p.detach().contiguous() for name, p in own if PART not in name}


def write(folder: Path, weights: Mapping[str, Tensor], config: AdaptersConfig) -> None:
    """Write the adapters as peft does: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    _peft_config(_adapted(weights), config).save_pretrained(str(folder))
    own = {PEFT_PREFIX + name.replace(NAME, "."): weight for name, weight in weights.items() if PART in name}
    save_file(own, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _adapted(weights: Iterable[str]) -> set[str]:
    """Names within the network of the layers that have adapters among ``weights``."""
    return {name.removeprefix(PREFIX).partition(PART)[0] for name in weights if PART in name}


def _peft_config(layers: set[str], config: AdaptersConfig) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        # One expression, which peft matches with whole names; of a list it would also take names that end so.
        target_modules=re.escape(PREFIX) + "(" + "|".join(re.escape(name) for name in sorted(layers)) + ")",
    )
