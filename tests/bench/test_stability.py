"""LAMB at the paper's learning rate, from the first step, on a small FIT: no spike."""

from pathlib import Path

import numpy as np
from PIL import Image

from bench import stability
from model.lamb import LAMBConfig


def test_200_steps_at_the_papers_learning_rate_have_no_spike(tmp_path: Path) -> None:
    found = stability.curve(stability.SMALL, LAMBConfig(), steps=200, batch=4)
    assert LAMBConfig().lr == 5e-3
    assert len(found.held_out) == 201
    assert np.isfinite(found.training).all()
    assert found.largest_rise < 1.1
    assert found.held_out[-1] < 0.7 * found.held_out[0]
    stability.draw(tmp_path / "curve.png", found, "title")
    with Image.open(tmp_path / "curve.png") as image:
        assert len(set(image.convert("RGB").getdata())) > 10


def test_a_spike_is_seen() -> None:
    assert stability.Curve([], [4.0, 2.0, 3.0, 1.0, 1.2], 0).largest_rise == 1.5
