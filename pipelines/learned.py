"""What a cascade has learnt of the benchmark Moving Scenes, told by metrics that know the truth.

``python -m pipelines.learned yamls/learn/learned.yaml`` samples a clip for the caption and the frame rate of each held-out one
and reads back what it shows (``pipelines.truth``). Captions whose combination of colour, shape and motion no training clip shows
are counted apart. Writes learned.json, sheets of clips, and a figure of the guidance sweep.

Shapes: T frames, H height, W width.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from model import command, config, media, text
from model.codec import PixelCodec, from_pixels, to_pixels
from model.data import batch
from model.data.samples import derived_seed
from model.diffusion import edm
from model.errors import UserError
from model.generate import Request, draw, generate
from model.networks.conditioning import Conditioning
from pipelines.cascade import Cascade, CascadeConfig
from pipelines.clips import RealClips, captions
from pipelines.denoising import squared_error
from pipelines.judge import SPEED, WORDS, parse, reworded
from pipelines.knowable import Knowable
from pipelines.moving_scenes import distance, table
from pipelines.ranks import default_device
from pipelines.scoring import Clip, Score, score

_T = TypeVar("_T")


@dataclass(frozen=True)
class LearnedConfig:
    """Which models, against which held-out clips."""

    low: str  # held-out clips of stage 1's size
    trained: str  # clips that it was trained on: their combinations are not new
    output: str  # folder
    high: str | None = None  # the held-out clips of stage 2's size, in the same order; null: stage 1 alone
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    frame_rates: tuple[float, ...] = (8, 4)  # each clip is asked for at one of them
    limit: int | None = None  # held-out clips, evenly spaced; null: all
    upsampled: int = 64  # of these, how many go through stage 2
    noise: tuple[float, ...] = (0.25, 0.5, 1, 2, 4, 8)  # levels, in the data's scale, at which stage 1 denoises real clips
    guidances: tuple[float, ...] = ()  # of stage 1, to sweep over
    swept: int = 64  # clips for each
    batch: int = 32
    speed: float = SPEED  # that moving objects should have, stage heights per second
    sheet: int = 8  # clips in the picture
    seed: int = 0
    device: str | None = None  # null: a GPU if there is one

    def __post_init__(self) -> None:
        for name, least in {"upsampled": 1, "swept": 2, "batch": 1, "sheet": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.frame_rates or self.speed <= 0 or (self.limit is not None and self.limit < 1):
            raise ValueError("frame_rates must name at least one, speed be above 0, and limit at least 1")
        if not all(level > 0 for level in self.noise):
            raise ValueError(f"noise levels must be above 0, got {list(self.noise)}")
        if self.cascade.stage1 is None:
            raise ValueError("cascade.stage1 must name a model")
        if (self.high is None) != (self.cascade.stage2 is None):
            raise ValueError("high and cascade.stage2 belong together: name both or neither")


@dataclass(frozen=True)
class Example:
    """A held-out clip: what is asked for, and what a right answer looks like."""

    number: int  # in its data set
    caption: str
    frame_rate: float
    frames: np.ndarray  # (T, H, W, 3) uint8
    is_new: bool  # its combination is not among the training clips


@dataclass(frozen=True)
class Denoised:
    """How close D comes to real clips: comparable between models of any sigma_in, sigma_data and framework, as losses are not."""

    noise: float  # sigma * sigma_in, the std of the noise where data lie in [-1, 1]
    error: float  # mean of (D - x)^2
    knowable: float | None  # what can be reached (pipelines.knowable); None for codecs not of pixels, and where clips are few
    shuffled: float  # the same with captions of other clips: how much the text says
    heard: dict[str, float]  # by what share the error grows where one word of the caption is another: what it says of each


@dataclass(frozen=True)
class Guided:
    """What one weight of guidance gives."""

    guidance: float
    right: dict[str, float]  # share of the clips, by property
    distance: float  # Frechet distance of simple features to the real clips


@dataclass(frozen=True)
class Upsampling:
    """Stage 2 on real low-resolution clips: mean PSNR in dB."""

    clips: int
    stage2: float
    bicubic: float


def learned(c: LearnedConfig) -> None:
    """Sample, score and write.

    Raises:
        UserError: models or data sets that are missing or do not fit each other.
    """
    device = c.device or default_device()
    alone = Cascade(replace(c.cascade, stage2=None), device)
    assert alone.stage1 is not None
    asked = examples(c, alone.stage1.denoiser.config.network.size[0])
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    made = sample(c, alone, asked, "stage 1")
    tree: dict[str, Any] = {}
    for name, is_new in (("seen", False), ("new", True)):
        here = [n for n, example in enumerate(asked) if example.is_new == is_new]
        if here:
            part = [asked[n] for n in here]
            found, real = scored(c, part, [made[n] for n in here]), scored(c, part)
            print(f"\n{name} combinations, stage 1, {len(part)} clips\n{table(found, real)}", flush=True)
            apart = distance(found.features, real.features) if len(here) > 1 else None
            tree[name] = {"stage1": _tree(found), "real": _tree(real), "distance": apart}
    levels = denoising(c, alone, asked) if c.noise else []
    if levels:
        tree["denoising"] = [vars(level) for level in levels]
        print(
            "\nnoise  error of D  can be reached  with other captions  grows where one word is another"
            + "".join(f"{w:>12}" for w in levels[0].heard)
        )
        for level in levels:
            grown = "".join(f"{share:12.1%}" for share in level.heard.values())
            reached = "" if level.knowable is None else f"{level.knowable:.5f}"
            print(f"{level.noise:5g}{level.error:12.5f}{reached:>16}{level.shuffled:21.5f}{'':34}{grown}")
    shown = _chosen(asked, c.sheet)
    media.write_contact_sheet(output / "stage1.png", [made[n] for n in shown], [_line(asked[n]) for n in shown])
    if c.high is not None:
        both = Cascade(c.cascade, device)
        part = [asked[n] for n in _chosen(asked, c.upsampled)]
        high = sample(c, both, part, "both stages")
        found = scored(c, part, high)
        print(f"\nboth stages, {len(part)} clips\n{table(found)}", flush=True)
        tree["cascade"] = _tree(found)
        gain = upsampling(c, both, part)
        print(f"stage 2 on real clips: {gain.stage2:.2f} dB, bicubic upsampling {gain.bicubic:.2f} dB")
        tree["upsampling"] = vars(gain)
        media.write_contact_sheet(output / "stage2.png", high[: c.sheet], [_line(example) for example in part[: c.sheet]])
    points = sweep(c, alone, [asked[n] for n in _chosen(asked, c.swept)]) if c.guidances else []
    if points:
        tree["guidance"] = [vars(point) for point in points]
        _draw(points, output / "guidance.png")
    tree["config"] = config.to_tree(c)
    (output / "learned.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    print(f"\nnumbers: {output / 'learned.json'}\npictures: {', '.join(str(path) for path in sorted(output.glob('*.png')))}")


def examples(c: LearnedConfig, frames: int) -> list[Example]:
    """The held-out clips, each at a frame rate and a place of its own.

    Raises:
        UserError: no such data set, or captions that are not of the benchmark.
    """
    known = {_combination(caption) for caption in set(captions(c.trained))}
    clips = RealClips(c.low, frames, c.frame_rates, c.seed)
    found = []
    for number in _chosen(range(len(clips)), c.limit or len(clips)):
        real = clips.read(number)
        is_new = _combination(real.caption) not in known
        found.append(Example(number, real.caption, real.frame_rate, real.frames.numpy(), is_new))
    if not found:
        raise UserError(f"{c.low}: holds no clips")
    return found


def _combination(caption: str) -> frozenset[tuple[str, str, str | None]]:
    """What of a caption can be new: its objects, not its background."""
    return frozenset((said.colour, said.shape, said.direction) for said in parse(caption).objects)


def sample(
    c: LearnedConfig, cascade: Cascade, asked: Sequence[Example], title: str, guidance: float | None = None
) -> list[np.ndarray]:
    """The last stage's (T, H, W, 3) uint8 frames for each example, which do not depend on the others.

    ``guidance`` is of stage 1; None: the configured one.
    """
    made: dict[int, np.ndarray] = {}
    sampler = c.cascade.stage1_sampler
    sampler = replace(sampler, guidance=sampler.guidance if guidance is None else guidance)
    with tqdm(total=len(asked), desc=title, unit="clip") as bar:
        for rate in sorted({example.frame_rate for example in asked}):
            told = replace(c.cascade, stage1_sampler=sampler, frame_rate=rate)
            for part in _batches([example for example in asked if example.frame_rate == rate], c.batch):
                seeds = [derived_seed(c.seed, example.number) for example in part]
                clips = cascade.sample([example.caption for example in part], seeds, settings=told)
                made |= {example.number: clip for example, clip in zip(part, clips.high.numpy(), strict=True)}
                bar.update(len(part))
    return [made[example.number] for example in asked]


@torch.no_grad()
def denoising(c: LearnedConfig, cascade: Cascade, asked: Sequence[Example]) -> list[Denoised]:
    """Stage 1 on the real clips at each noise level, with the same noise for every model."""
    assert cascade.stage1 is not None
    denoiser = cascade.stage1.denoiser.eval()
    right = [example.caption for example in asked]
    told_instead: list[list[str]] = [right, right[len(right) // 2 :] + right[: len(right) // 2]]
    told_instead += [[reworded(caption, word) or caption for caption in right] for word in WORDS]
    texts = [text.pad(cascade.encoder.encode(said), cascade.encoder.max_tokens) for said in told_instead]
    errors = torch.zeros(len(c.noise), len(texts), len(asked), dtype=torch.float64)
    with tqdm(total=errors.numel(), desc="denoising", unit="clip") as bar:
        for part in _batches(range(len(asked)), c.batch):
            real = torch.stack([from_pixels(torch.from_numpy(asked[n].frames)) for n in part]).to(cascade.device)
            x = denoiser.codec.encode(real)
            for row, level in enumerate(c.noise):
                generators = [torch.Generator().manual_seed(derived_seed(c.seed, asked[n].number, row)) for n in part]
                eps = draw(generators, x.shape[1:], cascade.device)
                sigma = torch.full((len(part),), level / denoiser.config.diffusion.sigma_in, device=cascade.device)
                for column, (states, mask) in enumerate(texts):
                    told = Conditioning(
                        c_noise=edm.c_noise(sigma),
                        text=states[list(part)].to(cascade.device),
                        text_mask=mask[list(part)].to(cascade.device),
                        frame_rate=torch.tensor([asked[n].frame_rate for n in part], device=cascade.device),
                        resolution=torch.tensor([c.cascade.resolution] * len(part), dtype=torch.float32, device=cascade.device),
                    )
                    errors[row, column, list(part)] = squared_error(denoiser, x, eps, sigma, told).cpu()
                    bar.update(len(part))
    changed = {
        word: [a != b for a, b in zip(said, right, strict=True)] for word, said in zip(WORDS, told_instead[2:], strict=True)
    }
    # Errors of latents are not those of pixels.
    least = reachable(c, asked) if isinstance(denoiser.codec, PixelCodec) else [None] * len(c.noise)
    found = []
    for level, of_level, reached in zip(c.noise, errors, least, strict=True):
        grown = {
            word: float(of_level[column, changed[word]].mean() / of_level[0, changed[word]].mean() - 1)
            for column, word in enumerate(WORDS, start=2)
            if any(changed[word])
        }
        found.append(Denoised(level, float(of_level[0].mean()), reached, float(of_level[1].mean()), grown))
    return found


def reachable(c: LearnedConfig, asked: Sequence[Example]) -> Sequence[float | None]:
    """At each noise level the mean error that knowing the benchmark's scenes gives (pipelines.knowable), of the same clips."""
    known, errors = Knowable(c.trained, len(asked[0].frames), c.frame_rates), []
    if not all(known.tells(example.caption, example.frame_rate) for example in asked):
        return [None] * len(c.noise)
    for row, level in enumerate(tqdm(c.noise, "what can be known", unit="level", leave=False)):
        of_level = []
        for example in asked:
            real = from_pixels(torch.from_numpy(example.frames))
            eps = draw([torch.Generator().manual_seed(derived_seed(c.seed, example.number, row))], real.shape, real.device)[0]
            mean = known.mean(real + level * eps, level, example.caption, example.frame_rate)
            of_level.append(float((mean - real).double().square().mean()))
        errors.append(float(np.mean(of_level)))
    return errors


