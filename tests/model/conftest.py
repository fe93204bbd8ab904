"""What the model's tests share: small networks and what they are told, and small real datasets (MDS shards with a manifest)."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from model.networks.unet.config import UNetConfig

REPOSITORY = Path(__file__).parents[2]
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

# The same video; attention over 4x6 and 2x3 places.
TINY_UNET = UNetConfig(
    size=(4, 8, 12),
    base_width=64,
    multipliers=(1, 2, 2),
    residual_blocks=1,
    attention_factors=(2, 4),
    head_width=16,
    conditioning_width=48,
    text_width=6,
    dropout=0.0,
)


@pytest.fixture
def tiny() -> FITConfig:
    """A FIT of some thousand parameters."""
    return TINY


@pytest.fixture
def tiny_beyond() -> FITConfig:
    """The same with what the paper's has not."""
    beyond = {"modulation": True, "text_modulation": True, "text_standardised": True, "convolution": True}
    return replace(TINY, **beyond, pixel_width=6, head_norm=False)


@pytest.fixture
def tiny_unet() -> UNetConfig:
    """A U-Net of three levels, two of them with attention."""
    return TINY_UNET


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on other devices, too, so that ``-m device`` selects it."""
    for item in items:
        if "device" in getattr(item, "fixturenames", ()) and item.get_closest_marker("cpu_only") is None:
            item.add_marker(pytest.mark.device)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device of the environment variable TEST_DEVICE, by default the CPU; within, tensors are made on it.

    What is drawn from a generator comes from the CPU's: the numbers are then the same everywhere.
    """
    chosen = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with chosen if chosen.type != "cpu" else contextlib.nullcontext():
        yield chosen
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def conditioning() -> Callable[..., Conditioning]:
    """``conditioning(batch, dtype=..., **changes)``: videos and images in turn, captions of 1 to 5 tokens."""

    def build(batch: int, dtype: torch.dtype = torch.float32, **changes: torch.Tensor) -> Conditioning:
        generator = torch.Generator().manual_seed(5)
        text = torch.randn(batch, 5, 6, generator=generator, device="cpu")
        rates = torch.tensor([24.0, float("inf"), 12.0, 8.0])
        given = Conditioning(
            c_noise=torch.linspace(-1.5, 1, batch),
            text=text.to(torch.get_default_device(), dtype),
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
def clips(conditioning: Callable[..., Conditioning]) -> Callable[..., dict[str, Any]]:
    """``clips(batch, seed=0)``: what the model sees in training, for ``stage``'s models; ``seed`` decides the noise alone."""

    def build(batch: int, seed: int = 0) -> dict[str, Any]:
        told = conditioning(batch)
        names = ("text", "text_mask", "frame_rate", "resolution")
        video = torch.rand(batch, 4, 3, 6, 12, generator=torch.Generator().manual_seed(7)) * 2 - 1
        seeds = [1000 * seed + row for row in range(batch)]
        return {"video": video, "seed": seeds, **{name: getattr(told, name) for name in names}}

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


# The demo's run with the paper's FIT, optimiser and self-conditioning; its text stays standardised.
RUN = """
base: {repository}/yamls/demo/stage1.yaml
name: tiny
folder: {folder}
model:
  codec: {{height: 8, width: 16, pad_bottom: 0}}
  diffusion: {{sigma_in: 4.0, log_sigma_mean: -1.2, log_sigma_std: 1.2}}
  self_conditioning: 0.9
  uncertainty_weighting: true # its state must outlive kills, too
  network:
    modulation: false
    text_modulation: false
    convolution: false
    pixel_width: 0
    head_norm: true
    position_std: 1.0
    size: [4, 8, 16]
    group: [4, 2, 2]
    patch_width: 32
    latent_tokens: 8
    latent_width: 32
    blocks: 2
    global_layers: 1
    patch_head_width: 16
    latent_head_width: 16
    conditioning_width: 32
    text_width: 4
    dropout: 0.1 # so that a resumed run must also take up the random state
data: {{videos: {data}/videos, images: {data}/images, frames: 4, max_tokens: 5}}
optimizer: {{kind: lamb, lr: 1e-2, betas: [0.9, 0.99], weight_decay: 0.01}}
schedule: {{steps: {steps}, warmup: 3}}
clip_norm: 0.5
sharding: {{blocks: true, reshard: true}}
global_batch: 8
checkpoints: {{every: {every}}}
samples: null
tracking: {{uri: 'sqlite:///{folder}/mlflow.db', artifacts: '{folder}/artifacts'}}
publish: {{name: tiny, alias: newest}}
"""


@dataclass(frozen=True)
class Training:
    """A tiny run in a folder of its own, started as users start it. 5 batches make an epoch, so 7 steps end within one;
    59 of them last for seconds, so that what comes from outside finds the run at work."""

    folder: Path
    data: Path
    steps: int = 59
    every: int = 7

    def write_yaml(self) -> Path:
        """The run's configuration."""
        self.folder.mkdir(parents=True, exist_ok=True)
        yaml = self.folder / "tiny.yaml"
        values = {"repository": REPOSITORY, "folder": self.folder, "data": self.data, "steps": self.steps, "every": self.every}
        yaml.write_text(RUN.format(**values))
        return yaml

    def start(self, *overrides: str, processes: int = 2) -> subprocess.Popen[str]:
        """Start it under Composer's launcher, in a process group of its own."""
        yaml = self.write_yaml()
        launcher = Path(sys.executable).with_name("composer")
        command = [str(launcher), "-n", str(processes), "model/train.py", str(yaml), *overrides]
        with (self.folder / "log.txt").open("a") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, text=True, start_new_session=True)

    def finish(self, process: subprocess.Popen[str]) -> None:
        """Wait for success."""
        assert process.wait(timeout=240) == 0, self.log[-3000:]

    def wait_for(self, process: subprocess.Popen[str], pattern: str) -> None:
        """Wait until the folder of checkpoints holds what ``pattern`` matches."""
        self.wait_until(process, lambda: bool(list((self.folder / "tiny" / "checkpoints").glob(pattern))))

    def wait_until(self, process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
        """Wait for something that a run does before it ends."""
        deadline = time.monotonic() + 200
        while not happened():
            assert process.poll() is None and time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.005)

    def take_back(self, to: int) -> None:
        """Remove what the run has made after step ``to``, of which there is a checkpoint."""
        for folder in (self.folder / "tiny").glob("model-step-*"):
            shutil.rmtree(folder)
        for folder in (self.folder / "tiny" / "checkpoints").iterdir():
            if int(folder.name.partition("-ba")[2]) > to:
                shutil.rmtree(folder)
        assert self.whole[-1] == to

    @property
    def log(self) -> str:
        """All that its processes have printed so far."""
        return (self.folder / "log.txt").read_text(errors="replace")

    @property
    def folders(self) -> list[int]:
        """Steps of the checkpoints, whole or not."""
        return [int(folder.name.partition("-ba")[2]) for folder in (self.folder / "tiny" / "checkpoints").glob("ep*-ba*")]

    @property
    def whole(self) -> list[int]:
        """Steps of the sealed checkpoints, in order."""
        seals = (self.folder / "tiny" / "checkpoints").glob("ep*-ba*/whole.json")
        return sorted(int(seal.parent.name.partition("-ba")[2]) for seal in seals)

    def weights(self) -> dict[str, torch.Tensor]:
        """What the finished run published."""
        from safetensors.torch import load_file

        return load_file(self.folder / "tiny" / f"model-step-{self.steps:07d}" / "model.safetensors")


