"""The portable artefact of a trained stage: a folder that describes itself, published to and loaded from MLflow.

    model.safetensors    EMA weights, float32
    config.yaml          the resolved training config
    manifests.json       the manifests of the data it was trained on
    origin.json          git commit, run, step

Nothing in it needs pickle to be read.
"""

import json
import logging
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import config as configuration
from model.config import UserError
from model.data.schema import Manifest
from model.denoiser import Denoiser, ModelConfig

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, MANIFESTS, ORIGIN = "model.safetensors", "config.yaml", "manifests.json", "origin.json"


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
    new: list[str]  # no such weight in the source, or of another shape
    unused: list[str]  # in the source only


def git_commit() -> str:
    """Commit of the running code; "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


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
        UserError: a file is missing or the weights are not those of the config.
    """
    for name in (WEIGHTS, CONFIG, MANIFESTS, ORIGIN):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: not a published model, {name} is missing")
    tree = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    model_config = configuration.build(ModelConfig, tree["model"], where=str(folder / CONFIG))
    denoiser = Denoiser(model_config, device="meta")
    try:
        weights = load_file(folder / WEIGHTS)
        denoiser.load_state_dict(weights, assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: {str(error).splitlines()[0]}") from error
    manifests = json.loads((folder / MANIFESTS).read_text(encoding="utf-8"))
    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    return Published(
        denoiser.to(device).eval().requires_grad_(False),
        {kind: Manifest.from_tree(manifest, str(folder / MANIFESTS)) for kind, manifest in manifests.items()},
        Origin(**origin),
    )


def initialise_from(denoiser: nn.Module, folder: Path) -> Transfer:
    """Copy the weights of a published stage wherever name and shape agree; the rest keep their initialisation."""
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: not a published model, {WEIGHTS} is missing")
    source = load_file(folder / WEIGHTS)
    own = dict(denoiser.named_parameters())
    copied = [name for name, p in own.items() if name in source and source[name].shape == p.shape]
    with torch.no_grad():
        for name in copied:
            own[name].copy_(source[name])
    return Transfer(copied, [name for name in own if name not in set(copied)], [name for name in source if name not in own])
