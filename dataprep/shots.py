"""Where one shot ends and the next begins, so that no clip crosses a cut.

PySceneDetect's adaptive detector is fed the pictures of the one decode at the size of the smallest stage. It compares the change
of colour between neighbours with that around it, so that a fast pan, where everything changes all the time, is no cut. Dissolves
and fades are not found: nowhere is a single change large.

Shapes: images are (H, W, 3) uint8 RGB.
"""

from typing import Any

import cv2
import numpy as np

WINDOW = 2  # pictures on each side that a change is compared with
MIN_CHANGE = 15.0  # mean change of hue, saturation and brightness, in levels: PySceneDetect's default
FLASH_SECONDS = 0.25  # two cuts within it, with the same picture before and after, are a flash


class ShotFinder:
    """Collects the pictures of a source, then tells its cuts.

    Args:
        frame_rate: of the stored frames, per second.
    """

    def __init__(self, frame_rate: float) -> None:
        from scenedetect.detectors import AdaptiveDetector  # half a second to import; the driver does without

        self._frame_rate = frame_rate
        self._detector = AdaptiveDetector(min_scene_len=1, window_width=WINDOW, min_content_val=MIN_CHANGE)
        self._images: list[np.ndarray] = []  # BGR
        self._frames: list[int] = []  # the first frame that shows each
        self._cuts: list[int] = []  # numbers of images

    def add(self, image: np.ndarray, frame: int) -> None:
        """The next picture, first shown as stored frame number ``frame``. Pictures that repeat are added once."""
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        if not self._images:
            for number in range(WINDOW):  # the detector looks at nothing that has no neighbours
                self._process(number - WINDOW, image)
        self._images.append(image)
        self._frames.append(frame)
        self._process(len(self._images) - 1, image)

    def cuts(self) -> list[int]:
        """The stored frames at which a new shot begins, ascending; the first shot is not among them. Ends the collecting."""
        if not self._images:
            return []
        for number in range(WINDOW):
            self._process(len(self._images) + number, self._images[-1])
        kept: list[int] = []
        for cut in self._cuts:
            if kept and self._is_flash(kept[-1], cut):
                kept.pop()
            else:
                kept.append(cut)
        return [self._frames[cut] for cut in kept]

    def _process(self, number: int, image: np.ndarray) -> None:
        self._cuts += [cut.frame_num - WINDOW for cut in self._detector.process_frame(self._time(number + WINDOW), image)]

    def _is_flash(self, begin: int, end: int) -> bool:
        """Whether the picture after the cut ``end`` goes on where the one before the cut ``begin`` was."""
        from scenedetect.detectors import ContentDetector

        if self._frames[end] - self._frames[begin] > FLASH_SECONDS * self._frame_rate:
            return False
        detector = ContentDetector(threshold=MIN_CHANGE, min_scene_len=0)
        detector.process_frame(self._time(0), self._images[begin - 1])
        return not detector.process_frame(self._time(1), self._images[end])

    def _time(self, number: int) -> Any:
        from scenedetect import FrameTimecode

        return FrameTimecode(number, fps=float(self._frame_rate))
