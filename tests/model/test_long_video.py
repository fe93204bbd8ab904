"""Plans of windows checked by what they must cover, and clips made by a real small network."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import long_video
from model.denoiser import Denoiser
from model.diffusion.sampler import SamplerConfig
from model.generate import Known, Request, generate
from model.long_video import Window, windows

STRIDES = [(1,), (2, 1), (3, 1), (8, 4, 2, 1)]


@pytest.mark.parametrize(("length", "size", "strides"), itertools.product([1, 5, 16, 17, 40, 129], [2, 4, 16], STRIDES))
@pytest.mark.parametrize("ends", [(), ("first",), ("first", "last")])
def test_a_plan_makes_every_frame_once_each_window_told_what_exists(
    length: int, size: int, strides: tuple[int, ...], ends: tuple[str, ...]
) -> None:
    given = {{"first": 0, "last": length - 1}[end] for end in ends}
    plan = windows(length, size, strides, given)
    exist = set(given)
    for number, window in enumerate(plan):
        assert len(window.frames) == size
        assert {b - a for a, b in itertools.pairwise(window.frames)} <= {window.stride}
        assert window.known == tuple(frame in exist for frame in window.frames)
        assert any(window.known) or number == 0 or (given and not exist - given), "nothing to go on from"
        exist.update(window.frames)
    assert exist >= set(range(length))
    assert [window.stride for window in plan] == sorted((window.stride for window in plan), reverse=True)


def test_a_hierarchy_is_the_papers() -> None:
    """The whole length at 6 frames per second, from the last frame of the window before; then between the frames that exist."""
    plan = windows(49, 16, (4, 1))
    assert plan[0] == Window(4, tuple(range(0, 64, 4)), (False,) * 16)
    assert [window.frames[0] for window in plan[1:]] == [0, 15, 30, 33]
    assert [sum(window.known) for window in plan[1:]] == [4, 5, 5, 14]
    low = windows(200, 16, (4, 1))[:3]
    assert [window.frames[0] for window in low] == [0, 60, 120]
    assert [window.known for window in low[1:]] == [(True, *(False,) * 15)] * 2


def test_a_clip_of_one_window_needs_no_hierarchy() -> None:
    assert windows(16, 16, (8, 4, 2, 1)) == [Window(1, tuple(range(16)), (False,) * 16)]
    assert windows(31, 16, (8, 4, 2, 1))[0].stride == 2


@pytest.mark.parametrize(
    ("length", "strides", "given"),
    [(9, (4, 3, 1), ()), (9, (2,), ()), (9, (), ()), (0, (1,), ()), (9, (1,), (9,)), (9, (1,), (-1,))],
)
def test_bad_plans_are_refused(length: int, strides: tuple[int, ...], given: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="strides must fall|must lie in a clip"):
        windows(length, 4, strides, given)


def request(conditioning: Callable[..., Any], seed: int, known: Known | None = None) -> Request:
    told = conditioning(1)
    values = {name: getattr(told, name) for name in ("text", "text_mask", "frame_rate", "resolution")}
    return Request(**values, generators=[torch.Generator().manual_seed(seed)], known=known)


@pytest.fixture
def denoiser(stage: Callable[..., Any]) -> Denoiser:
    torch.manual_seed(3)
    built = Denoiser(stage())
    for p in built.parameters():  # an output head of zeros would tell nothing
        torch.nn.init.normal_(p, std=0.05)
    return built


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_known_frames_are_in_the_clip(denoiser: Denoiser, conditioning: Any, guidance: float, weight: float) -> None:
    video = torch.rand(1, 4, 3, 6, 12) * 2 - 1
    frames = torch.tensor([[True, False, False, True]])
    config = SamplerConfig(steps=4, guidance=guidance)
    found = generate(denoiser, request(conditioning, 1, Known(video, frames, weight)), config)
    torch.testing.assert_close(found[:, [0, 3]], video[:, [0, 3]], rtol=0, atol=1e-4)
    free = generate(denoiser, request(conditioning, 1), config)
    assert (found[:, [1, 2]] - free[:, [1, 2]]).abs().max() > 1e-4, "the others know of them"
    hidden = replace(Known(video, frames, weight), video=torch.where(frames[:, :, None, None, None], video, 0.3))
    again = generate(denoiser, request(conditioning, 1, hidden), config)
    assert torch.equal(again, found), "what is not known does not count"
    assert all(p.requires_grad for p in denoiser.parameters())


def test_a_clip_of_any_length_from_given_frames(denoiser: Denoiser, conditioning: Any) -> None:
    given = {0: torch.rand(1, 3, 6, 12) * 2 - 1, 10: torch.rand(1, 3, 6, 12) * 2 - 1}
    plan = windows(11, 4, (2, 1), given)
    told: list[int] = []

    def window(part: Window, known: Known | None) -> Tensor:
        told.append(0 if known is None else int(known.frames.sum()))
        return generate(denoiser, request(conditioning, len(told), known), SamplerConfig(steps=2))

    clip = long_video.generate(plan, 11, given, 1.0, window)
    assert clip.shape == (1, 11, 3, 6, 12) and clip.isfinite().all()
    for number, frame in given.items():
        assert torch.equal(clip[:, number], frame)
    assert told == [sum(part.known) for part in plan]
