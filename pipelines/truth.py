"""What a clip of a moving scene shows, read from its pixels alone: background, and each object's colour, shape, size and motion.

    reading = read(frames, frame_rate)  # (T, H, W, 3) uint8 RGB, frames per second
    reading.objects[0].colour, reading.objects[0].direction, reading.objects[0].speed

Classical: colours are told by their distance, objects are connected components, shapes are compared with drawn ones, motion is a
line through the centroids. For objects of few colours and shapes, upright, on a background of one colour or a checkerboard, over
which the camera may pan. What cannot be told is None rather than a guess, so blurred and broken clips can be read too.

Lengths are in stage heights: of the centred 16:9 part of the picture that the scene was made for, which is the frame's height in
clips of 16:9 and in those cropped from it.

Shapes: T frames, H height, W width, K colours.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from pipelines import checkerboard

# What the words of the captions mean to the eye. That dataprep draws the same is tested, not shared.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 42, 48),
    "yellow": (255, 214, 40),
    "green": (34, 160, 72),
    "blue": (36, 84, 214),
    "white": (250, 250, 250),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle")
# What is compared: turned ones have no word, but would else pass for a circle.
DRAWN = [*((shape, 0.0) for shape in SHAPES), *(("square", degrees) for degrees in (22.5, 45.0, 67.5)), ("triangle", 60.0)]
STILL = "still"
# By angle from the right, clockwise (y points down), in steps of 45 degrees.
DIRECTIONS = (
    "right",
    "diagonally down to the right",
    "down",
    "diagonally down to the left",
    "left",
    "diagonally up to the left",
    "up",
    "diagonally up to the right",
)

MAX_COLOUR_DISTANCE = 90.0  # RGB levels; the closest two of COLOURS, green and black, lie 143 apart
MAX_COLOUR_RATIO = 0.8  # of the distances to the closest and the next word
CONTRAST = 60.0  # RGB levels by which an object's pixels differ from the background
MIN_PLAIN = 0.5  # share of the pixels that the background must have
MIN_AREA = 0.015  # of an object, in squared stage heights
MIN_AGREEING = 0.6  # share of the frames that must show the number of objects
MIN_SEEN = 0.25  # share of the frames in which a colour must occur to be an object's
MAX_MISFIT = 0.12  # of a shape: 1 - squared correlation with the drawn one
MAX_MISFIT_RATIO = 0.8  # of the misfits of the best shape and the next
STILL_SPEED = 0.1  # stage heights per second; slower is rest
MAX_WOBBLE = (0.04, 0.15)  # distance from uniform motion: stage heights, and share of the way
WRAP = 0.5  # of the frame's side: a step beyond it is a return from the other side
BLURS = (0.0, 0.6, 1.0)  # pixels, of the drawn shapes
SUBPIXELS = 4


@dataclass(frozen=True)
class Seen:
    """One object; None where it cannot be told."""

    colour: str | None
    shape: str | None
    size: float  # diameter of the circle of equal area, stage heights
    direction: str | None  # one of DIRECTIONS or "still", in the scene: what a camera does is taken away
    speed: float | None  # stage heights per second


@dataclass(frozen=True)
class Reading:
    """What a clip shows."""

    background: str | None  # such as "blue", or "blue and white" of a checkerboard, by the alphabet
    count: int | None  # of objects; None where the frames disagree
    objects: tuple[Seen, ...]  # those that were followed
    flicker: float | None  # RMS change from frame to frame of what should not change, in levels of 255
    camera: str | None = None  # one of DIRECTIONS or "still"; a background of one colour does not tell
    camera_speed: float | None = None  # stage heights per second


@dataclass(frozen=True)
class _Track:
    """One object through the frames where it was found."""

    frames: np.ndarray  # (F,) their numbers
    centres: np.ndarray  # (F, 2) x and y, pixels
    areas: np.ndarray  # (F,) pixels
    whole: np.ndarray  # (F,) whether it is clear of the frame's edges
    coverage: np.ndarray  # (F, H, W) in 0..1


def read(frames: np.ndarray, frame_rate: float, stage: float | None = None) -> Reading:
    """Read a clip.

    Args:
        frames: (T, H, W, 3) uint8 RGB; one frame is a picture, of which no motion is told.
        frame_rate: per second.
        stage: pixels per stage height; None: H.

    Raises:
        ValueError: frames of another shape or type, or a frame rate that is not positive.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape or frame_rate <= 0:
        raise ValueError(
            f"frames must be (T, H, W, 3) uint8 at a rate above 0, got {frames.shape} {frames.dtype} at {frame_rate}"
        )
    unit = float(stage or frames.shape[1])
    board = checkerboard.find(frames, unit)
    if board is None:
        ground = np.median(frames.reshape(-1, 3), axis=0).astype(np.float32)
        names, camera = [_name(ground)], np.zeros((len(frames), 2))
    else:
        ground, names, camera = board.ground, [_name(colour) for colour in board.colours], board.places
    difference = frames.astype(np.float32) - ground
    stands_out = np.linalg.norm(difference, axis=-1) > CONTRAST
    if board is not None:  # compression that halves the resolution of colours makes others along the squares' edges
        stands_out = ndimage.binary_opening(stands_out, _SQUARE)
    if stands_out.mean() > 1 - MIN_PLAIN:
        return Reading(None, None, (), None)
    labels, values = _colours(frames, difference, stands_out, names, MIN_AREA * unit**2)
    owner, coverage = _shares(difference, [value - ground for value in values])
    times = np.arange(len(frames)) / frame_rate
    objects, counts = [], np.zeros(len(frames), int)
    for k, name in enumerate(labels):
        found = _follow(owner == k, np.where(ndimage.binary_dilation(owner == k, _SQUARE), coverage[k], 0), MIN_AREA * unit**2)
        counts += found[1]
        objects += [_describe(track, name, frame_rate, unit, camera) for track in found[0]]
    agreeing = (counts == len(objects)).mean()
    return Reading(
        " and ".join(sorted(name for name in names if name)) if all(names) else None,
        len(objects) if agreeing >= MIN_AGREEING else None,
        tuple(objects),
        _flicker(difference, owner),
        *((None, None) if board is None else _uniform(camera - camera.mean(axis=0), times - times.mean())),
    )


