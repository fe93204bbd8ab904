"""Pictures of any shape -> one RGB array per stage: upright, scaled to cover the largest stage, cropped at the centre, and the
smaller stages by area from it. The cascade is cheaper and closer to an ideal resize than scaling the source to each size.

Shapes: H height, W width in pixels; arrays are (H, W, 3) uint8 RGB.
"""

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from PIL import Image, ImageCms, ImageOps

from dataprep.bars import NO_BARS
from dataprep.filters import FilterConfig, Rejected, Unsupported

# Without these swscale trades precision for speed: 36 dB instead of 47 against a bicubic resize in floating point.
ACCURATE = "accurate_rnd+full_chroma_int+full_chroma_inp"
HD_HEIGHT = 720  # untagged video of at least this height is BT.709 by convention, smaller video BT.601
MATRICES = {1: "bt709", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}  # AVColorSpace -> name in the scale filter
FULL_RANGE = 2  # AVColorRange
HIGH_RANGE = "high dynamic range"
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVColorTransferCharacteristic
WHITE = (255, 255, 255)  # behind transparent images, as on a page


@dataclasses.dataclass(frozen=True)
class Size:
    """Pixels."""

    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Cover:
    """How a source picture meets a target size: scaled to ``scaled``, then the target cut out at (``top``, ``left``)."""

    scaled: Size
    top: int
    left: int
    kept: float  # share of the picture that is left


def cover(source: Size, target: Size) -> Cover:
    """The smallest scaling of ``source`` that covers ``target``, centred."""
    scale = max(Fraction(target.height, source.height), Fraction(target.width, source.width))
    scaled = Size(max(target.height, round(source.height * scale)), max(target.width, round(source.width * scale)))
    kept = target.height * target.width / (source.height * source.width * scale * scale)
    return Cover(scaled, (scaled.height - target.height) // 2, (scaled.width - target.width) // 2, float(kept))


class VideoScaler:
    """Decoded video frames -> one array per stage. The filter graph is built anew when a stream changes its format midway.

    Args:
        sizes: of the stages, in any order.
        sample_aspect: width over height of one stored pixel.
        filters: limits on the upright size.
    """

    def __init__(self, sizes: Sequence[Size], sample_aspect: Fraction, filters: FilterConfig) -> None:
        self.sizes = tuple(sizes)
        self.sample_aspect = sample_aspect
        self.filters = filters
        self.bars = NO_BARS  # to be cut off frames of their size
        self.upright: Size | None = None  # of the first frame: without bars, square pixels, rotation applied
        self._layout: tuple[object, ...] | None = None

    def __call__(self, frame: av.VideoFrame) -> list[np.ndarray]:
        """One (H, W, 3) uint8 RGB array per stage, in the order of ``sizes``.

        Raises:
            Rejected: the size is out of limits, high dynamic range, or a rotation that is not a multiple of 90 degrees.
        """
        layout = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if layout != self._layout:
            self._build(frame)
            self._layout = layout
        self._source.push(frame)
        return [_over_white(cast(av.VideoFrame, sink.pull()).to_ndarray()) for sink in self._sinks]

    def _build(self, frame: av.VideoFrame) -> None:
        self.filters.check_header(frame.height, frame.width)
        turns, swapped = orientation(frame)
        if frame.color_trc in HDR_TRANSFERS:
            raise Unsupported(HIGH_RANGE, f"{HDR_TRANSFERS[frame.color_trc]} is not tone-mapped")
        left = Size(frame.height, frame.width)
        if self.bars and (self.bars.height, self.bars.width) == (frame.height, frame.width):
            left = Size(frame.height - 2 * self.bars.vertical, frame.width - 2 * self.bars.horizontal)
        stored = Size(left.height, max(1, round(left.width * self.sample_aspect)))
        upright = Size(stored.width, stored.height) if swapped else stored
        if self.upright is None:
            self.upright = upright
            self.filters.check_size(upright.height, upright.width)
        largest = max(self.sizes, key=lambda size: size.height * size.width)
        fit = cover(upright, largest)
        self.filters.check_crop(fit.kept)  # also bounds the scaled picture, which the aspect of a hostile file could blow up
        before_turn = Size(fit.scaled.width, fit.scaled.height) if swapped else fit.scaled

        self._graph = graph = av.filter.Graph()  # must outlive its filters: they hold weak references
        graph.threads = 1
        self._source = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        )
        scale = f"{before_turn.width}:{before_turn.height}:flags=bicubic+{ACCURATE}"
        if _may_be_see_through(frame):  # what is hidden must not bleed into what is not: colours weigh as much as they show
            see_through = [("scale", f"flags={ACCURATE}{_colour(frame)}"), ("format", "gbrap"), ("premultiply", "inplace=1")]
            scaling = [*see_through, ("scale", scale)]
        else:  # planar RGB: every later step works on three full planes and none converts colours again
            scaling = [("scale", f"{scale}{_colour(frame)}"), ("format", "gbrp")]
        cut = [("crop", f"{left.width}:{left.height}")] if left != Size(frame.height, frame.width) else []  # centred
        chain = [
            self._source,
            *(graph.add(*step) for step in [*cut, *scaling]),
            *(graph.add(*turn) for turn in turns),
            graph.add("crop", f"{largest.width}:{largest.height}:{fit.left}:{fit.top}:exact=1"),
            graph.add("split", str(len(self.sizes))),
        ]
        for first, second in itertools.pairwise(chain):
            first.link_to(second)
        self._sinks = []
        for index, size in enumerate(self.sizes):
            branch = [chain[-1]]
            if size != largest:
                inner = cover(largest, size)
                branch.append(graph.add("scale", f"{inner.scaled.width}:{inner.scaled.height}:flags=area+{ACCURATE}"))
                branch.append(graph.add("crop", f"{size.width}:{size.height}:{inner.left}:{inner.top}:exact=1"))
            branch += [graph.add("format", "rgba" if len(scaling) > 2 else "rgb24"), graph.add("buffersink")]
            branch[0].link_to(branch[1], index, 0)
            for first, second in itertools.pairwise(branch[1:]):
                first.link_to(second)
            self._sinks.append(branch[-1])
        graph.configure()


