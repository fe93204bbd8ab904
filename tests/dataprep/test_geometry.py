"""Geometry: centred covering, fidelity against an ideal resize, orientation, and what images may be."""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dataprep import geometry
from dataprep.clips import read_image
from dataprep.filters import FilterConfig, Rejected
from dataprep.geometry import Size, VideoScaler, cover

LARGE, SMALL = Size(288, 512), Size(36, 64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b) ** 2)))


def natural(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8 noise with the spectrum of photographs, its colours correlated as theirs are."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1e-3
    fields = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.3, s=(height, width)) for _ in "rgb"
    ]
    first, *others = [(field - field.mean()) / field.std() for field in fields]
    channels = [first, *(0.8 * first + 0.6 * other for other in others)]
    return np.clip(128 + 45 * np.stack(channels, -1), 0, 255).astype(np.uint8)


def ideal(image: np.ndarray, size: Size, resampling: Image.Resampling) -> np.ndarray:
    """Resized in floating point; ``image`` has the target's shape up to scale."""
    planes = [Image.fromarray(image[..., c].astype(np.float32)).resize((size.width, size.height), resampling) for c in range(3)]
    return np.stack([np.asarray(plane) for plane in planes], -1).clip(0, 255)


def yuv_frame(image: np.ndarray, matrix: int, colorspace: int) -> av.VideoFrame:
    """(H, W, 3) RGB as full-resolution chroma video in the given matrix, tagged with ``colorspace``."""
    frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv444p", dst_colorspace=matrix)
    frame.colorspace, frame.pts, frame.time_base = colorspace, 0, Fraction(1, 24)
    return frame


@pytest.mark.parametrize(
    ("source", "target", "scaled", "top", "left", "kept"),
    [
        (Size(720, 1280), LARGE, Size(288, 512), 0, 0, 1.0),
        (Size(480, 640), LARGE, Size(384, 512), 48, 0, 0.75),  # 4:3 loses rows
        (Size(100, 300), LARGE, Size(288, 864), 0, 176, 512 / 864),  # 3:1 loses columns
        (Size(1280, 720), LARGE, Size(910, 512), 311, 0, (9 / 16) ** 2),
    ],
)
def test_cover_is_centred_and_as_small_as_possible(
    source: Size, target: Size, scaled: Size, top: int, left: int, kept: float
) -> None:
    fit = cover(source, target)
    assert (fit.scaled, fit.top, fit.left) == (scaled, top, left)
    assert fit.kept == pytest.approx(kept, rel=1e-9)


def test_video_frames_are_close_to_an_ideal_resize() -> None:
    image = natural(720, 1280)
    frame = yuv_frame(image, matrix=1, colorspace=1)
    large, small = VideoScaler([LARGE, SMALL], Fraction(1), FilterConfig())(frame)
    decoded = frame.reformat(format="rgb24").to_ndarray()  # what the frame holds, 8-bit YUV included
    assert psnr(large, ideal(decoded, LARGE, Image.Resampling.BICUBIC)) > 44
    assert psnr(small, ideal(decoded, SMALL, Image.Resampling.BOX)) > 50


def test_images_are_close_to_an_ideal_resize() -> None:
    image = natural(720, 1280)
    large, small = geometry.scale_image(Image.fromarray(image), [LARGE, SMALL], FilterConfig())
    assert psnr(large, ideal(image, LARGE, Image.Resampling.BICUBIC)) > 50
    assert psnr(small, ideal(image, SMALL, Image.Resampling.BOX)) > 50


def test_video_and_image_of_one_picture_agree() -> None:
    """The same crop and the same phase: a shift by half a pixel would cost more than 10 dB."""
    image = natural(480, 640)
    from_video = VideoScaler([LARGE, SMALL], Fraction(1), FilterConfig())(yuv_frame(image, matrix=5, colorspace=5))
    from_image = geometry.scale_image(Image.fromarray(image), [LARGE, SMALL], FilterConfig())
    for video, still in zip(from_video, from_image, strict=True):
        assert psnr(video, still) > 38


@pytest.mark.parametrize("stages", [[SMALL, LARGE], [LARGE], [Size(40, 40), LARGE, Size(90, 160), SMALL]])
def test_any_number_of_stages_in_any_order(stages: list[Size]) -> None:
    image = natural(360, 640)
    arrays = VideoScaler(stages, Fraction(1), FilterConfig())(yuv_frame(image, matrix=5, colorspace=5))
    assert [array.shape for array in arrays] == [(size.height, size.width, 3) for size in stages]
    assert all(psnr(arrays[i], arrays[i].mean((0, 1))) < 30 for i in range(len(stages)))  # pictures, not blanks


