"""Captions for clips that came without one, by a vision-language model of transformers at a local path.

The paper trains on videos that a captioner described (section 4). Which model that was is not published; any that
``AutoModelForImageTextToText`` loads will do: BLIP and GIT describe one picture, chat models (Qwen2-VL, SmolVLM, LLaVA) answer a
prompt about one or several.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dataprep import captions, models
from dataprep.filters import Rejected
from model.errors import UserError


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Which model describes what has no caption."""

    path: str  # a local folder or a hub name; weights as safetensors, no code of its own
    prompt: str = ""  # what a chat model is asked; what a describing model goes on from
    frames: int = 1  # of a clip, evenly spaced; more than one for chat models alone
    max_new_tokens: int = 48
    batch: int = 8  # clips at a time

    def __post_init__(self) -> None:
        for name in ("frames", "max_new_tokens", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Captioner:
    """A vision-language model, greedy: the same pictures get the same words.

    Raises:
        UserError: nothing to load at the path, or a model that cannot be asked in the configured way.
    """

    def __init__(self, config: CaptionerConfig, device: str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor  # seconds to import; only who describes pays

        self.config, self.device, source = config, device, models.absolute(config.path)
        with models.loading("captioner", config.path):
            self.processor = AutoProcessor.from_pretrained(source)
            model = AutoModelForImageTextToText.from_pretrained(source, torch_dtype="auto", use_safetensors=True)
        if not hasattr(self.processor, "image_processor"):
            raise UserError(f"captioner {config.path}: a {type(self.processor).__name__} reads no pictures")
        self.chats = bool(getattr(self.processor, "chat_template", None))
        if config.frames > 1 and not self.chats:
            raise UserError(
                f"captioner.frames: {config.frames}, but {config.path} has no chat template and describes one picture"
            )
        if self.chats and not config.prompt:
            raise UserError(f"captioner.prompt: {config.path} has a chat template, so it wants to be asked something")
        self.processor.tokenizer.padding_side = "left"  # what is generated goes on from the end
        self.model = model.to(self.device).eval().requires_grad_(False)

    def describe(self, clips: Sequence[Sequence[np.ndarray]]) -> list[str]:
        """One caption for each clip of ``frames`` pictures (H, W, 3) uint8 RGB; empty where the model said nothing of use."""
        said: list[str] = []
        for start in range(0, len(clips), self.config.batch):
            said += self._describe(clips[start : start + self.config.batch])
        return [_clean(words) for words in said]

    def _describe(self, clips: Sequence[Sequence[np.ndarray]]) -> list[str]:
        import torch
        from PIL import Image

        pictures = [[Image.fromarray(frame) for frame in clip] for clip in clips]
        asked: dict[str, Any] = {}
        if self.chats:
            content = [*({"type": "image"} for _ in range(self.config.frames)), {"type": "text", "text": self.config.prompt}]
            turn = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            asked = {"text": [turn] * len(clips), "padding": True}
        elif self.config.prompt:
            asked = {"text": [self.config.prompt] * len(clips), "padding": True}
        images = pictures if self.chats else [clip[0] for clip in pictures]
        inputs = self.processor(images=images, return_tensors="pt", **asked).to(self.device)
        for name, values in inputs.items():
            if torch.is_tensor(values) and values.is_floating_point():
                inputs[name] = values.to(self.model.dtype)
        with torch.no_grad():
            found = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens, do_sample=False)
        if self.chats:  # whose answer comes behind the question
            found = found[:, inputs["input_ids"].shape[1] :]
        return list(self.processor.batch_decode(found, skip_special_tokens=True))


@functools.lru_cache(maxsize=1)
def load_captioner(config: CaptionerConfig) -> Captioner:
    """The captioner of this process.

    Raises:
        UserError: see ``Captioner``.
    """
    return Captioner(config, models.worker_device())


def _clean(words: str) -> str:
    try:
        return captions.normalise(words)
    except Rejected:
        return ""
