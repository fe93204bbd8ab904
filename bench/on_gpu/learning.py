"""Part "learning", a call of its own: a FIT by the paper's recipe on Moving Scenes for minutes, then what it has learnt.

The network has no field beyond Table 8's: attention alone, groups of 16x5x4 patches, sigma_in by the paper's rule, EDM's draw of
noise. The recipe is Table 9's (training.py). The clips are stage 1's, 16 frames of 36x64 pixels.

Its size: FIT 500M's layout at a third of its widths, four blocks of two global layers. That is 32 M parameters and 125 GFLOP of
training a clip (model/planning/meta_step.py); a step of 128 clips takes 53 ms at 300 TFLOP/s and 42 ms by the roofline of an H200
(model/planning/roofline.py), so that seven minutes hold 8,000 to 10,000 steps. On small models more steps were worth more than
more width (docs/learning-before.md), but a stream much narrower than 256 has little room for a patch's 48 values of noise.

What is measured: the loss; the error of D on held-out clips at fixed noise, and with other clips' captions; and how many of the
clips that it makes for held-out captions show what they say (pipelines/scoring.py), of seen and of new combinations. Pictures of
them lie beside the record. A training that was cut short begins again; sampling goes on from the average of the weights.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.on_gpu.record import Record
from bench.on_gpu.scenes import Batches, rendered
from bench.on_gpu.training import Recipe, Training, errors
from dataprep.moving_scenes import Split
from model.codec import PixelCodecConfig, to_pixels
from model.denoiser import Denoiser, ModelConfig
from model.diffusion.edm import DiffusionConfig
from model.diffusion.sampler import SamplerConfig
from model.generate import Request, generate
from model.networks.fit.config import FITConfig
from model.planning.meta_step import count_step
from pipelines.scoring import Clip, score

KEPT_BACK = 0.12  # of the time, for sampling and reading
SAMPLED_AT_ONCE = 80
SHEET = (12, 8, 2)  # clips of a picture, frames of each, and how much they are enlarged
SPLITS: dict[str, Split] = {"seen": "seen", "new": "unseen"}  # the names in the record, and dataprep's


@dataclass(frozen=True)
class Plan:
    """What is trained and measured, and on what."""

    model: ModelConfig
    recipe: Recipe
    pool: int  # clips to train on
    held_out: int  # clips, of each split
    steps: int | None = None  # of training; None: as many as there is time for
    every: int = 500  # steps between rows
    sampling_steps: int = 64
    guidances: tuple[float, ...] = (1.5, 3.0)


def stage(network: FITConfig, height: int) -> ModelConfig:
    """A stage for clips of so many lines, with sigma_in by the paper's rule: s sqrt(T), s = longer side / 64."""
    frames, padded, width = network.size
    codec = PixelCodecConfig(height=height, width=width, pad_bottom=padded - height)
    return ModelConfig(codec=codec, diffusion=DiffusionConfig(sigma_in=width / 64 * math.sqrt(frames)), network=network)


def full() -> Plan:
    """For a GPU."""
    network = FITConfig(
        size=(16, 40, 64), patch_width=256, latent_tokens=256, latent_width=384, blocks=4, global_layers=2, patch_head_width=32,
        latent_head_width=64, conditioning_width=256, text_width=128,
    )  # fmt: skip
    return Plan(stage(network, 36), Recipe(), pool=40_000, held_out=96)


def small() -> Plan:
    """For a CPU: clips of 8x18x32 and a network of 1.2 M parameters, which show that the chain runs and the loss falls."""
    network = FITConfig(
        size=(8, 20, 32), group=(8, 5, 4), patch_width=64, latent_tokens=32, latent_width=96, blocks=3, global_layers=1,
        patch_head_width=16, latent_head_width=32, conditioning_width=64, text_width=32,
    )  # fmt: skip
    return Plan(stage(network, 18), Recipe(batch=8, warmup=50), pool=1024, held_out=24, every=100, sampling_steps=24)


def tiny_plan() -> Plan:
    """For a rehearsal of seconds, with some thousand parameters."""
    network = FITConfig(
        size=(4, 12, 16), group=(4, 3, 2), patch_width=16, latent_tokens=8, latent_width=16, blocks=1, global_layers=1,
        patch_head_width=8, latent_head_width=8, conditioning_width=16, text_width=8,
    )  # fmt: skip
    recipe = Recipe(batch=4, warmup=5)
    return Plan(stage(network, 9), recipe, pool=16, held_out=4, steps=8, every=4, sampling_steps=3)


