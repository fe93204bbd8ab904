"""Black bars around the moving picture, which are cut off before it is scaled: letterboxes and pillarboxes.

A bar is black in every picture looked at, there is one as wide on the other side, and in many of the pictures what is not black
begins along all of it at once. So a night sky, a candle or a ball on black keep what is around them.

Shapes: H height, W width of stored frames.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

LOOKS_PER_SECOND = 4
HELD_SECONDS = 1.0  # the first pictures, held back for a guess before the first of them is scaled
HELD_BYTES = 96 << 20
BLACK_LEVEL = 20  # grey levels; codecs ring around black bars
BLACK_SHARE = 0.98  # of a row or column of a bar: a channel's logo may reach in
EDGE_SHARE = 0.5  # of the row or column behind it that is not black, in at least
EDGE_PICTURES = 1 / 3  # of the pictures that are not all black
MIN_SIDE = 0.01  # of a side: smaller bars stay, and two findings that differ by less are the same
MIN_LEFT = 0.2  # of a side that must remain


@dataclasses.dataclass(frozen=True)
class Bars:
    """Stored pixels, of frames of ``height`` x ``width``. Sides that face each other have equal ones."""

    vertical: int = 0  # at the top, and as much at the bottom
    horizontal: int = 0  # at the left, and as much at the right
    height: int = 0
    width: int = 0

    def __bool__(self) -> bool:
        return bool(self.vertical or self.horizontal)

    def differ(self, other: "Bars") -> bool:
        """Whether one of them would leave bars, or cut into the picture, where the other is right."""
        if not self and not other:
            return False
        if self and other and (self.height, self.width) != (other.height, other.width):
            return True
        height, width = self.height or other.height, self.width or other.width
        return abs(self.vertical - other.vertical) > max(4, MIN_SIDE * height) or (
            abs(self.horizontal - other.horizontal) > max(4, MIN_SIDE * width)
        )


NO_BARS = Bars()


class BarFinder:
    """Looks at some of the pictures that are picked.

    Args:
        frame_rate: of the stored frames, per second.
    """

    def __init__(self, frame_rate: float) -> None:
        self._held = max(1, round(HELD_SECONDS * frame_rate))
        self._step = max(1, round(frame_rate / LOOKS_PER_SECOND))
        self._rows: list[np.ndarray] = []  # (H,) shares that are not black, for each picture looked at
        self._columns: list[np.ndarray] = []  # (W,)
        self._size: tuple[int, int] | None = None
        self._steady = True  # all of one size, and of colours that are shown

    def watch(self, picked: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        """Passes on pairs (frame, repeats). Those of the first second are held back until all of them, or ``HELD_BYTES``, are
        there, so that ``found`` has something to tell when the first one comes out."""
        held: deque[tuple[Any, int]] | None = deque()
        count = size = due = 0
        for frame, repeats in picked:
            if count >= due:
                self._look(frame)
                due = count + self._step
            count += repeats
            if held is None:
                yield frame, repeats
                continue
            held.append((frame, repeats))
            size += sum(plane.buffer_size for plane in frame.planes)
            if count >= self._held or size > HELD_BYTES:
                self._look(frame)
                yield from held
                held = None
        if held is not None:
            yield from held

    def found(self) -> Bars:
        """The bars of all pictures looked at so far; none if they changed their size."""
        seen = [n for n, rows in enumerate(self._rows) if rows.max() > 1 - BLACK_SHARE]
        if not seen or not self._steady or self._size is None:
            return NO_BARS
        rows, columns = np.stack([self._rows[n] for n in seen]), np.stack([self._columns[n] for n in seen])
        height, width = self._size
        vertical, horizontal = _bar(rows, 1), _bar(columns, 1)
        # What bars take of the lines that cross them is not to count against those: 9:16 in 16:9 leaves a third of each row.
        vertical, horizontal = _bar(rows, 1 - 2 * horizontal / width), _bar(columns, 1 - 2 * vertical / height)
        return Bars(vertical, horizontal, height, width) if vertical or horizontal else NO_BARS

    def _look(self, frame: Any) -> None:
        size = (frame.height, frame.width)
        # What is black may be hidden, and white where it is shown.
        see_through = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
        if see_through or self._size not in (None, size):
            self._steady = False
        self._size = size
        if self._steady:
            bright = (frame.to_ndarray(format="gray") > BLACK_LEVEL).view(np.uint8)
            columns, rows = (cv2.reduce(bright, axis, cv2.REDUCE_SUM, dtype=cv2.CV_32S).ravel() for axis in (0, 1))
            self._rows.append(rows / frame.width)
            self._columns.append(columns / frame.height)


def _bar(shares: np.ndarray, whole: float) -> int:
    """The width of the bars at both ends of a side, an even number of pixels.

    Args:
        shares: (T, side), of the lines across it that are not black.
        whole: the most that such a share can be.
    """
    side = shares.shape[1]
    inside = np.flatnonzero(shares.max(axis=0) > 1 - BLACK_SHARE)
    if not len(inside):
        return 0
    first, last = int(inside[0]), int(inside[-1])
    width = min(first, side - 1 - last)
    if width < MIN_SIDE * side or side - 2 * width < MIN_LEFT * side:
        return 0
    near = max(2, round(MIN_SIDE * side))
    edges = (shares[:, first : first + near + 1], shares[:, last - near : last + 1])
    if any((edge.max(axis=1) > EDGE_SHARE * whole).mean() < EDGE_PICTURES for edge in edges):
        return 0
    return -(-width // 2) * 2  # chroma is stored at half resolution