def upsampling(c: LearnedConfig, cascade: Cascade, asked: Sequence[Example]) -> Upsampling:
    """Stage 2 on the real low-resolution clips, uncorrupted, against bicubic upsampling.

    Raises:
        UserError: the data sets of the two sizes hold other clips.
    """
    assert cascade.stage2 is not None and c.high is not None
    denoiser = cascade.stage2.denoiser
    clips = RealClips(c.high, denoiser.config.network.size[0], c.frame_rates, c.seed)
    gained = []
    with tqdm(total=len(asked), desc="stage 2 on real clips", unit="clip") as bar:
        for part in _batches(asked, c.batch):
            samples = [clips.read(example.number) for example in part]
            if [found.caption for found in samples] != [example.caption for example in part]:
                raise UserError(f"{c.high}: holds other clips than {c.low}, or in another order")
            given = batch.unpack(batch.collate(samples, cascade.encoder.max_tokens), denoiser.config.network.size[0])
            real = given["video"]
            low = denoiser.downsample(real)
            request = Request(
                text=given["text"].to(cascade.device),
                text_mask=given["text_mask"].to(cascade.device),
                frame_rate=given["frame_rate"].to(cascade.device),
                resolution=given["resolution"].to(cascade.device),
                generators=[torch.Generator().manual_seed(derived_seed(c.seed, example.number)) for example in part],
                low_resolution=low,
            )
            high = from_pixels(to_pixels(generate(denoiser, request, c.cascade.stage2_sampler)).cpu())
            plain = functional.interpolate(low.flatten(0, 1), real.shape[-2:], mode="bicubic", align_corners=False)
            plain = plain.clamp(-1, 1).unflatten(0, low.shape[:2])
            gained += [(psnr(one, truth), psnr(other, truth)) for one, other, truth in zip(high, plain, real, strict=True)]
            bar.update(len(part))
    mean = np.mean(gained, axis=0)
    return Upsampling(len(gained), float(mean[0]), float(mean[1]))


