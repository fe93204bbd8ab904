"""Odd pictures, and names that want to be more than names; the videos are in nasties.py."""

import io
import struct
import tarfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from nasties import HEIGHT, WIDTH, scene
from PIL import Image


def sixteen_bit_rgb(path: Path) -> None:
    """A PNG of 16 bits a channel, written by libav."""
    encoder: Any = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = HEIGHT, WIDTH, "rgb48be", Fraction(1, 24)
    frame = av.VideoFrame.from_ndarray(scene(1)[0], format="rgb24").reformat(format="rgb48be")
    path.write_bytes(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))


ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])  # to XYZ at D50
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
ADOBE_GAMMA = 563 / 256


def adobe_rgb(image: np.ndarray) -> tuple[np.ndarray, bytes]:
    """The same colours in a wider space, whose numbers are others, and the ICC profile that says so."""
    levels = image / 255.0
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    wide = (linear @ SRGB.T @ np.linalg.inv(ADOBE_RGB).T).clip(0, 1) ** (1 / ADOBE_GAMMA)

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    text = b"wide"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(79),
        b"cprt": b"text" + bytes(4) + text + b"\0",
    }
    tags |= {b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249)}
    for letter, column in zip((b"r", b"g", b"b"), ADOBE_RGB.T, strict=True):
        tags[letter + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*column)
        tags[letter + b"TRC"] = b"curv" + bytes(4) + struct.pack(">IH", 1, round(ADOBE_GAMMA * 256)) + bytes(2)
    table, body, begin = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", begin + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI", begin + len(body), b"lcms", 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    header = header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    return (wide * 255).round().astype(np.uint8), header.ljust(128, b"\0") + table + body


def png_with_a_text_bomb(path: Path) -> None:
    """A hundred megabytes of text in a compressed chunk of 100 kB."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "0" * 100_000_000, zip=True)
    Image.fromarray(scene(1)[0]).save(path, pnginfo=info)


# Names.

NAMES = (
    "; rm -rf x",
    "$(touch x)",
    "`touch x`",
    "-i",
    "--help",
    "a'b\"c",
    "%s%n",
    "concat:a|b",
    "http:x",
    "line\nbreak",
    "\u202etxt.4pm",
    "x" * 240,
)


def hostile_names(folder: Path) -> dict[str, str]:
    """A good image under each name, in the folder or, where a folder cannot have it, a tar. Returns key -> caption."""
    captions = {name: f"number {number}" for number, name in enumerate(NAMES)}
    for name, caption in captions.items():
        (folder / f"{name}.png").write_bytes(png(scene(1)[0]))
        (folder / f"{name}.txt").write_text(caption)
    return {**captions, **tar(folder / "names.tar", 4, ("../../up", "/etc/passwd", "a/../../b", "C:\\x"))}


def tar(path: Path, count: int, names: tuple[str, ...] = ()) -> dict[str, str]:
    """Images of the scene under ``names``, or ``count`` of them under numbers, with captions. Returns key -> caption."""
    captions = {name: f"caption of {name}" for name in names or [f"{number:02}" for number in range(count)]}
    with tarfile.open(path, "w") as out:
        for (name, caption), image in zip(captions.items(), scene(len(captions)), strict=True):
            for suffix, data in ((".png", png(image)), (".txt", caption.encode())):
                header = tarfile.TarInfo(name + suffix)
                header.size = len(data)
                out.addfile(header, io.BytesIO(data))
    return captions


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