def orientation(frame: av.VideoFrame) -> tuple[list[tuple[str, ...]], bool]:
    """The filters that turn a frame upright by its display matrix, and whether they swap height and width.

    Raises:
        Rejected: the rotation is not a multiple of 90 degrees.
    """
    side = cast(Any, frame.side_data).get(SideData.DISPLAYMATRIX)
    if side is None:
        return [], False
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].tolist()  # [[a, b], [c, d]], 16.16 fixed point, x right, y down
    if a == d == 0 and b and c:
        direction = ("clock" if c < 0 else "cclock_flip") if b > 0 else ("cclock" if c > 0 else "clock_flip")
        return [("transpose", direction)], True
    if b == c == 0 and a and d:
        return [(name,) for name, mirrored in (("hflip", a < 0), ("vflip", d < 0)) if mirrored], False
    raise Rejected("unusual rotation", f"{frame.rotation} degrees")


def upright_image(image: Image.Image) -> Image.Image:
    """An opened image as upright 8-bit sRGB: EXIF orientation and colour profile applied, 16 bit scaled, alpha over white."""
    turned = ImageOps.exif_transpose(image)
    profile = turned.info.get("icc_profile")
    if turned.mode.startswith("I;16") or turned.mode in ("I", "F"):
        levels = np.asarray(turned).astype(np.float64)
        turned = Image.fromarray((levels / 257 if turned.mode != "F" else levels * 255).clip(0, 255).round().astype(np.uint8))
    if turned.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in turned.info:
        layer = turned.convert("RGBA")
        colours = _standard(layer.convert("RGB"), profile)
        colours.putalpha(layer.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), colours).convert("RGB")
    return _standard(turned if turned.mode in ("RGB", "CMYK", "L") else turned.convert("RGB"), profile)


def _standard(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, CMYK or grey in the colours of an ICC ``profile`` as sRGB; one that is broken or of another kind is ignored."""
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if ImageCms.getProfileDescription(source).startswith("sRGB"):
                return image.convert("RGB")
            turned = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if turned is not None:
                return turned
    return image.convert("RGB")


def scale_image(image: Image.Image, sizes: Sequence[Size], filters: FilterConfig) -> list[np.ndarray]:
    """One (H, W, 3) uint8 array per size from an RGB image: covered and cropped like video frames.

    Raises:
        Rejected: too small, or of too different a shape.
    """
    filters.check_size(image.height, image.width)
    largest = max(sizes, key=lambda size: size.height * size.width)
    filters.check_crop(cover(Size(image.height, image.width), largest).kept)
    base = _cropped(image, largest, Image.Resampling.BICUBIC)
    return [np.asarray(base if size == largest else _cropped(base, size, Image.Resampling.BOX)) for size in sizes]


def _cropped(image: Image.Image, size: Size, resampling: Image.Resampling) -> Image.Image:
    fit = cover(Size(image.height, image.width), size)
    scaled = image.resize((fit.scaled.width, fit.scaled.height), resampling)
    return scaled.crop((fit.left, fit.top, fit.left + size.width, fit.top + size.height))


def _may_be_see_through(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _over_white(image: np.ndarray) -> np.ndarray:
    """(H, W, 3), or (H, W, 4) with colours that were multiplied by their alpha -> (H, W, 3)."""
    if image.shape[2] == 3:
        return image
    return np.minimum(image[..., :3].astype(np.uint16) + (255 - image[..., 3:]), 255).astype(np.uint8)


def _colour(frame: av.VideoFrame) -> str:
    """Options of the scale filter: the colour matrix and range of YUV frames, by tag or by convention where untagged."""
    if frame.format.is_rgb:
        return ""
    guess = "bt709" if frame.height >= HD_HEIGHT else "bt601"
    matrix = MATRICES.get(int(frame.colorspace), guess)
    full = int(frame.color_range) == FULL_RANGE or frame.format.name.startswith("yuvj")
    return f":in_color_matrix={matrix}:in_range={'full' if full else 'limited'}"
