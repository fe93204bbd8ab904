"""The truth of scenes: what is measured on the pixels is what the numbers and the captions say."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from dataprep import scenes
from dataprep.scenes import PALETTE, Background, Figure, Scene, draw_scene, render

BLACK = Background("plain", ("black",))


def coverage(scene: Scene, t: float, height: int, width: int) -> np.ndarray:
    """(H, W): the share of each pixel that the scene's only object covers, on a plain background."""
    ground = np.array(PALETTE[scene.background.colours[0]], float)
    step = np.array(PALETTE[scene.figures[0].colour], float) - ground
    return (render(scene, t, height, width) - ground) @ step / (step @ step)


def centroid(scene: Scene, t: float, height: int, width: int) -> np.ndarray:
    """(x, y) of the object in stage heights from the frame's middle, measured on the pixels."""
    weights = coverage(scene, t, height, width)
    y, x = np.mgrid[:height, :width] + 0.5
    unit = min(height, width * 9 / 16)
    return np.array([((x - width / 2) * weights).sum(), ((y - height / 2) * weights).sum()]) / weights.sum() / unit


@pytest.mark.parametrize("velocity", [(0.5, 0.0), (-0.5, 0.0), (0.0, -0.3), (0.3, 0.3)])
@pytest.mark.parametrize(("height", "width"), [(18, 32), (180, 320), (240, 320), (320, 180)])
def test_centroid_moves_by_the_velocity(velocity: tuple[float, float], height: int, width: int) -> None:
    start = (-velocity[0] / 2, -velocity[1] / 2)
    scene = Scene((Figure("circle", "red", 0.36, start, velocity),), BLACK)
    for t in (0.0, 1 / 30, 0.4, 1.0):
        expected = np.array(start) + np.array(velocity) * t
        np.testing.assert_allclose(centroid(scene, t, height, width), expected, atol=0.06 * 9 / min(height, width * 9 / 16))


