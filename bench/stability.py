"""A small FIT under LAMB at the paper's learning rate: ``python bench/stability.py [--help]``.

Trains on captioned scenes drawn in memory, from the first step at the full learning rate (no warm-up, which would hide a start
that explodes), and after every step measures the loss on held-out clips at fixed noise. A spike is a rise of that loss above its
lowest value so far. Prints the largest, and with ``--figure`` draws the curve. A minute or two on a CPU.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python puts bench/ first on the path, where bench/dataprep.py would shadow the package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from model import cpu_memory  # noqa: E402

if __name__ == "__main__":
    cpu_memory.tune()  # may start the process afresh, so before the slow imports

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from tqdm import tqdm  # noqa: E402

from dataprep import scenes  # noqa: E402
from model.codec import PixelCodecConfig, from_pixels  # noqa: E402
from model.denoiser import Denoiser, ModelConfig  # noqa: E402
from model.diffusion.edm import DiffusionConfig  # noqa: E402
from model.lamb import LAMB, LAMBConfig  # noqa: E402
from model.networks.fit.config import FITConfig  # noqa: E402

FRAMES, HEIGHT, WIDTH, TEXT_WIDTH, TEXT_TOKENS = 8, 18, 32, 32, 4

CLIP_NORM = 0.5  # as in training

# FIT 500M's block, smaller in every direction.
SMALL = ModelConfig(
    codec=PixelCodecConfig(height=HEIGHT, width=WIDTH, pad_bottom=2),
    diffusion=DiffusionConfig(sigma_in=4.0),
    network=FITConfig(
        size=(FRAMES, HEIGHT + 2, WIDTH),
        group=(FRAMES, 5, 4),
        patch_width=96,
        latent_tokens=32,
        latent_width=128,
        blocks=3,
        global_layers=2,
        patch_head_width=48,
        latent_head_width=64,
        conditioning_width=128,
        text_width=TEXT_WIDTH,
    ),
)


@dataclass(frozen=True)
class Curve:
    """Losses after each step."""

    training: list[float]
    held_out: list[float]  # on the same clips at the same noise; the first is before any step
    parameters: int

    @property
    def largest_rise(self) -> float:
        """The most that the held-out loss stood above its lowest value before, as a factor."""
        lowest = np.minimum.accumulate(self.held_out)
        return float(max(after / before for after, before in zip(self.held_out[1:], lowest[:-1], strict=True)))


def clips(rng: np.random.Generator, count: int) -> dict[str, Any]:
    """Scenes in motion, half of them stills; each word of a caption's first ones is a fixed random vector."""
    videos, texts, rates = [], [], []
    for number in range(count):
        scene, still = scenes.draw_scene(rng, "simple"), number % 2 == 1
        instants = [0.0] * FRAMES if still else [t / 8 for t in range(FRAMES)]
        videos.append(torch.from_numpy(np.stack([scenes.render(scene, t, HEIGHT, WIDTH) for t in instants])))
        words = (scene.still_caption() if still else scene.caption()).split()[:TEXT_TOKENS]
        texts.append(torch.stack([_vector(word) for word in words + [""] * (TEXT_TOKENS - len(words))]))
        rates.append(float("inf") if still else 8.0)
    return {
        "video": from_pixels(torch.stack(videos)),
        "text": torch.stack(texts),
        "text_mask": torch.ones(count, TEXT_TOKENS, dtype=torch.bool),
        "frame_rate": torch.tensor(rates),
        "seed": list(range(count)),
        "resolution": torch.tensor([[360.0, 640.0]]).repeat(count, 1),
    }


def _vector(word: str) -> Tensor:
    seed = int.from_bytes(word.encode()[:6].ljust(6, b"\0"), "little")
    return torch.randn(TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def held_out_loss(denoiser: Denoiser, batch: dict[str, Any]) -> float:
    """The loss at noise that is the same at every call: that of the clips' seeds."""
    denoiser.eval()
    with torch.no_grad():
        loss = float(denoiser.loss(denoiser(batch), batch))
    denoiser.train()
    return loss


def train(config: ModelConfig, optimizer: LAMBConfig, steps: int, batch: int) -> Iterator[tuple[float, float]]:
    """Yield (training loss, held-out loss) after each step; the first pair is before any."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    held_out, pool = clips(rng, 8), clips(rng, 8 * batch)
    denoiser = Denoiser(config)
    lamb = LAMB(denoiser.parameters(), optimizer)
    first = held_out_loss(denoiser, held_out)
    yield first, first
    for _ in range(steps):
        rows = torch.from_numpy(rng.permutation(len(pool["video"]))[:batch])
        given = {name: values[rows] for name, values in pool.items() if isinstance(values, Tensor)}
        given["seed"] = rng.integers(2**63, size=batch).tolist()
        loss = denoiser.loss(denoiser(given), given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), CLIP_NORM)
        lamb.step()
        lamb.zero_grad()
        yield float(loss), held_out_loss(denoiser, held_out)


def curve(config: ModelConfig, optimizer: LAMBConfig, steps: int, batch: int) -> Curve:
    """Train with a progress bar."""
    with tqdm(train(config, optimizer, steps, batch), total=steps + 1, unit="step", disable=None) as bar:
        losses = []
        for pair in bar:
            losses.append(pair)
            bar.set_postfix(held_out=f"{pair[1]:.3f}")
    parameters = sum(p.numel() for p in Denoiser(config, "meta").parameters())
    return Curve([pair[0] for pair in losses], [pair[1] for pair in losses], parameters)


def draw(path: Path, found: Curve, title: str) -> None:
    """The losses over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(found.training, color="#b8c4d6", linewidth=1, label="training batch")
    axes.plot(found.held_out, color="#1f4e8c", linewidth=1.8, label="held-out clips, fixed noise")
    axes.set(xlabel="optimiser steps", ylabel="loss", yscale="log", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=5e-3, help="LAMB's learning rate (default: the paper's, 5e-3)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--figure", type=Path, help="a PNG of the curve")
    arguments = parser.parse_args(given)
    found = curve(SMALL, LAMBConfig(lr=arguments.lr), arguments.steps, arguments.batch)
    what = f"FIT of {found.parameters / 1e6:.1f} M parameters, LAMB at {arguments.lr:g} from the first step"
    print(f"{what}, batch {arguments.batch}")
    print(f"held-out loss: {found.held_out[0]:.3f} at the start, {found.held_out[-1]:.3f} after {arguments.steps} steps")
    print(f"largest rise above the lowest loss before: {found.largest_rise:.3f} x")
    if arguments.figure:
        draw(arguments.figure, found, what)
        print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