_SQUARE = np.ones((1, 3, 3), bool)  # neighbours within a frame, (T, H, W)


def _name(colour: np.ndarray) -> str | None:
    """The word for an RGB colour, if one is clearly the closest."""
    distances = np.linalg.norm(np.array(list(COLOURS.values())) - colour, axis=1)
    first, second = np.argsort(distances)[:2]
    if distances[first] > MAX_COLOUR_DISTANCE or distances[first] > MAX_COLOUR_RATIO * distances[second]:
        return None
    return list(COLOURS)[first]


def _colours(
    frames: np.ndarray, difference: np.ndarray, stands_out: np.ndarray, behind: list[str | None], min_area: float
) -> tuple[list[str | None], np.ndarray]:
    """The words and (K, 3) values of the colours that objects have, from the cores of the components."""
    parts, _ = ndimage.label(stands_out, np.pad(_SQUARE, ((1, 1), (0, 0), (0, 0))))
    contrast = np.linalg.norm(difference, axis=-1)
    cores: dict[str | None, list[np.ndarray]] = {}
    seen: dict[str | None, set[int]] = {}
    for index, place in enumerate(ndimage.find_objects(parts), start=1):
        inside = parts[place] == index
        if inside.sum() < min_area / 2:
            continue
        strong = inside & (contrast[place] >= 0.85 * contrast[place][inside].max())
        core = np.median(frames[place][strong], axis=0)
        name = _name(core)
        cores.setdefault(name, []).append(core)
        seen.setdefault(name, set()).add(place[0].start)
    # What has the background's colour too is a halo, as compression leaves around objects.
    names = [name for name in cores if len(seen[name]) >= MIN_SEEN * len(frames) and (name is None or name not in behind)]
    return names, np.array([np.median(cores[name], axis=0) for name in names]).reshape(-1, 3)


