"""What a run tells its operator: a progress bar, and sample videos in MLflow."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from tqdm import tqdm

from model import media, text
from model.codec import to_pixels
from model.data import batch
from model.denoiser import Denoiser
from model.diffusion.sampler import SamplerConfig
from model.ema import EMA
from model.generate import Request, generate


@dataclass(frozen=True)
class SamplesConfig:
    """Sample videos during training, with EMA weights."""

    every: int = 5000  # steps; also at the end
    prompts: tuple[str, ...] = ()  # stage 1 samples these; an upsampler samples clips of the training batch instead
    frame_rate: float = 24.0
    resolution: tuple[int, int] = (288, 512)  # the original resolution to imitate: height, width
    seed: int = 0
    clips: int = 4  # of the training batch, for an upsampler
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=64))


class ProgressBar(Callback):
    """One bar for the whole run: steps, rate, time left, loss. Rank 0 only."""

    def __init__(self, name: str, steps: int) -> None:
        self.name = name
        self.steps = steps
        self.bar: tqdm[Any] | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_global_rank() == 0:
            done = int(state.timestamp.batch)
            self.bar = tqdm(total=self.steps, initial=done, desc=self.name, unit="step", mininterval=1.0, dynamic_ncols=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            loss = state.total_loss_dict.get("loss/train/total")
            if loss is not None:
                self.bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            self.bar.update()

    def close(self, state: State, logger: Logger) -> None:
        if self.bar is not None:
            self.bar.close()


class SampleVideos(Callback):
    """Writes sample clips (mp4) and a contact sheet to the MLflow run, under ``samples/step-N``.

    Prompts are spread over the ranks, and every rank makes as many calls, since a sharded network is gathered by all together.
    """

    def __init__(self, config: SamplesConfig, ema: EMA, encoder: str, max_tokens: int) -> None:
        self.config = config
        self.ema = ema
        self.encoder = encoder
        self.max_tokens = max_tokens
        self.states: list[torch.Tensor] = []
        self.last_step = -1

    def fit_start(self, state: State, logger: Logger) -> None:
        if self.config.prompts and not self.states:
            # The encoder is large and needed once: rank 0 loads it, the others receive the states.
            encoded: list[list[torch.Tensor]] = [[]]
            if dist.get_global_rank() == 0:
                encoded = [text.TextEncoder(self.encoder, self.max_tokens).encode(list(self.config.prompts))]
            dist.broadcast_object_list(encoded)
            self.states = encoded[0]

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) % self.config.every == 0:
            self._sample(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._sample(state, logger)

    def _sample(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step == self.last_step or getattr(state, "batch", None) is None:  # done already, or resumed at the end
            return
        self.last_step = step
        denoiser = state.model
        assert isinstance(denoiser, Denoiser)
        request, captions = self._request(state, denoiser)
        with self.ema.swapped(denoiser):
            video = generate(denoiser, request, self.config.sampler)
        clips: list[Any] = list(to_pixels(video).cpu().numpy())
        gathered = dist.all_gather_object(list(zip(captions, clips, strict=True)))
        if dist.get_global_rank() == 0:
            # Ranks beyond the number of prompts repeat the first ones, to keep step.
            unique = dict(pair for part in gathered for pair in part)
            self._log(unique, step, logger)

    def _request(self, state: State, denoiser: Denoiser) -> tuple[Request, list[str]]:
        device = state.device._device
        if denoiser.config.upsampler is not None:
            packed = batch.split(state.batch, self.config.clips)[0]  # packed again once the step is done
            clips = batch.unpack(state.device.batch_to_device(packed), denoiser.config.network.size[0])
            video = clips["video"]
            request = Request(
                text=clips["text"],
                text_mask=clips["text_mask"],
                frame_rate=clips["frame_rate"],
                resolution=clips["resolution"],
                generators=self._generators(range(len(video))),
                low_resolution=denoiser.downsample(video),
            )
            return request, clips["caption"]
        world, rank = dist.get_world_size(), dist.get_global_rank()
        per_rank = -(-len(self.states) // world)
        mine = [(rank * per_rank + i) % len(self.states) for i in range(per_rank)]
        states, mask = text.pad([self.states[i] for i in mine], self.max_tokens)
        request = Request(
            text=states.to(device),
            text_mask=mask.to(device),
            frame_rate=torch.full((per_rank,), self.config.frame_rate, device=device),
            resolution=torch.tensor([self.config.resolution] * per_rank, dtype=torch.float32, device=device),
            generators=self._generators(mine),
        )
        return request, [self.config.prompts[i] for i in mine]

    def _generators(self, indices: Iterable[int]) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(self.config.seed + i) for i in indices]

    def _log(self, clips: dict[str, np.ndarray], step: int, logger: Logger) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for i, frames in enumerate(clips.values()):
                media.write_mp4(Path(folder, f"clip-{i:02d}.mp4"), frames, self.config.frame_rate)
            media.write_contact_sheet(Path(folder, "sheet.png"), list(clips.values()), list(clips))
            for path in sorted(Path(folder).iterdir()):
                logger.upload_file(f"samples/step-{step:07d}/{path.name}", path)
