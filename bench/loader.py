"""What the training data set yields per core: ``python bench/loader.py [--stage 2] [--help]``.

Clips of a made-up data set, read by the training loader in one process, against the same clips from a WebDataset tar through the
same decoding and batching, and against a plain copy of as many bytes as a batch has, the machine's own limit. In rounds that
interleave them; medians are reported.
"""

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from model import cpu_memory

if __name__ == "__main__":
    cpu_memory.tune()  # as training does; may start the process afresh, so before the slow imports

import numpy as np
import torch
from streaming import MDSWriter
from torchvision.io import encode_jpeg
from tqdm import tqdm

from bench.timing import interleaved
from model import text
from model.data import batch as batches
from model.data import schema
from model.data.dataset import DataConfig, build_loader
from model.data.samples import View, decode_sample
from model.data.schema import FrameFormat, Manifest, TextManifest

STAGES: dict[int, tuple[int, int, FrameFormat]] = {1: (36, 64, "raw"), 2: (288, 512, "jpeg")}
FRAMES, STORED, TOKENS, MAX_TOKENS, WIDTH = 16, 48, 18, 128, 1024  # T5-11B's states are 1024 wide; captions have 18 tokens
RATES = (24.0, 12.0, 8.0)
CPU = torch.device("cpu")


def rows(stage: int, clips: int) -> Iterator[dict[str, Any]]:
    """Smooth pictures with noise, which JPEG neither swallows nor chokes on."""
    height, width, frame_format = STAGES[stage]
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width]
    for number in range(clips):
        base = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
        stored = [np.clip(base + 3 * n + generator.normal(0, 4, base.shape), 0, 255).astype(np.uint8) for n in range(STORED)]
        if frame_format == "raw":
            encoded = [frame.tobytes() for frame in stored]
        else:
            encoded = [encode_jpeg(torch.from_numpy(frame).permute(2, 0, 1), 95).numpy().tobytes() for frame in stored]
        yield {
            "key": f"clip-{number}",
            "caption": "a caption",
            "frames": b"".join(encoded),
            "frame_ends": np.cumsum([len(frame) for frame in encoded]).astype(np.uint32),
            "start_seconds": 0.0,
            "source_height": 720,
            "source_width": 1280,
            "text": text.pack(torch.randn(TOKENS, WIDTH)),
        }


def write(folder: Path, stage: int, clips: int) -> Manifest:
    """The same clips as MDS shards in ``folder/mds`` and as a tar, ``folder/clips.tar``."""
    height, width, frame_format = STAGES[stage]
    told = TextManifest("encoder", "r", WIDTH, "bfloat16", MAX_TOKENS)
    manifest = Manifest("videos", height, width, RATES[0], STORED, frame_format, clips, told)
    with (
        MDSWriter(out=str(folder / "mds"), columns=schema.COLUMNS, hashes=["xxh64"]) as writer,
        tarfile.open(folder / "clips.tar", "w") as tar,
    ):
        for number, row in enumerate(tqdm(rows(stage, clips), "make clips", total=clips, unit="clip", leave=False, disable=None)):
            writer.write(row)
            for suffix, content in (("frames", row["frames"]), ("ends", row["frame_ends"]), ("text", row["text"])):
                data = content if isinstance(content, bytes) else _npy(content)
                entry = tarfile.TarInfo(f"{number:08d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    manifest.write(folder / "mds")
    return manifest


def from_tar(path: Path, manifest: Manifest, size: int) -> Iterator[batches.PackedBatch]:
    """Training batches from the tar."""
    import webdataset

    view = View(FRAMES, RATES, WIDTH, MAX_TOKENS, 0)

    def sample(found: dict[str, Any]) -> batches.Sample:
        row = {
            "frames": found["frames"],
            "frame_ends": np.load(io.BytesIO(found["ends"])),
            "text": np.load(io.BytesIO(found["text"])),
        }
        row |= {"key": found["__key__"], "caption": "a caption", "source_height": 720, "source_width": 1280}
        return decode_sample(row, manifest, view, 0)

    clips = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).shuffle(100).map(sample)
    yield from clips.batched(size, collation_fn=partial(batches.collate, max_tokens=MAX_TOKENS), partial=False)


def compare(stage: int, clips: int, size: int, rounds: int) -> dict[str, Any]:
    """Run the comparison; returns what is printed as JSON."""
    torch.set_num_threads(1)  # figures are per core
    height, width, _ = STAGES[stage]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        manifest = write(folder, stage, clips)
        config = DataConfig(
            height, width, WIDTH, MAX_TOKENS, videos=str(folder / "mds"), frames=FRAMES, frame_rates=RATES, workers=0
        )
        loader = build_loader(config, size).dataloader
        one = next(iter(from_tar(folder / "clips.tar", manifest, size)))
        tensors = [value for value in one.values() if isinstance(value, torch.Tensor)]
        work = {
            "ours": lambda: sum(1 for _ in loader),
            "webdataset": lambda: sum(1 for _ in from_tar(folder / "clips.tar", manifest, size)),
            "copy": lambda: [[value.clone() for value in tensors] for _ in range(clips // size)],
        }
        times = interleaved(work, rounds, CPU)
    medians = {name: clips // size * size / statistics.median(measured) for name, measured in times.items()}
    pixels = f"{FRAMES} frames of {height}x{width}, stored as {STAGES[stage][2]}"
    return {"clips": pixels, "rounds": rounds, "clips_per_second": medians, "ratio": medians["ours"] / medians["webdataset"]}


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{result['clips']}; one core, median of {result['rounds']}"]
    lines += [f"{name:12}{rate:10.0f} clips/s" for name, rate in result["clips_per_second"].items()]
    return "\n".join([*lines, f"{result['ratio']:.2f} x as fast as webdataset"])


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=tuple(STAGES), default=1, help="1: raw 36x64; 2: JPEG 288x512 (default 1)")
    parser.add_argument("--clips", type=int, help="in the data set (default 2048 for stage 1, 96 for stage 2)")
    parser.add_argument("--batch", type=int, default=32, help="clips in a batch (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up (default 5)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    clips = arguments.clips or {1: 2048, 2: 96}[arguments.stage]
    if arguments.rounds < 1 or not 1 <= arguments.batch <= clips:
        sys.exit("--rounds must be at least 1, --batch at least 1 and at most --clips")
    result = compare(arguments.stage, clips, arguments.batch, arguments.rounds)
    print(json.dumps(result, indent=2) if arguments.json else report(result))


if __name__ == "__main__":
    main()
