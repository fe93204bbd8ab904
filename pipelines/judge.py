"""What a caption of a moving scene says, against what its clip shows.

judge(read(frames, frame_rate), parse("a red circle moves left on a blue background"))
"""

import re
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from model.errors import UserError
from pipelines.truth import COLOURS, DIRECTIONS, SHAPES, STILL, Reading, Seen

SPEED = 0.25  # of moving objects in the benchmark's scenes, stage heights per second: the caption does not say it

WORDS = ("colour", "shape", "direction")  # of an object, as captions say them

_COLOUR = f"(?:{'|'.join(COLOURS)})"
_DIRECTION = f"(?:{'|'.join(DIRECTIONS)})"
_SUBJECT = rf"a {_COLOUR} (?:{'|'.join(SHAPES)})(?: moves {_DIRECTION}| stays still)?"
_BACKGROUND = rf"(?:(?P<plain>{_COLOUR}) background|(?P<board>{_COLOUR} and {_COLOUR}) checkerboard)"
_CAPTION = re.compile(
    rf"(?:the camera pans (?P<camera>{_DIRECTION}) over )?(?P<subjects>{_SUBJECT}(?: and {_SUBJECT})*) on a {_BACKGROUND}"
)


@dataclass(frozen=True)
class Said:
    """One object as the caption has it."""

    colour: str
    shape: str
    direction: str | None  # one of DIRECTIONS or "still"; None in the caption of a picture


@dataclass(frozen=True)
class Truth:
    """What a caption says."""

    objects: tuple[Said, ...]
    background: str  # such as "blue", or "blue and white" of a checkerboard, by the alphabet
    camera: str | None = None  # where it pans, one of DIRECTIONS; None where the caption says nothing of it


@dataclass(frozen=True)
class Verdict:
    """What of a clip is right, of all its objects together. What cannot be read, or should not be there, is not right."""

    background: bool
    count: bool
    colour: bool
    shape: bool
    direction: bool | None  # None where the caption says nothing of the objects' motion
    camera: bool | None  # None where it says nothing of the camera's
    all: bool  # everything above
    unread: tuple[str, ...]  # which of the above could not be told, rather than told wrongly
    moves: bool  # whether something should move, an object or the camera
    speed_ratio: float | None  # read over true, mean over what moves; None without any or where it cannot be told


def parse(caption: str) -> Truth:
    """Read a caption.

    Raises:
        UserError: it is not one of one-coloured backgrounds or checkerboards and objects that move straight on or rest.
    """
    match = _CAPTION.fullmatch(caption)
    if match is None:
        raise UserError(f"a caption that cannot be judged as a moving scene: {caption!r}")
    objects = []
    for subject in match["subjects"].split(" and "):
        _, colour, shape, *action = subject.split(" ", 4)
        objects.append(Said(colour, shape, {"moves": action[-1], "stays": STILL}[action[0]] if action else None))
    background = match["plain"] or " and ".join(sorted(match["board"].split(" and ")))
    return Truth(tuple(objects), background, match["camera"])


def reworded(caption: str, what: str) -> str | None:
    """The caption with its first object's colour, shape or direction (one of ``WORDS``) another; None where it says none.

    The next colour that the background has not, the next shape, the opposite direction.

    Raises:
        UserError: as ``parse``.
    """
    truth = parse(caption)
    said = truth.objects[0]
    if what == "direction":
        if said.direction not in DIRECTIONS:
            return None
        opposite = DIRECTIONS[(DIRECTIONS.index(said.direction) + len(DIRECTIONS) // 2) % len(DIRECTIONS)]
        return caption.replace(f"moves {said.direction}", f"moves {opposite}", 1)
    colour, shape = said.colour, said.shape
    if what == "colour":
        others = [name for name in COLOURS if name not in truth.background.split()]
        colour = others[(others.index(colour) + 1) % len(others)]
    else:
        shape = SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)]
    return caption.replace(f"a {said.colour} {said.shape}", f"a {colour} {shape}", 1)


def judge(reading: Reading, truth: Truth, speed: float = SPEED) -> Verdict:
    """Compare. Each object that was said is held against one that was read, so that as much as possible is right.

    Args:
        reading: of the clip.
        truth: of the caption.
        speed: that moving objects and cameras should have, in stage heights per second.
    """
    seen = [*reading.objects, *[_MISSING] * len(truth.objects)]  # an object too many makes the count wrong, and nothing else
    agreements = [[_agreements(said, found) for found in seen] for said in truth.objects]
    order = linear_sum_assignment(np.array(agreements), maximize=True)[1]
    pairs = [(said, seen[index]) for said, index in zip(truth.objects, order, strict=True)]
    moves = [said.direction is not None for said in truth.objects]
    right = {
        "background": reading.background == truth.background,
        "count": reading.count == len(truth.objects),
        "colour": all(found.colour == said.colour for said, found in pairs),
        "shape": all(found.shape == said.shape for said, found in pairs),
        "direction": all(found.direction == said.direction for said, found in pairs) if all(moves) else None,
        "camera": reading.camera == truth.camera if truth.camera else None,
    }
    unread = [name for name in ("background", "count", "camera") if right[name] is False and getattr(reading, name) is None]
    for name in ("colour", "shape", "direction"):
        if right[name] is False and any(getattr(found, name) is None for _, found in pairs):
            unread.append(name)
    ratios = [found.speed / speed for said, found in pairs if said.direction not in (None, STILL) and found.speed is not None]
    if truth.camera and reading.camera_speed is not None:
        ratios.append(reading.camera_speed / speed)
    should_move = bool(truth.camera) or any(said.direction not in (None, STILL) for said in truth.objects)
    everything = all(value is not False for value in right.values())
    ratio = sum(ratios) / len(ratios) if ratios else None
    return Verdict(**right, all=everything, unread=tuple(unread), moves=should_move, speed_ratio=ratio)  # type: ignore[arg-type]


_MISSING = Seen(None, None, 0.0, None, None)


def _agreements(said: Said, found: Seen) -> int:
    return (found.colour == said.colour) + (found.shape == said.shape) + (found.direction == said.direction)