@pytest.mark.parametrize(("height", "tag", "matrix"), [(720, 1, 1), (720, 5, 5), (720, 2, 1), (480, 2, 5)])
def test_colours_follow_the_tag_or_the_convention(height: int, tag: int, matrix: int) -> None:
    """Tags: 1 BT.709, 5 BT.601, 2 none. The wrong matrix would turn this green by more than ten levels."""
    colour = np.array([30, 200, 60], np.uint8)
    image = np.broadcast_to(colour, (height, height * 16 // 9, 3))
    (small,) = VideoScaler([SMALL], Fraction(1), FilterConfig())(yuv_frame(np.ascontiguousarray(image), matrix, tag))
    assert np.abs(small.reshape(-1, 3).astype(int) - colour).max() <= 2


def test_pixels_that_are_not_square_are_not_squashed() -> None:
    image = np.zeros((144, 128, 3), np.uint8)
    image[:, :64] = 255  # with pixels twice as wide as high, the upright picture is 144 x 256: left half white
    scaler = VideoScaler([SMALL], Fraction(2), FilterConfig())
    (small,) = scaler(yuv_frame(image, matrix=5, colorspace=5))
    assert scaler.upright == Size(144, 256)
    assert small[:, :30].min() > 240
    assert small[:, 34:].max() < 15


def test_a_stream_may_change_its_size_midway() -> None:
    scaler = VideoScaler([SMALL], Fraction(1), FilterConfig())
    first = scaler(yuv_frame(natural(180, 320), matrix=5, colorspace=5))[0].copy()
    second = scaler(yuv_frame(natural(360, 640, seed=1), matrix=5, colorspace=5))[0]
    third = scaler(yuv_frame(natural(180, 320), matrix=5, colorspace=5))[0]
    assert scaler.upright == Size(180, 320)
    assert (first == third).all()
    assert psnr(first, second) < 20
    with pytest.raises(Rejected, match="too many pixels"):
        VideoScaler([SMALL], Fraction(1), FilterConfig(max_pixels=60_000))(yuv_frame(natural(360, 640), 5, 5))


@pytest.mark.parametrize(("height", "width", "aspect"), [(64, 4096, 1), (4096, 64, 1), (64, 64, 10_000)])
def test_extreme_shapes_are_refused_before_they_are_scaled(height: int, width: int, aspect: int) -> None:
    frame = yuv_frame(np.zeros((height, width, 3), np.uint8), matrix=5, colorspace=5)
    with pytest.raises(Rejected, match="shape too different"):
        VideoScaler([LARGE], Fraction(aspect), FilterConfig())(frame)


QUADRANTS = np.zeros((64, 64, 3), np.uint8)  # upright: red, green / blue, white
QUADRANTS[:32, :32, 0] = QUADRANTS[:32, 32:, 1] = QUADRANTS[32:, :32, 2] = 230
QUADRANTS[32:, 32:] = 230


def stored_as(turned: np.ndarray, path: Path, media: Any, degrees: int, hflip: bool, vflip: bool) -> av.VideoFrame:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24, options={"crf": "5"})
        stream.height, stream.width, stream.pix_fmt = turned.shape[0], turned.shape[1], "yuv420p"
        stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        for _ in range(2):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(turned), format="rgb24")))
        out.mux(stream.encode(None))
    with av.open(str(path)) as container:
        return next(container.decode(video=0))


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_video_comes_out_upright(tmp_path: Path, media: Any, degrees: int, flips: tuple[bool, bool]) -> None:
    """The display turns the stored picture counterclockwise, then mirrors it; so it is stored after the inverse."""
    hflip, vflip = flips
    stored = QUADRANTS[:, ::-1] if hflip else QUADRANTS[::-1] if vflip else QUADRANTS
    stored = np.rot90(stored, -degrees // 90)
    frame = stored_as(stored, tmp_path / "turned.mp4", media, degrees, hflip, vflip)
    (upright,) = VideoScaler([Size(64, 64)], Fraction(1), FilterConfig())(frame)
    assert np.abs(upright.astype(int) - QUADRANTS)[4:28, 4:28].max() < 12
    assert psnr(upright, QUADRANTS) > 20


def test_rotation_swaps_height_and_width(tmp_path: Path, media: Any) -> None:
    frame = stored_as(np.full((64, 128, 3), 99, np.uint8), tmp_path / "tall.mp4", media, 90, False, False)
    scaler = VideoScaler([Size(64, 32), Size(16, 16)], Fraction(1), FilterConfig())
    assert [image.shape for image in scaler(frame)] == [(64, 32, 3), (16, 16, 3)]
    assert scaler.upright == Size(128, 64)


def encoded(image: Image.Image, file_format: str, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    buffer.seek(0)
    return buffer


def odd_images() -> Iterator[Any]:
    upright = Image.fromarray(QUADRANTS)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    yield pytest.param(encoded(upright.rotate(90, expand=True), "PNG", exif=exif), id="exif orientation")
    yield pytest.param(encoded(upright.convert("CMYK"), "JPEG", quality=95, subsampling=0), id="cmyk")
    yield pytest.param(encoded(upright.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), id="palette")
    transparent = upright.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.where(np.arange(64) < 62, 255, 0).astype(np.uint8)[None].repeat(64, 0)))
    yield pytest.param(encoded(transparent, "PNG"), id="alpha")
    yield pytest.param(encoded(transparent, "WEBP", lossless=True), id="webp")


@pytest.mark.parametrize("file", list(odd_images()))
def test_odd_images_come_out_upright_in_rgb(file: io.BytesIO) -> None:
    (image,), size = read_image(file, [Size(64, 64)], FilterConfig())
    assert size == Size(64, 64)
    for rows in (slice(4, 28), slice(36, 60)):
        for columns in (slice(4, 28), slice(36, 60)):
            assert np.abs(image[rows, columns].astype(int) - QUADRANTS[rows, columns]).max() < 30


def test_transparency_lies_over_white() -> None:
    (image,), _ = read_image(encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), [Size(8, 8)], FilterConfig())
    assert (image == 255).all()


def test_sixteen_bit_gray_is_scaled_not_cut() -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    (image,), _ = read_image(encoded(Image.fromarray(levels), "PNG"), [Size(64, 64)], FilterConfig())
    assert np.abs(image[..., 0] - levels / 257).max() <= 1
