"""The portable artefact of a trained stage: a folder that describes itself, published to and loaded from MLflow.

    model.safetensors    EMA weights, float32
    config.yaml          the resolved training config
    manifests.json       the manifests of the data it was trained on
    origin.json          git commit, run, step
    adapter/             only of a model trained by adapters: these, as the peft library writes them; the weights have them merged

Nothing in it needs pickle to be read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import config as configuration
from model.data.schema import Manifest, SchemaError
from model.denoiser import Denoiser, ModelConfig
from model.errors import UserError

WEIGHTS, CONFIG, MANIFESTS, ORIGIN = "model.safetensors", "config.yaml", "manifests.json", "origin.json"
ADAPTER = "adapter"
PREFIX = "network."  # of a network's weights among its denoiser's


@dataclass(frozen=True)
class Origin:
    """Where a published model comes from."""

    run: str  # name of the training run
    step: int  # optimiser steps
    commit: str  # git commit of the code


@dataclass(frozen=True)
class Published:
    """A loaded artefact."""

    denoiser: Denoiser
    manifests: dict[str, Manifest]  # "videos", "images"
    origin: Origin


@dataclass(frozen=True)
class Transfer:
    """What ``initialise_from`` did, by parameter name."""

    copied: list[str]
    adapted: list[str]  # of another shape in the source, from which the network knows how to make its own
    new: list[str]  # no such weight in the source, or of another shape
    unused: list[str]  # in the source only

    def __str__(self) -> str:
        named = {"adapted": self.adapted, "new": self.new, "unused": self.unused}
        parts = [f"copied {len(self.copied)} weights", *(f"{what} {', '.join(names)}" for what, names in named.items() if names)]
        return "; ".join(parts)


def gather(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one parameter at a time. Collective where the weights are sharded; only rank 0 keeps them."""
    keep = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    whole = {}
    for name, tensor in weights.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def write(folder: Path, weights: dict[str, Tensor], tree: dict[str, Any], manifests: dict[str, Manifest], origin: Origin) -> None:
    """Write the artefact. ``tree`` is the resolved training config, with the stage under ``model``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    described = {kind: asdict(manifest) for kind, manifest in manifests.items()}
    (folder / MANIFESTS).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (folder / ORIGIN).write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")


def load(folder: Path, device: str | torch.device = "cpu") -> Published:
    """Rebuild a stage from its artefact.

    Raises:
        UserError: a file is missing or broken, or the weights are not those of the config.
    """
    for name in (WEIGHTS, CONFIG, MANIFESTS, ORIGIN):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a published model, {name} is missing")
    model_config = configuration.build(ModelConfig, _read_stage(folder / CONFIG), where=str(folder / CONFIG))
    denoiser = Denoiser(model_config, device="meta")
    weights = _read_weights(folder / WEIGHTS)
    if differences := _differences(dict(denoiser.named_parameters()), weights):
        raise UserError(f"{folder / WEIGHTS}: not the weights of {CONFIG}: {differences}")
    denoiser.load_state_dict(weights, assign=True)
    return Published(
        denoiser.to(device).eval().requires_grad_(False), _read_manifests(folder / MANIFESTS), _read_origin(folder / ORIGIN)
    )


def _read_stage(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid yaml: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise UserError(f"{path}: not a training config, model is missing")
    return tree["model"]


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def _read_manifests(path: Path) -> dict[str, Manifest]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        return {kind: Manifest.from_tree(manifest, str(path)) for kind, manifest in described.items()}
    except SchemaError as error:
        raise UserError(str(error)) from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: not manifests by kind of data: {error}") from error


def _read_origin(path: Path) -> Origin:
    try:
        return Origin(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not an origin: {error}") from error


def _differences(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How ``found`` weights differ from a network's ``own``, each kind with one example; empty where they fit."""
    kinds = {
        "missing": [name for name in own if name not in found],
        "unknown": [name for name in found if name not in own],
        "of another shape": [name for name in own if name in found and own[name].shape != found[name].shape],
    }
    return ", ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items() if names)


def initialise_from(denoiser: Denoiser, folder: Path) -> Transfer:
    """Start from the weights of a published stage: copied where name and shape agree, else adapted where the network knows how.

    The rest keep their initialisation.

    Raises:
        UserError: ``folder`` is no published model, or of another kind of network.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a published model, {name} is missing")
    given = _read_weights(folder / WEIGHTS)
    stage = configuration.build(ModelConfig, _read_stage(folder / CONFIG), where=str(folder / CONFIG))
    network = denoiser.config.network
    if type(stage.network) is not type(network):
        raise UserError(f"{folder}: a {stage.network.kind}, which a {network.kind} cannot start from")
    own = dict(denoiser.named_parameters())
    sources = {name: given[name] for name, p in own.items() if name in given and given[name].shape == p.shape}
    copied = list(sources)
    adapted = denoiser.network.adapt({name.removeprefix(PREFIX): weight for name, weight in given.items()}, stage.network)
    sources |= {PREFIX + name: weight for name, weight in adapted.items() if PREFIX + name not in sources}
    with torch.no_grad():
        for name, weight in sources.items():
            own[name].copy_(weight)
    return Transfer(
        copied=copied,
        adapted=[name for name in sources if name not in set(copied)],
        new=[name for name in own if name not in sources],
        unused=[name for name in given if name not in own],
    )
