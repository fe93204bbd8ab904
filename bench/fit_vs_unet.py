"""FIT 500M against the U-Net 284M, both at full size: ``python bench/fit_vs_unet.py [--help]``.

Times a training step (self-conditioning pass, forward, backward; the optimiser apart) and a sampling step (one evaluation of D,
no guidance) of both networks on the same batch in the same precision. Rounds interleave the networks and a large matrix product,
the machine's own peak, so that a slow minute hits all alike; medians are reported. FLOPs are counted on
the meta device (model/planning/meta_step.py).

The paper's ratios on an A100 (Table 2): 3.31 in training, 4.49 in inference. Without a GPU: batch 1, float32, all cores; a minute
and a half a round, since nothing is scaled down.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from model import cpu_memory

if __name__ == "__main__":
    cpu_memory.tune()  # may start the process afresh, so before the slow imports

import torch
from torch import Tensor
from tqdm import tqdm

from bench.timing import name_of, seconds
from model import config
from model.denoiser import Denoiser
from model.diffusion import edm
from model.networks.conditioning import Conditioning
from model.planning.meta_step import Precision, StepCount, count_step
from model.train import TrainConfig

YAMLS = Path(__file__).parents[1] / "yamls"
NETWORKS = {"FIT 500M": YAMLS / "stage1_500m.yaml", "U-Net 284M": YAMLS / "unet_284m.yaml"}
TEXT_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """One network's step of one kind."""

    network: str
    step: str
    milliseconds: float  # median, per video
    spread: float  # (slowest - fastest) / median
    flops: int  # per video
    achieved: float  # FLOP/s
    of_peak: float  # share of the matrix product's FLOP/s in the same run


def clips(count: int, c: TrainConfig, device: torch.device | str) -> dict[str, Any]:
    """A batch of noise with full-length captions; half of it images."""
    codec = c.model.codec
    shape = (count, c.data.frames, 3, codec.height, codec.width)
    rates = torch.tensor([24.0, float("inf")]).repeat(-(-count // 2))[:count]
    return {
        "video": torch.empty(shape, device=device).uniform_(-1, 1),
        "text": torch.randn(count, TEXT_TOKENS, c.data.text_width, device=device).to(torch.bfloat16),
        "text_mask": torch.ones(count, TEXT_TOKENS, dtype=torch.bool, device=device),
        "frame_rate": rates.to(device),
        "seed": list(range(count)),
        "resolution": torch.tensor([[720.0, 1280.0]], device=device).repeat(count, 1),
    }


def training_step(denoiser: Denoiser, batch: dict[str, Any], autocast: Callable[[], Any]) -> None:
    """What training does for a batch, up to the gradients."""
    denoiser.train()
    with autocast():
        terms = denoiser(batch)
    denoiser.loss(terms, batch).backward()
    denoiser.zero_grad(set_to_none=True)


@torch.no_grad()
def sampling_step(denoiser: Denoiser, x: Tensor, conditioning: Conditioning, autocast: Callable[[], Any]) -> None:
    """One evaluation of D, as the sampler makes many."""
    denoiser.eval()
    with autocast():
        denoiser.denoise(x, conditioning.c_noise.mul(4).exp(), conditioning, latents_of(denoiser, len(x)))


def latents_of(denoiser: Denoiser, count: int) -> Tensor | None:
    """Latents such as an evaluation before would have left, for a network that carries some."""
    network = denoiser.config.network
    if network.kind != "fit":
        return None
    device = next(denoiser.parameters()).device
    return torch.zeros(count, network.latent_tokens, network.latent_width, device=device)


def conditioning_of(batch: dict[str, Any]) -> Conditioning:
    """What a sampler would tell the network about the batch's captions."""
    c_noise = edm.c_noise(torch.ones_like(batch["frame_rate"]))
    return Conditioning(c_noise, batch["text"], batch["text_mask"], batch["frame_rate"], batch["resolution"])


def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], None], int]:
    """A large square matrix product and its FLOPs."""
    size = 8192 if device.type == "cuda" else 3072
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 2

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    return multiply, repeats * 2 * size**3


def count(c: TrainConfig, precision: Precision) -> StepCount:
    """FLOPs of one video's step."""
    return count_step(Denoiser(c.model, "meta"), lambda: clips(1, c, "meta"), precision)


