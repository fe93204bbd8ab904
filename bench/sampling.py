"""What a sampler costs beyond its network evaluations: ``python bench/sampling.py [--help]``.

One clip of FIT 500M by Heun's method with classifier-free guidance, against the same number of bare evaluations of the network,
both branches in one batch; in rounds that interleave them. Medians are reported.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import cpu_memory

if __name__ == "__main__":
    cpu_memory.tune()  # may start the process afresh, so before the slow imports

import torch

from bench.timing import interleaved, name_of
from model import config
from model.denoiser import Denoiser
from model.diffusion import edm
from model.diffusion.sampler import SamplerConfig
from model.generate import Request, generate
from model.networks.conditioning import Conditioning
from model.train import TrainConfig

YAML = Path(__file__).parents[1] / "yamls/stage1_500m.yaml"
TOKENS = 128


def compare(yaml: Path, steps: int, rounds: int, precision: str) -> dict[str, Any]:
    """Run the comparison; returns what is printed as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    c = config.load(TrainConfig, yaml).model
    torch.manual_seed(0)
    denoiser = Denoiser(c, device).eval()
    text = torch.randn(1, TOKENS, c.network.text_width, device=device)
    told: dict[str, Any] = {
        "text": text,
        "text_mask": torch.arange(TOKENS, device=device)[None] < 20,
        "frame_rate": torch.tensor([24.0], device=device),
        "resolution": torch.tensor([[288.0, 512.0]], device=device),
    }
    sampler = SamplerConfig(steps=steps)
    evaluations = 2 * steps - 1
    frames, height, width = c.network.size
    x = torch.randn(2, frames, c.network.channels, height, width, device=device)
    both = Conditioning(
        c_noise=edm.c_noise(torch.ones(2, device=device)), **{name: torch.cat([v, v]) for name, v in told.items()}
    )
    both = replace(both, text_mask=both.text_mask * torch.tensor([[True], [False]], device=device))

    def sample() -> None:
        generate(denoiser, Request(**told, generators=[torch.Generator().manual_seed(0)]), sampler)

    def evaluate() -> None:
        latents = None
        for _ in range(evaluations):
            latents = denoiser.network(x, both, latents).latents

    work: dict[str, Callable[[], Any]] = {"sampler": sample, "evaluations": evaluate}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), autocast:
        times = interleaved(work, rounds, device)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    overheads = [a / b - 1 for a, b in zip(times["sampler"], times["evaluations"], strict=True)]
    return {
        "device": name_of(device),
        "precision": precision,
        "steps": steps,
        "evaluations": evaluations,
        "rounds": rounds,
        "seconds": medians,
        "overhead": statistics.median(overheads),
    }


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    return (
        f"{result['device']}, {result['precision']}; {result['steps']} steps, {result['evaluations']} evaluations, "
        f"median of {result['rounds']}\n"
        f"a clip {result['seconds']['sampler']:.3f} s, its evaluations alone {result['seconds']['evaluations']:.3f} s: "
        f"{100 * result['overhead']:+.2f} % beyond them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yaml", type=Path, default=YAML, help="whose model (default: stage1_500m.yaml)")
    parser.add_argument("--steps", type=int, default=4, help="of the sampler (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up (default 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 1:
        sys.exit("--rounds and --steps must be at least 1")
    result = compare(arguments.yaml, arguments.steps, arguments.rounds, arguments.precision)
    print(json.dumps(result, indent=2) if arguments.json else report(result))


if __name__ == "__main__":
    main()
