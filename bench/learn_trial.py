"""How quickly a variant of make learn's stages learns: ``python bench/learn_trial.py [--help]``.

A bare training loop on one core, without Composer, sharding or loaders: the yaml's optimiser, batch and warm-up, an average of
the weights over its half-life; the cosine is laid out over the time given. Reports the error of D on held-out videos and on
training images at fixed noise, which losses of different processes would hide. Needs the data that ``make learn`` prepared. Two
side by side on two cores do not disturb each other much:

    python bench/learn_trial.py --seconds 240 global_batch=8 optimizer.lr=2e-3 & \
    python bench/learn_trial.py --seconds 240 global_batch=8 optimizer.lr=2e-3 model.network.head_norm=true
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from model import cpu_memory

if __name__ == "__main__":
    cpu_memory.tune()  # may start the process afresh, so before the slow imports

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import checkpoint, config, optimizers, provenance
from model.data import batch as batches
from model.data import dataset
from model.data.batch import Batch, Sample
from model.data.samples import derived_seed
from model.denoiser import Denoiser
from model.diffusion import edm
from model.errors import UserError
from model.networks.conditioning import Conditioning, measure_text
from model.train import TrainConfig
from pipelines.clips import RealClips
from pipelines.denoising import squared_error

ROOT = Path(__file__).parents[1]
NOISE = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # sigma times sigma_in
HELD_OUT = 48
WINDOWS = 8  # of each training clip


@dataclass(frozen=True)
class Point:
    """Mean of (D - x)^2 after some steps, at each level of ``NOISE``."""

    seconds: float  # of one core
    steps: int
    videos: list[float]
    images: list[float]


def stage(c: TrainConfig) -> str:
    """The folder of the shards that a yaml trains on: stage1 or stage2."""
    return Path(c.data.videos or "").parent.name


class Data:
    """Windows of the clips that make learn prepared in a folder, in memory."""

    def __init__(self, c: TrainConfig, folder: Path) -> None:
        self.frames = c.model.network.size[0]
        self.max_tokens = c.data.max_tokens
        rates = c.data.frame_rates
        shards = folder / "shards" / stage(c)
        self.videos = [s for seed in range(WINDOWS) for s in self._read(shards / "videos", rates, seed)]
        self.images = self._read(shards / "images", rates, 0)
        held_out = self._read(folder / "held-out/shards" / stage(c) / "videos", rates, 0)
        self.held_out = held_out[:: max(1, len(held_out) // HELD_OUT)][:HELD_OUT]

    def _read(self, folder: Path, rates: Sequence[float], seed: int) -> list[Sample]:
        clips = RealClips(str(folder), self.frames, rates, seed)
        return [clips.read(number) for number in tqdm(range(len(clips)), folder.name, unit="clip", leave=False, disable=None)]

    def text_states(self) -> Tensor:
        """(N, D) the states of the tokens of some captions."""
        some = [*self.videos[::WINDOWS], *self.images]
        return torch.cat([sample.text for sample in some]).float()

    def batch(self, samples: list[Sample]) -> Batch:
        return batches.unpack(batches.collate(samples, self.max_tokens), self.frames)

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        images = max(1, size // 4)
        chosen = [self.videos[n] for n in rng.integers(len(self.videos), size=size - images)]
        return self.batch(chosen + [self.images[n] for n in rng.integers(len(self.images), size=images)])


@torch.no_grad()
def errors(denoiser: Denoiser, samples: Batch) -> list[float]:
    """At each level of noise, the same noise for every model."""
    x, found = denoiser.codec.encode(samples["video"]), []
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for level in NOISE:
        sigma = torch.full((len(x),), level / denoiser.config.diffusion.sigma_in)
        told = Conditioning(
            edm.c_noise(sigma), samples["text"], samples["text_mask"], samples["frame_rate"], samples["resolution"]
        )
        if denoiser.config.upsampler:
            low = denoiser.downsample(samples["video"])
            clean = torch.zeros(len(x))
            told = replace(told, low_resolution=denoiser.low_resolution_input(low, clean, low), corruption=clean)
        found.append(float(squared_error(denoiser, x, eps, sigma, told).mean()))
    return found


def run(c: TrainConfig, data: Data, seconds: float, every: float) -> tuple[Denoiser, list[Point]]:
    """Train for so long, the time of measuring left out. Returns the averaged model, too."""
    torch.manual_seed(c.seed)
    denoiser, average = Denoiser(c.model), Denoiser(c.model)
    measure_text(denoiser.network, data.text_states)
    average.load_state_dict(denoiser.state_dict())
    trained = list[Tensor](p for p in denoiser.parameters() if p.requires_grad)
    averaged = list[Tensor](p for p in average.parameters() if p.requires_grad)
    optimizer, size = optimizers.build(trained, c.optimizer), c.global_batch
    videos, images = data.batch(data.held_out), data.batch(data.images[:HELD_OUT])
    rng, points, steps, spent = np.random.default_rng(c.seed), list[Point](), 0, 0.0
    with tqdm(total=round(seconds), unit="s", leave=False, disable=None) as bar:
        while spent < seconds:
            begin = time.process_time()
            decayed = 0.01 + 0.99 * (1 + math.cos(math.pi * spent / seconds)) / 2
            for group in optimizer.param_groups:
                group["lr"] = c.optimizer.lr * min(1, (steps + 1) / max(1, c.schedule.warmup)) * decayed
            drawn = data.draw(rng, size)
            drawn["seed"] = [derived_seed(c.seed, steps, n) for n in range(size)]
            denoiser.train()
            terms = denoiser(drawn)
            denoiser.loss(terms, dict(drawn)).backward()
            if denoiser.levels:
                denoiser.levels.update(denoiser.levels.sums(terms.sigma, terms.loss.detach()))
            if c.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained, c.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            keep = min(0.5 ** (1 / c.ema.half_life), (steps + 1) / (steps + 10))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, trained, 1 - keep)
            steps, spent = steps + 1, spent + time.process_time() - begin
            bar.update(min(round(spent), round(seconds)) - bar.n)
            if spent >= min(seconds, (len(points) + 1) * every):
                average.eval()
                points.append(Point(round(spent), steps, errors(average, videos), errors(average, images)))
    return average, points


def save(folder: Path, c: TrainConfig, data: Path, model: Denoiser, steps: int) -> None:
    """Write the model as a training run would: ``cascade.stage1=FOLDER`` samples it."""
    shards = data / "shards" / stage(c)
    there = replace(c.data, videos=str(shards / "videos"), images=str(shards / "images"))
    weights = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    origin = checkpoint.Origin(c.name, steps, provenance.git_commit())
    checkpoint.write(folder, weights, config.to_tree(c), dataset.manifests(there), origin)


def report(points: Sequence[Point]) -> str:
    """The result for people."""
    lines = ["seconds  steps   error of D, videos / images, at noises of " + ", ".join(f"{level:g}" for level in NOISE)]
    for p in points:
        pairs = "   ".join(f"{video:.4f} / {image:.4f}" for video, image in zip(p.videos, p.images, strict=True))
        lines.append(f"{p.seconds:7.0f}{p.steps:7d}   {pairs}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value for the yaml")
    parser.add_argument("--yaml", type=Path, default=ROOT / "yamls/learn/stage1.yaml", help="(default yamls/learn/stage1.yaml)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/learn", help="of make learn (default runs/learn)")
    parser.add_argument("--seconds", type=float, default=240, help="of training (default 240)")
    parser.add_argument("--every", type=float, default=120, help="seconds between measurements (default 120)")
    parser.add_argument("--save", type=Path, help="folder for the model, as a training run publishes it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    if min(arguments.seconds, arguments.every) <= 0:
        sys.exit("--seconds and --every must be above 0")
    torch.set_num_threads(1)
    try:
        c = config.load(TrainConfig, arguments.yaml, arguments.overrides)
        if c.global_batch < 2:
            sys.exit("global_batch must be at least 2: a quarter of a step's clips, and one at least, are images")
        data = Data(c, arguments.folder)
    except UserError as error:
        sys.exit(str(error))
    model, points = run(c, data, arguments.seconds, arguments.every)
    if arguments.save:
        save(arguments.save, c, arguments.folder, model, points[-1].steps)
    print(json.dumps([asdict(point) for point in points], indent=2) if arguments.json else report(points))


if __name__ == "__main__":
    main()
