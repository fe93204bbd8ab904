"""Scores by models: how much of a picture is text, and what a classifier thinks of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from describers import build_classifier, picture, scene
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from dataprep import looks
from dataprep.looks import Looks, LooksConfig
from model.errors import UserError


@pytest.mark.parametrize(("text", "size"), [("SALE -50% today only", 32), ("and then she said nothing", 22), ("SUBSCRIBE", 60)])
def test_text_takes_about_the_area_of_its_line(text: str, size: int) -> None:
    image, share = scene(text, size)
    found = looks.text_area(image)
    assert 0.8 * share < found < 2.2 * share  # the box has a margin


def test_shapes_are_no_text() -> None:
    assert looks.text_area(scene()[0]) == 0
    assert looks.text_area(picture("red", 288, 512)) == 0
    assert looks.text_area(np.zeros((18, 32, 3), np.uint8)) == 0


def test_a_classifier_gives_its_output_or_the_probability_of_a_label(tmp_path: Path) -> None:
    image = scene()[0]
    for name, labels, label in (("one", ["score"], None), ("two", ["poor", "fine"], "fine")):
        folder = build_classifier(tmp_path / name, labels)
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        pixels = AutoImageProcessor.from_pretrained(folder)(images=Image.fromarray(image), return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = model(pixels).logits[0].double()
        expected = logits[0] if label is None else logits[1].exp() / logits.exp().sum()
        found = looks.look(image, LooksConfig(aesthetic=str(folder), aesthetic_label=label))
        assert found.text_area is None
        assert found.aesthetic == pytest.approx(float(expected), abs=1e-6)


def test_nothing_is_scored_unasked() -> None:
    assert looks.look(scene()[0], LooksConfig()) == Looks(None, None)
    assert not LooksConfig().asks


def test_a_label_that_the_classifier_has_not_is_one_line(tmp_path: Path) -> None:
    folder = str(build_classifier(tmp_path / "two", ["poor", "fine"]))
    for label in ("good", None):
        with pytest.raises(UserError, match="has the labels fine, poor"):
            looks.load(LooksConfig(aesthetic=folder, aesthetic_label=label) if label else LooksConfig(aesthetic=folder))
    with pytest.raises(ValueError, match="aesthetic_label needs"):
        LooksConfig(aesthetic_label="fine")
    with pytest.raises(UserError, match=r"looks\.aesthetic"):
        looks.load(LooksConfig(aesthetic=str(tmp_path)))
