"""What the pipelines' tests share: a published cascade of small stages with a real small T5."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from streaming import MDSWriter

from dataprep import moving_scenes as benchmark
from dataprep import small_t5
from dataprep.scenes import Scene, render
from model import checkpoint, config, text
from model.checkpoint import Origin
from model.codec import PixelCodecConfig
from model.data import schema
from model.data.schema import Manifest, TextManifest
from model.denoiser import Denoiser, ModelConfig, UpsamplerConfig
from model.diffusion.sampler import SamplerConfig
from model.networks.fit.config import FITConfig
from pipelines.cascade import Cascade, CascadeConfig
from pipelines.learned import LearnedConfig

NETWORK = FITConfig(
    size=(4, 8, 16),
    group=(4, 2, 2),
    patch_width=32,
    latent_tokens=8,
    latent_width=32,
    blocks=1,
    global_layers=1,
    patch_head_width=16,
    latent_head_width=16,
    conditioning_width=32,
)


@pytest.fixture(scope="session")
def write_stage() -> Callable[[Path, ModelConfig, Manifest], Path]:
    """``write_stage(folder, model, manifest)`` publishes a stage with weights of a seed."""

    def write(folder: Path, model: ModelConfig, manifest: Manifest) -> Path:
        torch.manual_seed(0)
        tree = {"model": config.to_tree(model)}
        origin = Origin("run", 1, "commit")
        checkpoint.write(folder, dict(Denoiser(model).named_parameters()), tree, {"videos": manifest}, origin)
        return folder

    return write


@pytest.fixture(scope="session")
def cascade_config(tmp_path_factory: pytest.TempPathFactory, write_stage: Callable[..., Path]) -> CascadeConfig:
    """Folders of both stages: 4 frames of 6x16, upsampled to 12x32."""
    folder = tmp_path_factory.mktemp("cascade")
    small_t5.build(small_t5.SmallT5Config(output=str(folder / "t5")))
    encoder = text.TextEncoder(str(folder / "t5"), 16)
    told = TextManifest(str(folder / "t5"), text.revision(str(folder / "t5")), encoder.width, "bfloat16", 16)
    network = replace(NETWORK, text_width=encoder.width)
    stage1 = ModelConfig(PixelCodecConfig(height=6, width=16, pad_bottom=2), network=network)
    large = replace(network, size=(4, 12, 32), group=(4, 3, 2), latent_tokens=8, upsampler=True)
    stage2 = ModelConfig(PixelCodecConfig(height=12, width=32, pad_bottom=0), network=large, upsampler=UpsamplerConfig(factor=2))
    manifest = Manifest("videos", 6, 16, 24.0, 24, "raw", 8, told)
    return CascadeConfig(
        stage1=str(write_stage(folder / "stage1", stage1, manifest)),
        stage2=str(write_stage(folder / "stage2", stage2, replace(manifest, height=12, width=32))),
        stage1_sampler=SamplerConfig(steps=3, guidance=2),
        stage2_sampler=SamplerConfig(steps=2, guidance=1),
        frame_rate=8.0,
    )


FRAMES = 16  # stored, at 24 per second


def write_scenes(folder: Path, scenes: list[Scene], height: int, width: int, encoder: text.TextEncoder) -> str:
    """A data set of the scenes."""
    with MDSWriter(out=str(folder), columns=schema.COLUMNS, hashes=["xxh64"]) as writer:
        for number, scene in enumerate(scenes):
            frames = np.stack([render(scene, 0.5 + n / 24, height, width) for n in range(FRAMES)])
            ends = (np.arange(1, FRAMES + 1) * frames[0].size).astype(np.uint32)
            states = encoder.encode([scene.caption()])[0]
            row = {"key": f"{number}", "caption": scene.caption(), "frames": frames.tobytes(), "frame_ends": ends}
            size = {"source_height": 90, "source_width": 160, "start_seconds": 0.0}
            writer.write({**row, **size, "text": text.pack(states)})
    told = TextManifest("encoder", "r", encoder.width, "bfloat16", 16)
    Manifest("videos", height, width, 24.0, FRAMES, "raw", len(scenes), told).write(folder)
    return str(folder)


@pytest.fixture(scope="session")
def wide_clips(tmp_path_factory: pytest.TempPathFactory, cascade_config: CascadeConfig) -> str:
    """A data set of two objects and pans alone."""
    scenes = list(itertools.islice(benchmark.scenes("wide", 1), 8))
    return write_scenes(tmp_path_factory.mktemp("wide"), scenes, 6, 16, Cascade(cascade_config, "cpu").encoder)


@pytest.fixture(scope="session")
def learned_config(tmp_path_factory: pytest.TempPathFactory, cascade_config: CascadeConfig) -> LearnedConfig:
    """A cascade that has learnt nothing, and held-out clips of eight scenes, three of them of new combinations."""
    folder = tmp_path_factory.mktemp("learned")
    encoder = Cascade(cascade_config, "cpu").encoder
    seen, new = (list(itertools.islice(benchmark.scenes(split, 1), number)) for split, number in (("seen", 5), ("unseen", 3)))
    return LearnedConfig(
        low=write_scenes(folder / "low", [*seen, *new], 6, 16, encoder),
        high=write_scenes(folder / "high", [*seen, *new], 12, 32, encoder),
        trained=write_scenes(folder / "trained", list(itertools.islice(benchmark.scenes("seen", 0), 600)), 6, 16, encoder),
        output=str(folder / "out"),
        cascade=cascade_config,
        frame_rates=(8, 6),
        upsampled=3,
        noise=(1,),
        guidances=(1, 3),
        swept=4,
        batch=2,
        sheet=2,
        device="cpu",
    )
