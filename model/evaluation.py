"""The loss by noise band and kind of media, on samples held out of training, with the averaged weights and fixed noise.

The training loss is a mean over noise levels that differ by orders of magnitude in difficulty, drawn anew each step: it says
little. Here the same samples meet the same noise at the same levels every time.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, cast

import torch
from composer.core import Callback, DataSpec, State, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from tqdm import tqdm

from model.data import batch
from model.data.batch import Batch, Sample
from model.data.dataset import JointLoader
from model.data.samples import derived_seed
from model.data.schema import Kind
from model.denoiser import Denoiser
from model.diffusion.edm import DiffusionConfig
from model.ema import EMA


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation during training. Its samples, the last of each dataset, are never trained on."""

    every: int = 5000  # steps; also at the end
    videos: int = 64  # held out
    images: int = 64
    bands: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)  # sigma between one band and the next; the outermost bands are open
    levels: int = 2  # of sigma in each band, at equally probable places of the training distribution
    batch: int = 8  # samples per process at once

    def __post_init__(self) -> None:
        for name, least in {"every": 1, "videos": 0, "images": 0, "levels": 1, "batch": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.videos + self.images == 0:
            raise ValueError("videos and images are both 0: there is nothing to evaluate")
        edges = (0.0, *self.bands, math.inf)
        if any(not low < high for low, high in itertools.pairwise(edges)):
            raise ValueError(f"bands must be positive and rise, got {list(self.bands)}")

    @property
    def held_out(self) -> dict[Kind, int]:
        """How many samples of each kind are held out."""
        return {"videos": self.videos, "images": self.images}


@dataclass(frozen=True)
class Band:
    """A range of noise levels."""

    name: str
    share: float  # of the samples in training whose sigma lies in it
    sigmas: tuple[float, ...]  # at which the loss is taken


def noise_bands(config: EvaluationConfig, diffusion: DiffusionConfig) -> tuple[Band, ...]:
    """The bands, from clean to noisy. Their losses, weighted by their shares, estimate the training loss."""
    training = NormalDist(diffusion.log_sigma_mean, diffusion.log_sigma_std)
    edges = [0.0, *config.bands, math.inf]
    bands = []
    for low, high in itertools.pairwise(edges):
        below = training.cdf(math.log(low)) if low else 0.0
        share = (training.cdf(math.log(high)) if high < math.inf else 1.0) - below
        if share < 1e-9:
            raise ValueError(f"bands: training draws no sigma between {low:g} and {high:g}")
        places = [below + share * (i + 0.5) / config.levels for i in range(config.levels)]
        name = (
            f"sigma_below_{high:g}" if not low else f"sigma_above_{low:g}" if high == math.inf else f"sigma_{low:g}_to_{high:g}"
        )
        bands.append(Band(name, share, tuple(math.exp(training.inv_cdf(place)) for place in places)))
    return tuple(bands)


@torch.no_grad()
def band_losses(denoiser: Denoiser, clips: Batch, bands: Sequence[Band]) -> Tensor:
    """Losses (bands, B) of clips, each the mean over its band's levels. Noise depends on each clip's seed and the level alone.

    Raises:
        ValueError: see ``Denoiser.forward``.
    """
    losses = torch.zeros(len(bands), len(clips["seed"]), device=clips["video"].device)
    number = 0
    for row, band in zip(losses, bands, strict=True):
        for sigma in band.sigmas:
            noisy = cast(dict[str, Any], {**clips, "seed": [derived_seed(seed, number) for seed in clips["seed"]]})
            row += denoiser.loss_at(noisy, torch.full_like(row, sigma)) / len(band.sigmas)
            number += 1
    return losses


@dataclass(frozen=True)
class Place:
    """One sample in a process's share of the set."""

    kind: Kind
    index: int  # among those held out of its kind
    counts: bool  # False for one that another process evaluates: it keeps this one in step


def share(counts: dict[Kind, int], rank: int, world: int) -> list[Place]:
    """A process's part of the set; as many for each, since a sharded network is gathered by all together."""
    every = [(kind, index) for kind, count in counts.items() for index in range(count)]
    rounds = -(-len(every) // world)
    mine = [number * world + rank for number in range(rounds)]
    return [Place(*every[number % len(every)], counts=number < len(every)) for number in mine]


def report(sums: Tensor, counts: Sequence[int], kinds: Sequence[Kind], bands: Sequence[Band]) -> dict[str, float]:
    """Metrics from the ``sums`` (kinds, bands) of losses over ``counts`` samples of each kind."""
    metrics = {}
    for kind, row, count in zip(kinds, sums.tolist(), counts, strict=True):
        for band, total in zip(bands, row, strict=True):
            metrics[f"{kind}/{band.name}"] = total / count
        metrics[f"{kind}/total"] = sum(band.share * total / count for band, total in zip(bands, row, strict=True))
    return metrics


class Evaluation(Callback):
    """Logs ``eval/loss/KIND/BAND`` and ``eval/loss/KIND/total``; of other averages, ``eval/ema_HALF-LIFE/loss/...``.

    The training weights and the random state stay what they are.
    """

    def __init__(self, config: EvaluationConfig, ema: EMA, loader: DataSpec, max_tokens: int) -> None:
        assert isinstance(loader.dataloader, JointLoader)
        self.config = config
        self.ema = ema
        self.dataset = loader.dataloader.joint
        self.max_tokens = max_tokens
        self.counts = {kind: count for kind, count in config.held_out.items() if kind in self.dataset.parts and count}
        self.places: list[Place] = []
        self.samples: list[Sample] = []
        self.last_step = -1
        self.latest: dict[str, float] = {}

    def measured(self, state: State, logger: Logger) -> dict[str, float]:
        """The metrics of the present step, by which it is published; also of a run that had nothing left to train. Collective."""
        self._load()
        self._evaluate(state, logger)
        return self.latest

    def fit_start(self, state: State, logger: Logger) -> None:
        self._load()

    def _load(self) -> None:
        if self.places:
            return
        self.places = share(self.counts, dist.get_global_rank(), dist.get_world_size())
        self.samples = [self.dataset.parts[place.kind].held_out_sample(place.index) for place in self.places]

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) % self.config.every == 0:
            self._evaluate(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._evaluate(state, logger)

    def _evaluate(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step == self.last_step or not self.samples:
            return
        self.last_step = step
        self.latest = {}
        for half_life in (None, *self.ema.config.others):
            where = "eval/loss" if half_life is None else f"eval/ema_{half_life:.10g}/loss"
            metrics = self._losses(state, half_life)
            self.latest |= {f"{where}/{name}": value for name, value in metrics.items()}
        logger.log_metrics(self.latest)

    def _losses(self, state: State, half_life: float | None) -> dict[str, float]:
        """Metrics with the average of a half-life. Collective."""
        denoiser = state.model
        assert isinstance(denoiser, Denoiser)
        bands = noise_bands(self.config, denoiser.config.diffusion)
        device = state.device._device
        kinds: list[Kind] = list(self.counts)
        sums = torch.zeros(len(kinds), len(bands), device=device)
        was_training = denoiser.training
        denoiser.eval()
        try:
            with self.ema.swapped(denoiser, half_life), get_precision_context(state.precision, state.precision_config):
                quiet = dist.get_global_rank() > 0
                for start in tqdm(
                    range(0, len(self.samples), self.config.batch), "evaluating", leave=False, disable=quiet, delay=2
                ):
                    part = slice(start, start + self.config.batch)
                    packed = state.device.batch_to_device(batch.collate(self.samples[part], self.max_tokens))
                    losses = band_losses(denoiser, batch.unpack(packed, denoiser.config.network.size[0]), bands)
                    for place, of_sample in zip(self.places[part], losses.unbind(1), strict=True):
                        if place.counts:
                            sums[kinds.index(place.kind)] += of_sample
        finally:
            denoiser.train(was_training)
        dist.all_reduce(sums)
        return report(sums, list(self.counts.values()), kinds, bands)
