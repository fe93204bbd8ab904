"""The yamls of the paper's evaluation protocols load, and say what section 4.2 says."""

from pathlib import Path

import pytest

from dataprep.run import DataprepConfig
from model import config
from pipelines.evaluate import EvaluateConfig
from pipelines.sample import SampleConfig

PROTOCOLS = Path(__file__).parents[2] / "yamls/protocols"
SIZES = {"internal": 50_000, "ucf101": 10_000, "msrvtt": None}


@pytest.mark.parametrize("name", SIZES)
def test_a_protocol_is_the_papers(name: str) -> None:
    job = config.load(SampleConfig, PROTOCOLS / f"{name}_sample.yaml")
    judged = config.load(EvaluateConfig, PROTOCOLS / f"{name}_evaluate.yaml")
    assert job.number == SIZES[name]
    assert (judged.frames, judged.frame_rate, job.cascade.frame_rate) == (16, 24, 24)
    assert job.cascade.stage1_sampler.steps == 256 and (job.cascade.stage2 is None) == (name == "internal")
    assert judged.generated == job.output
    if job.prompts_from:
        assert judged.reference == job.prompts_from


@pytest.mark.parametrize("name", ["ucf101", "msrvtt"])
def test_the_reference_keeps_every_video_once(name: str) -> None:
    c = config.load(DataprepConfig, PROTOCOLS / f"{name}_dataprep.yaml")
    assert (c.clips.clip_frames, c.clips.max_clips_per_video, c.clips.frame_rate) == (16, 1, 24)
    assert c.select.duplicate_bits is None and c.select.min_motion == c.select.min_sharpness == c.select.min_brightness == 0
    assert f"{c.output}/{c.stages[0].name}/videos" == config.load(EvaluateConfig, PROTOCOLS / f"{name}_evaluate.yaml").reference
