"""What is read from pixels, on clips drawn here by hand: no drawing code of the product takes part."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import ndimage

from model.errors import UserError
from pipelines.judge import Said, Truth, judge, parse
from pipelines.truth import COLOURS, DIRECTIONS, SHAPES, Reading, Seen, read

HEIGHT, WIDTH, FINE = 24, 36, 8


def drawn(
    shape: str, places: np.ndarray, colour: tuple[int, int, int], on: np.ndarray | tuple[int, int, int], area: float = 0.1
) -> np.ndarray:
    """(T, H, W, 3) of one object at (T, 2) places (x, y in frame heights from the middle), of ``area`` squared heights."""
    rows, columns = (np.mgrid[: HEIGHT * FINE, : WIDTH * FINE] + 0.5) / FINE / HEIGHT
    frames = []
    for x, y in places:
        u, v = columns - WIDTH / HEIGHT / 2 - x, rows - 0.5 - y
        if shape == "circle":
            inside = np.hypot(u, v) < math.sqrt(area / math.pi)
        elif shape == "square":
            inside = (abs(u) < math.sqrt(area) / 2) & (abs(v) < math.sqrt(area) / 2)
        else:  # side a, area sqrt(3)/4 a^2; the base is a third of the height below the centroid
            a = math.sqrt(4 * area / math.sqrt(3))
            height = a * math.sqrt(3) / 2
            inside = (v < height / 3) & (v > -2 / 3 * height) & (abs(u) < (v + 2 / 3 * height) / math.sqrt(3))
        share = inside.reshape(HEIGHT, FINE, WIDTH, FINE).mean(axis=(1, 3))[..., None]
        frames.append(share * np.array(colour) + (1 - share) * np.array(on))
    return np.stack(frames).round().astype(np.uint8)


def path(degrees: float, speed: float, frame_rate: float, frames: int = 8) -> np.ndarray:
    """(T, 2) places of a uniform motion through the middle; degrees from the right, clockwise."""
    way = speed * (np.arange(frames) / frame_rate - (frames - 1) / 2 / frame_rate)
    return way[:, None] * np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


RED, BLUE, WHITE = COLOURS["red"], COLOURS["blue"], COLOURS["white"]


@pytest.mark.parametrize("frame_rate", [4, 12, 24])
@pytest.mark.parametrize("number", range(8))
def test_direction_and_speed(number: int, frame_rate: float) -> None:
    seen = read(drawn("circle", path(45 * number, 0.3, frame_rate), RED, BLUE), frame_rate)
    assert seen.background == "blue"
    assert seen.count == 1
    assert seen.objects[0].direction == DIRECTIONS[number]
    assert seen.objects[0].speed == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("area", [0.05, 0.1, 0.15])
def test_shape_size_and_rest(shape: str, area: float) -> None:
    for place in np.random.default_rng(1).uniform((-0.3, -0.1), (0.3, 0.1), (10, 2)):
        seen = read(drawn(shape, np.repeat(place[None], 4, axis=0), RED, WHITE, area), 8).objects[0]
        assert (seen.colour, seen.shape, seen.direction) == ("red", shape, "still")
        assert seen.size == pytest.approx(math.sqrt(4 * area / math.pi), rel=0.02)


def test_every_pair_of_colours() -> None:
    for (name, colour), (behind, on) in itertools.permutations(COLOURS.items(), 2):
        seen = read(drawn("square", path(0, 0.3, 8), colour, on), 8)
        assert (seen.background, [found.colour for found in seen.objects]) == (behind, [name])


def test_a_return_from_the_other_side_is_no_motion_back() -> None:
    places = path(0, 0.5, 4, 16)
    places[:, 0] = (places[:, 0] + 0.9) % 1.8 - 0.9  # out of sight at 0.75 + 0.18
    seen = read(drawn("circle", places, RED, WHITE), 4).objects[0]
    assert seen.direction == "right"
    assert seen.speed == pytest.approx(0.5, rel=0.05)


def test_two_objects_also_of_one_colour() -> None:
    left = drawn("circle", path(90, 0.3, 8) - (0.4, 0), RED, WHITE)
    for colour in (RED, BLUE):
        right = drawn("square", path(-90, 0.3, 8) + (0.4, 0), colour, WHITE)
        seen = read(np.minimum(left, right), 8)
        assert seen.count == 2
        found = {(one.shape, one.direction) for one in seen.objects}
        assert found == {("circle", "down"), ("square", "up")}


def test_what_cannot_be_told_is_none() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert read(noise, 8) == Reading(None, None, (), None)
    empty = read(np.broadcast_to(np.array(BLUE, np.uint8), (8, HEIGHT, WIDTH, 3)).copy(), 8)
    assert empty == Reading("blue", 0, (), 0.0)
    grey = read(drawn("circle", path(0, 0.3, 8), (128, 128, 128), (190, 40, 190)), 8)
    assert (grey.background, grey.objects[0].colour, grey.objects[0].shape) == (None, None, "circle")
    blob = ndimage.gaussian_filter(drawn("square", path(0, 0.3, 8), RED, WHITE).astype(float), (0, 3, 3, 0)).astype(np.uint8)
    assert read(blob, 8).objects[0].shape is None
    (turned,) = drawn("square", np.zeros((1, 2)), RED, WHITE)[:, :, 6:-6]  # HEIGHT x HEIGHT
    diamond = ndimage.rotate(turned, 45, reshape=False, order=1, mode="nearest")
    assert read(np.stack([turned]), 8).objects[0].shape == "square"
    assert read(np.stack([diamond]), 8).objects[0].shape is None
    jumping = drawn("circle", rng.uniform(-0.3, 0.3, (8, 2)), RED, WHITE)
    assert (read(jumping, 8).objects[0].direction, read(jumping, 8).objects[0].speed) == (None, None)
    flashing = drawn("circle", path(0, 0.3, 8), RED, WHITE)
    flashing[::2] = 250
    assert read(flashing, 8).count is None
    picture = read(drawn("circle", np.zeros((1, 2)), RED, WHITE), 8)
    assert (picture.count, picture.objects[0].direction, picture.flicker) == (1, None, None)


def test_flicker_is_that_of_what_rests() -> None:
    clip = drawn("circle", path(0, 0.3, 8), RED, WHITE)
    assert read(clip, 8).flicker == pytest.approx(0, abs=0.3)
    brighter = clip.astype(int) - np.array([0, 6] * 4)[:, None, None, None]
    assert read(brighter.clip(0).astype(np.uint8), 8).flicker == pytest.approx(6, abs=0.3)


def test_reads_uint8_rgb_alone() -> None:
    for wrong in (np.zeros((8, 4, 4, 3)), np.zeros((8, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            read(wrong, 8)


def test_captions() -> None:
    assert parse("a red circle moves left on a blue background") == Truth((Said("red", "circle", "left"),), "blue")
    assert parse(
        "a black square stays still and a white triangle moves diagonally up to the right on a green background"
    ) == Truth((Said("black", "square", "still"), Said("white", "triangle", "diagonally up to the right")), "green")
    assert parse("a red circle on a blue background") == Truth((Said("red", "circle", None),), "blue")
    pan = "the camera pans up over a red circle on a white and blue checkerboard"
    assert parse(pan) == Truth((Said("red", "circle", None),), "blue and white", "up")
    for other in (
        "",
        "a red circle",
        "a red heart moves left on a blue background",
        "a red circle moves in on a blue background",
        "the camera pans over a red circle on a white and blue checkerboard",
        "a red circle on a blue checkerboard",
    ):
        with pytest.raises(UserError, match="cannot be judged"):
            parse(other)


def test_verdict() -> None:
    truth = parse("a red circle moves left and a blue square stays still on a white background")
    circle = Seen("red", "circle", 0.3, "left", 0.2)
    square = Seen("blue", "square", 0.3, "still", 0.01)
    right = judge(Reading("white", 2, (square, circle), 1.0), truth)
    assert (right.all, right.unread) == (True, ())
    assert right.speed_ratio == pytest.approx(0.2 / 0.25)
    other = dataclasses.replace(circle, direction="right", shape=None)
    wrong = judge(Reading("white", 2, (other, square), 1.0), truth)
    assert (wrong.colour, wrong.shape, wrong.direction, wrong.all, wrong.unread) == (True, False, False, False, ("shape",))
    alone = judge(Reading("white", 1, (circle,), 1.0), truth)
    assert not any((alone.count, alone.colour, alone.shape, alone.direction, alone.all))
    many = judge(Reading("white", 6, (circle, other, other, other, other, square), 1.0), truth)
    assert (many.count, many.colour, many.all) == (False, True, False)
    unknown = judge(Reading(None, None, (), None), truth)
    assert unknown.unread == ("background", "count", "colour", "shape", "direction")
    assert unknown.speed_ratio is None
    still = judge(
        Reading("white", 1, (dataclasses.replace(circle, direction=None),), None), parse("a red circle on a white background")
    )
    assert (still.all, still.direction, still.speed_ratio) == (True, None, None)
    told = parse("the camera pans up over a red circle on a white and blue checkerboard")
    panned = judge(Reading("blue and white", 1, (dataclasses.replace(circle, direction="still"),), None, "up", 0.2), told)
    assert (panned.camera, panned.direction, panned.all, panned.moves) == (True, None, True, True)
    assert panned.speed_ratio == pytest.approx(0.2 / 0.25)
    assert judge(Reading("blue and white", 1, (circle,), None, "down", 0.2), told).all is False
    plain = judge(Reading("blue", 1, (circle,), None), told)
    assert (plain.camera, plain.unread, plain.speed_ratio) == (False, ("camera",), None)
