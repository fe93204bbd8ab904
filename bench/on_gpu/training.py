"""The paper's training loop for one device, without Composer: what the parts "learning" and "precision" of the bench share."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.on_gpu.scenes import Batches
from model import optimizers
from model.denoiser import Denoiser, ModelConfig
from model.diffusion import edm
from model.gradients import clip, whole_norms
from model.lamb import LAMBConfig
from model.networks.conditioning import Conditioning
from pipelines.denoising import squared_error

NOISE = (1.0, 2.0, 4.0, 8.0, 16.0)  # sigma times sigma_in, at which the errors of D are measured


@dataclass(frozen=True)
class Recipe:
    """Table 9, cut down to minutes. The paper does not say where it clips; 0.5 is the first author's later code's."""

    batch: int = 128
    image_share: float = 0.5  # of each batch, as 2048 videos and 2048 images are
    optimizer: LAMBConfig = field(default_factory=LAMBConfig)  # a rate of 5e-3, betas of 0.9 and 0.99, a decay of 0.01
    warmup: int = 200  # steps
    clip_norm: float = 0.5
    half_life: float = 0.05  # of the average of the weights, as a share of the steps so far


class Training:
    """A model, its optimiser and the average of its weights. What is drawn depends on the number of the step alone.

    Args:
        model: what is trained.
        recipe: how.
        batches: on what, and on which device.
        precision: in which autocast computes; None: float32. Weights are float32.
        compiled: whether torch.compile makes the kernels of the network's blocks.
    """

    def __init__(
        self, model: ModelConfig, recipe: Recipe, batches: Batches, precision: torch.dtype | None, compiled: bool
    ) -> None:
        self.recipe, self.batches, self.precision = recipe, batches, precision
        self.device = batches.clips.frames.device
        torch.manual_seed(0)
        self.denoiser, self.average = Denoiser(model, self.device), Denoiser(model, self.device)
        self.average.load_state_dict(self.denoiser.state_dict())
        if compiled:
            self.denoiser.network.compile_blocks()
        self.weights: list[Tensor] = list(self.denoiser.parameters())
        self.averaged: list[Tensor] = list(self.average.parameters())
        self.optimizer = optimizers.build(self.weights, recipe.optimizer)
        self.rng = torch.Generator().manual_seed(0)
        self.steps = 0

    def step(self, progress: float) -> Tensor:
        """One step.

        Args:
            progress: the share of the training that is over, by which a cosine takes the learning rate down to zero.

        Returns:
            () the loss, for which the device need not be waited.
        """
        rising = min(1.0, (self.steps + 1) / self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * rising * (1 + math.cos(math.pi * min(1.0, progress))) / 2
        batch = self.batches.draw(self.recipe.batch, self.rng, self.recipe.image_share)
        self.denoiser.train()
        # Without its cache: torch 2.7 has one that would hand the training pass the casts that the first pass made without
        # gradients (pytorch issue 112583), and hardly a weight would train.
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None, cache_enabled=False):
            terms = self.denoiser(batch)
        loss = self.denoiser.loss(terms, batch)
        loss.backward()
        trained = [p for p in self.weights if p.grad is not None]
        gradients = [p.grad for p in trained if p.grad is not None]
        clip(gradients, whole_norms(trained, gradients)[0].norm(), self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        half_life = max(1.0, self.recipe.half_life * self.steps)
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.weights, 1 - 0.5 ** (1 / half_life))
        return loss.detach()


@torch.no_grad()
def errors(denoiser: Denoiser, clips: Batches, number: int, other_captions: bool = False) -> dict[str, float]:
    """Mean of (D - x)^2 on the first clips at each level of ``NOISE``: the same noise for every model, float32.

    With ``other_captions`` each is told that of the next clip: what the error grows by is what the caption says.
    """
    denoiser.eval()
    batch = clips.videos(range(number))
    shift = 1 if other_captions else 0
    text, mask = batch["text"].roll(shift, dims=0), batch["text_mask"].roll(shift, dims=0)
    x = denoiser.codec.encode(batch["video"])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    found = {}
    for level in NOISE:
        sigma = torch.full((number,), level / denoiser.config.diffusion.sigma_in, device=x.device)
        told = Conditioning(edm.c_noise(sigma), text, mask, batch["frame_rate"], batch["resolution"])
        found[f"{level:g}"] = float(squared_error(denoiser, x, eps, sigma, told).mean())
    return found