@pytest.mark.parametrize("height", [18, 36, 360])
def test_shapes_have_the_stated_size(height: int) -> None:
    square = np.sqrt(2) * 0.6  # side of the square whose corners lie 0.6 diameters from the middle
    for shape, area in (("circle", math.pi / 4), ("square", square**2)):
        covered = coverage(Scene((Figure(shape, "white", 0.4, (0.0, 0.0)),), BLACK), 0, height, height * 16 // 9).sum()
        assert covered == pytest.approx(area * (0.4 * height) ** 2, rel=0.03)
    for shape, corners in scenes.SHAPES.items():
        assert np.hypot(*corners.T).max() <= scenes.SHAPE_REACH, shape


@pytest.mark.parametrize(("spin", "quarter_turns"), [(90.0, -1), (-90.0, 1), (45.0, 0)])
def test_turns_clockwise(spin: float, quarter_turns: int) -> None:
    heart = Scene((Figure("heart", "white", 0.45, (0.0, 0.0), spin=spin),), BLACK)
    middle = (slice(10, 170), slice(80, 240))
    turned = np.rot90(coverage(heart, 0, 180, 320)[middle], quarter_turns)  # numpy's sense is counterclockwise
    difference = np.abs(coverage(heart, 1, 180, 320)[middle] - turned).sum() / turned.sum()
    assert difference < 0.02 if quarter_turns else difference > 0.2


def test_growth_is_exponential_and_ends() -> None:
    scene = Scene((Figure("square", "white", 0.2, (0.0, 0.0), growth=1.0),), BLACK)
    areas = [coverage(scene, t, 180, 320).sum() for t in (0, 0.5, 1, 10)]
    assert areas[1] / areas[0] == pytest.approx(2, rel=0.03)
    assert areas[2] / areas[0] == pytest.approx(4, rel=0.03)
    assert areas[3] / areas[0] == pytest.approx((scenes.DIAMETERS[1] / 0.2) ** 2, rel=0.03)


def test_bounces_between_its_ends_and_orbits() -> None:
    bouncing = Scene((Figure("circle", "red", 0.4, (0.1, 0.0), (0.0, -1.2), bounce_reach=0.3),), BLACK)
    for t, y in ((0, 0), (0.25, -0.3), (0.5, 0), (0.75, 0.3), (0.875, 0.15), (1, 0)):
        np.testing.assert_allclose(centroid(bouncing, t, 180, 320), (0.1, y), atol=0.003)
    orbiting = Scene((Figure("circle", "red", 0.4, (0.0, 0.0), orbit_radius=0.25, orbit_rate=90.0),), BLACK)
    for t, place in ((0, (0.25, 0)), (1, (0, 0.25)), (2, (-0.25, 0)), (3, (0, -0.25))):  # right, down, left: clockwise
        np.testing.assert_allclose(centroid(orbiting, t, 180, 320), place, atol=0.003)


def test_pan_moves_the_world_the_other_way() -> None:
    figure = Figure("star", "yellow", 0.4, (0.1, 0.05))
    scene = Scene((figure,), Background("checker", ("blue", "white")), pan=(0.25, -0.125))
    before, after = render(scene, 0, 144, 256), render(scene, 1, 144, 256)
    # In pixels 36 to the left and 18 down.
    np.testing.assert_allclose(after[18:, :-36].astype(int), before[:-18, 36:].astype(int), atol=1)


def test_checkerboard_is_half_and_half() -> None:
    image = render(Scene((), Background("checker", ("black", "white"))), 0, 18, 32)
    fine = render(Scene((), Background("checker", ("black", "white"))), 0, 180, 320)
    mean = fine.reshape(18, 10, 32, 10, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(image, mean, atol=1.5)  # anti-aliasing is exact: pixel = mean of the finer picture


def test_gradient_runs_from_left_to_right() -> None:
    image = render(Scene((), Background("gradient", ("red", "blue"))), 0, 90, 160)
    np.testing.assert_allclose(image[45, 0], PALETTE["red"], atol=2)
    np.testing.assert_allclose(image[45, -1], PALETTE["blue"], atol=2)
    np.testing.assert_allclose(image[10, 80], (np.array(PALETTE["red"]) + PALETTE["blue"]) / 2, atol=3)


def test_wide_crop_of_a_tall_frame_is_the_same_scene() -> None:
    rng = np.random.default_rng(1)
    for kind in ("plain", "gradient", "checker"):
        figure = Figure("heart", "red", 0.4, (0.2, 0.1), orbit_radius=0.1, orbit_rate=100.0, spin=80.0)
        scene = Scene((figure,), Background(kind, ("white", "green")[: 1 if kind == "plain" else 2]))
        t = rng.uniform(0, 2)
        np.testing.assert_array_equal(render(scene, t, 250, 160)[80:170], render(scene, t, 90, 160))


def test_captions() -> None:
    star = Figure("star", "orange", 0.4, (0.0, 0.0))
    blue = Background("plain", ("blue",))
    assert Scene((star,), blue).caption() == "an orange star stays still on a blue background"
    moving = dataclasses.replace(star, velocity=(-0.5, 0.0), spin=-90.0)
    assert Scene((moving,), blue).caption() == "an orange star moves left and turns counterclockwise on a blue background"
    assert Scene((moving,), blue).still_caption() == "an orange star on a blue background"
    checker = Background("checker", ("green", "white"))
    assert Scene((star,), checker, (0.0, -0.3)).caption() == (
        "the camera pans up over an orange star on a green and white checkerboard"
    )
    turning = dataclasses.replace(star, spin=90.0)
    assert Scene((turning,), checker, (0.5, 0.0)).caption() == (
        "the camera pans right over an orange star that turns clockwise on a green and white checkerboard"
    )
    circle = Figure("circle", "red", 0.4, (0.0, 0.0), velocity=(0.3, 0.3))
    heart = Figure("heart", "white", 0.4, (0.0, 0.0), growth=-0.5)
    assert Scene((circle, heart), Background("gradient", ("orange", "pink"))).caption() == (
        "a red circle moves diagonally down to the right and a white heart shrinks on an orange to pink gradient"
    )
    bouncing = dataclasses.replace(circle, velocity=(0.0, 1.0), bounce_reach=0.3)
    assert Scene((bouncing,), blue).caption() == "a red circle bounces up and down on a blue background"
    orbiting = Figure("cross", "red", 0.4, (0.0, 0.0), orbit_radius=0.2, orbit_rate=90.0)
    assert Scene((orbiting,), blue).caption() == "a red cross moves clockwise in a circle on a blue background"


def test_simple_captions_agree_with_the_pixels() -> None:
    """An independent reading of the caption against the motion measured on 32 x 18 pixels, over one second."""
    rng = np.random.default_rng(7)
    steps = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    seen = set()
    for _ in range(80):
        scene = draw_scene(rng, "simple")
        words = scene.caption().split()
        assert words[1] == scene.figures[0].colour
        motion = words[4] if words[3] == "moves" else "still"
        moved = centroid(scene, 1.5, 18, 32) - centroid(scene, 0.5, 18, 32)
        expected = steps.get(motion, (0, 0))
        np.testing.assert_array_equal(np.sign(np.round(moved / 0.1)), expected)
        assert motion == "still" or np.hypot(*moved) > 0.25
        seen.add(motion)
    assert seen == {*steps, "still"}


def test_drawn_scenes_are_varied_seen_and_repeatable() -> None:
    drawn = [draw_scene(np.random.default_rng([3, index])) for index in range(300)]
    assert drawn == [draw_scene(np.random.default_rng([3, index])) for index in range(300)]
    assert len({scene.caption() for scene in drawn}) > 270
    text = " ".join(scene.caption() for scene in drawn)
    words = (
        "left right up down diagonally bounces clockwise counterclockwise circle grows shrinks still pans gradient checkerboard"
    )
    for word in [*words.split(), *PALETTE, *scenes.SHAPES]:
        assert f" {word} " in f" {text} ", word
    for scene in drawn:
        for t in (0.0, 1.0, 2.0):
            if scene.background.kind == "plain":
                ground = np.array(PALETTE[scene.background.colours[0]])
                visible = (np.abs(render(scene, t, 36, 64).astype(int) - ground).max(axis=-1) > 40).mean()
                assert visible > 0.005, (scene.caption(), t)


def test_objects_come_back() -> None:
    scene = Scene((Figure("circle", "red", 0.4, (0.0, 0.0), (0.5, 0.0)),), BLACK)
    seen = [coverage(scene, t, 36, 64).sum() > 1 for t in np.arange(0, 60, 0.5)]
    assert np.mean(seen) > 0.85


def test_a_contrasting_colour_is_always_left() -> None:
    for pair in itertools.combinations(PALETTE, 2):
        for taken in PALETTE:
            colour = scenes._contrasting_colour(np.random.default_rng(0), pair, tuple(PALETTE), taken)
            assert colour not in (*pair, taken)
    for background in scenes.SIMPLE_COLOURS:
        assert scenes._contrasting_colour(np.random.default_rng(0), (background,), scenes.SIMPLE_COLOURS) != background
