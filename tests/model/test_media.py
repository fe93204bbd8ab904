"""Clips written and read back: what a player would see equals what was handed in."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from model import media
from model.errors import UserError


def moving_square(count: int, height: int, width: int) -> np.ndarray:
    """(T, H, W, 3): an orange square on teal that moves one pixel to the right per frame."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (20, 110, 130)
    side = height // 2
    for index in range(count):
        frames[index, height // 4 : height // 4 + side, index : index + side] = (230, 120, 30)
    return frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


@pytest.mark.parametrize(("height", "width"), [(36, 64), (288, 512), (45, 81)])
@pytest.mark.parametrize("frame_rate", [12.0, 23.976])
def test_mp4_round_trip(tmp_path: Path, height: int, width: int, frame_rate: float) -> None:
    frames = moving_square(13, height, width)
    media.write_mp4(tmp_path / "new" / "clip.mp4", torch.from_numpy(frames), frame_rate)
    clip = media.read_video(tmp_path / "new" / "clip.mp4", max_frames=100)
    assert clip.frames.shape == (13, height + height % 2, width + width % 2, 3)
    assert clip.frame_rate == pytest.approx(frame_rate, rel=1e-4)
    # The middle of the square and the ground, away from chroma edges: the colours themselves survive.
    np.testing.assert_allclose(clip.frames[3, height // 2, 3 + height // 4], (230, 120, 30), atol=6)
    np.testing.assert_allclose(clip.frames[3, 2, width - 4], (20, 110, 130), atol=6)
    luma = [0.2126, 0.7152, 0.0722]
    assert psnr(clip.frames[:, :height, :width] @ luma, frames @ luma) > 36
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["clip.mp4"]


def test_mp4_of_enlarged_frames_keeps_colour_edges(tmp_path: Path) -> None:
    frames = media.enlarge(moving_square(5, 18, 32), 144)
    assert frames.shape == (5, 144, 256, 3)
    media.write_mp4(tmp_path / "clip.mp4", frames, 8)
    assert psnr(media.read_video(tmp_path / "clip.mp4", max_frames=5).frames, frames) > 38


def test_mp4_is_for_browsers(tmp_path: Path) -> None:
    media.write_mp4(tmp_path / "clip.mp4", moving_square(8, 36, 64), 8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1)  # bt709, limited
        assert container.duration / av.time_base == pytest.approx(1.0)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart


def test_read_video_stops(tmp_path: Path) -> None:
    media.write_mp4(tmp_path / "clip.mp4", moving_square(10, 36, 64), 8)
    assert len(media.read_video(tmp_path / "clip.mp4", max_frames=4).frames) == 4


def test_read_video_refuses(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(UserError, match=name):
            media.read_video(tmp_path / name, max_frames=4)


def test_gif(tmp_path: Path) -> None:
    frames = moving_square(12, 36, 64)
    media.write_gif(tmp_path / "clip.gif", frames, 12)
    with Image.open(tmp_path / "clip.gif") as gif:
        assert gif.n_frames == 12
        assert gif.info["loop"] == 0
        durations, shown = [], []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
            shown.append(np.asarray(gif.convert("RGB")))
    assert sum(durations) == 1000
    assert max(durations) - min(durations) <= 10
    np.testing.assert_array_equal(np.stack(shown), frames)  # few colours: exact


def test_contact_sheet_shows_frames_and_words(tmp_path: Path) -> None:
    clip = moving_square(16, 36, 64)
    media.write_contact_sheet(tmp_path / "sheet.png", [clip, clip[:1]], ["an orange square moves right", ""], columns=4)
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image)
    margin, gap = media.SHEET_MARGIN, media.SHEET_GAP
    assert sheet.shape[1] == 2 * margin + 4 * 258 + 3 * gap
    for column, index in enumerate([0, 5, 10, 15]):
        left = margin + 1 + column * (258 + gap)
        np.testing.assert_array_equal(sheet[margin + 1 : margin + 145, left : left + 256][::4, ::4], clip[index])
    words = sheet[margin + 146 + gap : margin + 146 + gap + media.SHEET_FONT_SIZE, margin:-margin]
    assert (words < 100).all(axis=-1).sum() > 200  # ink
    second = sheet[-(146 + gap + margin) :, margin + 258 + gap :]
    assert (second == media.SHEET_PAPER).all()  # one frame, no words


def test_contact_sheet_wraps_long_prompts() -> None:
    clip = moving_square(1, 18, 32)
    short = media.contact_sheet([clip], ["a circle"])
    long = media.contact_sheet([clip], ["a red circle moves left " * 10 + "x" * 200])
    assert long.width == short.width
    assert long.height > short.height + 5 * media.SHEET_FONT_SIZE
    right_margin = np.asarray(long)[:, -media.SHEET_MARGIN :]
    assert (right_margin == media.SHEET_PAPER).all()


def test_contact_sheet_reduces_large_clips() -> None:
    sheet = media.contact_sheet([moving_square(2, 288, 512)], ["large"])
    assert sheet.width == 2 * media.SHEET_MARGIN + 2 * 258 + media.SHEET_GAP


@pytest.mark.parametrize(
    ("frames", "frame_rate"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), 8),
        (np.zeros((2, 3, 4, 4), np.uint8), 8),
        (np.zeros((0, 4, 4, 3), np.uint8), 8),
        (np.zeros((2, 4, 4, 3), np.uint8), 0),
    ],
)
def test_wrong_frames_leave_no_file(tmp_path: Path, frames: np.ndarray, frame_rate: float) -> None:
    for write in (media.write_mp4, media.write_gif):
        with pytest.raises(ValueError, match="frame"):
            write(tmp_path / "clip", frames, frame_rate)
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.gif"
    path.write_bytes(b"old")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        media.write_gif(path, moving_square(2, 36, 64), 8)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