def profile(name: str, work: Callable[[], None], device: torch.device) -> None:
    """Print where the time of one step goes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as record:
        work()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"\n{name}\n{record.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60)}")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the comparison; returns what is printed as JSON."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = arguments.precision == "bf16" if arguments.precision else device.type == "cuda"
    batch_size = arguments.batch or (32 if device.type == "cuda" else 1)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    torch.manual_seed(0)
    work: dict[tuple[str, str], Callable[[], None]] = {}
    flops: dict[tuple[str, str], int] = {}
    for name, path in NETWORKS.items():
        c = config.load(TrainConfig, path)
        counted = count(c, "amp_bf16" if bf16 else "fp32")
        flops[name, "training"] = counted.first_pass + counted.forward + counted.backward + counted.recomputation
        flops[name, "sampling"] = counted.forward
        denoiser = Denoiser(c.model, device)
        if arguments.compile:
            denoiser.network.compile_blocks()
        batch = clips(batch_size, c, device)
        frames, height, width = c.model.network.size
        x = torch.randn(batch_size, frames, 3, height, width, device=device)
        work[name, "training"] = partial(training_step, denoiser, batch, autocast)
        work[name, "sampling"] = partial(sampling_step, denoiser, x, conditioning_of(batch), autocast)
    multiply, product_flops = matmul_peak(device, torch.bfloat16 if bf16 else torch.float32)

    times: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    peaks: list[float] = []
    with tqdm(total=(arguments.rounds + 1) * (len(work) + 1), unit="step", disable=None) as bar:
        for round_ in range(arguments.rounds + 1):  # the first warms up
            for key, step in work.items():
                bar.set_description(" ".join(key))
                took = seconds(step, device)
                bar.update()
                if round_:
                    times[key].append(took)
            took = seconds(multiply, device)
            bar.update()
            if round_:
                peaks.append(product_flops / took)
    if arguments.profile:
        for (name, kind), step in work.items():
            profile(f"{name}, {kind}", step, device)

    peak = statistics.median(peaks)
    rows = []
    for (name, kind), measured in times.items():
        median = statistics.median(measured)
        achieved = flops[name, kind] * batch_size / median
        spread = (max(measured) - min(measured)) / median
        milliseconds = 1000 * median / batch_size
        rows.append(Row(name, kind, milliseconds, spread, flops[name, kind], achieved, achieved / peak))
    ratios = {kind: _of(rows, "U-Net 284M", kind) / _of(rows, "FIT 500M", kind) for kind in ("training", "sampling")}
    return {
        "device": name_of(device),
        "precision": "bf16" if bf16 else "fp32",
        "compiled": arguments.compile,
        "batch": batch_size,
        "rounds": arguments.rounds,
        "matmul_peak": peak,
        "rows": [asdict(row) for row in rows],
        "ratios": ratios,
    }


def _of(rows: list[Row], network: str, step: str) -> float:
    return next(row.milliseconds for row in rows if (row.network, row.step) == (network, step))


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    how = f"{result['precision']}, {'compiled' if result['compiled'] else 'not compiled'}"
    lines = [
        f"{result['device']}; {how}, batch {result['batch']}, median of {result['rounds']}",
        f"matrix product: {result['matmul_peak'] / 1e12:.3g} TFLOP/s",
        "",
        f"{'network':12}{'step':12}{'ms / video':>12}{'spread':>9}{'TFLOP / video':>15}{'TFLOP/s':>10}{'of peak':>9}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['network']:12}{row['step']:12}{row['milliseconds']:12.2f}{row['spread']:9.0%}"
            f"{row['flops'] / 1e12:15.3f}{row['achieved'] / 1e12:10.3f}{row['of_peak']:9.0%}"
        )
    training, sampling = result["ratios"]["training"], result["ratios"]["sampling"]
    lines += ["", f"FIT is {training:.2f} x as fast in training, {sampling:.2f} x in sampling (the paper: 3.31 and 4.49)"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="videos at once; 32 on a GPU, else 1")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="bf16 (autocast) on a GPU, else fp32")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up (default 5)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of both networks")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or (arguments.batch is not None and arguments.batch < 1):
        sys.exit("--rounds and --batch must be at least 1")
    result = compare(arguments)
    print(json.dumps(result, indent=2) if arguments.json else report(result))


if __name__ == "__main__":
    main()
