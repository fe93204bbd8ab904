"""A board read from pixels, on boards that are drawn here point by point: no drawing code of the product takes part."""

import numpy as np
import pytest

from pipelines.checkerboard import CELL, find
from pipelines.truth import COLOURS, read

RED, WHITE, BLUE = (np.array(COLOURS[name], float) for name in ("red", "white", "blue"))
FINE = 8


def drawn(places: np.ndarray, height: int, width: int, hole: bool = False) -> np.ndarray:
    """(T, H, W, 3) of a red and white board at (T, 2) places of the camera, with a blue square that goes with it."""
    rows, columns = (np.mgrid[: height * FINE, : width * FINE] + 0.5) / FINE / height
    frames = []
    for x, y in places:
        even = (np.floor((columns - width / height / 2 + x) / CELL) + np.floor((rows - 0.5 + y) / CELL)) % 2 == 0
        frame = np.where(even[..., None], WHITE, RED)
        if hole:
            frame = np.where((np.maximum(abs(columns - 0.5), abs(rows - 0.4)) < 0.2)[..., None], BLUE, frame)
        frames.append(frame.reshape(height, FINE, width, FINE, 3).mean(axis=(1, 3)))
    return np.stack(frames).round().astype(np.uint8)


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (36, 64)])  # 3:2 is a whole number of squares, 16:9 is not
@pytest.mark.parametrize("velocity", [(0.25, 0.0), (0.0, -0.25), (-0.3, 0.2), (0.0, 0.0)])
def test_where_the_camera_is_and_what_lies_behind(velocity: tuple[float, float], height: int, width: int, hole: bool) -> None:
    places = np.arange(8)[:, None] / 8 * np.array(velocity) + (0.11, 0.07)
    frames = drawn(places, height, width, hole)
    board = find(frames, height)
    assert board is not None
    np.testing.assert_allclose(np.sort(board.colours, axis=0), np.sort([RED, WHITE], axis=0), atol=2)
    np.testing.assert_allclose(board.places - board.places[0], places - places[0], atol=0.004)
    behind = drawn(places, height, width)
    np.testing.assert_allclose(board.ground, behind, atol=30)  # mixed with the square, at its edge
    np.testing.assert_allclose(board.ground.mean(axis=(0, 1, 2)), behind.mean(axis=(0, 1, 2)), atol=1)


def test_the_camera_of_a_clip() -> None:
    reading = read(drawn(np.arange(8)[:, None] / 8 * (0.0, 0.25), 16, 24, hole=True), 8)
    assert (reading.background, reading.camera, reading.count) == ("red and white", "down", 1)
    assert reading.camera_speed == pytest.approx(0.25, rel=0.02)
    assert (reading.objects[0].colour, reading.objects[0].shape) == ("blue", "square")
    assert reading.objects[0].direction == "down"  # it stays in view, so it goes with the camera
    assert reading.objects[0].speed == pytest.approx(0.25, rel=0.02)
    resting = read(drawn(np.zeros((8, 2)), 16, 24), 8)
    assert (resting.camera, resting.count, resting.flicker) == ("still", 0, 0.0)
    picture = read(drawn(np.zeros((1, 2)), 16, 24), 8)
    assert (picture.background, picture.camera, picture.camera_speed) == ("red and white", None, None)
    jumping = read(drawn(np.array([(0.12 * (n % 2), 0) for n in range(8)]), 16, 24), 8)
    assert (jumping.background, jumping.camera) == ("red and white", None)


def test_what_is_no_board() -> None:
    rng = np.random.default_rng(0)
    assert find(rng.integers(0, 256, (8, 16, 24, 3), dtype=np.uint8), 16) is None
    assert find(np.broadcast_to(RED.astype(np.uint8), (8, 16, 24, 3)), 16) is None
    halves = np.where(np.arange(24)[:, None] < 12, RED, WHITE).astype(np.uint8)
    assert find(np.broadcast_to(halves, (8, 16, 24, 3)), 16) is None
    noise = np.where(rng.random((8, 16, 24, 1)) < 0.5, RED, WHITE).astype(np.uint8)
    assert find(noise, 16) is None
