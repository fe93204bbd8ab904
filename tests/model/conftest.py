"""What the model's tests share: small networks and what they are told, and small real datasets (MDS shards with a manifest)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import text
from model.data import schema
from model.data.schema import Kind, Manifest, TextManifest
from model.networks.conditioning import Conditioning
from model.networks.fit.config import FITConfig

HEIGHT, WIDTH, TEXT_WIDTH, MAX_TOKENS = 6, 10, 4, 5

# 4 frames of 8x12 pixels in 2x2 patches: 4x4x6 patches, in 4 groups of 4x2x3 that hold 2 latents each.
TINY = FITConfig(
    size=(4, 8, 12),
    patch=(1, 2, 2),
    group=(4, 2, 3),
    patch_width=16,
    latent_tokens=8,
    latent_width=24,
    blocks=2,
    global_layers=2,
    patch_head_width=8,
    latent_head_width=8,
    conditioning_width=16,
    text_width=6,
    dropout=0.0,
)


@pytest.fixture
def tiny() -> FITConfig:
    """A FIT of some thousand parameters."""
    return TINY


@pytest.fixture
def conditioning() -> Callable[..., Conditioning]:
    """``conditioning(batch, dtype=..., **changes)``: videos and images in turn, captions of 1 to 5 tokens."""

    def build(batch: int, dtype: torch.dtype = torch.float32, **changes: torch.Tensor) -> Conditioning:
        generator = torch.Generator().manual_seed(5)
        rates = torch.tensor([24.0, float("inf"), 12.0, 8.0])
        given = Conditioning(
            c_noise=torch.linspace(-1.5, 1, batch),
            text=torch.randn(batch, 5, 6, generator=generator).to(dtype),
            text_mask=torch.arange(5) < torch.tensor([3, 5, 1, 4] * batch)[:batch, None],
            frame_rate=rates.repeat(batch)[:batch],
            resolution=torch.tensor([[36.0, 64.0], [720.0, 1280.0]]).repeat(batch, 1)[:batch],
        )
        return replace(given, **changes)

    return build


@pytest.fixture
def stage(tiny: FITConfig) -> Callable[..., Any]:
    """``stage(**changes)`` is a ModelConfig of 6x12 pixels, padded by 2 rows; with ``upsampler=``, of an upsampler."""
    from model.codec import PixelCodecConfig
    from model.denoiser import ModelConfig

    def build(**changes: Any) -> ModelConfig:
        codec = PixelCodecConfig(height=6, width=12, pad_bottom=2)
        network = replace(tiny, upsampler="upsampler" in changes)
        return ModelConfig(**{"codec": codec, "network": network, **changes})

    return build


@pytest.fixture
def clips(conditioning: Callable[..., Conditioning]) -> Callable[[int], dict[str, Any]]:
    """``clips(batch)``: what the model sees in training, for ``stage``'s models."""

    def build(batch: int) -> dict[str, Any]:
        told = conditioning(batch)
        names = ("text", "text_mask", "frame_rate", "resolution")
        video = torch.rand(batch, 4, 3, 6, 12, generator=torch.Generator().manual_seed(7)) * 2 - 1
        return {"video": video, **{name: getattr(told, name) for name in names}}

    return build


def row(kind: Kind, number: int, frames: int, frame_format: str, size: tuple[int, int]) -> dict[str, Any]:
    """Sample ``number``: pixel (0, 0) of frame f holds (number, f, 7 if an image); a raw frame's rest, the state rows too."""
    pixels = np.zeros((frames, *size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = number, np.arange(frames)[:, None, None], 7 * (kind == "images")
    if frame_format == "raw":
        encoded = [frame.tobytes() for frame in pixels]
    else:
        from torchvision.io import encode_jpeg  # here and below: only who writes data pays for the imports

        encoded = [encode_jpeg(torch.from_numpy(frame).permute(2, 0, 1), 100).numpy().tobytes() for frame in pixels]
    return {
        "key": f"{kind}-{number}",
        "caption": f"caption {number}",
        "frames": b"".join(encoded),
        "frame_ends": np.cumsum([len(frame) for frame in encoded]).astype(np.uint32),
        "start_seconds": 0.0,
        "source_height": 100 + number,
        "source_width": 200 + number,
        "text": text.pack(torch.full((1 + number % MAX_TOKENS, TEXT_WIDTH), float(number))),
    }


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., Path]:
    """``write_dataset(folder, kind, count, ...)`` writes a dataset and returns its folder."""

    def write(
        folder: Path,
        kind: Kind,
        count: int,
        frames: int = 10,
        frame_format: str = "raw",
        shard_bytes: int = 10_000,
        size: tuple[int, int] = (HEIGHT, WIDTH),
        edit: Callable[[dict[str, Any]], None] = lambda _: None,
        **manifest: Any,
    ) -> Path:
        from streaming import MDSWriter

        frames = 1 if kind == "images" else frames
        with MDSWriter(out=str(folder), columns=schema.COLUMNS, hashes=["xxh64"], size_limit=shard_bytes) as writer:
            for number in range(count):
                sample = row(kind, number, frames, frame_format, size)
                edit(sample)
                writer.write(sample)
        values: dict[str, Any] = {
            "kind": kind,
            "height": size[0],
            "width": size[1],
            "frame_rate": 24.0 if kind == "videos" else 0.0,
            "max_frames": frames,
            "frame_format": frame_format,
            "num_samples": count,
            "text": TextManifest("encoder", "r1", TEXT_WIDTH, "bfloat16", MAX_TOKENS),
        }
        Manifest(**{**values, **manifest}).write(folder)
        return folder

    return write


@pytest.fixture
def config() -> Callable[..., Any]:
    """``config(videos=..., ...)`` is a DataConfig that fits the datasets that ``write_dataset`` writes."""
    from model.data.dataset import DataConfig

    def make(**values: Any) -> DataConfig:
        given = {"videos": None, "images": None, **values}
        sources = {key: None if value is None else str(value) for key, value in given.items() if key in ("videos", "images")}
        defaults = {"height": HEIGHT, "width": WIDTH, "text_width": TEXT_WIDTH, "max_tokens": MAX_TOKENS, "frames": 4}
        return DataConfig(**{**defaults, "frame_rates": (24.0, 12.0, 8.0), "workers": 0, **given, **sources})

    return make