def _shares(difference: np.ndarray, steps: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Which colour's object each pixel belongs to, (T, H, W) with -1 for none, and how far each covers it, (K, T, H, W).

    A pixel on an object's edge is a mixture: it lies on the line from the background's colour to the object's.
    ``steps`` go from the one to the other, (3,) or (T, H, W, 3) each.
    """
    owner = np.full(difference.shape[:3], -1)
    coverage = np.zeros((len(steps), *difference.shape[:3]), np.float32)
    closest = np.full(difference.shape[:3], np.inf)
    for k, step in enumerate(steps):
        share = np.clip((difference * step).sum(axis=-1) / np.maximum((step**2).sum(axis=-1), 1), 0, 1)
        beside = np.linalg.norm(difference - share[..., None] * step, axis=-1)
        coverage[k] = share
        owner = np.where((beside < closest) & (share > 0.5), k, np.where(beside < closest, -1, owner))
        closest = np.minimum(closest, beside)
    return owner, coverage


def _follow(inside: np.ndarray, coverage: np.ndarray, min_area: float) -> tuple[list[_Track], np.ndarray]:
    """The objects of one colour, and (T,) how many a frame shows.

    Args:
        inside: (T, H, W) the pixels of that colour.
        coverage: (T, H, W) in 0..1, with soft edges.
        min_area: in pixels.
    """
    found: list[list[tuple[np.ndarray, float, bool, np.ndarray]]] = []
    for frame, mask in enumerate(inside):
        parts, number = ndimage.label(mask, np.ones((3, 3)))
        here = []
        for index in range(1, number + 1):
            part = parts == index
            soft = np.where(ndimage.binary_dilation(part, np.ones((3, 3))), coverage[frame], 0)
            area = float(soft.sum())
            if area >= min_area:
                y, x = np.nonzero(part)
                whole = min(y.min(), x.min()) > 0 and y.max() < part.shape[0] - 1 and x.max() < part.shape[1] - 1
                centre = np.array([(soft.sum(axis) * (np.arange(part.shape[1 - axis]) + 0.5)).sum() / area for axis in (0, 1)])
                here.append((centre, area, bool(whole), soft))
        found.append(sorted(here, key=lambda part: -part[1]))
    counts = np.array([len(here) for here in found])
    number = int(np.bincount(counts).argmax())
    frames = [frame for frame, here in enumerate(found) if len(here) >= number > 0]
    objects: list[list[tuple[np.ndarray, float, bool, np.ndarray]]] = [[] for _ in range(number)]
    for frame in frames:
        here = found[frame][:number]
        order = list(range(number))
        if objects[0]:
            costs = [[float(np.hypot(*(parts[-1][0] - part[0]))) for part in here] for parts in objects]
            order = linear_sum_assignment(np.array(costs))[1].tolist()
        for parts, index in zip(objects, order, strict=True):
            parts.append(here[index])
    tracks = []
    for parts in objects:
        centres, areas, whole, softs = (np.array(column) for column in zip(*parts, strict=True))
        tracks.append(_Track(np.array(frames), centres, areas, whole, softs))
    return tracks, counts


def _describe(track: _Track, colour: str | None, frame_rate: float, unit: float, camera: np.ndarray) -> Seen:
    enough = track.whole.sum() >= max(2, len(track.whole) / 3)
    used = track.whole if enough else np.ones_like(track.whole)
    area = float(np.median(track.areas[used]))
    direction, speed = _motion(track, used, frame_rate, unit, camera)
    shape = _shape(track, area) if track.whole.any() else None
    return Seen(colour, shape, math.sqrt(4 * area / math.pi) / unit, direction, speed)


def _motion(
    track: _Track, used: np.ndarray, frame_rate: float, unit: float, camera: np.ndarray
) -> tuple[str | None, float | None]:
    """Direction and speed of the uniform motion that fits the centres best, across returns from the other side.

    ``camera`` is (T, 2), stage heights.
    """
    if used.sum() < 2:
        return None, None
    times = track.frames[used] / frame_rate
    centres = track.centres[used] / unit
    sides = np.array(track.coverage.shape[:0:-1]) / unit  # width and height
    run = np.concatenate([[0], np.cumsum((np.abs(np.diff(centres, axis=0)) > WRAP * sides).any(axis=1))])
    centres = centres + camera[track.frames[used]]
    for piece in np.unique(run):  # each with its own place, all with one velocity
        centres[run == piece] -= centres[run == piece].mean(axis=0)
        times[run == piece] -= times[run == piece].mean()
    return _uniform(centres, times)


def _uniform(places: np.ndarray, times: np.ndarray) -> tuple[str | None, float | None]:
    """Direction and speed of (F, 2) places, about their mean, at (F,) times, about theirs; None where it is no uniform motion."""
    if not times.any():
        return None, None
    velocity = times @ places / (times @ times)
    speed = float(np.hypot(*velocity))
    wobble = float(np.sqrt(((places - times[:, None] * velocity) ** 2).sum(axis=1).mean()))
    if wobble > MAX_WOBBLE[0] + MAX_WOBBLE[1] * speed * float(np.ptp(times)):
        return None, None
    if speed < STILL_SPEED:
        return STILL, speed
    return DIRECTIONS[round(math.degrees(math.atan2(velocity[1], velocity[0])) / 45) % 8], speed


def _shape(track: _Track, area: float) -> str | None:
    """The shape that, drawn with the object's area at its centres and a little blurred, looks most like it."""
    coverage, centres = track.coverage[track.whole], track.centres[track.whole]
    reach = math.ceil(0.9 * math.sqrt(area)) + 2  # a triangle's top is 0.88 roots of the area from its centre
    corners = np.floor(centres).astype(int) - reach
    side = 2 * reach + 1
    padded = np.pad(coverage, ((0, 0), (side, side), (side, side)))
    patches = np.stack([p[y + side : y + 2 * side, x + side : x + 2 * side] for p, (x, y) in zip(padded, corners, strict=True)])
    fine = (np.arange(side * SUBPIXELS) + 0.5) / SUBPIXELS
    x, y = (fine[None, :] - (centres - corners)[:, axis, None] for axis in (0, 1))
    misfits = []
    for shape, degrees in DRAWN:
        drawn = _inside(shape, *_turned(x[:, None, :], y[:, :, None], degrees), area).astype(np.float32)
        drawn = drawn.reshape(len(patches), side, SUBPIXELS, side, SUBPIXELS).mean(axis=(2, 4))
        blurred = [ndimage.gaussian_filter(drawn, (0, blur, blur)) if blur else drawn for blur in BLURS]
        misfits.append(min(1 - np.corrcoef(patches.ravel(), b.ravel())[0, 1] ** 2 for b in blurred))
    first, second = np.argsort(misfits)[:2]
    if misfits[first] > MAX_MISFIT or misfits[first] > MAX_MISFIT_RATIO * misfits[second]:
        return None
    shape, degrees = DRAWN[first]
    return None if degrees else shape


def _turned(x: np.ndarray, y: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) as a shape that is turned by ``degrees`` sees them."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return x * cos + y * sin, y * cos - x * sin


def _inside(shape: str, x: np.ndarray, y: np.ndarray, area: float) -> np.ndarray:
    """Where (x, y), from the shape's centroid, lies in it; a triangle has equal sides and stands on one."""
    if shape == "circle":
        return x**2 + y**2 < area / math.pi
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) < math.sqrt(area) / 2
    radius = math.sqrt(area / (3 * math.sqrt(3)))  # of the inscribed circle
    return (y < radius) & (math.sqrt(3) / 2 * np.abs(x) - y / 2 < radius)


def _flicker(difference: np.ndarray, owner: np.ndarray) -> float | None:
    """RMS change between neighbouring frames of pixels that lie inside the background, or the same colour's object, in both."""
    if len(owner) < 2:
        return None
    flat = ndimage.grey_erosion(owner, (1, 3, 3)) == ndimage.grey_dilation(owner, (1, 3, 3))
    steady = flat[1:] & flat[:-1] & (owner[1:] == owner[:-1])
    return float(np.sqrt((np.diff(difference, axis=0)[steady] ** 2).mean())) if steady.any() else None
