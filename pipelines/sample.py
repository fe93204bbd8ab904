"""Generate clips from prompts with models pulled from the MLflow registry.

Writes an mp4 and a gif for each prompt, a contact sheet of all, and samples.json with prompts, seeds and model versions.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from model import command, media
from model.config import UserError
from pipelines.cascade import Cascade, CascadeConfig, Progress


@dataclass(frozen=True)
class SampleConfig:
    """A sampling job."""

    prompts: tuple[str, ...]
    output: str = "runs/samples"
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    seed: int = 0  # the n-th prompt gets seed + n
    batch: int = 4  # clips sampled at once
    device: str | None = None  # None: a GPU if there is one


def sample(c: SampleConfig) -> None:
    """Run the job.

    Raises:
        UserError: nothing to sample, or models that cannot be had.
    """
    if not c.prompts or not all(prompt.strip() for prompt in c.prompts):
        raise UserError("prompts: give at least one, and none empty")
    if c.batch < 1:
        raise UserError(f"batch must be at least 1, got {c.batch}")
    cascade = Cascade(c.cascade, c.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    clips, records = [], []
    for start in range(0, len(c.prompts), c.batch):
        prompts = c.prompts[start : start + c.batch]
        seeds = [c.seed + start + i for i in range(len(prompts))]
        name = f"clips {start + 1}-{start + len(prompts)} of {len(c.prompts)}"
        for i, high in enumerate(cascade.sample(prompts, seeds, _bars(name)).high):
            path = output / f"{start + i:03d}-{slug(prompts[i])}.mp4"
            media.write_mp4(path, high, c.cascade.frame_rate)
            media.write_gif(path.with_suffix(".gif"), high, c.cascade.frame_rate)
            clips.append(high)
            records.append({"file": path.name, "prompt": prompts[i], "seed": seeds[i]})
    media.write_contact_sheet(output / "sheet.png", clips, c.prompts)
    stages = {"stage1": cascade.stage1, "stage2": cascade.stage2}
    origins = {name: asdict(stage.origin) for name, stage in stages.items() if stage is not None}
    description = {"clips": records, "models": origins, "settings": asdict(c)}
    (output / "samples.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    print(f"{len(clips)} clips: {output}\ncontact sheet: {output / 'sheet.png'}")


def slug(prompt: str) -> str:
    """A short file name of letters, digits and dashes, whatever the prompt holds."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "clip"


def _bars(name: str) -> Progress:
    """A progress bar for each stage."""
    return lambda stage, steps: tqdm(range(steps), desc=f"{name}, {stage}", unit="step", leave=False)


if __name__ == "__main__":
    command.run(
        SampleConfig, sample, __doc__ or "", example="python -m pipelines.sample yamls/sample.yaml prompts='[\"a corgi runs\"]'"
    )
