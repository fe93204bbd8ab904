"""Interlaced frames -> whole ones. A frame of interlaced video holds two moments, in its even and in its odd lines; moving things
look combed in it. bwdif keeps the lines of the earlier moment and makes the others from their neighbours in place and time."""

from collections.abc import Iterator
from typing import Any

import av


def deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """As many frames at the same times: as they are up to the first one that is interlaced, from there on through bwdif, which
    leaves alone those that are not."""
    graph: _Graph | None = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        layout = (frame.width, frame.height, frame.format.name)
        if graph is None or graph.layout != layout:
            if graph is not None:
                yield from graph.push(None)
            graph = _Graph(frame, layout)
        yield from graph.push(frame)
    if graph is not None:
        yield from graph.push(None)


class _Graph:
    """bwdif for frames of one layout. It holds back a frame, since it looks at the next one too."""

    def __init__(self, frame: Any, layout: tuple[int, int, str]) -> None:
        self.layout, self._clock = layout, frame.time_base
        self._graph = graph = av.filter.Graph()  # must outlive its filters: they hold weak references
        graph.threads = 1
        self._source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
        self._sink = graph.add("buffersink")
        bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
        self._source.link_to(bwdif)
        bwdif.link_to(self._sink)
        graph.configure()

    def push(self, frame: Any) -> Iterator[Any]:
        """The frames that are due after this one, in its clock; the remaining ones after None."""
        self._source.push(frame)
        while True:
            try:
                found: Any = self._sink.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            ticks = found.time_base / self._clock  # bwdif counts in halves
            found.pts, found.duration, found.time_base = round(found.pts * ticks), round(found.duration * ticks), self._clock
            yield found
