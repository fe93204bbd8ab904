"""Text to video in the way that users of diffusers know.

from pipelines.video_pipeline import VideoPipeline

pipeline = VideoPipeline.from_pretrained("models:/snapvideo-stage1@candidate", "models:/snapvideo-stage2@candidate")
frames = pipeline("a corgi runs along the beach", num_inference_steps=64, guidance_scale=7.5).frames[0]
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from PIL import Image
from tqdm import tqdm

from model.diffusion.sampler import SamplerConfig
from pipelines.cascade import Cascade, CascadeConfig
from pipelines.ranks import default_device

# What decides which prompts are served: returns why not, or an empty string.
PromptFilter = Callable[[str], str]


@dataclass(frozen=True)
class VideoPipelineOutput:
    """Clips, one per prompt."""

    frames: list[Any]  # each a list of pictures ("pil"), uint8 (T, H, W, C) ("np"), or floats in [0, 1] (T, C, H, W) ("pt")


@dataclass
class VideoPipeline:
    """Both stages, or the first alone, ready to sample."""

    cascade: Cascade
    prompt_filter: PromptFilter = field(default=lambda _: "")

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        upsampler: str | None = None,
        *,
        tracking_uri: str | None = None,
        text_encoder: str | None = None,
        device: str | torch.device | None = None,
        prompt_filter: PromptFilter = lambda _: "",
    ) -> "VideoPipeline":
        """Pull published models.

        Args:
            model: the first stage: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a folder.
            upsampler: the second, likewise; None: the first stage's clips are the result.
            tracking_uri: of the registry; None: ``MLFLOW_TRACKING_URI``, or the project's own store.
            text_encoder: None for the one that the models' data manifest names.
            device: None: a GPU if there is one.
            prompt_filter: says why a prompt is not served; an empty string if it is.

        Raises:
            UserError: a model or the text encoder cannot be had, or they do not belong together.
        """
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or CascadeConfig().tracking_uri
        config = CascadeConfig(stage1=model, stage2=upsampler, tracking_uri=uri, text_encoder=text_encoder)
        return cls(Cascade(config, device or default_device()), prompt_filter)

    def to(self, device: str | torch.device) -> "VideoPipeline":
        """Move the models."""
        self.cascade.to(device)
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 256,
        guidance_scale: float = 7.5,
        num_upsampling_steps: int = 40,
        num_frames: int | None = None,
        frame_rate: float = 24.0,
        hierarchy: Sequence[float] = (),
        image: Image.Image | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: Literal["pil", "np", "pt"] = "pil",
    ) -> VideoPipelineOutput:
        """Sample a clip for each prompt.

        Args:
            prompt: one or several.
            num_inference_steps: of stage 1; n steps cost 2n - 1 evaluations of the network.
            guidance_scale: of classifier-free guidance, in both stages; 1 switches it off.
            num_upsampling_steps: of stage 2.
            num_frames: None: as many as the network makes at once.
            frame_rate: per second; the network is told.
            hierarchy: lower frame rates at which a longer clip is laid out first, rising.
            image: the first frame of every clip.
            generator: one for all prompts, or one each; a clip depends on what it draws alone. None: torch's own.
            output_type: of the frames.

        Raises:
            ValueError: settings out of range, a prompt that is not served, or another number of generators than of prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        for text in prompts:
            refusal = "it is empty" if not text.strip() else self.prompt_filter(text)
            if refusal:
                raise ValueError(f"prompt: {text!r} is not served: {refusal}")
        settings = replace(
            self.cascade.config,
            stage1_sampler=SamplerConfig(steps=num_inference_steps, guidance=guidance_scale),
            stage2_sampler=SamplerConfig(steps=num_upsampling_steps, guidance=guidance_scale),
            frames=num_frames,
            frame_rate=frame_rate,
            hierarchy=tuple(hierarchy),
        )
        given = {} if image is None else {0: image}
        clips = self.cascade.sample(prompts, _seeds(generator, len(prompts)), _bar, given, settings).high
        return VideoPipelineOutput([_as(output_type, clip) for clip in clips])


def _seeds(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[int]:
    generators = [generator] * count if generator is None or isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != count:
        raise ValueError(f"generator: {len(generators)} of them for {count} prompts")
    return [int(torch.randint(2**62, (), generator=one, device=one.device if one else None)) for one in generators]


def _bar(stage: str, steps: int) -> "tqdm[int]":
    return tqdm(range(steps), desc=stage, unit="step", leave=False)


def _as(output_type: str, clip: torch.Tensor) -> Any:
    match output_type:
        case "pil":
            return [Image.fromarray(frame) for frame in clip.numpy()]
        case "np":
            return clip.numpy()
        case "pt":
            return clip.movedim(-1, -3).float() / 255
    raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
