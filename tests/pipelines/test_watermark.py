"""The watermark: found again behind the codec, nowhere else, and hardly seen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from model import media
from model.codec import PixelCodecConfig
from model.data.schema import Manifest
from model.denoiser import ModelConfig
from model.diffusion.sampler import SamplerConfig
from model.errors import UserError
from model.networks.fit.config import FITConfig
from pipelines import watermark
from pipelines.cascade import Cascade, CascadeConfig


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """(3, 288, 512, 3): blobs of all sizes that move, as rich as a photograph."""
    rng = np.random.default_rng(0)
    layers = [ndimage.zoom(rng.normal(size=(320 // k + 1, 560 // k + 1, 3)), (k, k, 1), order=1)[:320, :560] for k in (4, 16, 80)]
    picture = sum(layer * weight for layer, weight in zip(layers, (10, 20, 40), strict=True)) + 120
    return np.stack([picture[2 * t : 2 * t + 288, 5 * t : 5 * t + 512] for t in range(3)]).clip(0, 255).astype(np.uint8)


def test_found_behind_the_codec_and_hardly_seen(clip: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked = watermark.embed(clip, "snapvideo")
    error = np.square(marked.astype(float) - clip).mean()
    assert 10 * np.log10(255**2 / error) > 38
    media.write_mp4(tmp_path / "marked.mp4", marked, 24)
    media.write_mp4(tmp_path / "plain.mp4", clip, 24)
    found = watermark.read(media.read_video(tmp_path / "marked.mp4", 10).frames, "snapvideo")
    assert (found.agreeing, found.bits, found.is_marked) == (64, 64, True)
    assert found.chance == pytest.approx(2.0**-64, rel=1e-6)
    assert not watermark.read(marked, "something").is_marked
    for name, code, told in (("marked", 0, "holds the watermark (64 of 64 bits"), ("plain", 1, "no watermark found")):
        with pytest.raises(SystemExit) as end:
            watermark.main([str(tmp_path / f"{name}.mp4")])
        assert end.value.code == code and told in capsys.readouterr().out


def test_small_clips_have_none(clip: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = clip[:, :36, :64]
    assert watermark.embed(small, "snapvideo") is small
    with pytest.raises(UserError, match="frames of 36x64 are too small"):
        watermark.read(small, "snapvideo")
    with pytest.raises(SystemExit) as end:
        watermark.main([str(tmp_path / "none.mp4"), "--text", "x"])
    assert end.value.code == 2 and "none.mp4" in capsys.readouterr().err


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="watermark must be a text, or null"):
        CascadeConfig(watermark="")


def test_every_sampled_clip_has_it_unless_told_otherwise(
    tmp_path: Path, write_stage: Callable[..., Path], cascade_config: CascadeConfig
) -> None:
    told = Cascade(cascade_config, "cpu").stage1.manifests["videos"].text
    network = FITConfig(
        size=(1, 256, 256), patch=(1, 64, 64), group=(1, 4, 4), patch_width=32, latent_tokens=4, latent_width=32, blocks=1,
        global_layers=1, patch_head_width=16, latent_head_width=16, conditioning_width=32, text_width=told.width,
    )  # fmt: skip
    model = ModelConfig(PixelCodecConfig(height=256, width=256, pad_bottom=0), network=network)
    stage = write_stage(tmp_path / "large", model, Manifest("videos", 256, 256, 24.0, 24, "raw", 8, told))
    settings = CascadeConfig(stage1=str(stage), stage2=None, stage1_sampler=SamplerConfig(steps=2, guidance=1))
    cascade = Cascade(settings, "cpu")
    marked = cascade.sample(["a cat"], [0]).high[0].numpy()
    plain = cascade.sample(["a cat"], [0], settings=replace(settings, watermark=None)).high[0].numpy()
    assert watermark.read(marked, "snapvideo").is_marked and not watermark.read(plain, "snapvideo").is_marked
    assert cascade.sample(["a cat"], [0]).low[0].numpy().tobytes() == plain.tobytes()
