"""Mutants of small valid files: no crash, no hang, no error that is not foreseen, bounded memory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nasties
import nasty_pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nasties import scene, video
from PIL import Image

ROOT = Path(__file__).parents[2]
MUTANTS, PORTION = 10_000, 500


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid files, most of them of a few kilobytes."""
    folder, frames = tmp_path_factory.mktemp("valid"), scene(14, 48, 64)
    small = {"crf": "28", "preset": "veryfast", "g": "6"}
    video(folder / "a.mp4", frames, pix_fmt="yuv420p", options=small)
    video(folder / "b.mov", frames, pix_fmt="yuv420p", options=small, container={})
    video(folder / "c.mkv", frames, pix_fmt="yuv420p", options=small)
    video(folder / "d.ts", frames, pix_fmt="yuv420p", options=small)
    video(folder / "e.webm", frames, "libvpx-vp9", "yuv420p", options={"crf": "40", "deadline": "realtime", "cpu-used": "8"})
    video(folder / "f.avi", frames, "mpeg4", "yuv420p", options={"qmax": "10"})
    video(folder / "g.mkv", frames, "libx265", "yuv420p10le", options={"x265-params": "log-level=none:crf=30"})
    video(folder / "h.mpg", frames, "mpeg2video", "yuv420p", rate=25, options={"qmax": "10"})
    video(folder / "i.wmv", frames, "wmv2", "yuv420p", options={"qmax": "10"})
    video(folder / "j.flv", frames, "flv", "yuv420p", options={"qmax": "10"})
    nasties.interlaced(folder / "s.mp4", True)
    nasties.high_dynamic_range(folder / "t.mp4")
    still = Image.fromarray(frames[0])
    still.save(folder / "k.gif", save_all=True, append_images=[Image.fromarray(image) for image in frames[1:]], duration=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide, profile = nasty_pictures.adobe_rgb(frames[0])
    Image.fromarray(wide).save(folder / "l.jpg", quality=80, exif=exif, icc_profile=profile)
    still.save(folder / "still.png")
    still.save(folder / "m.webp", quality=80, exif=exif)
    still.save(folder / "n.tiff", compression="tiff_lzw")
    still.convert("CMYK").save(folder / "o.tiff", compression="tiff_adobe_deflate")
    still.save(folder / "p.bmp")
    nasty_pictures.tar(folder / "q.tar", 3)
    table = {"path": ["still.png", "gone.mp4"], "caption": ["a still", "it is gone"], "key": ["still", "gone"]}
    pq.write_table(pa.table(table), folder / "r.parquet")
    return folder


def fuzz(folder: Path, begin: int, end: int) -> None:
    """Mutants ``begin`` to ``end``; fails with their numbers and files."""
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), str(folder), str(begin), str(end)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=550
    )
    lines = done.stdout.splitlines()
    findings = [json.loads(line) for line in lines if line.startswith("{")]
    last = [line for line in lines if not line.startswith("{")][-1:]
    ended = signal.Signals(-done.returncode).name if done.returncode < 0 else done.returncode
    assert ended == 0, f"{ended} at mutant {last}: {done.stderr[-2000:]}"
    assert findings == []
    assert last
    assert last[0].startswith(f"{end - 1} ")


def test_a_hundred_mutants(valid: Path) -> None:
    fuzz(valid, 0, 100)


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(0, MUTANTS, PORTION))
def test_ten_thousand_mutants(valid: Path, begin: int) -> None:
    fuzz(valid, begin, begin + PORTION)
