"""A checkerboard behind the objects of a clip, and how the camera moves over it, read from the pixels.

    board = find(frames, unit)  # (T, H, W, 3) uint8 RGB, pixels per stage height
    board.places[-1] - board.places[0]  # how far the camera went, stage heights

The board is a product of two square waves, sq(x + cx) sq(y + cy), with the camera at (cx, cy). Its fundamental lies on the two
diagonals of the spectrum, with the phases pi (cx + cy) / CELL and pi (cx - cy) / CELL.

Shapes: T frames, H height, W width.
"""

import itertools
from dataclasses import dataclass

import numpy as np

CELL = 0.25  # side of a square, stage heights; that dataprep draws the same is tested
BIN = 32  # levels of a channel
BINS = 256 // BIN
ALIKE = 60.0  # RGB levels within which pixels are of one colour
MIN_SHARE = 0.15  # of the pixels that each of the two colours must have; mixtures at the squares' edges have neither
MIN_STRENGTH = 0.4  # of the fundamental, relative to that of a whole board
STEPS = (0.008, 0.002, 0.0005)  # stage heights, of the search for the exact place
SUBPIXELS = 8


@dataclass(frozen=True)
class Checkerboard:
    """What is behind the objects."""

    colours: np.ndarray  # (2, 3) RGB
    places: np.ndarray  # (T, 2) x and y of the camera, stage heights; from anywhere, without jumps
    ground: np.ndarray  # (T, H, W, 3) the board alone, as it is seen or would be behind the objects


def find(frames: np.ndarray, unit: float) -> Checkerboard | None:
    """Find a board; None where there is none.

    Args:
        frames: (T, H, W, 3) RGB.
        unit: pixels per stage height.
    """
    colours = _two_colours(frames.reshape(-1, 3).astype(np.float32))
    if colours is None:
        return None
    middle, step = colours.mean(axis=0), (colours[1] - colours[0]) / 2
    difference = frames - middle
    share = np.clip(difference @ step / (step @ step), -1, 1)
    behind = np.linalg.norm(difference - share[..., None] * step, axis=-1) < ALIKE / 2  # else an object
    share[~behind] = 0
    height, width = frames.shape[1:3]
    x, y = ((np.arange(side) + 0.5 - side / 2) / unit for side in (width, height))
    # Without the window, what is not a whole number of squares would leak into the phases.
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[1:-1]
    strengths, sums = [], []
    for sign in (1, -1):
        wave = np.exp(-1j * np.pi / CELL * (x[None, :] + sign * y[:, None]))
        found = (share * (window * wave)).sum(axis=(1, 2))
        strengths.append(np.abs(found) / (window.sum() * 4 / np.pi**2))
        sums.append(np.unwrap(np.angle(-sign * found)) * CELL / np.pi)  # cx + cy, cx - cy
    if np.median(strengths) < MIN_STRENGTH:
        return None
    places = np.stack([sums[0] + sums[1], sums[0] - sums[1]], axis=1) / 2
    # The objects have moved the phases a little.
    for reach, axis in itertools.product(STEPS, np.eye(2)):
        tried = np.stack([places + number * reach * axis for number in range(-4, 5)])
        misfits = [((behind * (_board((x, y), moved, unit) - share)) ** 2).sum(axis=(1, 2)) for moved in tried]
        places = tried[np.argmin(misfits, axis=0), np.arange(len(places))]
    # Any mixture of the two is the board, though compression and scaling blur its edges; behind objects it is what was drawn.
    board = np.where(behind, share, _board((x, y), places, unit))
    return Checkerboard(colours, places, (middle + board[..., None] * step).astype(np.float32))


def _board(sides: tuple[np.ndarray, np.ndarray], places: np.ndarray, unit: float) -> np.ndarray:
    """(T, H, W) in -1..1 at (T, 2) places of the camera."""
    columns, rows = (_square_wave(side + places[:, axis, None], unit) for axis, side in enumerate(sides))
    return rows[:, :, None] * columns[:, None, :]


def _two_colours(pixels: np.ndarray) -> np.ndarray | None:
    """(2, 3) the two colours that most of the (N, 3) pixels have."""
    found, left = [], pixels
    for _ in range(2):
        if len(left) < MIN_SHARE * len(pixels):
            return None
        bins = (left // BIN).astype(int) @ (BINS**2, BINS, 1)
        about = (np.array(np.unravel_index(np.bincount(bins).argmax(), (BINS,) * 3)) + 0.5) * BIN
        near = np.linalg.norm(left - about, axis=1) < ALIKE / 2
        colour = np.median(left[near], axis=0)
        near = np.linalg.norm(left - colour, axis=1) < ALIKE
        if near.sum() < MIN_SHARE * len(pixels):
            return None
        found.append(colour)
        left = left[~near]
    return np.stack(found)


def _square_wave(x: np.ndarray, unit: float) -> np.ndarray:
    """The mean over a pixel around ``x`` of +1 and -1 in turn, for ``CELL`` each."""
    fine = x[..., None] + ((np.arange(SUBPIXELS) + 0.5) / SUBPIXELS - 0.5) / unit
    return np.where(fine % (2 * CELL) < CELL, 1.0, -1.0).mean(axis=-1)
