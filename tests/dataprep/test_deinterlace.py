"""Frames of two moments become frames of the first, at their times, whatever comes between them."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import nasties
import numpy as np
import pytest
from nasties import FRAMES, scene

from dataprep.deinterlace import deinterlaced


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def decoded(path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


@pytest.mark.parametrize("top_first", [True, False])
def test_frames_show_the_first_of_their_moments(tmp_path: Path, top_first: bool) -> None:
    nasties.interlaced(tmp_path / "v.mp4", top_first)
    combed = list(decoded(tmp_path / "v.mp4"))
    whole = list(deinterlaced(iter(combed)))
    assert [(f.pts, f.duration, f.time_base) for f in whole] == [(f.pts, f.duration, f.time_base) for f in combed]
    for frame, before, moment in zip(whole, combed, nasties.fields()[::2], strict=True):
        assert psnr(frame.to_ndarray(format="rgb24"), moment) > 36
        assert psnr(before.to_ndarray(format="rgb24"), moment) < 26


def test_progressive_frames_are_left_alone(tmp_path: Path) -> None:
    nasties.video(tmp_path / "v.mp4", scene(12))
    frames = list(decoded(tmp_path / "v.mp4"))
    assert all(a is b for a, b in zip(deinterlaced(iter(frames)), frames, strict=True))


def test_size_and_kind_may_change_midway(tmp_path: Path) -> None:
    """Whole frames, combed ones, combed ones of twice the size, in one clock."""
    nasties.interlaced(tmp_path / "v.mp4", True)
    combed = list(decoded(tmp_path / "v.mp4"))[: FRAMES // 2]
    nasties.video(tmp_path / "w.mp4", scene(12))
    whole, large = list(decoded(tmp_path / "w.mp4")), []
    graph = av.filter.Graph()
    source = graph.add_buffer(width=combed[0].width, height=combed[0].height, format=combed[0].format, time_base=Fraction(1, 24))
    sink = graph.add("buffersink")
    graph.link_nodes(source, graph.add("scale", "iw*2:ih*2:interl=1"), sink).configure()
    for frame in list(decoded(tmp_path / "v.mp4"))[FRAMES // 2 :]:
        source.push(frame)
        large.append(sink.pull())
    frames = [*whole, *combed, *large]
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base, frame.duration = number, Fraction(1, 24), 1
    found = list(deinterlaced(iter(frames)))
    assert [frame.pts for frame in found] == list(range(len(frames)))
    assert [frame.width for frame in found] == [frame.width for frame in frames]
    assert not any(frame.interlaced_frame for frame in found)
