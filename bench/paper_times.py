"""The paper's times on an A100 (its Table 2) beside the roofline's: ``python bench/paper_times.py [--help]``.

Nothing is run: operations, bytes and launches are traced on the meta device (model/planning/roofline.py). The paper names neither
batch nor compiler, nor whether activations were recomputed; here a batch is 32, and recomputation is as in the yamls. The paper's
inference time is taken for one evaluation of the network on one video, without guidance.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model import config
from model.denoiser import Denoiser
from model.networks.conditioning import Conditioning
from model.planning import roofline
from model.planning.roofline import DEVICES, Device
from model.planning.trace import Operation, trace_sampling, trace_step
from model.train import TrainConfig

YAMLS = Path(__file__).parents[1] / "yamls"
PAPER = {  # milliseconds per video: training, inference
    "stage1_500m": (69.5, 23.4),
    "stage1": (526.0, 130.4),
    "unet_284m": (230.3, 105.1),
    "unet_85m": (133.2, 49.6),
}
TEXT_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """One network's step of one kind; milliseconds per video."""

    model: str
    step: str  # "training" or "inference"
    tflop: float
    eager: float
    fused: float
    paper: float


def batch_of(c: TrainConfig, videos: int) -> dict[str, Any]:
    """A batch of videos with full-length captions, on the meta device."""
    codec = c.model.codec
    with torch.device("meta"):
        return {
            "video": torch.empty(videos, c.data.frames, 3, codec.height, codec.width),
            "text": torch.empty(videos, TEXT_TOKENS, c.data.text_width, dtype=torch.bfloat16),
            "text_mask": torch.empty(videos, TEXT_TOKENS, dtype=torch.bool),
            "frame_rate": torch.empty(videos),
            "resolution": torch.empty(videos, 2),
            "seed": list(range(videos)),
        }


def training(c: TrainConfig, videos: int) -> list[Operation]:
    """A training step up to the gradients."""
    return trace_step(Denoiser(c.model, "meta"), partial(batch_of, c, videos), c.precision)


def inference(c: TrainConfig, videos: int) -> list[Operation]:
    """One evaluation of D."""
    denoiser, network = Denoiser(c.model, "meta"), c.model.network
    batch = batch_of(c, videos)
    frames, height, width = network.size
    with torch.device("meta"):
        x, sigma = torch.empty(videos, frames, 3, height, width), torch.empty(videos)
        latents = torch.empty(videos, network.latent_tokens, network.latent_width) if network.kind == "fit" else None
        told = Conditioning(sigma, batch["text"], batch["text_mask"], batch["frame_rate"], batch["resolution"])
    return trace_sampling(denoiser, lambda: denoiser.denoise(x, sigma, told, latents), c.precision)


def compare(videos: int, device: Device) -> list[Row]:
    """All networks of the paper's table, training before inference."""
    rows = []
    for name, published in PAPER.items():
        c = config.load(TrainConfig, YAMLS / f"{name}.yaml")
        for step, trace, paper in zip(("training", "inference"), (training, inference), published, strict=True):
            operations = trace(c, videos)
            eager = roofline.seconds(roofline.eager(operations), device, hosted=True)
            fused = roofline.seconds(roofline.fused(operations), device, hosted=False)
            flops = sum(operation.flops for operation in operations)
            rows.append(Row(name, step, flops / videos / 1e12, 1e3 * eager / videos, 1e3 * fused / videos, paper))
    return rows


def report(rows: list[Row], videos: int, device: Device) -> str:
    """The rows for people, and how many times as fast FIT 500M is as the U-Net 284M."""
    lines = [
        f"roofline of an {device.name}, {videos} videos at once; milliseconds per video",
        f"{'network':14}{'step':11}{'TFLOP':>8}{'eager':>9}{'fused':>9}{'paper':>9}{'paper / eager':>15}{'paper reaches':>15}",
    ]
    for r in rows:
        reached = r.tflop * 1e15 / r.paper / device.lowered
        times = f"{r.tflop:8.3f}{r.eager:9.2f}{r.fused:9.2f}{r.paper:9.1f}"
        lines.append(f"{r.model:14}{r.step:11}{times}{r.paper / r.eager:15.1f}{reached:15.0%}")
    of = {(r.model, r.step): r for r in rows}
    for step in ("training", "inference"):
        fit, unet = of["stage1_500m", step], of["unet_284m", step]
        predicted = f"{unet.eager / fit.eager:.2f} x the time eager, {unet.fused / fit.fused:.2f} x fused"
        paper = f"{unet.paper / fit.paper:.2f} x in the paper"
        lines.append(f"{step}: U-Net 284M over FIT 500M, {unet.tflop / fit.tflop:.2f} x the operations, {predicted}, {paper}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="videos at once (default 32)")
    parser.add_argument("--device", choices=list(DEVICES), default="A100", help="(default A100, the paper's)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        parser.error("--batch must be at least 1")
    rows = compare(arguments.batch, DEVICES[arguments.device])
    print(
        json.dumps([asdict(row) for row in rows], indent=2)
        if arguments.json
        else report(rows, arguments.batch, DEVICES[arguments.device])
    )


if __name__ == "__main__":
    main()
