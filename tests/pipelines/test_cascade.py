"""The cascade's ways to need less memory, which change nothing, and stage 2 alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from model import media, text
from model.codec import from_pixels
from model.data import schema
from model.data.schema import Manifest, TextManifest
from model.diffusion.sampler import SamplerConfig
from model.errors import UserError
from pipelines.cascade import Cascade, CascadeConfig
from pipelines.sample import SampleConfig, sample

PROMPTS = ("a red circle moves left", "a blue square", "a green star")
SEEDS = (3, 4, 5)


def test_what_saves_memory_changes_nothing(cascade_config: CascadeConfig) -> None:
    config = replace(cascade_config, stage2_sampler=SamplerConfig(steps=2, guidance=3))
    whole = Cascade(config, "cpu").sample(PROMPTS, SEEDS)
    one_by_one = replace(config, offload=True, upsampled_at_once=2)
    for name in ("stage1_sampler", "stage2_sampler"):
        one_by_one = replace(one_by_one, **{name: replace(getattr(config, name), batched_guidance=False)})
    parts = Cascade(one_by_one, "cpu").sample(PROMPTS, SEEDS)
    for left, right in ((whole.low, parts.low), (whole.high, parts.high)):
        assert (left.int() - right.int()).abs().max() <= 1  # of 255: batched matrix products may round otherwise
    assert len(np.unique(whole.high)) > 20


def test_bfloat16_changes_little_and_only_in_the_networks(cascade_config: CascadeConfig) -> None:
    whole = Cascade(cascade_config, "cpu").sample(PROMPTS, SEEDS)
    cascade = Cascade(replace(cascade_config, precision="bf16"), "cpu")
    assert cascade.stage1
    seen = list[torch.dtype]()
    block = cascade.stage1.denoiser.network.blocks[0]
    block.write.output.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    lowered = cascade.sample(PROMPTS, SEEDS)
    assert set(seen) == {torch.bfloat16}
    difference = (whole.high.float() - lowered.high.float()).abs()
    assert 0 < difference.mean() < 8  # of 255


def test_an_idle_part_is_off_the_device(cascade_config: CascadeConfig) -> None:
    """The meta device stands for a GPU: what is moved there can be told from what is not."""
    cascade = Cascade(replace(cascade_config, offload=True), "cpu")
    assert cascade.stage1 and cascade.stage2
    cascade.to("meta")
    parts = {"encoder": cascade.encoder.model, "stage1": cascade.stage1.denoiser, "stage2": cascade.stage2.denoiser}

    def where() -> set[str]:
        return {name for name, part in parts.items() if next(part.parameters()).device.type == "meta"}

    assert where() == set()
    with cascade.at_work(cascade.stage2.denoiser):
        assert where() == {"stage2"}
        parts["stage2"].to_empty(device="cpu")  # weights do not come back from meta by themselves
    assert where() == set()


def test_upsampling_is_the_second_half_of_sampling(cascade_config: CascadeConfig) -> None:
    both = Cascade(replace(cascade_config, corruption=0.0), "cpu").sample(PROMPTS, SEEDS)
    alone = Cascade(replace(cascade_config, stage1=None, corruption=0.0), "cpu")
    assert alone.stage1 is None
    made = alone.upsample(PROMPTS, SEEDS, from_pixels(both.low))
    assert torch.equal(made.low, both.low)
    assert made.high.shape == both.high.shape
    # Not the same clips: both stages draw from one generator. But their own input decides what they show.
    other = alone.upsample(PROMPTS, SEEDS, from_pixels(both.low.flip(0)))
    assert not torch.equal(other.high, made.high)
    assert torch.equal(alone.upsample(PROMPTS, SEEDS, from_pixels(both.low)).high, made.high)


def test_what_is_missing_is_told(cascade_config: CascadeConfig) -> None:
    with pytest.raises(UserError, match=r"cascade\.stage1 is null"):
        Cascade(replace(cascade_config, stage1=None), "cpu").sample(PROMPTS, SEEDS)
    with pytest.raises(UserError, match=r"cascade\.stage2 is null"):
        Cascade(replace(cascade_config, stage2=None), "cpu").upsample(PROMPTS, SEEDS, torch.zeros(3, 4, 3, 6, 16))
    with pytest.raises(UserError, match="name a second stage"):
        Cascade(replace(cascade_config, stage1=None, stage2=cascade_config.stage1), "cpu")
    with pytest.raises(ValueError, match="must name a model"):
        CascadeConfig(stage1=None, stage2=None)
    with pytest.raises(ValueError, match="upsampled_at_once"):
        CascadeConfig(upsampled_at_once=0)


def write_videos(folder: Path, videos: np.ndarray, encoder_folder: str) -> Path:
    """A data set of (B, T, H, W, C) uint8 videos at 8 frames per second, with ``PROMPTS`` as captions."""
    encoder = text.TextEncoder(encoder_folder, 16)
    told = TextManifest(encoder_folder, text.revision(encoder_folder), encoder.width, "bfloat16", 16)
    count, frames, height, width = videos.shape[:4]
    with MDSWriter(out=str(folder), columns=schema.COLUMNS, hashes=["xxh64"]) as writer:
        for number, (prompt, video) in enumerate(zip(PROMPTS, videos, strict=True)):
            row = {
                "key": f"v{number}:0",
                "caption": prompt,
                "frames": video.tobytes(),
                "frame_ends": (np.arange(1, frames + 1) * video[0].size).astype(np.uint32),
                "start_seconds": 0.0,
                "source_height": height,
                "source_width": width,
                "text": text.pack(encoder.encode([prompt])[0]),
            }
            writer.write(row)
    Manifest("videos", height, width, 8.0, frames, "raw", count, told).write(folder)
    return folder


def test_a_job_puts_a_data_sets_clips_through_stage_2(
    cascade_config: CascadeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cascade_config.stage1 is not None
    encoder = str(Path(cascade_config.stage1).parent / "t5")
    small = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 16, 3), dtype=np.uint8)
    large = small.repeat(2, axis=2).repeat(2, axis=3)  # so that halving the size gives ``small``
    config = replace(cascade_config, stage1=None, corruption=0.0)
    given = str(write_videos(tmp_path / "large", large, encoder))
    job = SampleConfig(output=str(tmp_path / "out"), cascade=config, low_from=given, batch=2, device="cpu")
    sample(job)
    made = {path.name: media.read_video(path, 100).frames for path in sorted((tmp_path / "out").glob("*.mp4"))}
    assert list(made) == ["000-a-red-circle-moves-left.mp4", "001-a-blue-square.mp4", "002-a-green-star.mp4"]
    assert all(frames.shape == (4, 12, 32, 3) for frames in made.values())
    with Image.open(tmp_path / "out" / "sheet.png") as sheet, Image.open(tmp_path / "out" / "000-a-red-circle-moves-left.gif"):
        assert sheet.height > 6 * 12  # two strips for each clip
    capsys.readouterr()

    (tmp_path / "out" / "001-a-blue-square.mp4").unlink()
    sample(job)  # makes what is missing
    assert "2 of 3 clips are there already" in capsys.readouterr().out
    again = media.read_video(tmp_path / "out" / "001-a-blue-square.mp4", 100).frames
    np.testing.assert_allclose(again.astype(int), made["001-a-blue-square.mp4"], atol=8)  # alone in its batch, and through h264

    # A set at stage 1's own size gives the same input, so the same clips.
    sample(replace(job, output=str(tmp_path / "out2"), low_from=str(write_videos(tmp_path / "small", small, encoder))))
    for name, frames in made.items():
        np.testing.assert_allclose(media.read_video(tmp_path / "out2" / name, 100).frames.astype(int), frames, atol=8)

    for wrong, message in (
        (replace(job, prompts=("x",)), "leave out prompts"),
        (replace(job, cascade=replace(cascade_config, stage2=None)), "needs a second stage"),
        (replace(job, low_from=str(tmp_path / "nowhere")), "nowhere"),
        (replace(job, low_from=str(write_videos(tmp_path / "odd", small[:, :, :4], encoder))), "holds videos of 4x16"),
        (replace(job, cascade=replace(config, frame_rate=5.0)), "stored at 8 frames per second"),
    ):
        with pytest.raises(UserError, match=message):
            sample(replace(wrong, output=str(tmp_path / "none")))
