"""LAMB's step against AdamW's, on FIT 500M's list of parameters: ``python bench/optimizer.py [--help]``.

Both step the same weights on the same gradients, in rounds that interleave them with a copy of as many bytes as the weights have,
the machine's own limit; medians are reported. AdamW is torch's foreach implementation, and on a GPU the fused one too.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model import cpu_memory

if __name__ == "__main__":
    cpu_memory.tune()  # may start the process afresh, so before the slow imports

import torch
from torch.optim import AdamW

from bench.timing import interleaved, name_of
from model import config
from model.denoiser import Denoiser
from model.lamb import LAMB, LAMBConfig
from model.train import TrainConfig

YAML = Path(__file__).parents[1] / "yamls/stage1_500m.yaml"


def compare(yaml: Path, rounds: int) -> dict[str, Any]:
    """Run the comparison; returns what is printed as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [p.shape for p in Denoiser(config.load(TrainConfig, yaml).model, "meta").parameters()]
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, device=device) / 30) for shape in shapes]
    for p in weights:
        p.grad = torch.randn_like(p) / 1000
    rivals: dict[str, torch.optim.Optimizer] = {
        "LAMB": LAMB(weights, LAMBConfig()),
        "AdamW foreach": AdamW(weights, lr=1e-4, weight_decay=0.01, foreach=True),
    }
    if device.type == "cuda":
        rivals["AdamW fused"] = AdamW(weights, lr=1e-4, weight_decay=0.01, fused=True)
    source: list[torch.Tensor] = [p.data for p in weights]
    target = [torch.empty_like(p) for p in source]
    work: dict[str, Callable[[], Any]] = {name: optimizer.step for name, optimizer in rivals.items()}
    work["copy"] = lambda: torch._foreach_copy_(target, source)
    with torch.no_grad():
        times = interleaved(work, rounds, device)
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    numbers = sum(p.numel() for p in weights)
    return {
        "device": name_of(device),
        "parameters": numbers,
        "rounds": rounds,
        "milliseconds": {name: 1000 * median for name, median in medians.items()},
        "copies": {name: median / medians["copy"] for name, median in medians.items()},
        "ratio": {name: medians["LAMB"] / medians[name] for name in rivals if name != "LAMB"},
    }


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['device']}; {result['parameters'] / 1e6:.0f} M parameters, float32, median of {result['rounds']}"]
    lines += [f"{name:15}{took:10.1f} ms{result['copies'][name]:8.1f} copies" for name, took in result["milliseconds"].items()]
    lines += [f"LAMB takes {ratio:.2f} x the time of {name}" for name, ratio in result["ratio"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yaml", type=Path, default=YAML, help="whose model's parameters (default: stage1_500m.yaml)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, after one that warms up (default 9)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        sys.exit("--rounds must be at least 1")
    result = compare(arguments.yaml, arguments.rounds)
    print(json.dumps(result, indent=2) if arguments.json else report(result))


if __name__ == "__main__":
    main()
