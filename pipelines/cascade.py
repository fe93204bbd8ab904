"""The two-stage cascade, pulled from the registry: prompts -> low-resolution video -> high-resolution video (section 3.4)."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from model import checkpoint, long_video, registry, text
from model.checkpoint import Published
from model.codec import from_pixels, to_pixels
from model.denoiser import Denoiser
from model.diffusion.sampler import SamplerConfig
from model.errors import UserError
from model.generate import Known, Request, generate
from model.long_video import Window
from pipelines import watermark
from pipelines.prompts import blocked_by


@dataclass(frozen=True)
class CascadeConfig:
    """Which models to pull, and how to sample them."""

    stage1: str | None = "models:/snapvideo-stage1@candidate"  # or a folder; None: stage 2 alone, on clips that exist
    stage2: str | None = "models:/snapvideo-stage2@candidate"  # None: stage 1's result is the result
    tracking_uri: str = "sqlite:///runs/mlflow.db"  # of the registry
    text_encoder: str | None = None  # None: the one that the models' data manifest names
    stage1_sampler: SamplerConfig = field(default_factory=SamplerConfig)
    stage2_sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=40))
    corruption: float = 0.1  # std of the noise added to stage 1's result before it is upsampled
    frame_rate: float = 24.0  # frames per second of the clips; inf for still images
    resolution: tuple[int, int] = (288, 512)  # original height and width that the clips imitate
    frames: int | None = None  # of a clip; None: as many as stage 1 makes at once
    # Lower frame rates at which a longer clip is laid out first, rising; each divides the next, the last one frame_rate.
    hierarchy: tuple[float, ...] = ()
    reconstruction: float = 1.0  # weight of reconstruction guidance, by which frames fit those that exist
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products in the networks; the process itself stays in float32
    compile: bool = False  # torch.compile for the networks' blocks: minutes at first, then faster
    offload: bool = False  # keep each part (text encoder, stages) on the device only while it is at work
    upsampled_at_once: int | None = None  # clips of a batch that go through stage 2 together; None: all
    blocked: tuple[str, ...] = ()  # words and phrases: prompts that hold one are not served
    # Hidden in clips of 256x256 pixels and more (pipelines/watermark.py); null for clips that are to be measured.
    watermark: str | None = watermark.TEXT

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        if self.stage1 is None and self.stage2 is None:
            raise ValueError("stage1 or stage2 must name a model")
        if self.upsampled_at_once is not None and self.upsampled_at_once < 1:
            raise ValueError(f"upsampled_at_once must be at least 1, got {self.upsampled_at_once}")
        if self.watermark == "":
            raise ValueError("watermark must be a text, or null")
        if not (self.reconstruction >= 0 and math.isfinite(self.reconstruction)):
            raise ValueError(f"reconstruction must be finite and not negative, got {self.reconstruction}")
        if self.hierarchy:
            try:
                long_video.windows(1, 1, self.strides)
            except (ValueError, OverflowError, ZeroDivisionError) as error:
                raise ValueError(f"hierarchy {list(self.hierarchy)} must rise, each rate dividing the next") from error

    @property
    def strides(self) -> tuple[int, ...]:
        """Of the frame rates from the lowest to the clip's own, in its frames; 0 where one does not divide it."""
        ratios = [self.frame_rate / rate for rate in self.hierarchy]
        return (*(round(ratio) if abs(ratio - round(ratio)) < 1e-6 else 0 for ratio in ratios), 1)


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
        home = "cpu" if config.offload else device

        def pull(uri: str | None) -> Published | None:
            return None if uri is None else checkpoint.load(registry.fetch(uri, config.tracking_uri), home)

        self.stage1, self.stage2 = pull(config.stage1), pull(config.stage2)
        _require_fit(self.stage1, self.stage2, config)
        if config.compile:
            for stage in (self.stage1, self.stage2):
                if stage is not None:
                    stage.denoiser.network.compile_blocks()
        name, stage = (config.stage1, self.stage1) if self.stage1 else (config.stage2, self.stage2)
        assert stage is not None
        trained_with = next(iter(stage.manifests.values())).text
        path = config.text_encoder or trained_with.encoder
        self.encoder = text.TextEncoder(path, trained_with.max_tokens, home)
        found = text.revision(path)
        if found != trained_with.revision:
            wanted = f"{trained_with.revision} ({trained_with.encoder})"
            raise UserError(f"text encoder {path}: revision {found}, but {name} was trained with {wanted}")

    def to(self, device: str | torch.device) -> None:
        """Move both stages and the text encoder; those that are kept off the device go there for their work alone."""
        self.device = torch.device(device)
        if not self.config.offload:
            for stage in (self.stage1, self.stage2):
                if stage is not None:
                    stage.denoiser.to(device)
            self.encoder.to(device)

    @contextlib.contextmanager
    def at_work(self, part: Denoiser | text.TextEncoder) -> Iterator[None]:
        """Within, a part of the cascade is on the device and works in the configured precision; afterwards, where so configured,
        it is on the CPU."""
        lowered = self.config.precision == "bf16" and isinstance(part, Denoiser)
        precision = torch.autocast(self.device.type, torch.bfloat16) if lowered else contextlib.nullcontext()
        if self.config.offload:
            part.to(self.device)
        try:
            with precision:
                yield
        finally:
            if self.config.offload:
                part.to("cpu")

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        progress: Progress | None = None,
        given: Mapping[int, Image.Image] | None = None,
        settings: CascadeConfig | None = None,
    ) -> Clips:
        """Sample one clip per prompt. A clip depends on its prompt, its seed and the config alone, not on its neighbours.

        Args:
            prompts: B of them.
            seeds: one for each.
            progress: makes the bars.
            given: pictures that all clips hold, by the number of the frame; negative numbers count from the end.
            settings: others than those the cascade was made with; of its models nothing changes.

        Raises:
            UserError: given frames outside of the clip, or a prompt that is blocked or of more tokens than the models were
                trained with.
        """
        c = settings or self.config
        if self.stage1 is None:
            raise UserError("cascade.stage1 is null, so there are no clips for stage 2: name a first stage, or clips to upsample")
        stage1 = self.stage1.denoiser
        length = c.frames or stage1.config.network.size[0]
        low_given, high_given = self._given(given or {}, length, len(prompts))
        request = self._request(prompts, seeds, c)
        plan = long_video.windows(length, stage1.config.network.size[0], c.strides, low_given)

        def make(window: Window, known: Known | None) -> Tensor:
            bars = progress(_titled("stage 1", plan, window), c.stage1_sampler.steps) if progress else None
            told = replace(request, frame_rate=request.frame_rate / window.stride, known=known)
            return generate(stage1, told, c.stage1_sampler, bars)

        with self.at_work(stage1):
            low = long_video.generate(plan, length, low_given, c.reconstruction, make)
        high = low if self.stage2 is None else self._upsample(request, low, c, progress, high_given)
        return Clips(to_pixels(low).cpu(), _marked(high, c.watermark))

    def upsample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        low: Tensor,
        progress: Progress | None = None,
        settings: CascadeConfig | None = None,
    ) -> Clips:
        """Stage 2 alone: clips that exist, (B, T, C, h, w) in [-1, 1] at stage 1's size, and their captions.

        Raises:
            UserError: there is no stage 2, or a prompt as in ``sample``.
        """
        c = settings or self.config
        high = self._upsample(self._request(prompts, seeds, c), low.to(self.device), c, progress, {})
        return Clips(to_pixels(low).cpu(), _marked(high, c.watermark))

    def _request(self, prompts: Sequence[str], seeds: Sequence[int], c: CascadeConfig) -> Request:
        for prompt in prompts:
            if (entry := blocked_by(prompt, c.blocked)) is not None:
                raise UserError(f"prompt {prompt[:40]!r} is not served: it holds {entry!r}")
            tokens = self.encoder.num_tokens(prompt)
            if tokens > self.encoder.max_tokens:
                raise UserError(f"prompt {prompt[:40]!r}... has {tokens} tokens, the models take {self.encoder.max_tokens}")
        with self.at_work(self.encoder):
            states, mask = text.pad(self.encoder.encode(list(prompts)), self.encoder.max_tokens)
        return Request(
            text=states.to(self.device),
            text_mask=mask.to(self.device),
            frame_rate=torch.full((len(prompts),), c.frame_rate, device=self.device),
            resolution=torch.tensor([c.resolution] * len(prompts), dtype=torch.float32, device=self.device),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )

    def _upsample(
        self, request: Request, low: Tensor, c: CascadeConfig, progress: Progress | None, given: Mapping[int, Tensor]
    ) -> Tensor:
        """Stage 2: (B, T, C, h, w) -> (B, T, C, H, W), both in [-1, 1]; ``given`` frames are (B, C, H, W)."""
        if self.stage2 is None:
            raise UserError("cascade.stage2 is null, so nothing can be upsampled: name a second stage")
        stage2, length = self.stage2.denoiser, low.shape[1]
        plan = long_video.windows(length, stage2.config.network.size[0], (1,), given)
        at_once = c.upsampled_at_once or len(low)

        def upsampled(rows: slice) -> Tensor:
            some = _rows(request, rows)

            def make(window: Window, known: Known | None) -> Tensor:
                bars = progress(_titled("stage 2", plan, window), c.stage2_sampler.steps) if progress else None
                frames = low[rows, [min(number, length - 1) for number in window.frames]]
                told = replace(some, low_resolution=frames, corruption=c.corruption, known=known)
                return generate(stage2, told, c.stage2_sampler, bars)

            there = {number: picture[rows] for number, picture in given.items()}
            return long_video.generate(plan, length, there, c.reconstruction, make)

        with self.at_work(stage2):
            return torch.cat([upsampled(slice(start, start + at_once)) for start in range(0, len(low), at_once)])

    def _given(self, given: Mapping[int, Image.Image], length: int, clips: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Given pictures for stage 1 and for stage 2: (clips, C, H, W) in [-1, 1] by the number of the frame."""
        assert self.stage1 is not None
        low: dict[int, Tensor] = {}
        high: dict[int, Tensor] = {}
        for place, picture in given.items():
            if not -length <= place < length:
                raise UserError(f"given frame {place} lies outside of a clip of {length} frames")
            number = place % length
            if self.stage2 is None:
                low[number] = _picture(picture, self.stage1.denoiser).expand(clips, -1, -1, -1).to(self.device)
            else:
                high[number] = _picture(picture, self.stage2.denoiser).expand(clips, -1, -1, -1).to(self.device)
                low[number] = self.stage2.denoiser.downsample(high[number][:, None])[:, 0]
        return low, high


def _marked(video: Tensor, mark: str | None) -> Tensor:
    """(B, T, C, H, W) in [-1, 1] -> uint8 (B, T, H, W, C), with the watermark if there is to be one."""
    clips = to_pixels(video).cpu()
    if mark is None:
        return clips
    return torch.from_numpy(np.stack([watermark.embed(clip, mark) for clip in clips.numpy()]))


def _picture(picture: Image.Image, denoiser: Denoiser) -> Tensor:
    """(C, H, W) in [-1, 1] at the size of a stage: scaled to cover it, cropped at the centre, as data preparation does."""
    codec = denoiser.config.codec
    fitted = ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (codec.width, codec.height), Image.Resampling.BICUBIC)
    return from_pixels(torch.from_numpy(np.array(fitted)))


def _titled(stage: str, plan: Sequence[Window], window: Window) -> str:
    return stage if len(plan) == 1 else f"{stage}, window {plan.index(window) + 1} of {len(plan)}"


def _rows(request: Request, rows: slice) -> Request:
    tensors = {name: getattr(request, name)[rows] for name in ("text", "text_mask", "frame_rate", "resolution", "generators")}
    return replace(request, **tensors)


def _require_fit(stage1: Published | None, stage2: Published | None, config: CascadeConfig) -> None:
    if stage1 and stage1.denoiser.config.upsampler is not None:
        raise UserError(f"{config.stage1} is an upsampler: name a first stage as stage1")
    if stage2 and stage2.denoiser.config.upsampler is None:
        raise UserError(f"{config.stage2} is no upsampler: name a second stage as stage2")
    if not (stage1 and stage2):
        return
    low, high = stage1.denoiser.config, stage2.denoiser.config
    assert high.upsampler is not None
    made = (low.network.size[0], low.codec.height, low.codec.width)
    wanted = (high.network.size[0], high.codec.height // high.upsampler.factor, high.codec.width // high.upsampler.factor)
    if made != wanted:
        raise UserError(f"{config.stage1} makes {made} (frames, height, width), but {config.stage2} upsamples {wanted}")
    revisions = [{manifest.text.revision for manifest in stage.manifests.values()} for stage in (stage1, stage2)]
    if revisions[0] != revisions[1]:
        raise UserError(f"{config.stage1} and {config.stage2} were trained with different text encoders")
