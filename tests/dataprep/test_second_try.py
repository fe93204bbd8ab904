"""What the ffmpeg program does for PyAV comes out right, or ends with a reason; nothing of it is left behind."""

import dataclasses
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import nasties
import numpy as np
import pytest
from nasties import HEIGHT, WIDTH, scene

from dataprep import partition
from dataprep.clips import ClipConfig
from dataprep.encode import StageConfig, TextConfig
from dataprep.filters import FilterConfig, Rejected
from dataprep.ingest import Item, Span
from dataprep.partition import Recipe

CLIPS = ClipConfig(frame_rate=24, clip_frames=1000, min_frames=12, split_at_cuts=False)


def prepare(span: Span, clips: ClipConfig = CLIPS, filters: FilterConfig | None = None) -> np.ndarray:
    """(T, H, W, 3) of the one clip."""
    stage = StageConfig("only", HEIGHT, WIDTH, "raw")
    recipe = Recipe(stages=(stage,), clips=clips, text=TextConfig("none", 8), filters=filters or FilterConfig())
    packed = partition.prepare(Item("v", "video", "v", span), recipe).clips[0].stages[0]
    return np.frombuffer(packed.frames, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def children() -> set[str]:
    """The processes that this one has started and that still run."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {pid for pid in found if "ffmpeg" in Path(f"/proc/{pid}/comm").read_text()}


@pytest.fixture(scope="module")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PQ video."""
    path = tmp_path_factory.mktemp("bright") / "pq.mp4"
    nasties.high_dynamic_range(path)
    return path


def test_a_member_of_a_tar(tmp_path: Path, bright: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(bright, "v.mp4")
    with tarfile.open(tmp_path / "set.tar") as tar:
        member = tar.getmember("v.mp4")
    images = prepare(Span(str(tmp_path / "set.tar"), member.offset_data, member.size))
    assert len(images) == 24
    assert min(psnr(image, drawn) for image, drawn in zip(images, scene(24), strict=True)) > 29


@pytest.mark.parametrize("name", ["; touch x", "-i", "a,b:c=d", "%d", "'", "concat:a|b", "line\nbreak"])
def test_a_name_is_only_a_name(tmp_path: Path, bright: Path, name: str) -> None:
    path = tmp_path / f"{name}.mp4"
    path.write_bytes(bright.read_bytes())
    assert len(prepare(Span(str(path)))) == 24
    assert list(tmp_path.iterdir()) == [path]


def test_it_ends_when_there_is_enough(bright: Path) -> None:
    assert len(prepare(Span(str(bright)), dataclasses.replace(CLIPS, clip_frames=12, max_clips_per_video=1))) == 12
    assert children() == set()


def test_without_it_the_source_is_rejected(bright: Path) -> None:
    with pytest.raises(Rejected, match="high dynamic range: PQ is not tone-mapped"):
        prepare(Span(str(bright)), dataclasses.replace(CLIPS, second_try=False))


@pytest.mark.parametrize(
    ("damage", "filters"),
    [
        (lambda data: data[: len(data) * 7 // 10], FilterConfig(max_damage=0.1)),
        (lambda data: data[: len(data) // 2] + bytes(5000) + data[len(data) // 2 + 5000 :], FilterConfig()),
        (lambda data: data, FilterConfig(max_memory_mb=48)),
    ],
    ids=["truncated", "holed", "memory"],
)
def test_damage_has_a_reason(tmp_path: Path, bright: Path, damage: Callable[[bytes], bytes], filters: FilterConfig) -> None:
    (tmp_path / "v.mp4").write_bytes(damage(bright.read_bytes()))
    with pytest.raises(Rejected, match="^(truncated|corrupt|not decodable|too short)"):
        prepare(Span(str(tmp_path / "v.mp4")), filters=filters)
    assert children() == set()


def test_limits_of_the_pixels_hold(bright: Path) -> None:
    with pytest.raises(Rejected, match="too long to decode"):
        prepare(Span(str(bright)), filters=FilterConfig(max_gigapixels=20 * 65536e-9))
