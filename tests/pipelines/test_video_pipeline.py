"""The pipeline as a user of diffusers would call it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import UserError
from pipelines.cascade import CascadeConfig
from pipelines.video_pipeline import VideoPipeline

QUICK = {"num_inference_steps": 2, "num_upsampling_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipeline(cascade_config: CascadeConfig) -> VideoPipeline:
    return VideoPipeline.from_pretrained(cascade_config.stage1, cascade_config.stage2, device="cpu")


def test_prompts_to_frames(pipeline: VideoPipeline) -> None:
    frames = pipeline(["a red circle", "a blue square"], **QUICK).frames
    assert [len(clip) for clip in frames] == [4, 4]
    assert isinstance(frames[0][0], Image.Image) and frames[0][0].size == (32, 12)
    (array,) = pipeline("a red circle", **QUICK, output_type="np", num_frames=6, hierarchy=[12.0]).frames
    assert array.shape == (6, 12, 32, 3) and array.dtype == np.uint8
    (tensor,) = pipeline("a red circle", **QUICK, output_type="pt").frames
    assert tensor.shape == (4, 3, 12, 32) and 0 <= tensor.min() <= tensor.max() <= 1


def test_a_generator_decides(pipeline: VideoPipeline) -> None:
    def clips(*seeds: int) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = ["a red circle"] * len(seeds)
        return pipeline(prompts, **QUICK, output_type="np", generator=generators).frames

    one, two = clips(1, 2)
    assert np.abs(one.astype(int) - clips(1)[0]).max() <= 1
    assert not np.array_equal(one, two)
    shared = torch.Generator().manual_seed(1)
    first = pipeline("a red circle", **QUICK, output_type="np", generator=shared).frames[0]
    second = pipeline("a red circle", **QUICK, output_type="np", generator=shared).frames[0]
    assert np.array_equal(first, one) and not np.array_equal(first, second), "it goes on drawing"


def test_an_image_is_the_first_frame(pipeline: VideoPipeline) -> None:
    image = Image.new("RGB", (64, 24), (200, 40, 90))
    (frames,) = pipeline("a red circle", **QUICK, image=image, output_type="np").frames
    assert np.abs(frames[0].astype(int) - (200, 40, 90)).max() <= 1


def test_what_is_refused(pipeline: VideoPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not served: it is empty"):
        pipeline(" ")
    careful = VideoPipeline(pipeline.cascade, lambda prompt: "no bears" if "bear" in prompt else "")
    with pytest.raises(ValueError, match="'a bear' is not served: no bears"):
        careful(["a dog", "a bear"])
    with pytest.raises(ValueError, match="1 of them for 2 prompts"):
        pipeline(["a", "b"], generator=[torch.Generator()])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        pipeline("a", num_inference_steps=0)
    with pytest.raises(UserError, match="no published model at"):
        VideoPipeline.from_pretrained(str(tmp_path / "none"))
