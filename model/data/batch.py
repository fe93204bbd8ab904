"""The training batch: samples -> packed batch (uint8, on the CPU) -> microbatches -> what the model sees (on the device).

B samples, T frames, C = 3 channels, H x W pixels, L text tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from model import text

CHANNELS = 3


@dataclass(frozen=True)
class Sample:
    """One video window or image, decoded."""

    frames: Tensor  # (T, H, W, C) uint8; (1, H, W, C) for an image
    text: Tensor  # (L, D) bfloat16, without padding
    frame_rate: float  # per second; infinite for an image
    resolution: tuple[int, int]  # height and width of the source before resize and crop
    is_image: bool
    seed: int
    key: str
    caption: str


class Common(TypedDict):
    """What a batch holds, packed or not."""

    text: Tensor  # (B, L, D) bfloat16, zeros behind each caption's end; L is the configured limit, so that shapes are static
    text_mask: Tensor  # (B, L) bool, true at tokens
    frame_rate: Tensor  # (B,) float32, per second; +inf for images
    resolution: Tensor  # (B, 2) float32, height and width of the source
    is_image: Tensor  # (B,) bool
    seed: list[int]  # in [0, 2^63): of this sample in this epoch, whatever the number of processes and workers
    key: list[str]
    caption: list[str]


class PackedBatch(Common):
    """As it leaves the loader. Videos and images apart, each in the order in which ``is_image`` says that they alternate."""

    videos: Tensor  # (B videos, T, H, W, C) uint8
    images: Tensor  # (B images, 1, H, W, C) uint8


class Batch(Common):
    """As the model sees it."""

    video: Tensor  # (B, T, C, H, W) float32 in [-1, 1]


def collate(samples: Sequence[Sample], max_tokens: int) -> PackedBatch:
    """Put samples into one batch, in their order; captions are padded to ``max_tokens``."""
    nothing = torch.empty(0, 1, *samples[0].frames.shape[1:], dtype=torch.uint8)
    videos = [sample.frames for sample in samples if not sample.is_image]
    images = [sample.frames for sample in samples if sample.is_image]
    states, mask = text.pad([sample.text for sample in samples], max_tokens)
    return PackedBatch(
        videos=torch.stack(videos) if videos else nothing,
        images=torch.stack(images) if images else nothing,
        text=states,
        text_mask=mask,
        frame_rate=torch.tensor([sample.frame_rate for sample in samples], dtype=torch.float32),
        resolution=torch.tensor([sample.resolution for sample in samples], dtype=torch.float32),
        is_image=torch.tensor([sample.is_image for sample in samples]),
        seed=[sample.seed for sample in samples],
        key=[sample.key for sample in samples],
        caption=[sample.caption for sample in samples],
    )


def num_samples(batch: Common) -> int:
    """B."""
    return len(batch["key"])


def split(batch: PackedBatch, microbatch_size: int | float) -> list[PackedBatch]:
    """Cut a batch into microbatches of ``microbatch_size`` consecutive samples; the last may be smaller."""
    size = int(microbatch_size)  # a fraction arises only where processes share samples, which this batch does not know
    images_before = [0, *batch["is_image"].long().cumsum(0).tolist()]
    parts = []
    for start in range(0, num_samples(batch), size):
        stop = min(start + size, num_samples(batch))
        videos = batch["videos"][start - images_before[start] : stop - images_before[stop]]
        images = batch["images"][images_before[start] : images_before[stop]]
        parts.append(cast(PackedBatch, {"videos": videos, "images": images, **_common(batch, slice(start, stop))}))
    return parts


def unpack(batch: PackedBatch, frames: int) -> Batch:
    """What the model sees: an image is a video of ``frames`` equal frames (section 3.3).

    Runs on the batch's device, without waiting for it.
    """
    images, is_image = batch["images"], batch["is_image"]
    # Where each sample lies in videos followed by images.
    image_index = is_image.long().cumsum(0) - 1
    video_index = (~is_image).long().cumsum(0) - 1
    place = torch.where(is_image, image_index + len(batch["videos"]), video_index)
    repeated = images.expand(-1, frames, -1, -1, -1) if len(images) else images
    pixels = torch.cat([part for part in (batch["videos"], repeated) if len(part)])[place]
    video = pixels.movedim(-1, 2).contiguous().to(torch.float32).div_(127.5).sub_(1.0)  # B T H W C -> B T C H W
    return cast(Batch, {"video": video, **_common(batch, slice(None))})


def _common(batch: Common, rows: slice) -> dict[str, Any]:
    return {name: batch[name][rows] for name in Common.__annotations__}  # type: ignore[literal-required]
