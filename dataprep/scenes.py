"""Captioned scenes: coloured shapes that move, turn and grow on simple backgrounds. The caption is the truth.

A ``Scene`` holds the truth in numbers; its caption is derived from them and ``render`` draws any instant of it, so that every
frame rate, variable ones included, shows the same motion.

Geometry: a scene is laid out on a stage, the largest centred 16:9 rectangle of the frame. Lengths are in stage heights, x to the
right, y down, (0, 0) in the middle: the stage reaches from (-8/9, -1/2) to (8/9, 1/2). Frames of other shapes show more
background around it, and a centred crop to 16:9 keeps the caption true. Positive angles and rates are clockwise.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Difficulty = Literal["simple", "full"]
BackgroundKind = Literal["plain", "gradient", "checker"]
Vector = tuple[float, float]

STAGE_ASPECT = 16 / 9
DIAMETERS = (0.16, 0.7)  # growing and shrinking end there
CHECKER_CELL = 0.25
SHAPE_REACH = 1.25
MASK_SIDE = 768  # pixels, about, of an object's supersampled mask

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (226, 42, 48),
    "orange": (255, 138, 20),
    "yellow": (255, 214, 40),
    "green": (34, 160, 72),
    "cyan": (50, 205, 225),
    "blue": (36, 84, 214),
    "purple": (132, 48, 184),
    "pink": (255, 140, 190),
    "white": (250, 250, 250),
    "black": (24, 24, 28),
}
# Pairs that blur together in a small or a compressed picture: never an object and what is behind it.
ALIKE = [
    {"red", "orange"},
    {"red", "pink"},
    {"orange", "yellow"},
    {"orange", "pink"},
    {"yellow", "white"},
    {"pink", "white"},
    {"cyan", "white"},
    {"cyan", "green"},
    {"blue", "purple"},
    {"purple", "black"},
    {"blue", "black"},
]
SIMPLE_COLOURS = ("red", "yellow", "green", "blue", "white", "black")
SIMPLE_SHAPES = ("circle", "square", "triangle")


def _star_polygon(points: int, inner: float) -> np.ndarray:
    angles = np.arange(2 * points) * math.pi / points - math.pi / 2
    radii = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _regular_polygon(corners: int, start_degrees: float) -> np.ndarray:
    angles = np.arange(corners) * 2 * math.pi / corners + math.radians(start_degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _heart_polygon() -> np.ndarray:
    s = np.linspace(0, 2 * math.pi, 120, endpoint=False)
    x = 16 * np.sin(s) ** 3
    y = -(13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s))
    return np.stack([x, y - 2.5], axis=1) / 17


def _cross_polygon() -> np.ndarray:
    a, b = 0.32, 0.95
    corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    return np.array(corners)


# Name -> (N, 2) corners around (0, 0), at most SHAPE_REACH from it; areas look alike, like that of a circle of radius 1.
SHAPES: dict[str, np.ndarray] = {
    "circle": _regular_polygon(128, 0),
    "square": _regular_polygon(4, 45) * 1.2,
    "triangle": _regular_polygon(3, -90) * 1.24,
    "star": _star_polygon(5, 0.46) * 1.24,
    "cross": _cross_polygon() * 1.1,
    "heart": _heart_polygon() * 1.15,
}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _direction_words(velocity: Vector) -> str:
    horizontal = "left" if velocity[0] < 0 else "right" if velocity[0] > 0 else ""
    vertical = "up" if velocity[1] < 0 else "down" if velocity[1] > 0 else ""
    return f"diagonally {vertical} to the {horizontal}" if horizontal and vertical else horizontal or vertical


def _turn_words(rate: float) -> str:
    return "clockwise" if rate > 0 else "counterclockwise"


def _direction(velocity: Vector) -> Vector:
    length = math.hypot(*velocity) or 1.0
    return velocity[0] / length, velocity[1] / length


def _triangle_wave(periods: float) -> float:
    """0, 1, 0, -1, 0 at 0, 1/4, 1/2, 3/4 and 1 period, straight between."""
    phase = (periods + 0.25) % 1.0
    return 4 * phase - 1 if phase < 0.5 else 3 - 4 * phase


@dataclasses.dataclass(frozen=True)
class Figure:
    """One object. Lengths in stage heights, times in seconds, angles in degrees; rates of zero mean that it does not do that."""

    shape: str
    colour: str
    diameter: float
    centre: Vector  # at t = 0; of an orbit, its middle
    velocity: Vector = (0.0, 0.0)  # per second
    bounce_reach: float = 0.0  # > 0: moves to and fro along ``velocity``, this far from ``centre``
    orbit_radius: float = 0.0
    orbit_rate: float = 0.0  # degrees per second
    orbit_phase: float = 0.0  # degrees at t = 0, from the right of the middle
    spin: float = 0.0  # degrees per second; upright at t = 0
    growth: float = 0.0  # octaves per second: +1 doubles the diameter every second

    def centre_at(self, t: float) -> Vector:
        """Where the object's middle is, before the frame's edges and the camera are taken into account."""
        distance = math.hypot(*self.velocity) * t
        if self.bounce_reach > 0:
            distance = self.bounce_reach * _triangle_wave(distance / (4 * self.bounce_reach))
        x, y = (self.centre[axis] + distance * _direction(self.velocity)[axis] for axis in (0, 1))
        phase = math.radians(self.orbit_rate * t + self.orbit_phase)
        return x + self.orbit_radius * math.cos(phase), y + self.orbit_radius * math.sin(phase)

    def diameter_at(self, t: float) -> float:
        """The diameter, which stops at ``DIAMETERS`` when it grows or shrinks."""
        return min(max(self.diameter * 2 ** (self.growth * t), DIAMETERS[0]), DIAMETERS[1]) if self.growth else self.diameter

    def noun(self) -> str:
        """Such as "a red circle"."""
        return _with_article(f"{self.colour} {self.shape}")

    def actions(self) -> list[str]:
        """What it does, such as ["moves left", "turns clockwise"]; empty for an object at rest."""
        actions = []
        if self.bounce_reach > 0:
            actions.append("bounces up and down" if self.velocity[0] == 0 else "bounces from side to side")
        elif any(self.velocity):
            actions.append(f"moves {_direction_words(self.velocity)}")
        if self.orbit_rate:
            actions.append(f"moves {_turn_words(self.orbit_rate)} in a circle")
        if self.spin:
            actions.append(f"turns {_turn_words(self.spin)}")
        if self.growth:
            actions.append("grows" if self.growth > 0 else "shrinks")
        return actions


@dataclasses.dataclass(frozen=True)
class Background:
    """What is behind the objects: one colour, a gradient from the stage's left to its right, or a checkerboard."""

    kind: BackgroundKind
    colours: tuple[str, ...]  # one, or two

    def phrase(self) -> str:
        """Such as "on a blue background"."""
        if self.kind == "plain":
            return f"on {_with_article(self.colours[0])} background"
        joined = {"gradient": " to ", "checker": " and "}[self.kind].join(self.colours)
        return f"on {_with_article(joined)} {'gradient' if self.kind == 'gradient' else 'checkerboard'}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """The truth about a clip."""

    figures: tuple[Figure, ...]  # later ones are in front
    background: Background
    pan: Vector = (0.0, 0.0)  # the camera's velocity, in stage heights per second

    def caption(self) -> str:
        """Such as "a red circle moves left and turns clockwise on a blue background"."""
        if any(self.pan):
            subjects = [" that ".join(filter(None, [f.noun(), " and ".join(f.actions())])) for f in self.figures]
            return f"the camera pans {_direction_words(self.pan)} over {' and '.join(subjects)} {self.background.phrase()}"
        subjects = [f"{f.noun()} {' and '.join(f.actions()) or 'stays still'}" for f in self.figures]
        return f"{' and '.join(subjects)} {self.background.phrase()}"

    def still_caption(self) -> str:
        """What a single picture of the scene shows, without motion: "a red circle on a blue background"."""
        return f"{' and '.join(f.noun() for f in self.figures)} {self.background.phrase()}"


def render(scene: Scene, t: float, height: int, width: int) -> np.ndarray:
    """The scene at ``t`` seconds as (height, width, 3) uint8 RGB, anti-aliased.

    An object that leaves the frame comes back in on the other side, so that captions hold for clips of any length.
    """
    unit = min(height, width / STAGE_ASPECT)  # pixels per stage height
    camera = (scene.pan[0] * t, scene.pan[1] * t)
    image = _draw_background(scene.background, camera, unit, height, width)
    for figure in scene.figures:
        _draw_figure(image, figure, t, camera, any(scene.pan), unit)
    return image


def _draw_background(background: Background, camera: Vector, unit: float, height: int, width: int) -> np.ndarray:
    colours = np.array([PALETTE[name] for name in background.colours], np.float32)
    if background.kind == "plain":
        return np.broadcast_to(colours[0].astype(np.uint8), (height, width, 3)).copy()
    x = (np.arange(width) + 0.5 - width / 2) / unit + camera[0]
    y = (np.arange(height) + 0.5 - height / 2) / unit + camera[1]
    if background.kind == "gradient":
        share = np.broadcast_to(np.clip(x / STAGE_ASPECT + 0.5, 0, 1), (height, width))
    else:
        # Over a pixel the mean of a product of a function of x and one of y is the product of their means: exact anti-aliasing.
        share = 0.5 + 0.5 * _square_wave(y, 1 / unit)[:, None] * _square_wave(x, 1 / unit)[None, :]
    ramp = colours[0] + np.linspace(0, 1, 256, dtype=np.float32)[:, None] * (colours[1] - colours[0])
    return ramp.round().astype(np.uint8).take((share * 255).round().astype(np.uint8), axis=0)


def _square_wave(x: np.ndarray, pixel: float) -> np.ndarray:
    """The mean over a pixel of +1 and -1 that alternate every ``CHECKER_CELL``, from the integral of the wave."""

    def integral(at: np.ndarray) -> np.ndarray:
        return CHECKER_CELL / 2 - np.abs(at % (2 * CHECKER_CELL) - CHECKER_CELL)

    return (integral(x + pixel / 2) - integral(x - pixel / 2)) / pixel


def _draw_figure(image: np.ndarray, figure: Figure, t: float, camera: Vector, panned: bool, unit: float) -> None:
    """Draw ``figure`` into ``image`` (H, W, 3) in place."""
    height, width = image.shape[:2]
    radius = figure.diameter_at(t) * unit / 2
    reach = SHAPE_REACH * radius
    centre = []
    for axis, side in enumerate((width, height)):
        at = (figure.centre_at(t)[axis] - camera[axis]) * unit + side / 2
        if panned or (figure.velocity[axis] and not figure.bounce_reach):  # comes back on the other side, out of sight meanwhile
            span = side + 2 * reach
            at = (at + reach) % span - reach
        centre.append(at)
    left, top = (math.floor(at - reach) for at in centre)
    side = math.ceil(2 * reach) + 2
    scale = max(4, min(16, round(MASK_SIDE / side)))

    angle = math.radians(figure.spin * t)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    corners = (SHAPES[figure.shape] @ turn * radius + (centre[0] - left, centre[1] - top)) * scale - 0.5
    mask = Image.new("L", (side * scale, side * scale), 0)
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners.tolist()], fill=255)
    coverage = np.asarray(mask.reduce(scale), np.float32)[:, :, None] / 255

    rows = slice(max(top, 0), max(min(top + side, height), 0))
    columns = slice(max(left, 0), max(min(left + side, width), 0))
    coverage = coverage[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    if coverage.size:
        region = image[rows, columns].astype(np.float32)
        region += (np.array(PALETTE[figure.colour], np.float32) - region) * coverage
        image[rows, columns] = region.round().astype(np.uint8)


_DIRECTIONS: dict[str, Vector] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}


def _speed(rng: np.random.Generator, direction: Vector) -> Vector:
    """A velocity along ``direction``: seen within a second, and a two-second clip keeps the object in the frame."""
    horizontal = rng.uniform(0.45, 0.65) if not direction[1] else rng.uniform(0.35, 0.45)
    vertical = rng.uniform(0.28, 0.36)
    return direction[0] * horizontal, direction[1] * vertical


def _moving(rng: np.random.Generator, figure: Figure, motion: str) -> Figure:
    """``figure`` with a motion: a direction, "bounce", "orbit", "grow" (or shrinks) or "still"."""
    if motion in _DIRECTIONS:
        velocity = _speed(rng, _DIRECTIONS[motion])
        passing = rng.uniform(0.8, 1.2)
        across = rng.uniform(-0.15, 0.15)
        centre = (-velocity[0] * passing if velocity[0] else 2 * across, -velocity[1] * passing if velocity[1] else across)
        return dataclasses.replace(figure, centre=centre, velocity=velocity)
    if motion == "bounce":
        sideways = rng.random() < 0.5
        reach = 0.55 if sideways else 0.5 - figure.diameter / 2
        speed = 4 * reach / rng.uniform(1.3, 2.0) * rng.choice([-1, 1])
        velocity = (speed, 0.0) if sideways else (0.0, speed)
        return dataclasses.replace(figure, centre=_near_middle(rng, velocity), velocity=velocity, bounce_reach=reach)
    if motion == "orbit":
        radius = min(0.26, 0.48 - figure.diameter / 2)
        centre = (rng.uniform(-0.3, 0.3), 0.0)
        rate = rng.uniform(150, 220) * rng.choice([-1, 1])
        phase = rng.uniform(0, 360)
        return dataclasses.replace(figure, centre=centre, orbit_radius=radius, orbit_rate=rate, orbit_phase=phase)
    if motion == "grow":
        growth = rng.uniform(0.5, 0.7) * rng.choice([-1, 1])
        diameter = rng.uniform(0.2, 0.26) if growth > 0 else rng.uniform(0.55, 0.65)
        return dataclasses.replace(figure, diameter=diameter, growth=growth, centre=_near_middle(rng))
    return dataclasses.replace(figure, centre=_near_middle(rng))


def _turning(rng: np.random.Generator, figure: Figure) -> Figure:
    """``figure`` with a spin; a circle, on which it would not show, stays as it is. Slow enough for 8 frames a second."""
    if figure.shape == "circle":
        return figure
    return dataclasses.replace(figure, spin=rng.uniform(70, 140) * rng.choice([-1, 1]))


def _draw_pair(rng: np.random.Generator, background: Background) -> tuple[Figure, Figure]:
    """Two objects of different colours, each in its half of the stage."""
    pair: list[Figure] = []
    for x in (-0.45, 0.45):
        figure = _draw_plain_figure(rng, background, taken=pair[0].colour if pair else "")
        motion = str(rng.choice(["up", "down", "bounce", "grow", "turn", "still"]))
        if motion == "turn" and figure.shape != "circle":
            figure = _turning(rng, figure)
        elif motion == "bounce":
            reach = 0.5 - figure.diameter / 2
            figure = dataclasses.replace(figure, velocity=(0.0, rng.uniform(0.7, 1.0) * rng.choice([-1, 1])), bounce_reach=reach)
        elif motion in ("up", "down", "grow"):
            figure = _moving(rng, figure, motion)
        pair.append(dataclasses.replace(figure, centre=(x + rng.uniform(-0.08, 0.08), figure.centre[1])))
    return pair[0], pair[1]


def _draw_plain_figure(rng: np.random.Generator, background: Background, taken: str = "") -> Figure:
    colour = _contrasting_colour(rng, background.colours, tuple(PALETTE), taken)
    return Figure(str(rng.choice(list(SHAPES))), colour, rng.uniform(0.35, 0.45), _near_middle(rng))


def _draw_backdrop(rng: np.random.Generator, kind: str | None) -> Background:
    """A background, of ``kind`` where it is given: a pan shows only against a pattern."""
    kind = kind or str(rng.choice(["plain", "gradient", "checker"], p=[0.6, 0.25, 0.15]))
    first = str(rng.choice(list(PALETTE)))
    if kind == "plain":
        return Background("plain", (first,))
    if kind == "gradient":
        return Background("gradient", (first, str(rng.choice([name for name in PALETTE if name != first]))))
    return Background("checker", (first, _contrasting_colour(rng, (first,), ("white", "black"))))


def _contrasting_colour(rng: np.random.Generator, behind: tuple[str, ...], colours: tuple[str, ...], taken: str = "") -> str:
    """One of ``colours`` that stands out from all of ``behind`` and is not ``taken``."""
    choices = [name for name in colours if name != taken and all(stand_apart(name, other) for other in behind)]
    return str(rng.choice(choices))


def stand_apart(colour: str, other: str) -> bool:
    """Whether two colours of ``PALETTE`` can be told apart in a small or a compressed picture."""
    return colour != other and {colour, other} not in ALIKE


def _near_middle(rng: np.random.Generator, along: Vector = (0.0, 0.0)) -> Vector:
    """A place near the middle of the stage; exactly there along an axis on which the object moves."""
    return (0.0 if along[0] else rng.uniform(-0.4, 0.4), 0.0 if along[1] else rng.uniform(-0.15, 0.15))


def draw_scene(rng: np.random.Generator, difficulty: Difficulty = "full") -> Scene:
    """Draw a scene by lot. Moving objects pass the middle of the stage about one second after the start.

    ``simple`` has one object of three shapes and six colours that moves along an axis or rests, on one colour: few words, each
    seen often, which a model of a few minutes' training can learn. ``full`` has everything.
    """
    if difficulty == "simple":
        background = Background("plain", (str(rng.choice(SIMPLE_COLOURS)),))
        colour = _contrasting_colour(rng, background.colours, SIMPLE_COLOURS)
        figure = Figure(str(rng.choice(SIMPLE_SHAPES)), colour, rng.uniform(0.35, 0.45), (0.0, 0.0))
        return Scene((_moving(rng, figure, str(rng.choice(["left", "right", "up", "down", "still"]))),), background)
    kind = str(rng.choice(["one", "two", "pan"], p=[0.6, 0.2, 0.2]))
    background = _draw_backdrop(rng, "checker" if kind == "pan" else None)
    if kind == "two":
        return Scene(_draw_pair(rng, background), background)
    figure = _draw_plain_figure(rng, background)
    if kind == "one":
        figure = _moving(rng, figure, str(rng.choice([*_DIRECTIONS, "bounce", "bounce", "orbit", "orbit", "grow", "still"])))
        turns = rng.random() < (0.3 if figure.actions() else 0.8)
        return Scene((_turning(rng, figure) if turns else figure,), background)
    direction = _DIRECTIONS[str(rng.choice(["left", "right", "up", "down"]))]
    pan = _speed(rng, direction)
    passing = rng.uniform(0.8, 1.2)
    figure = dataclasses.replace(figure, centre=(passing * pan[0], passing * pan[1]))
    return Scene((_turning(rng, figure) if rng.random() < 0.3 else figure,), background, pan)