def pool(plan: Plan, device: torch.device) -> Batches:
    """The clips to train on, rendered."""
    c = plan.model
    return Batches(rendered("seen", 0, plan.pool, c.network.size[0], c.codec.height, device), c.network.text_width)


def held_out(plan: Plan, device: torch.device) -> dict[str, Batches]:
    """Other clips of seen combinations, and those of new ones."""
    c, found = plan.model, {}
    for name, split in SPLITS.items():
        clips = rendered(split, 1, plan.held_out, c.network.size[0], c.codec.height, device)
        found[name] = Batches(clips, c.network.text_width)
    return found


def run(record: Record, device: torch.device, tiny: bool, seconds_left: float) -> None:
    """Train, sample and read within so many seconds; what the record has is not done again."""
    begin = time.monotonic()
    plan = tiny_plan() if tiny else full() if device.type == "cuda" else small()
    samples = [(name, guidance) for guidance in plan.guidances for name in SPLITS]
    if all(record.find(clips=name, guidance=guidance) for name, guidance in samples):
        return
    precision = torch.bfloat16 if device.type == "cuda" or tiny else None
    asked, weights = held_out(plan, device), record.path.with_suffix(".safetensors")
    if weights.exists() and any("trained" in row["key"] for row in record.rows):
        average = Denoiser(plan.model, device)
        average.load_state_dict(load_file(weights))
    else:
        record.clear()
        average = _train(record, plan, asked, precision, begin + seconds_left * (1 - KEPT_BACK))
        save_file(average.state_dict(), weights)
    for name, guidance in samples:
        if record.find(clips=name, guidance=guidance) is None and time.monotonic() < begin + seconds_left:
            _sample(record, plan, average, asked[name], name, guidance, precision)


def _train(record: Record, plan: Plan, asked: dict[str, Batches], precision: torch.dtype | None, end: float) -> Denoiser:
    """Train until the clock says ``end``; returns the average of the weights."""
    begin, device = time.monotonic(), asked["seen"].clips.frames.device
    clips = pool(plan, device)
    record.add({"rendered": plan.pool}, seconds=time.monotonic() - begin)
    training = _started(record, plan, clips, precision)
    start, before, measuring = time.monotonic(), training.steps, 0.0
    given = max(1.0, end - start)
    losses: list[Tensor] = []
    while (progress := (time.monotonic() - start) / given if plan.steps is None else training.steps / plan.steps) < 1:
        losses.append(training.step(progress))
        if training.steps % plan.every == 0:
            loss = float(torch.stack(losses).mean())  # waits for the device
            stopped = time.monotonic()
            found = errors(training.average, asked["seen"], plan.held_out)
            record.add({"step": training.steps}, loss=loss, seconds=stopped - start - measuring, errors=found)
            measuring += time.monotonic() - stopped
            losses = []
    if device.type == "cuda":
        torch.cuda.synchronize()
    spent = time.monotonic() - start - measuring
    rate = (training.steps - before) * plan.recipe.batch / spent
    counted = count_step(
        Denoiser(plan.model, "meta"), lambda: _on_meta(asked["seen"]), "fp32" if precision is None else "amp_bf16"
    )
    record.add(
        {"trained": training.steps},
        seconds=spent,
        clips_per_second=rate,
        flops=rate * (counted.first_pass + counted.forward + counted.backward),
        parameters=sum(p.numel() for p in training.weights),
        errors=errors(training.average, asked["seen"], plan.held_out),
        errors_new=errors(training.average, asked["new"], plan.held_out),
        errors_other_captions=errors(training.average, asked["seen"], plan.held_out, other_captions=True),
    )
    return training.average


def _started(record: Record, plan: Plan, clips: Batches, precision: torch.dtype | None) -> Training:
    """A training, after the step that compiles it; where the compiler fails it does without."""
    if clips.clips.frames.device.type == "cuda":
        begin = time.monotonic()
        training = Training(plan.model, plan.recipe, clips, precision, compiled=True)
        try:
            float(training.step(0.0))
        except RuntimeError as error:  # all errors of the compiler are
            record.add({"compiler": "failed"}, why=str(error)[-300:])
        else:
            record.add({"compiler": "ran"}, seconds=time.monotonic() - begin)
            return training
    return Training(plan.model, plan.recipe, clips, precision, compiled=False)


