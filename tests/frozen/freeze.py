"""Freeze a small published model of every kind, as this commit publishes it: ``python tests/frozen/freeze.py FOLDER``.

Each is a whole artefact, with the resolved config of a shipped yaml in miniature, and ``expected.safetensors``: what it samples,
its losses at fixed noise, and its losses while it is fine-tuned for three steps. Later versions must load it and do the same
(test_frozen.py). Run it once for a version of the artefact, into a folder of that version's name, and never again.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model import adapters, checkpoint, config, finetuning, provenance
from model.checkpoint import Origin
from model.data.schema import Manifest, TextManifest
from model.denoiser import Denoiser
from model.diffusion.sampler import SamplerConfig
from model.generate import Request, generate
from model.networks.conditioning import TextStandard
from model.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
FIT = [
    "model.network.patch_width=16", "model.network.latent_width=16", "model.network.blocks=1", "model.network.global_layers=1",
    "model.network.patch_head_width=8", "model.network.latent_head_width=8", "model.network.conditioning_width=16",
    "model.network.text_width=8", "data.frames=4", "data.max_tokens=4", "evaluation=null", "initialise_from=null",
]  # fmt: skip
LOW = ["model.network.size=[4,8,16]", "model.codec.height=6", "model.codec.width=16", "model.codec.pad_bottom=2"]
HIGH = ["model.network.size=[4,12,32]", "model.codec.height=12", "model.codec.width=32", "model.codec.pad_bottom=0"]
HIGH += ["model.upsampler.factor=2", "model.network.group=[4,3,2]", "model.network.latent_tokens=8"]
UNET = [
    "model.network.base_width=32", "model.network.multipliers=[1]", "model.network.residual_blocks=1",
    "model.network.attention_factors=[1]", "model.network.head_width=16", "model.network.conditioning_width=16",
    "model.network.text_width=8", "data.frames=4", "data.max_tokens=4", "evaluation=null",
]  # fmt: skip
KINDS = {
    "stage1": ("yamls/stage1.yaml", [*FIT, *LOW, "model.network.group=[4,2,2]", "model.network.latent_tokens=4"]),
    "stage2": ("yamls/stage2.yaml", [*FIT, *HIGH]),
    "demo-stage1": (
        "yamls/demo/stage1.yaml",
        [*FIT, *LOW, "model.network.group=[4,1,1]", "model.network.latent_tokens=8", "model.network.clip_width=8"],
    ),
    "demo-stage2": ("yamls/demo/stage2.yaml", [*FIT, *HIGH, "model.network.patch=[1,4,4]"]),
    "unet": ("yamls/unet_284m.yaml", [*UNET, *LOW]),
    "lora": (
        "yamls/finetune_lora.yaml",
        [*FIT, *LOW, "model.network.group=[4,2,2]", "model.network.latent_tokens=4", "initialise_from=x", "finetune.lora.rank=2"],
    ),
}
TOKENS = 4


def told(denoiser: Denoiser) -> dict[str, Tensor]:
    """Two captions' states and all else that a sampler tells."""
    width = denoiser.config.network.text_width
    return {
        "text": torch.randn(2, TOKENS, width, generator=torch.Generator().manual_seed(1)),
        "text_mask": torch.tensor([[True, True, True, False], [True] * TOKENS]),
        "frame_rate": torch.tensor([8.0, float("inf")]),
        "resolution": torch.tensor([[36.0, 64.0], [720.0, 1280.0]]),
    }


def batch(denoiser: Denoiser) -> dict[str, object]:
    """Two clips to train on."""
    codec, frames = denoiser.config.codec, denoiser.config.network.size[0]
    shape, rng = (2, frames, 3, codec.height, codec.width), torch.Generator().manual_seed(2)
    return {**told(denoiser), "video": torch.rand(shape, generator=rng) * 2 - 1, "seed": [5, 6]}


@torch.no_grad()
def sampled(denoiser: Denoiser) -> Tensor:
    """(2, T, C, H, W) clips, with guidance."""
    c, low = denoiser.config, None
    if c.upsampler:
        size = (2, c.network.size[0], 3, c.codec.height // c.upsampler.factor, c.codec.width // c.upsampler.factor)
        low = torch.rand(size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    request = Request(**told(denoiser), generators=generators, low_resolution=low, corruption=0.1 if low is not None else 0.0)
    return generate(denoiser, request, SamplerConfig(steps=3, guidance=2.0))


def tuned(denoiser: Denoiser) -> Tensor:
    """(3, 2) the losses of two clips at fixed noise, over three steps of AdamW on all weights."""
    trained = [p for name, p in denoiser.named_parameters() if ".standard." not in name]
    for p in trained:
        p.requires_grad_()
    optimizer, sigma, losses = torch.optim.AdamW(trained, lr=1e-3), torch.tensor([0.3, 2.0]), []
    denoiser.eval()
    for _ in range(3):
        loss = denoiser.loss_at(batch(denoiser), sigma)
        losses.append(loss.detach())
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def loud(denoiser: Denoiser, names: Iterable[str] = ()) -> None:
    """Weights of which none is zero, as after training; ``names`` alone, where some are given."""
    torch.manual_seed(0)
    for name, p in denoiser.named_parameters():
        if not names or name in names:
            nn.init.normal_(p, std=0.5 if p.ndim == 1 else p[0].numel() ** -0.5)
    for module in denoiser.modules():
        if isinstance(module, TextStandard):
            nn.init.uniform_(module.spread, 0.5, 1.5)


def freeze(folder: Path, yaml: str, overrides: list[str]) -> None:
    """Write one artefact and what is expected of it."""
    c = config.load(TrainConfig, ROOT / yaml, overrides)
    denoiser = Denoiser(c.model)
    loud(denoiser)
    lora = c.finetune.lora if c.finetune else None
    weights = dict(denoiser.named_parameters())
    if c.finetune and lora:
        finetuning.prepare(denoiser, c.finetune)
        loud(denoiser, [name for name, _ in denoiser.named_parameters() if adapters.PART in name])
        weights = dict(denoiser.named_parameters())
    plain = adapters.merged(weights, c.model, lora) if lora else {name: p.detach() for name, p in weights.items()}
    text = TextManifest("models/t5-11b", "0" * 16, c.data.text_width, "bfloat16", c.data.max_tokens)
    videos = Manifest("videos", c.data.height, c.data.width, 24.0, 24, "raw", 8, text)
    manifests = {"videos": videos, "images": replace(videos, kind="images")}
    checkpoint.write(folder, plain, config.to_tree(c), manifests, Origin(c.name, 3, provenance.git_commit()))
    if lora:
        adapters.write(folder / checkpoint.ADAPTER, weights, lora)
    loaded = checkpoint.load(folder).denoiser
    save_file({"sample": sampled(loaded), "losses": tuned(loaded)}, folder / "expected.safetensors")


if __name__ == "__main__":
    for kind, (yaml, overrides) in KINDS.items():
        freeze(Path(sys.argv[1], kind), yaml, overrides)
