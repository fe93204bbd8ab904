"""What is measured of a cascade: which captions are new, clips that do not depend on each other, gains against closed forms."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import UserError
from pipelines import learned
from pipelines.cascade import Cascade
from pipelines.learned import LearnedConfig


@pytest.fixture
def c(learned_config: LearnedConfig) -> LearnedConfig:
    return learned_config


def test_everything_is_measured_and_written(c: LearnedConfig, capsys: pytest.CaptureFixture[str]) -> None:
    learned.learned(c)
    output = Path(c.output)
    found = json.loads((output / "learned.json").read_text())
    assert {found["seen"][side]["rates"]["all"]["number"] for side in ("stage1", "real")} == {5}
    assert found["new"]["stage1"]["rates"]["all"]["number"] == 3
    assert found["cascade"]["rates"]["all"]["number"] == found["upsampling"]["clips"] == 3
    assert found["upsampling"]["bicubic"] > found["upsampling"]["stage2"]  # random weights
    assert [level["noise"] for level in found["denoising"]] == [1]
    assert [point["guidance"] for point in found["guidance"]] == [1, 3]
    assert found["guidance"][0]["distance"] != found["guidance"][1]["distance"]
    assert {path.name for path in output.glob("*.png")} == {"stage1.png", "stage2.png", "guidance.png"}
    assert "new combinations, stage 1, 3 clips" in capsys.readouterr().out


def test_a_clip_depends_on_its_own_example(c: LearnedConfig) -> None:
    cascade = Cascade(c.cascade, "cpu")
    asked = learned.examples(c, 4)
    assert [example.is_new for example in asked] == [False] * 5 + [True] * 3
    assert {example.frame_rate for example in asked} == {6, 8}
    assert [example.number for example in learned.examples(replace(c, limit=3), 4)] == [0, 4, 7]  # new ones as well
    together = learned.sample(replace(c, batch=8), cascade, asked, "together")
    alone = learned.sample(replace(c, batch=1), cascade, [asked[6], asked[2]], "alone")
    for number, clip in zip((6, 2), alone, strict=True):
        assert np.abs(together[number].astype(int) - clip).max() <= 1  # rounding of sums in another order
    guided = learned.sample(c, cascade, asked[:1], "guided", guidance=5)
    assert np.abs(together[0].astype(int) - guided[0]).max() > 1


def test_the_error_of_denoising_against_its_closed_form(c: LearnedConfig) -> None:
    """Of a network that says zero D is c_skip * x_sigma."""
    cascade = Cascade(c.cascade, "cpu")
    c = replace(c, noise=(0.1, 1, 10))
    before = learned.denoising(c, cascade, asked := learned.examples(c, 4))
    for p in cascade.stage1.denoiser.network.head.parameters():
        p.data.zero_()
    found = learned.denoising(c, cascade, asked)
    square = np.mean([np.square(example.frames / 127.5 - 1).mean() for example in asked])
    for row, level in zip(found, c.noise, strict=True):
        s_i, sigma = 4.0, level / 4
        c_skip = s_i / (s_i * sigma**2 + 1)
        assert row.error == pytest.approx((c_skip / s_i - 1) ** 2 * square + c_skip**2 * sigma**2, rel=0.05)
        assert row.shuffled == row.error  # it says the same to all captions
        assert row.heard == {"colour": 0, "shape": 0, "direction": 0}
    assert all(row.shuffled != row.error for row in before)
    # Of a network that has learnt nothing, the better the less noise there is; where there is much, the clips alike say most.
    assert before[0].knowable < before[1].knowable < before[2].knowable < 0.15 < before[2].error
    assert all(share != 0 for row in before for share in row.heard.values())


def test_bicubic_upsampling_is_what_it_is_said_to_be(c: LearnedConfig) -> None:
    """Of a picture that halving and enlarging leaves as it is, nothing is lost."""
    flat = torch.full((4, 3, 12, 32), 0.25)
    assert learned.psnr(flat, flat) == 100
    assert learned.psnr(flat + 0.2, flat) == pytest.approx(20, abs=1e-4)  # a tenth of the range
    gain = learned.upsampling(c, Cascade(c.cascade, "cpu"), learned.examples(c, 4)[:2])
    assert 15 < gain.bicubic < 40


def test_data_sets_that_differ_are_told(c: LearnedConfig) -> None:
    with pytest.raises(UserError, match="holds other clips than"):
        learned.upsampling(replace(c, high=c.trained), Cascade(c.cascade, "cpu"), learned.examples(c, 4))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"high": None}, "belong together"), ({"swept": 1}, "swept must be at least 2"), ({"frame_rates": ()}, "frame_rates")],
)
def test_settings_that_cannot_be(c: LearnedConfig, wrong: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(c, **wrong)
