"""The two-stage cascade, pulled from the registry: prompts -> low-resolution video -> high-resolution video (section 3.4)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model import checkpoint, registry, text
from model.checkpoint import Published
from model.codec import to_pixels
from model.config import UserError
from model.diffusion.sampler import SamplerConfig
from model.generate import Request, generate


@dataclass(frozen=True)
class CascadeConfig:
    """Which models to pull, and how to sample them."""

    stage1: str = "models:/snapvideo-stage1@candidate"  # or a folder
    stage2: str | None = "models:/snapvideo-stage2@candidate"  # None: stage 1's result is the result
    tracking_uri: str = "sqlite:///runs/mlflow.db"  # of the registry
    text_encoder: str | None = None  # None: the one that the models' data manifest names
    stage1_sampler: SamplerConfig = field(default_factory=SamplerConfig)
    stage2_sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=40))
    corruption: float = 0.1  # std of the noise added to stage 1's result before it is upsampled
    frame_rate: float = 24.0  # frames per second of the clips; inf for still images
    resolution: tuple[int, int] = (288, 512)  # original height and width that the clips imitate


@dataclass(frozen=True)
class Clips:
    """B sampled clips, uint8 (B, T, H, W, C)."""

    low: Tensor  # stage 1's result
    high: Tensor  # the result: stage 2's, or stage 1's where there is no stage 2


# (stage name, number of steps) -> the iterable of steps, for a progress bar
Progress = Callable[[str, int], Iterable[int]]


class Cascade:
    """Both stages and the text encoder, ready to sample.

    Raises:
        UserError: a model or the text encoder cannot be had, or they do not belong together.
    """

    def __init__(self, config: CascadeConfig, device: str | torch.device) -> None:
        self.config = config
        self.device = torch.device(device)
        self.stage1 = checkpoint.load(registry.fetch(config.stage1, config.tracking_uri), device)
        self.stage2: Published | None = None
        if config.stage2:
            self.stage2 = checkpoint.load(registry.fetch(config.stage2, config.tracking_uri), device)
            _require_fit(self.stage1, self.stage2, config)
        trained_with = next(iter(self.stage1.manifests.values())).text
        path = config.text_encoder or trained_with.encoder
        self.encoder = text.TextEncoder(path, trained_with.max_tokens, device)
        found = text.revision(path)
        if found != trained_with.revision:
            raise UserError(
                f"text encoder {path}: revision {found}, but {config.stage1} was trained with {trained_with.revision} "
                f"({trained_with.encoder})"
            )

    def sample(self, prompts: Sequence[str], seeds: Sequence[int], progress: Progress | None = None) -> Clips:
        """Sample one clip per prompt. A clip depends on its prompt, its seed and the config alone, not on its neighbours."""
        c = self.config
        states, mask = text.pad(self.encoder.encode(list(prompts)), self.encoder.max_tokens)
        request = Request(
            text=states.to(self.device),
            text_mask=mask.to(self.device),
            frame_rate=torch.full((len(prompts),), c.frame_rate, device=self.device),
            resolution=torch.tensor([c.resolution] * len(prompts), dtype=torch.float32, device=self.device),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        steps = progress("stage 1", c.stage1_sampler.steps) if progress else None
        low = generate(self.stage1.denoiser, request, c.stage1_sampler, steps)
        if self.stage2 is None:
            return Clips(to_pixels(low).cpu(), to_pixels(low).cpu())
        upsampling = replace(request, low_resolution=low, corruption=c.corruption)
        steps = progress("stage 2", c.stage2_sampler.steps) if progress else None
        high = generate(self.stage2.denoiser, upsampling, c.stage2_sampler, steps)
        return Clips(to_pixels(low).cpu(), to_pixels(high).cpu())


def _require_fit(stage1: Published, stage2: Published, config: CascadeConfig) -> None:
    low, high = stage1.denoiser.config, stage2.denoiser.config
    if low.upsampler is not None:
        raise UserError(f"{config.stage1} is an upsampler: name a first stage as stage1")
    if high.upsampler is None:
        raise UserError(f"{config.stage2} is no upsampler: name a second stage as stage2")
    made = (low.network.size[0], low.codec.height, low.codec.width)
    wanted = (high.network.size[0], high.codec.height // high.upsampler.factor, high.codec.width // high.upsampler.factor)
    if made != wanted:
        raise UserError(f"{config.stage1} makes {made} (frames, height, width), but {config.stage2} upsamples {wanted}")
    revisions = [{manifest.text.revision for manifest in stage.manifests.values()} for stage in (stage1, stage2)]
    if revisions[0] != revisions[1]:
        raise UserError(f"{config.stage1} and {config.stage2} were trained with different text encoders")