def _on_meta(clips: Batches) -> dict[str, Any]:
    return {name: part.to("meta") if isinstance(part, Tensor) else part for name, part in clips.videos(range(1)).items()}


def _sample(
    record: Record, plan: Plan, denoiser: Denoiser, asked: Batches, name: str, guidance: float, precision: torch.dtype | None
) -> None:
    """A clip for each held-out caption, read and drawn."""
    begin, real = time.monotonic(), asked.clips
    clips = sampled(denoiser, asked, plan.held_out, SamplerConfig(plan.sampling_steps, guidance, threshold_quantile=0), precision)
    made, rates = clips.numpy(), real.rates.tolist()
    read = score(Clip(*clip) for clip in zip(made, real.captions, rates, strict=True))
    sheet(clips, real.captions, record.path.with_name(f"{record.path.stem}-{name}-{guidance:g}.png"))
    record.add(
        {"clips": name, "guidance": guidance},
        right={rate.name: vars(rate) for rate in read.rates},
        speeds=[vars(speed) for speed in read.speeds],
        flicker=read.flicker,
        seconds=time.monotonic() - begin,
    )


def sampled(
    denoiser: Denoiser, asked: Batches, number: int, config: SamplerConfig, precision: torch.dtype | None = None
) -> Tensor:
    """Clips for the first captions of ``asked``, (N, T, H, W, 3) uint8 on the CPU, each from its own noise."""
    clips = []
    for start in range(0, number, SAMPLED_AT_ONCE):
        batch = asked.videos(range(start, min(start + SAMPLED_AT_ONCE, number)))
        told = {part: batch[part] for part in ("text", "text_mask", "frame_rate", "resolution")}
        request = Request(**told, generators=[torch.Generator().manual_seed(seed) for seed in batch["seed"]])
        with torch.autocast(batch["video"].device.type, precision, enabled=precision is not None):
            clips.append(to_pixels(generate(denoiser, request, config)).cpu())
    return torch.cat(clips)


def sheet(clips: Tensor, captions: list[str], path: Path) -> None:
    """A picture of some of the clips (N, T, H, W, 3), a row each under its caption."""
    rows, columns, enlarged = SHEET
    every = max(1, -(-clips.shape[1] // columns))
    shown = clips[:rows, ::every].numpy()
    height, width = (side * enlarged for side in shown.shape[2:4])
    line, gap = 14, 2  # pixels: of text, and between frames
    picture = Image.new("RGB", (max(360, shown.shape[1] * (width + gap)), len(shown) * (height + line)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (clip, caption) in enumerate(zip(shown, captions, strict=False)):
        top = row * (height + line)
        pen.text((2, top + 1), caption, fill="black")
        for column, frame in enumerate(clip):
            tile = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (column * (width + gap), top + line))
    picture.save(path)


def report(rows: list[dict[str, Any]]) -> list[str]:
    """How loss and errors fell, how fast it was, and what the clips show."""
    lines = []
    for row in rows:
        key = row["key"]
        if "step" in key:
            lines.append(
                f"step {key['step']:7,}{row['seconds']:7.0f} s  loss {row['loss']:.4f}  error of D {_told(row['errors'])}"
            )
        elif "compiler" in key:
            lines.append(f"compiler: {row['why']}" if "why" in row else f"compiled in {row['seconds']:.0f} s")
        elif "trained" in key:
            rate = f"{row['clips_per_second']:.0f} clips a second, {row['flops'] / 1e12:.3g} TFLOP/s"
            lines.append(
                f"{row['parameters'] / 1e6:.1f} M parameters, {key['trained']:,} steps in {row['seconds']:.0f} s, {rate}"
            )
            for told, name in (("seen", "errors"), ("new", "errors_new"), ("other captions", "errors_other_captions")):
                lines.append(f"  error of D, {told}: {_told(row[name])}")
        elif "clips" in key:
            shares = [f"{name} {r['right'] / r['number']:.1%}" for name, r in row["right"].items()]
            number = row["right"]["all"]["number"]
            lines.append(f"{key['clips']} combinations, guidance {key['guidance']:g}, {number} clips: {', '.join(shares)}")
    return lines


def _told(found: dict[str, float]) -> str:
    return ", ".join(f"{error:.4f} at {level}" for level, error in found.items())