def psnr(video: Tensor, real: Tensor) -> float:
    """Of a video in [-1, 1], dB, from the mean squared error of the whole clip; at most 100."""
    error = float(((video.double() - real.double()) / 2).square().mean())
    return min(100.0, -10 * math.log10(error)) if error else 100.0


def sweep(c: LearnedConfig, alone: Cascade, asked: Sequence[Example]) -> list[Guided]:
    """A cascade of stage 1 alone at each weight of guidance."""
    real, points = scored(c, asked), []
    for guidance in c.guidances:
        found = scored(c, asked, sample(c, alone, asked, f"guidance {guidance:g}", guidance=guidance))
        right = {rate.name: rate.right / rate.number for rate in found.rates}
        points.append(Guided(guidance, right, distance(found.features, real.features)))
    print("\nguidance" + "".join(f"{name:>12}" for name in points[0].right) + f"{'distance':>12}")
    for point in points:
        print(f"{point.guidance:8g}" + "".join(f"{share:12.1%}" for share in point.right.values()) + f"{point.distance:12.3f}")
    return points


def scored(c: LearnedConfig, asked: Sequence[Example], made: Sequence[np.ndarray] | None = None) -> Score:
    """Of what was made for the examples, or of the real clips."""
    frames = [example.frames for example in asked] if made is None else made
    clips = (Clip(each, example.caption, example.frame_rate) for each, example in zip(frames, asked, strict=True))
    return score(tqdm(clips, "scoring", total=len(asked), unit="clip", leave=False), c.speed)


