"""Scores that models give the middle frame of a clip: how much of it is text, and how it pleases. Both optional.

They cost more than all other scores together (docs/data.md), and the second needs a model that somebody trained.
"""

import dataclasses
import functools

import cv2
import numpy as np

from dataprep import models
from model.errors import UserError

TEXT_SIDE = 288  # pixels of the shorter side at which text is looked for
MIN_LETTERS = 2  # a single one is more often a wheel or a ball


@dataclasses.dataclass(frozen=True)
class LooksConfig:
    """Which of them."""

    text_area: bool = False  # by RapidOCR, whose models come with it
    # A folder or hub name of an image classifier of transformers, weights as safetensors. A single output is taken as it is, of
    # several the probability of ``aesthetic_label``.
    aesthetic: str | None = None
    aesthetic_label: str | None = None

    def __post_init__(self) -> None:
        if self.aesthetic is None and self.aesthetic_label is not None:
            raise ValueError("aesthetic_label needs the classifier, aesthetic")

    @property
    def asks(self) -> bool:
        """Whether there is anything to score."""
        return self.text_area or self.aesthetic is not None


@dataclasses.dataclass(frozen=True)
class Looks:
    """The scores of a picture; None for what was not asked for."""

    text_area: float | None = None  # share of the picture
    aesthetic: float | None = None


def look(image: np.ndarray, config: LooksConfig) -> Looks:
    """Score an (H, W, 3) uint8 RGB picture.

    Raises:
        UserError: no such classifier, or label.
    """
    found = Looks()
    if config.text_area:
        found = dataclasses.replace(found, text_area=text_area(image))
    if config.aesthetic is not None:
        found = dataclasses.replace(found, aesthetic=load_classifier(config.aesthetic, config.aesthetic_label)(image))
    return found


def load(config: LooksConfig) -> None:
    """Get ready what ``look`` needs.

    Raises:
        UserError: no such classifier, or label.
    """
    if config.text_area:
        _reader()
    if config.aesthetic is not None:
        load_classifier(config.aesthetic, config.aesthetic_label)


def text_area(image: np.ndarray) -> float:
    """The share of an (H, W, 3) uint8 RGB picture that lies in boxes around lines of legible text."""
    found = _reader()(np.ascontiguousarray(image[..., ::-1]))
    covered = np.zeros(image.shape[:2], np.uint8)
    for box, words in zip(found.boxes if found.boxes is not None else (), found.txts or (), strict=True):
        if len(words.strip()) >= MIN_LETTERS:
            cv2.fillPoly(covered, [np.round(box).astype(np.int32)], 1)
    return float(covered.mean())


@functools.lru_cache(maxsize=1)
def _reader():  # type: ignore[no-untyped-def]  # a RapidOCR
    from rapidocr import RapidOCR  # a second to import

    settings = {
        "Global.use_cls": False,  # whether text stands on its head
        "Global.log_level": "error",
        "Det.limit_side_len": TEXT_SIDE,
        "EngineConfig.onnxruntime.intra_op_num_threads": 1,  # Spark runs one task per core
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    return RapidOCR(params=settings)


class Classifier:
    """An image classifier as a score.

    Raises:
        UserError: nothing to load at the path, or no such label.
    """

    def __init__(self, path: str, label: str | None, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        source = models.absolute(path)
        with models.loading("looks.aesthetic", path):
            self._processor = AutoImageProcessor.from_pretrained(source)
            model = AutoModelForImageClassification.from_pretrained(source, torch_dtype="auto", use_safetensors=True)
        labels = model.config.label2id
        if len(labels) > 1 and label not in labels:
            raise UserError(f"looks.aesthetic_label: {path} has the labels {', '.join(sorted(labels))}, not {label}")
        self._column = labels[label] if len(labels) > 1 else None
        self._model, self._device = model.to(device).eval().requires_grad_(False), device

    def __call__(self, image: np.ndarray) -> float:
        """The score of an (H, W, 3) uint8 RGB picture."""
        import torch

        pixels = self._processor(images=image, return_tensors="pt").pixel_values
        with torch.no_grad():
            logits = self._model(pixels.to(self._device, self._model.dtype)).logits[0].float()
        return float(logits[0] if self._column is None else logits.softmax(0)[self._column])


@functools.lru_cache(maxsize=1)
def load_classifier(path: str, label: str | None) -> Classifier:
    """The classifier of this process; see ``Classifier``."""
    return Classifier(path, label, models.worker_device())