@pytest.fixture(scope="session")
def run_data(tmp_path_factory: pytest.TempPathFactory, write_dataset: Callable[..., Path]) -> Path:
    """Videos and images for ``training``."""
    folder = tmp_path_factory.mktemp("shards")
    for kind in ("videos", "images"):
        write_dataset(folder / kind, kind, 20, size=(8, 16), frames=12)
    return folder


@pytest.fixture(scope="session")
def training(run_data: Path) -> Callable[..., Training]:
    """``training(folder, steps=59, every=7)`` is a tiny run, named "tiny"."""

    def build(folder: Path, **values: int) -> Training:
        return Training(folder, run_data, **values)

    return build


@pytest.fixture(scope="session")
def published_base(tmp_path_factory: pytest.TempPathFactory, training: Callable[..., Training]) -> Path:
    """The folder of a published model of ``training``'s kind, whose every weight matters to what it samples."""
    from model import checkpoint, config
    from model.data import dataset
    from model.denoiser import Denoiser
    from model.train import TrainConfig

    folder = tmp_path_factory.mktemp("base")
    c = config.load(TrainConfig, training(folder / "run").write_yaml())
    torch.manual_seed(1)
    denoiser = Denoiser(c.model)
    torch.nn.init.normal_(denoiser.network.self_conditioning_norm.weight, std=0.3)
    weights = checkpoint.gather(dict(denoiser.named_parameters()))
    origin = checkpoint.Origin("base", 0, "0")
    checkpoint.write(folder / "model", weights, config.to_tree(c), dataset.manifests(c.data), origin)
    return folder / "model"


@pytest.fixture(autouse=True)
def _swept(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove what killed runs leave in shared memory: every loader that is built later would open, and keep open, each of it."""
    yield
    if "training" not in request.fixturenames:
        return
    data = str(request.getfixturevalue("run_data")).lstrip("/").encode()
    for names in Path("/dev/shm").glob("*_locals"):
        if data in names.read_bytes():
            for left in names.parent.glob(f"{names.name.removesuffix('locals')}*"):
                left.unlink(missing_ok=True)
