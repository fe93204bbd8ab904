"""Longer clips than the network makes at once, and clips around given frames (appendix C.5).

First the whole length at the lowest frame rate, window after window, each told the last frame of the one before; then at each
higher rate, told all frames that exist. Given frames, such as an image to animate or the clip to continue, exist from the start.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.generate import Known

OVERLAP = 1  # frames that a window shares with the one before, at the same frame rate


@dataclass(frozen=True)
class Window:
    """What the network makes at once: T frames, ``stride`` frames of the clip apart."""

    stride: int
    frames: tuple[int, ...]  # their numbers in the clip, at its own frame rate; may go beyond its end
    known: tuple[bool, ...]  # which exist before


def windows(length: int, size: int, strides: Sequence[int], given: Collection[int] = ()) -> list[Window]:
    """The windows that make a clip, in their order.

    Args:
        length: frames of the clip.
        size: T, frames that the network makes at once.
        strides: of the frame rates, from the lowest to the highest: falling numbers, each a multiple of the next, the last 1.
        given: frames that exist from the start.

    Raises:
        ValueError: strides of another kind, a length below 1, or given frames outside of the clip.
    """
    if not strides or strides[-1] != 1 or any(a <= b or a % b for a, b in itertools.pairwise(strides)):
        raise ValueError(f"strides must fall to 1, each a multiple of the next, got {list(strides)}")
    if length < 1 or any(not 0 <= frame < length for frame in given):
        raise ValueError(f"given frames {sorted(given)} must lie in a clip of {length} frames")
    if size <= OVERLAP and length > size:
        raise ValueError(f"windows of {size} frames cannot go on from one another")
    # A level below which one window spans the clip has nothing to plan.
    needed = next((i for i, stride in enumerate(strides) if i + 1 == len(strides) or span(size, strides[i + 1]) < length), 0)
    exist, plan = set(given), []
    for stride in strides[needed:]:
        places = range(0, max(length, span(size, stride)), stride)
        for start in _starts(len(places), size):
            frames = tuple(places[start : start + size])
            known = tuple(frame in exist for frame in frames)
            if not all(is_known or frame >= length for frame, is_known in zip(frames, known, strict=True)):
                plan.append(Window(stride, frames, known))
                exist.update(frames)
    return plan


def span(size: int, stride: int) -> int:
    """Frames of the clip from a window's first to its last."""
    return (size - 1) * stride + 1


def _starts(count: int, size: int) -> Iterator[int]:
    """Places where windows begin so that they cover ``count`` places; the last one ends at the end."""
    start = 0
    while start + size < count:
        yield start
        start += size - OVERLAP
    yield max(0, count - size)


# (window, its known frames or None) -> (B, T, C, H, W) in [-1, 1]
Generate = Callable[[Window, Known | None], Tensor]


def generate(plan: Sequence[Window], length: int, given: dict[int, Tensor], weight: float, window: Generate) -> Tensor:
    """Make a clip window by window.

    Args:
        plan: of ``windows``.
        length: frames of the clip.
        given: (B, C, H, W) in [-1, 1] by the number of the frame.
        weight: of reconstruction guidance.
        window: makes one window.

    Returns:
        (B, length, C, H, W) in [-1, 1].
    """
    made = dict(given)
    for part in plan:
        known = _known(part, made, weight)
        frames = window(part, known)
        for number, frame in zip(part.frames, frames.unbind(1), strict=True):
            made.setdefault(number, frame)
    return torch.stack([made[number] for number in range(length)], dim=1)


def _known(part: Window, made: dict[int, Tensor], weight: float) -> Known | None:
    if not any(part.known):
        return None
    like = next(made[number] for number, is_known in zip(part.frames, part.known, strict=True) if is_known)
    frames = [made.get(number, torch.zeros_like(like)) for number in part.frames]
    return Known(torch.stack(frames, dim=1), torch.tensor(part.known).expand(len(like), -1), weight)
