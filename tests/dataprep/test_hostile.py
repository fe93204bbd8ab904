"""Hostile and odd files through the path of a Spark task: the right picture or the reason, in bounded time and memory."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import nasties
import nasty_pictures
import numpy as np
import pyarrow.parquet as pq
import pytest
from nasties import DAMAGE, FRAMES, HEIGHT, WIDTH, Nasty, scene, video
from PIL import Image

from dataprep import clips, listing, spans
from dataprep.filters import FilterConfig, Rejected
from dataprep.geometry import Size

ROOT = Path(__file__).parents[2]
MOST_MEGABYTES = 2048  # resident, of a worker
MOST_SECONDS = 30  # of CPU, for one file


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(np.float64) - b) ** 2))))


@dataclasses.dataclass(frozen=True)
class Fate:
    """What became of one file."""

    reason: str
    detail: str
    caption: str
    frames: int
    number: int
    seconds: float
    megabytes: float
    folder: Path

    @property
    def images(self) -> np.ndarray:
        return np.load(self.folder / f"{self.number}.npy")


def attempt(folder: Path, out: Path) -> dict[str, Fate]:
    """key -> fate of all items in ``folder``, each of which the process has survived."""
    out.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("attempt.py")), str(folder), str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended with {done.returncode} at {lines[-1:]}: {done.stderr[-2000:]}"
    return {key: Fate(**told, folder=out) for key, told in zip(lines[::2], lines[1::2], strict=True)}


def every_tenth() -> list[Nasty]:
    """Each kind of file, cut off at every tenth: what is left of the picture must be right, or it is a row with the reason."""
    whole = scene(1)[0]
    makers: dict[str, Any] = {
        "mp4": lambda path: video(path, scene()),
        "mov": lambda path: video(path, scene(), container={}),  # the index at the end
        "mkv": lambda path: video(path, scene()),
        "avi": lambda path: video(path, scene(), "mpeg4", "yuv420p", options={"qmax": "3", "g": "12"}),
        "ts": lambda path: video(path, scene()),
        "gif": nasties.gif,
        "jpg": lambda path: Image.fromarray(whole).save(path, quality=95),
        "png": lambda path: Image.fromarray(whole).save(path),
        "webp": lambda path: Image.fromarray(whole).save(path, lossless=True),
        "tiff": lambda path: Image.fromarray(whole).save(path, compression="tiff_lzw"),
    }

    def cut(suffix: str, tenths: int) -> Any:
        def make(path: Path) -> None:
            makers[suffix](path)
            path.write_bytes(nasties.truncated(path.read_bytes(), tenths))

        return make

    def flip(suffix: str, seed: int) -> Any:
        def make(path: Path) -> None:
            makers[suffix](path)
            path.write_bytes(nasties.flipped(path.read_bytes(), seed))

        return make

    cuts = [
        Nasty(f"cut-{tenths}.{suffix}", cut(suffix, tenths), scene(), DAMAGE, 24 if suffix in ("avi", "gif") else 30)
        for suffix in makers
        for tenths in range(1, 10)
    ]
    flips = [Nasty(f"flip-{seed}.{suffix}", flip(suffix, seed), None, DAMAGE) for suffix in makers for seed in range(4)]
    return cuts + flips


TIMES = [Fraction(n, 24) for n in range(FRAMES)]
HELD = scene(9)
SQUARES = nasties.over_white(nasties.squares())
QUIET_265 = {"x265-params": "log-level=none:crf=6"}


def made(frames: list[np.ndarray], *arguments: Any, **options: Any) -> Any:
    """A maker of a video of ``frames``."""
    return lambda path: video(path, frames, *arguments, **options)


def saved(image: Image.Image, **options: Any) -> Any:
    """A maker of an image."""
    return lambda path: image.save(path, **options)


def shifted(seconds: int, first: int = 0) -> list[Fraction]:
    """The times of the scene, those from frame ``first`` on moved."""
    return [time + (seconds if n >= first else 0) for n, time in enumerate(TIMES)]


def odd() -> list[Nasty]:
    whole, first = scene(), Image.fromarray(scene(1)[0])
    narrow = [image.reshape(HEIGHT, -1, 2, 3).mean(2).astype(np.uint8) for image in whole]
    large = [np.repeat(np.repeat(image, 10, 0), 10, 1) for image in scene(16)]
    on_its_side = [np.rot90(image, -1) for image in whole]
    others = [Image.fromarray(image) for image in HELD[1:]]
    wide, profile = nasty_pictures.adobe_rgb(whole[0])
    disabled = {"avoid_negative_ts": "disabled"}
    return [
        # Clocks.
        Nasty("gap.mkv", made(whole, times=shifted(36000, 20)), None, frozenset({"gap in timestamps"})),
        Nasty("negative.mkv", made(whole, times=shifted(-1)), whole),
        Nasty(
            "negative.mp4", made(whole, times=shifted(-1), container=disabled), whole[24:]
        ),  # an edit list hides the first second
        Nasty("late.mp4", made(whole, times=shifted(3)), whole),
        Nasty("untimed.avi", made(whole, options={"crf": "8", "bf": "0"}), whole),
        Nasty("edits.mp4", nasties.edit_list_from_the_middle, whole[24:]),
        # Streams.
        Nasty("resized.ts", nasties.changes_its_size, whole),
        Nasty("cover.mp4", nasties.cover_art_first, whole),
        Nasty("top-first.mp4", lambda path: nasties.interlaced(path, True), nasties.fields()[::2], psnr=36),
        Nasty("bottom-first.mkv", lambda path: nasties.interlaced(path, False), nasties.fields()[::2], psnr=36),
        # Bombs.
        Nasty("packets.mp4", nasties.many_packets, None, frozenset({"too long to decode"})),
        Nasty("canvas.gif", lambda path: nasties.gif(path, 65535, 65535), None, frozenset({"too many pixels", "not decodable"})),
        Nasty("text.png", nasty_pictures.png_with_a_text_bomb, whole[:1], DAMAGE),
        Nasty("zeros.mp4", lambda path: path.write_bytes(bytes(100_000)), None, DAMAGE),
        Nasty("empty.mp4", lambda path: path.write_bytes(b""), None, DAMAGE),
        Nasty("empty.jpg", lambda path: path.write_bytes(b""), None, DAMAGE),
        # Geometry.
        Nasty("turned.mp4", made(on_its_side, prepare=nasties.rotated(90)), whole),
        Nasty("askew.mp4", made(whole, prepare=nasties.rotated(30)), None, frozenset({"unusual rotation"})),
        Nasty("narrow.mp4", made(narrow, sample_aspect_ratio=Fraction(2)), whole, psnr=28),
        # Colours.
        Nasty("untagged.mp4", made(large, matrix=1), scene(16)),
        Nasty("tagged.mp4", made(whole, matrix=1, colorspace=1), whole),
        Nasty("full-range.mp4", made(whole, pix_fmt="yuvj444p", color_range=2), whole),
        Nasty("ten-bit.mp4", made(whole, pix_fmt="yuv444p10le"), whole, psnr=35),
        Nasty("ten-bit.mkv", made(whole, "libx265", "yuv420p10le", options=QUIET_265), whole, psnr=28),
        Nasty("see-through.mov", made(nasties.squares(), "qtrle", "argb", options={}), SQUARES),
        Nasty("see-through.mkv", made(nasties.squares(), "ffv1", "yuva444p", options={}), SQUARES),
        Nasty("see-through.gif", nasties.see_through_gif, SQUARES),
        Nasty("see-through.png", saved(Image.fromarray(nasties.squares()[0])), SQUARES[:1], psnr=40),
        Nasty("wide.png", saved(Image.fromarray(wide), icc_profile=profile), whole[:1], psnr=42),
        Nasty("broken-profile.png", saved(first, icc_profile=profile[:200]), whole[:1], psnr=60),
        Nasty("cmyk.jpg", saved(first.convert("CMYK"), quality=98, subsampling=0), whole[:1]),
        Nasty("sixteen.png", nasty_pictures.sixteen_bit_rgb, whole[:1], psnr=45),
        # What the ffmpeg program does.
        Nasty("pq.mp4", nasties.high_dynamic_range, scene(24), psnr=29),
        Nasty("hlg.mkv", lambda path: nasties.high_dynamic_range(path, 18), scene(24), psnr=29),
        Nasty("rare.mkv", nasties.rare_codec, scene(24), psnr=28),
        Nasty("rare-clock.mkv", lambda path: nasties.rare_codec(path, "BFrames=7"), None, frozenset({"corrupt"})),
        # Moving images: a gif is a video, others show their first picture.
        Nasty("moving.gif", nasties.gif, scene(24), psnr=26),
        Nasty("moving.webp", saved(first, save_all=True, lossless=True, append_images=others), whole[:1]),
        Nasty("moving.png", saved(first, save_all=True, append_images=others), whole[:1]),
    ]


ALL = every_tenth() + odd()


@pytest.fixture(scope="module")
def fates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fate]:
    """By file name."""
    folder = tmp_path_factory.mktemp("hostile")
    for nasty in ALL:  # the suffix becomes part of the key, which it otherwise is not
        path = folder / f"{nasty.name}{Path(nasty.name).suffix}"
        nasty.make(path)
        path.with_suffix(".txt").write_text(nasty.name)
    return attempt(folder, tmp_path_factory.mktemp("out") / "frames")


@pytest.mark.parametrize("nasty", ALL, ids=[nasty.name for nasty in ALL])
def test_the_right_picture_or_the_reason(fates: dict[str, Fate], nasty: Nasty) -> None:
    fate = fates[nasty.name]
    if fate.reason:
        assert fate.reason in nasty.reasons, fate.detail
        assert len(fate.detail.splitlines()) == 1
    elif nasty.frames is None:
        assert nasty.name.startswith("flip"), "kept"  # a flipped bit may be one of colour, which nothing gives away
    else:
        if not nasty.reasons:
            assert abs(fate.frames - len(nasty.frames)) <= 1
        assert min(psnr(shown, drawn) for shown, drawn in zip(fate.images, nasty.frames, strict=False)) > nasty.psnr


def test_no_file_takes_much_memory_or_time(fates: dict[str, Fate]) -> None:
    assert max(fate.megabytes for fate in fates.values()) < MOST_MEGABYTES
    assert max((fate.seconds, key) for key, fate in fates.items()) < (MOST_SECONDS, "")


def test_no_reason_is_unforeseen(fates: dict[str, Fate]) -> None:
    assert {key: fate.detail for key, fate in fates.items() if fate.reason == "failed"} == {}


def test_hostile_names_are_only_names(tmp_path: Path) -> None:
    media, out = tmp_path / "media", tmp_path / "out"
    media.mkdir()
    captions = nasty_pictures.hostile_names(media)
    before = sorted(tmp_path.rglob("*"))
    fates = attempt(media, out)
    assert {key: fate.caption for key, fate in fates.items()} == captions
    assert all(fate.frames == 1 for fate in fates.values())
    assert [path for path in sorted(tmp_path.rglob("*")) if out not in (path, *path.parents)] == before


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("damage", ["cut", "header"])
def test_what_can_be_read_of_a_broken_tar_is_right(tmp_path: Path, damage: str, tenths: int) -> None:
    captions = nasty_pictures.tar(tmp_path / "set.tar", 12)
    data = (tmp_path / "set.tar").read_bytes()
    at = len(data) * tenths // 10
    if damage == "cut":
        (tmp_path / "set.tar").write_bytes(data[:at])
    else:  # the next member's header is gone
        at = data.index(b"ustar", at) // 512 * 512
        (tmp_path / "set.tar").write_bytes(data[:at] + b"\xff" * 512 + data[at + 512 :])
    items = list(listing.list_items([str(tmp_path)]))
    good = {item.key: item for item in items if not item.reason}
    assert {item.reason for item in items} - {""} <= {"broken tar", "caption without media"}
    assert any(item.reason == "broken tar" for item in items)
    for number, key in enumerate(captions):
        if key not in good:
            assert number >= (tenths - 1) * len(captions) // 10 - 1  # what lies before the damage is there
            continue
        media = good[key].media
        assert media is not None
        with spans.open_span(media) as file, contextlib.suppress(Rejected):  # the last one may be cut
            images, _ = clips.read_image(file, [Size(HEIGHT, WIDTH)], FilterConfig())
            assert psnr(images[0], scene(12)[number]) > 45


@pytest.mark.slow
def test_a_small_file_that_would_take_gigabytes(tmp_path: Path) -> None:
    """And the next one is none the worse for it."""
    media = tmp_path / "media"
    media.mkdir()
    nasties.raw_frames_of_8k(media / "a.mp4")
    assert (media / "a.mp4").stat().st_size < 200_000
    video(media / "b.mp4", scene())
    for kind, mode in (("c.png", "I;16"), ("d.tiff", "F"), ("e.png", "LA"), ("f.webp", "RGBA"), ("g.jpg", "CMYK")):
        Image.new(mode, (8192, 4352)).save(media / kind)
    for name in "abcdefg":
        (media / f"{name}.txt").write_text(name)
    fates = attempt(media, tmp_path / "out")
    assert {key: fate.reason for key, fate in fates.items()} == {"a": "too much memory", **dict.fromkeys("bcdefg", "")}
    assert fates["b"].frames == FRAMES
    assert max(fate.megabytes for fate in fates.values()) < MOST_MEGABYTES


@pytest.mark.slow
def test_a_job_of_odd_and_hostile_files_ends_as_they_do_one_by_one(
    tmp_path: Path, fates: dict[str, Fate], encoder_folder: Path
) -> None:
    """In Spark, whose workers are forked and have threads of their own."""
    (tmp_path / "in").mkdir()
    for nasty in odd():
        path = tmp_path / "in" / f"{nasty.name}{Path(nasty.name).suffix}"
        nasty.make(path)
        path.with_suffix(".txt").write_text(nasty.name)
    (tmp_path / "job.yaml").write_text(
        f"""\
inputs: [{tmp_path}/in]
output: {tmp_path}/out
stages: [{{ name: only, height: 72, width: 128, frame_format: raw }}]
clips: {{ frame_rate: 24, clip_frames: 1000, min_frames: 12, max_clips_per_video: 1, split_at_cuts: false }}
filters: {{ max_gigapixels: 0.5 }}
select: {{ min_motion: 0, min_sharpness: 0, min_brightness: 0, max_letterbox: 1, duplicate_bits: null }}
text: {{ path: {encoder_folder}, max_tokens: 8 }}
items_per_partition: 16
spark: {{ master: "local[2]" }}
"""
    )
    command = [sys.executable, "-m", "dataprep.run", str(tmp_path / "job.yaml")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in rows} == {nasty.name: fates[nasty.name].reason for nasty in odd()}
