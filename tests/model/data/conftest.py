"""Writes small real datasets: MDS shards with a manifest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from torchvision.io import encode_jpeg

from model import text
from model.data import schema
from model.data.schema import Kind, Manifest, TextManifest

HEIGHT, WIDTH, TEXT_WIDTH, MAX_TOKENS = 6, 10, 4, 5


def row(kind: Kind, number: int, frames: int, frame_format: str, size: tuple[int, int]) -> dict[str, Any]:
    """Sample ``number``: pixel (0, 0) of frame f holds (number, f, 7 if an image); a raw frame's rest, the state rows too."""
    pixels = np.zeros((frames, *size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = number, np.arange(frames)[:, None, None], 7 * (kind == "images")
    if frame_format == "raw":
        encoded = [frame.tobytes() for frame in pixels]
    else:
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


@pytest.fixture
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