def _tree(found: Score) -> dict[str, Any]:
    return {
        "rates": {rate.name: vars(rate) for rate in found.rates},
        "speeds": [vars(speed) for speed in found.speeds],
        "flicker": found.flicker,
    }


def _chosen(asked: Sequence[Any], number: int) -> list[int]:
    """Evenly spaced places in the list."""
    return sorted(set(np.linspace(0, len(asked) - 1, min(number, len(asked))).round().astype(int).tolist()))


def _line(example: Example) -> str:
    return f"{example.caption}, {example.frame_rate:g} frames per second{', a new combination' if example.is_new else ''}"


def _batches(asked: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    return (asked[start : start + size] for start in range(0, len(asked), size))


def _draw(points: Sequence[Guided], path: Path) -> None:
    from matplotlib.figure import Figure  # imports take a second

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    weights = [point.guidance for point in points]
    for name in WORDS:
        left.plot(weights, [100 * point.right.get(name, math.nan) for point in points], marker="o", label=name)
    left.set(xlabel="guidance", ylabel="right, %", ylim=(0, 102))
    left.legend(loc="lower left")
    right.plot(weights, [point.distance for point in points], marker="o")
    right.set(xlabel="guidance", ylabel="Frechet distance of simple features", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xscale("log")
        axes.set_xticks(weights, [f"{weight:g}" for weight in weights], minor=False)
        axes.minorticks_off()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    command.run(LearnedConfig, learned, __doc__ or "", example="python -m pipelines.learned yamls/learn/learned.yaml limit=64")
